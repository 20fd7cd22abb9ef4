"""Stand-in for ComfyUI's folder_paths: the same functions, and as strict."""

from pathlib import Path

models_dir = ""  # set by a fixture
folder_names_and_paths: dict[str, tuple[list[str], set[str]]] = {}


def start_in(folder: Path) -> None:
    """Forgets everything and takes a folder as `models_dir`. Of the stand-in alone."""
    global models_dir
    models_dir = str(folder)
    folder_names_and_paths.clear()
    folder_names_and_paths["loras"] = ([str(folder / "loras")], {".safetensors"})


def add_model_folder_path(
    folder_name: str, full_folder_path: str, is_default: bool = False
) -> None:
    if not isinstance(full_folder_path, str):
        raise TypeError(f"expected str, got {type(full_folder_path)}")
    paths, _ = folder_names_and_paths.setdefault(folder_name, ([], set()))
    if full_folder_path not in paths:
        paths.insert(0 if is_default else len(paths), full_folder_path)


def get_folder_paths(folder_name: str) -> list[str]:
    return folder_names_and_paths[folder_name][0][:]


def get_filename_list(folder_name: str) -> list[str]:
    paths, endings = folder_names_and_paths[folder_name]
    files = (file for path in paths for file in Path(path).rglob("*") if file.is_file())
    return sorted(file.name for file in files if not endings or file.suffix in endings)


def get_full_path_or_raise(folder_name: str, filename: str) -> str:
    for path in folder_names_and_paths[folder_name][0]:
        if (Path(path) / filename).is_file():
            return str(Path(path) / filename)
    raise FileNotFoundError(f"Model in folder '{folder_name}' with filename '{filename}' not found")
