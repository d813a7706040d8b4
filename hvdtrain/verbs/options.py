"""What each verb is asked besides the settings of a recipe. Standard library only; docstrings become `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hvdtrain.errors import ConfigError
from hvdtrain.settings import Section, setting

MOST = 10**9
"""The largest count of anything that is measured or predicted."""
_DIGITS = 19


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(Section):
    """What every verb that takes a recipe is asked."""

    config: Path | None = setting(None, path="file")
    """TOML file of settings; flags win over it."""
    print_config: bool = False
    """Print the resolved settings as TOML, and stop."""

    @property
    def instead_of_recipe(self) -> str:
        """Return the flag beside which settings of a recipe have no effect; empty: they have one."""
        return ""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RecipeOptions):
    """`train RECIPE`."""

    run_dir: Path | None = setting(None, path="new directory")
    """Directory of this run; goes on from its newest checkpoint. Default: a new one under runs/."""
    dry_run: bool = False
    """Print what would be trained, and stop."""
    allow_config_change: tuple[str, ...] = ()
    """Settings, such as optim.peak-lr, that may differ from those that the run in --run-dir was begun with."""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(RecipeOptions):
    """`verify RECIPE`."""

    steps: int = setting(3, minimum=2, maximum=MOST)
    """Optimizer steps of each comparison."""
    json: Path | None = setting(None, path="new file")
    """Also write the table to this file."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions(RecipeOptions):
    """`bench RECIPE`."""

    steps: int = setting(5, minimum=1, maximum=MOST)
    """Optimizer steps of a measurement."""
    rounds: int = setting(5, minimum=1, maximum=MOST)
    """Measurements of each variant; they take turns."""
    warmup: int = setting(3, minimum=1, maximum=MOST)
    """Steps of each variant before the first measurement."""
    knobs: bool = True
    """Also measure with one setting changed each: compile, precision, buckets, wire format and others."""
    json: Path | None = setting(None, path="new file")
    """Also write what was measured to this file."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions(RecipeOptions):
    """`plan RECIPE`."""

    to: int | None = setting(None, above=0, maximum=MOST)
    """The most workers to predict. None: four times those at hand, at least 8."""
    link: str | None = None
    """Another network between hosts than the one at hand: rate and one-way latency, such as 25gbit,5us."""
    ranks_per_host: int | None = setting(None, above=0, maximum=MOST)
    """Ranks of a host, for --link. None: as measured."""
    price: float | None = setting(None, minimum=0, maximum=10**9)
    """Of a worker and hour, in any currency."""
    output: Path | None = setting(None, path="new directory")
    """Also write plan.json and plan.html to this directory."""
    noise_steps: int = setting(100, minimum=0, maximum=MOST)
    """Steps that are trained to measure the gradient noise scale in the second half of them; 0: it is not measured."""
    noise_from: Path | None = setting(None, path="directory")
    """Directory of a training run with --health.noise-scale: its noise scale, over all of it, is used."""
    from_: Path | None = setting(None, path="file or directory")
    """Answer from a plan.json, or a directory with one, instead of measuring; if the directory is that of a run with
    --health.noise-scale, with what it has logged."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks_per_host is not None and self.link is None:
            raise ConfigError("--ranks-per-host has no effect without --link: hosts are as they were measured then")
        for flag, value in (("--from", self.from_), ("--noise-from", self.noise_from)):
            if value is not None and self.noise_steps != PlanOptions.noise_steps:
                raise ConfigError(f"--noise-steps has no effect beside {flag}: no step is trained for the noise scale")

    @property
    def instead_of_recipe(self) -> str:
        """Return the flag beside which settings of a recipe have no effect; empty: they have one."""
        return "" if self.from_ is None else "--from"


