"""Preferences: what a record may be, the loss against the paper's formula, and the reference."""

import dataclasses
import json
import math
import os

import pytest
import torch
from adapters import make_place, settings, write_lines
from families import tiny_model
from hugging import import_transformers
from templates import make_chat_tokenizer
from tiny_models import make_tokenizer

import hvdtrain
from hvdtrain.data.text.chat import Conversation
from hvdtrain.data.text.formats import Completion, recognise_pair
from hvdtrain.data.text.windows import IGNORED
from hvdtrain.errors import ConfigError, DataError
from hvdtrain.recipes.dpo import DpoConfig, PairsConfig, Preferences, dpo
from hvdtrain.recipes.dpo_task import METRICS, DpoLoss
from hvdtrain.recipes.hf import TransformersConfig
from hvdtrain.recipes.transformers_models.probe import find_way
from hvdtrain.recipes.transformers_models.rows import row_log_probs

transformers = import_transformers()
pytestmark = pytest.mark.filterwarnings("default")  # transformers' own are none of ours


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Put back the variables that a start sets for its process."""
    for name in ("HOROVOD_FUSION_THRESHOLD", "MKL_NUM_THREADS", "OMPI_MCA_mpi_yield_when_idle"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))


@pytest.fixture
def place(tmp_path):
    return make_place(tmp_path)


def build(place, loss=None, model=None, said=None, **data):
    given = {"path": str(place / "pairs.jsonl"), "cache_dir": str(place / "cache"), "sequence_length": 48, **data}
    chosen = TransformersConfig(**{"path": str(place / "tiny"), **(model or {})})
    recipe = dataclasses.replace(dpo(), model=chosen, data=PairsConfig(**given), dpo=DpoConfig(**(loss or {})))
    return recipe.build((said if said is not None else []).append)


USER = {"role": "user", "content": "?"}
OTHER = {"role": "user", "content": "!"}
YES, NO = ({"role": "assistant", "content": text} for text in "yn")


@pytest.mark.parametrize(
    ("record", "prompt", "answers"),
    [
        ({"prompt": "a ", "chosen": "b", "rejected": "c"}, "a ", ["b", "c"]),
        ({"chosen": "so it is good", "rejected": "so it is gone"}, "so it is ", ["good", "gone"]),
        ({"chosen": "so", "rejected": "so far"}, "", ["so", "so far"]),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "", ["b", "c"]),
    ],
)
def test_pairs_of_texts(record, prompt, answers):
    name, *pair = recognise_pair(record)
    assert name == "pairs of texts"
    assert pair == [Completion(prompt, answer) for answer in answers]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": "?", "chosen": [USER, YES], "rejected": [USER, NO]},  # as UltraFeedback has it
        {"prompt": "?", "chosen": [YES], "rejected": [NO]},
        {"prompt": [USER], "chosen": "y", "rejected": "n"},
        {"prompt": [{"from": "human", "value": "?"}], "chosen": [YES], "rejected": [NO]},
    ],
)
def test_pairs_of_conversations(record):
    name, *pair = recognise_pair(record)
    assert name == "pairs of conversations"
    assert pair == [Conversation((USER, answer), (False, True)) for answer in (YES, NO)]


def test_answers_before_they_differ_are_the_prompt():
    talk = [USER, YES, USER]
    _, chosen, rejected = recognise_pair({"chosen": [*talk, YES], "rejected": [*talk, NO], "tools": '[{"a": 1}]'})
    assert chosen == Conversation((*talk, YES), (False, False, False, True), {"tools": [{"a": 1}]})
    assert rejected.is_learned == (False, False, False, True)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": []}, "'chosen', 'rejected' and mostly 'prompt', not messages"),
        ([1], "not a list"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"chosen": [USER, YES], "rejected": [USER, YES]}, "are the same"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "is empty"),
        ({"chosen": [USER, YES], "rejected": [USER, USER]}, "no message has the role 'assistant'"),
        ({"chosen": [USER, YES, USER], "rejected": [USER, YES]}, "the assistant says nothing"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "are texts, or lists of messages"),
        ({"prompt": [USER], "chosen": [], "rejected": [NO]}, "is not empty"),
        ({"chosen": [USER, YES], "rejected": [OTHER, NO]}, "differ in message 1, which is no answer"),
        ({"chosen": [USER, YES, USER, YES], "rejected": [USER, YES, OTHER, YES]}, "differ in message 3, which is no"),
        ({"prompt": [USER], "chosen": [{"content": "y"}], "rejected": [NO]}, "needs a 'role'"),
    ],
)
def test_what_is_no_preference(record, message):
    with pytest.raises(DataError, match=message):
        recognise_pair(record)


def test_a_batch_holds_both_answers_and_learns_only_them(place):
    task = build(place, chat_template=None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "tiny")
    records = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    wanted = set()
    for record in records:
        for answer in (record["chosen"], record["rejected"]):
            whole = tokenizer.apply_chat_template([*record["prompt"], *answer], return_dict=False)
            start = tokenizer.apply_chat_template(record["prompt"], add_generation_prompt=True, return_dict=False)
            wanted.add((tuple(whole[:-1]), tuple(whole[len(start) :])))
    found = []
    for data in (task.train_data, task.val_data):
        tokens, targets, numbers = data.batch(torch.arange(len(data)))
        assert tokens.shape == targets.shape == (len(data), 2, data.width)
        found += numbers.tolist()
        for row, aim in zip(tokens.flatten(0, 1).tolist(), targets.flatten(0, 1).tolist(), strict=True):
            end = max(i for i, target in enumerate(aim) if target != IGNORED) + 1
            assert (tuple(row[:end]), tuple(target for target in aim if target != IGNORED)) in wanted
            assert not any(row[end:])
    assert found == list(range(len(records)))


def test_long_pairs_are_cut_or_left_out_and_it_is_said(place):
    records = [{"prompt": "hello " * n, "chosen": "world " * 9, "rejected": "you"} for n in (1, 3, 200)]
    write_lines(place / "long.jsonl", records)
    short = {"prompt": "hello", "chosen": " world", "rejected": " you"}
    val = write_lines(place / "val.jsonl", [short])
    task = build(place, path=str(place / "long.jsonl"), val_path=val, sequence_length=8)
    assert len(task.train_data) == 2
    assert "cut:        2 pairs at the end, longer than 8 tokens" in task.description
    assert "left out:   1 pair whose prompt leaves no room for an answer" in task.description
    alike = {"prompt": "hello ", "chosen": "world " * 9 + "yes", "rejected": "world " * 9 + "no"}
    write_lines(place / "long.jsonl", [alike, *records])
    task = build(place, path=str(place / "long.jsonl"), val_path=val, sequence_length=8)
    assert len(task.train_data) == 2  # answers that are the same as far as they are read prefer nothing
    assert "cut:        2 pairs at the end, longer than 8 tokens" in task.description
    assert "left out:   1 pair whose answers differ only behind 8 tokens" in task.description
    write_lines(place / "long.jsonl", [{**short, "rejected": " world"}, short])
    with pytest.raises(DataError, match=r"long\.jsonl, line 1: 'chosen' and 'rejected' are the same"):
        build(place, path=str(place / "long.jsonl"), val_path=val)
    task = build(place, path=str(place / "long.jsonl"), val_path=val, on_error="skip")
    assert "left out:   1 record that cannot be used" in task.description


def by_the_paper(policy, reference, batch, beta, smoothing):
    """Return the loss of equation 7 of arXiv:2305.18290, a mean, and rewards: one answer after the other, in fp64."""
    tokens, targets, _ = batch

    def log_prob(model, i, which):
        aim = targets[i, which]
        end = int((aim != IGNORED).nonzero().max()) + 1
        logits = model(input_ids=tokens[i, which, :end][None]).logits[0]
        steps = logits.log_softmax(-1)
        return sum(steps[t, aim[t]] for t in range(end) if aim[t] != IGNORED)

    losses, rewards = [], []
    for i in range(len(tokens)):
        ratios = [log_prob(policy, i, which) - log_prob(reference, i, which).detach() for which in (0, 1)]
        h = beta * (ratios[0] - ratios[1])
        right, wrong = (-torch.log(1 / (1 + torch.exp(-sign * h))) for sign in (1, -1))
        losses.append((1 - smoothing) * right + smoothing * wrong)
        rewards.append([beta * float(ratio.detach()) for ratio in ratios])
    return torch.stack(losses).mean(), torch.tensor(rewards, dtype=torch.float64)


@pytest.mark.parametrize(("beta", "smoothing", "is_chunked"), [(0.1, 0.0, False), (0.7, 0.2, True)])
def test_loss_and_gradient_are_those_of_the_paper(place, beta, smoothing, is_chunked, monkeypatch):
    if is_chunked:  # then logits of a few positions exist at a time
        monkeypatch.setattr(row_log_probs, "__defaults__", (4 * 300 * 5,))
    task = build(place, {"beta": beta, "label_smoothing": smoothing})
    loss = task.loss_sums
    assert loss.head is not None
    reference, policy = task.model.double(), build(place).model.double()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    batch = task.train_data.batch(torch.arange(7))
    with torch.no_grad():
        loss.reference[batch[2]] = loss.log_probs(reference, batch).double()
    sums = loss(policy, batch)
    assert sums.keys() == set(METRICS) == set(task.metrics)
    (sums["loss"] / 7).backward()
    ours = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    expected, rewards = by_the_paper(policy, reference, batch, beta, smoothing)
    expected.backward()
    assert float(sums["loss"].detach()) / 7 == pytest.approx(float(expected.detach()), rel=1e-9)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-7, atol=1e-10)
    margins = rewards[:, 0] - rewards[:, 1]
    assert int(sums["reward_accuracy"]) == int((margins > 0).sum())
    values = {"reward_margin": margins, "chosen_reward": rewards[:, 0], "rejected_reward": rewards[:, 1]}
    for name, value in values.items():
        assert float(sums[name]) == pytest.approx(float(value.sum()), rel=1e-7)


def test_loss_and_accuracy_are_those_of_trl(place, monkeypatch):
    """Where TRL is installed, which hvdtrain needs for nothing else."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.fingerprint.Hasher.hash", lambda *args: "0")  # of a whole trainer: not all pickle
    task = build(place, {"beta": 0.3})
    with torch.no_grad():
        for i, parameter in enumerate(task.model.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    reference = transformers.AutoModelForCausalLM.from_pretrained(place / "tiny")
    records = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    write_lines(place / "first.jsonl", records[:8])
    val = write_lines(place / "val.jsonl", records[8:10])
    task = dataclasses.replace(task, train_data=build(place, path=str(place / "first.jsonl"), val_path=val).train_data)
    batch = task.train_data.batch(torch.arange(8))
    loss = task.loss_sums
    with torch.no_grad():
        loss.reference[batch[2]] = loss.log_probs(reference, batch).double()
        ours = loss(task.model, batch)
    where = {"output_dir": str(place / "trl"), "report_to": [], "use_cpu": True, "bf16": False}
    config = trl.DPOConfig(beta=0.3, per_device_eval_batch_size=8, max_length=None, **where)
    trainer = trl.DPOTrainer(
        model=task.model,
        ref_model=reference,
        args=config,
        train_dataset=datasets.Dataset.from_list(records[:8]),
        eval_dataset=datasets.Dataset.from_list(records[:8]),
        processing_class=transformers.AutoTokenizer.from_pretrained(place / "tiny"),
    )
    theirs = trainer.evaluate()
    assert theirs["eval_loss"] == pytest.approx(float(ours["loss"]) / 8, rel=1e-4)
    assert theirs["eval_rewards/accuracies"] == pytest.approx(float(ours["reward_accuracy"]) / 8)
    assert theirs["eval_rewards/margins"] == pytest.approx(float(ours["reward_margin"]) / 8, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])  # a capped head of its own; a model that draws random numbers
