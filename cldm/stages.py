"""Settings of the stages that train the Streets base: a schema for each, filled from configs/ and overrides.

Nothing here imports torch, so a mistake is answered before anything slow starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from cldm.config import SampleConfig, check_at_least, check_sample, merge_layers, read_yaml

PRECISIONS = ("32-true", "bf16-mixed")
# What may differ between two slices of one run, because it changes no weight.
NOT_OF_THE_RUN = (
    "data.camera_root",
    "data.game_root",
    "data.val_frames",
    "data.first_stage",  # told by its digest
    "data.features",  # likewise
    "sample",
    "slice",
)


@dataclass
class StageModelConfig:
    """Which network."""

    config: str = "models/cldm_streets.yaml"  # model file (YAML); the stage takes its part of it


@dataclass
class PhotosConfig:
    """Photos of two rendered trees; no label map is read."""

    camera_root: str = "data/streets"
    game_root: str = "data/streets_game"
    camera_frames: int = 4000  # of the training split
    game_frames: int = 2000
    val_frames: int = 20  # of each domain, for the figures
    size: list[int] = field(default_factory=lambda: [128, 256])


@dataclass
class VAEPhotosConfig(PhotosConfig):
    """Photos, and the network whose feature maps the loss may compare."""

    features: str | None = None  # a judge's file, for loss.features


@dataclass
class VAELossConfig:
    """Fields of `ldm.models.autoencoder_training.LossWeights`."""

    pixel: float = 1.0
    square: float = 0.0
    pyramid: float = 1.0
    pyramid_levels: int = 3
    energy: float = 0.0
    edge: float = 1.0
    kl: float = 1e-4
    features: float = 0.0


@dataclass
class VAETrainConfig:
    """How the first stage is trained, and for how long in all."""

    steps: int = 12_000  # optimizer steps of the whole run, whatever the slices
    batch_size: int = 8  # crops of the first size
    crop: list[int] = field(default_factory=lambda: [64, 64])
    last_crop: list[int] = field(default_factory=lambda: [128, 128])
    last_share: float = 0.25  # of the steps, on crops of the last size
    lr: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.0
    clip: float = 1.0  # largest norm of the gradient
    start_logvar: float = -6.0  # of the posterior, so that its noise does not drown the first latents
    guide_steps: int = 500  # over which the pull to the best linear code fades; 0 is none
    features_from: int = 0  # step at which loss.features begins
    average: float = 0.999  # decay of the average of the weights
    precision: str = "32-true"  # one of PRECISIONS
    seed: int = 0


@dataclass
class SliceConfig:
    """A slice: as much of a run as is done at once."""

    folder: str = "output/streets/stage"  # state, log and pictures; the same folder continues
    minutes: float = 30.0  # of training, then the slice ends
    save_minutes: float = 5.0  # between two writings of the state
    log_freq: int = 500  # optimizer steps between two figures with their picture
    pictures: int = 6  # rows of a picture


@dataclass
class VAEStage:
    """First stage: the autoencoder."""

    model: StageModelConfig = field(default_factory=StageModelConfig)
    data: VAEPhotosConfig = field(default_factory=VAEPhotosConfig)
    loss: VAELossConfig = field(default_factory=VAELossConfig)
    train: VAETrainConfig = field(default_factory=VAETrainConfig)
    slice: SliceConfig = field(default_factory=lambda: SliceConfig(folder="output/streets/vae"))


@dataclass
class BasePhotosConfig(PhotosConfig):
    """Photos, and the autoencoder that encodes them."""

    first_stage: str = "output/streets/vae/first_stage.safetensors"
    val_frames: int = 64


@dataclass
class BaseTrainConfig:
    """How text encoder and UNet are trained, and for how long in all."""

    steps: int = 12_000  # optimizer steps of the whole run, whatever the slices
    batch_size: int = 32  # latents of whole photos
    lr: float = 1e-3
    warmup: int = 300
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of the gradient
    drop: float = 0.1  # share of captions left out
    min_snr_gamma: float = 5.0  # 0 weighs all noise levels alike
    average: float = 0.999  # decay of the average of the weights
    precision: str = "32-true"  # one of PRECISIONS
    compile: bool = False  # the UNet, by torch.compile; takes minutes at the start of a slice
    seed: int = 0


@dataclass
class BaseStage:
    """Second stage: text encoder and UNet."""

    model: StageModelConfig = field(default_factory=StageModelConfig)
    data: BasePhotosConfig = field(default_factory=BasePhotosConfig)
    train: BaseTrainConfig = field(default_factory=BaseTrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    slice: SliceConfig = field(default_factory=lambda: SliceConfig(folder="output/streets/base"))


VAE_AT_LEAST = {
    "data.camera_frames": 0,
    "data.game_frames": 0,
    "data.val_frames": 1,
    "loss.pixel": 0,
    "loss.square": 0,
    "loss.pyramid": 0,
    "loss.pyramid_levels": 0,
    "loss.energy": 0,
    "loss.edge": 0,
    "loss.kl": 0,
    "loss.features": 0,
    "train.steps": 1,
    "train.batch_size": 1,
    "train.last_share": 0,
    "train.warmup": 0,
    "train.guide_steps": 0,
    "train.features_from": 0,
    "train.clip": 0,
    "train.average": 0,
    "train.seed": 0,
    "slice.minutes": 0,
    "slice.save_minutes": 0,
    "slice.log_freq": 1,
    "slice.pictures": 0,
}


BASE_AT_LEAST = {
    "data.camera_frames": 0,
    "data.game_frames": 0,
    "data.val_frames": 1,
    "train.steps": 1,
    "train.batch_size": 1,
    "train.warmup": 0,
    "train.weight_decay": 0,
    "train.clip": 0,
    "train.drop": 0,
    "train.min_snr_gamma": 0,
    "train.average": 0,
    "train.seed": 0,
    "slice.minutes": 0,
    "slice.save_minutes": 0,
    "slice.log_freq": 1,
    "slice.pictures": 0,
}


def load_stage(schema: type, run_file: str | Path, overrides: Sequence[str]) -> DictConfig:
    """Schema <- run file <- `overrides`; an unknown key is answered with the near one."""
    return merge_layers(schema, [(read_yaml(Path(run_file)), str(run_file))], overrides)


def check_photos(data: DictConfig) -> None:
    """Refuse a run without photos."""
    if data.camera_frames + data.game_frames == 0:
        raise ValueError("expected photos to train on, found data.camera_frames=0 and data.game_frames=0")


def check_training(train: DictConfig) -> None:
    """Refuse what no stage can do: no learning rate, an average that never moves, a precision of no name."""
    if not train.lr > 0:
        raise ValueError(f"expected train.lr above 0, found {train.lr}")
    if train.average >= 1:
        raise ValueError(f"expected train.average below 1, found {train.average}")
    if train.precision not in PRECISIONS:
        names = ", ".join(PRECISIONS)
        raise ValueError(f"expected train.precision to be one of {names}, found {train.precision!r}")


def check_at_most_1(config: DictConfig, keys: Sequence[str]) -> None:
    """Refuse a share of more than all."""
    for key in keys:
        if OmegaConf.select(config, key) > 1:
            raise ValueError(f"expected {key} of at most 1, found {OmegaConf.select(config, key)}")


def check_size_of(config: DictConfig, key: str, step: int) -> None:
    """Refuse a size that is not two multiples of `step`."""
    size = OmegaConf.select(config, key)
    if len(size) != 2 or any(side < step or side % step for side in size):
        raise ValueError(f"expected {key}=[HEIGHT,WIDTH] in multiples of {step}, found {list(size)}")


def check_vae_stage(config: DictConfig) -> None:
    """Refuse numbers that no run of the first stage can have."""
    check_at_least(config, VAE_AT_LEAST)
    check_photos(config.data)
    check_training(config.train)
    train, data, levels = config.train, config.data, config.loss.pyramid_levels
    check_at_most_1(config, ("train.last_share",))
    if config.loss.features and data.features is None:
        raise ValueError(
            "expected data.features=FILE, a judge of tool_train_streets_judge.py, beside "
            f"loss.features={config.loss.features:g}, found none"
        )
    # the autoencoder halves three times; the strength of details takes windows of 4 in the last band
    step = 2 ** max(3, levels + 1 if config.loss.energy else levels)
    for key in ("data.size", "train.crop", "train.last_crop"):
        check_size_of(config, key, step)
    for key in ("crop", "last_crop"):
        if any(side > limit for side, limit in zip(train[key], data.size, strict=True)):
            raise ValueError(f"expected train.{key} within {list(data.size)}, found {list(train[key])}")


def check_base_stage(config: DictConfig) -> None:
    """Refuse numbers that no run of the second stage can have."""
    check_at_least(config, BASE_AT_LEAST)
    check_photos(config.data)
    check_training(config.train)
    check_sample(config.sample)
    if config.train.drop >= 1:
        raise ValueError(f"expected train.drop below 1, found {config.train.drop}")
    check_size_of(config, "data.size", 64)


def identity_of(config: DictConfig) -> str:
    """What makes a run the run that it is, as YAML: a slice with another identity cannot continue it."""
    kept = OmegaConf.to_container(config, resolve=True)
    for key in NOT_OF_THE_RUN:
        section, _, name = key.rpartition(".")
        (kept[section] if section else kept).pop(name, None)
    return OmegaConf.to_yaml(OmegaConf.create(kept))
