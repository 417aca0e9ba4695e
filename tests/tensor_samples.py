"""Tensors of every kind that a weight file may hold, for the tests of reading and of writing."""

import torch

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        # Three elements each, so that narrow types put the next one off its boundary.
        str(dtype): (torch.rand(3, generator=generator) * 100).to(dtype)
        for dtype in reversed(DTYPES)
    }
    base = torch.arange(12.0)
    return tensors | {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "shared.a": base,
        "shared.whole": base,
        "shared.b": base[3:7],
        "expanded": torch.tensor([1.0]).expand(5),
    }


def assert_same(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor), name
