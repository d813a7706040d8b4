"""`sweep` without training: how values are written, what is trained, what is kept, what is best."""

import csv
import json
import math
import os
import random
import shlex
import sys
from pathlib import Path

import pytest

from hvdtrain.cli import main, parse
from hvdtrain.errors import ConfigError, LaunchError, ResumeError
from hvdtrain.settings.values import Words
from hvdtrain.verbs.sweep import sweep
from hvdtrain.verbs.sweep.folder import SweepFolder, open_sweep, read_sweep
from hvdtrain.verbs.sweep.grid import label_of
from hvdtrain.verbs.sweep.proposals import check_optuna, propose
from hvdtrain.verbs.sweep.results import groups_of, results_of, summary_of, table_of, write_results
from hvdtrain.verbs.sweep.slurm import array_command
from hvdtrain.verbs.sweep.values import Range, joined, read_values, split

RECIPE = str(Path(__file__).parents[1] / "support" / "faulty_recipe.py")
MANY = ",".join(map(str, range(1, 200)))
RATES = ("--optim.peak-lr", "0.01,0.03")


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    """Be in an empty folder, and put back the variables that a start sets for its process."""
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    yield
    os.environ.clear()
    os.environ.update(before)


def grid_of(*words):
    return parse(["sweep", RECIPE, *words]).grid


def values_of(*words):
    return [combination.values for combination in grid_of(*words).combinations]


def refused(*words):
    with pytest.raises(ConfigError) as caught:
        grid_of(*words)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        (r"a\,b", ["a,b"]),
        (r"a\,b,c", ["a,b", "c"]),
        (r"a\\,b", ["a\\", "b"]),
        (r"\d+,\w", [r"\d+", r"\w"]),
        (",a", ["", "a"]),
        ("", [""]),
    ],
)
def test_commas_separate_and_can_be_written(word, parts):
    assert split(word) == parts


def test_every_list_of_values_can_be_written():
    draw = random.Random(1)
    for _ in range(500):
        values = ["".join(draw.choices(r"ab,\ '\"" + "\n", k=draw.randrange(1, 6))) for _ in range(3)]
        assert split(",".join(joined(Words((value,)), is_list=False) for value in values)) == values
        lists = [Words(values[:count]) for count in (1, 2, 3)]
        written = [joined(value, is_list=True) for value in lists]
        assert [Words(shlex.split(part)) for part in split(",".join(written))] == lists


def test_a_setting_that_is_a_list():
    both = values_of("--optim.schedule", "multistep", "--optim.milestones", "0.3 0.6,0.5")
    assert [values["optim.milestones"] for values in both] == [[0.3, 0.6], [0.5]]
    fixed = grid_of("--optim.schedule", "multistep", "--optim.milestones", "0.3", "0.6", *RATES)
    assert set(fixed.varied) == {"optim.peak_lr"}
    assert fixed.combinations[0].settings["optim"]["milestones"] == [0.3, 0.6]
    said = refused("--optim.schedule", "multistep", "--optim.milestones", "0.3,0.4", "0.5")
    assert 'one word, as in --optim.milestones "0.3 0.6,0.5"' in said


