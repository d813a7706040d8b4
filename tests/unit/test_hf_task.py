"""The task of the recipe hf as a whole, on tiny models and data."""

import json
import math
import os

import pytest
import torch
from families import tiny_model
from hugging import import_transformers
from templates import make_chat_tokenizer
from tiny_models import make_config

import hvdtrain
from hvdtrain.errors import ConfigError, DataError
from hvdtrain.recipes.hf import ChatEvalConfig, DocumentsConfig, Transformers, TransformersConfig, hf
from hvdtrain.recipes.transformers_models.loading import check_length, load_model, load_tokenizer
from hvdtrain.rundir.trained import open_trained

import_transformers()
pytestmark = pytest.mark.filterwarnings("default")  # transformers' own are none of ours


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Put back the variables that a start sets for its process."""
    for name in ("HOROVOD_FUSION_THRESHOLD", "MKL_NUM_THREADS", "OMPI_MCA_mpi_yield_when_idle"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))


@pytest.fixture
def place(tmp_path):
    model = tiny_model("llama", vocab_size=420)
    model.save_pretrained(tmp_path / "model")
    make_chat_tokenizer("bytes", "chatml").save_pretrained(tmp_path / "model")
    with (tmp_path / "chats.jsonl").open("w") as file:
        for i in range(60):
            talk = [{"role": "user", "content": f"hello {i}"}, {"role": "assistant", "content": "world " * (i % 9 + 1)}]
            file.write(json.dumps({"messages": talk}) + "\n")
        long = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "1 2 3 " * 60}]
        file.write(json.dumps({"messages": long}) + "\n")
    return tmp_path


def build(place, said=None, evaluation=None, **data):
    config = DocumentsConfig(
        **{"path": str(place / "chats.jsonl"), "cache_dir": str(place / "cache"), "sequence_length": 48, **data}
    )
    asked = ChatEvalConfig(**evaluation or {})
    recipe = Transformers(model=TransformersConfig(path=str(place / "model")), data=config, eval=asked)
    return recipe.build((said if said is not None else []).append)


def test_a_task_says_what_it_is(place):
    task = build(place)
    lines = task.description.splitlines()
    assert lines[1:3] == [
        "formats:    61 messages",
        "cut:        1 conversation at the end, longer than a sample of 48 tokens",
    ]
    assert lines[3].startswith("documents:  packed; each comes out as it does alone")
    assert len(lines) == 4
    batch = task.train_data.batch(torch.arange(2))
    loss = task.loss_sums(task.model, batch)["loss"]
    count = task.train_data.num_targets(torch.arange(2))
    assert 4 < float(loss.detach()) / count < 8


def test_bits_per_byte(place):
    lines = (place / "chats.jsonl").read_text().splitlines()[:60]
    (place / "short.jsonl").write_text("\n".join(lines))
    task = build(place, val_path=str(place / "short.jsonl"), sequence_length=128)
    num_bytes = sum(len("world " * (i % 9 + 1)) + len("<|im_end|>") for i in range(60))
    assert task.val_data.num_bytes == num_bytes
    means = task.summarize({"loss": 2.0})
    assert means["bits_per_byte"] == pytest.approx(2.0 * task.val_data.num_tokens / num_bytes / math.log(2))
    assert means["perplexity"] == pytest.approx(math.exp(2))


def test_a_template_from_a_file_is_exported(place):
    tokenizer = make_chat_tokenizer("bytes", "chatml")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(place / "bare")
    with pytest.raises(ConfigError, match=r"give --data\.chat-template FILE"):
        build(place, tokenizer=str(place / "bare"))
    (place / "chat.jinja").write_text(make_chat_tokenizer("bytes", "lines").chat_template)
    task = build(place, tokenizer=str(place / "bare"), chat_template=place / "chat.jinja")
    task.write_model_files(place)
    exported = import_transformers().AutoTokenizer.from_pretrained(place)
    assert exported.chat_template == (place / "chat.jinja").read_text()


def test_questions_are_asked_by_the_template(place):
    tokenizer = make_chat_tokenizer("bytes", "chatml")
    questions = [
        {"context": "hello", "choices": ["world", "there"], "answer": 0},
        {
            "context": [{"role": "system", "content": "1"}, {"role": "user", "content": "2"}],
            "choices": ["3"],
            "answer": 0,
        },
    ]
    (place / "q.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (asked,) = build(place, evaluation={"choices": place / "q.jsonl", "chat": True}).evaluations
    for i, question in enumerate(questions):
        context = question["context"]
        talk = context if isinstance(context, list) else [{"role": "user", "content": context}]
        talk = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        tokens, targets, _, _ = asked.data.batch(torch.tensor([i]))
        assert tokens[0, 0, : len(talk)].tolist() == talk
        assert targets[0, 0, len(talk) - 1 :].tolist() == tokenizer(question["choices"][0])["input_ids"]
        assert (targets[0, 0, : len(talk) - 1] == -100).all()
    assert ("chat", "it says how --eval.choices are asked") in ChatEvalConfig(chat=True).unused()


def test_samples_are_shown_first(place):
    said = []
    build(place, said, show=1)
    assert "|[1][ 2][ 3][ ][1]" in said[-1]  # the longest


def test_a_folder_without_records_takes_no_text_field(place):
    (place / "texts").mkdir()
    for name in "ab":
        (place / "texts" / f"{name}.txt").write_text("hello world, how are you " * 9)
    with pytest.raises(ConfigError, match=r"--data\.text-field has no effect"):
        build(place, path=str(place / "texts"), text_field="body")
    assert "2 text files" in build(place, path=str(place / "texts")).description
    # One that is cut in two is one.
    assert "formats:    1 text file\n" in build(place, path=str(place / "texts" / "a.txt")).description


def test_records_that_are_left_out_are_counted(place):
    with (place / "chats.jsonl").open("a") as file:
        file.write('{"other": 1}\n')
    with pytest.raises(DataError, match=r"chats\.jsonl, line 62: the fields other are those of no format"):
        build(place)
    assert "left out:   1 record that cannot be used, such as" in build(place, on_error="skip").description


def test_what_is_not_learned_is_counted(place):
    """Texts of no length, answers behind the end of a sample, and those that are not to be learned."""
    asked, answer = {"role": "user", "content": "hello " * 60}, {"role": "assistant", "content": "world"}
    with (place / "chats.jsonl").open("a") as file:
        for record in ({"messages": [asked, answer]}, {"text": ""}, {"text": ""}):
            file.write(json.dumps(record) + "\n")
        silent = [{"role": "user", "content": "a"}, {**answer, "weight": 0}]
        file.write(json.dumps({"messages": silent}) + "\n")
    lines = build(place).description.splitlines()
    assert lines[1:6] == [
        "formats:    62 messages",
        "cut:        1 conversation at the end, longer than a sample of 48 tokens",
        "left out:   1 conversation of which what is learned comes behind 48 tokens: a larger --data.sequence-length"
        " has room for it",
        "left out:   2 empty texts",
        "left out:   1 conversation without an answer to learn",
    ]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            [{"prompt": f"hello {i} " * 60, "completion": "world"} for i in range(9)],
            r"of \d conversations comes behind the 48 tokens of a sample: give a larger --data\.sequence-length",
        ),
        ([{"text": "hello"}] * 9, "there are none, as where all records are alike"),
    ],
)
def test_why_nothing_is_left_to_predict(place, records, message):
    (place / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(DataError, match=message):
        build(place, val_fraction=0.3)


def test_a_file_that_is_no_template_is_told(place):
    """Of what it writes for every conversation, nothing but its end was learned."""
    (place / "words.txt").write_text("no template at all")
    with pytest.raises(ConfigError, match="does not write what the assistant says"):
        build(place, chat_template=place / "words.txt")


def trained(place, family, micro_batch_size, precision, **settings):
    """Return the weights after a few steps, and the lines of metrics."""
    folder = place / family
    if not folder.exists():
        model = tiny_model(family, vocab_size=420, **settings)
        model.save_pretrained(folder)
        make_chat_tokenizer("bytes", "chatml").save_pretrained(folder)
    data = {"path": str(place / "chats.jsonl"), "cache-dir": str(place / "cache"), "sequence-length": 48}
    batch = {"steps": 3, "global-batch-size": 6, "micro-batch-size": micro_batch_size, "precision": precision}
    run_dir = place / f"run-{family}-{micro_batch_size}"
    hvdtrain.train(
        hf(),
        run_dir=run_dir,
        data=data,
        model={"path": str(folder)},
        train=batch,
        optim={"peak-lr": 1e-2, "name": "sgd"},
        log={"every": 1},
    )
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return open_trained(run_dir, "latest").weights, lines


@pytest.mark.parametrize(
    ("family", "precision", "settings"),
    [
        ("llama", "fp64", {"attention_dropout": 0.2}),  # packed, with random numbers
        ("marian", "fp64", {}),  # in rows, with random numbers
        ("jamba", "fp32", {"output_router_logits": True}),  # in rows, with a balancing loss; experts have no fp64
        ("gemma2", "fp64", {}),  # packed, capped logits
    ],
)
def test_it_does_not_matter_how_a_batch_is_cut(place, family, precision, settings):
    whole, lines = trained(place, family, 6, precision, **settings)
    cut, again = trained(place, family, 2, precision, **settings)
    tolerance = 1e-6 if precision == "fp64" else 1e-3
    moved = 0.0
    start = import_transformers().AutoModelForCausalLM.from_pretrained(place / family).state_dict()
    for name, tensor in whole.items():
        if tensor.is_floating_point():
            change = float((tensor - start[name].double()).norm()) if name in start else 0.0
            moved = max(moved, change)
            assert float((tensor - cut[name]).norm()) <= 1e-9 + tolerance * change, name
    assert moved > 1e-3
    first, second = ([line["train/loss"] for line in part if "train/loss" in line] for part in (lines, again))
    assert first == pytest.approx(second, rel=tolerance)
    assert ("train/balance_loss" in lines[0]) == ("output_router_logits" in settings)
    assert "val/bits_per_byte" in lines[-1]


def test_a_sample_longer_than_the_model_says_how_long_it_may_be():
    """As of a model of `lm`, which was exported, with the default length of `hf`."""
    model = import_transformers().AutoModelForCausalLM.from_config(make_config("llama"))
    check_length(model, 64)
    with pytest.raises(ConfigError, match=r"more than the 64 positions of the model: give --data\.sequence-length 64,"):
        check_length(model, 512)


def test_what_is_no_model_is_told_apart(tmp_path):
    """A run's own directory, a folder of something else, a wrong path: "give --data.tokenizer" was all."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    for name, says in (
        ("run", r"it is a run's directory: python -m hvdtrain export .*run writes a model to .*run/export"),
        ("run/checkpoints", r"it is no model of transformers: there is no config.json in it"),
        ("file", "it is a file"),
        ("nowhere", "there is no such directory; as a name on the hub: "),
    ):
        with pytest.raises(
            DataError, match=f"no tokenizer comes from .*{says}.*: name a model, or give --data.tokenizer"
        ):
            load_tokenizer(str(tmp_path / name))
        with pytest.raises(DataError, match=f"no model comes from .*{says}"):
            load_model(str(tmp_path / name), None, "auto", 0)
