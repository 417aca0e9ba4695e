"""The text encoders against transformers and open_clip, and their keys against the published lists."""

from __future__ import annotations

import gzip
import html
import json
import runpy
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm.modules.encoders import tokenizer
from ldm.modules.encoders.modules import FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder, TextEmbedder

ROOT = Path(__file__).parents[1]
TINY = {"width": 32, "num_layers": 3, "num_heads": 4}
LARGE = {"width": 768, "num_layers": 12, "num_heads": 12}
HUGE = {"width": 1024, "num_layers": 24, "num_heads": 16}
PROMPTS = ["a wet road at night, two cars", "", "City road scenes."]
TEXTS = [
    "City road scenes.",
    "",
    "   a  CAR\tand\n a truck ",
    "it's the driver's; they'll don't I'm we've",
    "1234567890 3.14 50% $20 #1 a2b",
    "(((masterpiece))), best-quality!!! ... [x] {y} a/b\\c <d>",
    "caf\u00e9 na\u00efve Stra\u00dfe \u4ea4\u901a \u0434\u043e\u0440\u043e\u0433\u0430 \U0001f697\U0001f327",
    "pneumonoultramicroscopicsilicovolcanoconiosis" * 3,
    "! !! !!!",
]
LONG = "A street with many cars and buildings, seen in rain at night: " * 20
Options = dict[str, object]
HuggingFace = Callable[..., dict[str, list[int]]]
Embedder = type[FrozenCLIPEmbedder] | type[FrozenOpenCLIPEmbedder]


def make(kind: Embedder, seed: int = 0, **options: object) -> TextEmbedder:
    torch.manual_seed(seed)
    embedder = kind(**{**TINY, **options})
    with torch.no_grad():
        for weight in embedder.parameters():  # biases and gains too, or a lost one goes unseen
            weight.add_(0.1 * torch.randn_like(weight) if weight.ndim < 2 else 0)
    return embedder


@pytest.fixture(params=[FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder])
def kind(request: pytest.FixtureRequest) -> Embedder:
    return request.param


def reference_clip(embedder: TextEmbedder, width: int, num_layers: int, num_heads: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        hidden_act="quick_gelu",
        max_position_embeddings=77,
    )
    model = transformers.CLIPTextModel(config).eval()
    weights = embedder.transformer["text_model"].state_dict()
    nested = any(key.startswith("text_model.") for key in model.state_dict())  # transformers 4
    model.load_state_dict({f"text_model.{key}" if nested else key: value for key, value in weights.items()})
    return model


def reference_open_clip(embedder: TextEmbedder, width: int, num_layers: int, num_heads: int) -> nn.Module:
    from open_clip.transformer import TextTransformer

    sizes = {"width": width, "layers": num_layers, "heads": num_heads, "output_dim": width}
    model = TextTransformer(**sizes, output_tokens=True).eval()
    weights = embedder.model.state_dict()
    weights.pop("logit_scale")  # open_clip keeps it one level up
    model.load_state_dict(weights)
    return model


def on_meta(kind: Embedder) -> TextEmbedder:
    with torch.device("meta"):
        return kind(**TINY)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).norm() / theirs.norm()).item()


def published(version: str) -> dict[str, list[int]]:
    path = ROOT / "tests/golden" / f"keys_{version}.tsv"
    rows = (line.split("\t") for line in path.read_text().splitlines())
    prefix = "cond_stage_model."
    return {key.removeprefix(prefix): json.loads(shape) for key, shape in rows if key.startswith(prefix)}


# Weights and names ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "embedder"), [("sd15", FrozenCLIPEmbedder), ("sd21", FrozenOpenCLIPEmbedder)]
)
def test_names_shapes_and_order_are_the_published_ones(version: str, embedder: Embedder) -> None:
    with torch.device("meta"):
        model = embedder()
    expected = published(version)
    expected.pop("transformer.text_model.embeddings.position_ids", None)  # derived, not a weight
    ours = [(key, list(value.shape)) for key, value in model.state_dict().items()]
    assert ours == list(expected.items())
    assert {key for key, _ in ours} == {name for name, _ in model.named_parameters()}
    assert not list(model.buffers()), "a buffer would stay on the meta device"


def test_a_model_built_on_meta_is_filled_by_assignment(kind: Embedder) -> None:
    source, target = make(kind), on_meta(kind)
    target.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(target(PROMPTS), source(PROMPTS))


# Values -----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("sizes", [TINY, pytest.param(LARGE, marks=pytest.mark.slow)], ids=["tiny", "real"])
def test_clip_equals_transformers(sizes: dict[str, int]) -> None:
    embedder = make(FrozenCLIPEmbedder, **sizes)
    tokens = embedder.tokenize([*PROMPTS, LONG[:300]])[:, 0]
    theirs = reference_clip(embedder, **sizes)(input_ids=tokens).last_hidden_state
    assert relative_error(embedder.encode_tokens(tokens), theirs) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("options", [{"skip_layers": 1}, {"layer": "penultimate"}])
