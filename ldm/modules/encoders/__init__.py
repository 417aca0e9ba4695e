"""Text encoders of Stable Diffusion and their tokenizer."""
