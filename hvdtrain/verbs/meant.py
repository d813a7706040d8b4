"""What someone means who writes a verb that there is not."""

from __future__ import annotations

from hvdtrain.settings import nearest
from hvdtrain.settings.units import shortened
from hvdtrain.verbs.table import VERB_SYNONYMS, VERBS

# Words that stand for no verb -> what to write instead.
_ELSEWHERE = {
    "python python3 exec": "a program with a loop of its own is started by a launcher: horovodrun -np 2 python"
    " train.py, or hvdtrain -np 2 python train.py",
    "launch horovodrun mpirun mpiexec srun torchrun accelerate deepspeed": (
        "the launcher comes first: horovodrun -np 4 python -m hvdtrain train lm; on this machine also hvdtrain -np 4"
        " train lm"
    ),
    "list ls recipes models verbs commands": "python -m hvdtrain --help names verbs and recipes",
    "config settings options defaults": (
        "settings are named by python -m hvdtrain train lm --help, and printed by train lm --print-config"
    ),
    "kill stop cancel": "Ctrl-C, or SIGTERM to the launcher, has a run save and end",
    "login download clean rm": "there is nothing of the kind: runs are directories, and data are files of yours",
}
_ADVICE = {word: advice for words, advice in _ELSEWHERE.items() for word in words.split()}
BEFORE_THE_REST = ("setup", "supervise")
"""Verbs that need neither torch nor Horovod, and are answered before the others are looked at."""


def is_recipe(name: str) -> bool:
    """Return whether a word names a recipe, or could be the file of one."""
    from hvdtrain.recipes import RECIPES

    return name in RECIPES or name.endswith(".py")


def meant_verb(name: str) -> str:
    """Return which verb someone may mean, by its meaning or its letters, to follow `there is no verb 'name'`."""
    if is_recipe(name):
        return f"; did you mean 'train {shortened(name)}'?"
    if name.lower() in _ADVICE:
        return f": {_ADVICE[name.lower()]}"
    by_meaning = [verb for verb, words in VERB_SYNONYMS.items() if name.lower() in words.split()]
    return f"; did you mean '{by_meaning[0]}'?" if by_meaning else nearest(name, {*VERBS, *BEFORE_THE_REST})
