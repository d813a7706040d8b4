"""A tokenizer with more tokens than the model has embeddings for."""

import pytest
import torch
from families import tiny_model
from hugging import import_transformers

from hvdtrain.errors import DataError
from hvdtrain.recipes.transformers_models.loading import fit_embeddings, num_rows, write_model_files

import_transformers()
pytestmark = pytest.mark.filterwarnings("default")  # transformers' own are none of ours
ROWS = 320


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_of_the_old(tied, tmp_path):
    model = tiny_model("llama", tie_word_embeddings=tied)
    old = model.get_output_embeddings().weight.detach().clone()
    said = fit_embeddings(model, ROWS + 3, largest=ROWS + 2, may_resize=True)
    assert said == "embeddings: 3 new rows, the mean of the 320 old ones"
    new = model.get_output_embeddings().weight
    assert num_rows(model) == len(new) == ROWS + 3
    assert torch.equal(new[:ROWS], old)
    assert torch.equal(new[ROWS:], old.mean(0).expand(3, -1))
    assert (new is model.get_input_embeddings().weight) == tied
    assert model(input_ids=torch.tensor([[ROWS + 2]])).logits.shape[-1] == ROWS + 3

    class Tokenizer:
        def save_pretrained(self, folder):
            pass

    write_model_files(tmp_path, model, Tokenizer())
    config = import_transformers().AutoConfig.from_pretrained(tmp_path)
    assert config.vocab_size == ROWS + 3
    assert config.use_cache
    assert not model.config.use_cache


def test_tokens_that_no_document_holds_need_no_embedding():
    model = tiny_model("llama")
    said = fit_embeddings(model, ROWS + 1, largest=ROWS - 1, may_resize=False)
    assert said == "embeddings: 1 of the tokenizer's tokens have none, and none of them is in the documents"
    assert fit_embeddings(model, ROWS, largest=ROWS - 1, may_resize=False) == ""
    assert fit_embeddings(model, ROWS - 1, largest=ROWS - 2, may_resize=True) == ""
    assert num_rows(model) == ROWS


def test_a_token_without_an_embedding_is_refused():
    with pytest.raises(
        DataError, match=r"token 320, and the model has embeddings for 320: .*--model.resize-embeddings"
    ):
        fit_embeddings(tiny_model("llama"), ROWS + 1, largest=ROWS, may_resize=False)


def test_a_configuration_in_parts_can_be_resized():
    model = tiny_model("gemma3")
    fit_embeddings(model, ROWS + 2, largest=ROWS + 1, may_resize=True)
    assert model(input_ids=torch.tensor([[5, ROWS + 1]])).logits.shape[-1] == ROWS + 2
