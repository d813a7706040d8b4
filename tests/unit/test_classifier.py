"""The recipe resnet on real digits: its figures are exact, and predict and export answer with what was trained."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from digits import SIZE, write_digit_folders, write_digits
from PIL import Image, ImageDraw

import hvdtrain
from hvdtrain import cli
from hvdtrain.data.image_samples import UNREAD, normalised
from hvdtrain.data.images_config import ImagesConfig
from hvdtrain.data.vision import VisionConfig, load_images
from hvdtrain.errors import ConfigError, DataError
from hvdtrain.models.mlp import Mlp
from hvdtrain.recipes import load_recipe
from hvdtrain.recipes.confusion import FILE, ConfusionMatrix
from hvdtrain.recipes.given import apply
from hvdtrain.recipes.image_models import Description, load_classifier, read_description
from hvdtrain.recipes.resnet_task import ClassificationLoss
from hvdtrain.settings.values import Source
from hvdtrain.verbs import programs
from hvdtrain.verbs.predict import read_image

SMALL = {"model": {"name": "resnet20"}, "labels": {"smoothing": 0.1}}
IMAGES = {"image_size": SIZE, "val_resize": SIZE, "augment": "none", "workers": 0}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Put back the variables that a start sets for its process."""
    for name in ("HOROVOD_FUSION_THRESHOLD", "MKL_NUM_THREADS", "OMPI_MCA_mpi_yield_when_idle"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))


def run_cli(*words):
    return cli.main([str(word) for word in words])


