"""GPUs that nobody trains on are spoken of, with the reason, unless they were hidden on purpose."""

from pathlib import Path

import pytest
import torch
from test_components import job_of

from hvdtrain.rundir.environment import describe_rank
from hvdtrain.verbs import greeting
from hvdtrain.world.unused_gpus import unused_gpus

NOTHING = Path("/nothing/is/here")
VERSION = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27 21:21:55 UTC 2021\nGCC version: 9.3.0\n"
)


@pytest.fixture
def driver(tmp_path):
    """The files of NVIDIA's driver on a host with two cards."""
    for card in ("0000:07:00.0", "0000:0f:00.0"):
        (tmp_path / "gpus" / card).mkdir(parents=True)
    (tmp_path / "version").write_text(VERSION)
    return tmp_path


def test_nothing_is_said_where_there_are_none():
    assert unused_gpus({}, NOTHING, NOTHING) == ""


@pytest.mark.parametrize("value", ["", "-1", "none", "NoDevFiles"])
def test_nothing_is_said_where_they_are_hidden_on_purpose(driver, value):
    assert unused_gpus({"CUDA_VISIBLE_DEVICES": value}, driver, NOTHING) == ""


def test_nothing_is_said_where_torch_uses_them(driver, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert unused_gpus({}, driver, NOTHING) == ""


def test_a_torch_for_cpus(driver, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    said = unused_gpus({}, driver, NOTHING)
    assert said.startswith(f"2 of NVIDIA here: torch {torch.__version__} is built for CPUs")


def test_a_driver_that_is_too_old(driver, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    said = unused_gpus({}, driver, NOTHING)
    assert "CUDA 13.0, for which torch is built, does not start on the driver 470.82.01" in said
    (driver / "version").write_text("")
    assert "does not start on the driver here" in unused_gpus({}, driver, NOTHING)


def test_a_number_that_no_card_has(driver, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "CUDA_VISIBLE_DEVICES=7 names none of them" in unused_gpus({"CUDA_VISIBLE_DEVICES": "7"}, driver, NOTHING)


def test_cards_of_other_makers(tmp_path, monkeypatch):
    assert unused_gpus({}, NOTHING, tmp_path).startswith("of AMD: hvdtrain trains on NVIDIA's GPUs")
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    assert unused_gpus({}, NOTHING, NOTHING).startswith("of Intel")
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert unused_gpus({}, NOTHING, NOTHING).startswith("of Apple")


def test_the_greeting_warns(tmp_path, monkeypatch):
    job, ranks = job_of(tmp_path), [describe_rank(torch.device("cpu"))]
    assert "GPUs" not in greeting.greeting("own", job, ranks)
    monkeypatch.setattr(greeting, "unused_gpus", lambda: "of Intel: hvdtrain trains on others")
    (line,) = [line for line in greeting.greeting("own", job, ranks).splitlines() if "GPUs" in line]
    assert line.startswith("warning:    trains on the CPU, with GPUs of Intel")
