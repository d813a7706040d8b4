"""Run every example as a rank: scripts as they are, recipes for a few steps."""

import importlib.util
import runpy
import sys
from pathlib import Path

import hvdtrain

folder = Path(sys.argv[1])
# Name -> its arguments, for a script; its settings, for a recipe. Also the names that a test holds against the folder.
SCRIPTS = {"line": [], "gan": ["gan.pt"], "own_loop": ["state.pt"], "horovod_script": []}
RECIPES = {
    "images": {"train": {"epochs": 1}},
    "reversing": {"train": {"steps": 30}},
    "own_optimizer": {"train": {"steps": 100}},
    "keras_model": {"train": {"steps": 60}},
}
NEEDS = {"keras_model": "keras"}

if __name__ == "__main__":
    for name, arguments in SCRIPTS.items():
        sys.argv = [name, *arguments]
        runpy.run_path(str(folder / f"{name}.py"), run_name="__main__")
    for name, settings in RECIPES.items():
        if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
            continue
        result = hvdtrain.train(folder / f"{name}.py", run_dir=name, **settings)
        if hvdtrain.init().rank == 0:
            print(name, result.metrics)
