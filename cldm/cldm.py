"""ControlNet (Zhang et al. 2023, arXiv:2302.05543): a copy of the encoder behind zero convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.models.diffusion.latent import Cond, LatentModel, join_context
from ldm.modules.attention import Context, project_context
from ldm.modules.diffusionmodules.openaimodel import UNetArch, UNetEncoder, UNetModel
from ldm.modules.diffusionmodules.util import zero_module
from ldm.util import instantiate_from_config

HINT_WIDTHS = (16, 16, 32, 32, 96, 96, 256)
GUESS_MODE_DECAY = 0.825


class HintFeatures(NamedTuple):
    """What the hint block makes of a hint; constant over a sampling run, so computed once."""

    features: Tensor  # (B, model_channels, h, w)


def build_hint_block(hint_channels: int, model_channels: int) -> nn.Sequential:
    """Hint to features of the size of the latent, 8x down: three convolutions stride, the last is zero.

    The others start as He et al. 2015 (arXiv:1502.01852) have it. With torch's own start each layer shrinks
    what differs from place to place to a third; behind seven of them a hint is a constant, and the branch
    learns for thousands of steps before it sees one.
    """
    widths = (hint_channels, *HINT_WIDTHS)
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        layers += [nn.Conv2d(a, b, 3, stride=2 if i in (2, 4, 6) else 1, padding=1), nn.SiLU()]
        nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers, zero_module(nn.Conv2d(widths[-1], model_channels, 3, padding=1)))


class ControlNet(UNetEncoder):
    """The control branch: encoder, hint block, and a zero convolution for each output of the encoder.

    Keyword arguments are the fields of `UNetArch`, and

    hint_channels           channels of the hint: 3 for a colour map, the number of classes for one-hot
    global_average_pooling  average each residual over the map, as some ControlNet 1.1 models do
    """

    # See UNetModel: the sizes cross into UNetArch, which refuses what it does not know.
    def __init__(self, *, hint_channels: int = 3, global_average_pooling: bool = False, **arch: Any) -> None:
        sizes = UNetArch(**arch)
        super().__init__(sizes)
        self.hint_channels = hint_channels
        self.global_average_pooling = global_average_pooling
        self.zero_convs = nn.ModuleList(
            nn.Sequential(zero_module(nn.Conv2d(width, width, 1))) for width in self.block_channels
        )
        self.input_hint_block = build_hint_block(hint_channels, sizes.model_channels)
        width = self.block_channels[-1]
        self.middle_block_out = nn.Sequential(zero_module(nn.Conv2d(width, width, 1)))

    @property
    def num_residuals(self) -> int:
        """Residuals that `forward` returns: one for each input block, one for the middle."""
        return len(self.zero_convs) + 1

    def encode_hint(self, hint: Tensor) -> HintFeatures:
        """(B, hint_channels, H, W) in [0, 1] -> features of the size of the latent."""
        if hint.shape[1] != self.hint_channels:
            raise ValueError(
                f"expected a hint of {self.hint_channels} channels, as the model has, found {hint.shape[1]}"
            )
        return HintFeatures(self.input_hint_block(hint.to(self.weight_dtype)))

    def forward(
        self, x: Tensor, hint: Tensor | HintFeatures, timesteps: Tensor, context: Context | None
    ) -> list[Tensor]:
        """Residuals for the skips of the UNet, in order, and last the one for its middle block.

        x          (B, 4, h, w)
        hint       (B, hint_channels, 8h, 8w) in [0, 1], or what `encode_hint` made of it
        timesteps  (B,)
        context    (B, L, D), or what `project_context` made of it
        """
        hint = hint if isinstance(hint, HintFeatures) else self.encode_hint(hint)
        x = x.to(self.weight_dtype)
        outputs = self.encode(x, self.embed_time(timesteps, x), context, hint.features)
        convs = [*self.zero_convs, self.middle_block_out]
        residuals = [conv(h) for conv, h in zip(convs, outputs, strict=True)]
        return [r.mean((2, 3), keepdim=True) for r in residuals] if self.global_average_pooling else residuals


class ControlledUnetModel(UNetModel):
    """The UNet with residuals of a control branch added to its skips and its middle block."""

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Context | None = None,
        control: Sequence[Tensor] | None = None,
        only_mid_control: bool = False,
    ) -> Tensor:
        """x (B, C, h, w), timesteps (B,) -> (B, out_channels, h, w) in the dtype of `x`.

        control           residuals as `ControlNet.forward` returns them; not changed
        only_mid_control  add the last of them alone
        """
        emb, outputs = self.run_encoder(x, timesteps, context)
        if control is not None:
            kept = [None] * (len(control) - 1) + [control[-1]] if only_mid_control else control
            outputs = [h if r is None else h + r for h, r in zip(outputs, kept, strict=True)]
        return self.decode(outputs, emb, context).to(x.dtype)


class ControlledModel(LatentModel):
    """Latent diffusion with a control branch, to use; `ControlLDM` trains it.

    The UNet's encoder is frozen; its decoder too while `sd_locked`. `control_scales` weigh the residuals.
    """

    unused_params = LatentModel.unused_params | {"control_key"}

    def __init__(
        self,
        *,
        control_stage_config: Mapping[str, Any],
        only_mid_control: bool = False,
        **latent_model: Any,  # the parameters of LatentModel, which names and checks them
    ) -> None:
        super().__init__(**latent_model)
        self.control_model = instantiate_from_config(control_stage_config)
        self.control_scales = [1.0] * self.control_model.num_residuals
        self.model.requires_grad_(False)
        self.sd_locked = True
        self.only_mid_control = only_mid_control

    @property
    def sd_locked(self) -> bool:
        """Whether the UNet's decoder is frozen; setting it freezes or frees the decoder."""
        return self._sd_locked

    @sd_locked.setter
    def sd_locked(self, locked: bool) -> None:
        self._sd_locked = locked
        unet = self.model.diffusion_model
        for module in (unet.output_blocks, unet.out):
            module.requires_grad_(not locked)

    @property
    def only_mid_control(self) -> bool:
        """Whether the middle residual alone is used; setting it freezes or frees the other convolutions."""
        return self._only_mid_control

    @only_mid_control.setter
    def only_mid_control(self, only_mid: bool) -> None:
        self._only_mid_control = only_mid
        self.control_model.zero_convs.requires_grad_(not only_mid)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """What the controlled UNet predicts; without a hint in `cond`, what the plain one does.

        `cond` may hold `control_scales`, used instead of the module's. A hint for fewer latents than there
        are belongs to the last of them and leaves the others without control, as guess mode wants it.
        """
        context = join_context(cond["c_crossattn"])
        control = None
        if cond.get("c_concat"):
            hint = join_context(cond["c_concat"])
            control = self.control_residuals(x_noisy, t, context, hint)
            control = scaled(control, cond.get("control_scales", self.control_scales))
        unet = self.model.diffusion_model
        return unet(x_noisy, t, context, control=control, only_mid_control=self.only_mid_control)

    def control_residuals(
        self, x: Tensor, t: Tensor, context: Context, hint: Tensor | HintFeatures
    ) -> list[Tensor]:
        """Residuals of the control branch; zero for latents in front that have no hint."""
        rows = len(hint.features if isinstance(hint, HintFeatures) else hint)
        text = context[-rows:] if isinstance(context, Tensor) else context
        residuals = self.control_model(x[-rows:], hint, t[-rows:], text)
        uncontrolled = len(x) - rows
        return (
            [F.pad(r, (0, 0, 0, 0, 0, 0, uncontrolled, 0)) for r in residuals] if uncontrolled else residuals
        )

    @torch.no_grad()
    def precompute_cond(self, cond: Cond) -> Cond:
        """Replace hint and text by what the networks make of them at every noise level.

        The result stands for `cond` in `apply_model`; a sampling run makes it once.
        """
        context = join_context(cond["c_crossattn"]).to(self.control_model.weight_dtype)
        projected = project_context(context, self.model.diffusion_model)
        if not cond.get("c_concat"):
            return {**cond, "c_crossattn": [projected]}
        hint = join_context(cond["c_concat"])
        hint = hint if isinstance(hint, HintFeatures) else self.control_model.encode_hint(hint)
        projected |= project_context(context[-len(hint.features) :], self.control_model)
        return {**cond, "c_crossattn": [projected], "c_concat": [hint]}


def scaled(residuals: Sequence[Tensor], scales: Sequence[float]) -> list[Tensor]:
    """Residuals times their scales, one scale for each."""
    if len(scales) != len(residuals):
        raise ValueError(
            f"expected {len(residuals)} control_scales, one for each residual, found {len(scales)}"
        )
    return [r if s == 1 else s * r for r, s in zip(residuals, scales, strict=True)]


def guess_mode_scales(strength: float, num_residuals: int) -> list[float]:
    """Scales that fade towards the image-sized end: strength * 0.825 ** (n - 1 - i)."""
    return [strength * GUESS_MODE_DECAY ** (num_residuals - 1 - i) for i in range(num_residuals)]


def __getattr__(name: str) -> Any:
    """`ControlLDM`, found when asked for: Lightning takes longer to import than all that sampling needs."""
    if name == "ControlLDM":
        from cldm.control_ldm import ControlLDM

        return ControlLDM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
