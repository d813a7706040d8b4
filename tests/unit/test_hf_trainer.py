"""Ten steps of the recipe hf beside ten of transformers' own Trainer, on the same documents: the same losses."""

import dataclasses
import json
import os

import pytest
import torch
from families import tiny_model
from hugging import import_transformers
from templates import make_chat_tokenizer

import hvdtrain
from hvdtrain.data.order import SampleOrder
from hvdtrain.recipes.hf import DocumentsConfig, TransformersConfig, hf
from hvdtrain.settings import BatchPlan

transformers = import_transformers()
pytest.importorskip("accelerate")  # without it there is no Trainer
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # transformers' own are none of ours

STEPS, BATCH, LENGTH = 10, 6, 48
WORDS = ["hello", "world", "how", "are", "you", "where", "is", "it", "there", "1", "2", "3"]
SETTINGS = {
    "train": {"steps": STEPS, "global_batch_size": BATCH, "max_grad_norm": 1.0},
    "optim": {"peak_lr": 3e-3, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0},
    "log": {"every": 1},
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Put back the variables that a start sets for its process."""
    for name in ("HOROVOD_FUSION_THRESHOLD", "MKL_NUM_THREADS", "OMPI_MCA_mpi_yield_when_idle"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))


@pytest.mark.parametrize("family", ["mistral", "jamba"])  # packed, with windows of attention; one document a row
def test_ten_steps(family, tmp_path):
    tokenizer = make_chat_tokenizer("bytes", "chatml")
    tiny_model(family, vocab_size=420).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(3 + i % 17)) for i in range(200)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = {"path": str(tmp_path / "texts.jsonl"), "cache_dir": str(tmp_path / "cache"), "sequence_length": LENGTH}
    model = {"path": str(tmp_path / "model")}
    recipe = dataclasses.replace(hf(), data=DocumentsConfig(**data), model=TransformersConfig(**model))
    batches = global_batches(recipe)
    wanted = {(tokenizer.bos_token_id, *tokenizer(t)["input_ids"], tokenizer.eos_token_id) for t in texts}
    assert {document for batch in batches for document in batch} <= wanted
    hvdtrain.train(recipe, run_dir=tmp_path / "run", **SETTINGS)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ours = [line["train/loss"] for line in lines if "train/loss" in line]
    theirs = trained_by_transformers(tmp_path, batches)
    assert len(ours) == len(theirs) == STEPS
    assert ours == pytest.approx(theirs, abs=2e-4)
    assert ours[-1] < ours[0] - 0.5


def global_batches(recipe):
    """Return the documents of each step, as tuples of tokens."""
    samples = recipe.build(lambda text: None).train_data
    plan = BatchPlan(global_batch_size=BATCH, micro_batch_size=BATCH, accum_steps=1, world_size=1)
    order = SampleOrder(len(samples), plan, recipe.train.seed)
    batches = []
    for step in range(STEPS):
        tokens, targets, documents, _ = samples.batch(order.global_batch(step))
        batch = []
        for number in documents[documents >= 0].unique_consecutive().tolist():
            at = documents == number
            batch.append((*tokens[at].tolist(), int(targets[at][-1])))
        batches.append(batch)
    return batches


def trained_by_transformers(tmp_path, batches):
    """Return the loss of each step."""

    class Documents(transformers.Trainer):
        def get_train_dataloader(self):
            return [padded(batch) for batch in batches]

    arguments = transformers.TrainingArguments(
        output_dir=tmp_path / "theirs",
        max_steps=STEPS,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    trainer = Documents(model=model, args=arguments, train_dataset=batches)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def padded(batch):
    """Return a batch as transformers takes it: a document a row, filled up on the right."""
    length = max(map(len, batch))
    rows = torch.zeros(3, len(batch), length, dtype=torch.int64)
    rows[2] = -100
    for i, document in enumerate(batch):
        rows[0, i, : len(document)] = rows[2, i, : len(document)] = torch.tensor(document)
        rows[1, i, : len(document)] = 1
    return dict(zip(("input_ids", "attention_mask", "labels"), rows, strict=True))
