"""The chunked loss against the plain one, which is torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hvdtrain.models import loss as models_loss
from hvdtrain.models.config import DecoderConfig
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.loss import IGNORE_INDEX, chunked_loss, fusable_terms, terms

V, C = 1000, 16


def plain(hidden, weight, targets):
    logits = F.linear(hidden, weight).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def example(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, C, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(V, (3, 7), generator=generator)
    targets[0, 2] = targets[2] = IGNORE_INDEX
    return hidden, weight, targets


@pytest.mark.parametrize("chunk", [1, 4, 7, 20, 21, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_the_loss_and_its_gradients_are_the_plain_ones(chunk, dtype, tolerance):
    hidden, weight, targets = example(dtype)
    expected = plain(hidden, weight, targets)
    gradients = torch.autograd.grad(expected * 0.3, (hidden, weight))
    loss = chunked_loss(hidden, weight, targets, chunk)
    assert (loss - expected).abs() <= tolerance * expected
    for ours, theirs in zip(torch.autograd.grad(loss * 0.3, (hidden, weight)), gradients, strict=True):
        assert (ours - theirs).abs().max() <= 10 * tolerance * theirs.abs().max()


def test_autograd_agrees_by_finite_differences():
    hidden, weight, targets = example(torch.float64)
    part = weight[:20].detach().requires_grad_()
    few = targets[:1, :4] % 20
    assert torch.autograd.gradcheck(lambda h, w: chunked_loss(h, w, few, 3), (hidden[:1, :4], part))


def test_many_logits_that_fit_are_for_the_fused_kernel_of_a_gpu(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(models_loss, "can_compile_for", lambda device: device.type == "cuda")
    assert models_loss.is_by_chunks(101, 300, cpu, 100)
    assert not models_loss.is_by_chunks(100, 50_304, cpu, 100)
    assert not models_loss.is_by_chunks(16_384, 50_304, cpu, 20_000)
    assert models_loss.is_by_chunks(16_384, 50_304, gpu, 20_000)
    assert not models_loss.is_by_chunks(16_384, 300, gpu, 20_000)  # not worth a compilation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    hidden, weight, targets = example()
    exact = torch.autograd.grad(plain(hidden, weight, targets), (hidden, weight))
    with torch.autocast("cpu", dtype):
        loss = chunked_loss(hidden, weight, targets, 5)
    assert loss.dtype == torch.float32
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden, weight)), exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()


@pytest.mark.parametrize("scale", [None, 1.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_fused_on_gpus_is_the_same(dtype, scale):
    """To the last bits of the logits' type; compiled into one piece."""
    hidden, weight, targets = example()
    logits, wanted = F.linear(hidden, weight).detach().flatten(0, 1).to(dtype), targets.flatten()
    loss, gradient = terms(logits.clone(), wanted, torch.float32, scale)
    compiled = torch.compile(fusable_terms, backend="eager", fullgraph=True)
    for way in (fusable_terms, compiled):
        own_loss, own_gradient = way(logits, wanted, torch.float32, scale)
        torch.testing.assert_close(own_loss, loss, rtol=1e-6, atol=0)
        if scale is None:
            assert own_gradient is gradient is None
        else:
            assert own_gradient.dtype == dtype
            torch.testing.assert_close(own_gradient, gradient, rtol=6 * torch.finfo(dtype).eps, atol=1e-7)
    torch._dynamo.reset()


def test_infinities_among_logits():
    """One may rule a token out; another leaves a loss that is not finite, whose step is skipped."""
    logits, wanted = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3])
    logits[:, 7] = -torch.inf
    loss, gradient = terms(logits.clone(), wanted, torch.float32, 1.0)
    own_loss, own_gradient = fusable_terms(logits, wanted, torch.float32, 1.0)
    assert loss.isfinite()
    torch.testing.assert_close(own_loss, loss)
    torch.testing.assert_close(own_gradient, gradient)
    logits[1, 5] = torch.inf
    assert not any(way(logits.clone(), wanted, torch.float32, 1.0)[0].isfinite() for way in (terms, fusable_terms))


def test_kernels_that_cannot_be_compiled_are_said_once_and_done_without(monkeypatch, caplog):
    def broken(*arguments, **more):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(models_loss._Fused, "compiled", broken)
    monkeypatch.setattr(models_loss._Fused, "has_failed", False)
    monkeypatch.setattr(models_loss, "can_compile_for", lambda device: True)
    hidden, weight, targets = example()
    loss = chunked_loss(hidden, weight, targets, 4)
    assert (loss - plain(hidden, weight, targets)).abs() <= 1e-6 * loss
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
    assert "no C compiler" in caplog.text


def test_a_weight_is_cast_once(monkeypatch):
    hidden, weight, targets = example()
    casts = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].shape == weight.shape:
                casts.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16), Casts():
        chunked_loss(hidden, weight, targets, 2)
    assert casts.count(torch.float32) == 1  # and the first chunk's gradient to fp32


def test_without_gradients_none_is_computed():
    hidden, weight, targets = example()
    with torch.no_grad():
        loss = chunked_loss(hidden, weight, targets, 5)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(hidden, weight, targets).detach())
    hidden = hidden.detach().requires_grad_()
    products = []

    def product(x, y):
        products.append(y.shape)
        return torch.nn.functional.linear(x, y)

    for context in (torch.no_grad, torch.inference_mode):
        with context():
            chunked_loss(hidden, weight, targets, hidden.shape[0] * hidden.shape[1], product)
    assert products == [weight.shape] * 2  # the logits, and nothing for the gradients of an evaluation
    frozen = chunked_loss(hidden.detach(), weight, targets, 5)
    frozen.backward()
    assert weight.grad is not None


@pytest.mark.parametrize("tied", [True, False])
def test_the_decoder_trains_alike(tied):
    config = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "tie_embeddings": tied}
    tokens = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(0))
    gradients = []
    for chunk in (4, None):
        model = Decoder(DecoderConfig(**config, loss_chunk=chunk), V, seed=0)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    chunked, whole = gradients
    for name, gradient in whole.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-4, atol=1e-5)


def test_no_tensor_holds_all_logits():
    """The largest tensor that an operation makes is a chunk's logits, not those of all positions."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (V,) and out.shape[0] != C:
                self.numel = max(self.numel, out.numel())
            return out

    hidden, weight, targets = example()
    with Largest() as largest:
        chunked_loss(hidden, weight, targets, 5).backward()
    assert largest.numel == 5 * V
