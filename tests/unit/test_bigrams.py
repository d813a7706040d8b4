"""A decoder that begins at counts of pairs: it predicts as well as they do, alike everywhere, from any text."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hvdtrain import cli
from hvdtrain.errors import ConfigError
from hvdtrain.models import bigrams
from hvdtrain.models.bigrams import begin_at_bigrams
from hvdtrain.models.config import DecoderConfig
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.interchange import to_llama
from hvdtrain.models.ngram import NUM_SYMBOLS, TrigramModel
from hvdtrain.recipes import load_recipe
from hvdtrain.recipes.lm import LanguageModel

ROOT = Path(__file__).parents[2]
SHAPE = DecoderConfig(num_layers=2, hidden_size=64, num_heads=2, tie_embeddings=False, init_embeddings="bigrams")


def real_text():
    """Return the bytes of this project's documentation, int64, the last tenth apart."""
    pages = sorted((ROOT / "docs").glob("*.md"))
    tokens = np.frombuffer(b"".join(page.read_bytes() for page in pages), np.uint8).astype(np.int64)
    return np.split(tokens, [len(tokens) * 9 // 10])


def begun(tokens, vocab_size, seed=0, shape=SHAPE):
    model = Decoder(shape, vocab_size, seed=seed)
    begin_at_bigrams(model, tokens, seed)
    return model


def held_out_nats(model, tokens, length=128):
    rows = torch.from_numpy(tokens[: len(tokens) // length * length]).view(-1, length)
    with torch.no_grad():
        return model(rows[:, :-1], rows[:, 1:]).item() / rows[:, 1:].numel()


def test_before_the_first_step_it_predicts_as_well_as_counts_do():
    train, held_out = real_text()
    counts = TrigramModel.fit(train.astype(np.uint16))
    table = np.stack([np.log(counts.distribution(np.array([i], np.uint16))) for i in range(NUM_SYMBOLS)])
    by_counts = -table[held_out[:-1], held_out[1:]].mean()

    by_model = held_out_nats(begun(train, NUM_SYMBOLS), held_out)
    drawn = held_out_nats(Decoder(SHAPE, NUM_SYMBOLS, seed=0), held_out)
    assert by_model == pytest.approx(by_counts, rel=0.02)
    assert drawn > 1.8 * by_counts


def test_the_number_of_threads_changes_no_bit_and_the_seed_all():
    train, _ = real_text()

    def weights(threads, seed):
        torch.set_num_threads(threads)
        model = begun(train, NUM_SYMBOLS, seed)
        assert torch.get_num_threads() == threads
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    before = torch.get_num_threads()
    try:
        one, two, other = weights(1, 0), weights(2, 0), weights(2, 1)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("tokens", "vocab_size"),
    [
        ([3, 5], 7),  # all the text there is
        ([4, 4, 4, 4], 5),  # one token, again and again
        ([*range(40), *range(40)], 50_000),  # most of the vocabulary never comes
        ([0, 1] * 30, 2),  # fewer tokens than channels
    ],
)
def test_any_text_gives_finite_weights_and_what_came_is_likelier_than_what_did_not(tokens, vocab_size):
    tokens = np.array(tokens, np.int64)
    model = begun(tokens, vocab_size)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    scale = model.model.embed_tokens.weight.pow(2).mean(1).sqrt()
    torch.testing.assert_close(scale, scale[:1].expand_as(scale), rtol=1e-4, atol=0)
    logits = model(torch.from_numpy(tokens[None, :1]))[0, 0]
    assert logits.argmax() == tokens[1]
    never_came = scale.new_tensor(sorted({*range(vocab_size)} - {*tokens.tolist()})[:9], dtype=torch.int64)
    assert len(model.model.embed_tokens.weight[never_came].unique(dim=0)) == len(never_came)  # each its own


@pytest.mark.parametrize("text", ["hello world ", "ACGT", "AACGCTTG", "0123456789\n", "ab"])
@pytest.mark.parametrize("width", [128, 320])
def test_a_text_of_a_few_different_bytes_gives_finite_weights(text, width):
    """Most singular values are 0 then: in fp32 LAPACK finds none at all, or nan."""
    tokens = np.frombuffer(text.encode() * 300, np.uint8).astype(np.int64)
    shape = dataclasses.replace(SHAPE, hidden_size=width, num_layers=1)
    for seed in range(3):
        model = begun(tokens, NUM_SYMBOLS, seed, shape)
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
        assert held_out_nats(model, tokens) < 0.75


def test_other_texts_begin_as_they_did():
    """Bit by bit: the figures of this start were measured with LAPACK's fp32."""
    whole = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    values, vectors = bigrams._eigen(whole.T @ whole)
    expected = torch.linalg.eigh(whole.T @ whole)
    assert torch.equal(values, expected.eigenvalues)
    assert torch.equal(vectors, expected.eigenvectors)


def test_a_model_without_weights_stays_without():
    with torch.device("meta"):
        model = Decoder(SHAPE, 7)
    begin_at_bigrams(model, np.array([1, 2, 3]), 0)
    assert model.lm_head.weight.is_meta


def test_one_matrix_for_both_is_refused_by_name():
    flags = ["train", "lm", "--model.tie-embeddings", "true"]
    for refused in (lambda: dataclasses.replace(SHAPE, tie_embeddings=True), lambda: cli.parse(flags)):
        with pytest.raises(ConfigError, match=r"init_embeddings = bigrams needs two matrices.*tie-embeddings false"):
            refused()


def test_a_file_of_settings_that_knows_nothing_of_it_goes_with_a_flag(tmp_path):
    """As a run has left it that was begun before there was this setting."""
    (tmp_path / "config.toml").write_text("[model]\ntie_embeddings = true\n")
    words = ["train", "lm", "--config", str(tmp_path / "config.toml")]
    with pytest.raises(ConfigError, match=r"--model.init-embeddings random"):
        cli.parse(words)
    model = cli.parse([*words, "--model.init-embeddings", "random"]).recipe.model
    assert (model.tie_embeddings, model.init_embeddings) == (True, "random")


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_are_given_stay_as_they_are(tied, tmp_path):
    shape = dataclasses.replace(SHAPE, tie_embeddings=tied, init_embeddings="random")
    (tmp_path / "config.json").write_text(json.dumps(to_llama(shape, 300, 64, None)))
    recipe = load_recipe("lm")
    assert isinstance(recipe, LanguageModel)
    begun_here = dataclasses.replace(recipe.model, tie_embeddings=False, init_embeddings="bigrams", init_from=tmp_path)
    resolved = dataclasses.replace(recipe, model=begun_here).resolve()
    assert (resolved.model.init_embeddings, resolved.model.tie_embeddings) == ("random", tied)
    assert "init_embeddings" in dict(begun_here.unused())
