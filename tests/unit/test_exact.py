"""What approximating formats leave as it is: the weights of a vocabulary, and what `--comm.compression-exact` names."""

import copy
import dataclasses

import pytest
import torch
from thread_world import run_ranks
from torch import nn

from hvdtrain.errors import ConfigError
from hvdtrain.models.config import DecoderConfig
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.vocabulary import of_vocabulary
from hvdtrain.settings import CommConfig
from hvdtrain.trainer.memory import wire_bytes
from hvdtrain.verbs.plan.methods import handed_bytes
from hvdtrain.verbs.plan.step import Bucket, joined
from hvdtrain.world import Int8, PowerSGD, TopK, codec_for
from hvdtrain.world.exact import exact_names

KINDS = {
    "powersgd": lambda **given: PowerSGD(1, min_size=4, **given),
    "topk": lambda **given: TopK(0.1, min_size=4, **given),
    "int8": lambda **given: Int8(min_size=4, **given),
}


class Words(nn.Module):
    """As many positions as channels, and a layer between that has as many outputs: neither is an output layer."""

    def __init__(self, tie=False):
        super().__init__()
        self.words, self.places = nn.Embedding(20, 8), nn.Embedding(8, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 20)
        if tie:
            self.head.weight = self.words.weight

    def forward(self, tokens):
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        return self.head(self.second(self.first(x).tanh()))


torch.manual_seed(0)
MODEL = Words()


