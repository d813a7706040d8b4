"""Recipe files with one bug each, started one after another by forks of this process, which has imported once.

`python broken_recipes.py FOLDER` writes for each kind what `train` said, as JSON: exit code, output, error output.
"""

import importlib
import json
import os
import signal
import sys
from pathlib import Path

SOUND = """\
import dataclasses
import os

import torch
import hvdtrain
from hvdtrain.trainer.component import Component
# import


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        # data
        return torch.full((3,), float(index)), torch.zeros(1)


class Watcher(Component):
    name = "watcher"

    def __init__(self, job):
        pass

    def after_update(self, training, step):
        pass  # component


class Sink:
    def begin(self, step, num_steps):
        pass

    def write(self, step, metrics, event):
        pass

    def close(self):
        pass


def loss(model, batch):
    x, y = batch
    # loss
    if not model.training:
        pass  # evaluation
    return {"loss": (model(x) - y).square().sum()}


def finish(model, metrics):
    return ""  # epilogue


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(hvdtrain.Recipe):
    def build(self, say):
        # build
        data = Samples()
        return hvdtrain.Task(
            model=torch.nn.Linear(3, 1),
            train_data=data,
            val_data=data,
            loss_sums=loss,
            components=(Watcher,),
            sinks=(Sink(),),
            epilogue=finish,
        )


def recipe():
    # recipe
    return Mine(train=hvdtrain.TrainConfig(steps=4, global_batch_size=8), log=hvdtrain.LogConfig(every=1))
"""
BUG = 'raise KeyError("colour")'
# Kind: what stands in the place of a mark, and the function that the message must name.
PLACES = {
    "import": ("# import", "import no_such_library", ""),
    "syntax": ("# import", "def broken(:", ""),
    "top": ("# import", BUG, ""),
    "exit": ("# import", "raise SystemExit(3)", ""),
    "recipe": ("# recipe", BUG, "recipe"),
    "build": ("# build", BUG, "build"),
    "data": ("# data", BUG, "__getitem__"),
    "worker": ("# data", f"if 'HVDTRAIN_DATA_WORKER' in os.environ: {BUG}", "__getitem__"),
    "loss": ("# loss", BUG, "loss"),
    "library": ("# loss", "torch.zeros(2) + torch.zeros(3)", "loss"),
    "evaluation": ("pass  # evaluation", BUG, "loss"),
    "component": ("pass  # component", BUG, "after_update"),
    "epilogue": ('return ""  # epilogue', BUG, "finish"),
    "exit in loss": ("# loss", "raise SystemExit(0)", "loss"),
}


def line_of(kind):
    """Return the number of the line with the bug."""
    return SOUND[: SOUND.index(PLACES[kind][0])].count("\n") + 1


def start(kind, folder):
    """Run `train` on a file with a bug in a child process; returns how it ended."""
    mark, bug, _ = PLACES[kind]
    (folder / "mine.py").write_text(SOUND.replace(mark, bug))
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os.chdir(folder)
        for name, descriptor in (("out", 1), ("err", 2)):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), descriptor)
        sys.argv = ["hvdtrain", "train", "mine.py", "--run-dir", "run"]
        sys.argv += ["--data.workers", "1"] if kind == "worker" else []
        try:
            code = main()
        except SystemExit as error:
            code = error.code
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # an interpreter's own end takes longer than all the rest
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), *((folder / name).read_text() for name in ("out", "err"))


if __name__ == "__main__":
    for module in ("hvdtrain.verbs.train", "hvdtrain.trainer", "torch._dynamo"):  # once for all forks
        importlib.import_module(module)
    from hvdtrain.cli import main

    ends = {}
    for kind in PLACES:
        folder = Path(sys.argv[1]) / kind.replace(" ", "_")
        folder.mkdir()
        ends[kind] = start(kind, folder)
    print(json.dumps(ends))
