"""Engines of one single shape, built when a shape is wanted and kept up to a size: `build --size`.

They build in seconds and hold no weights, so a service can have them for the sizes that its users
ask for, and leave the rest to engines for ranges of sizes. The runtime takes whichever fits
(`runtime.engine_set`) and notes when it did.
"""

import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

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


def shape_recipe(
    output: Size,
    references: int,
    reference_size: Size = _USUAL_REFERENCE,
    text_tokens: int = 512,
    target: str = "rtx5090",
) -> Recipe:
    """The recipe of one shape, named after it: `1024x1024-4ref`.

    Args:
        output: pixels of the image made.
        references: number of reference images.
        reference_size: pixels of each; what counts is their number of tokens together.
        text_tokens: prompt tokens.
        target: see `Recipe.target`.

    Raises:
        BuildError: a size out of range.
    """
    name = f"{output.width}x{output.height}-{references}ref"
    if references and reference_size != _USUAL_REFERENCE:
        name += f"-{reference_size.width}x{reference_size.height}"
    if text_tokens != 512:
        name += f"-{text_tokens}tokens"
    profile = ShapeProfile(
        name=name,
        batch=Range(1, 1, 1),
        text_tokens=Range(text_tokens, text_tokens, text_tokens),
        output=SizeRange(output, output, output),
        references=Range(references, references, references),
        reference_size=SizeRange(reference_size, reference_size, reference_size),
    )
    return Recipe(name, target, None, "shared", (profile,))


def build_shape(
    artifacts: Path,
    recipe: Recipe,
    *,
    limit: int = DEFAULT_LIMIT,
    target: str | None = None,
    graphs: Sequence[str] | None = None,
    module: str = "auto",
    force: bool = False,
    progress: bool | None = None,
    kv_dtype: str | None = None,
    precision: str | None = None,
    attention: str | None = None,
) -> list[EngineRecord]:
    """Builds the engines of one shape, unless they are there, and removes others above the limit.

    Args:
        artifacts: the artifact folder.
        recipe: what `shape_recipe` gave.
        limit: bytes of all engines of single shapes; those used least recently go first, those of
            this shape never.
        target: see `build.build_artifacts`, like all that follow.
        graphs: likewise.
        module: likewise.
        force: likewise.
        progress: likewise.
        kv_dtype: likewise.
        precision: likewise.
        attention: likewise.

    Raises:
        RequestError: a limit below 0; and what `build_artifacts` raises.
    """
    if limit < 0:
        raise RequestError(f"the limit of engines of single shapes is {limit}, expected 0 or more")
    records = build_artifacts(
        artifacts,
        target=target,
        recipe=recipe,
        graphs=graphs,
        module=module,
        force=force,
        progress=progress,
        kv_dtype=kv_dtype,
        precision=precision,
        attention=attention,
    )
    kept = [path for path in find_engines(artifacts) if _recipe(path) == recipe.name]
    for path in kept:
        (path / ENGINE_MANIFEST).touch()
    prune_shapes(artifacts, limit, kept)
    return records


def prune_shapes(artifacts: Path, limit: int, keep: Sequence[Path] = ()) -> list[Path]:
    """Removes engines of single shapes, those used least recently first.

    Args:
        artifacts: the artifact folder.
        limit: bytes that may stay.
        keep: folders that stay whatever they take.

    Returns:
        The folders that were removed.
    """
    there = [path for path in find_engines(artifacts) if _NAME.fullmatch(_recipe(path))]
    there.sort(key=lambda path: (path / ENGINE_MANIFEST).stat().st_mtime_ns)
    sizes = {path: sum(x.stat().st_size for x in path.iterdir() if x.is_file()) for path in there}
    total, removed = sum(sizes.values()), []
    for path in there:
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
