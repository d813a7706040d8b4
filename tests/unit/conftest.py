"""Unit tests: one process, no Horovod, and a warning is a failure. They may run beside launches."""

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if "unit" in item.path.parts:
            item.add_marker(pytest.mark.filterwarnings("error"))
            item.add_marker(pytest.mark.beside)
