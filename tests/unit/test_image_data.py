"""Images in folders: found, decoded, augmented by (seed, epoch, sample), mixed, passed over where they are broken."""

import pickle
import shutil
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from hvdtrain.data import image_decoding, image_files, image_samples
from hvdtrain.data.draws import Draws
from hvdtrain.data.image_files import find_images
from hvdtrain.data.image_samples import MEAN, STD, UNREAD, ImageSamples, SyntheticImages, normalised
from hvdtrain.data.images_config import ImagesConfig
from hvdtrain.data.loader import Reading
from hvdtrain.data.torchvision_import import import_torchvision
from hvdtrain.errors import DataError

CLASSES = ("cat", "dog, small", "emu")


def write_images(root, per_class=4, splits=("train", "val"), size=(40, 30)):
    """Write random pictures as PNG and JPEG."""
    rng = np.random.default_rng(0)
    for split in splits:
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(per_class):
                pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.{('png', 'JPG')[number % 2]}")
    return root


def samples_of(root, is_training=True, **settings):
    config = ImagesConfig(root=str(root), image_size=settings.pop("image_size", 16), **settings)
    images = find_images(config)
    return ImageSamples(images.train if is_training else images.held_out, config, is_training=is_training)


def draws(samples, epoch=0, seed=0):
    return Draws(seed, epoch, torch.as_tensor(samples))


def read(data, samples, epoch=0):
    return data.batch(torch.as_tensor(samples), draws(samples, epoch))


@pytest.mark.parametrize("names", [("Train", "Val"), ("training", "testing"), ("train_", "valid")])
def test_folders_of_other_names_than_ours_are_no_classes(tmp_path, names):
    """A model learned to tell training images from held-out ones."""
    write_images(tmp_path, splits=names)
    if "train_" in names:
        assert find_images(ImagesConfig(root=str(tmp_path))).train.classes == names
        return
    with pytest.raises(DataError, match=r"have the names of splits, not of classes: .* training train, and"):
        find_images(ImagesConfig(root=str(tmp_path)))


def test_what_is_not_used_or_not_held_out_is_said(tmp_path):
    write_images(tmp_path, splits=("train", "val", "test"))
    assert find_images(ImagesConfig(root=str(tmp_path))).about == "; not used: the folder test"
    (tmp_path / "cat").mkdir()
    shutil.rmtree(tmp_path / "val" / "emu")
    about = find_images(ImagesConfig(root=str(tmp_path))).about
    assert about == "; nothing is held out of 1 of 3 classes (emu); not used: the folders cat, test"


def test_labels_are_the_places_of_the_classes(tmp_path):
    config = ImagesConfig(root=str(write_images(tmp_path)))
    images = find_images(config)
    assert images.train.classes == images.held_out.classes == CLASSES
    assert Counter(images.train.labels.tolist()) == {0: 4, 1: 4, 2: 4}
    for index, label in enumerate(images.train.labels.tolist()):
        assert CLASSES[label] in images.train.name(index)
    assert images.train.fingerprint() != images.held_out.fingerprint() or images.train.folder != images.held_out.folder


def test_without_a_held_out_folder_a_part_is_held_out_by_name(tmp_path):
    write_images(tmp_path, per_class=30, splits=("",))
    parts = [find_images(ImagesConfig(root=str(tmp_path), val_fraction=0.2)) for _ in range(2)]
    names = [[source.name(i) for i in range(len(source.labels))] for source in (parts[0].train, parts[0].held_out)]
    assert not {*names[0]} & {*names[1]}
    assert len({*names[0], *names[1]}) == 90
    assert 8 <= len(names[1]) <= 30
    assert parts[0].held_out.fingerprint() == parts[1].held_out.fingerprint()
    (tmp_path / "cat" / "new.png").write_bytes((tmp_path / "cat" / "0.png").read_bytes())
    later = find_images(ImagesConfig(root=str(tmp_path), val_fraction=0.2))
    held_out = {later.held_out.name(i) for i in range(len(later.held_out.labels))}
    assert held_out - {str(tmp_path / "cat" / "new.png")} == {*names[1]}  # what was trained on still is


