"""What a set-up needs of the machine, and what it says where something is missing."""

from pathlib import Path

import pytest

from hvdtrain.install import preflight
from hvdtrain.install.preflight import SetupError


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("ERROR: ... Failed to establish a new connection: [Errno 101]", "index cannot be reached"),
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: No matching distribution found for torch==99", r"No matching distribution .*\nX failed"),
    ],
)
def test_a_failed_step_is_explained(output, message):
    error = preflight.explain_failure("X", output, Path("x.log"))
    with pytest.raises(SetupError, match=message):
        raise error


def test_too_little_disk_space_is_told_with_its_numbers(tmp_path):
    preflight.check_disk_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(SetupError, match=r"has .* GiB free, and the set-up needs 1048576\.0 GiB"):
        preflight.check_disk_space(tmp_path / "not" / "yet", 2**50)
