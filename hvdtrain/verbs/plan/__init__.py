"""How many workers? Measured on the user's own machines and model, and predicted beyond them."""

from hvdtrain.verbs.plan.command import plan

__all__ = ["plan"]
