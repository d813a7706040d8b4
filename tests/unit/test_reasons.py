"""An OSError that Python or a library raises by itself has no `strerror`: a message would say `None`."""

import ast
import errno
import io
from pathlib import Path

import pytest

from hvdtrain.errors import reason_of

PACKAGE = Path(__file__).parents[2] / "hvdtrain"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("Cannot call rmtree on a symbolic link"), "Cannot call rmtree on a symbolic link"),
        (io.UnsupportedOperation("not seekable"), "not seekable"),
        (OSError(), "OSError"),
        (ValueError("embedded null byte"), "embedded null byte"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_reason_is_never_none(error, reason):
    assert reason_of(error) == reason


def test_no_message_takes_the_system_s_words_alone():
    """Neither bare nor in an f-string; the set-up has its own words, since it runs without the rest."""
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "errors.py" and path.parent.name != "install"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "strerror" and ast.unparse(node.value) != "os"
    ]
    assert not found
