"""Makes the checkout that this script lies in importable as the package it would be installed as.

`pyproject.toml` maps the folders export/, engines/ and runtime/ to sub-packages of klein_kv. Where
the project is not installed, `import klein_kv.runtime` would find nothing, even with the checkout
on PYTHONPATH.
"""

import importlib.util
import sys
from pathlib import Path

__all__ = ["use_checkout"]


def use_checkout() -> None:
    """Does nothing where `klein_kv.runtime` can be imported."""
    try:
        if importlib.util.find_spec("klein_kv.runtime") is not None:
            return
    except ModuleNotFoundError:
        pass
    root = str(Path(__file__).resolve().parents[1])
    sys.path.insert(0, root)
    import klein_kv

    # Sub-packages are looked up in these folders: klein_kv/ first, then the checkout itself.
    klein_kv.__path__.append(root)
