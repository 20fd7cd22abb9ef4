"""Imports go one way: from what does work to what describes it, never back and never sideways."""

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (  # each may import those before it, and itself
    ("klein_kv.errors", "klein_kv.lazy"),
    ("klein_kv.json_values", "klein_kv.machine", "klein_kv.schedule", "klein_kv.unfinished"),
    ("klein_kv.artifacts",),
    ("klein_kv.networks",),
    ("klein_kv.engines", "klein_kv.runtime"),  # not each other
    ("klein_kv.export",),
    ("klein_kv.cli",),
)
FOLDERS = {"klein_kv": ROOT / "klein_kv"} | {
    f"klein_kv.{name}": ROOT / name for name in ("export", "engines", "runtime")
}
PUBLIC = "klein_kv"  # the package itself gives the pipeline when it is asked for


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts))
            yield name.removesuffix(".__init__"), path


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.startswith("klein_kv.")}


def layer(module: str) -> tuple[int, str]:
    for number, members in enumerate(LAYERS):
        for member in members:
            if f"{module}.".startswith(f"{member}."):
                return number, member
    raise AssertionError(f"{module} belongs to no layer")


MODULES = [(name, path) for name, path in modules() if name != PUBLIC]


@pytest.mark.parametrize(("module", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_a_module_imports_what_lies_below_it(module: str, path: Path) -> None:
    number, member = layer(module)
    known = {name for name, _ in MODULES}
    for imported in imports(path):
        if not any(imported == name or imported.startswith(f"{name}.") for name in known):
            continue  # a name of the package itself
        other, its = layer(imported)
        assert other < number or its == member, f"{module} imports {imported}"


@pytest.mark.parametrize("name", FOLDERS)
def test_public_names_are_there(name: str) -> None:
    package = import_module(name)
    assert all(hasattr(package, public) for public in package.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_every_file_is_small_and_every_folder_short() -> None:
    for folder in FOLDERS.values():
        for path in folder.rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 450, path
        for inner in (folder, *(x for x in folder.rglob("*") if x.is_dir())):
            files = [path for path in inner.glob("*.py") if path.name != "__init__.py"]
            assert len(files) <= 12, inner
