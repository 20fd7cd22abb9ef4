"""`klein-kv`: a module per verb or two.

Results go to standard output (a text, or one JSON document with `--json`), progress and logs to
standard error. Exit codes: 0 done, 1 failed with one line that says why, 2 wrong usage,
130 interrupted.
"""

from klein_kv.cli.command import main

__all__ = ["main"]