class OfTransformers(nn.Module):
    """Names its output layer as models of transformers do; it is no `nn.Linear`, or there is none."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.words, self.out = inner, nn.Embedding(5, 4), nn.Bilinear(4, 4, 7)

    def get_output_embeddings(self):
        if self.inner is None:
            raise NotImplementedError
        return self.out


def names_of(model):
    found = of_vocabulary(model)
    return {name for name, parameter in model.named_parameters() if parameter in found}


def test_a_vocabulary_is_embeddings_and_the_output_layer():
    assert names_of(Words()) == {"words.weight", "places.weight", "head.weight"}
    assert names_of(Words(tie=True)) == {"words.weight", "places.weight"}
    assert names_of(OfTransformers(nn.Linear(2, 2))) == {"words.weight", "out.weight"}
    assert names_of(OfTransformers(None)) == {"words.weight"}
    assert names_of(nn.Sequential(nn.Linear(4, 20), nn.Linear(20, 4))) == set()
    shape = DecoderConfig(num_layers=2, hidden_size=16, num_heads=2)
    assert names_of(Decoder(shape, 64, seed=0)) == {"model.embed_tokens.weight"}
    untied = dataclasses.replace(shape, tie_embeddings=False)
    assert names_of(Decoder(untied, 64, seed=0)) == {"model.embed_tokens.weight", "lm_head.weight"}


def test_who_is_spared():
    model = Words(tie=True)
    assert exact_names(model, "powersgd:4", "auto") == {"words.weight", "places.weight"}
    assert not exact_names(model, "int8", "auto")
    assert not exact_names(model, "powersgd:4", "none")
    assert exact_names(model, "topk:0.1", "*places*, first.*") == {"places.weight", "first.weight", "first.bias"}
    assert exact_names(model, "int8", "head.weight") == {"words.weight"}  # one parameter, two names
    with pytest.raises(
        ConfigError, match=r"no parameter's name fits 'heads\*'; names are such as words.weight, places"
    ):
        exact_names(model, "int8", "head.bias,heads*")
    for wrong in ("", "a,,b", ","):
        with pytest.raises(ConfigError, match="compression_exact must be auto, none, or patterns"):
            CommConfig(compression_exact=wrong)


def averaged(world, codec, dtype=torch.float32):
    """Return the means of three steps, what is remembered, and the bytes handed over."""
    model = copy.deepcopy(MODEL).to(dtype)
    plain = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = world.wrap(plain, model, compression=codec, warns_of_copies=False)
    means = []
    for step in range(3):
        optimizer.zero_grad()
        tokens = torch.randint(20, (2, 8), generator=torch.Generator().manual_seed(7 * step + world.rank))
        model(tokens).logsumexp(-1).sum().backward()
        means.append({name: p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
    return means, set(codec.left_over()) if codec != "none" else set(), world.handed_bytes["gradients"], model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exact", ["auto", "none", "*words*,second.weight"])
def test_what_is_spared_is_the_exact_mean_and_counted_so(kind, exact):
    (plain, *_), _ = run_ranks(2, lambda world: averaged(world, "none"))
    codec = KINDS[kind](exact=exact)
    spared = {"auto": {"words.weight", "places.weight", "head.weight"}, "none": set()}.get(
        exact, {"words.weight", "second.weight"}
    )
    spared = spared if kind == "powersgd" or exact != "auto" else set()
    matrices = {"words.weight", "places.weight", "first.weight", "second.weight", "head.weight"}

    def work(world):
        own = KINDS[kind](exact=exact)
        return *averaged(world, own), own

    for means, kept, handed, model, codec in run_ranks(2, work):
        assert kept >= matrices - spared
        assert not kept & spared
        for one, other in zip(means, plain, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in spared)
            assert not torch.equal(one["first.weight"], other["first.weight"])
        said = sum(codec.bytes_of(name, p.shape, p.dtype) for name, p in model.named_parameters())
        assert handed == 3 * (said + 4 * len(list(model.parameters())))
        line = codec.about([(name, p.shape) for name, p in model.named_parameters()])
        assert ("--comm.compression-exact" in line) == bool(spared)


@pytest.mark.parametrize("size", [2, 3])
def test_a_plan_knows_what_is_spared(size):
    """The bytes that it tells are those that ranks hand over, in one bucket and in two."""
    shapes = ((64, 48), (33,), (300, 5))
    some = Bucket(1.0, 0, shapes, exact=(2,), exact_for=("powersgd",))
    factors = 4 * 2 * (64 + 48)
    for buckets in ([some, some], [joined([some, some])]):
        count = sum(len(bucket.shapes) for bucket in buckets)
        assert handed_bytes(buckets, "powersgd:2", 100, size) == 2 * (factors + 4 * (33 + 1500)) + 4 * count
        assert handed_bytes(buckets, "topk:0.01", 100, size) < handed_bytes(buckets, "powersgd:2", 100, size)


def test_a_dry_run_counts_it(tmp_path):
    from test_components import job_of

    job = job_of(tmp_path)
    job = dataclasses.replace(job, task=dataclasses.replace(job.task, model=Words()))
    of = {}
    for exact in ("auto", "none"):
        comm = CommConfig(compression="powersgd:1", compression_min_size=4, compression_exact=exact)
        of[exact] = wire_bytes(dataclasses.replace(job, config=dataclasses.replace(job.config, comm=comm)))
    assert of["auto"] - of["none"] == 4 * (2 * (20 * 8 - 28) + 64 - 16)
    assert codec_for(CommConfig(compression="powersgd:4"), Words()).is_exact("head.weight")


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_remembered_of_a_tensor_is_sent_once_it_is_spared(kind):
    """As where a run goes on that was begun before there was the setting: nothing is lost."""

    def work(world):
        before, after = KINDS[kind](exact="none"), KINDS[kind](exact="words.weight")
        averaged(world, before, torch.float64)
        kept = before.left_over()["words.weight"].clone()
        after.load_state_dict(before.state_dict())
        second, *_ = averaged(world, after, torch.float64)
        return kept, second, after.left_over()["words.weight"]

    (plain, *_), _ = run_ranks(2, lambda world: averaged(world, "none", torch.float64))
    (one, second, left), (other, _, _) = run_ranks(2, work)
    assert one.any()
    assert not left.any()
    gaps = [second[step]["words.weight"] - plain[step]["words.weight"] for step in range(2)]
    assert (gaps[0] - one - other).abs().max() < 1e-12
    assert gaps[1].abs().max() < 1e-12
