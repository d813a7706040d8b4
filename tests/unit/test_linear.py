"""Linear layers by oneDNN: what torch computes, faster."""

import copy
import platform

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hvdtrain.models import linear as module
from hvdtrain.models.linear import is_slow_for_mkl, linear, product_of, takes_onednn, use_onednn
from hvdtrain.models.loss import chunked_loss
from hvdtrain.process.processor import cpuinfo

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
AVX2 = "flags\t\t: fpu avx avx2 fma\n"
AVX512 = "flags\t\t: fpu avx avx2 fma avx512f avx512bw\n"
AMD, INTEL = "processor\t: 0\nvendor_id\t: AuthenticAMD\n", "vendor_id\t: GenuineIntel\n"


@pytest.fixture(autouse=True)
def however_small(monkeypatch):
    """Let the smallest product be one for oneDNN."""
    monkeypatch.setattr(module, "_FEWEST_PRODUCTS", 1)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exactly(x, weight, bias, gradient):
    """Return the layer's output and gradients, computed in fp64."""
    inputs = [t.detach().double().requires_grad_() for t in (x, weight) if t is not None]
    bias = None if bias is None else bias.detach().double().requires_grad_()
    y = F.linear(*inputs, bias)
    y.backward(gradient.double())
    return [y, *(t.grad for t in inputs), *([] if bias is None else [bias.grad])]


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (2, 2, 3, 7), (1, 7), (7,)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_outputs_and_gradients(shape, has_bias):
    x, weight = numbers(*shape).requires_grad_(), numbers(4, 7, seed=1).requires_grad_()
    bias = numbers(4, seed=2).requires_grad_() if has_bias else None
    gradient = numbers(*shape[:-1], 4, seed=3)
    y = linear(x, weight, bias)
    y.backward(gradient)
    ours = [y, x.grad, weight.grad, *([bias.grad] if has_bias else [])]
    for mine, exact in zip(ours, exactly(x, weight, bias, gradient), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)


def test_inputs_that_are_not_contiguous():
    x, weight = numbers(7, 3, 5).transpose(0, 2), numbers(7, 4).t()
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    x = x.detach().requires_grad_()
    weight = weight.detach().requires_grad_()
    linear(x, weight).transpose(0, 1).square().sum().backward()
    expected = torch.autograd.grad(F.linear(x, weight).square().sum(), [x, weight])
    torch.testing.assert_close([x.grad, weight.grad], list(expected))


def test_gradients_of_gradients():
    x, weight = numbers(5, 7).requires_grad_(), numbers(4, 7, seed=1).requires_grad_()

    def penalty(product):
        (gradient,) = torch.autograd.grad(product(x, weight).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [x, weight])

    torch.testing.assert_close(penalty(linear), penalty(F.linear), rtol=1e-4, atol=1e-3)


def test_what_is_not_for_it_is_torchs(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("by oneDNN")

    x, weight = numbers(4, 8), numbers(3, 8)
    monkeypatch.setattr(module._Linear, "apply", refuse)
    linear(x.double(), weight.double())
    linear(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    torch.func.grad(lambda x: linear(x, weight).sum())(x)
    torch.func.vmap(lambda x: linear(x, weight))(x)
    torch.compile(lambda x: linear(x, weight), backend="eager", fullgraph=True)(x)
    monkeypatch.setattr(module, "_FEWEST_PRODUCTS", 97)
    linear(x, weight)
    monkeypatch.setattr(module, "_FEWEST_PRODUCTS", 96)
    with pytest.raises(AssertionError, match="by oneDNN"):
        linear(x, weight)


class Own(nn.Linear):
    """A linear layer with a forward pass of its own."""

    def forward(self, x):
        return super().forward(x) * 2


def test_layers_stay_what_they_were():
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), Own(6, 5), nn.Linear(5, 2, bias=False))
    plain = copy.deepcopy(model)
    use_onednn(model)
    use_onednn(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(isinstance(model[i], nn.Linear) for i in (0, 2, 3))
    assert type(model[2]) is Own
    assert (product_of(model[0]), product_of(model[2])) == (linear, F.linear)
    x = numbers(9, 8)
    torch.testing.assert_close(model(x), plain(x))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].weight.zero_()
    torch.testing.assert_close(model(x), plain(x))
    assert not torch.equal(twin(x), model(x))


def test_layers_of_gpt2_have_their_weights_the_other_way_round(monkeypatch):
    layers = pytest.importorskip("transformers.pytorch_utils")

    class Own(layers.Conv1D):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.Sequential(layers.Conv1D(6, 8), nn.Tanh(), Own(5, 6))
    plain = copy.deepcopy(model)
    use_onednn(model)
    assert isinstance(model[0], layers.Conv1D)
    assert type(model[2]) is Own
    assert list(model.state_dict()) == list(plain.state_dict())
    x = numbers(3, 9, 8)
    torch.testing.assert_close(gradients(model, x), gradients(plain, x), rtol=1e-5, atol=1e-5)
    with monkeypatch.context() as patch:
        patch.setattr(module._Linear, "apply", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(x)
        patch.setattr(module, "_FEWEST_PRODUCTS", 1 << 40)
        assert torch.equal(model(x), plain(x))


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def test_the_chunked_loss_takes_it():
    hidden, weight = numbers(2, 9, 8).requires_grad_(), numbers(11, 8, seed=1).requires_grad_()
    targets = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(2))
    results = []
    for product in (linear, F.linear):
        loss = chunked_loss(hidden, weight, targets, 4, product)
        results.append([loss, *torch.autograd.grad(loss, [hidden, weight])])
    torch.testing.assert_close(*results)


def test_who_takes_it():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert is_slow_for_mkl("x86_64", AMD + AVX512)
    assert not is_slow_for_mkl("x86_64", AMD + AVX2)
    assert not is_slow_for_mkl("x86_64", INTEL + AVX512)
    assert not is_slow_for_mkl("aarch64", AMD + AVX512)
    assert not is_slow_for_mkl("x86_64", "")
    assert takes_onednn("onednn", cpu)
    assert not takes_onednn("torch", cpu)
    assert not any(takes_onednn(library, gpu) for library in ("auto", "torch", "onednn"))
    here = is_slow_for_mkl(platform.machine(), cpuinfo())
    assert takes_onednn("auto", cpu) == (here and torch.backends.mkl.is_available())


def test_its_operations_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    from hvdtrain.trainer import flops

    assert flops  # it tells torch how
    with FlopCounterMode(display=False) as counter:
        linear(numbers(3, 9, 8), numbers(11, 8))
    assert counter.get_total_flops() == 2 * 3 * 9 * 8 * 11


def test_several_layers_by_one_product_are_what_they_are_one_by_one():
    from hvdtrain.models.linear import _by_one_product, _is_plain, products

    torch.manual_seed(0)
    layers = [nn.Linear(6, size, bias=False).double() for size in (4, 2, 5)]
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    wanted = [x, *(layer.weight for layer in layers)]
    given = [torch.randn(2, 3, size, dtype=torch.float64) for size in (4, 2, 5)]
    together, apart = _by_one_product(x, layers), products(x, *layers)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
    gradients = (torch.autograd.grad(outputs, wanted, given) for outputs in (together, apart))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
    assert all(map(_is_plain, layers))
    layers[0].register_forward_hook(lambda *_: None)
    assert not _is_plain(layers[0])
    assert not _is_plain(nn.Linear(2, 2))
