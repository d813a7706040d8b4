"""`report` and `compare` without a browser: what is read of a run, what is kept of a curve, what is said."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from made_runs import make_run

from hvdtrain.cli import parse
from hvdtrain.errors import ConfigError
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.verbs.report.charts import charts_of, draw
from hvdtrain.verbs.report.events import Event, events_of
from hvdtrain.verbs.report.page import page_of
from hvdtrain.verbs.report.runs import Curve, read_run, read_runs
from hvdtrain.verbs.report.series import Places, averaged, thinned
from hvdtrain.verbs.report.sink import FIRST_COST_S, ReportSink
from hvdtrain.verbs.report.time_figures import own_times, parts_of, time_figures


def answer(*words):
    """Answer a command line as its process would, which would also change this one's environment."""
    return parse([str(word) for word in words]).run()


def test_a_run_is_read_as_it_was_logged(tmp_path):
    run = read_run(make_run(tmp_path / "a", lines=100, every=5, spike_at=30))
    assert run.notes == []
    assert run.curves["train/loss"].steps.tolist() == [*range(5, 501, 5)]
    assert run.curves["train/loss"].values[29] == 1000
    assert run.settings["optim.peak_lr"] == 0.001
    assert [(event.step, event.kind) for event in events_of(run)] == [
        (250, "restart"),
        (250, "warning"),
        (250, "save"),
        (500, "finished"),
        (500, "save"),
    ]


def test_axes_of_tokens_and_time(tmp_path):
    run = read_run(make_run(tmp_path / "a", lines=100, every=5))
    places = Places.of(run)
    assert places.unit == "tokens"
    assert places.per_step == pytest.approx(2048)
    whole = sum(5 * value for value in run.curves["time/step_s"].values)
    assert places.seconds_at(np.array([0.0, 500.0])).tolist() == pytest.approx([0, whole])


@pytest.mark.parametrize("place", [0, 1, 4999, 77_777, 99_999])
def test_thinning_keeps_every_spike_and_gap(place):
    steps = np.arange(100_000, dtype=np.float64)
    for value in (1e6, -1e6, np.nan):
        values = np.sin(steps / 1e4)
        values[place] = value
        thin = thinned(Curve(steps, values), 500)
        assert len(thin.steps) <= 503
        kept = thin.values[thin.steps == place]
        assert kept.tolist() == [value] or (np.isnan(value) and np.isnan(kept).all() and kept.size == 1)
        assert (np.diff(thin.steps) > 0).all()
        assert thin.steps[[0, -1]].tolist() == [0, 99_999]


def test_means_of_stretches():
    curve = Curve(np.arange(10.0), np.array([0, 2, 4, 6, np.nan, 8, 10, 12, 14, 16.0]))
    assert averaged(curve, 3).values.tolist() == [2, 8, 14]
    assert averaged(Curve(np.arange(3.0), np.full(3, np.nan)), 3).values.size == 0


BROKEN = {
    "half a line": lambda run: _append(run, '{"step": 7, "train/lo'),
    "no JSON": lambda run: _append(run, "\x00\x01 garbage\n"),
    "no step": lambda run: _append(run, '{"train/loss": 1}\n'),
    "an impossible step": lambda run: _append(run, '{"step": -5, "train/loss": 1}\n{"step": 1e400}\n'),
    "a number without end": lambda run: _append(run, f'{{"step": 6000, "train/loss": {"9" * 400}}}\n'),
    "words for numbers": lambda run: _append(run, '{"step": 6000, "train/loss": "low", "event": ["odd", 1]}\n'),
    "steps that go back": lambda run: _append(run, '{"step": 10, "train/loss": 9.5}\n'),
    "nothing logged": lambda run: (run / "metrics.jsonl").write_text(""),
    "no metrics": lambda run: (run / "metrics.jsonl").unlink(),
    "no settings": lambda run: (run / "config.toml").unlink(),
    "broken settings": lambda run: (run / "config.toml").write_bytes(b"[train\n\xff"),
    "broken environment": lambda run: (run / "environment.json").write_text("[1, 2"),
    "another environment": lambda run: (run / "environment.json").write_text('{"ranks": 3, "packages": []}'),
    "a folder for a log": lambda run: [(run / "logs/rank-000.log").unlink(), (run / "logs/rank-000.log").mkdir()],
    "all lines are gaps": lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": null}\n' * 9),
}
SAID = {
    "no JSON": "1 line is damaged",
    "no step": "1 line is damaged",
    "an impossible step": "2 lines are damaged",
    "nothing logged": "no line of metrics",
    "no metrics": "is missing",
    "no settings": "is missing",
    "broken settings": "is damaged",
    "broken environment": "is damaged",
    "a folder for a log": "no regular file",
}


