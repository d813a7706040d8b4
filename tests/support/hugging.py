"""transformers, where it is installed."""

import pytest

from hvdtrain.data.torchvision_import import import_torchvision


def import_transformers():
    """Return transformers; skips the test where it is not installed."""
    import_torchvision()  # transformers imports it, and PyPI's does not import beside a CPU torch
    return pytest.importorskip("transformers")
