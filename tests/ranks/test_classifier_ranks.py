"""Image classifiers on several ranks: the model and the figures of one, each held-out image counted once."""

import csv

import pytest
import torch
from digits import SIZE, write_digit_folders
from test_optimizer import largest_difference
from test_training import both

from hvdtrain.data.images_config import ImagesConfig
from hvdtrain.optim.sgd import SgdConfig
from hvdtrain.recipes.confusion import FILE
from hvdtrain.recipes.resnet import ImageClassifier, ImageModelConfig
from hvdtrain.settings import EvalConfig, TrainConfig


@pytest.fixture
def folders(world, shared_dir):
    """Digits: 31 are held out, which no number of ranks divides. One of each part is broken."""
    if world.rank == 0:
        write_digit_folders(shared_dir / "digits", num_train=40, num_test=31)
        for split in ("train", "val"):
            sorted((shared_dir / "digits" / split / "4").iterdir())[0].write_bytes(b"no image")
    world.barrier("digits")
    return shared_dir


@pytest.mark.ranks(2)
@pytest.mark.same_on_gloo
def test_resnet_equals_one_process(world, folders, tmp_path):
    """Normalised over all ranks, augmented, mixed, with an image that is passed over."""
    data = ImagesConfig(
        root=str(folders / "digits"),
        image_size=SIZE,
        augment="padded-crop",
        mixup=0.2,
        on_error="skip",
        val_resize=SIZE,
    )
    sync = world.size > 1
    recipe = ImageClassifier(
        train=TrainConfig(steps=3, global_batch_size=16, precision="fp64", max_grad_norm=None, ema=0.5),
        optim=SgdConfig(peak_lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, schedule="plateau", patience=1),
        model=ImageModelConfig(name="resnet20", sync_batch_norm=sync),
        data=data,
        eval=EvalConfig(batch_size=3, every=2),
    )
    model, metrics, reference, expected = both(recipe, world, folders, tmp_path)
    assert largest_difference(model, reference) < 1e-9
    assert metrics == pytest.approx(expected, abs=1e-9)
    assert metrics["val/unread"] == pytest.approx(1 / 31)
    tables = [list(csv.reader((folder / FILE).open())) for folder in (folders / "run", tmp_path / "alone")]
    assert tables[0] == tables[1]
    counts = torch.tensor([[int(cell) for cell in row[1:]] for row in tables[0][1:]])
    assert int(counts.sum()) == 30
    assert int(counts.trace()) == round(metrics["val/top1"] * 30)
