"""Files of pictures, label maps and texts: what one holds is told by its content; a map must be lossless."""

from __future__ import annotations

import secrets
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from datasets.label_space import RawIds, Rgb

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
LABEL_FORMATS = ("PNG", "BMP", "TIFF")
LABEL_MODES = ("P", "L", "I", "I;16", "I;16B")


def read_labels(path: str | Path) -> RawIds:
    """The (H, W) ids that a lossless label file holds; of a palette file the indices, not the colours.

    The format is taken from the content, so a JPEG that is named .png is refused.
    """
    try:
        with Image.open(path) as image:
            _check_label_file(image, path)
            return np.array(image)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError) as error:  # what Pillow raises for a foreign, a cut and a damaged file
        raise ValueError(f"{path}: expected a label map that decodes, found {error}. Replace it.") from error


def read_image(path: str | Path) -> Rgb:
    """An image file as RGB; greyscale is repeated, alpha dropped, deeper than 8 bits scaled down."""
    # Label maps are drawn on the stored pixels, so a camera's orientation tag must not turn the photo.
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    content = np.fromfile(path, np.uint8)
    try:
        bgr = cv2.imdecode(content, flags) if content.size else None
    except cv2.error:
        bgr = None
    if bgr is None:
        raise ValueError(f"{path}: expected an image, found {content.size} bytes that are none. Replace it.")
    return np.ascontiguousarray(bgr[..., ::-1], np.uint8)


def is_colour_map(path: str | Path) -> bool:
    """Whether a file holds colours; a palette file holds ids."""
    try:
        with Image.open(path) as image:
            return image.mode in ("RGB", "RGBA")
    except OSError as error:
        raise ValueError(f"{path}: expected a picture, found {error}. Replace it.") from error


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    target = Path(path)
    partial = target.with_name(f".{target.name[:40]}.{secrets.token_hex(8)}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _check_label_file(image: Image.Image, path: str | Path) -> None:
    compression = str(image.info.get("compression", "none"))  # TIFF alone can hold lossy pixels
    if image.format not in LABEL_FORMATS or "jpeg" in compression or "webp" in compression:
        raise ValueError(
            f"{path}: expected a lossless label map ({', '.join(LABEL_FORMATS)}), found {image.format}"
            f" content (compression {compression}); lossy files change ids: make it again from its source."
        )
    if image.mode in ("RGB", "RGBA"):
        raise ValueError(
            f"{path}: expected a map of ids, found a colour map (mode {image.mode});"
            " turn it into train ids with LabelSpace.from_colours."
        )
    if image.mode not in LABEL_MODES:
        raise ValueError(
            f"{path}: expected one channel of ids (mode {', '.join(LABEL_MODES)}), found mode {image.mode};"
            " save it as 8-bit greyscale."
        )
