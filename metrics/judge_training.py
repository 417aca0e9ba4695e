"""The stage that trains the Streets judge: its step, its figures while it runs, and the file it ends in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch import Tensor
from torch.nn import functional as F

from cldm.averaging import WeightAverage
from cldm.first_stage import spread
from cldm.pictures import Rgb, sheet
from cldm.slices import TrainingSlice
from cldm.stage_figures import StageFigures
from cldm.stage_training import StageTraining
from datasets.label_space import LabelSpace
from metrics.judge import JudgeArch, JudgeNetwork, StreetsJudge, write_judge
from metrics.judge_data import LabelledFrames, class_weights
from metrics.segmentation import VOID, Scores, confusion_matrices, score

LABEL_SPACE = "cityscapes"


class JudgeTraining(StageTraining):
    """Trains the judge on batches of `jpg`, `label`, `condition` and `step`.

    weights    (K,) what a pixel of each class counts in the cross-entropy
    condition  what the cross-entropy of the condition counts beside it
    """

    def __init__(
        self, network: JudgeNetwork, weights: NDArray[np.float64], condition: float, how: DictConfig
    ) -> None:
        # 4-D weights alone lie channels-last; convolutions then take and give images that do
        super().__init__(network.to(memory_format=torch.channels_last), how)
        self.network = network
        self.register_buffer("weights", torch.from_numpy(weights).float(), persistent=False)
        self.condition = condition

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Judge a batch, compare."""
        answers = self.network(batch["jpg"].permute(0, 3, 1, 2))
        # under autocast the scores are bf16: too coarse for sums and logarithms
        pixels = F.cross_entropy(answers.labels.float(), batch["label"], self.weights, ignore_index=VOID)
        weather = F.cross_entropy(answers.conditions.float(), batch["condition"])
        self.log("loss", pixels.detach(), prog_bar=True, batch_size=len(batch["jpg"]))
        return pixels + self.condition * weather


class JudgeFigures(StageFigures):
    """Scores on frames that are not trained on, and some of them: photo, judgement, truth."""

    def __init__(
        self, frames: LabelledFrames, running: TrainingSlice, folder: str | Path, *, freq: int, pictures: int
    ) -> None:
        super().__init__(running, folder, freq=freq)
        self.frames, self.pictures = frames, pictures
        self.scores: Scores | None = None

    def take(self) -> tuple[dict[str, float], Rgb | None]:
        """Judge the frames."""
        space = LabelSpace.load(LABEL_SPACE)
        judgement = StreetsJudge(self.running.network).judge(self.frames.images)
        self.scores = score(confusion_matrices(self.frames.labels, judgement.labels, space.num_classes))
        right = float((judgement.conditions == self.frames.conditions).mean())
        figures = {
            "miou": self.scores.miou,
            "pixel_accuracy": self.scores.pixel_accuracy,
            "condition_accuracy": right,
        }
        rows = [
            [self.frames.images[i], space.paint(judgement.labels[i]), space.paint(self.frames.labels[i])]
            for i in spread(len(self.frames), self.pictures)
        ]
        return figures, sheet(rows) if rows else None


def build_judge_training(config: DictConfig, labels: NDArray[np.uint8]) -> JudgeTraining:
    """The judge of a `JudgeStage`, to be trained on frames with these label maps."""
    arch = JudgeArch.of(config.model)
    weights = class_weights(labels, arch.classes, config.loss.class_power)
    return JudgeTraining(JudgeNetwork(arch), weights, config.loss.condition, config.train)


def write_average(
    path: str | Path, network: JudgeNetwork, average: WeightAverage, notes: Mapping[str, str]
) -> None:
    """Write the averaged weights as a judge."""
    with average.applied(network):
        write_judge(path, network, notes)
