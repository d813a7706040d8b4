"""Trackers: what they are given, that none ends a run or holds it up, and that a run goes on as the same run."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from digits import write_digits
from patience import wait_for
from test_train_call import RECIPE, Line, environment  # noqa: F401  a fixture

import hvdtrain
from hvdtrain.errors import ConfigError
from hvdtrain.recipes.pictures import shown_images, side_by_side
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.rundir.sinks import Background, TensorBoard, build_sinks
from hvdtrain.rundir.sinks.tracked import image_of, library_of, remember, remembered
from hvdtrain.settings import LogConfig

SECONDS = 60  # for what takes none, on a machine that is busy


class Kept:
    """Keeps what it is given, and the threads that it is given it in."""

    def __init__(self):
        self.calls, self.threads = [], set()

    def note(self, *call):
        self.calls.append(call)
        self.threads.add(threading.current_thread())

    def begin(self, step, num_steps):
        self.note("begin", step, num_steps)

    def write(self, step, metrics, event):
        self.note("write", step, metrics, event)

    def close(self):
        self.note("close")


class Showing(Kept):
    """Takes samples, too."""

    def show(self, step, samples):
        self.note("show", step, samples)


class Failing(Kept):
    """Fails in one of its methods."""

    def __init__(self, method, error):
        super().__init__()
        self.method, self.error = method, error

    def note(self, *call):
        super().note(*call)
        if call[0] == self.method:
            raise self.error


class Blocking(Kept):
    """Waits in one of its methods until it is let go."""

    def __init__(self, method):
        super().__init__()
        self.method, self.is_let_go = method, threading.Event()

    def note(self, *call):
        super().note(*call)
        if call[0] == self.method:
            self.is_let_go.wait(SECONDS)


def test_it_is_given_all_in_order_in_one_thread_of_its_own():
    kept, said = Showing(), []
    log = MetricLog(None, [Background(kept, said.append)])
    log.begin(3, 10)
    metrics = {"train/loss": 1.0}
    log.write(4, metrics)
    metrics["train/loss"] = 2.0  # what the trainer does with it later is not its business
    log.show(4, lambda: {"text": "once"})
    log.write(5, {}, "finished")
    log.close()
    assert kept.calls == [
        ("begin", 3, 10),
        ("write", 4, {"train/loss": 1.0}, None),
        ("show", 4, {"text": "once"}),
        ("write", 5, {}, "finished"),
        ("close",),
    ]
    (thread,) = kept.threads
    assert thread is not threading.main_thread()
    assert said == []


def test_samples_are_made_only_for_a_sink_that_shows_them():
    MetricLog(None, [Background(Kept(), print)]).show(1, lambda: pytest.fail("nobody takes them"))


def test_one_that_was_never_begun_is_not_closed():
    kept = Kept()
    MetricLog(None, [Background(kept, print)]).close()
    assert kept.calls == []


@pytest.mark.parametrize("error", [OSError("no network"), KeyError("colour"), SystemExit(3)], ids=repr)
@pytest.mark.parametrize("method", ["begin", "write", "close"])
def test_one_that_fails_is_told_once_and_left_out(method, error, caplog):
    """The others go on, and so does who logs."""
    caplog.set_level("INFO", "hvdtrain")
    failing, kept, said = Failing(method, error), Kept(), []
    background = Background(failing, said.append)
    log = MetricLog(None, [background, Background(kept, said.append)])
    log.begin(0, 10)
    for step in range(1, 5):
        log.write(step, {"train/loss": 1.0})
        if method != "close":
            wait_for(lambda: not background._thread.is_alive())
    log.close()
    (told,) = said
    assert "Failing gets no more metrics" in told
    assert type(error).__name__ in told
    assert "Traceback" in caplog.text
    assert [call[0] for call in kept.calls] == ["begin", *["write"] * 4, "close"]
    expected = {"begin": ["begin", "close"], "write": ["begin", "write", "close"]}
    assert [call[0] for call in failing.calls] == expected.get(method, ["begin", *["write"] * 4, "close"])


@pytest.mark.parametrize(
    ("method", "limits", "says"),
    [
        ("write", {"most_waiting": 5}, "is 5 lines behind"),
        ("begin", {"seconds_of_a_call": 0.05}, "has not answered for 0.05 s"),
        ("close", {"seconds_to_close": 0.05}, "has not finished within 0.05 s"),
    ],
)
def test_one_that_blocks_holds_nothing_up(method, limits, says):
    blocking, said = Blocking(method), []
    log = MetricLog(None, [Background(blocking, said.append, **limits)])
    started = time.monotonic()
    log.begin(0, 10)
    for step in range(20):
        log.write(step, {"train/loss": 1.0})
        if method == "begin":
            time.sleep(0.01)
    if method == "close":
        wait_for(lambda: len(blocking.calls) == 21)  # its limit is for the closing alone
    log.close()
    assert time.monotonic() - started < SECONDS / 2
    blocking.is_let_go.set()
    (told,) = said
    assert says in told
    log._sinks[0]._thread.join(SECONDS)
    assert (len(blocking.calls) < 20) == (method != "close")  # it gets no more, also where it answers after all


def test_several_that_block_are_waited_for_together():
    blocking = [Blocking("close") for _ in range(20)]
    log = MetricLog(None, [Background(sink, print, seconds_to_close=0.5) for sink in blocking])
    log.begin(0, 1)
    for sink in blocking:
        wait_for(lambda sink=sink: sink.calls)
    started = time.monotonic()
    log.close()
    assert time.monotonic() - started < 8  # not 10
    for sink in blocking:
        sink.is_let_go.set()


def with_sink(*sinks):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class WithSinks(Line):
        def build(self, say):
            samples = lambda model, metrics: {"weight": f"{model.weight.item():.3f} at {metrics['val/loss']:.3f}"}  # noqa: E731
            return dataclasses.replace(super().build(say), sinks=list(sinks), samples=samples)

    return WithSinks(train=RECIPE.train)


def test_a_recipes_own_sink_gets_what_the_task_shows(tmp_path):
    kept = Showing()
    hvdtrain.train(with_sink(kept), run_dir=tmp_path / "run", log={"every": 4}, eval={"every": 4})
    calls = [call[:2] for call in kept.calls]
    assert calls == [
        ("begin", 0),
        ("write", 4),
        ("show", 4),
        ("write", 4),
        ("write", 8),
        ("show", 8),
        ("write", 8),
        ("close",),
    ]
    assert set(kept.calls[2][2]) == {"weight"}
    loss = [call[2]["val/loss"] for call in kept.calls if call[0] == "write" and "val/loss" in call[2]]
    assert [call[2]["weight"].split(" at ")[1] for call in kept.calls if call[0] == "show"] == [
        f"{value:.3f}" for value in loss
    ]


def test_a_run_outlives_its_sinks(tmp_path, capfd):
    failing = Failing("write", KeyError("colour"))
    result = hvdtrain.train(with_sink(failing), run_dir=tmp_path / "run", log={"every": 2})
    assert result.step == 8
    assert capfd.readouterr().out.count("WARNING: Failing gets no more metrics of this run: KeyError: 'colour'") == 1
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["event"] == "finished"


class NoClose:
    """Lacks a method."""

    def begin(self, step, num_steps):
        pass

    def write(self, step, metrics, event):
        pass


@pytest.mark.parametrize(
    ("sinks", "says"), [((Kept,), "make an object"), ((NoClose(),), "no method close"), (Kept(), "give a list")]
)
def test_what_is_no_sink_is_refused_before_training(tmp_path, sinks, says):
    with pytest.raises(ConfigError, match=says):
        build_sinks(RunDirectory(tmp_path), LogConfig(), print, sinks)


def test_a_missing_library_is_one_sentence_that_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match=rf"pip install 'hvdtrain\[{name}\]'"):
            build_sinks(RunDirectory(tmp_path), LogConfig(**{name: True}), print)
    (tmp_path / "left_behind").mkdir()  # as W&B leaves a folder wandb where a run was started
    with pytest.raises(ConfigError, match=r"hvdtrain\[left_behind\]"):
        library_of("left_behind", "--log.x", "init")
    sys.modules.pop("left_behind")
    (tmp_path / "broken_one.py").write_text("raise TypeError('another protobuf')")
    with pytest.raises(ConfigError, match="TypeError: another protobuf"):
        library_of("broken_one", "--log.x", "init")


def test_the_project_is_for_trackers_alone():
    assert [name for name, _ in LogConfig(project="mine", tensorboard=True).unused()] == ["project"]
    assert [*LogConfig(project="mine", mlflow=True).unused()] == []


def test_names_are_remembered_whatever_is_there(tmp_path):
    run = RunDirectory(tmp_path)
    for text in ("", "[]", "{", '{"wandb": 3}', "\x00"):
        run.trackers.write_text(text)
        assert remembered(run, "wandb") is None
    remember(run, "wandb", "one")
    remember(run, "mlflow", "two")
    assert (remembered(run, "wandb"), remembered(run, "mlflow")) == ("one", "two")


def test_images():
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert image_of(grey).shape == image_of(grey[:, :, None]).shape == (2, 3, 3)
    assert image_of(torch.from_numpy(grey))[1, 2].tolist() == [5, 5, 5]
    for wrong in (grey.astype(np.float32), np.zeros((3, 4, 4), np.uint8), np.zeros(3, np.uint8)):
        with pytest.raises(ValueError, match="height, width, 3"):
            image_of(wrong)
    images = torch.arange(9, dtype=torch.uint8).view(9, 1, 1, 1).expand(9, 1, 2, 4)
    whole = side_by_side(images)
    assert whole.shape == (4, 32, 3)
    assert whole[::2, ::4, 0].tolist() == [[*range(8)], [8, *[0] * 7]]


def test_a_classifier_is_shown_with_its_answers():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([10.0, 0.0]))
    data = hvdtrain.TensorSamples(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, -100]))
    shown = shown_images(
        model, data, ("cat", "dog"), lambda batch: batch[0], lambda model, batch: model(batch[0].float())
    )
    assert shown["answers"].splitlines() == [
        " 1  cat, taken for cat (100%)",
        " 2  dog, taken for cat (100%)",
        " 3  unread, taken for cat (100%)",
    ]


def test_tensorboard_has_settings_texts_and_images(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    run = RunDirectory(tmp_path)
    run.config.write_text('[train]\nsteps = 8\n[data]\npath = "a | b"\n')
    sink = TensorBoard(run)
    sink.begin(0, 8)
    sink.show(4, {"text": "first\n# second", "image": np.full((2, 3, 3), 7, np.uint8)})
    sink.close()
    events = EventAccumulator(str(run.tensorboard)).Reload()
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert texts["samples/text/text_summary"] == "    first\n    # second"
    assert "| data.path | a \\| b |" in texts["settings/text_summary"]
    assert (events.Images("samples/image")[0].width, events.Images("samples/image")[0].height) == (3, 2)
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert values["train.steps"].number_value == 8
    assert [path.name for path in run.tensorboard.iterdir() if path.is_dir()] == []


def test_mnist_shows_its_images(tmp_path):
    write_digits(tmp_path)
    kept = Showing()
    recipe = hvdtrain_recipe("mnist", tmp_path)
    task = recipe.build(print)
    with torch.no_grad():
        kept.show(1, task.samples(task.model, {}))
    samples = kept.calls[0][2]
    assert samples["images"].shape == (56, 224, 3)
    assert samples["images"].max() > 200
    assert len(samples["answers"].splitlines()) == 16


def hvdtrain_recipe(name, root):
    from hvdtrain.recipes import load_recipe

    recipe = load_recipe(name)
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, root=str(root)))


# A run that is stopped in mid-run, goes on and finishes, with a tracker.
TRACKED = """
import dataclasses, signal, sys
sys.path[:0] = sys.argv[3:]
import numpy as np
import hvdtrain
from test_train_call import RECIPE, Line, environment  # noqa: F401  a fixture

