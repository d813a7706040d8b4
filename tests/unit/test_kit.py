"""What the answers share: who speaks, numbers in words, wrapping, quartiles, `--json`."""

import json

import pytest

from hvdtrain import __version__
from hvdtrain.errors import ConfigError
from hvdtrain.verbs import kit


def test_one_rank_speaks(capsys):
    kit.Speaker(speaks=True)("said")
    kit.Speaker(speaks=False)("not said")
    assert capsys.readouterr().out == "said\n"


def test_the_head_line():
    assert kit.head_line("verify", "lm", 1) == f"hvdtrain {__version__}: verify lm on 1 rank"
    assert kit.head_line("plan", "lm", 4, "2 hosts", "batch 8").endswith("plan lm on 4 ranks, 2 hosts, batch 8")


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0 ranks"), (1, "1 rank"), (1.0, "1 rank"), (1.5, "1.5 ranks"), (2, "2 ranks"), (4096, "4,096 ranks")],
)
def test_counted(number, words):
    assert kit.counted(number, "rank") == words


def test_lists_have_an_end():
    assert kit.ranks_text([3]) == "rank 3"
    assert kit.ranks_text([0, 1, 4]) == "ranks 0, 1, 4"
    assert kit.ranks_text(range(10)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"


def test_long_lines_hang_under_their_beginning():
    words = ["word"] * 60
    first, *others = kit.hanging(" ".join(words), "error  cores  ")
    assert first.startswith("error  cores  word")
    assert others
    assert all(line.startswith(" " * len("error  cores  ") + "word") for line in others)
    assert max(map(len, [first, *others])) <= kit.WIDTH
    assert kit.hanging("", "ok  cores  ") == ["ok  cores"]


def test_quartiles():
    assert kit.quartiles([2.0]) == (2.0, 2.0, 2.0)
    assert kit.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert kit.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)
    assert kit.in_brackets((1, 2, 3)) == "2.000 [1.000, 3.000]"


def test_json_is_written_or_refused_in_one_sentence(tmp_path):
    kit.check_json_path(None)
    kit.write_json(None, {})
    path = tmp_path / "new" / "answer.json"
    kit.check_json_path(path)
    kit.write_json(path, {"ranks": 2})
    assert json.loads(path.read_text()) == {"ranks": 2}
    for wrong in (tmp_path, path / "below.json"):
        for attempt in (lambda: kit.check_json_path(wrong), lambda: kit.write_json(wrong, {})):  # noqa: B023
            with pytest.raises(ConfigError, match=r"--json .* cannot be written \(.*: name a file"):
                attempt()
