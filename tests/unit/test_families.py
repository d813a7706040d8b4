"""Families of causal language models, tiny: documents pass through each as if alone, or are refused with a reason."""

import pytest
import torch
from families import all_families, as_batch, judge, tiny_model
from hugging import import_transformers

from hvdtrain.models.loss import IGNORE_INDEX
from hvdtrain.recipes.transformers_models.layouts import BY_POSITIONS, IN_EQUAL_ROWS, IN_ROWS
from hvdtrain.recipes.transformers_models.probe import find_way

import_transformers()
pytestmark = pytest.mark.filterwarnings("default")  # transformers' own are none of ours

# A family for each thing that went wrong before, or can.
SAMPLE = {
    "gpt2": "packed",  # learned positions
    "llama": "packed",
    "mistral": "packed",  # a window in every layer
    "gemma2": "packed",  # windows, and capped logits
    "gemma3": "packed",  # a configuration in parts
    "llama4_text": "packed",  # chunked attention
    "cohere": "packed",  # scaled logits
    "mixtral": "packed",  # experts
    "gpt_oss": "packed",  # does not look at positions for its mask
    "falcon": "packed",
    "bert": "packed",
    "roberta": "rows",  # positions that depend on the tokens
    "marian": "rows",  # takes no positions
    "bloom": "rows",
    "openai-gpt": "rows",
    "mamba": "rows",  # a state that is carried on
    "jamba": "rows",
    "qwen3_next": "rows",
    "falcon_h1": "rows",
    "recurrent_gemma": "rows",
    "doge": "refused",  # depends on what fills a row up
    "xlnet": "refused",  # not causal
}


@pytest.mark.parametrize("family", SAMPLE)
def test_documents_pass_as_if_alone(family):
    found = judge(family, length=24)
    assert found.word == SAMPLE[family], found


@pytest.mark.families
def test_every_family(request):
    if "families" not in request.config.getoption("-m"):
        pytest.skip("takes minutes: give -m families")
    found = {family: judge(family) for family in all_families()}
    assert not {family: verdict for family, verdict in found.items() if verdict.word == "wrong"}


def test_an_encoder_is_refused():
    found = judge("bert", is_decoder=False)
    assert found.word == "refused"
    assert "is no causal one" in found.why


def test_a_model_that_transformers_cannot_run_is_refused():
    found = judge("gpt2", length=200)  # more than its positions
    assert found.word == "refused"
    assert "fails on" in found.why


def test_the_model_is_left_as_it_was():
    model = tiny_model("gpt2")
    torch.manual_seed(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    find_way(model, torch.arange(5, 300), 16)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("layout", [IN_ROWS, IN_EQUAL_ROWS])
def test_rows_hold_each_token_once(layout):
    generator = torch.Generator().manual_seed(0)
    lengths = [[5, 1, 10], [16], [1] * 9, [3, 13]]
    samples = [[torch.randint(9, (n,), generator=generator) for n in sample] for sample in lengths]
    tokens, targets, documents, positions = batch = as_batch(samples)
    seen = []
    for call in layout.calls(None, batch):
        is_text = call.origins >= 0
        at = call.origins[is_text]
        seen += at.tolist()
        assert torch.equal(call.inputs["input_ids"][is_text], tokens.flatten()[at])
        assert torch.equal(call.targets[is_text], targets.flatten()[at])
        assert (call.targets[~is_text] == IGNORE_INDEX).all()
        columns = torch.arange(call.origins.shape[1]).expand_as(call.origins)
        assert torch.equal(columns[is_text], positions.flatten()[at])  # from the beginning of a row on
        if layout is IN_ROWS:
            assert call.origins.numel() <= tokens.numel()
        else:
            assert call.origins.shape == tokens.shape
            assert (at // 16 == torch.arange(4)[:, None].expand_as(is_text)[is_text]).all()  # a row a sample
    assert sorted(seen) == (documents.flatten() >= 0).nonzero().flatten().tolist()


def test_packed_calls_do_not_count_what_fills_up():
    batch = as_batch([[torch.arange(3)], [torch.arange(5)]])
    (call,) = BY_POSITIONS.calls(None, batch)
    assert (call.origins >= 0).sum() == 8
