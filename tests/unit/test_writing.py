"""Text from models of transformers: each next token is the one that the whole text before it makes likeliest."""

import pytest
import torch
from families import tiny_model
from hugging import import_transformers
from templates import make_chat_tokenizer

from hvdtrain.errors import ConfigError, DataError
from hvdtrain.models.sampling import Sampling
from hvdtrain.recipes.transformers_models.loading import write_model_files
from hvdtrain.recipes.transformers_models.writing import most_tokens
from hvdtrain.rundir.trained import Trained
from hvdtrain.verbs.generate import open_writer

import_transformers()
pytestmark = pytest.mark.filterwarnings("default")  # transformers' own are none of ours
ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
MODELS = {
    "llama": {"rope_parameters": ROPE},
    "mistral": {},  # with a window
    "gpt2": {},
    "marian": {},
    "mamba": {},
    "jamba": {},
}


def trained(tmp_path, family, template="chatml", **settings):
    """Return a model as a run has it, its weights far from uniform."""
    model = tiny_model(family, vocab_size=420, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 10)
    write_model_files(tmp_path, model, make_chat_tokenizer("bytes", template))
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return Trained(tmp_path, weights, "a run"), model.eval()


def write(writer, prompt, number, how, use_cache=True):
    drawn = []
    writer.write([prompt], number, how, lambda row, token: drawn.append(token), use_cache)
    return drawn


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", MODELS)
def test_the_likeliest_token_of_the_whole_text(family, use_cache, tmp_path):
    run, model = trained(tmp_path, family, **MODELS[family])
    drawn = write(open_writer(run, False), "hello world", 9, Sampling(temperature=0), use_cache)
    tokenizer = make_chat_tokenizer("bytes", "chatml")
    tokens = [tokenizer.bos_token_id, *tokenizer("hello world")["input_ids"]]
    with torch.no_grad():
        for token in drawn:
            logits = model(input_ids=torch.tensor([tokens])).logits[0, -1]
            assert logits[token] >= logits.max() - 1e-4
            tokens.append(token)
        if len(drawn) < 9:
            logits = model(input_ids=torch.tensor([tokens])).logits[0, -1]
            ends = {tokenizer.eos_token_id, model.config.get_text_config().eos_token_id}
            assert int(logits.argmax()) in ends


def test_the_seed_decides(tmp_path):
    writer = open_writer(trained(tmp_path, "gpt2")[0], False)
    state = torch.get_rng_state()
    first, again, other = (write(writer, "hello", 12, Sampling(seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(state, torch.get_rng_state())


def test_an_answer_ends_where_training_has_ended_it(tmp_path):
    run, _ = trained(tmp_path, "llama", "next_ends")
    tokenizer = make_chat_tokenizer("bytes", "next_ends")
    seen = []
    writer = open_writer(run, True)
    end = tokenizer.convert_tokens_to_ids("<|user|>")

    def always_the_end(module, args, output):
        seen.append(args[0].shape[1])
        output[..., end] = 99.0
        return output

    writer._model.get_output_embeddings().register_forward_hook(always_the_end)
    assert write(writer, "hello", 9, Sampling(temperature=0)) == []
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True)
    assert seen[0] in (1, len(asked["input_ids"]))


def test_a_chat_needs_a_template(tmp_path):
    run, model = trained(tmp_path, "llama")
    tokenizer = make_chat_tokenizer("bytes", "chatml")
    tokenizer.chat_template = None
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    write_model_files(tmp_path, model, tokenizer)
    with pytest.raises(ConfigError, match="--chat needs a chat template, and a run has none"):
        open_writer(run, True)


def test_weights_that_do_not_fit(tmp_path):
    run, _ = trained(tmp_path, "llama")
    run.weights.pop("model.norm.weight")
    with pytest.raises(DataError, match=r"the weights of a run do not fit its config\.json: model\.norm\.weight"):
        open_writer(run, False)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neo", "marian", "llama", "bloom", "gptj"])
def test_a_table_of_positions_ends_the_text_and_not_the_process(family, use_cache, tmp_path, capsys):
    """What has a table is known by its behaviour: it fails beyond, and up to there it does not."""
    run, model = trained(tmp_path, family)
    writer, most = open_writer(run, False), most_tokens(model)
    known = model.config.get_text_config().max_position_embeddings if family != "bloom" else 64
    assert most in (None, known)
    tokens = torch.ones(1, known + 3, dtype=torch.int64)
    if most is None:
        with torch.no_grad():
            model(input_ids=tokens)
        return
    with torch.no_grad():
        model(input_ids=tokens[:, :most])
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=tokens)
    drawn = []
    count = writer.write(["hello"], 10 * most, Sampling(temperature=1.0), lambda row, t: drawn.append(t), use_cache)
    assert count <= most
    if "ends where the model has no more positions, of which it has" in capsys.readouterr().err:
        assert count == most + 1 - len(writer._encode("hello"))
    with pytest.raises(ConfigError, match=f"tokens, and the model has positions for {most:,}: shorten it"):
        writer.write(["hi", "x" * (most + 1)], 3, Sampling(), lambda row, token: pytest.fail("too late"), use_cache)
