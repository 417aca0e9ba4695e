"""Settings of the training of the Streets judge. Nothing here imports torch, as in `cldm.stages`."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import DictConfig

from cldm.config import check_at_least
from cldm.stages import SliceConfig, check_at_most_1, check_size_of, check_training


@dataclass
class JudgeModelConfig:
    """Fields of `metrics.judge.JudgeArch`; lists have an entry for each of the encoder's stages."""

    hidden: list[int] = field(default_factory=lambda: [32, 64, 128, 192])
    depths: list[int] = field(default_factory=lambda: [0, 2, 2, 2])
    reductions: list[int] = field(default_factory=lambda: [8, 4, 2, 1])
    widenings: list[int] = field(default_factory=lambda: [2, 3, 3, 3])
    decoder: int = 64
    refinements: int = 2
    features: int = 64


@dataclass
class JudgeDataConfig:
    """Photos with label maps of one rendered tree, all conditions."""

    camera_root: str = "data/streets"
    camera_frames: int = 4000  # of the training split
    val_frames: int = 500  # for the figures
    size: list[int] = field(default_factory=lambda: [128, 256])


@dataclass
class AugmentConfig:
    """What is done to a training crop beside mirroring; all of it too mild to turn day into night."""

    gain: float = 0.1  # each colour channel is multiplied by 1 +- this at most
    shift: float = 8.0  # and moved by this at most, of 255
    blur: float = 0.3  # share of crops that are blurred
    blur_sigma: float = 1.0  # pixels, at most
    smooth: float = 0.0  # share of crops that lose their texture and keep their edges, as from an autoencoder
    smooth_contrast: float = 50.0  # of 255; what contrasts less than this at most counts as texture


@dataclass
class JudgeLossConfig:
    """What counts how much."""

    class_power: float = 0.25  # a pixel counts its class's share to the power of minus this
    condition: float = 0.1  # beside the cross-entropy of the pixels


@dataclass
class JudgeTrainConfig:
    """How the judge is trained, and for how long in all."""

    steps: int = 10_000  # optimizer steps of the whole run, whatever the slices
    batch_size: int = 8
    crop: list[int] = field(default_factory=lambda: [128, 128])
    rare_power: float = 0.5  # frames are drawn by the share of frames with their rarest class, to minus this
    rare_share: float = 0.0  # of crops that show that class for sure
    lr: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of the gradient
    average: float = 0.999  # decay of the average of the weights
    precision: str = "32-true"  # one of PRECISIONS
    seed: int = 0


@dataclass
class JudgeStage:
    """The judge: segmenter and condition head."""

    model: JudgeModelConfig = field(default_factory=JudgeModelConfig)
    data: JudgeDataConfig = field(default_factory=JudgeDataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: JudgeLossConfig = field(default_factory=JudgeLossConfig)
    train: JudgeTrainConfig = field(default_factory=JudgeTrainConfig)
    slice: SliceConfig = field(default_factory=lambda: SliceConfig(folder="output/streets/judge"))


JUDGE_AT_LEAST = {
    "model.decoder": 1,
    "model.refinements": 0,
    "model.features": 1,
    "data.camera_frames": 1,
    "data.val_frames": 1,
    "augment.gain": 0,
    "augment.shift": 0,
    "augment.blur": 0,
    "augment.blur_sigma": 0.1,
    "augment.smooth": 0,
    "augment.smooth_contrast": 1,
    "loss.class_power": 0,
    "loss.condition": 0,
    "train.steps": 1,
    "train.batch_size": 1,
    "train.rare_power": 0,
    "train.rare_share": 0,
    "train.warmup": 0,
    "train.weight_decay": 0,
    "train.clip": 0,
    "train.average": 0,
    "train.seed": 0,
    "slice.minutes": 0,
    "slice.save_minutes": 0,
    "slice.log_freq": 1,
    "slice.pictures": 0,
}
MOST_FEATURES = 64  # a Frechet distance needs many more images than features
WIDTH_STEP = 32  # channels of an attention head


def check_judge_stage(config: DictConfig) -> None:
    """Refuse numbers that no run of the judge can have."""
    check_at_least(config, JUDGE_AT_LEAST)
    check_network(config.model)
    train = config.train
    check_training(train)
    check_at_most_1(config, ("augment.blur", "augment.smooth", "train.rare_share"))
    for key in ("data.size", "train.crop"):
        check_size_of(config, key, 2 ** len(config.model.hidden))
    if any(side > limit for side, limit in zip(train.crop, config.data.size, strict=True)):
        raise ValueError(f"expected train.crop within {list(config.data.size)}, found {list(train.crop)}")


def check_network(model: DictConfig) -> None:
    """Refuse sizes that do not make a network."""
    names = ("hidden", "depths", "reductions", "widenings")
    lengths = {name: len(model[name]) for name in names}
    if len(set(lengths.values())) > 1 or not model.hidden:
        raise ValueError(
            f"expected an entry for each stage in model.{', model.'.join(names)}, found {lengths}"
        )
    if any(value < (name != "depths") for name in names for value in model[name]):
        raise ValueError("expected 1 or more in every entry, 0 or more in those of model.depths")
    if any(size % WIDTH_STEP for size in model.hidden):
        raise ValueError(f"expected model.hidden in multiples of {WIDTH_STEP}, found {list(model.hidden)}")
    if model.features > MOST_FEATURES:
        raise ValueError(f"expected model.features of at most {MOST_FEATURES}, found {model.features}")