def _append(run, text):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(text)


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_broken_is_named_and_the_rest_is_shown(fault, tmp_path, capsys):
    pytest.importorskip("bokeh")
    folder = make_run(tmp_path / "a", lines=50)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    few = [{name: line[name] for name in ("step", "train/loss") if name in line} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in few))
    BROKEN[fault](folder)
    assert answer("report", folder) == 0
    said, page = capsys.readouterr().out, (folder / "report.html").read_text()
    assert SAID.get(fault, "") in said
    assert ("warning: " in said) == (fault in SAID)
    if fault in SAID:
        assert SAID[fault] in page
    if fault not in ("nothing logged", "no metrics"):
        assert "<figure" in page
    assert answer("compare", folder, folder) == 0


def test_what_is_no_run_is_refused(tmp_path):
    pytest.importorskip("bokeh")
    for words, said in {
        ("report",): "report is given directories",
        ("report", str(tmp_path)): "holds no run",
        ("report", str(tmp_path / "missing")): "cannot be read",
        ("compare", str(tmp_path)): "compare is given two runs, not 1",
        ("report", str(make_run(tmp_path / "a")), "--output", str(tmp_path)): "is a directory",
    }.items():
        with pytest.raises(ConfigError, match=said):
            answer(*words)


def test_without_bokeh_it_says_what_to_install(tmp_path):
    make_run(tmp_path / "a")
    hidden = "import sys; sys.modules['bokeh'] = None; from hvdtrain.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", hidden, "report", str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert re.fullmatch(r"hvdtrain: .*pip install bokeh\n", done.stderr)
    assert not (tmp_path / "a" / "report.html").exists()


def test_several_runs_begin_with_what_differs(tmp_path):
    pytest.importorskip("bokeh")
    folders = [make_run(tmp_path / str(i) / "run", lines=50, peak_lr=0.001 * (i + 1), seed=i) for i in range(3)]
    assert answer("report", *folders, "--output", str(tmp_path / "all.html")) == 0
    page = (tmp_path / "all.html").read_text()
    assert page.index("What differs") < page.index("Results") < page.index("Curves")
    assert re.search(r"optim.peak_lr</th><td>0.001</td><td>0.002</td><td>0.003</td>", page)
    assert "<th scope='row'>train.steps" not in page[: page.index("Results")]
    assert [run.name for run in read_runs(folders)] == ["0/run", "1/run", "2/run"]
    assert len(page.encode()) < 1_500_000


def test_text_of_a_run_is_no_markup(tmp_path):
    pytest.importorskip("bokeh")
    evil = "</script><img src=x onerror=alert(1)>$$x$$"
    folder = make_run(tmp_path / "<img src=y>", lines=30, extra=[evil, f"throughput/{evil}_per_s"])
    (folder / "environment.json").write_text(json.dumps({evil: evil}))
    assert answer("report", folder) == 0
    page = (folder / "report.html").read_text()
    assert "<img" not in page
    assert page.count("</script>") == page.count("<script")
    # What Bokeh is given may become a formula, which it fetches MathJax for, or a tooltip, which is markup.
    run = read_run(folder, name=evil)
    charts, _ = charts_of([run, run])
    drawn = json.dumps(draw(charts, [Places.of(run)] * 2, [[Event(100, "warning", evil)]] * 2, 1000))
    assert "onerror" in drawn
    assert "<" not in drawn
    assert "$$" not in drawn


