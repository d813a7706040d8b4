"""Wrong command lines, files of settings and file names: one sentence and exit code 2, never a traceback or a hang."""

import contextlib
import dataclasses
import io
import os
import socket
import stat
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import tomli_w

from hvdtrain import cli
from hvdtrain.errors import ConfigError, UsageError
from hvdtrain.recipes import load_recipe
from hvdtrain.recipes.given import apply, read_toml
from hvdtrain.settings import to_dict
from hvdtrain.settings.fields import alternatives, hints_of
from hvdtrain.settings.flags import known_flags
from hvdtrain.settings.values import Source

TEXTS = [
    *(
        "",
        " ",
        "-",
        "--",
        "nan",
        "inf",
        "-inf",
        "NaN",
        "1e999",
        "-1e999",
        "1e-400",
        "-1",
        "-0.0",
        "0",
        "0.5",
        "1.5",
        "1_0",
    ),
    *(str(2**31), str(2**63 - 1), str(2**63), str(-(2**63)), str(2**64), "9" * 30, "9" * 5000, "0x10", "1e3", "1,5"),
    *(
        "None",
        "none",
        "true",
        "True",
        "[]",
        "{}",
        "[1]",
        "'",
        '"',
        "\\",
        "$HOME",
        "%s",
        "{0}",
        "a b",
        "../..",
        "x" * 300,
    ),
    *("~nosuchuser", "~nosuchuser/x", "~", "/", "/dev/null", "/dev/zero", "/proc/self/mem", "é" * 200, "\u202e", "٣"),
    *("a/" * 3000, "\udcff", "\n", "a\nb", "🦊"),
]

# The same in a file, with the types that TOML has.
VALUES = [
    *(
        "",
        "nan",
        "x" * 300,
        "~nosuchuser",
        "a\0b",
        "\0",
        True,
        False,
        0,
        -1,
        2**63 - 1,
        -(2**63),
        10**40,
        0.0,
        -0.0,
        -1.5,
    ),
    *(float("nan"), float("inf"), float("-inf"), 1e308, 5e-324, [], [1], ["a", 1], [[]], {}, {"a": 1}, {"a": {"b": 1}}),
    *(dataclasses.MISSING,),  # a date
]

RECIPE_NAMES = ["resnet", "hf", "mnist", "lm"]


def settings_of_all():
    """Return every setting with one recipe that has it."""
    found = {flag: name for name in RECIPE_NAMES for flag in known_flags(load_recipe(name))}
    return [(name, flag) for flag, name in found.items()]


def options_of():
    return [(verb, flag) for verb, made in cli.VERBS.items() for flag in known_flags(made.options)]


def is_one_sentence(error):
    text = str(error)
    assert text.strip()
    assert len(text.splitlines()) == 1, text
    assert len(text) < 900, text
    assert "Traceback" not in text
    return True


def attempt(words):
    """Return the invocation, or None where it was refused in a sentence. Any other exception is a failure."""
    try:
        made = cli.parse(words)
    except UsageError as error:
        made = error
    if isinstance(made, UsageError | str):
        assert isinstance(made, str) or is_one_sentence(made)
        return None
    if made.recipe is not None:  # what was taken can be written and read again
        tomli_w.dumps(to_dict(made.recipe))
    return made


