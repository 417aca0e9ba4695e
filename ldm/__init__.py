"""Latent diffusion core: networks, noise schedule, samplers, training module. Imports nothing above it."""
