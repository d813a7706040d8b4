"""The verb `sweep`: a recipe trained with several values of its settings."""

from hvdtrain.verbs.sweep.command import sweep

__all__ = ["sweep"]
