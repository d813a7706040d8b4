"""The table of verbs: what each is asked, who answers it, and what people call it. Reading it imports none of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from hvdtrain.verbs.options import (
    BenchOptions,
    CompareOptions,
    DoctorOptions,
    ExportOptions,
    GenerateOptions,
    PlanOptions,
    PredictOptions,
    ReportOptions,
    SweepOptions,
    TrainOptions,
    VerifyOptions,
    WatchOptions,
)


@dataclasses.dataclass(frozen=True)
class Verb:
    """A verb of the command line."""

    answer: str
    """Module and function that answers it."""
    options: type[Any]
    """What it is asked, besides the settings of a recipe."""
    takes: str
    """The word after it: "RECIPE", the flag whose value it is, such as "run-dir", or nothing."""
    about: str
    """What it does, for the overview."""
    more: str = ""
    """The option that all words after that one are values of."""
    has_grid: bool = False
    """Whether each setting of the recipe may have several values, `a,b`; it is then answered with a `Grid`."""

    @property
    def is_for_one(self) -> bool:
        """Return whether one process answers, however many were started: it only reads what was trained."""
        return bool(self.takes) and not self.has_recipe

    @property
    def has_recipe(self) -> bool:
        """Return whether the word after it is a recipe."""
        return self.takes == "RECIPE"


VERBS = {
    "train": Verb(
        "hvdtrain.verbs.train:answer",
        TrainOptions,
        "RECIPE",
        "train, or go on with the run in --run-dir; without a verb and a recipe: train lm",
    ),
    "verify": Verb(
        "hvdtrain.verbs.verify:verify",
        VerifyOptions,
        "RECIPE",
        "prove that training it on these ranks is the same as on one",
    ),
    "bench": Verb(
        "hvdtrain.verbs.bench:bench",
        BenchOptions,
        "RECIPE",
        "measure where a step's time goes, and what would make it shorter",
    ),
    "plan": Verb("hvdtrain.verbs.plan:plan", PlanOptions, "RECIPE", "measure, and say how many workers to use"),
    "sweep": Verb(
        "hvdtrain.verbs.sweep:sweep",
        SweepOptions,
        "RECIPE",
        "train it with several values of settings, a,b,c each, and say which are best",
        has_grid=True,
    ),
    "doctor": Verb(
        "hvdtrain.verbs.doctor:doctor",
        DoctorOptions,
        "",
        "look at the machine, the ranks and the network, and say what to mend",
    ),
    "generate": Verb(
        "hvdtrain.verbs.generate:generate",
        GenerateOptions,
        "run-dir",
        "continue prompts, translate or transcribe with a trained model, of a run or exported",
    ),
    "export": Verb(
        "hvdtrain.verbs.export:export",
        ExportOptions,
        "run-dir",
        "write a run's model as transformers, or torch, reads it",
    ),
    "predict": Verb(
        "hvdtrain.verbs.predict:predict",
        PredictOptions,
        "run-dir",
        "say what images show, by a trained classifier",
        more="files",
    ),
    "report": Verb(
        "hvdtrain.verbs.report.command:report",
        ReportOptions,
        "run-dirs",
        "write a page with the curves of runs, that holds everything it shows",
        more="run_dirs",
    ),
    "watch": Verb(
        "hvdtrain.verbs.watch.command:watch",
        WatchOptions,
        "run-dir",
        "follow a run in the terminal while it trains, wherever that is",
    ),
    "compare": Verb(
        "hvdtrain.verbs.report.command:compare",
        CompareOptions,
        "run-dirs",
        "say what differs between two runs, and from which step on",
        more="run_dirs",
    ),
}

VERB_SYNONYMS = {
    "train": "run fit start resume restore continue finetune fine-tune pretrain learn go",
    "verify": "test prove validate",
    "bench": "benchmark profile time measure speed",
    "plan": "scale predict-scaling estimate advise how-many",
    "sweep": "grid search tune hyperparameters hpo optuna random-search grid-search",
    "doctor": "diagnose check info env status health debug",
    "generate": "sample complete chat prompt write translate summarize summarise",
    "export": "convert save to-hf upload",
    "report": "plot chart curves show html page visualize visualise graph serve tensorboard metrics eval evaluate",
    "watch": "monitor follow tail top dashboard progress live",
    "compare": "diff difference versus vs",
    "predict": "classify infer inference label recognise recognize transcribe asr",
    "setup": "install build init bootstrap compile",
    "supervise": "restart watchdog elastic keep-alive keepalive babysit auto-resume",
}
"""What people call a verb that has another name here."""
