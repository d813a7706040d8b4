"""What a person and a program read."""

import contextlib
import io
import json
import logging
import os
import resource
import sys

import pytest

from hvdtrain.errors import ConfigError, ResumeError
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog, close_rank_log, open_rank_log
from hvdtrain.rundir.metrics import read_metrics
from hvdtrain.rundir.sinks import Console, JsonLines, TensorBoard, describe
from hvdtrain.settings.units import duration
from hvdtrain.trainer.stopwatch import Stopwatch


def test_json_lines(tmp_path):
    sink = JsonLines(RunDirectory(tmp_path))
    sink.begin(0, 20)
    sink.write(10, {"train/loss": 2.5}, None)
    sink.write(20, {"val/loss": 2.0}, "finished")
    sink.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 10, "train/loss": 2.5}, {"step": 20, "val/loss": 2.0, "event": "finished"}]


def test_resuming_drops_later_and_broken_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n{"step": 10, "event": "finished"}\n{"step": 15}\n{"step": 2')
    sink = JsonLines(RunDirectory(tmp_path))
    sink.begin(10, 40)
    sink.write(20, {}, None)
    sink.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 5}, {"step": 10}, {"step": 20}]


def test_what_pretends_to_be_huge_is_not_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n' + "[" * 2_000_000 + "\n" + '{"step": 6}\n')
    assert read_metrics(path) == ([{"step": 5}, {"step": 6}], 1)
    os.truncate(path, 1 << 42)  # zeros, which take no room on the disk
    with pytest.raises(OSError, match="more than 1 GiB"):
        read_metrics(path)
    RunDirectory(tmp_path).checkpoints.folder.mkdir()
    with pytest.raises(ResumeError, match="cannot be read"):
        RunDirectory(tmp_path).load_newest(print)


def test_a_finished_run_stays_finished(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "event": "finished"}\n')
    sink = JsonLines(RunDirectory(tmp_path))
    sink.begin(10, 10)
    sink.close()
    assert json.loads(path.read_text())["event"] == "finished"


def test_plain_lines_at_a_humane_pace():
    stream = io.StringIO()
    console = Console(is_terminal=False, stream=stream)
    console.begin(0, 1000)
    for step in range(10, 1001, 10):
        console.write(step, {"train/loss": 1.0}, None)
    console.write(500, {"val/loss": 1.5}, None)
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    assert [line.split()[1] for line in lines] == ["10/1000", "1000/1000", "500/1000"]
    assert "held-out loss 1.5" in lines[-1]


def test_a_terminal_gets_a_bar():
    stream = io.StringIO()
    console = Console(is_terminal=True, stream=stream)
    console.begin(0, 100)
    console.write(50, {"train/loss": 1.25, "throughput/tokens_per_s": 12345.6}, None)
    console.write(100, {"val/loss": 1.5}, "finished")
    text = stream.getvalue()
    assert "50/100" in text
    assert "loss 1.25  12,346 tokens/s" in text
    assert text.endswith("step 100/100  held-out loss 1.5\n")


def test_a_rank_without_sinks_is_silent(capsys):
    log = MetricLog(None, [])
    log.begin(0, 10)
    log.say("hello")
    log.write(1, {"train/loss": 1.0})
    log.close()
    assert capsys.readouterr() == ("", "")


def test_describe_and_duration():
    text = describe({"train/loss": 2.10449, "train/lr": 0.001, "val/bits_per_byte": 1.5, "time/left_s": 200})
    assert text == "loss 2.104  lr 1.00e-03  held-out bits per byte 1.5  3m20s left"
    assert [duration(s) for s in (0.4, 59.6, 3599, 7500)] == ["0s", "1m00s", "59m59s", "2h05m"]


def test_stopwatch_does_not_count_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("hvdtrain.trainer.stopwatch.time.perf_counter", lambda: now[0])
    watch = Stopwatch(step=10)
    now[0] = 4.0
    with watch.paused():
        now[0] = 100.0
    now[0] = 102.0
    assert watch.seconds == pytest.approx(6.0)
    assert watch.lap(13).step_s == pytest.approx(2.0)
    now[0] = 105.0
    assert watch.lap(14).step_s == pytest.approx(3.0)


