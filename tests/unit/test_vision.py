"""Vision data: IDX files as torchvision lays them out, and learning on scikit-learn's handwritten digits."""

from __future__ import annotations

import gzip
import multiprocessing
import struct
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hvdtrain.data.torchvision_import import import_torchvision
from hvdtrain.data.vision import ImageTensors, VisionConfig, load_images
from hvdtrain.errors import DataError
from hvdtrain.models.mlp import Mlp
from hvdtrain.recipes.mnist import Digits

needs_torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")


def write_idx(path: Path, values: NDArray[np.uint8]) -> None:
    """Write unsigned bytes in the IDX format: two zero bytes, the type (8), the dimensions, big-endian sizes, data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes())


def write_mnist(
    root: Path, num_train: int = 20, num_test: int = 10, name: str = "MNIST"
) -> dict[str, NDArray[np.uint8]]:
    """Write random images in torchvision's layout and return all arrays by file name."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, num in (("train", num_train), ("t10k", num_test)):
        arrays[f"{split}-images-idx3-ubyte"] = rng.integers(0, 256, (num, 28, 28), dtype=np.uint8)
        arrays[f"{split}-labels-idx1-ubyte"] = rng.integers(0, 10, num, dtype=np.uint8)
    for file, values in arrays.items():
        write_idx(root / name / "raw" / file, values)
    return arrays


