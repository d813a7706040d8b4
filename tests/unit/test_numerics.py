"""What is set for the whole process: algorithms that repeat, and how products of fp32 matrices are computed."""

import pytest
import torch

from hvdtrain.errors import ConfigError
from hvdtrain.settings import Config, TrainConfig
from hvdtrain.world import watched
from hvdtrain.world.numerics import REPEATABLE, fp32_products, repeatable

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def settings():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
    )


def test_what_is_asked_holds_within_and_is_put_back():
    before, environ = settings(), {"NCCL_ALGO": "Tree"}
    with repeatable(True, environ):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
    assert environ == {**REPEATABLE, "NCCL_ALGO": "Tree"}  # the user's own stays
    assert settings() == before
    with repeatable(False, environ := {}):
        assert settings() == before
    assert environ == {}


def test_what_has_no_such_algorithm_is_named():
    with repeatable(True, {}), pytest.raises(RuntimeError, match=r"put_.*does not have a deterministic"):
        torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]), accumulate=False)


@pytest.mark.parametrize("is_asked", [False, True])
def test_a_run_is_deterministic_where_that_is_asked(is_asked, monkeypatch):
    for name in (*REPEATABLE, "HOROVOD_FUSION_THRESHOLD"):
        monkeypatch.setenv(name, "as it was")
    config = Config(train=TrainConfig(steps=1, deterministic=is_asked))
    found = watched(config, lambda *_: torch.are_deterministic_algorithms_enabled(), leaves=False)
    assert found == is_asked
    assert not torch.are_deterministic_algorithms_enabled()


def test_fp32_is_fp32_and_tf32_is_asked_for():
    before = settings()
    for precision in ("fp32", "tf32", "bf16"):
        with fp32_products(precision, GPU):
            is_tf32 = precision == "tf32"
            assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (is_tf32, is_tf32)
        assert settings() == before


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this torch has no newer word for it")
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_a_program_may_have_used_torchs_newer_word_for_tf32(precision):
    """Then torch raises where it is asked by the older one."""
    parts = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]
    own = [part.fp32_precision for part in parts]
    old = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        chosen = ["tf32", "ieee", "tf32"]
        for part, value in zip(parts, chosen, strict=True):
            part.fp32_precision = value
        with pytest.raises(RuntimeError, match=r"mix|cuDNN"):
            print(torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
        with fp32_products(precision, GPU):
            expected = "tf32" if precision == "tf32" else "ieee"
            assert [part.fp32_precision for part in parts] == [expected] * 3
        assert [part.fp32_precision for part in parts] == chosen
    finally:
        for part, value in zip(parts, own, strict=True):
            part.fp32_precision = value
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = old


def test_tf32_without_a_gpu_is_refused():
    with pytest.raises(ConfigError, match="tf32 is for NVIDIA GPUs"), fp32_products("tf32", CPU):
        pass
    with fp32_products("fp32", CPU):
        pass
