"""One way to reach `tensorrt_rtx` and `tensorrt`: which of the two, which version.

Both have the same interface where this project uses it; the differences are asked for with
`hasattr` at the place of use. Nothing is imported until `load_module` is called.
"""

import importlib
from typing import Any

from klein_kv.errors import BackendError, RequestError

__all__ = ["MODULES", "load_module", "module_version"]

MODULES = ("tensorrt_rtx", "tensorrt")
"""Names that `load_module` takes besides "auto", in the order that "auto" tries them."""

_EXTRAS = {"tensorrt_rtx": "klein-kv[rtx]", "tensorrt": "klein-kv[tensorrt]"}


def load_module(name: str = "auto") -> Any:
    """Imports TensorRT: "tensorrt_rtx", "tensorrt", or "auto" for the first that is installed.

    A `BackendError` if none is, or its libraries do not load.
    """
    if name not in ("auto", *MODULES):
        raise RequestError(f"module is {name!r}, expected 'auto' or one of {', '.join(MODULES)}")
    failures = []
    for candidate in MODULES if name == "auto" else (name,):
        try:
            module = importlib.import_module(candidate)
        except (ImportError, OSError, RuntimeError) as error:
            failures.append(f"{candidate}: {error}")
            continue
        if hasattr(module, "Builder"):
            return module
        failures.append(f"{candidate}: it has no Builder (a stub package?)")
    wanted = "TensorRT" if name == "auto" else name
    install = " or ".join(
        f"pip install '{_EXTRAS[candidate]}'"
        for candidate in (MODULES if name == "auto" else (name,))
    )
    raise BackendError(f"{wanted} is not usable ({'; '.join(failures)}); install it: {install}")


def module_version(trt: Any) -> str:
    """Version of the library, e.g. "1.7.1.116"; engines of another version do not load."""
    return str(trt.__version__)