def ours(**settings):
    return apply(load_recipe("resnet"), [({**SMALL, **settings}, Source("test"))])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run on a few digits, one of the held-out ones broken."""
    folder = tmp_path_factory.mktemp("classifier")
    write_digit_folders(folder / "digits", num_train=60, num_test=31)
    next(iter(sorted((folder / "digits" / "val" / "3").iterdir()))).write_bytes(b"no image")
    data = {**IMAGES, "root": str(folder / "digits"), "on_error": "skip"}
    settings = {**SMALL, "data": data, "train": {"steps": 3, "global_batch_size": 20}, "eval": {"batch_size": 7}}
    result = hvdtrain.train("resnet", run_dir=folder / "run", **settings)
    return folder, result, settings


def test_figures_are_those_of_all_images_that_can_be_read(trained):
    """By hand: the exported model on each held-out image, one by one."""
    folder, result, settings = trained
    assert run_cli("export", folder / "run", "--output", folder / "by-hand") == 0
    task = ours(data=settings["data"]).build(lambda text: None)
    model = task.model.eval()
    model.load_state_dict(safetensors.torch.load_file(folder / "by-hand" / "model.safetensors"))
    losses, right, right5, counts = [], 0, 0, torch.zeros(10, 10, dtype=torch.int64)
    for index in range(31):
        image, label = task.val_data.batch(torch.tensor([index]))
        if label == UNREAD:
            continue
        with torch.no_grad():
            logits = model(normalised(image, torch.float32, True))
        losses.append(float(F.cross_entropy(logits, label)))
        order = logits[0].argsort(descending=True).tolist()
        right += order[0] == int(label)
        right5 += int(label) in order[:5]
        counts[int(label), order[0]] += 1
    assert len(losses) == 30
    assert result.metrics["val/loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert result.metrics["val/top1"] == pytest.approx(right / 30)
    assert result.metrics["val/top5"] == pytest.approx(right5 / 30)
    assert result.metrics["val/unread"] == pytest.approx(1 / 31)
    rows = [line.split(",") for line in (folder / "run" / FILE).read_text().splitlines()]
    assert rows[0] == ["class", *map(str, range(10))]
    assert [[int(cell) for cell in row[1:]] for row in rows[1:]] == counts.tolist()


def test_an_export_says_how_it_is_loaded(trained, capsys):
    """The code in its README.md is run, and the program gives the same logits, for any number of images."""
    folder, _, _ = trained
    assert run_cli("export", folder / "run", "--output", folder / "out", "--program") == 0
    assert "predict" in capsys.readouterr().out
    note = (folder / "out" / "README.md").read_text()
    code = note.split("```python\n")[1].split("```")[0].replace('"model.', f'"{folder}/out/model.')
    names = {}
    exec(code, names)
    images = torch.randn(3, 3, SIZE, SIZE)
    program = torch.export.load(folder / "out" / "model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(images), names["model"](images), rtol=1e-4, atol=1e-4)
    assert read_description(folder / "out").classes == tuple(map(str, range(10)))


def test_an_export_as_onnx_answers_as_torch_does(trained, capsys):
    """For any number of images, in a file of its own."""
    folder, _, _ = trained
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    import onnxruntime

    assert run_cli("export", folder / "run", "--output", folder / "as-onnx", "--format", "onnx") == 0
    session = onnxruntime.InferenceSession(folder / "as-onnx" / "model.onnx")
    about, weights = read_description(folder / "as-onnx"), folder / "as-onnx" / "model.safetensors"
    model = load_classifier(about, safetensors.torch.load_file(weights), "it")
    for number in (1, 5):
        images = torch.randn(number, 3, SIZE, SIZE)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-4)


def test_onnx_is_refused_in_a_sentence_where_its_libraries_are_missing(trained, capsys, monkeypatch):
    folder, _, _ = trained
    monkeypatch.setattr(programs, "_LIBRARIES", ("torch", "onnx_that_is_not_there"))
    assert run_cli("export", folder / "run", "--output", folder / "none", "--format", "onnx") == 2
    assert "--format onnx needs onnx_that_is_not_there: pip install 'hvdtrain[onnx]'" in capsys.readouterr().err
    assert not (folder / "none").exists()


def test_predict_answers_as_the_evaluation_does(trained, capsys):
    folder, _, _ = trained
    files = sorted((folder / "digits" / "train").glob("*/*.png"))[:35]  # more than a batch
    answers = []
    for source in ("run", "out"):
        if source == "out" and not (folder / "out").exists():
            run_cli("export", folder / "run", "--output", folder / "out", "--program")
        answer = folder / f"{source}.json"
        assert run_cli("predict", folder / source, *files, "--top", "10", "--json", answer) == 0
        answers.append(json.loads(answer.read_text())["images"])
    assert answers[0] == answers[1]
    assert [entry["file"] for entry in answers[0]] == list(map(str, files))
    for entry in answers[0]:
        shares = [found["probability"] for found in entry["classes"]]
        assert sum(shares) == pytest.approx(1)
        assert shares == sorted(shares, reverse=True)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(str(files[0])) and "%" in line for line in lines) == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["predict", "{folder}/run"], "predict RUN_DIR FILES..."),
        (["predict", "{folder}/run", "{folder}/nosuch.png"], "nosuch.png"),
        (["predict", "{folder}/run", "{folder}/run/config.toml"], "cannot be read (it is no image of a kind"),
        (["predict", "{folder}/digits", "{folder}/run/config.toml"], "neither a run's directory"),
        (["predict", "{folder}", "{folder}/run/config.toml"], "it is a folder of runs: name one, such as {folder}/run"),
        (["generate", "{folder}/run"], "is a classifier of images"),
    ],
)
def test_wrong_questions_are_refused(trained, words, says, capsys):
    assert run_cli(*(word.format(folder=trained[0]) for word in words)) == 2
    assert says.format(folder=trained[0]) in capsys.readouterr().err


def test_mnist_answers_to_own_files(tmp_path):
    write_digits(tmp_path)
    settings = {"data": {"root": str(tmp_path)}, "train": {"steps": 3}}
    hvdtrain.train("mnist", run_dir=tmp_path / "run", **settings)
    assert run_cli("export", tmp_path / "run") == 0
    assert "Mlp()" in (tmp_path / "run" / "export" / "README.md").read_text()
    model = Mlp()
    model.load_state_dict(safetensors.torch.load_file(tmp_path / "run" / "export" / "model.safetensors"))
    data = load_images(VisionConfig(root=str(tmp_path)), train=False)
    for number in range(3):
        Image.fromarray(data.images[number].numpy()).save(tmp_path / f"{number}.png")
    files = [tmp_path / f"{number}.png" for number in range(3)]
    assert run_cli("predict", tmp_path / "run", *files, "--json", tmp_path / "a.json", "--top", "1") == 0
    with torch.no_grad():
        shares, answers = model(data.batch(torch.arange(3))[0]).exp().max(1)
    found = [entry["classes"][0] for entry in json.loads((tmp_path / "a.json").read_text())["images"]]
    assert [entry["class"] for entry in found] == list(map(str, answers.tolist()))
    assert [entry["probability"] for entry in found] == pytest.approx(shares.tolist(), rel=1e-4)


@pytest.mark.parametrize("is_dark_on_white", [True, False])
def test_a_drawing_of_any_size_is_brought_into_mnists_form(tmp_path, is_dark_on_white):
    """An L, whose middle of mass is not that of its box: in 20x20 pixels, the middle of mass in the middle."""
    stroke, ground = ((0, 0, 0, 255), (255, 255, 255, 0)) if is_dark_on_white else ((255,) * 4, (0, 0, 0, 255))
    drawing = Image.new("RGBA", (300, 200), ground)
    draw = ImageDraw.Draw(drawing)
    draw.rectangle((180, 20, 199, 119), fill=stroke)
    draw.rectangle((180, 100, 229, 119), fill=stroke)
    drawing.save(tmp_path / "l.png")
    about = Description(name="mnist", classes=("0",), image_size=28, resize=28, channels=1, mean=(0.5,), std=(0.5,))
    image = read_image(tmp_path / "l.png", about)
    assert image.shape == (1, 28, 28)
    pixels = image[0].double()
    rows, columns = (pixels.sum(axis).nonzero().flatten() for axis in (1, 0))
    assert len(rows) == 20
    assert len(columns) == 10
    middle = [float((pixels.sum(1 - axis) * torch.arange(28)).sum() / pixels.sum()) for axis in (0, 1)]
    assert middle == pytest.approx([13.5, 13.5], abs=0.51)
    assert pixels[rows[0], columns[0]] > 200
    assert pixels[0, 0] == 0


def test_a_recipe_of_ones_own_is_exported_too(tmp_path, capsys):
    class Line(hvdtrain.Recipe):
        """A line."""

        def build(self, say):
            x = torch.arange(8.0).unsqueeze(1)
            data = hvdtrain.TensorSamples(x, 2 * x)
            return hvdtrain.Task(
                model=torch.nn.Linear(1, 1),
                train_data=data,
                val_data=data,
                loss_sums=lambda model, batch: {"loss": (model(batch[0]) - batch[1]).square().sum()},
            )

    hvdtrain.train(Line(train=hvdtrain.TrainConfig(steps=2, global_batch_size=4)), run_dir=tmp_path / "run")
    assert run_cli("export", tmp_path / "run", "--program") == 2
    assert "--program is for classifiers" in capsys.readouterr().err
    assert run_cli("export", tmp_path / "run", "--format", "onnx") == 2
    assert "--format onnx is for classifiers" in capsys.readouterr().err
    assert run_cli("export", tmp_path / "run") == 0
    weights = safetensors.torch.load_file(tmp_path / "run" / "export" / "model.safetensors")
    torch.nn.Linear(1, 1).load_state_dict(weights)
    assert "load_state_dict" in (tmp_path / "run" / "export" / "README.md").read_text()
    assert run_cli("generate", tmp_path / "run") == 2
    assert "no run of a language model" in capsys.readouterr().err
    assert run_cli("export", tmp_path / "run", "--overwrite") == 0


class Fixed(torch.nn.Module):
    """Says what it was told to."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, images):
        return self.logits


