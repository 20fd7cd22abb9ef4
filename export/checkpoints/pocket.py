"""Pocket: a small klein-KV that really edits, shipped with this package.

The same networks as the 9B model's at 8 million parameters, trained on drawn scenes
(`benchmarks/pocket`, `docs/pocket.md`). It follows a closed set of instructions on references of
128 to 256 pixels, on a CPU in a second, and what it should have made is known to the pixel.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

__all__ = ["POCKET", "write_pocket"]

POCKET = Path(__file__).with_name("pocket_weights")  # diffusers layout, in float16


def write_pocket(folder: Path, dtype: torch.dtype) -> None:
    """Writes the checkpoint and its licence into a folder that is there, all weights in a type."""
    shutil.copytree(POCKET, folder, dirs_exist_ok=True)
    for path in folder.rglob("*.safetensors"):
        tensors = {name: value.to(dtype) for name, value in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    config = folder / "text_encoder" / "config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    values["dtype"] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
