"""Attention within packed documents by their bounds, against the mask that it replaces."""

import pytest
import torch

from hvdtrain.data.text.packed import same_document
from hvdtrain.data.text.windows import DocumentWindows
from hvdtrain.models import documents
from hvdtrain.models.config import DecoderConfig
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.private_torch import FakeTensorMode
from hvdtrain.trainer.randomness import SampleRandomness

END = 7


class Windows:
    """Samples of given tokens."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __len__(self):
        return len(self.tokens)

    def batch(self, indices):
        return self.tokens[indices], self.tokens[indices]

    def num_targets(self, indices):
        return self.tokens[indices].numel()


def some_tokens(rows=3, length=24):
    tokens = torch.randint(6, (rows, length), generator=torch.Generator().manual_seed(0))
    tokens[0, [0, 5, 6, 20]] = END
    tokens[1, [9, length - 1]] = END
    return tokens


def test_where_documents_begin():
    data = DocumentWindows(Windows(some_tokens()), END)
    _, _, starts = data.batch(torch.arange(3))
    assert starts.shape == (3, 8)
    assert [[place for place in row if place < 24] for row in starts.tolist()] == [[0, 5, 6, 20], [0, 9, 23], [0]]
    assert data.batch(torch.arange(0))[2].shape == (0, 8)
    many = DocumentWindows(Windows(torch.full((1, 9), END)), END)
    assert many.batch(torch.arange(1))[2].tolist() == [[*range(9), *[9] * 7]]


@pytest.mark.parametrize("groups", [4, 2])
def test_by_bounds_it_is_what_the_mask_does(groups):
    model = Decoder(DecoderConfig(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=groups), 8, seed=1)
    tokens, _, starts = DocumentWindows(Windows(some_tokens()), END).batch(torch.arange(3))
    seen = same_document((tokens == END).cumsum(1))
    by_mask, by_bounds = (model(tokens, seen=way) for way in (seen, documents.bounds_of(starts, 24)))
    torch.testing.assert_close(by_bounds, by_mask)
    assert (model(tokens) - by_mask).abs().max() > 1e-3  # the mask matters here
    found = [torch.autograd.grad(out.square().sum(), list(model.parameters())) for out in (by_mask, by_bounds)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [4, 2])
def test_the_kernel_takes_the_bounds_of_a_gpu(groups):
    """On tensors without storage: types and shapes are what its operator asks for. The backward pass needs a GPU."""
    starts = DocumentWindows(Windows(some_tokens()), END).batch(torch.arange(3))[2]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        device = torch.device("cuda", 0)
        q = torch.empty(3, 4, 24, 64, dtype=torch.bfloat16, device=device)
        k, v = (torch.empty(3, groups, 24, 64, dtype=torch.bfloat16, device=device) for _ in "kv")
        bounds = documents.bounds_of(torch.empty(starts.shape, dtype=torch.int32, device=device), 24)
        assert bounds.starts.shape == (3 * 8 + 1,)
        out = documents.attend(q, k, v, bounds)
    assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, device)


def test_without_a_gpu_or_16_bits_there_is_no_kernel(monkeypatch):
    assert not documents.has_kernel(torch.device("cpu"), torch.bfloat16, 4, 4, 64)
    assert not documents.has_kernel(torch.device("cuda", 0), torch.float32, 4, 4, 64)
    assert not documents.has_kernel(torch.device("cuda", 0), torch.bfloat16, 4, 4, 64) or torch.cuda.is_available()


def test_what_the_kernel_is_tried_on_is_not_taken_for_the_models():
    """It is the same on all ranks: `verify` warned of a generator that draws the same numbers everywhere."""
    mode = SampleRandomness(torch.arange(2))
    mode.own_draws = []
    with mode:
        documents.has_kernel.__wrapped__(torch.device("cuda"), torch.bfloat16, 2, 2, 16)
        torch.randn(3, generator=torch.Generator().manual_seed(0))
    assert [name for name, _ in mode.own_draws] == ["randn"]  # the model's own


def test_a_kernel_that_computes_something_else_is_not_taken(monkeypatch):
    """The comparison that decides, on a CPU in the place of the GPU."""
    shape = torch.device("cpu"), torch.bfloat16, (4, 2, 2), 16
    assert documents._is_right(*shape)
    plain, calls = documents._one_by_one, []

    def first_is_wrong(query, key, value, bounds, scores):
        calls.append(0)
        whole = documents.Bounds(bounds.starts[[0, -1]], bounds.longest)  # as if there was one document
        return plain(query, key, value, whole if len(calls) == 1 else bounds, scores)

    monkeypatch.setattr(documents, "_one_by_one", first_is_wrong)
    assert not documents._is_right(*shape)


@pytest.mark.parametrize("window", [1, 5, 24, None])
def test_a_window_and_a_scale_are_those_of_a_mask(window):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 24, 16, generator=generator) for n in (4, 2, 2))
    starts = torch.tensor([[0, 3, 24, 24], [0, 1, 2, 20]], dtype=torch.int32)
    number = torch.zeros(2, 24, dtype=torch.int64)
    for row, places in enumerate(starts.tolist()):
        number[row, [place for place in places if 0 < place < 24]] = 1
    seen = same_document(number.cumsum(1))
    if window is not None:
        place = torch.arange(24)
        seen = seen & (place[:, None] - place < window)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=0.3, enable_gqa=True)
    found = documents.attend(q, k, v, documents.bounds_of(starts, 24), documents.Scores(0.3, window))
    torch.testing.assert_close(found, expected)


def test_the_kernel_takes_a_window_and_a_scale():
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        q = torch.empty(3, 4, 24, 64, dtype=torch.bfloat16, device="cuda")
        starts = torch.empty(3, 8, dtype=torch.int32, device="cuda")
        out = documents.attend(q, q, q, documents.bounds_of(starts, 24), documents.Scores(0.3, 7))
    assert out.shape == q.shape
