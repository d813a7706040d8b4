"""The house: imports only point down, siblings don't import each other, Horovod stays inside `world`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hvdtrain"

# Room -> layer, as in docs/design.md. A room is a top-level module or package.
LAYERS = {
    "__main__": 9,
    "cli": 8,
    "verbs": 7,
    "recipes": 6,
    "trainer": 5,
    "compat": 5,
    "world": 4,
    "rundir": 3,
    "data": 2,
    "models": 2,
    "optim": 2,
    "process": 1,
    "install": 1,
    "settings": 1,
    "errors": 0,
}
# One room may import another of its own layer where the table says so.
NEIGHBOURS = set()
# What two ranks run, by its path, at the end of a set-up.
RANK_OF_THE_CHECK = PACKAGE / "install" / "selfcheck.py"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = room_of(path)
    assert room in LAYERS, f"{room} has no layer: add it to the table"
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] in ("horovod", "mpi4py"):
            assert room == "world" or path == RANK_OF_THE_CHECK, f"{path} imports {name}"
        if parts[0] == "hvdtrain" and len(parts) > 1 and parts[1] in LAYERS and parts[1] != room:
            allowed = LAYERS[parts[1]] < LAYERS[room] or (room, parts[1]) in NEIGHBOURS
            assert allowed, f"{room} (layer {LAYERS[room]}) imports {name}"


def test_what_runs_before_torch_needs_the_standard_library_only():
    rooms = ("settings", "process", "install")
    files = [path for room in rooms for path in PACKAGE.glob(f"{room}/*.py")]
    for path in {*files, PACKAGE / "errors.py"} - {RANK_OF_THE_CHECK}:
        for module in imports_of(path):
            top = module.split(".")[0]
            assert top == "hvdtrain" or top in sys.stdlib_module_names, f"{path} imports {module}"


def test_importing_starts_neither_torch_nor_horovod():
    """Threads must be set before torch starts: `import hvdtrain` and the command line's head must not load it."""
    code = "import sys, hvdtrain, hvdtrain.cli; print(sorted({'torch', 'horovod', 'mpi4py'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_exist():
    code = "import hvdtrain; [getattr(hvdtrain, name) for name in hvdtrain.__all__]"
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)
