"""Saves beside a GPU that goes on, documents of transformers' models, attention that drops; skipped without a GPU."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
GPU = torch.device("cuda", 0)
CYCLES = 2_000_000_000  # about a second


def language_model(folder):
    """Return the settled job of the default recipe on this GPU."""
    from hvdtrain.process.launch import Launch
    from hvdtrain.recipes.lm import lm
    from hvdtrain.rundir.directory import RunDirectory
    from hvdtrain.rundir.log import MetricLog
    from hvdtrain.trainer import settle
    from hvdtrain.world import SoloWorld

    recipe = dataclasses.replace(lm(), train=dataclasses.replace(lm().train, precision="bf16"))
    world = SoloWorld(GPU, Launch("none"))
    return settle(recipe.build(lambda line: None), recipe, world, RunDirectory(folder), MetricLog(None, []))


def test_a_save_does_not_wait_and_holds_what_was_there(tmp_path):
    from hvdtrain.models.weights import model_weights
    from hvdtrain.rundir.checkpoint import load_checkpoint
    from hvdtrain.rundir.checkpoints import Checkpoints
    from hvdtrain.trainer import train_step
    from hvdtrain.trainer.saver import Saver
    from hvdtrain.trainer.state import start_training

    job = language_model(tmp_path)
    training = start_training(job)
    training.is_unchecked = True
    with Saver(job) as saver:
        for _ in range(3):
            train_step(job, training)
        assert training.weights_rest
        saver.save(training, {}, beside=True)  # page-locks its memory
        saver._wait_for_all()
        train_step(job, training)
        step = training.step
        weights = {name: value.clone() for name, value in model_weights(training.model).items()}
        moments = [entry["exp_avg_sq"].clone() for entry in training.optimizer.state.values()]
        torch.cuda.synchronize()
        torch.cuda._sleep(CYCLES)
        torch.cuda.set_sync_debug_mode("warn")
        saver.save(training, {}, beside=True)
        torch.cuda.set_sync_debug_mode("default")
        is_busy = not torch.cuda.current_stream().query()
        for _ in range(3):
            train_step(job, training)
        saver.finish()
    assert is_busy
    found = load_checkpoint(Checkpoints(tmp_path / "checkpoints").path_of(step))
    assert all(torch.equal(found.weights[name], value.cpu()) for name, value in weights.items())
    saved = [entry["exp_avg_sq"] for entry in found.state["optimizer"]["state"].values()]
    assert all(torch.equal(a, b.cpu()) for a, b in zip(saved, moments, strict=True))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.float32), ("bf16-true", torch.bfloat16)])
def test_a_batch_is_copied_while_the_gpu_computes(precision, dtype):
    """Also a part of a larger tensor, as a window's tokens are, and numbers that take another type."""
    from hvdtrain.data.pinned import pinned
    from hvdtrain.trainer.step import to_device

    whole = (torch.randint(50_000, (16, 1025)), torch.randn(16, 3, 64, 65))
    batch = tuple(tensor[..., :-1] for tensor in whole)
    images = torch.randn(8, 3, 64, 64).to(memory_format=torch.channels_last)
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    moved = to_device(tuple(pinned(tensor) for tensor in (*batch, images)), GPU, precision)
    assert not torch.cuda.current_stream().query()
    assert moved[2].is_contiguous(memory_format=torch.channels_last)
    for tensor, there in zip((*batch, images), moved, strict=True):
        wanted = tensor.to(dtype) if tensor.is_floating_point() else tensor
        assert torch.equal(there.cpu(), wanted)


def test_blocks_of_page_locked_memory_are_copied_to_without_waiting():
    from hvdtrain.data.pinned import PinnedMemory

    memory = PinnedMemory(True)
    source = [torch.randn(size, device=GPU) for size in (3_000_000, 700_000, 5_000_000)]
    targets = [memory.empty_like(tensor) for tensor in source]
    assert all(tensor.is_pinned() for tensor in targets)
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    for target, tensor in zip(targets, source, strict=True):
        target.copy_(tensor, non_blocking=True)
    assert not torch.cuda.current_stream().query()
    back = [target.to(GPU, non_blocking=True) for target in targets]
    assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(back, source, strict=True))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_documents_of_transformers_models_by_their_bounds(family):
    from families import as_batch, tiny_model

    from hvdtrain.data.text.packed import begins_of
    from hvdtrain.data.text.windows import starts_of
    from hvdtrain.recipes.transformers_models.bounds import ByBounds, by_bounds
    from hvdtrain.recipes.transformers_models.layouts import BY_POSITIONS
    from hvdtrain.recipes.transformers_models.probe import find_way

    window = {"sliding_window": 50} if family == "mistral" else {}
    model = tiny_model(family, max_position_embeddings=2048, hidden_size=128, head_dim=32, **window).to(GPU)
    length, generator = 2048, torch.Generator().manual_seed(0)
    documents = [
        [torch.randint(5, 300, (n,), generator=generator) for n in own] for own in ([40, 1900], [1, 700, 1347])
    ]
    batch = tuple(tensor.to(GPU) for tensor in as_batch(documents))
    found, peaks = [], []
    for packed in ((BY_POSITIONS,), (by_bounds(GPU, torch.bfloat16),)):
        way = find_way(model, torch.arange(5, 300), 96, packed)
        is_cut = isinstance(way.loss.layout, ByBounds)
        assert is_cut == (packed[0] is not BY_POSITIONS), str(way)
        given = (*batch, starts_of(begins_of(batch[2]))) if is_cut else batch
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error" if is_cut else "default")
        with torch.autocast("cuda", torch.bfloat16):
            loss = way.loss(model, given)["loss"]
        loss.backward()
        torch.cuda.set_sync_debug_mode("default")
        peaks.append(torch.cuda.max_memory_allocated() - before)
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    assert length == batch[0].shape[1]
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() < 0.03 * a.norm()
    print("peaks with masks and with bounds, MiB:", [peak >> 20 for peak in peaks])


def test_attention_drops_by_sample_without_keeping_weights():
    from hvdtrain.trainer.randomness import SampleRandomness

    n, heads, length = 4, 8, 2048
    q, k, v = (torch.randn(n, heads, length, 64, device=GPU, dtype=torch.bfloat16) for _ in "qkv")

    def attended(samples):
        own = [tensor[samples.to(GPU)].requires_grad_() for tensor in (q, k, v)]
        with SampleRandomness(samples, 3):
            out = F.scaled_dot_product_attention(*own, dropout_p=0.25, is_causal=True)
            return out.detach(), torch.autograd.grad(out.float().square().sum(), own)[2]

    samples = torch.arange(n)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    whole, gradient = attended(samples)
    assert torch.cuda.max_memory_allocated() - before < n * heads * length**2  # a byte a weight
    for part in (samples[:1], samples[1:3], samples[3:]):
        out, own = attended(part)
        assert torch.equal(out, whole[part.to(GPU)])
        torch.testing.assert_close(own, gradient[part.to(GPU)], rtol=2e-2, atol=2e-2)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert 0.1 < float((whole - plain).float().norm() / plain.float().norm()) < 3  # something was dropped
    mean = torch.stack([_with_seed(seed, q[:1], k[:1], v[:1]) for seed in range(64)]).float().mean(0)
    assert float((mean - plain[:1]).float().norm() / plain[:1].float().norm()) < 0.3  # and scaled up


def _with_seed(seed, q, k, v):
    from hvdtrain.trainer.random_attention import one_by_one

    return one_by_one([seed], q, k, v, dropout_p=0.25, is_causal=True)