def test_tensorboard_writes_each_metric(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoard(RunDirectory(tmp_path))
    sink.begin(0, 20)
    sink.write(10, {"train/loss": 2.5}, None)
    sink.write(20, {"train/loss": 2.0, "val/loss": 2.25}, "finished")
    sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 2.5), (20, 2.0)]
    assert [event.value for event in events.Scalars("val/loss")] == [2.25]


def test_tensorboard_missing_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'hvdtrain\[tensorboard\]'"):
        TensorBoard(RunDirectory(tmp_path))


@pytest.mark.parametrize("bad", ["\0" * 100, "[]", '"text"', "{", '{"train/loss": 1}', '{"step": "5"}', "[" * 100_000])
def test_a_bad_line_does_not_stop_a_resume(tmp_path, bad):
    (tmp_path / "metrics.jsonl").write_bytes(f'{{"step": 5}}\n{bad}\n{{"step": 6}}\n'.encode() + b"\xff\xfe\n")
    said = []
    sink = JsonLines(RunDirectory(tmp_path), said.append)
    sink.begin(10, 40)
    sink.close()
    assert steps_in(tmp_path / "metrics.jsonl") == [5, 6]
    assert "2 damaged lines" in said[0]


@contextlib.contextmanager
def full_disk(num_bytes):
    """No file grows above `num_bytes`: the system's answer differs from a full disk's in its name only."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_on_a_full_disk_metrics_wait_and_none_is_lost(tmp_path, caplog):
    caplog.set_level("INFO", "hvdtrain")
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(20)))
    log = MetricLog(None, [JsonLines(RunDirectory(tmp_path))])
    with full_disk(100):
        log.begin(9, 40)
        log.write(10, {"train/loss": 1.0})
        log.write(11, {"train/loss": 1.0})
    assert steps_in(path) == [*range(20)]  # what was there is whole
    log.write(12, {"train/loss": 1.0})
    assert steps_in(path) == [*range(13)]
    with full_disk(path.stat().st_size + 10):  # ends in the middle of a line
        log.write(13, {"train/loss": 1.0})
        log.write(14, {"train/loss": 1.0})
    log.close()
    assert steps_in(path) == [*range(15)]
    said = [record.message for record in caplog.records]
    assert sum("metrics cannot be written by JsonLines (File too large)" in text for text in said) == 2
    assert sum("written by JsonLines again" in text for text in said) == 2


def test_on_a_full_disk_the_log_of_a_rank_waits(tmp_path, capsys):
    path = tmp_path / "logs" / "rank-000.log"
    handler = open_rank_log(path)
    try:
        with full_disk(3):
            for number in range(3):
                logging.getLogger("hvdtrain").info("line %d", number)
        logging.getLogger("hvdtrain").info("line 3")
    finally:
        close_rank_log(handler)
    assert [line[-6:] for line in path.read_text().splitlines()] == [f"line {number}" for number in range(4)]
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_a_closed_output_ends_nothing(tmp_path, caplog):
    """`... | head`: the reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        log = MetricLog(Console(is_terminal=False, stream=stream), [])
        log.begin(0, 10)
        for step in range(10):
            log.say(f"line {step}")
            log.write(step, {"val/loss": 1.0})
        log.close()
    assert sum("standard output is closed" in record.message for record in caplog.records) == 1


def test_a_terminal_that_is_gone_ends_nothing():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        log = MetricLog(Console(is_terminal=True, stream=stream), [])
        log.begin(0, 10)
        for step in range(10):
            log.write(step, {"train/loss": 1.0})
        log.say("x")
        log.close()


def test_a_stream_that_was_closed_ends_nothing():
    stream = io.StringIO()
    stream.close()
    log = MetricLog(Console(is_terminal=False, stream=stream), [])
    log.begin(0, 10)
    log.say("x")
    log.write(1, {"val/loss": 1.0})
    log.close()


def test_output_to_a_full_disk_waits(tmp_path):
    with (tmp_path / "out").open("w") as stream:
        console = Console(is_terminal=False, stream=stream)
        with full_disk(10):
            for step in range(5):
                console.say(f"line {step}")
        console.say("line 5")
        console.close()
    assert (tmp_path / "out").read_text() == "".join(f"line {step}\n" for step in range(6))


def test_a_refused_run_writes_no_metrics(tmp_path):
    MetricLog(None, [JsonLines(RunDirectory(tmp_path))]).close()
    assert [*tmp_path.iterdir()] == []