@needs_torchvision
@pytest.mark.parametrize(("dataset", "name"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_files_come_back_as_normalised_batches(tmp_path: Path, dataset: str, name: str) -> None:
    arrays = write_mnist(tmp_path, name=name)
    for train, split, num in ((True, "train", 20), (False, "t10k", 10)):
        data = load_images(VisionConfig(dataset=dataset, root=str(tmp_path)), train=train)
        indices = torch.tensor([7, 0, 7, num - 1])
        x, y = data.batch(indices)
        pixels = arrays[f"{split}-images-idx3-ubyte"][indices.numpy()].astype(np.float64)
        assert len(data) == num
        assert (x.shape, x.dtype, y.dtype) == ((4, 1, 28, 28), torch.float32, torch.int64)
        np.testing.assert_allclose(x[:, 0].numpy(), (pixels / 255 - 0.5) / 0.5, atol=1e-6)
        assert y.tolist() == arrays[f"{split}-labels-idx1-ubyte"][indices.numpy()].tolist()


def test_black_and_white_become_minus_one_and_one() -> None:
    x, _ = ImageTensors(torch.tensor([[[0, 255]]], dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)).batch(
        torch.tensor([0])
    )
    assert x.flatten().tolist() == [-1.0, 1.0]


def test_the_fingerprint_knows_every_pixel_and_label() -> None:
    images, labels = torch.zeros(3, 2, 2, dtype=torch.uint8), torch.arange(3)
    first = ImageTensors(images, labels).fingerprint()
    assert ImageTensors(images.clone(), labels.clone()).fingerprint() == first
    other = images.clone()
    other[2, 1, 1] = 1
    prints = {ImageTensors(other, labels).fingerprint(), ImageTensors(images, labels.flip(0)).fingerprint()}
    assert len(prints | {first}) == 3


def test_images_and_labels_must_match() -> None:
    with pytest.raises(ValueError, match=r"\(3, 2, 2\) and \(4,\)"):
        ImageTensors(torch.zeros(3, 2, 2, dtype=torch.uint8), torch.arange(4))


@needs_torchvision
def test_missing_files_are_named_with_what_to_do(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte") as caught:
        load_images(VisionConfig(root=str(tmp_path)), train=True)
    message = str(caught.value)
    assert "--data.download" in message
    assert str(tmp_path / "MNIST" / "raw") in message
    assert "train-images" not in message  # it is there


@needs_torchvision
def test_a_first_command_without_files_says_what_to_add(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"^mnist: its files are not there: add --data\.download to fetch them, or name"
    ):
        load_images(VisionConfig(root=str(tmp_path)), train=True)
    for file in write_mnist(tmp_path):
        path = tmp_path / "MNIST" / "raw" / file
        path.rename(path.with_name(f"{file}.gz"))
    with pytest.raises(DataError, match=r"MNIST/raw are compressed: run gunzip \S*/raw/\*\.gz, or"):
        load_images(VisionConfig(root=str(tmp_path)), train=True)


@needs_torchvision
@pytest.mark.parametrize("split", ["train", "t10k"])
@pytest.mark.parametrize("kind", ["images-idx3", "labels-idx1"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "no items", "one less"])
def test_damaged_files_are_told(tmp_path: Path, split: str, kind: str, damage: str) -> None:
    values = write_mnist(tmp_path)[f"{split}-{kind}-ubyte"]
    path = tmp_path / "MNIST" / "raw" / f"{split}-{kind}-ubyte"
    if damage in ("no items", "one less"):
        write_idx(path, values[: {"no items": 0, "one less": -1}[damage]])
    else:
        path.write_bytes({"cut": path.read_bytes()[:-5], "empty": b"", "text": b"<html>404 Not Found</html>"}[damage])
    with pytest.raises(DataError, match=rf"the {split} files in .* are damaged .*: remove .*{split}-\*"):
        load_images(VisionConfig(root=str(tmp_path)), train=split == "train")


@needs_torchvision
@needs_torchvision
@pytest.mark.parametrize(("size", "largest"), [(32, 9), (28, 10)])
def test_images_of_another_size_or_more_classes_are_refused(tmp_path: Path, size: int, largest: int) -> None:
    """As those of EMNIST: they ended the run with a traceback of torch's."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        write_idx(raw / f"{split}-images-idx3-ubyte", np.zeros((9, size, size), np.uint8))
        write_idx(raw / f"{split}-labels-idx1-ubyte", np.full(9, largest, np.uint8))
    recipe = Digits(data=VisionConfig(root=str(tmp_path)))
    with pytest.raises(DataError, match=rf"images of {size}x{size} and labels up to {largest}: this recipe is for"):
        recipe.build(print)


def test_a_directory_with_the_files_is_only_read(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    load_images(VisionConfig(root=str(tmp_path), download=True), train=True)
    assert sorted(tmp_path.rglob("*")) == before


def serve_mnist(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make torchvision download from a local folder, which holds compressed files and receives a log of requests."""
    source = folder / "source"
    arrays = write_mnist(source)
    resources = []
    for file in arrays:
        raw = source / "MNIST" / "raw" / file
        packed = folder / f"{file}.gz"
        packed.write_bytes(gzip.compress(raw.read_bytes()))
        resources.append((packed.name, None))
    mnist = import_torchvision("torchvision.datasets.mnist")

    def fetch(url: str, download_root: str, filename: str, md5: None) -> None:
        with (folder / "requests").open("a") as log:
            log.write(f"{filename}\n")
        print("50 %")  # as torchvision does
        time.sleep(0.05)
        (Path(download_root) / filename[: -len(".gz")]).write_bytes(gzip.decompress((folder / filename).read_bytes()))

    monkeypatch.setattr(mnist.MNIST, "resources", resources)
    monkeypatch.setattr(mnist.MNIST, "mirrors", ["local:"])
    monkeypatch.setattr(mnist, "download_and_extract_archive", fetch)


@needs_torchvision
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 warns; the children run one thread
def test_processes_that_start_together_download_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_mnist(monkeypatch, tmp_path)
    root = tmp_path / "shared" / "root"
    context = multiprocessing.get_context("fork")  # the children inherit the local download
    processes = [context.Process(target=_load_all, args=(str(root),)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len((tmp_path / "requests").read_text().split()) == 4  # each file once
    assert not list(root.glob(".download-*"))
    assert len(load_images(VisionConfig(root=str(root)), train=True)) == 20


def _load_all(root: str) -> None:
    torch.set_num_threads(1)  # a forked process must not wait for its parent's threads
    for train, num in ((True, 20), (False, 10)):
        assert len(load_images(VisionConfig(root=root, download=True), train=train)) == num


@needs_torchvision
def test_a_download_replaces_nothing_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve_mnist(monkeypatch, tmp_path)
    mine = np.full((20, 28, 28), 7, dtype=np.uint8)
    write_idx(tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte", mine)
    data = load_images(VisionConfig(root=str(tmp_path), download=True), train=True)
    assert (data.images == 7).all()
    assert capsys.readouterr().out == ""


@needs_torchvision
def test_a_failed_download_is_told_and_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mnist = import_torchvision("torchvision.datasets.mnist")
    monkeypatch.setattr(mnist.MNIST, "mirrors", ["http://127.0.0.1:9/"])  # the discard port: nobody answers
    with pytest.raises(DataError, match=r"cannot download MNIST .*refused.*Without a network, put train-images"):
        load_images(VisionConfig(root=str(tmp_path), download=True), train=True)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / ".MNIST.lock"]


@needs_torchvision
def test_a_root_that_is_a_file_is_told(tmp_path: Path) -> None:
    root = tmp_path / "file"
    root.touch()
    with pytest.raises(DataError, match="cannot download MNIST"):
        load_images(VisionConfig(root=str(root), download=True), train=True)


@pytest.fixture
def no_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put a folder for a torchvision of the test's own first on the path, and the real one back afterwards."""

    def take() -> dict[str, object]:
        names = [name for name in sys.modules if name.partition(".")[0] == "torchvision"]
        return {name: sys.modules.pop(name) for name in names}

    real = take()
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "torchvision").mkdir()
    yield tmp_path / "torchvision"
    take()
    sys.modules.update(real)  # type: ignore[arg-type]


@needs_torchvision
def test_torchvision_can_be_imported_twice() -> None:
    first = import_torchvision()
    assert import_torchvision() is first
    assert import_torchvision("torchvision.datasets") is first.datasets
    model = import_torchvision("torchvision.models").resnet18()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 1000)


def test_operators_that_do_not_exist_are_declared(no_torchvision: Path) -> None:
    (no_torchvision / "__init__.py").write_text(
        "import inspect, torch\n"
        "import torchvision.part\n"
        # Up to torch 2.6 nothing may be registered twice, and there is no such argument.
        "may = 'allow_override' in inspect.signature(torch.library.register_fake).parameters\n"
        "strict = {'allow_override': False} if may else {}\n"
        "def same(dets, scores, iou_threshold): return dets\n"
        "torch.library.register_fake('torchvision::first_for_test', same, **strict)\n"
        "torch.library.register_fake(\n    'torchvision::second_for_test', same, **strict)\n"
    )
    (no_torchvision / "part.py").write_text("ready = True\n")
    assert import_torchvision().part.ready is True  # kept from a failed import, it would be no attribute
    assert "float iou_threshold" in str(torch.ops.torchvision.second_for_test.default._schema)


@pytest.mark.parametrize(
    "error", ["RuntimeError('out of memory')", "ModuleNotFoundError('no such part', name='torchvision.part')"]
)
def test_other_errors_of_the_import_pass_through(no_torchvision: Path, error: str) -> None:
    (no_torchvision / "__init__.py").write_text(f"raise {error}\n")
    with pytest.raises((RuntimeError, ModuleNotFoundError), match=r"out of memory|no such part"):
        import_torchvision()


def test_an_operator_that_stays_missing_ends_the_import(no_torchvision: Path) -> None:
    (no_torchvision / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::gone_for_test does not exist')\n"
    )
    with pytest.raises(RuntimeError, match="operator torchvision::gone_for_test does not exist"):
        import_torchvision()


@pytest.mark.parametrize("name", ["torchvision", "PIL"])
def test_a_missing_package_is_told_with_the_pip_command(
    no_torchvision: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # Python's way to say: it cannot be imported
    (no_torchvision / "__init__.py").write_text("import PIL\n")
    with pytest.raises(DataError, match=rf"{name} is not installed: .*pip install --no-deps torchvision"):
        import_torchvision()


def test_mlp_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = Mlp(seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, other = Mlp(seed=3).state_dict(), Mlp(seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_mlp_is_the_textbook_network() -> None:
    model, x = Mlp(), torch.randn(5, 1, 28, 28)
    assert [type(layer).__name__ for layer in model.layers] == [
        "Linear",
        "ReLU",
        "Linear",
        "ReLU",
        "Linear",
        "LogSoftmax",
    ]
    assert sum(parameter.numel() for parameter in model.parameters()) == 784 * 128 + 128 + 128 * 64 + 64 + 64 * 10 + 10
    torch.testing.assert_close(model(x).exp().sum(1), torch.ones(5))
    torch.testing.assert_close(model(x), model(x.flatten(1)))


def load_digits() -> tuple[ImageTensors, ImageTensors]:
    """Return scikit-learn's 8x8 handwritten digits, enlarged to 28x28; the last 297 are held out."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    small = torch.from_numpy(digits.images).unsqueeze(1) / 16
    large = F.interpolate(small, size=(28, 28), mode="bilinear", align_corners=False)
    images, labels = (large[:, 0] * 255).round().to(torch.uint8), torch.from_numpy(digits.target).long()
    return ImageTensors(images[:1500], labels[:1500]), ImageTensors(images[1500:], labels[1500:])


def accuracy(model: Mlp, data: ImageTensors) -> float:
    x, y = data.batch(torch.arange(len(data)))
    with torch.no_grad():
        return (model(x).argmax(1) == y).double().mean().item()


@pytest.mark.slow
def test_mlp_learns_handwritten_digits() -> None:
    train, test = load_digits()
    model = Mlp(seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    untrained = accuracy(model, test)
    for _ in range(40):
        for indices in torch.randperm(len(train), generator=generator).split(64):
            _step(model, optimizer, *train.batch(indices))
    assert untrained < 0.3
    assert accuracy(model, test) > 0.85


def _step(model: Mlp, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    loss = F.nll_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
