"""The configuration of a run: a typed schema, filled from a run file and `key=value` overrides.

Nothing here imports torch, so a mistake is answered before anything slow starts.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

PROJECT = Path(__file__).resolve().parents[1]
RANDOM = "random"
TRAINING_PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
FROZEN_PRECISIONS = (None, "bf16")
FILE_PRECISIONS = ("32", "16")
LOGGERS = ("tensorboard", "csv", "wandb")
SCHEDULES = ("constant", "cosine", "one_cycle")  # their functions: ldm.models.learning_rate
SAMPLER_NAMES = ("ddim", "dpm++2m")  # their functions stand in cldm.generate.SAMPLERS
# Kinds of ldm.priors.prior that come from a file of moments.
MEASURED_PRIORS = ("spatial", "class", "spatial-class", "spatial-class-joint", "class-spatial-joint")
CHOICES = {
    "data.cache_precision": FILE_PRECISIONS,
    "train.checkpoint_precision": FILE_PRECISIONS,
    "train.frozen_precision": FROZEN_PRECISIONS,
    "train.logger": LOGGERS,
    "train.precision": TRAINING_PRECISIONS,
    "train.schedule": SCHEDULES,
}
MAX_STEPS = 1000
AT_LEAST = {
    "data.num_workers": 0,
    "data.rare_pixels": 0,
    "data.cache_crops": 1,
    "train.batch_size": 1,
    "train.accumulate": 1,
    "train.max_steps": 1,
    "train.logger_freq": 1,
    "train.grid_images": 0,
    "train.val_freq": 0,
    "train.val_samples": 2,
    "train.checkpoint_freq": 1,
    "train.nodes": 1,
    "train.warmup": 0,
    "train.ema": 0,
    "train.min_snr_gamma": 0,
    "train.offset_noise": 0,
    "train.bad_steps": 0,
    "train.keep_last": 1,
    "train.clip": 0,
    "train.seed": 0,
}
MAX_SEED = 2**32 - 1  # numpy's


@dataclass
class ModelConfig:
    """Which network, and the weights that it starts from."""

    config: str = "models/cldm_v15.yaml"  # model YAML file
    checkpoint: str = (
        "models/control_sd15_ini.safetensors"  # "random" starts from nothing, to try the machinery
    )
    base: str | None = None  # where the base of a control-only checkpoint lies, if it does not record it
    parameterization: str | None = None  # eps or v; null is what the model file says
    attn_backend: str | None = None  # sdpa or xformers; null is what the model file says


@dataclass
class DataConfig:
    """Which data set, and at what size."""

    name: str = "cityscapes"
    root: str | None = None  # by default data/NAME
    split: str | None = None  # by default the data set's training split
    val_split: str | None = "val"  # grid and validation show its frames; null takes training ones
    size: list[int] | None = None  # height and width, multiples of 64; null is the data set's own
    prompt: str | None = None  # a sentence of datasets.prompts; null is the data set's own
    words: dict[str, list[str]] = field(default_factory=dict)  # of each {name} that the sentence draws
    captions: str | None = None  # file of the {caption}s, by stem; null is captions.json of the root
    drop_prompt: float = 0.0  # share of samples without a prompt
    hint: str = "colours"  # what label maps look like to the control: an encoding of datasets.hint_encoding
    label_space: str | None = None  # of the label maps of triples, which need none
    crop: str = "none"  # none squeezes whole frames into the size; centre and random keep their shape
    zoom: list[float] = field(default_factory=lambda: [1.0, 1.0])  # lowest and highest, of random crops
    flip: float = 0.0  # share of samples that are mirrored
    rare_classes: bool = False  # draw frames and windows by class, rare ones more often
    rare_temperature: float = 0.01  # the lower, the more often
    rare_pixels: int = 3000  # of a class in a frame that is drawn for it, at the least
    check: bool = True  # look at some frames before the first step, and refuse what would ruin a training
    cache: str | None = None  # folder for what the frozen networks make of the data, made if it is not there
    cache_crops: int = 1  # windows of each frame that it keeps, with random crops
    cache_precision: str = "32"  # 16 halves it; one of FILE_PRECISIONS
    num_workers: int = 4  # loader processes


@dataclass
class TrainConfig:
    """What is trained, how, and for how long."""

    batch_size: int = 4  # per device
    accumulate: int = 1  # batches for one optimizer step
    lr: float = 1e-5
    max_steps: int = 100_000  # optimizer steps, not batches
    sd_locked: bool = True  # False also trains the UNet's decoder
    only_mid_control: bool | None = None  # null is what the model file says
    precision: str = "auto"  # one of TRAINING_PRECISIONS; trained weights are float32 in all of them
    frozen_precision: str | None = None  # of the frozen UNet: bf16 halves it, and auto is bf16-mixed then
    activation_checkpointing: bool = False  # recompute in backward instead of keeping: less memory, slower
    update_in_backward: bool | None = None  # less memory; null is where it pays, with large models on a CPU
    compile: bool = False  # have torch compile the networks; minutes at the start, needs a C++ compiler
    clip: float | None = None  # largest norm of the gradient
    schedule: str = "constant"  # of the learning rate: one of SCHEDULES
    warmup: int = 0  # optimizer steps over which it rises
    ema: float = 0.0  # decay of an average of the trained weights, which is then what is sampled and saved
    min_snr_gamma: float = 0.0  # weighs noise levels by min(SNR, gamma); 0 weighs them alike
    offset_noise: float = 0.0  # standard deviation of noise that all pixels of a channel share
    bad_steps: int = 10  # optimizer steps whose loss is not finite that are skipped before the run stops
    keep_latents: bool = False  # encode each image once and keep its latent in memory, a 24th of its size
    seed: int = 0
    gpus: list[int] | None = None  # GPU ids; null is automatic
    nodes: int = 1  # machines, each with as many GPUs
    default_root_dir: str = "work_dir"
    logger: str = "tensorboard"  # one of LOGGERS
    logger_freq: int = 300  # optimizer steps between two logged grids
    grid_images: int = 4  # rows of a logged grid
    val_freq: int = 1000  # optimizer steps between two measurements on the validation split; 0 makes none
    val_samples: int = 16  # of a measurement, which costs 8 forward passes of each
    resume: str | None = None  # a state to go on from, bit by bit; "last" is the newest of default_root_dir
    dry_run: bool = False  # one real step and its grid, a report, no checkpoint
    checkpoint_freq: int = 5000  # optimizer steps between two checkpoints; one is written at the end as well
    checkpoint_precision: str = "16"  # of the weights in them, 32 or 16; the state to go on from is exact
    keep_last: int | None = None  # checkpoints that are kept beside the best one; null keeps all
    save_full: bool = False  # checkpoints hold the frozen weights, too
    export_at_end: str | None = None  # file for the control branch alone, in half precision


@dataclass
class SampleConfig:
    """How an image is sampled, in training, in scripts and on the page alike."""

    steps: int = 20
    sampler: str = "ddim"
    eta: float = 0.0  # DDIM only: 0 is deterministic, 1 ancestral
    scale: float = 9.0  # classifier-free guidance; 1 is none
    strength: float = 1.0  # of the control
    guess_mode: bool = False  # the control must do without the prompt
    negative_prompt: str = ""


@dataclass
class RunConfig:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)


def load_run_config(dataset: str | None, config: str | Path | None, overrides: Sequence[str]) -> DictConfig:
    """Schema <- configs/DATASET.yaml <- `config` <- `overrides`; later ones win.

    dataset    by default the one that the run file names, or else the schema's
    config     a run file, which replaces configs/DATASET.yaml, or a model file; told apart by content
    overrides  key=value lines such as train.lr=2e-6

    Raises
        ValueError         an unknown key, with the near one, or a value of another type
        FileNotFoundError  a file that is not there
    """
    run_file, model_file = project_path(f"configs/{dataset or DataConfig.name}.yaml"), None
    if config is not None:
        run_file, model_file = (run_file, str(config)) if is_model_file(config) else (Path(config), None)
    layers = [read_yaml(run_file)]
    layers += [{"data": {"name": dataset}}] if dataset else []
    layers += [{"model": {"config": model_file}}] if model_file else []
    return merge_layers(RunConfig, [(layer, str(run_file)) for layer in layers], overrides)


def is_model_file(path: str | Path) -> bool:
    """Whether a YAML file is a model file and not a run file; by content."""
    return "target" in (read_yaml(Path(path)).get("model") or {})


def merge_layers(schema: type, layers: Sequence[tuple[Any, str]], overrides: Sequence[str]) -> DictConfig:
    """Schema <- `layers`, each with its name for errors <- `overrides`; later ones win."""
    merged = OmegaConf.structured(schema)
    for layer, where in [*layers, *parse_overrides(overrides)]:
        merged = merge(merged, layer, where)
    return merged


def check_at_least(config: DictConfig, least: Mapping[str, float]) -> None:
    """Refuse numbers below their limit; null is none."""
    for key, limit in least.items():
        value = OmegaConf.select(config, key)
        if value is not None and not value >= limit:
            raise ValueError(f"expected {key} of {limit} or more, found {value}")


def check_run(config: DictConfig) -> None:
    """Refuse numbers that no run can have; types are the schema's affair."""
    check_at_least(config, AT_LEAST)
    if config.train.seed > MAX_SEED:
        raise ValueError(f"expected train.seed of {MAX_SEED} or less, found {config.train.seed}")
    if not config.train.lr > 0:
        raise ValueError(f"expected train.lr above 0, found {config.train.lr}")
    if not config.data.rare_temperature > 0:
        raise ValueError(f"expected data.rare_temperature above 0, found {config.data.rare_temperature}")
    if len(config.data.zoom) != 2:
        raise ValueError(f"expected data.zoom=[LOW,HIGH], found {list(config.data.zoom)}")
    size = config.data.size
    if size is not None and (len(size) != 2 or any(side < 64 or side % 64 for side in size)):
        raise ValueError(f"expected data.size=[HEIGHT,WIDTH] in multiples of 64, found {list(size)}")
    if config.train.export_at_end and not config.train.sd_locked:
        raise ValueError(
            "expected train.sd_locked=true for train.export_at_end, as the control branch alone is of no use"
            " without the decoder that was trained with it, found false; its checkpoints hold both"
        )
    if config.train.ema >= 1:
        raise ValueError(f"expected train.ema below 1, found {config.train.ema}")
    check_choices(config)
    check_frozen_precision(config)
    check_sample(config.sample)


