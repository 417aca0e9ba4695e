"""What a visitor's file must be before anything decodes it; decided by content, never by its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import log
from pathlib import Path

from PIL import Image

from datasets.label_space import Size

# Not TIFF: OpenCV, which decodes, may see other tags and so another size than Pillow, which checks.
FORMATS = ("PNG", "BMP", "WEBP", "JPEG")
MAX_BYTES = 16 << 20
MAX_PIXELS = 1 << 24  # 4096x4096; eight times a Cityscapes map
MAX_IMAGE_PIXELS = 1 << 20  # of what is sampled
STEP = 64  # pixels; sides of images are multiples
KNOWN_STRANGERS = {
    **{b"GIF8": "a GIF", b"<svg": "SVG", b"<?xml": "SVG or other XML", b"%PDF": "a PDF"},
    **{b"II*\0": "TIFF", b"MM\0*": "TIFF"},
}


@contextmanager
def without_folder(path: Path) -> Iterator[None]:
    """Refusals of a file name it alone: where the server keeps it is nobody's business."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), path.name)) from error


def check_picture(path: Path) -> Size:
    """(H, W) of a picture; what is no single picture of moderate size is refused. Reads the header only.

    Raises
        ValueError  one sentence that begins with the path
    """
    if not path.is_file():
        raise ValueError(f"{path}: expected a file, found none; load it once more")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(
            f"{path}: expected a file of at most {MAX_BYTES >> 20} MB, found {size >> 20} MB; make it smaller"
        )
    try:
        # A list of formats, because Pillow has decoders for a hundred more.
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            is_large = width * height > MAX_PIXELS
            is_animated = not is_large and _has_more_frames(image)
    except Image.DecompressionBombError as error:
        raise ValueError(_too_large(path, "far more")) from error
    # What Pillow raises for a foreign, a cut and a damaged file, and for texts that inflate beyond measure.
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a picture ({', '.join(FORMATS)}), found {_name_content(path)}; save it as PNG"
        ) from error
    if is_large:
        raise ValueError(_too_large(path, f"{height}x{width}"))
    if is_animated:
        raise ValueError(f"{path}: expected a single picture, found an animation; save one frame as PNG")
    return height, width


def fitting_size(size: Size) -> Size:
    """A size for images, near one that may be none: multiples of 64, of bounded area, much the same shape."""
    shrink = min(1.0, (MAX_IMAGE_PIXELS / (size[0] * size[1])) ** 0.5)
    rows, columns = ({int(side * shrink) // STEP, int(side * shrink) // STEP + 1} - {0} for side in size)
    near = [(STEP * row, STEP * column) for row in rows for column in columns]
    fitting = [(h, w) for h, w in near if h * w <= MAX_IMAGE_PIXELS]
    if fitting:
        shape, area = size[0] / size[1], size[0] * size[1] * shrink**2
        return min(fitting, key=lambda hw: (abs(log(hw[0] / hw[1] / shape)), abs(log(hw[0] * hw[1] / area))))
    longest = MAX_IMAGE_PIXELS // STEP // STEP * STEP  # of a strip
    return (STEP, longest) if size[1] > size[0] else (longest, STEP)


def _has_more_frames(image: Image.Image) -> bool:
    """Whether there is a second frame; counting them all would walk through the whole file."""
    if image.format == "PNG":  # seeking would decode the first frame, and the count stands in the header
        return getattr(image, "n_frames", 1) > 1
    try:
        image.seek(1)
    except EOFError:
        return False
    return True


def _too_large(path: Path, found: str) -> str:
    most = f"{MAX_PIXELS >> 20} million pixels"
    return f"{path}: expected a picture of at most {most}, found {found}; make it smaller"


def _name_content(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")
    if b"<svg" in head:
        return "SVG"
    return next((name for magic, name in KNOWN_STRANGERS.items() if head.startswith(magic)), "none of these")
