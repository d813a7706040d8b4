"""Every setting is declared once, is read somewhere or refused, and says itself what it may be."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import tomli_w

import hvdtrain
from hvdtrain import cli, recipes
from hvdtrain.errors import ConfigError
from hvdtrain.models.config import DecoderConfig
from hvdtrain.models.interchange import to_llama
from hvdtrain.optim import table
from hvdtrain.optim.schedule import check_schedule, describe_schedule, warmup_steps
from hvdtrain.recipes import RECIPES, load_recipe
from hvdtrain.recipes.given import apply
from hvdtrain.settings import NONE, Config, OptimConfig, changeable_settings, synonyms, to_dict
from hvdtrain.settings.common import COMMON, SHORT, full_name
from hvdtrain.settings.fields import fields_of, hints_of, is_optional
from hvdtrain.settings.flags import COMMAND_LINE, known_flags
from hvdtrain.settings.help import docs_of
from hvdtrain.settings.values import Source, Words, nested
from hvdtrain.verbs import meant
from hvdtrain.verbs.meant import BEFORE_THE_REST
from hvdtrain.verbs.table import VERB_SYNONYMS

PACKAGE = Path(hvdtrain.__file__).parent
RECIPE_CLASSES = ("lm", "hf", "mnist", "resnet")

# Command lines whose setting has no effect beside the others: each is refused.
WITHOUT_EFFECT = [
    "lm --optim.reference-batch 8",
    "lm --optim.decay-fraction 0.3",
    "mnist --optim.final-lr-fraction 0.2",
    "lm --optim.schedule constant --optim.final-lr-fraction 0.2",
    "lm --data.vocab-size 300",
    "lm --data.val-path {file} --data.val-fraction 0.2",
    "lm --data.path {file}.bin --data.val-path {file}.bin --data.tokenizer bpe",
    "lm --checkpoint.keep-every 5 --checkpoint.keep-last none",
    "lm --model.linear onednn --train.precision fp64",
    "lm --model.residual-dtype products --train.precision fp32",
    "lm --optim.name Rprop --optim.weight-decay 0.3",
    "hf --data.vocab-size 300",
    "hf --data.packing stream",
    "mnist --eval.choices {file}",
    "mnist --data.path {file}",
    "mnist --optim.beta1 0.5",
    "mnist --optim.kernel loop",
    "lm --optim.momentum 0.5",
    "lm --optim.name NAdam --optim.beta2 0.5",
    "mnist --optim.name lamb --optim.momentum 0.5",
    "mnist --optim.nesterov",
    "lm --optim.decay-factor 0.5",
    "lm --optim.schedule step --optim.milestones 0.5",
    "lm --optim.schedule multistep --optim.step-fraction 0.5",
    "lm --optim.schedule step --optim.patience 2",
    "lm --optim.schedule plateau --optim.final-lr-fraction 0.2",
    "resnet --data.synthetic --data.augment none",
    "resnet --data.synthetic --data.workers 3",
    "resnet --data.num-classes 5",
    "resnet --data.augment none --data.flip 0.2",
    "resnet --data.dataset cifar10 --data.val-fraction 0.2",
    "resnet --model.name vgg11 --model.no-zero-init-gamma",
    "resnet --data.path {file}",
]


def parse(line, **values):
    return cli.parse(["train", *line.format(**values).split()]).recipe


def all_settings():
    found = {}
    for name in RECIPE_CLASSES:
        recipe = load_recipe(name)
        for optimizer in table.OPTIMIZERS:
            chosen = dataclasses.replace(recipe, optim=table.with_name(recipe.optim, optimizer))
            found.update({setting: (item, section) for setting, item, section in fields_of(chosen)})
    return found


def test_every_setting_is_read():
    """By name, anywhere but where settings go to files and back; that it has an effect is for the tests of its room."""
    texts = [path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "values.py"]
    unread = [
        setting for setting in all_settings() if not any(re.search(rf"\.{setting.split('.')[-1]}\b", t) for t in texts)
    ]
    assert unread == []


def test_every_setting_has_its_help():
    for setting, (item, section) in all_settings().items():
        assert docs_of(type(section)).get(item.name), setting


@pytest.mark.parametrize("line", WITHOUT_EFFECT)
def test_a_setting_without_effect_is_refused(line, tmp_path):
    (tmp_path / "text").write_text("text")
    with pytest.raises(ConfigError) as caught:
        parse(line, file=tmp_path / "text")
    assert re.search(r"has no effect|is a setting of|there is no flag", str(caught.value)), caught.value
    assert len(str(caught.value).splitlines()) == 1


def test_the_error_says_whose_setting_it_is():
    with pytest.raises(ConfigError, match=r"--optim.momentum is a setting of sgd, muon and lars, and .* is adamw"):
        parse("lm --optim.momentum 0.5")
    with pytest.raises(ConfigError, match=r"adamw and muon, and the optimizer is sgd.*--optim.name adamw"):
        parse("mnist --optim.kernel loop")


def test_the_same_settings_with_what_they_need_are_taken(tmp_path):
    recipe = parse("lm --optim.schedule wsd --optim.decay-fraction 0.3 --optim.lr-rule sqrt --optim.reference-batch 8")
    assert (recipe.optim.decay_fraction, recipe.optim.reference_batch) == (0.3, 8)
    assert parse("lm --data.tokenizer bpe --data.vocab-size 300").data.vocab_size == 300


@pytest.mark.parametrize(
    ("in_file", "flag"),
    [
        ({"model": {"hidden_size": 300}}, ("model.num_heads", "3")),
        ({"model": {"num-kv-heads": 3}, "train": {"steps": 5}}, ("model.num_heads", "6")),
        ({"comm": {"sync": "local", "fragments": 64}}, ("comm.period", "100")),
        ({"optim": {"lr_rule": "sqrt"}}, ("optim.reference_batch", "64")),
        ({"data": {"packing": "documents", "path": "tokens.bin"}}, ("data.packing", "stream")),
    ],
    ids=str,
)
def test_a_file_may_hold_one_of_two_settings_and_a_flag_the_other(in_file, flag):
    name, word = flag
    in_file = {"model": {}, **in_file}
    if name == "model.num_heads":
        in_file["model"] = {"hidden_size": 300, **in_file["model"]}
    with pytest.raises(ConfigError, match=r"^half\.toml: "):
        apply(load_recipe("lm"), [(in_file, Source("half.toml"))])
    given = apply(load_recipe("lm"), [(in_file, Source("half.toml")), (nested({name: Words((word,))}), COMMAND_LINE)])
    section, _, last = name.partition(".")
    assert str(getattr(getattr(given, section), last)) == word


def test_what_a_run_on_another_models_weights_comes_to_is_a_file_for_the_next(tmp_path):
    shape = DecoderConfig(num_layers=1, hidden_size=32, num_heads=2, intermediate_size=48)
    (tmp_path / "config.json").write_text(json.dumps(to_llama(shape, 257, 64, 256)))
    begin = (nested({"model.init_from": Words((str(tmp_path),))}), COMMAND_LINE)
    resolved = apply(load_recipe("lm"), [begin])
    assert (resolved.model.num_layers, resolved.model.hidden_size) == (1, 32)
    file = (to_dict(resolved), Source("saved.toml"))
    assert apply(load_recipe("lm"), [file]) == resolved
    for source, flag in (
        (Source("other.toml"), r"other\.toml: model\.num_layers"),
        (COMMAND_LINE, "--model.num-layers"),
    ):
        with pytest.raises(ConfigError, match=rf"^{flag} has no effect: the model in --model\.init-from"):
            apply(load_recipe("lm"), [file, (nested({"model.num_layers": Words(("5",))}), source)])


def test_values_of_a_file_and_of_a_flag_that_do_not_fit_are_refused_as_they_are():
    file = ({"model": {"hidden_size": 300}}, Source("half.toml"))
    with pytest.raises(ConfigError, match=r"^half\.toml: hidden_size = 300 must give each of 7 heads"):
        apply(load_recipe("lm"), [file, (nested({"model.num_heads": Words(("7",))}), COMMAND_LINE)])
    with pytest.raises(ConfigError, match="hidden_size = 300 must give each of 4 heads"):
        apply(load_recipe("lm"), [file, ({"model": {"unknown": 7}}, Source("other.toml"))])
    wrong = ({"model": {"hidden_size": "x"}}, Source("half.toml"))
    with pytest.raises(ConfigError, match=r"half\.toml.*hidden_size"):
        apply(load_recipe("lm"), [wrong, (nested({"model.hidden_size": Words(("64",))}), COMMAND_LINE)])


@pytest.mark.parametrize("name", RECIPES)
def test_resolved_settings_load_back(name):
    """A file of resolved settings names every default; none of them counts as a wish without effect."""
    recipe = cli.parse(["train", name]).recipe
    assert apply(load_recipe(name), [(to_dict(recipe), Source("saved.toml"))]) == recipe


def test_the_name_chooses_the_class_and_common_values_are_kept():
    recipe = parse("lm --optim.name sgd --optim.momentum 0.9")
    assert type(recipe.optim).__name__ == "SgdConfig"
    assert (recipe.optim.peak_lr, recipe.optim.momentum) == (load_recipe("lm").optim.peak_lr, 0.9)
    assert type(parse("mnist --optim.name RMSprop").optim).__name__ == "TorchOptimConfig"
    assert parse("lm --optim.name muon --optim.beta1 0.8").optim.beta1 == 0.8


def test_a_file_that_chose_another_optimizer_is_not_forgotten():
    file = ({"optim": {"name": "sgd", "momentum": 0.9}}, Source("a.toml"))
    assert apply(load_recipe("lm"), [file]).optim.momentum == 0.9
    with pytest.raises(
        ConfigError, match=r"a.toml: optim.momentum is a setting of sgd, muon and lars, and the optimizer is adamw"
    ):
        apply(load_recipe("lm"), [file, (nested({"optim.name": Words(("adamw",))}), COMMAND_LINE)])


def test_a_recipe_that_says_optimconfig_means_adamw():
    assert type(table.own_class(OptimConfig(peak_lr=0.5))).__name__ == "AdamWConfig"
    assert table.own_class(OptimConfig(peak_lr=0.5)).peak_lr == 0.5


def test_every_optimizer_builds():
    import torch

    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    names = {name: type(table.build_optimizer(OptimConfig(name=name), model)).__name__ for name in table.OPTIMIZERS}
    assert names == {"adamw": "AdamW", "sgd": "SGD", "muon": "Composite", "lars": "Lars", "lamb": "Lamb"}
    with pytest.raises(ConfigError, match="there is no optimizer 'Adan'; did you mean"):
        table.build_optimizer(OptimConfig(name="Adan"), model)
    with pytest.raises(ConfigError, match=r"known are adamw, sgd, muon, lars, lamb and the classes of torch\.optim"):
        table.build_optimizer(OptimConfig(name="adamv"), model)


def test_what_a_resumed_run_may_change():
    free = changeable_settings(table_config("lm"))
    assert {"log.every", "train.steps", "data.path", "model.compile", "optim.kernel", "comm.bucket_mib"} <= free
    assert not {"train.seed", "optim.peak_lr", "model.num_layers", "train.precision", "comm.compression"} & free
    assert {"eval.choices", "checkpoint.every", "health.noise_scale", "model.loss_chunk"} <= free


def table_config(name):
    recipe = load_recipe(name)
    return dataclasses.replace(recipe, optim=table.own_class(recipe.optim))


def limits():
    for setting, (item, section) in all_settings().items():
        for rule, limit in item.metadata.get("limits", {}).items():
            yield pytest.param(section, item, rule, limit, id=f"{setting}-{rule}")


@pytest.mark.parametrize(("section", "item", "rule", "limit"), list(limits()))
def test_ranges_end_where_they_say(section, item, rule, limit):
    is_whole = "int" in str(item.type)
    step = 1 if is_whole else 1e-6 * max(1.0, abs(limit))
    outside = {"above": limit, "below": limit, "minimum": limit - step, "maximum": limit + step}[rule]
    inside = {"above": limit + step, "below": limit - step, "minimum": limit, "maximum": limit}[rule]
    # The one field by itself: other rules of the section are not what is tested here.
    kind = dataclasses.make_dataclass("One", [(item.name, item.type, dataclasses.field(**_copied(item)))], frozen=True)
    for value, is_good in ((inside, True), (outside, False)):
        value = int(value) if is_whole else float(value)
        one = kind(**{item.name: value})
        if is_good:
            hvdtrain.settings.fields.check_range(dataclasses.fields(one)[0], item.name, value)
        else:
            with pytest.raises(ConfigError, match=rf"{item.name} = \S+ must (be|not be)"):
                hvdtrain.settings.fields.check_range(dataclasses.fields(one)[0], item.name, value)


def _copied(item):
    return {"default": None, "metadata": item.metadata}


class Choice(str, Enum):
    COSINE = "cosine"


def test_values_of_other_libraries_are_taken_for_what_they_are_or_refused():
    config = Config(optim=OptimConfig(peak_lr=np.sqrt(1e-4), schedule=Choice.COSINE))
    assert type(to_dict(config)["optim"]["peak_lr"]) is float
    assert type(to_dict(config)["optim"]["schedule"]) is str
    for wrong in ({"warmup_steps": np.int64(3)}, {"peak_lr": "0.1"}, {"warmup_steps": True}, {"peak_lr": math.nan}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} = "):
            OptimConfig(**wrong)


def test_flags_as_people_write_them():
    recipe = parse("lm --train.steps=7 --health.no-memory-check --optim.peak_lr 1e-2 --eval.every none")
    assert (recipe.train.steps, recipe.health.memory_check) == (7, False)
    assert (recipe.optim.peak_lr, recipe.eval.every) == (0.01, None)
    assert parse("lm --train.steps 5 --train.steps 6").train.steps == 6
    options = cli.parse(["train", "lm", "--allow-config-change", "optim.peak-lr", "train.seed", "--dry-run"]).options
    assert options.allow_config_change == ("optim.peak_lr", "train.seed")
    for wrong, says in (
        ("optim.peek_lr", "did you mean 'optim.peak_lr'"),
        ("train.seeds", "train.seed'"),
        ("train.global-batch-size", "the global batch cannot change within a run"),
    ):
        with pytest.raises(ConfigError, match=says):
            cli.parse(["train", "lm", "--allow-config-change", wrong])
    with pytest.raises(ConfigError, match="'soon' is no duration"):
        cli.parse(["train", "lm", "--train.max-time", "soon"])
    prompts = cli.parse(["generate", "--run-dir", str(PACKAGE), "--prompt", "-1", "b", "--prompt=--c"]).options.prompt
    assert prompts == ("-1", "b", "--c")


# Lines that are answered, or refused, by what is known of settings alone.
ANSWERED = ("--help", "--version", "help", "train lm --help", "train lm --help-all", "train lm --print-config")
ANSWERED += ("train mnist --help", "train hf --help-all", "plan hf -h", "generate --help", "verify lm-1b --help")
REFUSED = ("trian lm", "train lmm", "lm", "train lm --train.stepss 3", "train lm --train.steps 0", "train nofile.py")
REFUSED += (
    "train lm --train.steps soon",
    "train lm --config nofile.toml",
    "train mnist --data.tokenizer bpe",
    "plan 3",
)
REFUSED += ("train lm --optim.name adam", "train lm --train.steps 9 --train.epochs 9", "train lm --data.vocab-size 300")
REFUSED += (
    "train lm --allow-config-change model",
    "generate nofolder",
    "export nofolder",
    "doctor lm",
    "-np x train lm",
)


def test_help_and_refusals_import_no_library():
    """Whoever asks for help, or mistypes, waits for no torch: what is imported is settings and the standard library."""
    code = """
