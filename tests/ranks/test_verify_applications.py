"""`verify` of adapters, preferences, translation and speech: all checks pass on one rank and on two, with dropout."""

import dataclasses

import pytest
from adapters import import_peft, make_place, settings
from test_sequences_ranks import ctc, seq2seq, write_files
from test_training import quiet
from test_verify import verified

from hvdtrain.recipes import load_recipe
from hvdtrain.recipes.given import apply
from hvdtrain.settings.values import Source

pytestmark = [pytest.mark.ranks(1, 2), pytest.mark.same_on_gloo, pytest.mark.filterwarnings("default")]
ADAPTERS = {"hf": "chats.jsonl", "dpo": "pairs.jsonl"}


def recipe_of(name, folder):
    if name in ADAPTERS:
        given = settings(folder, ADAPTERS[name], lora_rank=2, lora_dropout=0.1)
        return apply(load_recipe(name), [(given, Source("train()"))])
    made = {"seq2seq": seq2seq, "ctc": ctc}[name](folder)
    return dataclasses.replace(made, eval=dataclasses.replace(made.eval, samples=0))


@pytest.mark.parametrize("name", [*ADAPTERS, "seq2seq", "ctc"])
def test_every_check_passes(world, shared_dir, name):
    import_peft() if name in ADAPTERS else pytest.importorskip("soundfile")  # on all ranks
    if world.rank == 0:
        if name in ADAPTERS:
            make_place(shared_dir)
        else:
            write_files(shared_dir)
    world.barrier("files")
    recipe = recipe_of(name, shared_dir)
    rows = verified(world, shared_dir, recipe, recipe.build(quiet))
    assert [row for row in rows if row.status in ("FAIL", "warning")] == []
    assert {row.number for row in rows if row.status == "pass"} >= {1, 2, 3, 4, 6, 7, 8, 9, 10}
    (drawn,) = [row for row in rows if row.number == 9]
    assert drawn.figure == "belong to samples"
