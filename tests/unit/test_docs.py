"""README and docs/ cannot lie: their code runs, their commands parse, their figures and links are there."""

import importlib
import json
import os
import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pages
import pytest

import hvdtrain
from hvdtrain import cli
from hvdtrain.errors import UsageError
from hvdtrain.install.__main__ import parse as parse_setup
from hvdtrain.optim.table import all_settings
from hvdtrain.process import supervise
from hvdtrain.recipes import RECIPES, load_recipe
from hvdtrain.settings.flags import known_flags

DOCS = pages.ROOT / "docs"
RESULTS = pages.ROOT / "benchmarks" / "results"
LANGUAGES = {"python", "bash", "toml", "text", "{toctree}", "{eval-rst}"}
GENERATED = {
    "{presets}",
    "{short-names}",
    "{shared-settings}",
    "{optimizer-settings}",
    "{recipe-settings}",
    "{verb-options}",
    "{program-options}",
    "{messages}",
}
# Their blocks are one program each, which tests of their own run: on several ranks, too.
RUN_ELSEWHERE = {"docs/extend.md", "docs/own-loop.md"}
OTHER_PROGRAMS = {"git", "cd", ".", "pip", "tensorboard", "docker", "kubectl", "apptainer", "torchrun"}
LAUNCHERS = {"horovodrun", "mpirun", "docker"}
every_page = pytest.mark.parametrize("page", pages.PAGES, ids=pages.name_of)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Be in a folder with the files that the pages speak of, and put back what a start sets for its process."""
    for name in ("HOROVOD_FUSION_THRESHOLD", "MKL_NUM_THREADS", "OMPI_MCA_mpi_yield_when_idle"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))
    monkeypatch.chdir(tmp_path)
    for name in ("runs/mine", "runs/a", "runs/b", "runs/c", "runs/rates", "my_text", "model", "plan", "clips"):
        Path(name).mkdir(parents=True)
    for name in ("my_loop.py", "held_out.txt", "train.bin", "val.bin", "chats.jsonl", "pairs.jsonl", "pairs.tsv"):
        Path(name).touch()
    for name in ("questions.jsonl",):
        Path(name).touch()
    Path("photos/val/cat").mkdir(parents=True)
    Path("photos/val/cat/9.jpg").touch()
    Path("docs").symlink_to(DOCS)
    Path("my_recipe.py").write_text("import hvdtrain\n\n\ndef recipe():\n    return hvdtrain.Recipe()\n")
    Path("settings.toml").write_text("[train]\nsteps = 2000\n")
    Path("runs/mine/config.toml").write_text("[train]\nsteps = 2000\n")
    sizes = {
        "vocab_size": 257,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 64,
    }
    Path("model/config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    return tmp_path


@every_page
def test_blocks_have_a_language_that_is_tested(page):
    for block in pages.blocks_of(page):
        assert block.language.split(" ")[0] in LANGUAGES | GENERATED, block
    assert not re.search(r"\n\n {4}\S", pages.prose_of(page)), "an indented block of code: nothing tests it"


@every_page
def test_python_is_run(page, folder, monkeypatch):
    blocks = pages.blocks_of(page, "python")
    for block in blocks:
        compile(block.code, str(block), "exec")
        check_names(block.code, block)
    if pages.name_of(page) in RUN_ELSEWHERE:
        return
    program = "\n\n".join(block.code for block in blocks if not block.mark.startswith("compiled only: "))
    names = {"__name__": "page"}
    exec(compile(program, str(page), "exec"), names)


def check_names(code, where):
    """Every `hvdtrain.name` is public, or that of a module."""
    for name in re.findall(r"\bhvdtrain\.(\w+)", code):
        if name not in hvdtrain.__all__:
            importlib.import_module(f"hvdtrain.{name}"), where


@every_page
def test_commands_parse(page, folder):
    for block in pages.blocks_of(page, "bash"):
        for command in pages.commands_of(block):
            try:
                check_command(command)
            except (UsageError, SystemExit, AssertionError) as error:
                pytest.fail(f"{block}: {' '.join(command)}: {error}")


def check_command(words):
    """Parse a command line as what it starts would; nothing runs."""
    program, rest = words[0], words[1:]
    if program in ("sbatch", "qsub"):
        return check_submission(rest)
    if program.startswith("launch/"):
        return check_launch_file(program, rest)
    if program in LAUNCHERS and "python" not in rest:
        return None
    if program in LAUNCHERS:
        program, rest = "python", rest[rest.index("python") + 1 :]
    if program == "hvdtrain" or rest[:2] == ["-m", "hvdtrain"]:
        arguments = rest[2:] if program == "python" else rest
        arguments = arguments[2:] if arguments[:1] == ["-np"] and arguments[1].isdecimal() else arguments
        if arguments[:1] == ["supervise"]:
            return check_supervised(arguments[1:])
        return parse_setup(arguments[1:]) if arguments[:1] == ["setup"] else cli.parse(arguments)
    if program == "python":
        assert rest[0] == "-m" or Path(rest[0]).exists() or (pages.ROOT / rest[0]).exists(), "no such file"
        return None
    assert program in OTHER_PROGRAMS, "nothing tests this program"
    return None


def check_launch_file(program, rest):
    assert os.access(pages.ROOT / program, os.X_OK), "no such file"
    if program == "launch/supervise.sh":
        check_supervised(rest)
    elif program == "launch/test.sh":
        known = (pages.ROOT / program).read_text()
        assert all(f"{word})" in known or f"== {word}" in known for word in rest if word in ("--torch", "--python"))
    elif program != "launch/setup.sh":
        is_counted = program == "launch/local.sh" and rest[:1] and rest[0].isdecimal()
        cli.parse(rest[1:] if is_counted else rest)


def check_supervised(rest):
    own, command = rest[: rest.index("--")], rest[rest.index("--") + 1 :]
    assert supervise.main([*own, "--", "true"]) == 2  # parsed, and refused for want of --run-dir
    check_command(command)
    assert "--run-dir" in command


def check_submission(rest):
    script = next(word for word in rest if word.startswith("launch/"))
    assert (pages.ROOT / script).exists(), "no such file"
    arguments = rest[rest.index(script) + 1 :]
    for word in rest:
        name, _, value = word.partition("=")
        arguments = value.split() if name == "HVDTRAIN_ARGUMENTS" else arguments
    cli.parse([word.replace("%a", "0") for word in arguments])


def all_flags():
    recipes = {name for recipe in RECIPES for name in known_flags(load_recipe(recipe))}
    verbs = {name for verb in cli.VERBS.values() for name in known_flags(verb.options)}
    return {name.replace("_", "-") for name in recipes | verbs | set(all_settings("optim."))}


@every_page
def test_settings_exist(page):
    """Each setting that a sentence or a program on a page names is one."""
    known = all_flags()
    own = {"curve.points", "section.setting"}  # of the recipe that docs/extend.md makes, and how all are written
    for code in pages.inline_code_of(page):
        for name in re.findall(r"--([a-z]+\.[a-z][\w.-]*[a-z])(?![\w.-])", code):
            section, _, last = name.partition(".")
            assert name in known | own or f"{section}.{last.removeprefix('no-')}" in known, f"--{name}"


@every_page
def test_toml_is_settings(page, folder):
    for number, block in enumerate(pages.blocks_of(page, "toml")):
        recipe = re.match(r"# for the recipe (\S+)\n", block.code)
        assert recipe, f"{block}: say whose settings they are: # for the recipe lm"
        Path(f"{number}.toml").write_text(block.code)
        cli.parse(["train", recipe[1], "--config", f"{number}.toml"])


@every_page
def test_output_is_that_of_a_result(page):
    for block in pages.blocks_of(page, "text"):
        if block.mark.startswith("output: "):
            recorded = (page.parent / block.mark.removeprefix("output: ")).read_text().splitlines()
            shown = [line for line in block.code.splitlines() if line != "..."]
            assert [line for line in shown if line not in recorded] == [], block


UNIT = r" ?(?:ms\b|%|times as|GFLOP/s|MB\b|tokens/s|bits per byte|nats\b)"


@every_page
def test_figures_are_those_of_a_result(page):
    """A number in a link to a result is in that file; one with a unit of measurement stands where such a file is named.

    What is no measurement, such as a limit, is named in a comment: `<!-- no measurement: 10 %, 8 % -->`.
    """
    for text, target in pages.links_of(page):
        if "benchmarks/results/" in target:
            result = (page.parent / target).read_text()
            for number in pages.numbers_in(text):
                assert pages.is_in(number, result), f"{number} is not in {target}"
    for section in pages.sections_of(page):
        excepted = ", ".join(re.findall(r"<!-- no measurement: (.*?) -->", section, re.DOTALL)).split(", ")
        results = [
            (page.parent / target).read_text()
            for target in re.findall(r"\]\((\S*benchmarks/results/\w+\.txt)", section)
        ]
        for figure in re.findall(
            rf"(?<![\w.,/-]){pages.NUMBER}{UNIT}", re.sub(r"<!--.*?-->|`[^`\n]*`", "", section, flags=re.DOTALL)
        ):
            number = re.match(pages.NUMBER, figure)[0]
            assert figure in excepted or any(pages.is_in(number, result) for result in results), (
                f"{figure}: in no result that this section names"
            )


@every_page
def test_links_lead_somewhere(page):
    for _, target in pages.links_of(page):
        if "://" in target:
            parts = urlsplit(target)
            assert parts.scheme == "https", target
            assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc), target
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in pages.anchors_of(file), target


def test_every_page_is_reached():
    reached = {
        (DOCS / f"{name}.md").resolve() for name in re.findall(r"^[\w/-]+$", (DOCS / "index.md").read_text(), re.M)
    }
    assert {page for page in pages.PAGES if DOCS in page.parents} - reached == {DOCS / "index.md"}
    # By links as well: what makes the site's sidebar is a block of code to whoever reads the pages where they lie.
    assert {(DOCS / target).resolve() for _, target in pages.links_of(DOCS / "index.md")} == reached


NEWCOMERS_ASK = [
    ("DataLoader", "train_data=loader.dataset"),
    ("augmentation", "__getitem__"),
    ("my curve", "metrics.jsonl"),
    ("W&B", "--log.wandb"),
    ("once an epoch", "--eval.every 1epoch"),
    ("plain state dict", "model.safetensors"),
    ("loss be a sum", 'reduction="mean"'),
    ("torchrun", "horovodrun -np"),
    ("clip", "--train.max-grad-norm"),
    ("GAN", "own-loop.md#a-gan"),
    ("LoRA", "--model.lora-rank"),
    ('"batch" in their names', "concepts.md#batch-arithmetic"),
    ("advantages", "benchmarks/results"),
    ("drawbacks", "benchmarks/results"),
    ("How many workers", "plan.md"),
    ("unstable", "benchmarks/results"),
    ("CPUs", "benchmarks/results"),
]


@pytest.mark.parametrize(("asked", "answered"), NEWCOMERS_ASK)
def test_what_newcomers_ask_has_a_heading_and_an_answer(asked, answered):
    """One click from the index, which has the page; a second one to the heading."""
    text = (DOCS / "faq.md").read_text()
    sections = dict(re.findall(r"^### (.+)\n((?:(?!^#).*\n)+)", text, re.MULTILINE))
    found = [body for heading, body in sections.items() if asked in heading]
    assert len(found) == 1, [*sections]
    assert answered in found[0]


def test_pictures_are_drawn_from_results(monkeypatch):
    """To draw them anew: python docs/tools/pictures.py."""
    monkeypatch.setattr(sys, "path", [str(DOCS / "tools"), *sys.path])
    pictures = importlib.import_module("pictures")
    drawn = {path.name: path.read_text() for path in (DOCS / "pictures").glob("*.svg")}
    assert drawn == {name: draw() for name, draw in pictures.PICTURES.items()}
    assert len(re.findall("<circle", drawn["plan_accuracy.svg"])) == 36
    assert ">214.8</text>" in drawn["step_time.svg"]


def test_every_result_is_in_the_table_of_figures():
    """With the date that it has, so that one that is measured again is entered again."""
    rows = dict(re.findall(r"benchmarks/results/(\S+)\) \| [^|]* \| (\S+) \|", (DOCS / "figures.md").read_text()))
    texts = {path.name: path.read_text() for path in RESULTS.iterdir()}
    dates = {name: re.search(r"^date: +([\d-]+)", text, re.MULTILINE) for name, text in texts.items()}
    assert rows == {name: date[1] if date else "none" for name, date in dates.items()}


def test_readme_is_short_and_says_what_verify_says():
    readme = pages.ROOT / "README.md"
    assert len(readme.read_text().splitlines()) <= 120
    sample = next(block for block in pages.blocks_of(readme, "text") if "verify_lm" in block.mark)
    rows = [int(number) for number in re.findall(r"^ +(\d+) ", sample.code, re.MULTILINE)]
    from hvdtrain.verbs.verify import checks

    assert rows == list(range(1, len(rows) + 1))
    assert {*checks._NAMES} <= {*rows}
    assert re.search(r"git clone \S+ && cd hvdtrain +# once published", readme.read_text())
