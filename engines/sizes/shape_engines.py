"""Engines of one single shape, built when a shape is wanted and kept up to a size: `build --size`.

They build in seconds and hold no weights, so a service can have them for the sizes that its users
ask for, and leave the rest to engines for ranges of sizes. The runtime takes whichever fits
(`klein_kv.artifacts.engines.engine_set`) and notes when it did.
"""

import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from klein_kv.artifacts.engines.engine_manifest import ENGINE_MANIFEST, EngineManifest, find_engines
from klein_kv.artifacts.engines.engine_record import EngineRecord
from klein_kv.engines.build import build_artifacts
from klein_kv.engines.sizes.recipe import Range, Recipe, ShapeProfile, Size, SizeRange
from klein_kv.errors import ArtifactError, RequestError

__all__ = ["DEFAULT_LIMIT", "build_shape", "prune_shapes", "shape_recipe"]

_log = logging.getLogger(__name__)

DEFAULT_LIMIT = 2 << 30
"""Bytes of engines of single shapes that are kept: about fifty shapes of the 9B with their VAE."""

_USUAL_REFERENCE = Size(1024, 1024)

_NAME = re.compile(r"\d+x\d+-\d+ref(-\d+x\d+)?(-\d+tokens)?")


def shape_recipe(output: Size, references: int, reference_size: Size = _USUAL_REFERENCE) -> Recipe:
    """The recipe of one shape, named after it: `1024x1024-4ref`.

    Of the references, each of `reference_size` pixels, the number of tokens together counts. A
    `BuildError` tells of a size out of range.
    """
    name = f"{output.width}x{output.height}-{references}ref"
    if references and reference_size != _USUAL_REFERENCE:
        name += f"-{reference_size.width}x{reference_size.height}"
    profile = ShapeProfile(
        name=name,
        batch=Range(1, 1, 1),
        text_tokens=Range(512, 512, 512),
        output=SizeRange(output, output, output),
        references=Range(references, references, references),
        reference_size=SizeRange(reference_size, reference_size, reference_size),
    )
    return Recipe(name, "rtx5090", None, "shared", (profile,))


def build_shape(
    artifacts: Path, recipe: Recipe, *, limit: int = DEFAULT_LIMIT, **options: Any
) -> list[EngineRecord]:
    """Builds the engines of one shape, unless they are there, and removes others above the limit.

    Args:
        artifacts: the artifact folder.
        recipe: what `shape_recipe` gave.
        limit: bytes of all engines of single shapes; those used least recently go first, those of
            this shape never. A `RequestError` if it is below 0.
        options: of `build_artifacts`.
    """
    if limit < 0:
        raise RequestError(f"the limit of engines of single shapes is {limit}, expected 0 or more")
    records = build_artifacts(artifacts, recipe=recipe, **options)
    own = [path for path in find_engines(artifacts) if _recipe(path) == recipe.name]
    for path in own:
        (path / ENGINE_MANIFEST).touch()
    prune_shapes(artifacts, limit, own)
    return records


def prune_shapes(artifacts: Path, limit: int, keep: Sequence[Path] = ()) -> list[Path]:
    """Removes, and gives, folders of single shapes above `limit` bytes, least recently used first.

    Those of `keep` stay whatever they take.
    """
    folders = [path for path in find_engines(artifacts) if _NAME.fullmatch(_recipe(path))]
    folders.sort(key=lambda path: (path / ENGINE_MANIFEST).stat().st_mtime_ns)
    sizes = {path: sum(x.stat().st_size for x in path.iterdir() if x.is_file()) for path in folders}
    total, removed = sum(sizes.values()), []
    for path in folders:
        if total <= limit:
            break
        if path in keep:
            continue
        # The manifest goes first: what is left of an interrupted removal is taken for nothing.
        (path / ENGINE_MANIFEST).unlink()
        shutil.rmtree(path)
        total -= sizes[path]
        removed.append(path)
        _log.info("%s: removed, engines of single shapes took more than %d bytes", path, limit)
    return removed


def _recipe(folder: Path) -> str:
    """Name of the recipe that the engines of a folder were built by; "" for damaged ones."""
    try:
        return EngineManifest.load(folder).recipe
    except ArtifactError:
        return ""
