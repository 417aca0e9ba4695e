"""Noise priors: the moments of a data set's latents, and where sampling starts because of them."""
