"""Stand-in for V3 nodes: schemas and inputs, checked as the server does.

`call` runs a node as ComfyUI would: in inference mode, on inputs that fit the schema.
"""

from typing import Any, ClassVar

import torch


class Input:
    Parent: Any = None

    def __init__(self, id: str, *, optional: bool = False, tooltip: str | None = None) -> None:
        assert isinstance(id, str)
        self.id, self.optional, self.tooltip = id, optional, tooltip

    def refused(self, value: Any) -> bool:
        kind = self.Parent.Type
        return kind is not Any and not isinstance(value, kind)


class Output:
    Parent: Any = None

    def __init__(
        self, id: str | None = None, *, display_name: str | None = None, tooltip: str | None = None
    ) -> None:
        self.id, self.display_name = id, display_name


def _typed(cls: Any) -> Any:
    """Binds a type's inputs and outputs to it."""
    for name, base in (("Input", Input), ("Output", Output)):
        setattr(cls, name, type(name, (getattr(cls, name, base),), {"Parent": cls}))
    return cls


def Custom(io_type: str) -> Any:
    return _typed(type("Custom", (), {"io_type": io_type, "Type": Any}))


@_typed
class Image:
    io_type, Type = "IMAGE", torch.Tensor


@_typed
class Mask:
    io_type, Type = "MASK", torch.Tensor


class _Within(Input):
    """A number with limits. Of the stand-in alone."""

    def __init__(self, id: str, default: Any, min: Any, max: Any, **usual: Any) -> None:
        super().__init__(id, **usual)
        assert min <= default <= max
        self.min, self.max = min, max

    def refused(self, value: Any) -> bool:
        return super().refused(value) or not self.min <= value <= self.max


@_typed
class Int:
    io_type, Type = "INT", int

    class Input(_Within):
        def __init__(
            self,
            id: str,
            *,
            optional: bool = False,
            tooltip: str | None = None,
            default: int,
            min: int,
            max: int,
            step: int | None = None,
            control_after_generate: bool | None = None,
        ) -> None:
            super().__init__(id, default, min, max, optional=optional, tooltip=tooltip)


@_typed
class Float:
    io_type, Type = "FLOAT", int | float

    class Input(_Within):
        def __init__(
            self,
            id: str,
            *,
            optional: bool = False,
            tooltip: str | None = None,
            default: float,
            min: float,
            max: float,
            step: float | None = None,
        ) -> None:
            super().__init__(id, default, min, max, optional=optional, tooltip=tooltip)


@_typed
class String:
    io_type, Type = "STRING", str

    class Input(Input):
        def __init__(
            self,
            id: str,
            *,
            tooltip: str | None = None,
            multiline: bool = False,
            default: str | None = None,
            dynamic_prompts: bool | None = None,
        ) -> None:
            super().__init__(id, tooltip=tooltip)


@_typed
class Combo:
    io_type, Type = "COMBO", str

    class Input(Input):
        def __init__(
            self,
            id: str,
            *,
            options: list[str],
            tooltip: str | None = None,
            default: str | None = None,
        ) -> None:
            super().__init__(id, tooltip=tooltip)
            assert isinstance(options, list)
            assert default is None or default in options


class Schema:
    def __init__(
        self,
        node_id: str,
        *,
        display_name: str,
        category: str,
        inputs: list[Input],
        outputs: list[Output],
        description: str,
        is_output_node: bool = False,
    ) -> None:
        self.node_id, self.inputs, self.outputs = node_id, inputs, outputs
        ids = [x.id for x in self.inputs] + [x.id for x in self.outputs if x.id is not None]
        assert len(ids) == len(set(ids)), "ids must be unique among inputs and outputs"


class NodeOutput:
    def __init__(self, *args: Any, ui: Any = None) -> None:
        self.args, self.ui = args, ui


class ComfyNode:
    SCHEMA: ClassVar[Any] = None

    def __init_subclass__(cls) -> None:
        state = {name for name, x in vars(cls).items() if not name.startswith("__")}
        assert state <= {"define_schema", "execute", "fingerprint_inputs", "validate_inputs"}

    @classmethod
    def define_schema(cls) -> Schema:
        raise NotImplementedError

    @classmethod
    def execute(cls, **kwargs: Any) -> NodeOutput:
        raise NotImplementedError


def call(node: type[ComfyNode], **inputs: Any) -> tuple[Any, ...]:
    """Runs a node; a ValueError tells of inputs that a server would refuse."""
    schema = node.define_schema()
    known = {x.id: x for x in schema.inputs}
    missing = [x.id for x in schema.inputs if not x.optional and x.id not in inputs]
    wrong = [name for name, x in inputs.items() if name not in known or known[name].refused(x)]
    if missing or wrong:
        raise ValueError(f"missing {missing}, wrong {wrong}")
    with torch.inference_mode():
        out = node.execute(**inputs)
    assert isinstance(out, NodeOutput)
    assert len(out.args) == len(schema.outputs)
    for spec, value in zip(schema.outputs, out.args, strict=True):
        assert spec.Parent.Type is Any or isinstance(value, spec.Parent.Type)
        if spec.Parent is Image:
            assert value.dtype == torch.float32
            assert value.ndim == 4
            assert 0 <= value.min() <= value.max() <= 1
    return out.args
