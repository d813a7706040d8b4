"""`python -m hvdtrain` as a user starts it: trains, says what it does, writes what the contract names, resumes."""

import json
import os
import re
import sys
import textwrap

import pytest
import torch
from conftest import REPOSITORY, processes_naming
from digits import write_digits
from safetensors.torch import load_file

from hvdtrain.recipes import RECIPES


def metrics_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def train_from_start_to_end(hvdtrain, tiny_lm, run_dir, launcher=None, ranks=1):
    """Train 20 steps, check what the contract names, and return the last held-out loss."""
    done = hvdtrain(*tiny_lm, "--train.steps", 20, "--run-dir", run_dir, launcher=launcher, ranks=ranks)
    assert done.code == 0, done.text
    assert "Traceback" not in done.text
    assert "\r" not in done.out
    for words in (
        f"lm on {ranks} rank",
        "= global batch 8",
        "parameters",
        "held-out loss",
        "byte trigrams",
    ):
        assert done.out.count(words) >= 1, f"{words}\n{done.text}"
    assert done.out.count("finished in") == 1  # rank 0 alone talks
    lines = metrics_of(run_dir)
    assert [line["step"] for line in lines] == [5, 10, 10, 15, 20, 20]
    assert lines[0]["train/loss"] > 0
    assert {"val/loss", "val/bits_per_byte"} <= lines[-1].keys()
    assert lines[-1]["event"] == "finished"
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == "step-00000020"
    assert sorted(path.name for path in (run_dir / "logs").iterdir()) == [f"rank-{r:03d}.log" for r in range(ranks)]
    environment = json.loads((run_dir / "environment.json").read_text())
    assert len(environment["ranks"]) == ranks
    assert environment["packages"]["torch"] == torch.__version__
    manifest = json.loads((run_dir / "checkpoints" / "step-00000020" / "manifest.json").read_text())
    assert manifest["world_size"] == ranks
    assert manifest["samples"] == 160
    return lines[-1]["val/loss"]


@pytest.mark.parametrize(("launcher", "ranks"), [("mpirun", 2), ("horovodrun-mpi", 2), ("horovodrun-gloo", 4)])
def test_a_run_from_start_to_end(hvdtrain, tiny_lm, tmp_path, launcher, ranks, loss_alone):
    """Any number of ranks and any launcher learn what one process learns from the same samples."""
    loss = train_from_start_to_end(hvdtrain, tiny_lm, tmp_path / "run", launcher, ranks)
    assert loss == pytest.approx(loss_alone, abs=1e-4)


@pytest.fixture(scope="module")
def run_dir_alone(tmp_path_factory):
    return tmp_path_factory.mktemp("alone") / "run"


@pytest.fixture
def loss_alone(hvdtrain, tiny_lm, run_dir_alone):
    """The last held-out loss of the run in one process, which is trained once."""
    if not run_dir_alone.exists():
        return train_from_start_to_end(hvdtrain, tiny_lm, run_dir_alone)
    return metrics_of(run_dir_alone)[-1]["val/loss"]


def test_mnist_learns_handwritten_digits(hvdtrain, tmp_path):
    """scikit-learn's digits in MNIST's files; accuracy counts every one of the 297 held-out images once."""
    write_digits(tmp_path / "data", num_train=1500, num_test=297)
    arguments = ["--data.root", tmp_path / "data", "--train.epochs", 10, "--optim.peak-lr", 0.1, "--run-dir", "run"]
    done = hvdtrain("train", "mnist", *arguments, launcher="horovodrun-mpi", ranks=2)
    assert done.code == 0, done.text
    last = metrics_of(tmp_path / "run")[-1]
    assert last["val/accuracy"] > 0.85
    assert last["val/accuracy"] * 297 == pytest.approx(round(last["val/accuracy"] * 297))


