"""Optimizers, learning-rate schedules, and the gradient noise scale."""
