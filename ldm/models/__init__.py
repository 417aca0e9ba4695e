"""First-stage autoencoder and diffusion models."""
