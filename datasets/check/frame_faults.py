"""What one frame is examined for: its files are read to the end, and a small record is left of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from datasets.check.alignment import Outline, outline
from datasets.check.findings import Finding, Frame, finding
from datasets.check.label_faults import LabelRecord, examine_labels
from datasets.check.listing import Source
from datasets.check.palette_guess import guess_palette
from datasets.files import LABEL_FORMATS, LABEL_MODES, read_image, read_labels
from datasets.label_space import LabelSpace, Rgb, Size
from datasets.segmentation import SegmentationDataset, check_same_frame

PNG_END, JPEG_END = b"IEND\xaeB`\x82", b"\xff\xd9"
GREY_MODES = ("1", "L", "LA", "I", "I;16")
CLEAR = 0.9  # share of a control's pixels that a palette has to explain


@dataclass
class Record:
    """What is kept of a frame: findings, sizes and counts, no pixels."""

    frame: Frame
    findings: list[Finding] = field(default_factory=list)
    photo_size: Size | None = None
    label_size: Size | None = None
    photo_hash: bytes | None = None  # of the pixels, so that a photo that was saved again is the same
    labels: LabelRecord | None = None  # without its ids
    outline: Outline | None = None  # of a frame without fault; dropped as soon as it was compared

    def add(self, code: str, message: str, file: Path) -> None:
        """Note a finding about this frame."""
        self.findings.append(finding(code, message, file, split=self.frame.split, key=self.frame.key))


class Examiner:
    """Examines frames of one data set; may be called from several threads at once."""

    def __init__(self, source: Source) -> None:
        """Of the label space and sample size that the data set has with its options."""
        self.cls, self.space, self.encoding = source.cls, source.space, source.encoding
        size = source.options.get("size") or source.cls.default_size
        self.size: Size | None = None if size is None else (int(size[0]), int(size[1]))

    def examine(self, frame: Frame) -> Record:
        """Read all files of a frame; a fault becomes a finding, also one that nobody thought of."""
        record = Record(frame)
        try:
            self._examine(record)
        except Exception as error:  # whatever a file can do to the check is a finding about that file
            found = f"{type(error).__name__}: {error}"
            message = (
                f"{frame.photo}: expected a frame that can be examined, found {found}; replace its files"
            )
            record.add("cannot-examine", message, frame.photo)
        return record

    def holds_train_ids(self, path: Path) -> bool:
        """Whether a label file is taken for one of train ids."""
        return issubclass(self.cls, SegmentationDataset) and self.cls.holds_train_ids(path)

    def _examine(self, record: Record) -> None:
        frame = record.frame
        photo = read_picture(frame.photo, record)
        if photo is not None:
            record.photo_size = (photo.shape[0], photo.shape[1])
            record.photo_hash = hash_pixels(photo)
            self._judge_photo(record)
        if frame.control is not None:
            control = read_picture(frame.control, record)
            if control is not None:
                compare_shapes(frame.control, (control.shape[0], control.shape[1]), record)
                judge_colours(frame.control, control, record)
        if frame.labels is not None and self.space is not None:
            self._examine_labels(frame.labels, self.space, photo, record)

    def _judge_photo(self, record: Record) -> None:
        path = record.frame.photo
        with Image.open(path) as image:
            grey = image.mode in GREY_MODES
        if grey:
            record.add(
                "grey-photo",
                f"{path}: expected a photo in colour, found shades of grey; it trains as such",
                path,
            )
        if record.photo_size is not None and self.size is not None:
            (h, w), (H, W) = record.photo_size, self.size
            if h < H or w < W:
                message = (
                    f"{path}: expected {H}x{W} or more, as a sample has, found {h}x{w}; it will be enlarged"
                )
                record.add("small-photo", message, path)

    def _examine_labels(self, path: Path, space: LabelSpace, photo: Rgb | None, record: Record) -> None:
        if not path.stat().st_size:
            record.add("empty-file", _nothing_in(path), path)
            return
        train_ids = self.holds_train_ids(path)
        read = self.cls.read_raw_ids if issubclass(self.cls, SegmentationDataset) else read_labels
        labels = record.labels = examine_labels(path, read, space, train_ids=train_ids)
        for code, message in labels.faults:
            record.add(code, message, path)
        if train_ids and self.encoding is not None and self.encoding.tells_void_apart:
            self._refuse_train_ids(path, record)
        if labels.ids is None:
            return
        record.label_size = (labels.ids.shape[0], labels.ids.shape[1])
        sound = photo is not None and not any(item.severity == "error" for item in record.findings)
        if compare_shapes(path, record.label_size, record) and sound and photo is not None:
            record.outline = outline(photo, labels.ids)
        labels.ids = None

    def _refuse_train_ids(self, path: Path, record: Record) -> None:
        """Note that the hint encoding needs label ids, in the words of the data set."""
        assert issubclass(self.cls, SegmentationDataset)
        try:
            self.cls.read_file_ids(path, self.encoding)
        except ValueError as error:
            record.add("unknown-ids", str(error), path)


def read_picture(path: Path, record: Record) -> Rgb | None:
    """A photo or control that is whole; of another one a finding."""
    if not path.stat().st_size:
        record.add("empty-file", _nothing_in(path), path)
        return None
    try:
        picture = read_image(path)
        if not ends(path):  # a decoder may fill the rest with grey
            with Image.open(path) as image:
                image.load()
    except (ValueError, OSError, SyntaxError) as error:
        named = (
            str(error)
            if str(error).startswith(str(path))
            else f"{path}: expected a whole image, found {error}"
        )
        record.add("damaged-image", named, path)
        return None
    return picture


def ends(path: Path) -> bool:
    """Whether a PNG or JPEG file has its end; others are taken to have it."""
    with path.open("rb") as file:
        head = file.read(4)
        file.seek(max(0, path.stat().st_size - len(PNG_END)))
        tail = file.read()
    if head == b"\x89PNG":
        return tail.endswith(PNG_END)
    return tail.endswith(JPEG_END) if head.startswith(b"\xff\xd8") else True


def compare_shapes(path: Path, size: Size, record: Record) -> bool:
    """Whether a map or control has the shape of its photo; another shape or resolution is a finding."""
    if record.photo_size is None:
        return False
    try:
        check_same_frame(record.photo_size, record.frame.photo, size, path)
    except ValueError as error:
        record.add("size-mismatch", str(error), path)
        return False
    if size != record.photo_size:
        (h, w), (H, W) = record.photo_size, size
        message = (
            f"{path}: expected the resolution of its photo ({h}x{w}), found {H}x{W}; it is resized to fit"
        )
        record.add("other-resolution", message, path)
    return True


def judge_colours(path: Path, control: Rgb, record: Record) -> None:
    """Tell a painted control in BGR order, or one with colours beside those of its palette."""
    guess = guess_palette(control)
    if guess is None or guess.share < CLEAR:
        return
    if guess.order == "BGR" and guess.other_order < guess.share / 2:
        message = f"{path}: expected colours in RGB order, found that {guess.sentence()}; swap red and blue"
        record.add("bgr-control", message, path)
    elif guess.share < 1:
        message = (
            f"{path}: expected a painted map to hold colours of one palette, found that"
            f" {guess.sentence()}, but not {guess.strangers}; resize to the nearest pixel and save as PNG"
        )
        record.add("unknown-colours", message, path)


def looks_odd(frame: Frame) -> bool:
    """Whether the beginnings and ends of a frame's files already show a fault; they cost next to nothing."""
    sizes = []
    for path in frame.files:
        try:
            with Image.open(path) as image:
                sizes.append(image.size)
                is_map = image.format in LABEL_FORMATS and image.mode in LABEL_MODES
                deep = image.mode.startswith("I")
        except (OSError, SyntaxError, ValueError):
            return True
        if not ends(path) or (path == frame.labels and (deep or not is_map)):
            return True
    return len(set(sizes)) > 1


def hash_pixels(picture: Rgb) -> bytes:
    """A fingerprint of a picture's shape and pixels."""
    return hashlib.blake2b(picture.tobytes(), digest_size=16, key=repr(picture.shape).encode()).digest()


def _nothing_in(path: Path) -> str:
    return f"{path}: expected a picture, found 0 bytes; get or make the file again"
