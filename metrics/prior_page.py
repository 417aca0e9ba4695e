"""A page that shows a noise prior: what latents are like at each place and of each class, and how often seen.

One file, its pictures in it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cldm.prior_file import Prior, PriorCard
from datasets.label_space import LabelSpace, Rgb
from ldm.priors.moments import Moments
from metrics.page import Html, gallery, page, picture, swatch, table, tag

Decode = Callable[[NDArray[np.float32]], Rgb]
"""Latents (B, C, h, w), scaled -> images (B, H, W, 3)."""

SWATCH = 8  # latent pixels along each side
LEAST_WIDTH = 512  # pixels of a map of places, so that its cells are seen
LOW, MIDDLE, HIGH = (33, 102, 172), (247, 247, 247), (178, 24, 43)  # below, at and above 0
DARK, BRIGHT = (24, 27, 62), (255, 226, 120)  # the smallest and the largest deviation
SWATCH_STYLE = "width: 72px; height: 36px; object-fit: cover; border-radius: 4px; vertical-align: middle"


def prior_page(prior: Prior, decode: Decode) -> str:
    """The whole page.

    decode  shows what a latent of the mean of a class looks like
    """
    card, moments = prior
    sections = [
        ("places", "Places", places_section(moments.places)),
        ("classes", "Classes", classes_section(prior, decode)),
    ]
    return page(f"Noise prior of {card.dataset}", [tag("p", lead(card))], sections)


def lead(card: PriorCard) -> str:
    """What the prior was made of."""
    part = "" if card.is_whole else f" of {card.total}, so it is a part of a prior"
    origin = f" They are taken from {card.origin['published']}." if "published" in card.origin else ""
    height, width = card.size
    return (
        f"{card.images} images{part} of {card.dataset}, split {card.split}, at {height} by {width} pixels;"
        f" {len(card.classes)} classes of {card.label_space}; latents times {card.scale_factor}, of the"
        f" autoencoder {card.first_stage}.{origin}"
    )


# -- places ------------------------------------------------------------------------------------------------


def places_section(places: Moments) -> list[Html]:
    """Mean and standard deviation of each channel at each place."""
    mean, std = places.mean, deviation(places)
    shown = []
    for channel in range(mean.shape[-1]):
        largest = float(np.abs(mean[..., channel]).max())
        name = f"channel {channel}: mean, {-largest:.2f} (blue) to {largest:.2f} (red), white is 0"
        shown.append(picture(inline(enlarged(signed_colours(mean[..., channel]))), name, name))
    for channel in range(std.shape[-1]):
        low, high = (float(edge(std[..., channel])) for edge in (np.min, np.max))
        name = f"channel {channel}: deviation, {low:.2f} (dark) to {high:.2f} (bright)"
        shown.append(picture(inline(enlarged(rising_colours(std[..., channel]))), name, name))
    text = (
        "Mean and standard deviation of the latents at each place, over all images, whatever they show there:"
        " the prior spatial, and where the other kinds lean to if a class was rarely seen."
    )
    return [tag("p", text), gallery(shown, mean.shape[-1])]


def deviation(moments: Moments) -> NDArray[np.float64]:
    """(*groups, C) standard deviations."""
    variance = moments.variance
    return np.sqrt(np.diagonal(variance, axis1=-2, axis2=-1) if moments.has_covariance else variance)


def signed_colours(values: NDArray[np.float64]) -> Rgb:
    """(h, w) -> colours from blue over white at 0 to red; the largest value of either sign sets both ends."""
    share = values / (np.abs(values).max() or 1)
    end = np.where(share[..., None] < 0, LOW, HIGH)
    return (np.array(MIDDLE) + (end - np.array(MIDDLE)) * np.abs(share)[..., None]).round().astype(np.uint8)


def rising_colours(values: NDArray[np.float64]) -> Rgb:
    """(h, w) -> colours from dark at the smallest value to bright at the largest."""
    share = (values - values.min()) / (np.ptp(values) or 1)
    return (np.array(DARK) + (np.array(BRIGHT) - DARK) * share[..., None]).round().astype(np.uint8)


def enlarged(colours: Rgb) -> Rgb:
    """Each pixel as a square of several."""
    times = max(1, -(-LEAST_WIDTH // colours.shape[1]))
    return colours.repeat(times, axis=0).repeat(times, axis=1)


# -- classes -----------------------------------------------------------------------------------------------


def classes_section(prior: Prior, decode: Decode) -> list[Html]:
    """What the mean of each class looks like, its numbers, and how often it was seen."""
    card, moments = prior
    means, stds = moments.classes.mean, deviation(moments.classes)
    decoded = swatches(means, decode)
    colours = LabelSpace.load(card.label_space).colours
    rows = []
    for k in np.argsort(-moments.classes.count, kind="stable").tolist():
        images, pixels = int(moments.classes_by_image.count[k]), int(moments.classes.count[k])
        cells = moments.joint.count[k]
        name = tag("span", swatch(f"rgb{tuple(map(int, colours[k]))}"), card.classes[k])
        look = tag("img", src=inline(decoded[k]), alt=f"mean of {card.classes[k]}", style=SWATCH_STYLE)
        figures = [
            numbers(means[k]),
            numbers(stds[k]),
            f"{images:,}",
            f"{pixels:,}",
            f"{(cells > 0).mean():.0%}",
        ]
        rows.append([name, look, *figures] if images else [name, "-", "-", "-", "0", "0", "-"])
    text = (
        "By number of latent pixels. The swatch is what the autoencoder makes of a latent that is the mean of"
        " the class everywhere. A class without images, and void, start as spatial does. Places is the share"
        " of places at which some image shows the class: there it has moments of its own in the joint kinds."
    )
    header = ["class", "decoded mean", "mean", "deviation", "images", "latent pixels", "places"]
    return [tag("p", text), table(header, rows)]


def swatches(means: NDArray[np.float64], decode: Decode) -> list[Rgb]:
    """The middle of the image of a constant latent, for each mean (K, C); the border sees the padding."""
    latents = np.broadcast_to(means[:, :, None, None], (*means.shape, SWATCH, SWATCH)).astype(np.float32)
    images = decode(latents)
    height, width = images.shape[1:3]
    return list(images[:, height // 4 : height - height // 4, width // 4 : width - width // 4])


def numbers(values: Sequence[float] | NDArray[np.float64]) -> str:
    """Two decimals each."""
    return "  ".join(f"{value:.2f}" for value in values)


def inline(image: Rgb) -> str:
    """An image as an address that holds it."""
    content = io.BytesIO()
    Image.fromarray(image).save(content, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