def test_every_combination_in_the_order_in_which_it_was_written():
    assert values_of(*RATES, "--train.seed", "0,1", "--train.steps", "7") == [
        {"optim.peak_lr": rate, "train.seed": seed} for rate in (0.01, 0.03) for seed in (0, 1)
    ]
    assert [one["train.max_grad_norm"] for one in values_of("--train.max-grad-norm", "1,none")] == [1.0, None]
    assert [one["log.grad_norms"] for one in values_of("--log.grad-norms", "true,false")] == [True, False]
    assert [one["train.seed"] for one in values_of("--seed", "3,4")] == [3, 4]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--optim.peak-lr", "0.01,abc"), "--optim.peak-lr 'abc' must be a number"),
        (("--optim.peak-lr", "0.01,-1"), "must be greater than 0"),
        (("--optim.peak-lr", "0.01,0.010"), "lists 0.010 twice"),
        (("--optim.peak-lr", "0.01"), "a sweep is given several values"),
        (("--optim.peak-lr", "0.01", "0.02"), "several values stand in one word, as in --optim.peak-lr a,b"),
        (("--optim.peak-rl", "0.01,0.02"), "did you mean '--optim.peak-lr'?"),
        (("--optim.name", "adamw,sgd", "--optim.momentum", "0.9"), "with --optim.name adamw"),
        (("--optim.schedule", "cosine,constant", "--optim.final-lr-fraction", "0.2"), "with --optim.schedule constant"),
        (("--train.global-batch-size", "16,15", "-np", "2"), "global batch of 15 samples does not divide among 2"),
        (("--optim.warmup-steps", "5,50"), "leaves nothing of the run's 40 steps"),
        (("--optim.peak-lr", "1e-4..1e-2"), "--sweep.random N draws N values from"),
        (("--optim.peak-lr", "1e-2..1e-4", "--sweep.random", "2"), "the lower bound comes first"),
        (("--optim.peak-lr", "0..1", "--sweep.random", "2"), "there is no logarithm of 0"),
        (("--optim.peak-lr", "1..2:square", "--sweep.random", "2"), "LOW..HIGH:linear"),
        (("--train.seed", "0,1", "--sweep.random", "2"), "give more to draw from"),
        ((*RATES, "--sweep.random", "2", "--sweep.optuna", "2"), "not both"),
        ((*RATES, "-np", "2", "--launcher", "mpirun"), "give -np, or a --launcher"),
        ((*RATES, "--slurm", "-np", "2"), "the job file says how many ranks"),
        ((*RATES, "--slurm", "--sweep.optuna", "2"), "one trial after the other"),
        (
            ("--optim.peak-lr", ",".join(map(str, range(1, 200))), "--width", ",".join(map(str, range(1, 200)))),
            "39,601",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_starts(words, said, tmp_path):
    assert said in refused(*words)
    assert not list(tmp_path.iterdir())


def test_a_path_and_a_text_are_no_ranges():
    assert isinstance(read_values(Words(("1..5",)), int, "train.seed", True), Range)
    assert read_values(Words(("../a..b,../c",)), str, "data.path", True).values == (("../a..b",), ("../c",))
    assert read_values(Words(("1..5",)), Path, "data.path", False).values == (("1..5",),)


def test_random_draws():
    words = ("--optim.peak-lr", "1e-4..1e-2", "--width", "16..64", "--dropout", "0..0.5:linear", "--train.seed", "0,1")
    drawn = values_of(*words, "--sweep.random", "40")
    assert len(drawn) == 80
    assert [one["train.seed"] for one in drawn] == [0, 1] * 40
    rates = [one["optim.peak_lr"] for one in drawn[::2]]
    assert all(1e-4 <= rate <= 1e-2 and float(f"{rate:.4g}") == rate for rate in rates)
    assert 12 <= sum(rate < 1e-3 for rate in rates) <= 28  # half of them, on a logarithmic scale
    assert all(type(one["width"]) is int and 16 <= one["width"] <= 64 for one in drawn)
    assert 0.1 < sum(one["dropout"] for one in drawn) / 80 < 0.4
    assert drawn[:10] == values_of(*words, "--sweep.random", "5"), "more draws only add to fewer"
    assert drawn[:10] != values_of(*words, "--sweep.random", "5", "--sweep.seed", "1")
    assert len(values_of("--width", "8,16,32", "--sweep.random", "99")) == 3, "each combination once"


def test_the_same_command_finds_its_directory_again():
    own = grid_of(*RATES).run_dir
    assert own == grid_of("--optim.peak-lr", "0.01,0.03,0.1").run_dir
    assert own != grid_of(*RATES, "--train.steps", "7").run_dir
    assert own.parent == Path("runs")
    assert grid_of(*RATES, "--run-dir", "mine").run_dir == Path("mine")


def filled(*words, path=Path("s")):
    grid = grid_of(*words)
    folder = open_sweep(path, grid.facts)
    for combination in grid.combinations:
        folder.add(combination)
    folder.save()
    return folder


def test_a_sweep_gets_more_values_and_keeps_its_trials():
    before = filled(*RATES)
    after = filled("--optim.peak-lr", "0.1,0.03,0.01")
    assert [trial.values["optim.peak_lr"] for trial in after.trials] == [0.01, 0.03, 0.1]
    assert after.trials[:2] == before.trials
    with pytest.raises(ResumeError, match=r"another setting \(train.steps not given, now 7\)"):
        filled(*RATES, "--train.steps", "7")
    with pytest.raises(ResumeError, match="another set of settings that differ"):
        filled(*RATES, "--train.seed", "0,1")
    (Path("s") / "sweep.json").write_text('{"format": 1, "tri')
    with pytest.raises(ResumeError, match="is not JSON"):
        filled(*RATES)
    (Path("run") / "checkpoints").mkdir(parents=True)
    with pytest.raises(ResumeError, match="holds a run, not a sweep"):
        filled(*RATES, path=Path("run"))


@pytest.mark.parametrize("first", [(), ("--config", "given.toml")])
def test_a_sweep_goes_on_with_another_limit_of_time(first):
    """What does not change what a trial comes to may differ, in a file too; also where it was once kept."""
    Path("given.toml").write_text('[train]\nmax-time = "1h"\nseed = 3\n')
    before = filled(*RATES, *first, "--checkpoint.every", "5")
    before.facts["fixed"]["checkpoint.every"] = ["5"]
    before.save()
    Path("given.toml").write_text('[train]\nmax-time = "2h"\nseed = 3\n')
    after = filled(*RATES, *first, "--train.max-time", "3h", "--log.every", "2")
    assert [trial.values for trial in after.trials] == [trial.values for trial in before.trials]
    assert 'max_time = "3h"' in after.settings_file(after.trials[0]).read_text()
    assert grid_of(*RATES, "--train.max-time", "3h").run_dir == grid_of(*RATES).run_dir
    if first:
        Path("given.toml").write_text('[train]\nmax-time = "2h"\nseed = 4\n')
        with pytest.raises(ResumeError, match="another --config"):
            filled(*RATES, *first)


def test_a_trial_is_trained_with_what_the_command_line_says(tmp_path):
    for name in ("a,b", "c"):
        (tmp_path / name).mkdir()
    words = ["--data.path", rf"{tmp_path}/a\,b,{tmp_path}/c", "--optim.name", "sgd", "--optim.momentum", "0.5"]
    grid = parse(["sweep", "lm", *words, "--train.steps", "5"]).grid
    assert [Path(one.values["data.path"]).name for one in grid.combinations] == ["a,b", "c"]
    folder = SweepFolder(tmp_path / "s")
    for combination, name in zip(grid.combinations, ("a,b", "c"), strict=True):
        file = folder.settings_file(folder.add(combination))
        direct = ["--data.path", f"{tmp_path}/{name}", *words[2:], "--train.steps", "5"]
        assert parse(["train", "lm", "--config", str(file)]).recipe == parse(["train", "lm", *direct]).recipe


def log(folder, trial, losses, event="finished"):
    run = folder.run_dir(trial)
    run.mkdir(exist_ok=True)
    (run / "config.toml").write_text("[train]\nsteps = 30\n")
    lines = [{"step": 10 * number, "val/loss": loss} for number, loss in enumerate(losses, 1)]
    lines[-1] |= {"time/train_s": 61.0, "event": event} if event else {}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def trained():
    folder = filled(*RATES, "--train.seed", "0,1,2")
    all_losses = ([3, 1, 2.0], [3, 2, 3.0], [9, 9, None], [5, 4, 0.5], [5, 4])
    for trial, losses in zip(folder.trials, all_losses, strict=False):
        log(folder, trial, losses, "finished" if len(losses) == 3 else None)
    folder.trials[4].why = "exit code 1: bad luck"
    folder.save()
    return read_sweep(Path("s"))


def test_what_trials_have_come_to(trained):
    results = results_of(trained)
    assert [one.state for one in results] == ["finished"] * 4 + ["failed", "waiting"]
    assert [(one.final, one.best, one.best_step) for one in results[:3]] == [(2, 1, 20), (3, 2, 20), (None, 9, 10)]
    low, high = groups_of(trained, results)
    assert (low.values, low.mean, low.std, low.n, low.of) == ({"optim.peak_lr": 0.03}, 0.5, None, 1, 3)
    assert (high.values, high.mean, high.n) == ({"optim.peak_lr": 0.01}, 2.5, 2)
    assert high.std == pytest.approx(math.sqrt(0.5))
    assert summary_of(trained, results)[1:] == [
        "  peak-lr 0.03: 0.5, n = 1 of 3",
        "  peak-lr 0.01: 2.5 +- 0.71 (std), n = 2 of 3",
    ]
    row = "0 0.01 0 finished 30 2 1 20 1m01s s/trial-0"
    assert table_of(trained, results)[1].split() == row.split()
    trained.goal = "max"
    results = results_of(trained)
    assert (results[0].best, results[0].best_step) == (3, 10)
    assert groups_of(trained, results)[0].values == {"optim.peak_lr": 0.01}
    trained.metric = "val/top1"
    assert "evaluated were val/loss: --sweep.metric" in summary_of(trained, results_of(trained))[0]


def test_the_table_for_programs(trained):
    write_results(trained, results_of(trained))
    rows = [*csv.DictReader(Path("s/results.csv").read_text().splitlines())]
    assert rows[0]["optim.peak_lr"] == "0.01"
    assert rows[0]["val/loss"] == "2.0"
    assert rows[5]["val/loss"] == ""
    known = json.loads(Path("s/results.json").read_text())
    assert [row["state"] for row in known["trials"]][3:] == ["finished", "failed", "waiting"]
    assert known["best_first"][0] == {"values": {"optim.peak_lr": 0.03}, "mean": 0.5, "std": None, "n": 1, "of": 3}


def test_a_report_shows_the_whole_sweep(trained, capsys):
    assert parse(["report", "s"]).run() == 0
    assert "of 5 runs" in capsys.readouterr().out
    page = Path("s/report.html").read_text()
    assert "<h2>Sweep s</h2><p>6 trials: 4 finished, 1 failed, 1 waiting; the lowest first, over seeds.</p>" in page
    assert "peak-lr 0.01, seed 0" in page
    assert "peak-lr 0.03, seed 1 has failed: exit code 1: bad luck" in page
    filled(*RATES, path=Path("empty"))
    with pytest.raises(ConfigError, match="no trial of the sweep in empty has begun"):
        parse(["report", "empty"]).run()


def test_a_dry_run_writes_nothing(capsys, tmp_path):
    assert main(["sweep", RECIPE, *RATES, "--dry-run"]) == 0
    assert "peak-lr 0.01\n  peak-lr 0.03" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_help_says_how_values_are_written(capsys):
    assert main(["sweep", "lm", "--help"]) == 0
    said = capsys.readouterr().out
    assert "[--section.setting A,B,... ...]" in said
    assert "--sweep.random N" in said


def test_a_rank_starts_no_sweep(monkeypatch):
    monkeypatch.setenv("HOROVOD_RANK", "0")
    grid = grid_of(*RATES)
    with pytest.raises(LaunchError, match="starts the ranks of its trials itself"):
        sweep(grid, grid.options)


def test_ranks_of_trials_may_stand_first(capsys):
    assert main(["-np", "2", "sweep", RECIPE, "--train.global-batch-size", "15,16"]) == 2
    assert "does not divide among 2 ranks" in capsys.readouterr().err


def test_an_array_of_slurm(trained, capsys):
    grid = grid_of(*RATES, "--slurm", "--sbatch=--time=5 --comment='a b'")
    left = trained.trials[4:]
    command = array_command(trained, RECIPE, left, grid.options)
    assert command[:6] == ["sbatch", "--parsable", "--array=4,5", "--job-name=s", "--time=5", "--comment=a b"]
    assert command[6:] == ["launch/slurm.sbatch", "train", RECIPE, "--config", f"{Path.cwd()}/s/trials/%a.toml"]
    assert main(["sweep", RECIPE, *RATES, "--slurm", "--slurm-file", "missing"]) == 2
    assert "sbatch, which is not found" in capsys.readouterr().err or "missing is not there"


def test_a_label_tells_settings_apart():
    values = {"data.path": "a b", "model.path": None, "train.seed": 1}
    assert label_of(values, values) == "data.path a b, model.path none, seed 1"


def test_without_optuna(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install optuna, or give --sweep\.random"):
        check_optuna()


def loss_of(values):
    return math.log10(values["optim.peak_lr"] / 3e-3) ** 2 + (values["width"] - 32) ** 2 / 1000 + values["dropout"]


def proposals(number):
    pytest.importorskip("optuna")
    space = (
        "--optim.peak-lr",
        "1e-5..1e-1",
        "--width",
        "8..64:linear",
        "--dropout",
        "0.5,0.0,0.9",
        "--train.seed",
        "0,1",
    )
    grid = grid_of(*space, "--sweep.optuna", str(number))
    folder = open_sweep(Path(f"optuna-{number}"), grid.facts)
    for proposal in range(number):
        words = propose(grid, proposal, results_of(folder))
        for combination in grid.with_seeds(words, proposal):
            trial = folder.add(combination)
            folder.path.mkdir(exist_ok=True)
            log(folder, trial, [loss_of(combination.values)])
    return grid, folder


@pytest.mark.slow
def test_proposals_come_closer_and_do_not_depend_on_breaks():
    grid, folder = proposals(30)
    losses = [one.final for one in results_of(folder)[::2]]
    assert min(losses[10:]) < 0.2
    assert sorted(losses[20:])[5] < sorted(losses[:10])[5], "half of the later ones are better than of the first"
    assert len(folder.trials) == 60
    again = propose(grid, 12, [one for one in results_of(folder) if one.trial.proposal < 12])
    assert float(again["optim.peak_lr"][0]) == folder.trials[24].values["optim.peak_lr"]


ODD_SWEEPS = [
    "",
    "[]",
    "3",
    "{}",
    "[" * 100_000,
    '{"format": 9, "trials": []}',
    '{"format": 1}',
    '{"format": 1, "trials": 3}',
    '{"format": 1, "trials": [3]}',
    '{"format": 1, "trials": [{"number": 0}]}',
    '{"format": 1, "trials": [{"number": 0, "values": "x"}]}',
    '{"format": 1, "trials": [{"number": "../../x", "values": {}}]}',
    '{"format": 1, "trials": [{"number": 1, "values": {}}]}',
    '{"format": 1, "trials": [{"number": 0, "values": {}, "proposal": "x"}]}',
    '{"format": 1, "trials": [{"number": 0, "values": {}, "why": 3}]}',
    '{"format": 1, "trials": [], "facts": 3}',
    '{"format": 1, "trials": [], "metric": 3}',
    '{"format": 1, "trials": [], "goal": "up"}',
    '{"format": 1, "trials": [], "slurm_job": 3}',
    '{"format": 1, "trials": [], "path": "/"}',
]


@pytest.mark.parametrize("text", ODD_SWEEPS, ids=[text[:70] for text in ODD_SWEEPS])
def test_a_sweep_that_is_damaged_is_refused_in_a_sentence(text):
    Path("s").mkdir()
    Path("s/sweep.json").write_text(text)
    with pytest.raises(ResumeError, match=r"^s/sweep.json .*: choose another --run-dir"):
        open_sweep(Path("s"), {"recipe": "lm"})


def test_a_number_that_no_float_holds_is_no_result(trained):
    file = trained.run_dir(trained.trials[0]) / "metrics.jsonl"
    file.write_text('{"step": 30, "val/loss": 1' + "0" * 400 + ', "event": "finished"}\n')
    results = results_of(trained)
    assert (results[0].state, results[0].final) == ("finished", None)
    write_results(trained, results)


def test_a_launcher_that_returns_0_without_training_has_failed(capfd):
    """As `echo` does, or a wrapper that forgets the exit code of what it starts."""
    assert main(["sweep", RECIPE, *RATES, "--run-dir", "s", "--launcher", "echo"]) == 1
    said = capfd.readouterr()
    assert said.out.count("has failed: what has started it returned 0, but the run has not finished") == 2
    assert "2 trials of the sweep failed" in said.err


def by_script(code):
    """Return a sweep whose trials a piece of shell code is in the place of; "$d" is the directory of one."""
    Path("launcher").write_text(f"for d; do :; done\n{code}\n")
    return ["sweep", RECIPE, *RATES, "--run-dir", "s", "--launcher", "sh launcher"]


@pytest.mark.parametrize(("number", "memory"), [(9, True), (11, False), (15, False)])
def test_a_trial_that_a_signal_has_ended_says_which(number, memory, capfd):
    assert main(by_script(f"echo begun; kill -{number} $$")) == 1
    assert capfd.readouterr().out.count(f"has failed, exit code 1: hvdtrain: ended by signal {number} (") == 2
    assert ("where memory is used up" in read_sweep(Path("s")).trials[1].why) == memory


def test_a_trial_that_has_finished_has_not_failed_whatever_comes_after(capfd):
    finished = '{"step": 30, "val/loss": 1.0, "event": "finished"}'
    assert main(by_script(f"""mkdir -p "$d"; echo '{finished}' > "$d/metrics.jsonl"; echo oh; exit 1""")) == 0
    said = capfd.readouterr().out
    assert said.count("has finished, and ended with exit code 1: oh") == 2
    assert "2 trials: 2 finished" in said


def test_a_trial_that_is_tried_again_has_not_failed_yet(capfd):
    """It was stopped on request and had saved, and the table called it failed, for what had been before."""
    again = by_script("""echo "failed: $(grep -c '"why": "exit code 3' s/sweep.json)"; exit 3""")
    assert main(again) == main(again) == 1
    counts = [line for line in capfd.readouterr().out.splitlines() if line.startswith("failed: ")]
    assert counts == ["failed: 0", "failed: 1", "failed: 1", "failed: 1"]


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """Stand-ins for Slurm's commands, made of shell code."""

    def commands(**code):
        (tmp_path / "bin").mkdir(exist_ok=True)
        for name, line in code.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        return ["sweep", RECIPE, *RATES, "--run-dir", "s", "--slurm", "--slurm-file", "job"]

    Path("job").touch()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return commands


def test_where_slurm_does_not_say_whether_an_array_runs_none_is_submitted_again(slurm, capsys):
    assert main(slurm(sbatch="echo 17", squeue="true")) == 0
    down = slurm(squeue="echo Unable to contact slurm controller >&2; exit 1")
    assert main(down) == 2
    assert "squeue does not say whether array 17 still waits or runs (Unable to contact" in capsys.readouterr().err
    assert main(slurm(squeue="echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", sbatch="echo 18")) == 0
    assert "array 18" in capsys.readouterr().out


@pytest.mark.parametrize("says", ["true", "echo Welcome", "printf '\\377\\n'"])
def test_an_array_without_a_number_is_said(slurm, capsys, says):
    """The same command would submit it once more."""
    assert main(slurm(sbatch=says, squeue="true")) == 2
    assert "where the number of the array belongs: look by squeue" in capsys.readouterr().err


def test_where_slurm_does_not_answer_it_is_said(slurm, monkeypatch, capsys):
    monkeypatch.setattr("hvdtrain.verbs.sweep.slurm._PATIENCE_S", 0.2)
    assert main(slurm(sbatch="sleep 5", squeue="true")) == 2
    assert "Slurm has not answered for 0.2 s" in capsys.readouterr().err
