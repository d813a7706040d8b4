"""Data: which samples a step and a rank see, and reading them."""