def test_files_that_are_no_images_are_counted_and_links_followed_once(tmp_path):
    write_images(tmp_path)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "cat" / ".hidden.png").write_text("no image")
    (tmp_path / "train" / "cat" / "again").symlink_to(tmp_path / "train" / "cat")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "train" / "cat" / "0.png").rename(tmp_path / "elsewhere" / "0.png")
    (tmp_path / "train" / "cat" / "linked").symlink_to(tmp_path / "elsewhere")
    images = find_images(ImagesConfig(root=str(tmp_path)))
    assert len(images.train.labels) == 12
    assert "1 other files" in images.about


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda root: [path.unlink() for path in (root / "train" / "emu").iterdir()], "emu holds no training images"),
        (lambda root: (root / "val" / "fox").mkdir(), "fox is a class that"),
        (
            lambda root: [shutil.rmtree(root / part / name) for part in ("train", "val") for name in CLASSES[1:]],
            "has one class alone, cat",
        ),
        (lambda root: [path.unlink() for path in root.glob("val/*/*")], "no images to hold out"),
    ],
)
def test_what_is_missing_is_named(tmp_path, spoil, says):
    spoil(write_images(tmp_path))
    with pytest.raises(DataError, match=says):
        find_images(ImagesConfig(root=str(tmp_path)))


def test_no_folder_at_all(tmp_path):
    with pytest.raises(DataError, match=r"--data\.root DIR.*--data\.synthetic"):
        find_images(ImagesConfig())
    with pytest.raises(DataError, match="one for each class"):
        find_images(ImagesConfig(root=str(tmp_path)))


def test_evaluation_sees_what_torchvisions_references_show(tmp_path):
    data = samples_of(write_images(tmp_path), is_training=False, image_size=16, val_resize=20)
    v2 = import_torchvision("torchvision.transforms.v2")
    theirs = v2.Compose(
        [
            v2.Resize(20, interpolation=v2.InterpolationMode.BILINEAR, antialias=True),
            v2.CenterCrop(16),
            v2.PILToTensor(),
            v2.ToDtype(torch.float, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    images, labels = read(data, [0, 5, 11])
    for image, index in zip(normalised(images, torch.float32, True), (0, 5, 11), strict=True):
        with Image.open(data.source.name(index)) as file:
            torch.testing.assert_close(image, theirs(file.convert("RGB")), rtol=1e-5, atol=1e-5)
    assert labels.tolist() == data.source.labels[[0, 5, 11]].tolist()
    assert normalised(images, torch.float32, True).is_contiguous(memory_format=torch.channels_last)


AUGMENTED = [
    {},
    {"augment": "padded-crop"},
    {"auto_augment": "randaugment", "random_erase": 0.5},
    {"auto_augment": "trivialaugment"},
    {"auto_augment": "augmix"},
    {"auto_augment": "imagenet"},
    {"mixup": 0.4},
    {"cutmix": 1.0},
    {"mixup": 0.2, "cutmix": 1.0},
]


@pytest.mark.parametrize("settings", AUGMENTED, ids=str)
def test_a_sample_is_the_same_in_any_batch_and_other_in_every_epoch(tmp_path, settings):
    data = samples_of(write_images(tmp_path), **settings)
    samples = list(range(12))
    whole, again = read(data, samples), read(data, samples[::-1])
    parts = [read(data, samples[start : start + 5]) for start in (0, 5, 10)]
    for position, tensor in enumerate(whole):
        assert torch.equal(tensor, again[position].flip(0))
        assert torch.equal(tensor, torch.cat([part[position] for part in parts]))
    assert not torch.equal(whole[0], read(data, samples, epoch=1)[0])
    assert whole[0].dtype == torch.uint8
    assert whole[0].shape == (12, 3, 16, 16)


def test_reading_leaves_the_generators_alone(tmp_path):
    data = samples_of(write_images(tmp_path))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    read(data, [0, 1])
    assert torch.equal(torch.rand(3), expected)


def test_workers_read_the_same(tmp_path):
    data = samples_of(write_images(tmp_path), mixup=0.2)
    data.batch(torch.tensor([0]))  # the transform is made, and must not travel
    assert pickle.loads(pickle.dumps(data))._transform is None
    from hvdtrain.data.draws import Request

    pool = Reading(workers=1).reader_of(data, "test")
    try:
        theirs = pool.start(Request(torch.tensor([3, 4]), draws([3, 4])))()
    finally:
        pool.close()
    for own, other in zip(read(data, [3, 4]), theirs, strict=True):
        assert torch.equal(own, other)


def test_a_mixture_has_the_shares_that_it_says(tmp_path):
    """Images of one colour each: the mixture's colour is the mean by the shares, a pasted rectangle has its area."""
    for number, name in enumerate(("black", "white")):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (20, 20), (255 * number,) * 3).save(folder / f"{i}.png")
    for kind in ("mixup", "cutmix"):
        data = samples_of(tmp_path, val_fraction=0.2, augment="none", **{kind: 1.0})
        seen = set()
        for epoch in range(8):
            images, labels, others, shares = read(data, list(range(len(data))), epoch)
            whiteness = images.float().mean((1, 2, 3)) / 255
            torch.testing.assert_close(whiteness, labels * shares + others * (1 - shares), rtol=0, atol=0.003)
            seen.update(zip(labels.tolist(), others.tolist(), strict=True))
            if kind == "cutmix":
                assert {*images.unique().tolist()} <= {0, 255}
        assert len(seen) == 4


def break_image(root):
    path = root / "train" / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:60])
    return path


