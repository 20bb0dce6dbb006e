"""Stored images -> 8-bit RGB.

The released loader converts with PIL alone. That drops transparency (black ink on a transparent
ground becomes black on black), clips 16 bits and floats, and ignores EXIF orientation. Here images
are put on white, scaled to 8 bits and turned upright.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from support.tables import BadRowError

IMAGE_FILE = r"[^\n]+\.(png|jpe?g|gif|webp|bmp|tiff?)(\?[^\n]*)?"
IMAGE_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")


def read_image(source, folder=Path(), read: Callable | None = None):
    """The image in RGB, or `read` of the opened image; BadRowError if it is broken.

    `source` is a PIL image, bytes, base64, a data URL, a path relative to `folder`, or a dict with
    bytes or a path. PIL opens it by its header and decodes the pixels only when `read` asks.
    """
    read = read or to_rgb
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    try:
        if isinstance(source, Image.Image):
            return read(source)
        with open_stored(source, folder) as file, Image.open(file) as image:
            return read(image)
    except Exception as error:  # PIL raises nearly anything on broken files
        name = f"{len(source)} bytes" if isinstance(source, bytes) else f"{source!s:.99}"
        raise BadRowError("broken image", f"{name}: {error}") from error


def open_stored(source, folder):
    """The file that an image is stored in."""
    if isinstance(source, str) and not is_base64(source):
        return folder.joinpath(source).open("rb")
    if isinstance(source, str):
        encoded = "".join(source.rpartition(",")[2].split())  # without "data:image/png;base64,"
        source = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    return BytesIO(source)


def is_base64(text: str) -> bool:
    """Whether a text is a data URL, or base64 that begins as an image file does."""
    with suppress(ValueError):
        return base64.b64decode(text[:16], validate=True).startswith(IMAGE_STARTS)
    return text.startswith("data:image/")


def looks_like_image(value) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return any(map(looks_like_image, value))
    if isinstance(value, bytes):
        return value.startswith(IMAGE_STARTS)
    if isinstance(value, str):
        return is_base64(value) or bool(re.fullmatch(IMAGE_FILE, value, re.IGNORECASE))
    return isinstance(value, Image.Image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright, in RGB, on white where it is transparent."""
    image.load()
    with suppress(Exception):  # broken metadata does not make the pixels unusable
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_8_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits, 32 bits or floats, scaled so that 0 (or a negative minimum) becomes
    0 and full scale 255.

    Full scale is the first of 1, 255 and 65535 that no value exceeds. It is the maximum where that
    exceeds them all, or where the image would become nearly black, such as 12 bits stored in 16.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
    values -= min(values.min(), 0)
    maximum = values.max()
    scale = next((scale for scale in (1, 255, 65535) if maximum <= scale), maximum)
    if 0 < maximum < scale / 16:
        scale = maximum
    return Image.fromarray((values * 255 / scale).round().astype(np.uint8))
