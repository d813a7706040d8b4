"""Links to what is not there: whoever lists files says so, or passes them over where that was asked for."""

import os

import pytest
from PIL import Image

from hvdtrain.data.clips import find_clips
from hvdtrain.data.image_files import find_images
from hvdtrain.data.images_config import ImagesConfig
from hvdtrain.data.shards import shards_of
from hvdtrain.data.text.corpus import find_documents, standard_library
from hvdtrain.data.text.pairs import PairReader
from hvdtrain.data.text.token_files import _find
from hvdtrain.errors import DataError

GONE = "nowhere/at all"


def fill(folder, names):
    """Write files, of which images are pictures."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            Image.new("RGB", (8, 8)).save(path)
        else:
            path.write_text("some text\n")


PICTURES = [f"{split}/{name}/{i}.png" for split in ("train", "val") for name in ("cat", "dog") for i in range(2)]
CLASSES = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(9)]


def images(folder, on_error="stop"):
    return find_images(ImagesConfig(root=str(folder), on_error=on_error))


def clips(folder, on_error="stop"):
    return find_clips(str(folder), PairReader(None, None, on_error))


# Files that are there, the link, and who lists them.
PLACES = {
    "an image": (PICTURES, "train/cat/9.png", images),
    "a held-out image": (PICTURES, "val/dog/9.JPG", images),
    "an image deep inside": ([*PICTURES, "train/cat/more/1.png"], "train/cat/more/2.png", images),
    "a folder of images": (PICTURES, "train/cat/more", images),
    "a class": (PICTURES, "train/emu", images),
    "a held-out class": (PICTURES, "val/emu", images),
    "all that is held out": ([name for name in PICTURES if name.startswith("train")], "val", images),
    "all training images": ([*CLASSES, *PICTURES[4:]], "train", images),
    "a class beside others": (CLASSES, "emu", images),
    "a text": (["a.txt", "b.txt"], "c.txt", lambda folder: find_documents(str(folder))),
    "a folder of texts": (["a.txt", "b.txt"], "more", lambda folder: find_documents(str(folder))),
    "a text of a glob": (["a.txt", "b.txt"], "c.txt", lambda folder: find_documents(f"{folder}/*.txt")),
    "the text": ([], "c.txt", lambda folder: find_documents(f"{folder}/c.txt")),
    "a clip": (["a.wav", "a.txt"], "b.wav", clips),
    "the text of a clip": (["a.wav", "a.txt", "b.wav"], "b.txt", clips),
    "a shard": (["a.tar"], "b.tar", lambda folder: shards_of(folder, ".tar")),
    "a shard of a glob": (["a.parquet"], "b.parquet", lambda folder: shards_of(f"{folder}/*", ".parquet")),
    "tokens of a glob": (["a.bin"], "b.bin", lambda folder: _find(f"{folder}/*.bin")),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_link_that_leads_nowhere_is_told(tmp_path, case):
    files, link, listed = PLACES[case]
    fill(tmp_path, files)
    if files and case not in ("all that is held out", "all training images", "the text of a clip"):
        listed(tmp_path)
    (tmp_path / link).symlink_to(GONE)
    with pytest.raises(DataError, match=rf"{link} is a link to .*[mM]end") as caught:
        listed(tmp_path)
    assert "\n" not in str(caught.value)


def test_one_that_is_passed_over_is_counted(tmp_path):
    fill(tmp_path / "images", PICTURES)
    for name in ("train/cat/9.png", "train/cat/more"):
        (tmp_path / "images" / name).symlink_to(GONE)
    found = images(tmp_path / "images", "skip")
    assert len(found.train.labels) == 5  # it cannot be read, which is said, and counted as `unread`
    assert found.train.name(2).endswith("9.png")
    assert "1 other files were passed over (without an ending)" in found.about
    fill(tmp_path / "clips", ["a.wav", "a.txt"])
    (tmp_path / "clips" / "b.wav").symlink_to(GONE)
    reader = PairReader(None, None, "skip")
    assert [clip.name for clip in find_clips(str(tmp_path / "clips"), reader)] == ["a.wav"]
    assert reader.num_skipped == 1
    assert reader.skipped[0].endswith("b.wav is a link to what is not there")


def test_what_is_hidden_or_another_ones_is_left_alone(tmp_path):
    fill(tmp_path, PICTURES)
    for name in (".cache", "train/.lock", "train/cat/.#1.png"):
        (tmp_path / name).symlink_to(GONE)
    assert len(images(tmp_path).train.labels) == 4
    assert standard_library()  # whose folder belongs to the system


def test_what_is_no_file_is_not_opened(tmp_path):
    """A pipe would be waited for."""
    fill(tmp_path, PICTURES)
    os.mkfifo(tmp_path / "train" / "cat" / "5.png")
    found = images(tmp_path)
    assert len(found.train.labels) == 4
    assert "1 other files were passed over (.png)" in found.about
