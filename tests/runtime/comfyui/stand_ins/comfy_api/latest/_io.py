"""Stand-in for V3 nodes: schemas and inputs, checked as the server does.

`call` runs a node as ComfyUI would: in inference mode, on inputs that fit the schema.
"""

from typing import Any, ClassVar

import torch


class Input:
    Parent: Any = None

    def __init__(
        self,
        id: str,
        display_name: str | None = None,
        optional: bool = False,
        tooltip: str | None = None,
        lazy: bool | None = None,
        extra_dict: Any = None,
    ) -> None:
        assert isinstance(id, str)
        self.id, self.optional, self.tooltip = id, optional, tooltip

    def refused(self, value: Any) -> bool:
        kind = self.Parent.Type
        return kind is not Any and not isinstance(value, kind)


class Output:
    Parent: Any = None

    def __init__(
        self,
        id: str | None = None,
        display_name: str | None = None,
        tooltip: str | None = None,
        is_output_list: bool = False,
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


@_typed
class Int:
    io_type, Type = "INT", int

    class Input(Input):
        def __init__(
            self,
            id: str,
            display_name: str | None = None,
            optional: bool = False,
            tooltip: str | None = None,
            lazy: bool | None = None,
            default: int | None = None,
            min: int | None = None,
            max: int | None = None,
            step: int | None = None,
            control_after_generate: bool | None = None,
            display_mode: Any = None,
            socketless: bool | None = None,
            force_input: bool | None = None,
        ) -> None:
            super().__init__(id, display_name, optional, tooltip, lazy)
            assert default is None or min <= default <= max
            self.min, self.max = min, max

        def refused(self, value: Any) -> bool:
            return not isinstance(value, int) or not self.min <= value <= self.max


@_typed
class Float:
    io_type, Type = "FLOAT", float

    class Input(Input):
        def __init__(
            self,
            id: str,
            display_name: str | None = None,
            optional: bool = False,
            tooltip: str | None = None,
            lazy: bool | None = None,
            default: float | None = None,
            min: float | None = None,
            max: float | None = None,
            step: float | None = None,
            round: float | None = None,
            display_mode: Any = None,
            socketless: bool | None = None,
            force_input: bool | None = None,
        ) -> None:
            super().__init__(id, display_name, optional, tooltip, lazy)
            assert default is None or min <= default <= max
            self.min, self.max = min, max

        def refused(self, value: Any) -> bool:
            return not isinstance(value, int | float) or not self.min <= value <= self.max


@_typed
class String:
    io_type, Type = "STRING", str

    class Input(Input):
        def __init__(
            self,
            id: str,
            display_name: str | None = None,
            optional: bool = False,
            tooltip: str | None = None,
            lazy: bool | None = None,
            multiline: bool = False,
            placeholder: str | None = None,
            default: str | None = None,
            dynamic_prompts: bool | None = None,
            socketless: bool | None = None,
            force_input: bool | None = None,
        ) -> None:
            super().__init__(id, display_name, optional, tooltip, lazy)


@_typed
class Combo:
    io_type, Type = "COMBO", str

    class Input(Input):
        def __init__(
            self,
            id: str,
            options: list[str] | None = None,
            display_name: str | None = None,
            optional: bool = False,
            tooltip: str | None = None,
            lazy: bool | None = None,
            default: str | None = None,
            control_after_generate: bool | None = None,
            upload: Any = None,
            image_folder: Any = None,
            remote: Any = None,
            socketless: bool | None = None,
        ) -> None:
            super().__init__(id, display_name, optional, tooltip, lazy)
            assert isinstance(options, list)
            assert default is None or default in options


class Schema:
    def __init__(
        self,
        node_id: str,
        display_name: str | None = None,
        category: str = "sd",
        inputs: list[Input] | None = None,
        outputs: list[Output] | None = None,
        hidden: Any = None,
        description: str = "",
        is_input_list: bool = False,
        is_output_node: bool = False,
        is_deprecated: bool = False,
        is_experimental: bool = False,
        is_api_node: bool = False,
        not_idempotent: bool = False,
        enable_expand: bool = False,
    ) -> None:
        self.node_id, self.inputs, self.outputs = node_id, inputs or [], outputs or []
        ids = [x.id for x in self.inputs] + [x.id for x in self.outputs if x.id is not None]
        assert len(ids) == len(set(ids)), "ids must be unique among inputs and outputs"


class NodeOutput:
    def __init__(self, *args: Any, ui: Any = None, expand: Any = None, block_execution: Any = None):
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