def test_a_broken_image_stops_or_is_named_once_and_passed_over(tmp_path, capfd):
    path = break_image(write_images(tmp_path))
    with pytest.raises(DataError, match=r"cat/0.png cannot be read .*--data.on-error skip"):
        read(samples_of(tmp_path), list(range(12)))
    data = samples_of(tmp_path, on_error="skip")
    number = [data.source.name(i) for i in range(12)].index(str(path))
    for epoch in range(2):
        images, labels = read(data, list(range(12)), epoch)
        assert (labels == UNREAD).nonzero().flatten().tolist() == [number]
        assert not images[number].any()
    assert capfd.readouterr().err.count(str(path)) == 1
    mixed = samples_of(tmp_path, on_error="skip", mixup=1.0)
    for epoch in range(4):
        _, labels, others, shares = read(mixed, list(range(12)), epoch)
        assert (others == UNREAD).nonzero().flatten().tolist() == [number]
        assert shares[number] == 1


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x89PNG\r\n\x1a\n" + b"x" * 50, b"\xff\xd8\xff" + b"y" * 90])
def test_whatever_is_no_image_is_told(tmp_path, content):
    write_images(tmp_path)
    (tmp_path / "train" / "cat" / "0.png").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        read(samples_of(tmp_path), list(range(12)))


def sixteen(pixels):
    return Image.fromarray(pixels.astype(np.uint16) * 257)


def with_transparency(pixels):
    image = Image.fromarray(pixels).convert("P")
    image.info["transparency"] = 0
    return image


# Mode, by what makes an image of it from grey pixels, and the ending of a file that holds it.
MODES = {
    "L": (Image.fromarray, "png"),
    "I;16": (sixteen, "png"),
    "I;16 in TIFF": (sixteen, "tif"),
    "I": (lambda pixels: Image.fromarray(pixels.astype(np.int32) * 257), "tif"),
    "RGBA": (lambda pixels: Image.fromarray(pixels).convert("RGBA"), "png"),
    "LA": (lambda pixels: Image.fromarray(pixels).convert("LA"), "png"),
    "P": (with_transparency, "png"),
    "GIF": (lambda pixels: Image.fromarray(pixels).convert("P"), "png"),
    "CMYK": (lambda pixels: Image.fromarray(pixels).convert("RGB").convert("CMYK"), "tif"),
    "YCbCr": (lambda pixels: Image.fromarray(pixels).convert("YCbCr"), "tif"),
    "1": (lambda pixels: Image.fromarray(pixels).convert("1", dither=0), "png"),
}


@pytest.mark.parametrize("mode", MODES)
def test_images_of_every_mode_are_as_bright_as_they_are(tmp_path, mode):
    """Pillow makes white of all that is brighter than 255 of 65535."""
    make, ending = MODES[mode]
    pixels = np.linspace(0, 255, 256).astype(np.uint8).reshape(16, 16)
    write_images(tmp_path, size=(16, 16))
    make(pixels).save(tmp_path / "val" / "cat" / f"0000.{ending}")
    data = samples_of(tmp_path, is_training=False, val_resize=16)
    number = next(i for i in range(len(data)) if "0000" in data.source.name(i))
    seen = read(data, [number])[0][0].float()
    wanted = torch.from_numpy(pixels).float() if mode != "1" else torch.from_numpy(255 * (pixels > 127)).float()
    assert (seen - wanted).abs().max() <= 3


def test_pixels_without_a_known_range_are_refused(tmp_path):
    write_images(tmp_path)
    for pixels in (np.ones((16, 16), np.float32), np.full((16, 16), 1 << 20, np.int32)):
        Image.fromarray(pixels).save(tmp_path / "val" / "cat" / "0000.tif")
        with pytest.raises(DataError, match=r"0000\.tif cannot be read \(its pixels .* of no known range"):
            read(samples_of(tmp_path, is_training=False), list(range(13)))


