"""Schedule, guidance, samplers and the training module."""