import contextlib, io, shlex, sys
from hvdtrain.cli import main
for line in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = main(shlex.split(line))
    print(code, *sorted({"torch", "numpy", "transformers", "tokenizers", "horovod", "mpi4py"} & {*sys.modules}))
"""
    command = [sys.executable, "-c", code, *ANSWERED, *REFUSED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = dict(zip((*ANSWERED, *REFUSED), done.stdout.splitlines(), strict=True))
    assert found == {**dict.fromkeys(ANSWERED, "0"), **dict.fromkeys(REFUSED, "2")}, done.stderr


def test_a_program_may_allow_only_settings_that_there_are():
    for wrong, says in (
        ("optim.peek_lr", r"train\(\): allow_config_change: .*did you mean"),
        ("model", "cannot change"),
    ):
        with pytest.raises(ConfigError, match=says):
            hvdtrain.train("lm", allow_config_change=(wrong,))


def test_help_says_range_and_default():
    text = " ".join(cli.parse(["train", "lm", "--help-all"]).split())
    assert "--train.seed, --seed N Seed of the initial weights" in text
    assert "every other random number. [at least 0; default: 0]" in text
    assert "--comm.compression none|fp16" in text
    assert "--eval.choices PATH" in text
    assert "--optim.momentum X" not in text
    assert "--optim.momentum X" in cli.parse(["train", "lm", "--optim.name", "sgd", "--help-all"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_shows_what_most_people_set_and_then_all(recipe):
    short, whole = cli.parse(["train", recipe, "--help"]), cli.parse(["train", recipe, "--help-all"])
    every = [name for name, _, _ in fields_of(load_recipe(recipe)) if "." in name]

    def shown(text):
        return {name for name in every if re.search(rf"^  --{name.replace('_', '-')}[, \n]", text, re.MULTILINE)}

    assert shown(whole) == set(every)
    assert shown(short) == COMMON & set(every)
    assert len(shown(short)) <= 25
    assert f"all {len([*fields_of(load_recipe(recipe))])} settings: the same command with --help-all" in short
    assert "--help-all" not in whole


@pytest.mark.parametrize("short", SHORT)
def test_short_names(short):
    """Each means one setting in some recipe, and the long name beside it; the last one that is given counts."""
    recipes = [name for name in RECIPES if full_name(short, known_flags(load_recipe(name))) != short]
    assert recipes
    full = full_name(short, known_flags(load_recipe(recipes[0])))
    value = {"precision": "bf16", "data": "README.md", "model": "gpt2", "max_time": "1h", "lr": "0.5"}.get(short, "7")
    flag, long = short.replace("_", "-"), full.replace("_", "-")
    assert cli.parse(["train", recipes[0], f"--{flag}", value]) == cli.parse(["train", recipes[0], f"--{long}", value])
    if value == "7":
        both = cli.parse(["train", recipes[0], f"--{long}", "7", f"--{flag}", "8"]).recipe
        section, name = full.split(".")
        assert getattr(getattr(both, section), name) == 8


def test_help_into_a_pipe_that_closes():
    command = f"{sys.executable} -m hvdtrain train lm --help | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("usage:")
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr


def test_steps_and_epochs_stand_in_for_each_other():
    assert (parse("mnist --train.steps 10").train.steps, parse("mnist --train.steps 10").train.epochs) == (10, None)
    assert (parse("lm --train.epochs 2").train.steps, parse("lm --train.epochs 2").train.epochs) == (None, 2.0)
    with pytest.raises(ConfigError, match="not both"):
        parse("lm --train.epochs 2 --train.steps 3")
    layers = [({"train": {"epochs": 3}}, Source("a.toml")), (nested({"train.steps": Words(("7",))}), COMMAND_LINE)]
    assert (apply(load_recipe("lm"), layers).train.steps, apply(load_recipe("lm"), layers).train.epochs) == (7, None)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lm --train.micro-batch-size 3 --train.accum-steps 2", (None, 3, 2)),
        ("lm --train.micro-batch-size 4", (16, 4, None)),
        ("lm --train.global-batch-size 8", (8, None, None)),
        ("lm --train.global-batch-size 8 --train.micro-batch-size 2 --train.accum-steps 2", (8, 2, 2)),
    ],
)
def test_the_batch_settings_of_the_user_come_first(line, expected):
    train = parse(line).train
    assert (train.global_batch_size, train.micro_batch_size, train.accum_steps) == expected


def test_a_recipe_with_all_three_batch_settings_leaves_one_open():
    recipe = load_recipe("lm")
    batch = hvdtrain.TrainConfig(steps=5, global_batch_size=16, micro_batch_size=4, accum_steps=2)
    recipe = dataclasses.replace(recipe, train=batch)
    train = apply(recipe, [({"train": {"global_batch_size": 32}}, Source("a.toml"))]).train
    assert (train.global_batch_size, train.micro_batch_size, train.accum_steps) == (32, 4, None)


def test_the_warmup_adapts_to_the_steps():
    def steps_of(line):
        recipe = parse(line)
        check_schedule(recipe.optim, recipe.train.steps)
        return warmup_steps(recipe.optim, recipe.train.steps)

    lines = ["lm", "lm-10m", "lm-124m", "lm --train.steps 12", "lm --train.steps 1", "lm --optim.warmup-steps 7"]
    assert [steps_of(line) for line in lines] == [50, 50, 700, 1, 0, 7]
    assert steps_of("lm --train.steps 200 --optim.warmup-fraction 0.5") == 100
    assert describe_schedule(parse("lm").optim, 1000) == "cosine after 50 steps of warm-up"
    with pytest.raises(ConfigError, match="use fewer than 12"):
        steps_of("lm --train.steps 12 --optim.warmup-steps 12")
    with pytest.raises(ConfigError, match=r"warmup-fraction has no effect: --optim\.warmup-steps 5 says"):
        steps_of("lm --optim.warmup-steps 5 --optim.warmup-fraction 0.1")


def test_a_recipes_own_warmup_yields_to_fewer_steps_of_the_user():
    recipe = dataclasses.replace(load_recipe("lm"), optim=OptimConfig(warmup_steps=50))
    fewer = apply(recipe, [({"train": {"steps": 30}}, Source("a.toml"))])
    assert warmup_steps(fewer.optim, 30) == 3
    same = apply(recipe, [({"train": {"steps": 300}}, Source("a.toml"))])
    assert warmup_steps(same.optim, 300) == 50


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("train lm --learning-rate 1", "did you mean '--optim.peak-lr'?"),
        ("train lm --learning-rate=1", "did you mean '--optim.peak-lr'?"),
        ("train lm --bs 3", "'--train.global-batch-size' or '--train.micro-batch-size'?"),
        ("train lm --num-epochs 3", "did you mean '--train.epochs'?"),
        ("train lm --max-steps 3", "did you mean '--train.steps'?"),
        ("train lm --train.lr 3", "did you mean '--optim.peak-lr'?"),
        ("train lm --gpus 4", "horovodrun -np 4"),
        ("train lm -n 4", "horovodrun -np 4"),
        ("train lm --wandb", "did you mean '--log.wandb'?"),
        ("train lm --mlflow", "did you mean '--log.mlflow'?"),
        ("train lm --wandb-project x", "did you mean '--log.project'?"),
        ("train lm --report-to wandb", "'--log.tensorboard' or '--log.wandb' or '--log.mlflow'?"),
        ("train lm --comet", "Task(sinks=[...])"),
        ("train lm --resume", "did you mean '--run-dir'?"),
        ("train lm --version", "python -m hvdtrain --version"),
        ("train lm --gradient-checkpointing", "did you mean '--model.checkpoint-blocks'?"),
        ("train mnist --datadir x", "did you mean '--data.root'?"),
        ("train mnist --eval.choices x", "--eval.choices is a setting of the recipe lm"),
        ("train lm --data.text-field x", "--data.text-field is a setting of the recipe hf"),
        ("train lm --health.no-memory-checks", "did you mean '--health.memory-check'?"),
        ("train lm --frobnicate", "the same command with --help"),
        ("lm", "did you mean 'train lm'?"),
        ("my.py", "did you mean 'train my.py'?"),
        ("resume", "did you mean 'train'?"),
        ("benchmark", "did you mean 'bench'?"),
        ("docter", "did you mean 'doctor'?"),
        ("translate runs/a", "did you mean 'generate'?"),
        ("transcribe runs/a", "did you mean 'predict'?"),
        ("evaluate runs/a", "did you mean 'report'?"),
        ("train t5", "did you mean 'seq2seq'?"),
        ("train lora", "did you mean 'hf'?"),
        ("train vit", "did you mean 'resnet'?"),
        ("train whisper", "known are ctc, dpo, hf, lm"),
        ("train hf --lora-r 8", "did you mean '--model.lora-rank'?"),
        ("train hf --target-modules q_proj", "did you mean '--model.lora-targets'?"),
        ("train hf --fsdp", "did you mean '--optim.shard'?"),
        ("train seq2seq --num-beams 4", "did you mean '--eval.beams'?"),
        ("train seq2seq --do-train", "--eval.every"),
        ("train ctc --max-duration 3", "'--train.max-time' or '--data.max-seconds'?"),
        ("train ctc --sampling-rate 16000", "clips of any rate are resampled"),
        ("train resnet --train-dir x", "did you mean '--data.root'?"),
        ("train dpo --ref-model x", "the model as it is before the first step"),
    ],
)
def test_what_is_meant_is_found(line, says):
    with pytest.raises(ConfigError) as caught:
        cli.parse(line.split())
    assert says in str(caught.value)


def test_synonyms_name_settings_that_exist():
    known = {*all_settings(), *(name for verb in cli.VERBS.values() for name in known_flags(verb.options))}
    known |= {"train.ema", "data.workers"}  # of other rooms
    known |= {name for recipe in RECIPES for name in known_flags(load_recipe(recipe))}
    assert {*synonyms._SETTINGS} <= known
    told = [word for words in synonyms._ELSEWHERE for word in words.split()]
    assert len({*told}) == len(told)
    assert {*VERB_SYNONYMS} <= {*cli.VERBS, *BEFORE_THE_REST}
    verbs = [word for words in VERB_SYNONYMS.values() for word in words.split()]
    assert len({*verbs}) == len(verbs)
    assert not {*verbs} & {*cli.VERBS, *BEFORE_THE_REST, *meant._ADVICE}
    assert {*recipes._SYNONYMS} <= {*RECIPES}
    named = [word for words in recipes._SYNONYMS.values() for word in words.split()]
    assert len({*named}) == len(named)
    assert not {*named} & {*RECIPES}


def test_help_and_version_as_words():
    assert cli.parse(["help"]) == cli.parse(["--help"]) == cli.parse(["-h"])
    assert cli.parse(["--version"]) == cli.parse(["version"]) == f"hvdtrain {hvdtrain.__version__}\n"


@pytest.mark.parametrize("recipe", RECIPE_CLASSES)
def test_what_is_not_given_is_not_given_in_a_file_either(recipe, tmp_path):
    """A default of the recipe must not come back by the way: TOML has no None."""
    chosen = load_recipe(recipe)
    needed = ("train.steps", "train.global_batch_size", "optim.reference_batch")  # others of the recipe need them
    optional = [
        name
        for name, item, section in fields_of(chosen)
        if is_optional(hints_of(type(section))[item.name]) and name not in needed
    ]
    assert "train.max_grad_norm" in optional
    assert "checkpoint.keep_last" in optional
    flags = [f"--{name.replace('_', '-')}=none" for name in optional if name != "train.epochs"]
    given = cli.parse(["train", recipe, "--train.steps", "60", *flags]).recipe
    file = tmp_path / "settings.toml"
    file.write_text(tomli_w.dumps(to_dict(given, NONE)))
    assert cli.parse(["train", recipe, "--config", str(file)]).recipe == given
    assert given.train.max_grad_norm is given.checkpoint.keep_last is None


def test_the_directory_of_a_run_says_what_was_not_given(tmp_path):
    values = to_dict(load_recipe("mnist"), NONE)
    assert values["train"]["max_grad_norm"] == "none"
    assert "max_grad_norm" not in to_dict(load_recipe("mnist"))["train"]
