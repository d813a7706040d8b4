"""Image files of every kind as a person sees them: upright, with 8 bits a channel, the first picture of several."""

from __future__ import annotations

from typing import Any, BinaryIO

import numpy as np

_ORIENTATION = 0x0112
"""EXIF's tag of how a camera was held."""


def open_image(file: BinaryIO) -> Any:
    """Return the image of PIL in a file, upright, with 8 bits a channel, in its own colours.

    Raises:
        Exception: whatever PIL raises where it cannot be read; ValueError where it is no image, or its
                numbers have no known range.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(file)
    except UnidentifiedImageError as error:  # it names Python's object in the place of the file
        raise ValueError("it is no image of a kind that Pillow knows") from error
    image.load()  # before its EXIF is asked: of some formats that is known afterwards, and TIFFs are upright then
    return eight_bits(upright(image))


def in_rgb(image: Any) -> Any:
    """Return an image of PIL in red, green and blue; what is transparent shows the colour that it has."""
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):  # or Pillow warns of each
        image = image.convert("RGBA")
    return image.convert("RGB")


def upright(image: Any) -> Any:
    """Return an image of PIL turned and mirrored as its EXIF says it is to be shown; a damaged EXIF says nothing."""
    from PIL import Image

    way = Image.Transpose
    turns = {
        2: way.FLIP_LEFT_RIGHT,
        3: way.ROTATE_180,
        4: way.FLIP_TOP_BOTTOM,
        5: way.TRANSPOSE,
        6: way.ROTATE_270,
        7: way.TRANSVERSE,
        8: way.ROTATE_90,
    }
    try:
        turn = turns.get(image.getexif().get(_ORIENTATION))
    except Exception:  # as many kinds as there are ways to damage it; the pixels are there all the same
        return image
    return image if turn is None else image.transpose(turn)


def eight_bits(image: Any) -> Any:
    """Return an image of PIL with 8 bits a channel: of 16, the upper ones, where Pillow makes all above 255 white.

    Raises:
        ValueError: its numbers have no known range.
    """
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its pixels are real numbers, of no known range: convert it to 8 bits a channel")
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)
    if pixels.size and not 0 <= pixels.min() <= pixels.max() < 1 << 16:
        raise ValueError("its pixels have 32 bits, of no known range: convert it to 8 bits a channel")
    return Image.fromarray((pixels.astype(np.uint32) >> 8).astype(np.uint8))
