"""`verify RECIPE`: is training this recipe on these ranks the same as on one? Found out by running it."""

from hvdtrain.verbs.verify.command import verify

__all__ = ["verify"]
