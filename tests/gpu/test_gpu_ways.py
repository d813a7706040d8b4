"""What GPUs compute in a way of their own, against what CPUs do; skipped elsewhere."""

import copy
import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
GPU = torch.device("cuda", 0)


def test_the_fused_loss_is_the_plain_one():
    from hvdtrain.models import loss

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 100, 64, generator=generator).to(GPU).requires_grad_()
    weight = torch.randn(3000, 64, generator=generator).to(GPU).requires_grad_()
    targets = torch.randint(3000, (4, 100), generator=generator).to(GPU)
    targets[0, :7] = loss.IGNORE_INDEX
    with torch.autocast("cuda", torch.bfloat16):
        ours = loss.chunked_loss(hidden, weight, targets, 100)
    logits = (hidden @ weight.T).flatten(0, 1)
    plain = nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=loss.IGNORE_INDEX, reduction="sum")
    assert not loss._Fused.has_failed
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=0)
    for one, other in zip(*(torch.autograd.grad(value, (hidden, weight)) for value in (ours, plain)), strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


def test_the_loss_is_one_kernel_that_goes_over_the_logits_twice():
    from torch._inductor.utils import run_and_get_code

    from hvdtrain.models.loss import fusable_terms

    logits, wanted = torch.randn(512, 50_304, device=GPU, dtype=torch.bfloat16), torch.arange(512, device=GPU)
    kernel = torch.compile(fusable_terms, fullgraph=True)
    _, (code, *_) = run_and_get_code(kernel, logits, wanted, torch.float32, 1.0)
    assert "online_softmax" in code
    assert code.count(".run(") <= 3  # the gradient and each row's loss; their sum


def test_many_logits_that_fit_are_not_gone_over_in_fp32():
    """A large card holds all of them at once; torch's own loss would make fp32 of them first."""
    from hvdtrain.models.config import DecoderConfig
    from hvdtrain.models.decoder import Decoder

    model = Decoder(DecoderConfig(num_layers=1, hidden_size=64, num_heads=2, loss_chunk=4096), 50_304).to(GPU)
    tokens, peaks = torch.randint(50_304, (4, 1024), device=GPU), []
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            model(tokens, tokens)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.6 * 2 * tokens.numel() * 50_304, peaks  # logits and their gradient, two bytes each


def test_products_of_a_block_are_joined_compiled_or_not():
    """Four products forward and eight backward, and the gradients of products that are not."""
    from torch.profiler import ProfilerActivity, profile

    from hvdtrain.models import linear
    from hvdtrain.models.config import DecoderConfig
    from hvdtrain.models.decoder import Decoder

    config = DecoderConfig(num_layers=1, hidden_size=512, num_heads=8, num_kv_heads=2)
    tokens, found, products = torch.randint(100, (4, 256), device=GPU), [], []
    joins = linear._gains_by_one
    for way in ("apart", "joined", "compiled"):
        model = Decoder(config, 100, seed=0).to(GPU)
        if way == "compiled":
            model.model.layers[0].compile(fullgraph=True)
        linear._gains_by_one = (lambda x: False) if way == "apart" else joins
        try:
            for _ in range(2):
                model.zero_grad()
                with profile(activities=[ProfilerActivity.CPU]) as seen, torch.autocast("cuda", torch.bfloat16):
                    model.model(tokens).float().square().mean().backward()
        finally:
            linear._gains_by_one = joins
        products.append(sum(event.count for event in seen.key_averages() if event.key == "aten::mm"))
        found.append([parameter.grad for parameter in model.model.parameters()])
    assert products[:2] == [21, 12]
    assert products[2] in (0, 12)  # a compiled block may call cuBLAS past torch's dispatcher
    for other in found[1:]:
        assert all((a - b).norm() < 0.03 * a.norm() for a, b in zip(found[0], other, strict=True))


def test_a_mask_with_grouped_queries_keeps_no_products():
    from hvdtrain.models.config import DecoderConfig
    from hvdtrain.models.decoder import Decoder

    model = Decoder(DecoderConfig(num_layers=1, hidden_size=512, num_heads=8, num_kv_heads=2), 100).to(GPU)
    length = 4096
    tokens = torch.randint(100, (1, length), device=GPU)
    seen = torch.ones(1, 1, length, length, dtype=torch.bool, device=GPU).tril()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        model.model(tokens, None, seen).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 8 * length**2 * 4  # eight heads' products in fp32


def test_synchronised_batch_norm_waits_for_nothing_and_is_torchs():
    from hvdtrain.process.launch import Launch
    from hvdtrain.world import SoloWorld
    from hvdtrain.world.batch_norm import SyncBatchNorm

    layer = nn.BatchNorm2d(8).to(GPU)
    ours = SyncBatchNorm(copy.deepcopy(layer), SoloWorld(GPU, Launch("none")), "layer")
    x = torch.randn(4, 8, 5, 5, device=GPU)
    ours(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(x).square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(2):
        expected = layer(x)
    torch.testing.assert_close(ours.running_var, layer.running_var)
    torch.testing.assert_close(ours(x), expected)


def test_two_runs_that_are_to_be_deterministic_are(tmp_path):
    losses = []
    for name in ("a", "b"):
        words = ["train", "lm", "--train.steps", "60", "--train.precision", "bf16", "--train.deterministic"]
        words += ["--log.every", "1", "--run-dir", str(tmp_path / name)]
        done = subprocess.run([sys.executable, "-m", "hvdtrain", *words], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses.append([line["train/loss"] for line in lines if "train/loss" in line])
    assert losses[0] == losses[1]


def test_tf32_is_another_result_than_fp32():
    from hvdtrain.world.numerics import fp32_products

    a, b = (torch.randn(512, 512, device=GPU) for _ in range(2))
    exact = a.double() @ b.double()
    errors = []
    for precision in ("fp32", "tf32"):
        with fp32_products(precision, GPU):
            errors.append(float((a @ b - exact).norm() / exact.norm()))
    assert errors[0] < 1e-6
    assert errors[1] == pytest.approx(errors[0], abs=2e-3)
    if torch.cuda.get_device_capability()[0] >= 8:
        assert errors[1] > 10 * errors[0]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_clipped_step_is_that_of_clipped_gradients(precision):
    """The optimizer's kernel divides as it goes, and leaves gradients clipped, as torch's own clipping does."""
    from hvdtrain.optim.private_optimizer import skipping_where

    generator, never = torch.Generator().manual_seed(0), torch.zeros((), dtype=torch.bool, device=GPU)
    start = [torch.randn(1000, 100, generator=generator).to(GPU, precision) for _ in range(3)]
    gradients = [torch.randn(1000, 100, generator=generator).to(GPU, precision) for _ in range(3)]
    found = []
    for by_kernel in (False, True):
        weights = [nn.Parameter(tensor.clone()) for tensor in start]
        optimizer = torch.optim.AdamW(weights, lr=0.1, fused=True)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
        norm = nn.utils.get_total_norm(gradients).float()
        if not by_kernel:
            nn.utils.clip_grads_with_norm_(weights, 1.0, norm)
        with skipping_where(optimizer, never, (norm + 1e-6) if by_kernel else None):
            optimizer.step()
        found.append([*weights, *(weight.grad for weight in weights)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_bench_frees_what_it_has_measured(tmp_path):
    from hvdtrain.verbs.bench import measure

    assert measure.are_measured_apart(GPU)
    words = ["bench", "lm", "--rounds", "1", "--steps", "2", "--warmup", "1", "--json", str(tmp_path / "bench.json")]
    done = subprocess.run([sys.executable, "-m", "hvdtrain", *words], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(json.loads((tmp_path / "bench.json").read_text())["variants"]) > 3


def test_auto_compiles_the_blocks_of_the_presets():
    from hvdtrain.models.compilation import can_compile_for
    from hvdtrain.recipes import load_recipe
    from hvdtrain.trainer.compiling import what_is_compiled

    recipe = load_recipe("lm-124m")
    model = nn.Sequential(nn.ModuleList([nn.Linear(1, 1)]))
    expected = "blocks" if can_compile_for(GPU) else "none"
    assert what_is_compiled(dataclasses.replace(recipe.model), model, GPU) == expected


def test_documents_by_their_bounds_are_what_masks_do():
    from hvdtrain.data.text.packed import same_document
    from hvdtrain.models.config import DecoderConfig
    from hvdtrain.models.decoder import Decoder
    from hvdtrain.models.documents import bounds_of, has_kernel

    config = DecoderConfig(num_layers=2, hidden_size=512, num_heads=8, num_kv_heads=2)
    if not has_kernel(GPU, torch.bfloat16, 8, 2, config.head_size):
        pytest.fail("no kernel for documents, or a wrong one: masks are taken instead")
    model = Decoder(config, 100).to(GPU)
    length = 4096
    tokens = torch.randint(100, (2, length), device=GPU)
    starts = torch.tensor([[0, 700, 4000, length], [0, 1, 2, 2000]], dtype=torch.int32, device=GPU)
    ends = torch.zeros(2, length, dtype=torch.int64, device=GPU)
    for row, places in enumerate(starts.tolist()):
        ends[row, [place for place in places if place < length]] = 1
    found, peaks = [], []
    for seen in (same_document(ends.cumsum(1)), bounds_of(starts, length)):
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            model.model(tokens, None, seen).float().square().mean().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        found.append([p.grad.clone() for p in model.model.parameters()])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() < 0.03 * a.norm()
    print("peaks with masks and with bounds, MiB:", [peak >> 20 for peak in peaks])


def test_compiled_dropout_is_that_of_samples():
    from hvdtrain.trainer.randomness import MicroBatchRandomness

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer, self.drop = nn.Linear(64, 64), nn.Linear(64, 64), nn.Dropout(0.3)

        def forward(self, x):
            return x + self.drop(self.outer(self.drop(self.inner(x)).relu()))

    torch.manual_seed(0)
    plain = nn.Sequential(Block(), Block()).to(GPU)
    fused = copy.deepcopy(plain)
    for block in fused:
        block.compile(fullgraph=True)
    x = torch.randn(32, 128, 64, device=GPU)
    found = []
    for model in (plain, fused):
        randomness = MicroBatchRandomness(GPU, model=model, is_compiled=model is fused)
        for step in range(3):
            out = randomness.run(
                torch.arange(32), (0, step), lambda model=model: model(x), lambda out: out.square().sum().backward()
            )
        found.append([out.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2)
