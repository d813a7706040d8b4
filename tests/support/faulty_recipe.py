"""A small network with dropout that trains until something goes wrong: `FAULT` says what, where and when.

FAULT is JSON: {"kind": ..., "rank": 1, "phase": "data", "step": 5, "until": 5}; `step` counts the steps that
this process has begun, from 1. Phases: build (step 0), data, forward, backward, evaluation, end (after the last step).
`STRUCK` names a file that appears when it happens.
"""

import json
import os
import resource
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from hvdtrain import CheckpointConfig, EvalConfig, LogConfig, OptimConfig, Recipe, Task, TensorSamples, TrainConfig
from hvdtrain.errors import DivergedError, StopRequested
from hvdtrain.process.launch import detect_launch

SIGNALS = {"kill": "SIGKILL", "stop": "SIGSTOP"}
NEVER = {"kind": "none", "rank": -1, "phase": "data", "step": 0}


def spin(plan):
    end = time.thread_time() + plan["seconds"]
    while time.thread_time() < end:
        pass


def fork_and_die(plan):
    child = os.fork()
    if child == 0:
        for stream in (1, 2):  # launchers wait for the end of a rank's output
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        time.sleep(60)
        os._exit(0)
    Path(os.environ["RUN_DIR"], "child").write_text(str(child))
    os.kill(os.getpid(), signal.SIGKILL)


ERRORS = {"raise": ValueError, "StopRequested": StopRequested, "DivergedError": DivergedError}

OF_SAVES = ("full disk", "read-only")


def wait_for_saves():
    """Wait for the thread that writes a checkpoint, if there is one."""
    for thread in threading.enumerate():
        if thread.name == "hvdtrain-save":
            thread.join()


HANGS = {
    "sleep": lambda plan: time.sleep(1000),
    "spin": spin,
    "exit": lambda plan: sys.exit(plan["code"]),
    "fork and die": fork_and_die,
}


def block_checkpoints():
    """Make the checkpoints' place one that nobody can write to, not even root."""
    folder = Path(os.environ["RUN_DIR"]) / "checkpoints"
    if folder.is_dir():
        folder.rename(folder.with_name("away"))
        folder.write_text("in the way")


class Fault:
    """Counts the steps of this process and strikes when its hour has come."""

    def __init__(self):
        plan = {**NEVER, **json.loads(os.environ.get("FAULT", "{}"))}
        self.plan = plan
        self.is_here = plan["rank"] in ("all", detect_launch().rank)
        self.step = 0

    def at(self, phase):
        plan = self.plan
        if not self.is_here or phase != plan["phase"]:
            return False
        if not plan["step"] <= self.step <= plan.get("until", plan["step"]):
            return False
        kind = plan["kind"]
        if "STRUCK" in os.environ:
            Path(os.environ["STRUCK"]).touch()
        if kind in ERRORS:
            raise ERRORS[kind](f"bad luck in {phase}")
        if kind in SIGNALS or kind == "signal":
            os.kill(os.getpid(), getattr(signal, SIGNALS.get(kind) or plan["signal"]))
        if kind in HANGS:
            HANGS[kind](plan)
        if kind in OF_SAVES:
            wait_for_saves()  # one that was begun before is none of it
        if kind == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (plan["bytes"], resource.RLIM_INFINITY))
        if kind == "read-only":
            block_checkpoints()
        return kind == "nan"

    def is_over(self):
        if self.is_here and self.step > self.plan.get("until", self.plan["step"]) > 0:
            if self.plan["kind"] in OF_SAVES:
                wait_for_saves()  # one that was begun meanwhile is to fail
            if self.plan["kind"] == "full disk":
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            away = Path(os.environ.get("RUN_DIR", "")) / "away"
            if self.plan["kind"] == "read-only" and away.exists():
                (away.with_name("checkpoints")).unlink()
                away.rename(away.with_name("checkpoints"))


class Samples(TensorSamples):
    """Data whose reading may fail."""

    def __init__(self, fault, phase, *tensors):
        super().__init__(*tensors)
        self.fault, self.phase = fault, phase

    def batch(self, indices):
        if len(indices) == 1:  # a look at the data when training starts; micro-batches have more samples
            return super().batch(indices)
        if self.phase == "data":
            self.fault.step += 1
            self.fault.is_over()
        self.fault.at(self.phase)
        return super().batch(indices)


class Backward(torch.autograd.Function):
    """Identity, in whose backward pass something may fail."""

    @staticmethod
    def forward(ctx, x, fault):
        ctx.fault = fault
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (float("nan") if ctx.fault.at("backward") else 1.0), None


@dataclass(frozen=True, kw_only=True)
class Faulty(Recipe):
    """A regression with dropout."""

    dropout: float = 0.2
    """Share of the hidden values that is dropped."""
    width: int = 32
    """Hidden values."""
    pause: float = 0.0
    """Seconds that a step takes longer."""

    def build(self, say):
        fault = Fault()
        fault.at("build")
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(200, 8, generator=generator, dtype=torch.float64)
        y = x.sin().sum(1, keepdim=True)
        torch.manual_seed(self.train.seed)
        model = torch.nn.Sequential(
            torch.nn.Linear(8, self.width),
            torch.nn.ReLU(),
            torch.nn.Dropout(self.dropout),
            torch.nn.Linear(self.width, 1),
        )

        def loss(model, batch):
            inputs, targets = batch
            if model.training:
                time.sleep(self.pause)
            is_struck = fault.at("forward") if model.training else False
            output = Backward.apply(model(inputs.to(model[0].weight.dtype)), fault)
            total = (output - targets).square().sum()
            return {"loss": total * float("nan") if is_struck else total}

        return Task(
            model=model,
            train_data=Samples(fault, "data", x[:180], y[:180]),
            val_data=Samples(fault, "evaluation", x[180:], y[180:]),
            loss_sums=loss,
            epilogue=lambda model, metrics: self.say_goodbye(fault),
        )

    def say_goodbye(self, fault):
        fault.step = 0
        fault.at("end")
        return ""


def recipe():
    return Faulty(
        train=TrainConfig(steps=40, global_batch_size=16),
        optim=OptimConfig(peak_lr=0.01, schedule="constant"),
        log=LogConfig(every=2),
        eval=EvalConfig(every=10, batch_size=2),
        checkpoint=CheckpointConfig(every=5, keep_last=None),
    )
