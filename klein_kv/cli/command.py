"""The command line: reads arguments, runs one verb, prints what it gives."""

import argparse
import contextlib
import io
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

from klein_kv import __version__
from klein_kv.cli.arguments import Result
from klein_kv.cli.build import add_build
from klein_kv.cli.comfyui import add_comfyui
from klein_kv.cli.export import add_export, add_fixture, add_quantize
from klein_kv.cli.generate import add_generate
from klein_kv.cli.inspection import add_doctor, add_inspect
from klein_kv.cli.plan import add_plan
from klein_kv.cli.serve import add_serve
from klein_kv.cli.setup import add_setup
from klein_kv.cli.verify import add_verify
from klein_kv.errors import KleinKVError

__all__ = ["main"]

_EXTRA_OF = {
    "export": "export",
    "fixture": "export",
    "quantize": "export,cpu",
    "verify": "export,cpu",
    "build": "rtx",
    "setup": "export,rtx",
    "serve": "serve",
}
# In the order of `klein-kv --help`.
_VERBS = (
    add_setup,
    add_fixture,
    add_export,
    add_quantize,
    add_build,
    add_plan,
    add_generate,
    add_serve,
    add_comfyui,
    add_verify,
    add_inspect,
    add_doctor,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command, of these arguments or the process's, and gives its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # consoles that cannot show every character
            stream.reconfigure(errors="backslashreplace")
    args = _parser().parse_args(argv)
    level = logging.WARNING if args.quiet else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("klein_kv").setLevel(level)
    try:
        with _ending_signals():
            result = args.run(args)
    except (KleinKVError, OSError) as error:  # the latter where nothing below knew better
        return _fail(args.verb, str(error))
    except ModuleNotFoundError as error:
        extra = _EXTRA_OF.get(args.verb, "cpu")
        return _fail(
            args.verb,
            f"{error.name} is not installed; install it with pip install 'klein-kv[{extra}]'",
        )
    except MemoryError:
        return _fail(args.verb, "out of memory; use a smaller size or fewer references")
    except KeyboardInterrupt as stop:
        print(f"klein-kv {args.verb}: interrupted", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    value, text, code = result
    try:
        if text:  # none where the verb wrote its result itself
            print(json.dumps(value, indent=2) if args.json else text, flush=True)
    except BrokenPipeError:  # of `| head`; what is left must not go there at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(code)


@contextlib.contextmanager
def _ending_signals() -> Iterator[None]:
    """Has signals that end the process raise, so that what is half written is removed."""

    def stop(number: int, _frame: object) -> None:
        raise KeyboardInterrupt(number)

    previous = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP", "SIGBREAK"):  # which of them there are depends
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                previous[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _fail(verb: str, message: str) -> int:
    print(f"klein-kv {verb}: error: {message}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="klein-kv", description="Export, build and run FLUX.2 [klein] 9B-KV."
    )
    parser.add_argument("--version", action="version", version=f"klein-kv {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(
        name: str, run: Callable[[argparse.Namespace], Result], about: str
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=about, description=about)
        sub.add_argument("--json", action="store_true", help="print one JSON document")
        sub.add_argument("-q", "--quiet", action="store_true", help="warnings only")
        sub.set_defaults(run=run)
        return sub

    for add_verb in _VERBS:
        add_verb(add)
    return parser