@pytest.mark.parametrize(("recipe", "flag"), settings_of_all())
def test_every_setting_with_hostile_words(recipe, flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spelled = f"--{flag.replace('_', '-')}"
    for text in TEXTS:
        attempt(["train", recipe, f"{spelled}={text}"])
    for words in ([spelled], [spelled, "1", "2"], [spelled, "--"], [f"{spelled}.x", "1"], [f"{spelled}-", "1"]):
        attempt(["train", recipe, *words])


@pytest.mark.parametrize(("verb", "flag"), options_of())
def test_every_option_with_hostile_words(verb, flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [verb, "lm"] if cli.VERBS[verb].has_recipe else [verb]
    for text in TEXTS:
        attempt([*words, f"--{flag.replace('_', '-')}={text}"])
    for more in ([], ["1", "2"], ["--"]):
        attempt([*words, f"--{flag.replace('_', '-')}", *more])


@pytest.mark.parametrize(("recipe", "flag"), settings_of_all())
def test_every_setting_with_hostile_values_of_a_file(recipe, flag, tmp_path, monkeypatch):
    import datetime

    monkeypatch.chdir(tmp_path)
    for value in VALUES:
        value = datetime.date(2020, 1, 1) if value is dataclasses.MISSING else value
        values = value
        for part in reversed(flag.split(".")):
            values = {part: values}
        error = None
        try:
            apply(load_recipe(recipe), [(values, Source("file.toml"))])
        except UsageError as caught:
            error = caught
        assert error is None or is_one_sentence(error)


@pytest.mark.parametrize("words", [[text] for text in TEXTS] + [["train", text] for text in TEXTS])
def test_hostile_words_for_verbs_and_recipes(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attempt(words)


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """Return a path of each kind of file, by a name of the kind."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("")
    (tmp_path / "directory").mkdir()
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "unreadable").write_text("")
    (tmp_path / "unreadable").chmod(0)
    os.mkfifo(tmp_path / "fifo")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    yield {
        **{name: name for name in ("empty", "directory", "binary", "loop", "dangling", "unreadable", "fifo", "socket")},
        "missing": "missing",
        "device": "/dev/zero",
        "nothing": "/dev/null",
        "below a file": "empty/x",
        "too long": "x" * 256,
        "far too long": "x/" * 2500,
        "no user": "~nosuchuser/x",
        "blank": "",
    }
    server.close()


KINDS = [
    *(
        "empty",
        "directory",
        "binary",
        "loop",
        "dangling",
        "unreadable",
        "fifo",
        "socket",
        "missing",
        "device",
        "nothing",
    ),
    *("below a file", "too long", "far too long", "no user", "blank"),
]
PATHS = [
    *(f"train lm --{flag}" for flag in ("config", "run-dir", "data.path", "data.val-path", "data.tokenizer")),
    *(f"train lm --{flag}" for flag in ("data.cache-dir", "eval.choices", "model.init-from")),
    *(
        "train resnet --data.root",
        "train mnist --data.root",
        "verify lm --json",
        "bench lm --json",
        "plan lm --output",
        "plan lm --noise-from",
    ),
    *("plan lm --from", "doctor --json", "doctor --run-dir", "generate --run-dir", "export --run-dir"),
    *("export --run-dir directory --output", "train hf --model.path", "train hf --model.config", "train"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("line", PATHS)
def test_every_file_name_with_every_kind_of_file(line, kind, zoo):
    if line == "train":
        os.symlink(zoo[kind] or "blank", "recipe.py") if len(zoo[kind]) < 255 else None  # noqa: PTH211
        assert attempt(["train", "recipe.py"]) is None
    else:
        attempt([*line.split()[:-1], f"{line.split()[-1]}={zoo[kind]}"])


NEVER_OPENED = [line for line in PATHS if line != "train" and "mnist" not in line]


@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "below a file", "too long", "no user", "blank"])
@pytest.mark.parametrize("line", NEVER_OPENED)
def test_what_is_no_file_is_refused_before_it_is_opened(line, kind, zoo):
    """A FIFO would hang, a device never end; a name over 255 bytes cannot exist, one of no user neither."""
    with pytest.raises(UsageError) as caught:
        cli.parse([*line.split()[:-1], f"{line.split()[-1]}={zoo[kind]}"])
    assert is_one_sentence(caught.value)
    assert line.split()[-1] in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("binary", "missing")])
def test_data_of_every_kind_is_read_or_refused(kind, zoo):
    """What the settings let pass is refused by whoever reads it."""
    for recipe, flag in (
        ("lm", "data.path"),
        ("lm", "data.val_path"),
        ("lm", "data.tokenizer"),
        ("mnist", "data.root"),
        ("resnet", "data.root"),
    ):
        section, name = flag.split(".")
        values = {section: {name: zoo[kind]}, "data": {name: zoo[kind]}}
        if recipe == "lm":
            values["data"]["cache_dir"] = "cache"
        with pytest.raises(UsageError) as caught:
            apply(load_recipe(recipe), [(values, Source("file.toml"))]).build(lambda text: None)
        assert is_one_sentence(caught.value)


ODD_TOML = {
    "a number for a section": b"train = 3",
    "a text for a section": b"train = 'x'",
    "a list of sections": b"[[train]]\nsteps = 3",
    "a section for a setting": b"[train.steps]\nx = 3",
    "brackets": b"x = " + b"[" * 3000,
    "closed brackets": b"x = " + b"[" * 3000 + b"]" * 3000,
    "tables": b"[" + b".".join([b"a"] * 3000) + b"]",
    "dotted": b".".join([b"a"] * 3000) + b" = 1",
    "twice": b"[train]\nsteps = 1\n[train]\nsteps = 2",
    "twice in a section": b"[train]\nsteps = 1\nsteps = 2",
    "latin": "[data]\npath = 'é'".encode("latin-1"),
    "utf-16": "[train]\nsteps = 3".encode("utf-16"),
    "mark": b"\xef\xbb\xbf[train]\nsteps = 3",
    "NUL": b"[train]\0",
    "NUL in a text": b'[data]\npath = "a\\u0000b"',
    "digits": b"[train]\nsteps = " + b"9" * 5000,
    "float": b"[optim]\npeak_lr = 1e999999",
    "nan": b"[optim]\npeak_lr = nan",
    "date": b"[train]\nsteps = 2020-01-01",
    "both": b"[train]\nsteps = 3\nepochs = 1",
    "unknown section": b"[trian]\nsteps = 3",
    "unknown setting": b"[train]\nstep = 3",
    "meant": b"[optim]\nlr = 3",
    "empty key": b"'' = 3",
    "json": b'{"train": {"steps": 3}}',
    "yaml": b"train:\n  steps: 3",
    "quote": b"[train]\nsteps = '3",
    "dash and underscore": b"[train]\nmax-time = '1h'\nmax_time = 3",
}


@pytest.mark.parametrize("name", ODD_TOML)
def test_odd_files_of_settings(name, tmp_path):
    (tmp_path / "odd.toml").write_bytes(ODD_TOML[name])
    with pytest.raises(ConfigError) as caught:
        cli.parse(["train", "lm", "--config", str(tmp_path / "odd.toml")])
    assert is_one_sentence(caught.value)
    assert "odd.toml" in str(caught.value)


def test_an_empty_file_of_settings_changes_nothing(tmp_path):
    (tmp_path / "empty.toml").write_bytes(b"")
    assert read_toml(tmp_path / "empty.toml") == {}
    assert cli.parse(["train", "lm", "--config", str(tmp_path / "empty.toml")]).recipe == load_recipe("lm").resolve()


@pytest.mark.parametrize(
    "line",
    [
        ["train", "lm", "--train.seed", str(2**63)],
        ["train", "lm", "--optim.peak-lr", "nan"],
        ["train", "lm", "--config", "fifo"],
        ["train", "lm", "--data.path", ""],
        ["train", "lm", "--data.path", "~nosuchuser/x"],
        ["train", "lm", "--data.path", b"\xff\xfe"],
        ["train", "lm", "--run-dir", "x" * 256],
        ["train", "nosuch"],
        ["train", "directory"],
        ["lm"],
        ["generate"],
        ["export", "nosuch"],
        ["--frobnicate"],
        ["-x"],
    ],
    ids=str,
)
def test_from_outside(line, zoo):
    done = subprocess.run(
        [sys.executable, "-m", "hvdtrain", *line],
        capture_output=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(cli.__file__))},  # noqa: PTH120
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr.startswith(b"hvdtrain: ")
    assert len(done.stderr.splitlines()) == 1


def test_the_largest_seed_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("HOROVOD_FUSION_THRESHOLD", "0")  # the command line would leave it behind
    text = tmp_path / "a.txt"
    text.write_text("some words of text\n" * 200)
    words = ["train", "lm", "--train.seed", str(2**63 - 1), "--train.steps", "2", "--data.path", str(text)]
    words += [
        "--data.cache-dir",
        str(tmp_path / "cache"),
        "--data.sequence-length",
        "8",
        "--run-dir",
        str(tmp_path / "r"),
    ]
    words += ["--model.num-layers", "1", "--model.hidden-size", "16", "--train.global-batch-size", "2"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main([*words, "--data.val-fraction", "0.2"]) == 0


def test_types_are_known():
    """Every field has a type that the command line can read."""
    for name in RECIPE_NAMES:
        for hint in known_flags(load_recipe(name)).values():
            kind = alternatives(hint)[0]
            assert kind in (int, float, str, bool, Path) or typing.get_origin(kind) in (typing.Literal, tuple), hint
    for verb in cli.VERBS.values():
        assert hints_of(verb.options)
    assert stat.S_ISFIFO  # the zoo's


def test_a_run_is_written_where_every_library_can_write():
    """Of a name in bytes that are no UTF-8, as in Latin-1, tokenizers can make none."""
    with pytest.raises(ConfigError, match="not UTF-8") as caught:
        cli.parse(["train", "lm", "--run-dir", os.fsdecode(b"l\xe4ufe")])
    assert is_one_sentence(caught.value)