def test_the_loss_of_a_mixture_is_the_mixture_of_losses():
    torch.manual_seed(0)
    logits, labels, others = torch.randn(4, 10), torch.tensor([1, 2, UNREAD, 3]), torch.tensor([5, 2, UNREAD, 4])
    shares = torch.tensor([0.7, 1.0, 1.0, 0.2])
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    recipe = ours(data={"root": ".", "on_error": "skip"})
    loss = ClassificationLoss(recipe, 10, ConfusionMatrix(tuple(map(str, range(10)))))
    sums = loss(Fixed(logits), (images, labels, others, shares))
    rows = [0, 1, 3]
    own, other = (F.one_hot(part[rows], 10) for part in (labels, others))
    soft = shares[rows, None] * own + (1 - shares[rows, None]) * other
    soft = 0.9 * soft + 0.1 / 10
    expected = F.cross_entropy(logits[rows], soft, reduction="sum")
    assert float(sums["loss"].detach()) == pytest.approx(float(expected), rel=1e-5)
    assert int(sums["unread"]) == 1
    assert tuple(sums) == loss.metrics
    few = ClassificationLoss(ours(data={"root": "."}), 2, ConfusionMatrix(("a", "b")))
    assert tuple(few(Fixed(logits[:, :2]), (images, labels % 2))) == few.metrics == ("loss", "top1")
    model = Fixed(logits).eval()
    plain = float(loss(model, (images, labels))["loss"].detach())
    assert plain == pytest.approx(float(F.cross_entropy(logits[rows], labels[rows], reduction="sum")), rel=1e-5)
    assert loss.summarize({"loss": 1.5, "top1": 0.375, "unread": 0.25}) == {"loss": 2, "top1": 0.5, "unread": 0.25}


