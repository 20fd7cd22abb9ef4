"""Messages quote what people's files hold, and go to a terminal."""

import pytest

from klein_kv.errors import KleinKVError, RequestError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one line\nand ünïcode 一", "one line\nand ünïcode 一"),
        ("\x1b[31m red \0 \x7f \u202e \ud800", r"\x1b[31m red \x00 \x7f \u202e \ud800"),
        ("a " + "x" * 5000 + " b", "a " + "x" * 100 + "..." + "x" * 30 + " b"),
        ("begin" + " y" * 5000 + " end", "begin" + " y" * 497 + "  ... " + " y" * 498 + " end"),
    ],
)
def test_what_is_shown(text: str, shown: str) -> None:
    assert str(RequestError(text)) == shown
    assert KleinKVError(text).args == (text,)
