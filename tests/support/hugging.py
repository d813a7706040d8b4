"""transformers, where it is installed."""

import os

import pytest

from hvdtrain.data.torchvision_import import import_torchvision


def import_transformers():
    """Return transformers, offline; skips the test where it is not installed."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import_torchvision()  # transformers imports it, and PyPI's does not import beside a CPU torch
    return pytest.importorskip("transformers")
