"""Tiny models, conversations and preferences, and runs on them that train adapters."""

import json

import pytest
from hugging import import_transformers
from tiny_models import make_model


def import_peft():
    """Return peft; skips the test where it, or transformers, is not installed."""
    import_transformers()
    return pytest.importorskip("peft")


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def say(role, content):
    return {"role": role, "content": content}


def make_place(folder, family="llama"):
    """Write a model, conversations and preferences."""
    make_model(folder / "tiny", family)
    talks = [[say("user", f"hello {i}"), say("assistant", "world " * (i % 7 + 1))] for i in range(60)]
    write_lines(folder / "chats.jsonl", [{"messages": talk} for talk in talks])
    pairs = [
        {
            "prompt": [say("user", f"hello {i}")],
            "chosen": [say("assistant", "world " * (i % 5 + 1))],
            "rejected": [say("assistant", "you " * (i % 3 + 1))],
        }
        for i in range(60)
    ]
    write_lines(folder / "pairs.jsonl", pairs)
    return folder


def settings(folder, data="chats.jsonl", steps=6, **model):
    """Return settings of a small run, as `hvdtrain.train` takes them."""
    return {
        "model": {"path": str(folder / "tiny"), **model},
        "data": {
            "path": str(folder / data),
            "cache_dir": str(folder / "cache"),
            "sequence_length": 32,
            "val_fraction": 0.2,
        },
        "train": {"steps": steps, "global_batch_size": 6, "epochs": None},
        "optim": {"peak_lr": 1e-2},
        "checkpoint": {"every": 3},
        "eval": {"every": None},
    }
