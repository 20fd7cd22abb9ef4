"""What quantization leaves of an adapter: pocket's style under fp8 and nvfp4, against float32.

    python -m benchmarks.lora ARTIFACTS_FP32 ARTIFACTS_BF16 LORA [--count 4]

ARTIFACTS_BF16 has been quantized to fp8 and nvfp4. An edit is made without and with the adapter;
the effect is the difference of the two pictures, and its share is the projection on the float32
effect. At weight 1 the right answer is known: PSNR against it is given too. "grid" merges into what
the quantized weights stand for, where no others are at hand. The last line is JSON.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.pocket.scenes import Edit, cyanotype, psnr
from benchmarks.quality import VARIANTS, Editor, held_out_edits
from klein_kv.artifacts.digest import file_digest
from klein_kv.artifacts.manifest import FileRecord, Manifest
from klein_kv.artifacts.numbers import QuantizedLinear
from klein_kv.artifacts.weights import WeightRef, graph_weights, split_part
from klein_kv.networks.transformer import transformer_parameters
from klein_kv.runtime.lora.lora_file import read_adapter
from klein_kv.runtime.lora.merge import WeightMerger

WEIGHTS = (0.5, 1.0, 2.0, -1.0)
KINDS = ("fp32", "fp8", "nvfp4", "fp8 grid", "nvfp4 grid")


class FromGrid(WeightMerger):
    """Merges into what quantized weights stand for."""

    def _base(self, tensor: str) -> NDArray[Any]:
        layer: QuantizedLinear | None = self._quantized.get(tensor)
        return super()._base(tensor) if layer is None else layer.dequantize()


def write_merged(artifacts: Path, copy: Path, lora: Path, weight: float, kind: str) -> None:
    """A copy of an artifact folder whose weights hold the adapter."""
    shutil.copytree(artifacts, copy)
    manifest = Manifest.load(copy, check_files=False)
    precision = VARIANTS[kind.removesuffix(" grid")].precision
    graphs = manifest.choose_graphs(precision=precision)
    adapter = read_adapter(lora, transformer_parameters(manifest.config.transformer))
    merger = (FromGrid if kind.endswith("grid") else WeightMerger)(artifacts, manifest, graphs)
    contents = merger.contents([(adapter, weight)])
    places: dict[str, WeightRef] = {}
    for graph in ("first_step", "cached_step"):
        places |= graph_weights(copy, graphs.files[graph])
    for name, ref in places.items():
        tensor, rows = split_part(name)
        if tensor in contents:
            with ref.path.open("r+b") as file:
                file.seek(ref.offset)
                file.write(np.ascontiguousarray(contents[tensor]()[rows]).tobytes())
    records = {
        path.relative_to(copy).as_posix(): FileRecord(path.stat().st_size, file_digest(path))
        for path in {ref.path for ref in places.values()}
    }
    replace(manifest, files=manifest.files | records).save(copy)


def pictures(folder: Path, kind: str, edits: Sequence[Edit]) -> NDArray[np.float32]:
    editor = Editor(folder, VARIANTS[kind.removesuffix(" grid")])
    made = [np.asarray(editor(edit, seed), np.float32) for seed, edit in enumerate(edits)]
    return np.stack(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fp32", type=Path)
    parser.add_argument("bf16", type=Path)
    parser.add_argument("lora", type=Path)
    parser.add_argument("--count", type=int, default=2, help="edits per task")
    arguments = parser.parse_args()
    edits = held_out_edits(arguments.count, seed=13)
    answers = [cyanotype(edit.answer) for edit in edits]
    plain: dict[str, NDArray[np.float32]] = {}
    results: dict[str, dict[str, float]] = {}
    for weight in WEIGHTS:
        exact = np.zeros(0, np.float32)
        for kind in KINDS:
            artifacts = arguments.fp32 if kind == "fp32" else arguments.bf16
            base = kind.removesuffix(" grid")
            if base not in plain:
                plain[base] = pictures(artifacts, base, edits)
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder) / "merged"
                write_merged(artifacts, copy, arguments.lora, weight, kind)
                made = pictures(copy, kind, edits)
            effect = made - plain[base]
            exact = effect if kind == "fp32" else exact
            row = {"share": float((effect * exact).sum() / (exact**2).sum())}
            if weight == 1:
                row["psnr"] = float(
                    np.median(
                        [psnr(x.astype(np.uint8), y) for x, y in zip(made, answers, strict=True)]
                    )
                )
            results[f"{kind} at {weight:g}"] = row
            print(
                f"{kind:12} weight {weight:4g}",
                {k: round(v, 3) for k, v in row.items()},
                flush=True,
            )
    print(json.dumps({"edits": len(edits), "results": results}))


if __name__ == "__main__":
    main()
