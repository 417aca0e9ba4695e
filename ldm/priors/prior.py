"""Where sampling starts: from a label map to a Gaussian for every latent pixel, and a draw of it at a level.

SCP-Diff (Gao et al. 2024, arXiv:2403.09638) draws x_0 ~ N(m, s^2) and noises it to level t. Both steps are
linear, so one draw does: x_t ~ N(sqrt(abar) m, abar s^2 + 1 - abar), or where the scheduler counts in
sigma = sqrt((1 - abar) / abar), x = m + sqrt(s^2 + sigma^2) eps. It can start any sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.priors.moments import VOID, LatentMoments, Moments

SHRINKAGE = 10.0  # images; what it was chosen by: docs/noise_priors.md
HARD_SWITCH = 0.0  # the published rule: a cell counts fully as soon as one image has it
WEIGHTINGS = ("pixels", "images")


class Gaussian(NamedTuple):
    """Normal distributions of C channels, float64 on the CPU.

    mean      (..., C)
    variance  (..., C), or with the covariance of the channels (..., C, C)
    """

    mean: Tensor
    variance: Tensor

    def mixed(self, other: Gaussian, weight: Tensor) -> Gaussian:
        """First two moments of the mixture: this one with `weight` (...) in 0..1, the other with the rest.

        They are the weighted means of E x and of E x^2, written without a difference of squares.
        """
        w = weight[..., None]
        delta = self.mean - other.mean
        full = self.variance.ndim > self.mean.ndim
        between = delta[..., :, None] * delta[..., None, :] if full else delta**2
        v = w[..., None] if full else w
        variance = v * self.variance + (1 - v) * other.variance + v * (1 - v) * between
        return Gaussian(w * self.mean + (1 - w) * other.mean, variance)

    @property
    def std(self) -> Tensor:
        """(..., C) standard deviation of each channel."""
        full = self.variance.ndim > self.mean.ndim
        return (self.variance.diagonal(dim1=-2, dim2=-1) if full else self.variance).sqrt()

    def at_level(self, abar: float, noise: Tensor) -> Tensor:
        """The draw (..., C) at level abar that standard normal `noise` of that shape stands for."""
        if self.variance.ndim == self.mean.ndim:
            return abar**0.5 * self.mean + (abar * self.variance + 1 - abar).sqrt() * noise
        unit = torch.eye(self.mean.shape[-1], dtype=self.variance.dtype)
        factor = torch.linalg.cholesky(abar * self.variance + (1 - abar) * unit)
        return abar**0.5 * self.mean + (factor @ noise[..., None])[..., 0]


class Cells:
    """Moments as tensors, with the number of images that each group was seen in."""

    def __init__(self, moments: Moments, images: Moments) -> None:
        self.gaussian = Gaussian(torch.from_numpy(moments.mean), torch.from_numpy(moments.variance))
        self.images = torch.from_numpy(images.count).double()

    def at(self, *index: Tensor) -> tuple[Gaussian, Tensor]:
        """Gaussian and number of images of some groups."""
        return Gaussian(*(part[index] for part in self.gaussian)), self.images[index]


class NoisePrior:
    """A prior of one kind over latents, from the moments of a data set.

    A cell that few images show is drawn toward the next coarser one, by the number n of those images: its
    first two moments count n, those of the coarser one `shrinkage`. The order is that of the kind's name:
    spatial-class-joint leans on the spatial moments, class-spatial-joint on those of the class, which lean on
    the spatial ones. Void and classes that were never seen are spatial.

    moments          of latents times the scale factor
    kind             one of KINDS
    shrinkage        0 (HARD_SWITCH) is the published rule: no weight for the coarser one, unless n = 0
    weighting        of the class moments: "pixels" alike, or "images" as published
    spatial_scale,   weights of the two components of spatial-class
    class_scale
    undivided        spatial-class with the published arithmetic, whose mean is not divided by the weights
    downsampling     pixels of an image for one of the latent, along each side

    Raises
        ValueError  a kind or a number that there is not
    """

    def __init__(
        self,
        moments: LatentMoments,
        kind: str = "spatial-class-joint",
        *,
        shrinkage: float = SHRINKAGE,
        weighting: str = "pixels",
        spatial_scale: float = 1.0,
        class_scale: float = 1.0,
        undivided: bool = False,
        downsampling: int = 8,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"unknown prior {kind!r}; choose one of {', '.join(KINDS)}")
        if weighting not in WEIGHTINGS:
            raise ValueError(f"unknown weighting {weighting!r}; choose one of {', '.join(WEIGHTINGS)}")
        if not (shrinkage >= 0 and min(spatial_scale, class_scale) >= 0 and spatial_scale + class_scale > 0):
            raise ValueError(
                "expected a shrinkage of 0 or more, and scales of 0 or more that are not both 0, found"
                f" {shrinkage}, {spatial_scale} and {class_scale}"
            )
        self.kind, self.shrinkage, self.undivided = kind, float(shrinkage), undivided
        self.spatial_scale, self.class_scale = float(spatial_scale), float(class_scale)
        self.downsampling = downsampling
        self.shape, self.num_classes = moments.shape, moments.num_classes
        by_image = moments.classes_by_image
        self.places = Cells(moments.places, moments.places)
        # The pixels of one image are alike, so images are counted whichever way the pixels are weighted.
        self.classes = Cells(moments.classes if weighting == "pixels" else by_image, by_image)
        self.joint = Cells(moments.joint, moments.joint)

    def mean_std(self, labels: Tensor, x0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of x_0, both (B, C, h, w) float64.

        labels  (B, h, w) or (B, H, W) train ids, 255 = void
        x0      (B, C, h, w) latents times the scale factor; the kind x0 needs them, no other takes them
        """
        found = self.gaussian(labels, x0)
        return found.mean.movedim(-1, 1), found.std.movedim(-1, 1)

    def draw(self, labels: Tensor, abar: float, seeds: Sequence[int], x0: Tensor | None = None) -> Tensor:
        """x_t (B, C, h, w) float32 at the level of abar in 0..1, on the CPU, the same for every device.

        labels, x0  as for `mean_std`
        seeds       one for each image, its only source of randomness: with "normal" the start is the noise
                    that `cldm.generate` draws for that seed
        """
        if not 0 <= abar <= 1:
            raise ValueError(f"expected abar in 0..1, found {abar}")
        if len(seeds) != len(labels):
            raise ValueError(f"expected a seed for each of {len(labels)} label maps, found {len(seeds)}")
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = torch.stack([torch.randn(self.shape, generator=g) for g in generators]).movedim(1, -1)
        return self.gaussian(labels, x0).at_level(abar, noise.double()).movedim(-1, 1).float().contiguous()

    def latents(
        self,
        labels: Tensor,
        t: float,
        scheduler: Any,
        seeds: Sequence[int],
        *,
        x0: Tensor | None = None,
        for_pipeline: bool = False,
    ) -> Tensor:
        """Latents (B, C, h, w) float32 at timestep t in the scale of a scheduler of diffusers.

        They are what its `step` takes at t. A pipeline multiplies the `latents` that it is given by
        `init_noise_sigma`; for_pipeline=True divides by it, once `set_timesteps` was called with the
        timesteps of the pipeline, of which t is the first.
        """
        in_sigma, abar = counts_in_sigma(scheduler), level_of(scheduler, t)
        x = self.draw(labels, abar, seeds, x0)
        if in_sigma:
            x = x / abar**0.5  # m + sqrt(s^2 + sigma^2) eps
        return x / float(scheduler.init_noise_sigma) if for_pipeline else x

    # -- the Gaussian of each kind, (B, h, w, C) -----------------------------------------------------------

    def gaussian(self, labels: Tensor, x0: Tensor | None = None) -> Gaussian:
        """The distribution of x_0 for a batch of label maps."""
        if (x0 is None) == (self.kind == "x0"):
            raise ValueError(f"expected x0 for the prior x0 and for no other, found kind {self.kind!r}")
        if x0 is None:
            return KINDS[self.kind](self, self.at_latent_size(labels))
        if tuple(x0.shape) != (len(labels), *self.shape):
            raise ValueError(f"expected x0 {(len(labels), *self.shape)}, found {tuple(x0.shape)}")
        mean = x0.detach().cpu().double().movedim(1, -1)
        return Gaussian(mean, torch.zeros_like(mean))

    def at_latent_size(self, labels: Tensor) -> Tensor:
        """Label maps (B, h, w) of the size of the latent, and of known classes, from such or from (B, H, W).

        The id nearest to the centre of each latent pixel, as `datasets.label_space.resize_labels` has it.
        """
        labels = torch.as_tensor(labels).cpu().long()
        size, step = self.shape[1:], self.downsampling
        if tuple(labels.shape[1:]) == (size[0] * step, size[1] * step):
            labels = labels[:, step // 2 :: step, step // 2 :: step]
        if tuple(labels.shape[1:]) != size:
            raise ValueError(
                f"expected label maps of {size[0] * step}x{size[1] * step}, as the prior is of, found"
                f" {'x'.join(map(str, labels.shape[1:]))}"
            )
        strange = labels[(labels != VOID) & ((labels < 0) | (labels >= self.num_classes))]
        if len(strange):
            raise ValueError(
                f"expected labels 0..{self.num_classes - 1} and {VOID} = void, found {int(strange[0])}"
            )
        return labels

    def shrunk(self, cell: Gaussian, images: Tensor, coarser: Gaussian) -> Gaussian:
        """A cell seen in some images, drawn toward the coarser one; that one itself where there are none."""
        weight = images / (images + self.shrinkage).clamp(min=torch.finfo(torch.float64).tiny)
        return cell.mixed(coarser, weight)

    def normal(self, labels: Tensor) -> Gaussian:
        """Standard normal, at every level: no prior."""
        mean = torch.zeros_like(self.spatial(labels).mean)
        return Gaussian(mean, torch.ones_like(mean))

    def spatial(self, labels: Tensor) -> Gaussian:
        """The moments of each place, whatever the labels."""
        return Gaussian(*(part.expand(len(labels), *part.shape) for part in self.places.gaussian))

    def by_class(self, labels: Tensor) -> Gaussian:
        """The moments of the class at each place."""
        cell, images = self.classes.at(labels.where(labels != VOID, 0))
        return self.shrunk(cell, images.where(labels != VOID, 0), self.spatial(labels))

    def spatial_and_class(self, labels: Tensor) -> Gaussian:
        """First two moments of a mixture of the spatial and the class prior."""
        spatial, by_class = self.spatial(labels), self.by_class(labels)
        alpha, beta = self.spatial_scale, self.class_scale
        share = torch.full(labels.shape, alpha / (alpha + beta), dtype=torch.float64)
        mixture = spatial.mixed(by_class, share)
        if not self.undivided:
            return mixture
        # As published: the mean is not divided by alpha + beta, and the variance is taken around that one.
        shift = (alpha + beta - 1) * mixture.mean
        full = mixture.variance.ndim > mixture.mean.ndim
        off = shift[..., :, None] * shift[..., None, :] if full else shift**2
        return Gaussian(mixture.mean + shift, mixture.variance + off)

    def joint_over(self, coarser: Gaussian, labels: Tensor) -> Gaussian:
        """The moments of the class at that very place, over coarser ones."""
        rows, columns = (torch.arange(size) for size in self.shape[1:])
        cell, images = self.joint.at(labels.where(labels != VOID, 0), rows[:, None], columns)
        return self.shrunk(cell, images.where(labels != VOID, 0), coarser)


def over_spatial(prior: NoisePrior, labels: Tensor) -> Gaussian:
    """Class and place, over the place."""
    return prior.joint_over(prior.spatial(labels), labels)


def over_class(prior: NoisePrior, labels: Tensor) -> Gaussian:
    """Class and place, over the class, which is over the place."""
    return prior.joint_over(prior.by_class(labels), labels)


KINDS: dict[str, Callable[[NoisePrior, Tensor], Gaussian]] = {
    "normal": NoisePrior.normal,
    "spatial": NoisePrior.spatial,
    "class": NoisePrior.by_class,
    "spatial-class": NoisePrior.spatial_and_class,
    "spatial-class-joint": over_spatial,
    "class-spatial-joint": over_class,
    "x0": NoisePrior.normal,  # never called: the latent that is given is its mean
}


# -- schedulers of diffusers, known by what they have ------------------------------------------------------


def counts_in_sigma(scheduler: Any) -> bool:
    """Whether a scheduler steps on x_0 + sigma eps: Euler and Heun do; DDIM, DPM-Solver++ and UniPC do not.

    Those that do ask for a start of more than unit variance.

    Raises
        ValueError  a scheduler of another process, such as flow matching
    """
    settings = getattr(scheduler, "config", None)
    if not hasattr(scheduler, "init_noise_sigma") or getattr(settings, "use_flow_sigmas", False):
        raise ValueError(
            "expected a scheduler of a diffusion process, such as DDIM or Euler, found"
            f" {type(scheduler).__name__}"
        )
    return float(scheduler.init_noise_sigma) != 1


def level_of(scheduler: Any, t: float) -> float:
    """Level abar of timestep t: of the schedule that was set, whose sigmas may be its own, else as trained.

    Raises
        ValueError  a timestep that is neither on the schedule nor one that was trained
    """
    sigmas, steps = getattr(scheduler, "sigmas", None), getattr(scheduler, "num_inference_steps", None)
    if sigmas is not None and steps is not None:
        places = (torch.as_tensor(scheduler.timesteps).cpu() == t).nonzero()
        if len(places):
            return 1 / (1 + float(sigmas[int(places[0])]) ** 2)
    trained = getattr(scheduler, "alphas_cumprod", ())
    if not (0 <= t < len(trained) and float(t).is_integer()):
        raise ValueError(f"expected a timestep of the schedule or one of 0..{len(trained) - 1}, found {t}")
    return float(trained[int(t)])