def test_cifar10_is_read_from_its_own_files(tmp_path, monkeypatch):
    datasets = import_torchvision("torchvision.datasets")
    with pytest.raises(DataError, match="cifar-10-batches-py"):
        find_images(ImagesConfig(root=str(tmp_path), dataset="cifar10"))
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng, names = np.random.default_rng(0), [f"class {i}" for i in range(10)]
    pixels = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
    entry = {"data": pixels, "labels": [i % 10 for i in range(20)]}
    for file in ("data_batch_1", "test_batch"):
        (folder / file).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    config = ImagesConfig(root=str(tmp_path), dataset="cifar10")
    images = find_images(config)
    assert images.train.classes == tuple(names)
    shown, labels = ImageSamples(images.held_out, config, is_training=False).batch(torch.tensor([7, 3]))
    assert torch.equal(shown[0], torch.from_numpy(pixels[7]).view(3, 32, 32))
    assert labels.tolist() == [7, 3]
    moved, _ = read(ImageSamples(images.train, config, is_training=True), [0, 1])
    assert moved.shape == (2, 3, 32, 32)


def test_random_images_are_the_same_for_a_seed():
    config = ImagesConfig(synthetic=True, image_size=8, num_classes=3)
    one, same, other = (SyntheticImages(100, config, seed) for seed in (0, 0, 1))
    samples = torch.tensor([0, 99, 64])
    assert torch.equal(one.batch(samples)[0], same.batch(samples)[0])
    assert not torch.equal(one.batch(samples)[0], other.batch(samples)[0])
    assert one.batch(samples)[1].max() < 3
    assert len(one) == 100


def test_the_suffixes_are_torchvisions():
    theirs = import_torchvision("torchvision.datasets.folder").IMG_EXTENSIONS
    assert {*image_files.EXTENSIONS} == {*theirs}


def marked(size=(8, 6)):
    """Return a picture of which each turn is another."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[: size[1] // 2, : size[0] // 2] = (250, 10, 10)
    pixels[: size[1] // 2, size[0] // 2 :] = (10, 250, 10)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_seen_upright(tmp_path, ending, orientation):
    """Photographs say by EXIF how the camera was held; what shows pictures to people turns them."""
    picture = marked((32, 24))
    exif = Image.Exif()
    exif[0x0112] = orientation
    backwards = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    lying = picture.transpose(backwards[orientation]) if orientation > 1 else picture
    lying.save(tmp_path / f"x.{ending}", exif=exif, quality=95)
    with (tmp_path / f"x.{ending}").open("rb") as file:
        seen = np.asarray(image_decoding.in_rgb(image_decoding.open_image(file))).astype(int)
    assert seen.shape == (24, 32, 3)
    assert np.abs(seen - np.asarray(picture)).mean() < 6


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"\xff" * 40])
def test_a_damaged_exif_costs_no_image(tmp_path, exif):
    marked().save(tmp_path / "x.jpg", exif=exif)
    with (tmp_path / "x.jpg").open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow says it by itself
        assert image_decoding.open_image(file).size == (8, 6)


@pytest.mark.parametrize("ending", ["webp", "png", "tif"])
def test_of_several_pictures_the_first_is_seen(tmp_path, ending):
    later = [Image.new("RGB", (8, 6), colour) for colour in ("blue", "white")]
    marked().save(tmp_path / f"x.{ending}", save_all=True, append_images=later)
    with (tmp_path / f"x.{ending}").open("rb") as file:
        seen = np.asarray(image_decoding.in_rgb(image_decoding.open_image(file)))
    assert seen[0, 0, 0] > 200 > 100 > seen[-1, -1].max()


def test_colours_of_a_palette_that_are_transparent_are_seen_without_a_word(tmp_path):
    picture = marked().convert("P")
    picture.save(tmp_path / "x.png", transparency=bytes(range(0, 256)))
    with (tmp_path / "x.png").open("rb") as file:
        seen = np.asarray(image_decoding.in_rgb(image_decoding.open_image(file))).astype(int)
    assert np.abs(seen - np.asarray(marked())).mean() < 30


@pytest.mark.parametrize("size", [(1, 1), (1, 9000), (9000, 1), (3, 2000), (2000, 30)])
@pytest.mark.parametrize("settings", [{"is_training": False}, {}, {"augment": "padded-crop"}, {"augment": "none"}])
def test_images_of_every_shape_take_the_memory_of_a_small_one(tmp_path, size, settings):
    """A line of one pixel's width, made as high as others, would be gigabytes long."""
    write_images(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    for split in ("train", "val"):
        Image.fromarray(pixels).save(tmp_path / split / "cat" / "0.png")
    data = samples_of(tmp_path, image_size=64, **settings)
    image = read(data, [0])[0][0]
    assert image.shape == (3, 64, 64)
    cut = image_samples.not_too_long(Image.fromarray(pixels))
    assert max(cut.size) <= 32 * min(cut.size)
    middle = pixels[size[1] // 2, size[0] // 2]
    assert np.array_equal(np.asarray(cut)[cut.height // 2, cut.width // 2], middle)
