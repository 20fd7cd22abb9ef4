"""Nothing that only POSIX has is needed to import a module, or used without asking."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_imports import MODULES, ROOT

MODULES_OF_POSIX = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "syslog", "crypt"}
# What Python's documentation says that `os` and `signal` have on Unix alone, as far as one might
# reach for it.
NAMES = {
    "os": {
        "sched_getaffinity", "sched_setaffinity", "fork", "forkpty", "nice", "uname", "statvfs",
        "getuid", "geteuid", "getgid", "getegid", "getpgid", "getpgrp", "setsid", "killpg", "wait",
        "pread", "pwrite", "preadv", "pwritev", "posix_fadvise", "posix_fallocate", "sendfile",
        "mkfifo", "mknod", "chown", "fchown", "fchmod", "lchown", "sync", "getloadavg", "sysconf",
        "O_DIRECT", "O_DIRECTORY", "O_CLOEXEC", "O_NONBLOCK", "O_SYNC", "memfd_create", "openpty",
    },
    "signal": {"SIGHUP", "SIGKILL", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGPIPE", "alarm"},
}  # fmt: skip

IMPORT_ALL = """
import builtins, sys

real, blocked = builtins.__import__, set(sys.argv[1].split(","))

def guarded(name, globals=None, *rest, **names):
    ours = globals and globals.get("__name__", "").split(".")[0] == "klein_kv"
    if ours and name.split(".")[0] in blocked:
        raise ImportError(f"{name} is not there, for {globals['__name__']}")
    return real(name, globals, *rest, **names)

builtins.__import__ = guarded
sys.path.append(sys.argv[2])  # what stands in for ComfyUI
for module in sys.argv[3:]:
    real(module)
print("all")
"""


def test_every_module_is_imported_without_posix() -> None:
    """`engines/builder.py` imported `resource`, which Windows does not have."""
    modules = [name for name, _ in MODULES if not name.endswith("__main__")]
    blocked, comfyui = ",".join(MODULES_OF_POSIX), ROOT / "tests/runtime/comfyui/stand_ins"
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, blocked, comfyui, *modules],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "all", done.stderr


@pytest.mark.parametrize(("module", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_names_that_only_posix_has_are_asked_for(module: str, path: Path) -> None:
    """Those are reached with getattr, or imported where `sys.platform` was asked."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.attr not in NAMES.get(node.value.id, set()), f"{module}: {node.attr}"
        if isinstance(node, ast.ImportFrom) and node.module in NAMES:
            assert not NAMES[node.module] & {alias.name for alias in node.names}, module
