"""The training loop. `loop.fit` decides when, `loop.train_step` what; `state` is what is saved and restored."""

from hvdtrain.trainer.loop import evaluate, fit, train_step
from hvdtrain.trainer.task import Evaluation, Job, Recipe, Task, settle

__all__ = ["Evaluation", "Job", "Recipe", "Task", "evaluate", "fit", "settle", "train_step"]
