"""What only a GPU runs must not rot meanwhile: names, arguments and flags that it uses are there."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"
FILES = [*sorted((REPOSITORY / "tests" / "gpu").glob("*.py")), *sorted(BENCHMARKS.glob("*.py"))]


def imported(tree):
    """Yield what is imported of hvdtrain anywhere in a file: the name that it has there, and what it is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "hvdtrain":
            module = importlib.import_module(node.module)
            for alias in node.names:
                try:
                    found = getattr(module, alias.name)
                except AttributeError:
                    found = importlib.import_module(f"{node.module}.{alias.name}")
                yield alias.asname or alias.name, found
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "hvdtrain":
                    yield alias.asname or alias.name.partition(".")[0], importlib.import_module(alias.name)


def wrong_uses(tree, names):
    """Yield uses of what was imported that fail: attributes of modules that are not there, arguments not taken."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = names.get(node.value.id)
            if inspect.ismodule(owner) and not hasattr(owner, node.attr):
                yield f"line {node.lineno}: {node.value.id}.{node.attr} is not there"
        if not isinstance(node, ast.Call):
            continue
        function = names.get(node.func.id) if isinstance(node.func, ast.Name) else None
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            owner = names.get(node.func.value.id)
            function = getattr(owner, node.func.attr, None) if inspect.ismodule(owner) else None
        is_open = any(isinstance(argument, ast.Starred) for argument in node.args)
        is_open |= any(keyword.arg is None for keyword in node.keywords)
        if not callable(function) or is_open:
            continue
        try:
            signature = inspect.signature(function)
        except ValueError:  # of C
            continue
        try:
            signature.bind(*node.args, **{keyword.arg: keyword.value for keyword in node.keywords})
        except TypeError as error:
            yield f"line {node.lineno}: {ast.unparse(node.func)}: {error}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_what_a_file_takes_of_hvdtrain_is_there(file):
    tree = ast.parse(file.read_text())
    names = dict(imported(tree))
    assert [*wrong_uses(tree, names)] == []


def test_a_wrong_use_is_found():
    """The two that were there: an argument that has another name by now, and a module that has gone."""
    tree = ast.parse("from hvdtrain.trainer.randomness import MicroBatchRandomness as M\nM('cuda', compiled=None)")
    assert "compiled" in next(wrong_uses(tree, dict(imported(tree))))
    with pytest.raises(ModuleNotFoundError):
        dict(imported(ast.parse("def f():\n    from hvdtrain.verbs.bench.flops import data_sheet_peak")))


def checks():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("gpu_checks").CHECKS
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_flags_of_the_benchmarks_that_are_checked_are_there():
    ours = [check for check in checks() if check.words[0].startswith("benchmarks/")]
    assert len(ours) == 5
    for check in ours:
        text = (REPOSITORY / check.words[0]).read_text()
        flags = [word for word in check.words if word.startswith("--")]
        assert [flag for flag in flags if f'"{flag}"' not in text] == [], check.name


def test_every_test_for_a_gpu_belongs_to_one_check():
    """So that what is added has a place in the order of worth, and nothing is run twice on a card that is lent."""
    from _pytest.mark.expression import Expression

    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False).stdout
    found = re.findall(r"^tests/gpu/(test_\w+\.py)::(\S+)$", listed, re.MULTILINE)
    assert len(found) > 30, listed
    chosen = {name: [] for name in found}
    for check in checks():
        if "pytest" not in check.words:
            continue
        file, which = check.words[-3].rpartition("/")[2], Expression.compile(check.words[-1])
        own = [(of, name) for of, name in found if of == file and which.evaluate(lambda word, name=name: word in name)]
        assert own, f"{check.name} runs nothing"
        for test in own:
            chosen[test].append(check.name)
    assert {test: names for test, names in chosen.items() if len(names) != 1} == {}