def test_clip_skip_equals_transformers_with_a_layer_less(options: Options) -> None:
    embedder = make(FrozenCLIPEmbedder, **options)
    tokens = embedder.tokenize(PROMPTS)[:, 0]
    reference = reference_clip(embedder, **TINY)
    hidden = reference(input_ids=tokens, output_hidden_states=True).hidden_states[-2]
    norm = getattr(reference, "text_model", reference).final_layer_norm
    assert relative_error(embedder.encode_tokens(tokens), norm(hidden)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("index", [0, 1, 2, -2])
def test_clip_hidden_layer_equals_that_of_transformers(index: int) -> None:
    embedder = make(FrozenCLIPEmbedder, layer="hidden", layer_idx=index)
    tokens = embedder.tokenize(PROMPTS)[:, 0]
    hidden = reference_clip(embedder, **TINY)(input_ids=tokens, output_hidden_states=True).hidden_states
    assert relative_error(embedder.encode_tokens(tokens), hidden[index]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("layer", ["last", "penultimate"])
@pytest.mark.parametrize("sizes", [TINY, pytest.param(HUGE, marks=pytest.mark.slow)], ids=["tiny", "real"])
def test_open_clip_equals_open_clip(sizes: dict[str, int], layer: str) -> None:
    embedder = make(FrozenOpenCLIPEmbedder, layer=layer, **sizes)
    tokens = embedder.tokenize([*PROMPTS, LONG[:300]])[:, 0]
    reference = reference_open_clip(embedder, **sizes)
    if layer == "penultimate":
        reference.transformer.resblocks = reference.transformer.resblocks[:-1]
    assert relative_error(embedder.encode_tokens(tokens), reference(tokens)[1]) < 1e-5


# Tokens -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hugging_face() -> HuggingFace:
    """CLIPTokenizer over the vocabulary file of open_clip, laid out as the specification of CLIP has it."""
    transformers = pytest.importorskip("transformers")
    from open_clip.tokenizer import bytes_to_unicode, default_bpe

    lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")
    num_merges = 49408 - 2 * 256 - 2  # the vocabulary less bytes, bytes at a word's end and specials
    merges = [tuple(line.split()) for line in lines[1 : 1 + num_merges]]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges)


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_equal_those_of_transformers(hugging_face: HuggingFace, text: str) -> None:
    row = hugging_face(text, padding="max_length", max_length=77)["input_ids"]
    assert on_meta(FrozenCLIPEmbedder).tokenize([text]).tolist() == [[row]]


def test_html_entities_are_the_characters_they_stand_for(hugging_face: HuggingFace) -> None:
    text = "cars &amp; trucks &lt;3 &eacute;t&eacute; &#39;quoted&#39;"
    ids = hugging_face(html.unescape(text), add_special_tokens=False)["input_ids"]
    assert tokenizer.encode(text) == ids


def test_tokens_with_zero_padding_equal_those_of_open_clip() -> None:
    import open_clip

    assert torch.equal(on_meta(FrozenOpenCLIPEmbedder).tokenize(TEXTS)[:, 0], open_clip.tokenize(TEXTS))


@pytest.mark.parametrize(("num_tokens", "num_chunks"), [(0, 1), (75, 1), (76, 2), (150, 2), (300, 4)])
def test_every_token_of_a_long_prompt_is_kept_in_order(num_tokens: int, num_chunks: int) -> None:
    text = " ".join(["car", "tree", "road"] * 100).split()[:num_tokens]  # each of the three is one token
    tokens = tokenizer.chunk_tokens([" ".join(text), "short"], pad_id=0)
    assert tokens.shape == (2, num_chunks, 77)
    kept = [token for row in tokens[0].tolist() for token in row[1 : row.index(49407)]]
    assert kept == [tokenizer.encode(word)[0] for word in text]
    assert tokens[0, :, 0].eq(49406).all()
    assert tokens[1, 1:].tolist() == [[49406, 49407] + [0] * 75] * (num_chunks - 1)


def test_tokens_need_a_prompt() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        tokenizer.chunk_tokens([], pad_id=0)


# Prompts ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_long_prompt_is_the_pieces_of_75_tokens_encoded_one_by_one(kind: Embedder) -> None:
    embedder = make(kind)
    ids = tokenizer.encode(LONG)
    pieces = [ids[start : start + 75] for start in range(0, len(ids), 75)]
    assert len(pieces) > 3
    alone = []
    for piece in pieces:
        row = [49406, *piece, 49407]
        row += [embedder.pad_id] * (77 - len(row))
        alone.append(embedder.encode_tokens(torch.tensor([row])))
    assert relative_error(embedder([LONG]), torch.cat(alone, dim=1)) < 1e-6


@torch.no_grad()
def test_prompt_and_negative_prompt_get_the_same_length(kind: Embedder) -> None:
    embedder = make(kind)
    context = embedder.encode([LONG, "lowres"])
    num_chunks = -(-len(tokenizer.encode(LONG)) // 75)
    assert context.shape == (2, 77 * num_chunks, 32)
    rest = embedder([""]).repeat(1, num_chunks - 1, 1)
    assert relative_error(context[1:], torch.cat([embedder(["lowres"]), rest], dim=1)) < 1e-6


@torch.no_grad()
def test_repeated_prompts_are_encoded_once_and_come_back_in_order(
    kind: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = make(kind)
    alone = {text: embedder([text])[0] for text in ["a", "b", ""]}
    rows: list[int] = []
    encode_tokens = embedder.encode_tokens
    monkeypatch.setattr(embedder, "encode_tokens", lambda t: rows.append(len(t)) or encode_tokens(t))
    texts = ["b", "", "a", "b", "b", ""]
    context = embedder(texts)
    assert rows == [3]
    assert relative_error(context, torch.stack([alone[text] for text in texts])) < 1e-6


def test_a_single_string_is_one_prompt(kind: Embedder) -> None:
    embedder = make(kind)
    assert torch.equal(embedder("a car"), embedder(["a car"]))


def test_the_context_has_the_precision_of_the_weights(kind: Embedder) -> None:
    embedder = make(kind)
    exact = embedder(PROMPTS)
    half = embedder.to(torch.bfloat16)(PROMPTS)
    assert half.dtype == torch.bfloat16
    assert relative_error(half.float(), exact) < 0.05


# Options ----------------------------------------------------------------------------------------


def test_a_frozen_encoder_stays_frozen(kind: Embedder) -> None:
    parent = nn.Sequential(make(kind)).train()
    assert not any(module.training for module in parent[0].modules())
    assert not any(weight.requires_grad for weight in parent.parameters())


def test_an_encoder_that_is_not_frozen_trains(kind: Embedder) -> None:
    embedder = make(kind, freeze=False, layer="last").train()
    assert all(module.training for module in embedder.modules())
    embedder(["a car"]).square().sum().backward()
    idle = {name for name, weight in embedder.named_parameters() if weight.grad is None}
    assert idle <= {"model.text_projection", "model.logit_scale"}


@pytest.mark.parametrize(
    ("embedder", "options"),
    [
        (FrozenCLIPEmbedder, {"version": "openai/clip-vit-large-patch14", "device": "cuda"}),
        (FrozenCLIPEmbedder, {"max_length": 77, "layer": "last", "layer_idx": None, "freeze": True}),
        (FrozenOpenCLIPEmbedder, {"arch": "ViT-H-14", "version": "laion2b_s32b_b79k", "device": "cuda"}),
    ],
)
def test_options_of_published_files_change_nothing(embedder: Embedder, options: Options) -> None:
    assert torch.equal(make(embedder, **options)(PROMPTS), make(embedder)(PROMPTS))


@pytest.mark.parametrize(
    ("embedder", "options", "message"),
    [
        (FrozenCLIPEmbedder, {"max_length": 248}, "expected max_length 77, .* found 248"),
        (FrozenOpenCLIPEmbedder, {"max_length": 64}, "expected max_length 77, .* found 64"),
        (FrozenCLIPEmbedder, {"layer": "pooled"}, "choose one of last, penultimate, hidden"),
        (FrozenOpenCLIPEmbedder, {"layer": "hidden"}, "choose one of last, penultimate"),
        (FrozenCLIPEmbedder, {"layer": "hidden"}, "needs a layer_idx in 0..3"),
        (FrozenCLIPEmbedder, {"layer": "hidden", "layer_idx": 4}, "needs a layer_idx in 0..3"),
        (FrozenCLIPEmbedder, {"skip_layers": 4}, "state of 3 layers"),
        (FrozenCLIPEmbedder, {"skip_layers": -1}, "state of 3 layers"),
        (FrozenOpenCLIPEmbedder, {"num_heads": 5}, "width that num_heads divides"),
    ],
)
def test_a_wrong_option_is_refused_with_the_reason(
    embedder: Embedder, options: Options, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(embedder, **options)


# Offline ----------------------------------------------------------------------------------------


def test_nothing_reaches_the_network(kind: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[object] = []

    def refuse(*args: object, **_: object) -> None:
        attempts.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    tokenizer._tokenizer.cache_clear()
    assert make(kind)(PROMPTS).shape == (3, 77, 32)
    assert attempts == []


@pytest.mark.parametrize("module", ["tokenizer", "clip", "modules"])
def test_open_clip_is_not_imported_before_its_first_use(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)  # an import of it now raises
    monkeypatch.setitem(sys.modules, "open_clip.tokenizer", None)
    runpy.run_path(str(ROOT / "ldm/modules/encoders" / f"{module}.py"))
