"""UNet and VAE networks."""
