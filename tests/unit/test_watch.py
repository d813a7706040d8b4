"""`watch`: what it reads of a run that others write, what it draws in any terminal, how it ends."""

import io
import json
import math
import os
import pty
import random
import select
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from made_runs import make_run
from rich.console import Console

from hvdtrain.cli import parse
from hvdtrain.errors import ConfigError
from hvdtrain.verbs.watch.follow import Follower
from hvdtrain.verbs.watch.plot import plot, sparkline
from hvdtrain.verbs.watch.tail import Tail
from hvdtrain.verbs.watch.view import state_of, view


def test_a_tail_reads_whole_lines_once(tmp_path):
    path = tmp_path / "file"
    tail = Tail(path, 1000)
    assert tail.read() == ([], False)
    path.write_bytes(b"one\ntwo\nthr")
    assert tail.read() == ([b"one", b"two"], True)
    assert tail.read() == ([], False)
    with path.open("ab") as file:
        file.write(b"ee\n")
    assert tail.read() == ([b"three"], False)


def replaced(path):
    other = path.with_name("other")
    other.write_bytes(b"four\nfive\nsix\nseven\n")
    other.replace(path)


def changed_in_place(path):
    with path.open("r+b") as file:  # as long as before, or longer, and the same file
        file.write(b"four\nfive\nsix\nseven\n")


def cut(path):
    path.write_bytes(b"a\n")


@pytest.mark.parametrize("change", [replaced, changed_in_place, cut])
def test_a_file_that_is_another_is_read_anew(tmp_path, change):
    path = tmp_path / "file"
    path.write_bytes(b"one\ntwo\nthree\n")
    tail = Tail(path, 1000)
    tail.read()
    change(path)
    assert tail.read() == (path.read_bytes().splitlines(), True)


def test_of_a_long_file_the_end_is_read_and_what_is_no_file_is_said(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"".join(b"%d\n" % i for i in range(1000)))
    lines, is_anew = Tail(path, 100).read()
    assert is_anew
    assert lines[-1] == b"999"
    assert 10 < len(lines) < 30
    os.mkfifo(tmp_path / "pipe")
    tail = Tail(tmp_path / "pipe", 100)
    assert (tail.read(), tail.trouble) == (([], False), "it is no regular file")


def test_a_run_is_followed_while_it_grows_stops_and_goes_on(tmp_path):
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    metrics, log = run / "metrics.jsonl", run / "logs" / "rank-000.log"
    follower = Follower(run)
    follower.look()
    assert (follower.step, state_of(follower)[0]) == (0, "nothing logged yet")
    line = {"train/loss": 2.0, "time/step_s": 0.5, "time/left_s": 45.0}
    metrics.write_text(json.dumps({"step": 10, **line}) + "\n" + '{"step": 20, "train/lo')
    log.write_text("2026-11-20 08:00:00,100 INFO hvdtrain 0.1.0: lm on 2 ranks\ndata: made up\n")
    follower.look()
    assert (follower.step, follower.num_steps, follower.curves["train/loss"]) == (10, 100, ([10], [2.0]))
    assert follower.title == "hvdtrain 0.1.0: lm on 2 ranks"
    assert list(follower.events) == []
    with metrics.open("a") as file:
        file.write('ss": null, "train/skipped_steps": 2}\nnot JSON\n{"step": -3}\n{"step": 30, "val/loss": 1e999}\n')
    (run / "checkpoints" / "latest").write_text("step-00000030")
    follower.look()
    assert follower.curves["train/loss"][0] == [10, 20]
    assert math.isnan(follower.curves["train/loss"][1][1])
    assert math.isnan(follower.last["val/loss"])
    assert follower.num_bad == 2
    assert [event.text for event in follower.events] == ["step 20: 2 skipped steps", "step 30: saved"]
    follower.events.clear()
    with log.open("a") as file:
        file.write("hvdtrain: rank 1 on node7 is gone\nat step 30; the stacks of all threads:\n")
    (run / "logs" / "rank-001.log").write_text("2026-11-20 08:00:09,100 WARNING a slow disk\n")
    follower.look()
    follower.look()
    assert [event.text for event in follower.events] == [
        "08:00:00 rank 1 on node7 is gone",
        "08:00:09 rank 1: a slow disk",
    ]
    follower.events.clear()
    other = run / "other"  # it goes on from its checkpoint at step 10
    other.write_text(json.dumps({"step": 10, **line}) + "\n")
    other.replace(metrics)
    with log.open("a") as file:
        file.write("2026-11-20 09:00:00,100 INFO hvdtrain 0.1.0: lm on 4 ranks\n")
        file.write("2026-11-20 09:00:01,100 INFO continues at step 10 of 100, from somewhere\n")
    follower.look()
    assert (follower.step, follower.num_bad, follower.curves["train/loss"][0]) == (10, 0, [10])
    assert follower.title.endswith("4 ranks")
    assert [event.text for event in follower.events] == ["09:00:01 continues at step 10 of 100, from somewhere"]
    with metrics.open("a") as file:
        file.write('{"step": 100, "val/loss": 1.0, "event": "finished"}\n')
    follower.look()
    assert state_of(follower) == ("finished", False)