@dataclass(frozen=True, kw_only=True)
class SweepOptions(RecipeOptions):
    """Train a recipe with every combination of values, a,b,c for each setting, or with some that are drawn."""

    run_dir: Path | None = setting(None, path="new directory")
    """Directory of the sweep, with a run for each trial; the same command goes on there. Default: one under runs/ that
    the same command finds again."""
    np: int = setting(1, above=0, maximum=4096)
    """Ranks of each trial, on this machine."""
    launcher: str | None = None
    """Another command that starts the ranks of a trial, such as "mpirun -np 8 -H a:4,b:4"."""
    sweep__random: int | None = setting(None, above=0, maximum=10**4)
    """Draw so many combinations instead of training all. Then LOW..HIGH is a range too, evenly on a logarithmic scale;
    LOW..HIGH:linear evenly on a plain one. Each is trained with all of --train.seed."""
    sweep__optuna: int | None = setting(None, above=0, maximum=10**4)
    """Let Optuna's TPE sampler propose so many, one after the other, each from the results of those before it."""
    sweep__seed: int = setting(0, minimum=0)
    """Of what is drawn or proposed."""
    sweep__metric: str = "val/loss"
    """What trials are compared by: a metric of evaluations, at the end of each run."""
    sweep__goal: Literal["min", "max"] = "min"
    """Whether a small or a large one is good."""
    slurm: bool = False
    """Submit the trials as an array of Slurm jobs instead of training here; the same command shows how they go."""
    slurm_file: Path = Path("launch/slurm.sbatch")
    """Job file of an array, as launch/slurm.sbatch is one: edited for your cluster."""
    sbatch: str = ""
    """More options of sbatch, written --sbatch="--time=60 --partition=gpu"."""
    dry_run: bool = False
    """Print the trials, and stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "/" not in self.sweep__metric:  # beside them the table has columns such as "state" and "step"
            raise ConfigError(f"--sweep.metric {self.sweep__metric[:80]!r} is none: give an evaluation's, as val/loss")
        if self.sweep__random and self.sweep__optuna:
            raise ConfigError("give --sweep.random or --sweep.optuna, not both")
        if self.np > 1 and self.launcher:
            raise ConfigError("give -np, or a --launcher, which says itself how many ranks there are")
        if self.slurm and (self.np > 1 or self.launcher):
            raise ConfigError("with --slurm the job file says how many ranks a trial has: leave -np and --launcher out")
        if self.slurm and self.sweep__optuna:
            raise ConfigError("--sweep.optuna learns from one trial after the other: an array of --slurm runs at once")


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(Section):
    """Look at the machine, the ranks and the network, and say what to mend. Exit code 1 where something is wrong."""

    json: Path | None = setting(None, path="new file")
    """Also write the findings, and the facts of every rank, to this file."""
    run_dir: Path = setting(Path("runs"), path="new directory")
    """Directory of a run, or where runs go: its disk is looked at."""
    timeout: float = setting(60.0, above=0, maximum=86400)
    """Seconds to wait for the other ranks before they are given up."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Section):
    """Write a run's model as a directory that transformers, or torch alone, can load: README.md there says how."""

    run_dir: Path = setting(path="directory")
    """Directory of a run."""
    checkpoint: str = "latest"
    """latest, best (by held-out loss), or a step."""
    output: Path | None = setting(None, path="new directory")
    """Directory to write; None: RUN_DIR/export."""
    dtype: Literal["as-trained", "float32", "bfloat16", "float16"] = "as-trained"
    """Type of the weights."""
    overwrite: bool = False
    """Replace an earlier export in --output."""
    merged: bool = False
    """Of a run with adapters (--model.lora-rank): write the whole model, the adapters added to its weights. Otherwise
    the adapters alone are written, as peft loads them."""
    program: bool = False
    """Also write model.pt2, the program as torch.export makes it, which needs torch alone: logits of images, of tokens
    or of waves. Not of encoder-decoders and models of one's own."""
    format: Literal["safetensors", "onnx"] = "safetensors"
    """onnx: also write model.onnx, the same for onnxruntime and others, without torch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_checkpoint(self.checkpoint)


@dataclass(frozen=True, kw_only=True)
class PredictOptions(Section):
    """Say what images show, by a run of resnet or mnist; or what is said in clips of speech, by a run of ctc."""

    run_dir: Path = setting(path="directory")
    """Directory of a run, or one that was exported."""
    files: tuple[Path, ...] = setting((), path="file")
    """Images, of any size and format that Pillow reads; or clips, of any rate and format that soundfile reads."""
    checkpoint: str = "latest"
    """latest, best (by held-out loss), or a step; for a run."""
    top: int = setting(3, above=0, maximum=MOST)
    """How many of the likeliest classes are named; of images."""
    json: Path | None = setting(None, path="new file")
    """Also write the answer to this file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_checkpoint(self.checkpoint)


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Section):
    """Write a page of HTML with the curves, settings and machines of one run, or of several side by side."""

    run_dirs: tuple[Path, ...] = setting((), path="directory")
    """Directories of runs, and of sweeps, whose trials are shown."""
    output: Path | None = setting(None, path="new file")
    """File to write; None: report.html in the first directory."""
    serve: int | bool = setting(False, minimum=0, maximum=65535)
    """Write nothing, but serve a page that follows the runs, to this machine alone, until Ctrl-C: at this port, or
    without a number at one that is free."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.serve is not False and self.output is not None:
            raise ConfigError("give --output FILE, a page to be written, or --serve, one that follows the runs")
        if not self.run_dirs:
            raise ConfigError("report is given directories of runs: python -m hvdtrain report RUN_DIR [RUN_DIR ...]")


@dataclass(frozen=True, kw_only=True)
class WatchOptions(Section):
    """Follow a run in the terminal, by its files alone: it may train on another machine. Ends with it, or at Ctrl-C."""

    run_dir: Path = setting(path="directory")
    """Directory of a run."""
    every: float = setting(2.0, minimum=0.1, maximum=86400)
    """Seconds between two looks at its files."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions(Section):
    """Say what differs between two runs: settings, data, versions, and from which step on their results."""

    run_dirs: tuple[Path, ...] = setting((), path="directory")
    """Directories of two runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.run_dirs) != 2:
            raise ConfigError(
                f"compare is given two runs, not {len(self.run_dirs)}: python -m hvdtrain compare RUN_A RUN_B"
            )


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(Section):
    """Continue prompts, translate, or write a clip of speech down: by runs of lm, hf, dpo, seq2seq and ctc."""

    run_dir: Path = setting(path="directory")
    """Directory of a run, or one that was exported."""
    checkpoint: str = "latest"
    """latest, best (by held-out loss), or a step; for a run."""
    prompt: tuple[str, ...] = ()
    """Text to continue, or to translate; several are continued together. None: standard input, or the beginning of a
    document."""
    file: Path | None = setting(None, path="file")
    """File whose lines are translated, each on a line of standard output, by an encoder-decoder; or a clip of speech,
    for a run of ctc."""
    beams: int | None = setting(None, above=0, maximum=1024)
    """Of the search for a translation. None: 4; 1 takes the likeliest token each time."""
    chat: bool = False
    """Each prompt is a user's message: write the answer, by the chat template of the model's tokenizer."""
    max_tokens: int = setting(200, above=0, maximum=10**9)
    """The most tokens to add to each prompt."""
    temperature: float | None = setting(None, minimum=0)
    """Divides the logits; 0 always takes the likeliest token. None: 0.8. Translations are searched for, not drawn."""
    top_k: int | None = setting(None, above=0)
    """Draw among the k likeliest tokens only."""
    top_p: float | None = setting(None, above=0, maximum=1)
    """Draw among the likeliest tokens that together have at least this probability."""
    seed: int = setting(0, minimum=0)
    """Of the random draws."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation; they are not printed."""
    cache: bool = True
    """Keep the keys and values of tokens that were read; without, it takes longer and says the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("top_k", "top_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag} has no effect: --temperature 0 takes the likeliest token, and draws none")
        _check_checkpoint(self.checkpoint)


def _check_checkpoint(which: str) -> None:
    if which not in ("latest", "best") and not (which.isascii() and which.isdecimal() and len(which) < _DIGITS):
        raise ConfigError(f"--checkpoint {which[:40]!r} must be latest, best, or a step such as 200")
