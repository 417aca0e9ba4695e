"""The Streets judge: one network that says what each pixel of a street scene is, and what weather it shows.

Encoder: SegFormer (Xie et al. 2021, arXiv:2105.15203), built by transformers from a reduced configuration,
with a stride of 2 in each of its stages, so that a pole of one or two pixels is still there in the first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SegformerConfig, SegformerModel

from cldm.tensor_files import CheckpointError, read_metadata, read_tensors
from cldm.tensor_writing import write_tensors

AT_ONCE = 10  # images, where no gradient is needed
FINE = 2  # the decoder works at half the size and gives four pixels at each place
HEAD_WIDTH = 32  # channels of an attention head


@dataclass(frozen=True)
class JudgeArch:
    """Sizes of the network; lists have an entry for each stage of the encoder."""

    hidden: tuple[int, ...] = (32, 64, 128, 192)
    depths: tuple[int, ...] = (0, 2, 2, 2)  # blocks
    reductions: tuple[int, ...] = (8, 4, 2, 1)  # of keys and values, on each side
    widenings: tuple[int, ...] = (2, 3, 3, 3)  # of the layer inside a block
    decoder: int = 64  # channels at half size
    refinements: int = 2  # residual 3x3 convolutions there
    features: int = 64
    classes: int = 19
    conditions: int = 5

    @classmethod
    def of(cls, sizes: Mapping[str, Any]) -> JudgeArch:
        """Sizes as JSON or YAML has them."""
        given: dict[str, Any] = {k: v if isinstance(v, int) else tuple(v) for k, v in sizes.items()}
        return cls(**given)

    @property
    def step(self) -> int:
        """Sides of an image are multiples of this."""
        return 2 ** len(self.hidden)


class Answers(NamedTuple):
    """What the network gives."""

    labels: Tensor  # (B, K, H, W) scores
    conditions: Tensor  # (B, number of conditions) scores
    features: Tensor  # (B, features)


class Judgement(NamedTuple):
    """What the judge says of images."""

    labels: NDArray[np.uint8]  # (B, H, W) train ids; void is none of them
    conditions: NDArray[np.int64]  # (B,) number in `datasets.streets.CONDITIONS`
    features: NDArray[np.float32]  # (B, features)


class JudgeNetwork(nn.Module):
    """Encoder of four stages; a decoder that joins them at half size; a small head on their means."""

    def __init__(self, arch: JudgeArch) -> None:
        super().__init__()
        self.arch = arch
        self.encoder = SegformerModel(segformer_config(arch))
        width = arch.decoder
        self.lateral = nn.ModuleList(nn.Conv2d(size, width, 1) for size in arch.hidden)
        # the pixels themselves come in again, because the encoder's first layer has seen them at stride 2
        self.fine = nn.Conv2d(width + 3 * FINE**2, width, 3, padding=1)
        self.refine = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(arch.refinements))
        self.classify = nn.Conv2d(width, arch.classes * FINE**2, 1)
        self.embed = nn.Linear(sum(arch.hidden), arch.features)
        self.recognise = nn.Linear(arch.features, arch.conditions)

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1], sides as for `forward` -> maps of the stages, and of all together."""
        stages = self.encoder(x, output_hidden_states=True).hidden_states
        size = stages[0].shape[-2:]
        joined = self.lateral[0](stages[0])
        for lateral, stage in zip(self.lateral[1:], stages[1:], strict=True):
            joined = joined + F.interpolate(lateral(stage), size, mode="bilinear", align_corners=False)
        pixels = F.pixel_unshuffle(x, FINE).to(joined.dtype)
        return [*stages, F.gelu(self.fine(torch.cat([F.gelu(joined), pixels], dim=1)))]

    def forward(self, x: Tensor) -> Answers:
        """(B, 3, H, W) in [-1, 1], sides in multiples of `arch.step`."""
        *stages, fine = self.feature_maps(x)
        for convolution in self.refine:
            fine = fine + F.gelu(convolution(fine))
        features = self.embed(torch.cat([stage.mean(dim=(2, 3)) for stage in stages], dim=1))
        return Answers(F.pixel_shuffle(self.classify(fine), FINE), self.recognise(features), features)


def segformer_config(arch: JudgeArch) -> SegformerConfig:
    """The encoder's configuration; nothing in it is random while it trains, so a run can go on bit by bit."""
    return SegformerConfig(
        num_encoder_blocks=len(arch.hidden),
        hidden_sizes=list(arch.hidden),
        depths=list(arch.depths),
        sr_ratios=list(arch.reductions),
        mlp_ratios=list(arch.widenings),
        num_attention_heads=[max(1, size // HEAD_WIDTH) for size in arch.hidden],
        patch_sizes=[7, *(3 for _ in arch.hidden[1:])],
        strides=[2] * len(arch.hidden),
        drop_path_rate=0.0,
        attn_implementation="eager",  # on a CPU its backward is faster than that of SDPA at these sizes
    )


class StreetsJudge:
    """Judges street scenes; called with images it is a `metrics.segmentation.Segmenter`."""

    def __init__(self, network: JudgeNetwork) -> None:
        self.network = network.eval()

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> StreetsJudge:
        """The judge of a file that `write_judge` wrote, computing in float32."""
        notes = read_metadata(path)
        if "judge" not in notes:
            raise CheckpointError(
                f"{path} is no Streets judge; make one: python tool_train_streets_judge.py --out {path}"
            )
        network = JudgeNetwork(JudgeArch.of(json.loads(notes["judge"])))
        state = {key: value.float() for key, value in read_tensors(path).items()}
        try:
            network.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise CheckpointError(
                f"{path} does not fit the network that it names: it was damaged or edited"
            ) from error
        return cls(network.to(device))

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(B, H, W, 3) -> (B, H, W) train ids."""
        return self.judge(images).labels

    @torch.no_grad()
    def judge(self, images: NDArray[np.uint8]) -> Judgement:
        """Labels, condition and features of (B, H, W, 3) images, a few at a time."""
        check_images(images, self.network.arch.step)
        parts = [self._judge_some(images[i : i + AT_ONCE]) for i in range(0, len(images), AT_ONCE)]
        return Judgement(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _judge_some(self, images: NDArray[np.uint8]) -> Judgement:
        device = self.network.embed.weight.device
        answers = self.network(to_signed(torch.from_numpy(np.ascontiguousarray(images)).to(device)))
        return Judgement(
            answers.labels.argmax(dim=1).to(torch.uint8).cpu().numpy(),
            answers.conditions.argmax(dim=1).cpu().numpy(),
            answers.features.float().cpu().numpy(),
        )


def to_signed(images: Tensor) -> Tensor:
    """(B, H, W, 3) of 0..255 -> (B, 3, H, W) in [-1, 1], a view that lies channels-last."""
    return (images.float() / 127.5 - 1).permute(0, 3, 1, 2)


def check_images(images: NDArray[np.uint8], step: int) -> None:
    """Refuse what the network cannot take."""
    shape = images.shape
    fits = len(shape) == 4 and len(images) and shape[3] == 3 and images.dtype == np.uint8
    if not fits or any(side < step or side % step for side in shape[1:3]):
        raise ValueError(
            f"expected uint8 images (B, H, W, 3) with sides in multiples of {step}, found {images.dtype}"
            f" {shape}"
        )


def write_judge(path: str | Path, network: JudgeNetwork, notes: Mapping[str, str]) -> None:
    """Write the network in fp16, with its sizes and `notes` in the metadata."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.half() for key, value in network.state_dict().items()}
    write_tensors(path, tensors, {**notes, "judge": json.dumps(asdict(network.arch))})