def check_choices(config: DictConfig) -> None:
    """Refuse words that are none of those to choose from."""
    for key, names in CHOICES.items():
        found = OmegaConf.select(config, key)
        if found not in names:
            known = ", ".join("null" if name is None else name for name in names)
            raise ValueError(f"expected {key} to be one of {known}, found {found!r}")


def check_frozen_precision(config: DictConfig) -> None:
    """Refuse rounded frozen weights where nothing computes in them, or where they would be saved."""
    train = config.train
    if train.frozen_precision is None:
        return
    if train.precision not in ("auto", "bf16-mixed"):
        raise ValueError(
            "expected train.precision of auto or bf16-mixed with train.frozen_precision=bf16, found"
            f" {train.precision}"
        )
    if train.save_full:
        raise ValueError(
            "expected train.save_full=false with train.frozen_precision=bf16, whose frozen weights in memory"
            " are rounded, found true; a checkpoint of what was trained names the file of the others"
        )


def check_sample(sample: SampleConfig | DictConfig) -> None:
    """Refuse sampling settings that no sampler takes."""
    if sample.sampler not in SAMPLER_NAMES:
        raise ValueError(
            f"unknown sampler {str(sample.sampler)[:50]!r}; choose one of {', '.join(SAMPLER_NAMES)}"
        )
    if not 1 <= sample.steps <= MAX_STEPS:
        raise ValueError(f"expected 1 to {MAX_STEPS} sampling steps, found {sample.steps}")
    for name in ("scale", "strength"):
        if not math.isfinite(sample[name] if isinstance(sample, DictConfig) else getattr(sample, name)):
            raise ValueError(f"expected a finite {name}, found {getattr(sample, name)}")
    if not 0 <= sample.eta <= 1:
        raise ValueError(f"expected eta in 0..1, found {sample.eta}")