def test_rows_by_parts_of_the_head_are_those_of_all_logits(family):
    model = tiny_model(family).double()
    pool = torch.arange(5, 300)
    way = find_way(model, pool, 24, ())
    assert way.loss.head is not None
    model.eval()
    tokens = torch.randint(5, 300, (4, 24), generator=torch.Generator().manual_seed(0))
    is_target = torch.rand(4, 24, generator=torch.Generator().manual_seed(1)) < 0.5
    targets = tokens.roll(-1, 1).where(is_target, IGNORED)
    whole = row_log_probs(model, None, tokens, targets)
    parts = row_log_probs(model, way.loss.head, tokens, targets, loss_bytes=4 * 320 * 7)
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)
    assert whole.shape == (4,)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_rows_do_not_keep_a_gradient_of_the_head_each(place, is_frozen):
    task = build(place)
    model, head = task.model, task.loss_sums.head
    weight = model.get_output_embeddings().weight
    assert head.is_linear
    weight.requires_grad_(not is_frozen)
    tokens, targets, _ = task.train_data.batch(torch.arange(3))
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = row_log_probs(model, head, tokens[:, 0], targets[:, 0], loss_bytes=4 * len(weight) * 5)
    assert not [tensor for tensor in kept if tensor.shape == weight.shape and tensor.data_ptr() != weight.data_ptr()]
    found[0].backward()  # of one row alone
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    row_log_probs(model, None, tokens[:1, 0], targets[:1, 0]).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_before_the_first_step_nothing_is_preferred(place):
    given = settings(place, "pairs.jsonl", steps=1)
    given["optim"]["peak_lr"] = 1e-12
    result = hvdtrain.train("dpo", run_dir=place / "run", **given)
    assert result.metrics["val/loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(result.metrics["val/reward_margin"]) < 1e-3


def test_preferences_are_learned_and_the_model_is_exported(place):
    given = settings(place, "pairs.jsonl", steps=25)
    result = hvdtrain.train("dpo", run_dir=place / "run", **given)
    assert result.metrics["val/loss"] < 0.3
    assert result.metrics["val/reward_accuracy"] == 1
    assert result.metrics["val/reward_margin"] > 1


def test_the_reference_does_not_depend_on_how_pairs_are_cut_into_rows(place):
    task = build(place)
    loss = task.loss_sums
    with torch.no_grad():
        together = loss.log_probs(task.model, task.train_data.batch(torch.arange(9)))
        alone = [loss.log_probs(task.model, task.train_data.batch(torch.tensor([i]))) for i in range(9)]
        loss.draws = True
        in_two = loss.log_probs(task.model, task.train_data.batch(torch.arange(9)))
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(in_two, together, rtol=1e-5, atol=1e-4)


def test_settings_and_data_that_do_not_fit(place):
    for recipe, message in (
        (Preferences(), r"give --model\.path: preferences are learned"),
        (Preferences(model=TransformersConfig(path="x")), r"give --data\.path: records"),
    ):
        with pytest.raises(ConfigError, match=message):
            recipe.build(print)
    (place / "text.txt").write_text("hello world")
    with pytest.raises(DataError, match=r"text\.txt holds a text: preferences are records"):
        build(place, path=str(place / "text.txt"), val_path=str(place / "pairs.jsonl"))
    with pytest.raises(DataError, match="no training pair fits into 3 tokens"):
        build(place, sequence_length=3)
    tokenizer = make_chat_tokenizer("bytes", "thoughts_dropped")
    tokenizer.save_pretrained(place / "thoughts")
    talk = [USER, YES, USER, YES]
    two = write_lines(place / "two.jsonl", [{"chosen": talk, "rejected": [USER, NO, USER, NO]}])
    with pytest.raises(DataError, match="leaves something out of earlier answers"):
        build(place, path=two, val_path=two, tokenizer=str(place / "thoughts"))


def test_a_balancing_loss_is_refused(place):
    model = tiny_model("mixtral", vocab_size=320, output_router_logits=True)
    model.save_pretrained(place / "moe")
    make_tokenizer(place / "moe")
    with pytest.raises(ConfigError, match="set output_router_logits to false"):
        build(place, model={"path": str(place / "moe")})


def test_a_loss_knows_its_pairs():
    loss = DpoLoss(DpoConfig(), None, False, 3)
    assert loss.reference.shape == (3, 2)
    assert bool(loss.reference.isnan().all())  # what is not known makes no loss that could be taken for one