def test_whoever_trains_here_and_is_gone_is_noticed(tmp_path):
    folder = make_run(tmp_path / "run", lines=30)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    gone = subprocess.Popen(["true"])
    gone.wait()
    states = {}
    for name, pid, host in (
        ("gone", gone.pid, socket.gethostname()),
        ("here", os.getpid(), socket.gethostname()),
        ("elsewhere", gone.pid, "another-host"),
    ):
        (folder / "lock").write_text(f"process {pid} on {host}\n")
        follower = Follower(folder)
        follower.look()
        states[name] = state_of(follower)
    assert states["gone"] == (f"not running: process {gone.pid} on {socket.gethostname()} is gone", True)
    assert states["here"][0].startswith("last line ")
    assert states["elsewhere"][0].endswith(f" ago, by process {gone.pid} on another-host")
    past = time.time() - 3600
    os.utime(folder / "metrics.jsonl", (past, past))
    follower = Follower(folder)
    follower.look()
    assert "no line of metrics for 1h" in state_of(follower)[0]


def test_a_run_that_is_taken_away_is_said(tmp_path):
    run = Follower(make_run(tmp_path / "run"))
    run.look()
    assert run.troubles == []
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    run.look()
    assert run.troubles == [f"{tmp_path / 'run'} is not there any more"]


def test_what_holds_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        Follower(tmp_path)


def test_a_folder_of_runs_such_as_a_sweep_is_no_run_and_one_of_them_is_named(tmp_path):
    """A sweep's directory is locked, as a run's is: it was watched for lines that never came."""
    for trial in ("trial-0", "trial-1"):
        (tmp_path / trial).mkdir()
        (tmp_path / trial / "metrics.jsonl").write_text("")
    os.utime(tmp_path / "trial-0", (1, 1))
    (tmp_path / "lock").write_text("process 1 on node1\n")
    with pytest.raises(ConfigError, match=r"it is a folder of runs: name one, such as .*trial-1$"):
        Follower(tmp_path)
    (tmp_path / "config.toml").write_text("")
    assert Follower(tmp_path).step == 0


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_in_the_files_it_goes_on(tmp_path, seed):
    """Bytes are changed, cut out and put in anywhere, between two looks too."""
    draw = random.Random(seed)
    folder = make_run(tmp_path / "run", lines=40, ranks=2)
    (folder / "lock").write_text("process 1 on node")
    files = [path for path in folder.rglob("*") if path.is_file()]
    follower = Follower(folder)
    for _ in range(5):
        for path in files:
            content = bytearray(path.read_bytes())
            for _ in range(draw.randrange(4)):
                place = draw.randrange(len(content) + 1)
                content[place : place + draw.randrange(20)] = draw.randbytes(draw.randrange(20))
            path.write_bytes(content)
        follower.look()
        assert drawn(follower, 80, 24)


def drawn(follower, width, height, is_ascii=False):
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=False, highlight=False)
    console.print(view(follower, width, height, is_ascii))
    return console.file.getvalue().splitlines()


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("watch") / "a run", lines=200, ranks=3)
    with (folder / "logs" / "rank-000.log").open("a") as file:
        file.write("2026-11-20 10:00:03,100 INFO warning: \x1b[2J\x07[bold]red[/] \u202e at step 5\n")
    follower = Follower(folder)
    follower.look()
    return follower