def test_the_commonest_mistakes_of_many_classes_are_named():
    matrix = ConfusionMatrix(tuple(f"class {i}" for i in range(40)))
    matrix.counts = torch.eye(40, dtype=torch.int64) * 9
    matrix.counts[3, 7], matrix.counts[30, 2] = 5, 2
    assert "class 3 taken for class 7: 5\n  class 30 taken for class 2: 2\n" in matrix.describe()
    assert matrix.describe().count("taken for") == 2


def test_channels_last_is_another_layout_of_the_same():
    torch.manual_seed(0)
    images, labels = torch.randint(256, (4, 3, SIZE, SIZE), dtype=torch.uint8), torch.arange(4)
    sums = []
    for layout in ("yes", "no"):
        recipe = ours(data={"synthetic": True, "image_size": SIZE}, model={"name": "resnet20", "channels_last": layout})
        task = recipe.build(lambda text: None)
        weight = task.model.blocks[8].conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == (layout == "yes")
        found = task.loss_sums(task.model, (images, labels))["loss"]
        found.backward()
        sums.append((float(found.detach()), float(weight.grad.norm())))
    assert sums[0] == pytest.approx(sums[1], rel=1e-4)


def test_no_images_and_no_model(tmp_path):
    with pytest.raises(DataError, match=r"--data\.root"):
        ours().build(lambda text: None)
    with pytest.raises(ConfigError, match="resnet50"):
        apply(
            load_recipe("resnet"),
            [({"model": {"name": "resnett50"}, "data": {"synthetic": True}}, Source("t"))],
        ).build(lambda text: None)


def test_settings_need_no_torch():
    code = "import sys; from hvdtrain import cli; cli.parse(['train', 'resnet', '--data.synthetic']);"
    code += "print(sorted({'torch', 'torchvision'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_sizes_follow_from_the_data():
    assert (ImagesConfig().size, ImagesConfig().resize) == (224, 256)
    assert (ImagesConfig(image_size=448).resize, ImagesConfig(dataset="cifar10").size) == (512, 32)
    assert [ImagesConfig(dataset=name).augmentation for name in ("folder", "cifar10")] == [
        "resized-crop",
        "padded-crop",
    ]