def test_a_page_of_100000_steps_is_small(tmp_path):
    pytest.importorskip("bokeh")
    folder = tmp_path / "a"
    make_run(folder, lines=1000, every=100, spike_at=123)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    many = [json.loads(line) for line in lines if "train/loss" in line]
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(100_000):
            file.write(
                json.dumps({**many[step // 100], "step": step + 1, "train/grad_norm": (step * 7919) % 100_003}) + "\n"
            )
    assert answer("report", folder) == 0
    assert (folder / "report.html").stat().st_size < 1_500_000


def test_compare_names_the_first_step_that_differs(tmp_path, capsys):
    a, b = (make_run(tmp_path / name, lines=50) for name in "ab")
    assert answer("compare", a, b) == 0
    assert "results: the same to the last bit" in capsys.readouterr().out
    lines = (b / "metrics.jsonl").read_text().splitlines()
    changed = [json.loads(line) for line in lines]
    for line in changed:
        if line["step"] >= 300 and "train/loss" in line:
            line["train/loss"] *= 1 + 2**-50
    (b / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    (b / "config.toml").write_text((b / "config.toml").read_text().replace("0.001", "0.002"))
    environment = (b / "environment.json").read_text()
    (b / "environment.json").write_text(environment.replace("2.13.0", "2.12.0").replace('"pid": 100', '"pid": 7'))
    assert answer("compare", a, b) == 0
    said = capsys.readouterr().out
    assert re.search(r"optim.peak_lr +0.001  ->  0.002", said)
    assert re.search(r"packages.torch +2.13.0  ->  2.12.0", said)
    assert "pid" not in said
    assert "results: differ from step 300 on, the same to the last bit up to step 290" in said
    assert re.search(r"train/lr +the same at all 50 common steps", said)


def test_compare_of_runs_without_a_common_step(tmp_path, capsys):
    a, b = make_run(tmp_path / "a", lines=5, every=7), make_run(tmp_path / "b", lines=5, every=1000)
    assert answer("compare", a, b) == 0
    assert "no metric was logged by both at the same step" in capsys.readouterr().out


def test_a_run_writes_its_report_for_one_percent_of_its_time(tmp_path):
    pytest.importorskip("bokeh")
    run, now, said = RunDirectory(make_run(tmp_path / "a", lines=20)), [0.0], []
    sink = ReportSink(run, said.append, clock=lambda: now[0])
    sink.begin(0, 200)
    sink.write(100, {"val/loss": 1.0}, None)
    sink.close()
    assert not run.report.exists()
    now[0] = 19 * FIRST_COST_S
    sink.write(200, {"val/loss": 1.0}, "finished")
    sink.close()  # too short a run even for the report of its end
    assert not run.report.exists()
    now[0] = 99 * FIRST_COST_S
    sink.write(110, {"val/loss": 1.0}, None)
    assert not run.report.exists()
    now[0] = 101 * FIRST_COST_S
    sink.write(120, {"train/loss": 1.0}, None)
    assert not run.report.exists()
    sink.write(120, {"val/loss": 1.0}, None)
    assert "<figure" in run.report.read_text()
    run.report.unlink()
    now[0] += 1000
    sink.close()  # it was stopped
    assert not run.report.exists()
    sink.write(200, {"val/loss": 1.0}, "finished")
    assert not run.report.exists()
    sink.close()
    assert run.report.exists()
    assert said == []


def test_a_run_of_a_minute_has_its_report_at_its_end(tmp_path):
    pytest.importorskip("bokeh")
    run, now = RunDirectory(make_run(tmp_path / "a", lines=20)), [0.0]
    sink = ReportSink(run, str, clock=lambda: now[0])
    sink.begin(0, 200)
    now[0] = 21 * FIRST_COST_S
    sink.write(200, {"val/loss": 1.0}, "finished")
    sink.close()
    assert run.report.exists()


def test_a_run_without_evaluations_has_reports_after_saves(tmp_path):
    pytest.importorskip("bokeh")
    run, now = RunDirectory(make_run(tmp_path / "a", lines=20)), [0.0]
    sink = ReportSink(run, str, clock=lambda: now[0])
    sink.begin(0, 200)
    now[0] = 101 * FIRST_COST_S
    sink.write(100, {"train/loss": 1.0}, None)
    assert not run.report.exists()
    sink.write(110, {"train/loss": 1.0, "time/checkpoint_stall_s": 0.1}, None)
    assert run.report.exists()
    run.report.unlink()
    now[0] += 1000
    sink.write(120, {"val/loss": 1.0}, None)
    assert run.report.exists()
    run.report.unlink()
    now[0] += 1000
    sink.write(130, {"train/loss": 1.0, "time/checkpoint_stall_s": 0.1}, None)  # an evaluation will come
    assert not run.report.exists()


def test_a_report_that_fails_is_told_once(tmp_path):
    pytest.importorskip("bokeh")
    run, now, said = RunDirectory(make_run(tmp_path / "a", lines=20)), [0.0], []
    sink = ReportSink(run, said.append, clock=lambda: now[0])
    run.report.mkdir()
    for _ in range(3):
        now[0] += 1000
        sink.write(100, {"val/loss": 1.0}, None)
    assert len(said) == 1
    assert "training goes on without it" in said[0]


def test_where_time_goes_is_drawn(tmp_path):
    run = read_run(make_run(tmp_path / "a", lines=600, ranks=64, slow_rank=7))
    steps, parts = parts_of(run)
    assert len(steps) == 599  # the first line has the start in it
    whole = np.array([values.mean() for values in parts.values()])
    assert (whole / whole.sum()).tolist() == pytest.approx([0.1, 0.5, 0.25, 0.1, 0.05])
    columns, ranks, seconds = own_times(run)
    assert (len(columns), ranks, seconds.shape) == (120, [*range(64)], (64, 120))
    assert seconds.mean(axis=1).argmax() == 7
    charts, _ = charts_of([run])
    assert not [chart.title for chart in charts if "own_s" in chart.title or chart.title.startswith("time/")]
    split, heat = time_figures([run], [Places.of(run)])
    assert "forward and backward: " in split.caption
    assert "50%" in split.caption
    assert "Rank 7 takes longest: 2.0" in heat.caption
    assert len(page_of([run], "")) < 600_000


def test_a_run_without_times_has_no_such_figures(tmp_path):
    run = read_run(make_run(tmp_path / "a"))
    assert time_figures([run], [Places.of(run)]) == []


def test_spikes_and_slow_ranks_are_events(tmp_path):
    folder = make_run(tmp_path / "a", lines=100)
    with (folder / "logs" / "rank-000.log").open("a") as file:
        file.write("2026-11-20 08:10:00,100 INFO WARNING: step 120: a spike: the gradient norm is 9\n")
        file.write("2026-11-20 08:10:00,100 INFO WARNING: step 130: rank 1 on a is slow, and all others wait: 2\n")
    kinds = {event.step: event.kind for event in events_of(read_run(folder))}
    assert (kinds[120], kinds[130]) == ("spike", "slow")


def test_a_run_that_changed_its_ranks_has_all_of_them(tmp_path):
    """Four ranks, then two, at lines that are unevenly apart: what is no rank's is a gap, not the end of the map."""
    folder = make_run(tmp_path / "a", lines=3)
    steps = [*range(10, 101, 10), *range(150, 1001, 50)]
    with (folder / "metrics.jsonl").open("w") as file:
        for step in steps:
            own = {f"time/own_s/rank-{rank:03}": 0.1 * (rank + 1) for rank in range(4 if step <= 500 else 2)}
            file.write(json.dumps({"step": step, **own}) + "\n")
    middles, ranks, seconds = own_times(read_run(folder))
    assert ranks == [0, 1, 2, 3]
    assert len(middles) == len(steps)
    assert np.isfinite(seconds[:2]).all()
    assert seconds[3][middles < 490].tolist() == pytest.approx([0.4] * int((middles < 490).sum()))
    assert np.isnan(seconds[3][middles > 560]).all()
    (heat,) = time_figures([read_run(folder)], [Places.of(read_run(folder))])
    assert "Rank 3 takes longest: 1.60 times the median" in heat.caption


def test_what_is_compared_is_nothing_that_a_terminal_obeys(tmp_path, capsys):
    a, b = make_run(tmp_path / "a", lines=5), make_run(tmp_path / "b", lines=5)
    (b / "config.toml").write_text('[data]\npath = "\\u001b[2J gone"\n')
    assert answer("compare", a, b) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "?[2J gone" in said


def test_of_many_runs_legends_are_folded_and_each_run_has_its_colour_once(tmp_path):
    runs = [read_run(make_run(tmp_path / str(number), lines=10), str(number)) for number in range(8)]
    for run in runs:  # one chart is enough
        run.curves = {name: run.curves[name] for name in ("train/loss", "val/loss") if name in run.curves}
    few, many = page_of(runs[:2], ""), page_of(runs, "")
    assert "what can be read off them" not in few
    assert "16 curves, and what can be read off them" in many
    boxes = re.findall(r"<label><input type='checkbox' name='run'.*?</label>", many)
    assert len(boxes) == len({re.search(r"style='(.*?)'", box)[1] for box in boxes}) == 8


def test_what_has_no_ratio_is_compared_in_words(tmp_path, capsys):
    folders = [make_run(tmp_path / name, lines=5) for name in "ab"]
    for folder, value in zip(folders, ("0.0", "0.5"), strict=True):
        _append(folder, f'{{"step": 60, "train/loss": {value}}}\n')
    assert answer("compare", *folders) == 0
    assert "from step 60: 0 -> 0.5; one is zero or not finite at step 60" in capsys.readouterr().out