@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown(Line):
    def build(self, say):
        samples = lambda model, metrics: {"text": "a <b>", "image": np.zeros((2, 2, 3), np.uint8)}
        return dataclasses.replace(super().build(say), samples=samples)

log = {sys.argv[2]: True, "every": 1, "project": "ours"}
try:
    hvdtrain.train(Shown(train=RECIPE.train, stops=True), run_dir=sys.argv[1], log=log)
except hvdtrain.StopRequested:
    pass
hvdtrain.train(Shown(train=RECIPE.train), run_dir=sys.argv[1], log=log, allow_config_change=("stops",))
"""


def tracked(name, folder, **variables):
    """Run with a tracker in a process of its own: its library starts others. Returns the run's name there."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    paths = [os.path.dirname(__file__), os.path.join(os.path.dirname(os.path.dirname(__file__)), "support")]  # noqa: PTH118, PTH120
    command = [sys.executable, "-c", TRACKED, str(folder / "run"), name, *paths]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stdout, done.stdout
    return remembered(RunDirectory(folder / "run"), name)


def logged(content, block=32768, head=7):
    """Yield the records in W&B's file: LevelDB's log format, with a head of its own in the first block."""
    place, parts = head, []
    while place + head < len(content):
        if block - place % block < head:
            place += block - place % block
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts.append(content[place + head : place + head + size])
        place += head + size
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def test_wandb_goes_on_with_the_same_run(tmp_path):
    run = tracked("wandb", tmp_path, WANDB_MODE="offline", WANDB_SILENT="true")
    from wandb.proto import wandb_internal_pb2

    steps, names, ends = [], set(), []
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{run}.wandb"))
    assert len(files) == 2
    for file in files:
        for data in logged(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("run"):
                assert (record.run.run_id, record.run.project, record.run.display_name) == (run, "ours", "run")
                assert "train.steps" in {item.key for item in record.run.config.update}
            line = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if "train/loss" in line:
                steps.append(int(line["step"]))
            names.update("/".join(name.split("/")[:2]) for name in line)
            if record.HasField("exit"):
                ends.append(record.exit.exit_code)
    assert steps == [*range(1, 9)]
    assert {"val/loss", "samples/text", "samples/image"} <= names
    assert ends == [1, 0]
    assert not (tmp_path / "wandb").exists()


def test_mlflow_goes_on_with_the_same_run(tmp_path):
    run = tracked("mlflow", tmp_path, MLFLOW_TRACKING_URI=(tmp_path / "store").as_uri())
    (folder,) = (tmp_path / "store").glob(f"*/{run}")
    lines = [line.split() for line in (folder / "metrics" / "train" / "loss").read_text().splitlines()]
    assert [int(step) for _, _, step in lines] == [*range(1, 9)]
    assert (folder / "params" / "train.steps").read_text() == "8"
    assert "name: ours" in (folder.parent / "meta.yaml").read_text()
    meta = (folder / "meta.yaml").read_text()
    assert "status: 3" in meta  # finished
    assert "run_name: run" in meta
    samples = folder / "artifacts" / "samples" / "step-00000008"
    assert (samples / "text.txt").read_text() == "a <b>"
    assert (samples / "image.png").stat().st_size > 0
    assert len([path for path in folder.parent.iterdir() if path.is_dir() and len(path.name) == 32]) == 1