def test_the_same_command_goes_on_bitwise(hvdtrain, tiny_lm, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    constant = ["--optim.schedule", "constant", "--health.noise-scale"]  # more steps must not change the schedule
    for run_dir, steps in ((whole, 20), (parts, 10), (parts, 20), (parts, 20)):
        arguments = [*tiny_lm, *constant, "--train.steps", steps, "--run-dir", run_dir]
        done = hvdtrain(*arguments, launcher="horovodrun-mpi", ranks=2)
        assert done.code == 0, done.text
    assert "has finished before, at step 20" in done.out
    a, b = (load_file(path / "checkpoints" / "step-00000020" / "model.safetensors") for path in (whole, parts))
    torch.testing.assert_close(a, b, rtol=0, atol=0)

    def steps(run_dir):
        names = ("step", "train/loss", "val/loss", "train/noise_scale", "train/gradient_agreement")
        return [tuple(line.get(name) for name in names) for line in metrics_of(run_dir)]

    assert steps(parts) == steps(whole)
    assert all(-1 <= agreement <= 1 for *_, agreement in steps(whole) if agreement is not None)
    assert sum(noise is not None for *_, noise, _ in steps(whole)) == 4
    assert [line.get("event") for line in metrics_of(parts)].count("finished") == 1


def test_other_settings_are_refused_and_nothing_is_lost(hvdtrain, tiny_lm, tmp_path):
    run_dir = tmp_path / "run"
    assert hvdtrain(*tiny_lm, "--train.steps", 5, "--run-dir", run_dir).code == 0
    kept = [path for path in run_dir.rglob("*") if path.is_file() and path.name != "lock" and path.suffix != ".log"]
    before = {path: path.read_bytes() for path in kept}
    done = hvdtrain(*tiny_lm, "--train.steps", 9, "--optim.peak-lr", 0.5, "--train.seed", 1, "--run-dir", run_dir)
    assert done.code == 2
    assert "optim.peak_lr was 0.005 and is 0.5 now; train.seed was 0 and is 1 now" in done.err
    assert {path: path.read_bytes() for path in before} == before


FLAG = ["train", "lm", "--train.step", 5], r"there is no flag '--train.step'; did you mean '--train.steps'\?"
DATA = ["train", "lm", "--data.path", "nowhere.txt"], "nowhere.txt"
BATCH = ["train", "lm", "--train.global-batch-size", 7], "does not divide among 2 ranks.*6 or 8"


@pytest.mark.parametrize(
    ("launcher", "arguments", "says"),
    [
        ("mpirun", *DATA),
        ("mpirun", *BATCH),
        ("horovodrun-mpi", *FLAG),
        ("horovodrun-gloo", *FLAG),
        ("horovodrun-gloo", *DATA),
    ],
    ids=["mpirun-data", "mpirun-batch", "horovodrun-mpi-flag", "horovodrun-gloo-flag", "horovodrun-gloo-data"],
)
def test_a_mistake_is_one_message_on_all_launchers(hvdtrain, tmp_path, launcher, arguments, says):
    """The flag is found before Horovod starts, the data while it runs, the batch when the ranks are known."""
    done = hvdtrain(*arguments, "--data.cache-dir", tmp_path / "cache", launcher=launcher, ranks=2, timeout=180)
    assert done.code == 2, done.text
    assert len(re.findall(f"hvdtrain: .*{says}", done.text)) == 1, done.text
    assert "Traceback" not in done.text
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "there is no verb 'trian'; did you mean 'train'"),
        (["train", "ml"], "there is no recipe 'ml'; did you mean 'lm'"),
        (["train", "missing.py"], "the recipe file missing.py cannot be read"),
        (["train", "lm", "extra"], "'extra' is one word too many"),
        (["train", "lm", "--config", "missing.toml"], "missing.toml cannot be read"),
        (["train", "lm", "--config", "broken.toml"], "broken.toml is not TOML"),
        (
            ["train", "lm", "--config", "typo.toml"],
            "typo.toml: there is no setting 'train.step'; did you mean 'train.steps'",
        ),
        (["train", "lm", "--data.path", "empty"], "empty"),
        (["train", "lm", "--train.steps", "-3"], "steps = -3 must be greater than 0"),
        (["train", "lm", "--train.steps", "5", "--train.epochs", "1"], "not both"),
        (["train", "lm", "--optim.warmup-steps", "1000"], "use fewer than 1000"),
        (["train", "lm", "--model.num-heads", "7"], "multiple of 14"),
        (["train", "mnist", "--data.root", "empty"], "--data.download"),
        (["train", "lm", "--run-dir", "file/run"], "--run-dir"),
        (["train", "lm", "--train.global-batch-size", "1000000"], "at least as many"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_mistakes_alone(hvdtrain, tmp_path, arguments, says):
    (tmp_path / "broken.toml").write_text("a = = b")
    (tmp_path / "typo.toml").write_text("[train]\nstep = 5\n")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    done = hvdtrain(*arguments)
    assert done.code == 2, done.text
    assert says in done.err
    assert "Traceback" not in done.text
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_printed_settings_load_back(hvdtrain, tmp_path):
    arguments = ["--train.steps", 7, "--optim.peak-lr", "0.02", "--model.num-layers", 3]
    printed = hvdtrain("train", "lm", *arguments, "--print-config")
    assert printed.code == 0
    assert "peak_lr = 0.02" in printed.out
    (tmp_path / "saved.toml").write_text(printed.out)
    again = hvdtrain("train", "lm", "--config", "saved.toml", "--print-config")
    assert again.out == printed.out
    flag_wins = hvdtrain("--config", "saved.toml", "--train.steps", 8, "--print-config")
    assert flag_wins.out == printed.out.replace("steps = 7", "steps = 8", 1)


def test_help(hvdtrain):
    overview = hvdtrain("--help")
    assert overview.code == 0
    assert f"recipes: {', '.join(RECIPES)}" in overview.out
    details = hvdtrain("train", "lm", "--help-all", COLUMNS="200")
    assert details.code == 0
    for words in ("--train.global-batch-size", "Optimizer steps of the whole run", "--data.path", "--model.num-layers"):
        assert words in details.out


def test_dry_run_writes_nothing(hvdtrain, tiny_lm, tmp_path):
    done = hvdtrain(*tiny_lm, "--dry-run", "--run-dir", tmp_path / "run")
    assert done.code == 0, done.text
    assert "global batch 8" in done.out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_how_ranks_average_as_the_run_does(hvdtrain, tiny_lm, tmp_path):
    apart = ["--comm.sync", "local", "--comm.period", 4, "--comm.compression", "int8"]
    said = []
    for more in (["--dry-run"], ["--run-dir", tmp_path / "run"]):
        done = hvdtrain(*tiny_lm, *apart, "--train.steps", 4, *more, launcher="mpirun", ranks=2)
        assert done.code == 0, done.text
        said.append([line for line in done.out.splitlines() if line.startswith(("updates:", "wire:"))])
    assert said[0] == said[1]
    assert len(said[0]) == 2


def test_batch_settings_of_the_user_fix_the_third(hvdtrain, tiny_lm):
    tiny = [word for word in tiny_lm if word not in ("--train.global-batch-size", "8")]
    done = hvdtrain(*tiny, "--train.micro-batch-size", 3, "--train.accum-steps", 2, "--dry-run")
    assert "3 samples x 2 accumulation x 1 rank = global batch 6" in done.out, done.text


def test_without_horovod_one_process_trains(hvdtrain, tiny_lm, tmp_path):
    """`pip install .` alone must do: an import of horovod or mpi4py fails here."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['horovod'] = sys.modules['mpi4py'] = None\n")
    path = f"{tmp_path}{os.pathsep}{REPOSITORY}"
    done = hvdtrain(*tiny_lm, "--train.steps", 3, "--run-dir", tmp_path / "run", PYTHONPATH=path)
    assert done.code == 0, done.text


def test_a_users_own_recipe(hvdtrain, tmp_path):
    (tmp_path / "line.py").write_text(
        textwrap.dedent('''
        """A line through points."""
        from dataclasses import dataclass
        import torch
        from hvdtrain import OptimConfig, Recipe, Task, TensorSamples, TrainConfig

        @dataclass(frozen=True, kw_only=True)
        class Line(Recipe):
            """Slope and intercept."""
            slope: float = 2.0
            """What is to be found."""

            def build(self, say):
                x = torch.linspace(-1, 1, 101)[:, None]
                samples = TensorSamples(x, self.slope * x + 1)
                torch.manual_seed(self.train.seed)
                return Task(model=torch.nn.Linear(1, 1), train_data=samples, val_data=samples, loss_sums=squares)

        def squares(model, batch):
            x, y = batch
            return {"loss": ((model(x) - y) ** 2).sum()}

        def recipe():
            return Line(train=TrainConfig(epochs=40, global_batch_size=10),
                        optim=OptimConfig(name="sgd", peak_lr=0.3, weight_decay=0.0))
        ''')
    )
    done = hvdtrain(
        "train",
        "line.py",
        "--slope",
        3,
        "--run-dir",
        "run",
        "--train.max-grad-norm",
        "None",
        launcher="mpirun",
        ranks=2,
    )
    assert done.code == 0, done.text
    weights = load_file(tmp_path / "run" / "checkpoints" / "step-00000440" / "model.safetensors")
    assert weights["weight"].item() == pytest.approx(3.0, abs=0.02)
    assert weights["bias"].item() == pytest.approx(1.0, abs=0.02)
    assert "hvdtrain_recipe" not in done.text


@pytest.mark.parametrize("variable", ["HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS"])
def test_gloo_under_mpirun_is_refused(hvdtrain, tiny_lm, variable):
    """Each process would train alone, in silence, or crash."""
    done = hvdtrain(*tiny_lm, launcher="mpirun", ranks=2, **{variable: "gloo"})
    assert done.code == 2, done.text
    assert f"Unset {variable}" in done.text


def test_ranks_that_horovod_does_not_see_are_an_error(hvdtrain, tiny_lm):
    """As with a Horovod built for another MPI: the launcher says two ranks, Horovod one."""
    claimed = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
    done = hvdtrain(*tiny_lm, **claimed, HOROVOD_CONTROLLER="gloo", HOROVOD_CPU_OPERATIONS="gloo")
    assert done.code == 2, done.text
    assert "srun started 2 ranks, but Horovod sees 1" in done.text


def test_the_readmes_own_loop(run, tmp_path):
    """The loop that the README shows runs as it stands, on two ranks."""
    readme = (REPOSITORY / "README.md").read_text()
    loop = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "hvdtrain.init()" in block)
    (tmp_path / "loop.py").write_text(loop)
    done = run("horovodrun", "-np", 2, sys.executable, "loop.py")
    assert done.code == 0, done.text
    assert len(loop.strip().splitlines()) <= 20


def test_no_process_is_left(hvdtrain, tiny_lm, tmp_path):
    done = hvdtrain(*tiny_lm, "--train.steps", 3, "--run-dir", tmp_path / "run", launcher="horovodrun-gloo", ranks=2)
    assert done.code == 0, done.text
    assert not processes_naming(tmp_path)
