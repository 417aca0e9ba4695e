"""ControlNet on latent diffusion: model, checkpoints, configuration, generation, logging."""
