"""Segmenters in their forms: models of transformers, folders of maps, the judge."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
    SwinConfig,
)

from datasets.label_space import LabelSpace
from metrics.blocks import Block
from metrics.image_sets import Item, Picture, id_reader, with_predicted
from metrics.judge import Judgement
from metrics.segmenters import OneJudgement, TransformersSegmenter, from_maps, hash_of, kind_of

SPACE = LabelSpace.load("cityscapes")
CPU = torch.device("cpu")
NAMES = dict(enumerate(SPACE.names))


def images(n: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (n, 64, 128, 3)).astype(np.uint8)


def tiny_segformer(folder: Path, classes: int = 19) -> Path:
    torch.manual_seed(0)
    config = SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        id2label={i: NAMES.get(i, str(i)) for i in range(classes)},
    )
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    steps = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps(steps))
    return folder


def test_segformer_gives_what_transformers_own_processing_gives(tmp_path: Path) -> None:
    folder = tiny_segformer(tmp_path)
    found = TransformersSegmenter(folder, SPACE, CPU)(images())
    processor = SegformerImageProcessorPil(
        do_resize=False, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25]
    )
    network = SegformerForSemanticSegmentation.from_pretrained(folder).eval()
    with torch.no_grad():
        answer = network(**processor(list(images()), return_tensors="pt"))
    expected = processor.post_process_semantic_segmentation(answer, [(64, 128)] * 3)
    assert np.mean(found == torch.stack(expected).numpy()) > 0.999, "ties of floats may fall either way"
    assert len(np.unique(found)) > 2


def test_mask2former_gives_what_transformers_own_processing_gives(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=8,
        id2label=NAMES,
    )
    Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
    found = TransformersSegmenter(tmp_path, SPACE, CPU)(images())
    processor = Mask2FormerImageProcessorPil(do_resize=False)
    network = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        answer = network(pixel_values=processor(list(images()), return_tensors="pt").pixel_values)
    expected = processor.post_process_semantic_segmentation(answer, [(64, 128)] * 3)
    assert np.mean(found == torch.stack(expected).numpy()) > 0.97, "transformers goes by way of 384 x 384"


def test_a_model_of_other_classes_or_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"of the 19 classes of cityscapes, found one of 7"):
        TransformersSegmenter(tiny_segformer(tmp_path / "a", classes=7), SPACE, CPU)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="expected a model of segformer or mask2former, found 'bert'"):
        TransformersSegmenter(tmp_path / "b", SPACE, CPU)
    with pytest.raises(ValueError, match=r"expected a folder of transformers with its config\.json, or a"):
        kind_of(tmp_path)
    assert kind_of(tmp_path / "b") == "transformers"
    assert set(hash_of(tmp_path / "a")["sha256"]) == {
        *("config.json", "model.safetensors", "preprocessor_config.json")
    }


def item(name: str) -> Item:
    return Item(name.partition("_")[0], Picture(Path(f"{name}.png"), (64, 128), "RGB", "PNG"))


def test_predicted_maps_are_found_by_the_name_of_the_image_and_brought_to_its_size(tmp_path: Path) -> None:
    truth = np.random.default_rng(0).integers(0, 19, (2, 64, 128)).astype(np.uint8)
    for name, ids in zip(("a_seed0", "a_seed1"), truth, strict=True):
        Image.fromarray(ids.repeat(2, axis=0).repeat(2, axis=1)).save(tmp_path / f"{name}.png")
    items = with_predicted([item("a_seed1"), item("a_seed0")], tmp_path)
    found = from_maps(SPACE)(Block(items, images(2), None))
    assert np.array_equal(found, truth[::-1])
    with pytest.raises(ValueError, match=r"expected a predicted map b_seed0\.png, as the image is called"):
        with_predicted([item("b_seed0")], tmp_path)


def test_the_judge_judges_the_same_images_once() -> None:
    calls = []

    class Judge:
        def judge(self, some: NDArray[np.uint8]) -> Judgement:
            calls.append(len(some))
            return Judgement(some[..., 0], np.zeros(len(some), int), np.zeros((len(some), 4), np.float32))

    once, some = OneJudgement(Judge()), images()
    assert np.array_equal(once.labels(some), some[..., 0])
    assert once.features(some).shape == (3, 4)
    assert calls == [3]
    once.labels(images(2))
    assert calls == [3, 2]


@pytest.mark.parametrize("kind", ["auto", "train_ids", "colours"])
def test_maps_are_read_in_whatever_form_they_are(tmp_path: Path, kind: str) -> None:
    truth = np.random.default_rng(0).choice([0, 5, 18, 255], (64, 128)).astype(np.uint8)
    path = tmp_path / "x_gtFine_labelIds.png"
    stored = {"auto": SPACE.to_file_ids(truth, "x"), "train_ids": truth, "colours": SPACE.paint(truth)}[kind]
    Image.fromarray(stored).save(path)
    assert np.array_equal(id_reader("cityscapes", kind)(path), truth)
    if kind == "colours":
        assert np.array_equal(id_reader("cityscapes")(path), truth), "colours are told by content"
