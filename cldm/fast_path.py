"""What makes a training step cheaper without another result: rounded frozen weights, compiled networks."""

from __future__ import annotations

import torch
from torch import nn

from cldm.control_ldm import ControlLDM


def round_frozen(model: ControlLDM, dtype: torch.dtype = torch.bfloat16) -> None:
    """Hold the frozen convolutions and linear layers of the UNet in `dtype`, once and for all, channels last.

    Autocast rounds just these at every use, so a step under it computes what it does with float32 weights, up
    to the order of sums in another memory layout; but nothing is rounded again at each step, and half of the
    memory is free. Normalisations stay in float32, as autocast leaves them; so does everything that is
    trained. Freeing the decoder afterwards (`sd_locked = False`) would train it in `dtype`.

    The rest of UNet and control branch is copied out of the file that it may be mapped to: as long as one
    tensor is mapped, all that was read of the file counts as memory of the process.
    """
    for layer in model.model.modules():
        own = list(layer.parameters(recurse=False))
        if isinstance(layer, nn.Conv2d | nn.Linear) and not any(weight.requires_grad for weight in own):
            layer.to(dtype=dtype, memory_format=torch.channels_last)
    for weight in [*model.model.parameters(), *model.control_model.parameters()]:
        if weight.dtype != dtype:
            weight.data = weight.data.clone()


def compile_networks(model: ControlLDM, device: torch.device) -> None:
    """Have torch compile control branch and UNet for a device, when they first run; weights keep their names.

    Raises
        ValueError  this machine lacks what torch needs for it
    """
    lacking = compiler_lacking(device)
    if lacking:
        raise ValueError(f"cannot compile for {device.type}: {lacking}; set train.compile=false")
    model.control_model.compile()
    model.model.diffusion_model.compile()
    model.is_compiled = True


def compiler_lacking(device: torch.device) -> str | None:
    """What torch.compile lacks for a device; None if it has everything."""
    if device.type == "cuda":
        from torch.utils import _triton

        return None if _triton.has_triton() else "expected triton, which makes GPU kernels, found none"
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, OSError) as error:
        return f"expected a C++ compiler such as g++, found none ({type(error).__name__})"
    return None
