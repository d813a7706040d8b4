"""What the supervisor makes of a launcher's command."""

import pytest

from hvdtrain.errors import ConfigError
from hvdtrain.process.supervise import lost_hosts, named_hosts, restricted, run_directory

TRAIN = ["python", "-m", "hvdtrain", "train", "lm", "--run-dir", "runs/mine"]


def test_hosts_are_read_from_the_command_or_its_file(tmp_path):
    assert named_hosts(["mpirun", "-np", "4", *TRAIN]) == {}
    assert named_hosts(["horovodrun", "-np", "4", "-H", "a:2,b:3,c", *TRAIN]) == {"a": 2, "b": 3, "c": 1}
    assert named_hosts(["mpirun", "--host=a:2,b", *TRAIN]) == {"a": 2, "b": 1}
    file = tmp_path / "hosts"
    file.write_text("# ours\na slots=2\nb slots = 4  # big\n\nc:3\nd\n")
    assert named_hosts(["mpirun", "--hostfile", str(file), *TRAIN]) == {"a": 2, "b": 4, "c": 3, "d": 1}
    with pytest.raises(ConfigError, match="cannot be read"):
        named_hosts(["mpirun", "--hostfile", str(tmp_path / "none"), *TRAIN])


@pytest.mark.parametrize(
    ("lost", "more", "expected_hosts", "ranks"),
    [
        (set(), [], "a:2,b:2,c:2", "6"),
        ({"b"}, [], "a:2,c:2", "4"),
        ({"a", "c"}, [], "b:2", "2"),
        ({"b"}, ["--train.global-batch-size", "9"], "a:2,c:2", "3"),
        ({"b"}, ["--train.global-batch-size=8"], "a:2,c:2", "4"),
    ],
)
def test_lost_hosts_are_left_out_and_ranks_follow(lost, more, expected_hosts, ranks):
    command = ["horovodrun", "-np", "6", "-H", "a:2,b:2,c:2", *TRAIN, *more]
    changed = restricted(command, named_hosts(command), lost)
    assert changed == ["horovodrun", "-np", ranks, "-H", expected_hosts, *TRAIN, *more]


def test_a_host_file_becomes_a_list():
    command = ["mpirun", "-n", "3", "--hostfile", "hosts", *TRAIN]
    assert restricted(command, {"a": 2, "b": 2}, {"a"}) == ["mpirun", "-n", "2", "-H", "b:2", *TRAIN]


def test_a_run_needs_a_directory():
    assert str(run_directory(["python", "--run-dir=x/y"])) == "x/y"
    assert str(run_directory(TRAIN)) == "runs/mine"
    with pytest.raises(ConfigError, match="--run-dir"):
        run_directory(["python", "-m", "hvdtrain"])


def test_hosts_are_asked_and_this_one_is_not(tmp_path):
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nfor word; do [ "$word" = gone ] && exit 255; done\nexit 0\n')
    ssh.chmod(0o755)
    assert lost_hosts(["there", "gone", "localhost"], [str(ssh)]) == {"gone"}
    assert lost_hosts(["there", "localhost"], [str(tmp_path / "missing")]) == {"there"}