def project_path(name: str | Path) -> Path:
    """A path as it is given or, if nothing is there, below the folder of the project."""
    path, ours = Path(name), PROJECT / name
    return ours if not path.exists() and ours.exists() else path


def read_yaml(path: Path) -> Any:
    """Content of a YAML file."""
    if not path.is_file():
        raise FileNotFoundError(f"expected a configuration file, found nothing at {path}")
    try:
        content = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected YAML, found {' '.join(str(error).split())}") from error
    if not isinstance(content, DictConfig):
        raise ValueError(f"{path}: expected sections such as `train:` with keys in them, found a list")
    return content


def parse_overrides(overrides: Sequence[str]) -> list[tuple[DictConfig, str]]:
    """Each `key=value` as a layer of its own, so that an error can quote it."""
    layers = []
    for override in overrides:
        try:
            is_pair, layer = "=" in override, OmegaConf.from_dotlist([override])
        except yaml.YAMLError:
            is_pair = False
        if not is_pair:
            raise ValueError(f"expected key=value, such as train.lr=1e-5, found {override!r}")
        layers.append((layer, override))
    return layers


def merge(config: DictConfig, layer: Any, where: str) -> DictConfig:
    """Lay `layer` over `config`; an unknown key or a value of another type is answered in a sentence."""
    try:
        return OmegaConf.merge(config, layer)
    except ConfigKeyError as error:
        key = str(error.full_key)
        near = difflib.get_close_matches(key, dotted_keys(config), n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(dotted_keys(config))}"
        raise ValueError(f"{where}: unknown key {key}; {hint}") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"{where}: {error.full_key}: {str(error.msg).splitlines()[0]}") from error


def dotted_keys(config: DictConfig) -> list[str]:
    """All keys that take a value, as `section.name`."""
    return [f"{section}.{name}" for section in config for name in config[section]]