@pytest.mark.parametrize("is_ascii", [False, True])
def test_it_fits_any_terminal(followed, is_ascii):
    for width in (1, 12, 39, 40, 80, 200):
        for height in (2, 6, 12, 24, 60):
            lines = drawn(followed, width, height, is_ascii)
            assert 0 < len(lines) <= max(1, height - 1), (width, height)
            assert max(map(len, lines)) <= width
            text = "".join(lines)
            assert text.isascii() or not is_ascii
            assert "\x1b" not in text
            assert "\x07" not in text
            assert "\u202e" not in text


def test_it_shows_what_a_person_asks_first(followed):
    text = "\n".join(drawn(followed, 110, 40))
    for part in ("step 2,000/2,000", "finished", "held-out loss 2.5", "lr 0.00e+00", "tokens/s", "s/step", "●"):
        assert part in text
    assert "[bold]red[/]" in text
    assert "continues at step 1000" in text
    assert "3 ranks on 1 host (node0); no log of rank 1, 2" in text


def test_a_plot_has_its_highest_on_top():
    steps = list(range(100))
    lines = plot((steps, [100.0 - step for step in steps]), ([50], [50.0]), 60, 11, True)
    assert len(lines) == 11
    assert lines[0].split()[1][0] == "*"
    assert lines[0].index("*") < lines[5].index("*") < lines[9].index("*")
    assert "o" in "".join(lines[4:6])
    assert lines[-1].split() == ["step", "0", "99"]
    few = plot(([0, 99], [1.0, 0.0]), ([], []), 60, 11, True)
    assert sum("*" in line for line in few) == 10  # two points are joined
    braille = plot((steps, [1.0] * 100), ([], []), 60, 11, False)
    assert any(0x2800 < ord(sign) < 0x2900 for sign in "".join(braille))
    assert plot(([], []), ([], []), 60, 11, False) == []
    for values in ([math.nan] * 100, [1e308, -1e308] * 50, [0.0] * 100):
        assert len(plot((steps, values), ([1], [math.nan]), 60, 11, False)) == 11


def test_a_spike_does_not_flatten_the_rest():
    values = [math.sin(step / 10) for step in range(1000)]
    values[500] = 1e9
    lines = plot((range(1000), values), ([], []), 60, 11, True)
    assert float(lines[0].split()[0]) < 1.01


def test_a_sparkline():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8, False) == "▁▂▃▄▅▆▇█"
    assert len(sparkline(np.arange(1000).tolist(), 20, False)) == 20
    assert sparkline([1.0, math.nan, 2.0], 3, True)[1] == " "


def start(folder, *words, **options):
    return subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "hvdtrain", "watch", folder, *words], text=True, **options
    )


def test_without_a_terminal_it_prints_lines_and_ends_with_the_run(tmp_path):
    """It imports no torch: it is to be there at once, and on a login node."""
    folder = make_run(tmp_path / "run")
    whole = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(b"garbage\n" + whole)
    process = start(folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    lines = out.splitlines()
    assert "lm on 2 ranks" in lines[0]
    assert any(line.startswith("step 2000/2000  ") for line in lines)
    assert lines[-2:] == ["1 damaged line of metrics left out", "finished"]
    assert "\x1b" not in out
    assert "hvdtrain.verbs.watch.view" in err
    assert not [line for line in err.splitlines() if line.split("|")[-1].strip() in ("torch", "horovod", "bokeh")]


def test_ctrl_c_in_a_terminal_ends_it(tmp_path):
    folder = make_run(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    process = start(folder, "--every", "0.1", stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL, env=environ)
    os.close(theirs)
    seen, deadline = b"", time.monotonic() + 60
    while seen.count(b"1,990/2,000") + seen.count(b"2,000/2,000") < 3:  # drawn again and again
        assert time.monotonic() < deadline, seen
        if select.select([ours], [], [], 1)[0]:
            seen += os.read(ours, 1 << 16)
    process.send_signal(signal.SIGINT)
    try:
        while select.select([ours], [], [], 60)[0]:
            seen += os.read(ours, 1 << 16)
    except OSError:
        pass  # it has left the terminal
    os.close(ours)
    assert process.wait(60) == 0
    assert seen.count(b"\x1b[?25l") == seen.count(b"\x1b[?25h") == 1  # the cursor is back


def test_words(tmp_path):
    assert parse(["watch", str(make_run(tmp_path / "run")), "--every", "5"]).options.every == 5
    with pytest.raises(ConfigError, match="'watch'"):
        parse(["monitor", "x"])
