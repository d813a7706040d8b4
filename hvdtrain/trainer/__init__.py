"""The training loop. `loop.fit` decides when, `loop.train_step` what; `state` is what is saved and restored."""

from hvdtrain.trainer.job import Job, settle
from hvdtrain.trainer.loop import evaluate, fit, train_step
from hvdtrain.trainer.task import Evaluation, Recipe, Task

__all__ = ["Evaluation", "Job", "Recipe", "Task", "evaluate", "fit", "settle", "train_step"]
