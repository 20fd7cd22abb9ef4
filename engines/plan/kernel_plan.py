"""The kernel plan of an engine: what the builder says it will launch, kernel by kernel.

With `ProfilingVerbosity.DETAILED` the builder logs "Engine Layer Information", one line per kernel
with every operand's dimensions, strides and type: without a GPU the only look into an engine, and
enough to see what is computed in low precision (`applied`), and to price a plan (`kernel_price`).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Self

from klein_kv.errors import MALFORMED, ArtifactError, BuildError
from klein_kv.json_values import from_json

__all__ = ["FORMAT", "Kernel", "KernelPlan", "Operand", "parse_line"]

FORMAT = "klein-kv kernel plan 1"

ITEM_BITS = {
    "Float": 32,
    "Half": 16,
    "BFloat16": 16,
    "Int64": 64,
    "Int32": 32,
    "UInt8": 8,
    "Int8": 8,
    "Bool": 8,
    "FP8": 8,
    "E8M0": 8,
    "FP4": 4,
    "FP4E2M1": 4,
    "Int4": 4,
}
"""Bits per element of the types that TensorRT names in its log."""

# The builder's stream synchronisation and shape arithmetic on the host: no work for the GPU.
_NO_KERNEL = ("signal", "wait", "shape_call")

_FIELDS = (
    ("Inputs: ", ", Constants: "),
    ("Constants: ", ", Outputs: "),
    ("Outputs: ", ", TacticName: "),
)
_OPERAND = re.compile(
    r"\{ Name: (?P<name>.*?), Dimensions: \[(?P<dims>[-\d,]*)\], "
    r"Strides: \[(?P<strides>[-\d,]*)\].*?Datatype: (?P<dtype>\w+)"
)
_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor that a kernel reads or writes; -1 marks an axis unknown at build."""

    name: str
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.dims)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements; a type without a size in the table counts as two bytes."""
        return self.elements * ITEM_BITS.get(self.dtype, 16) // 8


@dataclass(frozen=True, slots=True)
class Kernel:
    """One launch."""

    name: str  # the builder's name, with a number that makes it unique
    kind: str  # the builder's layer type: "gemm", "kgen", "runtime_fusion", "correlation", ...
    # what it reads; one tensor may appear twice, read through two slices
    inputs: tuple[Operand, ...]
    constants: tuple[Operand, ...]  # weights that the engine holds
    outputs: tuple[Operand, ...]
    onnx_layers: tuple[str, ...]  # names of the ONNX nodes it computes, as far as the builder tells
    stream: int  # number of the stream it runs in

    @property
    def operation(self) -> str:
        """The name without what makes it unique: equal for equal kernels of different blocks."""
        return re.sub(r"^_*(myl_)?|(_U\d+)?(_myl\d+_\d+)?$", "", self.name)

    @property
    def is_attention(self) -> bool:
        """Whether it is a fused attention kernel."""
        return "gemm_mha" in self.name


@dataclass(frozen=True, slots=True)
class KernelPlan:
    """All kernels of one engine, in launch order, without events and host arithmetic."""

    graph: str
    engine: str  # where it came from, for people: target, precision, recipe, library version
    kernels: tuple[Kernel, ...]
    scratch_bytes: int  # activation memory besides inputs and outputs
    weights: tuple[str, ...]  # names of the inputs that are weights

    @property
    def known(self) -> bool:
        """Whether every operand has concrete dimensions: not so for dynamic shapes."""
        return all(
            min(operand.dims, default=0) >= 0
            for kernel in self.kernels
            for operand in (*kernel.inputs, *kernel.constants, *kernel.outputs)
        )

    @classmethod
    def from_lines(
        cls,
        graph: str,
        engine: str,
        lines: Sequence[str],
        scratch_bytes: int = 0,
        weights: Sequence[str] = (),
    ) -> Self:
        """Parses the builder's lines; a `BuildError` tells of one of another form."""
        kernels = [parse_line(line) for line in lines]
        launched = tuple(kernel for kernel in kernels if kernel.kind not in _NO_KERNEL)
        return cls(graph, engine, launched, scratch_bytes, tuple(weights))

    def to_json(self) -> str:
        """The content of `*.layers.json`; `load` reads it."""
        return json.dumps({"format": FORMAT, **asdict(self)}, separators=(",", ":")) + "\n"

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads `*.layers.json`; an `ArtifactError` if it is missing, or not a kernel plan."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(value, dict) or value.pop("format", None) != FORMAT:
                raise ArtifactError(f"{path} is not a kernel plan of this klein-kv; build again")
            plan: Self = from_json(cls, value)
            return plan
        except (OSError, *MALFORMED) as error:
            raise ArtifactError(f"{path} cannot be read: {error!r}; build again") from error


def parse_line(line: str) -> Kernel:
    """One line of "Engine Layer Information", or a `BuildError`: TensorRT has changed its form."""
    head = re.match(r"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]+), Inputs: ", line)
    if head is None:
        raise BuildError(
            f"cannot read the builder's kernel plan: expected 'Name: ..., LayerType: ..., "
            f"Inputs: ...', got {line[:120]!r}"
        )
    operands = []
    for start, end in _FIELDS:
        text, closing, _ = line.partition(start)[2].partition(end)
        operands.append(tuple(_operands(text)) if closing else ())
    stream = re.search(r", StreamId: (\d+)", line)
    return Kernel(
        name=head["name"],
        kind=head["kind"],
        inputs=operands[0],
        constants=operands[1],
        outputs=operands[2],
        onnx_layers=tuple(_ONNX_LAYER.findall(line.rpartition("Metadata: ")[2])),
        stream=int(stream[1]) if stream else 0,
    )


def _operands(text: str) -> list[Operand]:
    return [
        Operand(match["name"], _ints(match["dims"]), _ints(match["strides"]), match["dtype"])
        for match in _OPERAND.finditer(text)
    ]


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",")) if text else ()
