"""What is installed: the wheel's content, and how light the import is."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "onnxruntime", "onnx", "diffusers", "fastapi", "uvicorn", "httpx", "ray"}
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    # From a copy: setuptools packs whatever an earlier run left in build/.
    source = tmp_path_factory.mktemp("source")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    for folder in SETUPTOOLS["package-dir"].values():
        shutil.copytree(
            ROOT / folder,
            source / folder,
            ignore=shutil.ignore_patterns("__pycache__"),
            dirs_exist_ok=True,  # klein_kv/cli came with klein_kv
        )
    out = tmp_path_factory.mktemp("dist")
    build = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode == 0, build.stdout + build.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_wheel_brings_one_top_level_name(wheel_names: list[str]) -> None:
    top = {name.split("/")[0] for name in wheel_names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"klein_kv"}
    assert len(top) == 2


def test_every_package_is_listed() -> None:
    assert sorted(SETUPTOOLS["packages"]) == sorted(SETUPTOOLS["package-dir"])
    listed = {ROOT / folder for folder in SETUPTOOLS["package-dir"].values()}
    for folder in listed:
        unlisted = {path.parent for path in folder.rglob("*.py")} - listed
        assert not unlisted, f"list these sub-packages in pyproject.toml: {unlisted}"


@pytest.mark.parametrize("package", SETUPTOOLS["packages"])
def test_wheel_holds_every_module(package: str, wheel_names: list[str]) -> None:
    folder = ROOT / SETUPTOOLS["package-dir"][package]
    data = ("*.py", "recipes/*.toml", "workflows/*.json", "py.typed")
    page = ("*.html", "*.css", "*.js", "*.svg")
    modules = [path for pattern in data + page for path in folder.glob(pattern)]
    inside = package.replace(".", "/")
    expected = {f"{inside}/{path.relative_to(folder).as_posix()}" for path in modules}
    assert expected <= set(wheel_names)


def test_import_is_light(tmp_path: Path) -> None:
    # Machines that share their cores with others jitter: the best of five is the import's own time.
    code = (
        "import sys, time; start = time.perf_counter(); import klein_kv;"
        "print(time.perf_counter() - start);"
        "import klein_kv.cli;"
        f"print(*sorted({HEAVY} & set(sys.modules)))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        for _ in range(5)
    ]
    assert runs[0][1] == "", f"import klein_kv also imports {runs[0][1]}"
    assert min(float(seconds) for seconds, _ in runs) < 0.2


def test_the_server_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    code = (
        "import sys, klein_kv.runtime.serving.server;"
        "print(*{'torch', 'ray', 'gradio', 'onnxruntime'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
