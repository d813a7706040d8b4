"""The training loop. `loop.fit` decides when, `step.train_step` what; `state` is what is saved and restored."""

from hvdtrain.trainer.evaluation import evaluate
from hvdtrain.trainer.job import Job, settle
from hvdtrain.trainer.loop import fit
from hvdtrain.trainer.step import train_step
from hvdtrain.trainer.task import Evaluation, Recipe, Task

__all__ = ["Evaluation", "Job", "Recipe", "Task", "evaluate", "fit", "settle", "train_step"]
