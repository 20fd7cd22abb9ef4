"""Tables and plots of result files of `gpu_suite.py` and `build.py`.

    python benchmarks/report.py RESULT.json ... [--docs FILE.md] [--html PAGE] [--png DIR]

Measured numbers and those of the kernel-plan model (in `build.py`'s files) come in sections of
their own. `--docs` puts those that there are results for between their markers in a Markdown file,
such as docs/benchmarks.md, and changes nothing else of it; `--html` writes one page that needs no
other file; `--png` writes the plots. Plots need matplotlib. Without these options the tables go to
stdout as Markdown. The last line on stdout is one JSON document that names the files written.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from report_page import page
from report_plots import plots
from report_tables import markdown, measured_section, model_section

__all__ = ["insert", "load_results"]

SCHEMA = 1
MARKERS = ("gpu", "plan model")
"""Names in the comments that sections of the Markdown file stand between."""


def load_results(paths: list[Path]) -> dict[str, list[dict[str, Any]]]:
    """Result documents by benchmark, in the order given.

    Raises:
        ValueError: a file is no result of one of the two benchmarks, or of another version.
    """
    found: dict[str, list[dict[str, Any]]] = {"gpu_suite": [], "build": []}
    for path in paths:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            benchmark = document["benchmark"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no result file ({type(error).__name__}: {error}); expected what "
                "benchmarks/gpu_suite.py or benchmarks/build.py wrote"
            ) from error
        if benchmark not in found:
            raise ValueError(f"{path} is of {benchmark!r}, expected one of {', '.join(found)}")
        if benchmark == "gpu_suite" and document.get("schema") != SCHEMA:
            raise ValueError(
                f"{path} has schema {document.get('schema')!r}, expected {SCHEMA}; run the suite "
                "again, or take the report.py that it came with"
            )
        found[benchmark].append(document)
    return found


def insert(text: str, marker: str, content: str) -> str:
    """Replaces what stands between the marker's two comments.

    Raises:
        ValueError: the text has no such pair of comments.
    """
    begin, end = f"<!-- {marker}: begin -->", f"<!-- {marker}: end -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"no {begin} ... {end} in the file; put them where the tables should be")
    return f"{head}{begin}\n\n{content.strip()}\n\n{end}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--docs", type=Path, help="Markdown file with markers")
    parser.add_argument("--html", type=Path, help="page to write")
    parser.add_argument("--png", type=Path, help="folder for the plots")
    args = parser.parse_args()
    try:
        found = load_results(args.results)
        written = write(args, found)
    except ValueError as error:
        sys.exit(f"report.py: {error}")
    print(json.dumps({"benchmark": "report", "written": [str(path) for path in written]}))


def write(args: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> list[Path]:
    """Writes what was asked for; the files."""
    measured = [measured_section(document) for document in found["gpu_suite"]]
    modelled = [model_section(document) for document in found["build"]]
    images = plots(found["gpu_suite"]) if args.png or args.html else {}
    contents: dict[Path, bytes] = {}
    if args.docs:
        text = args.docs.read_text(encoding="utf-8")
        for marker, sections in zip(MARKERS, (measured, modelled), strict=True):
            if sections:
                text = insert(text, marker, markdown(sections))
        contents[args.docs] = text.encode()
    if args.html:
        contents[args.html] = page([*measured, *modelled], images).encode()
    if args.png:
        contents |= {args.png / f"{name}.png": image for name, image in images.items()}
    if not contents:
        print(markdown([*measured, *modelled]))
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.partial")
        aside.write_bytes(content)
        aside.replace(path)
    return list(contents)


if __name__ == "__main__":
    main()
