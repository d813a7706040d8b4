"""What the supervisor makes of a launcher's command."""

import os
from pathlib import Path

import pytest

from hvdtrain.errors import ConfigError
from hvdtrain.process.hosts import lost_hosts, named_hosts, run_directory
from hvdtrain.process.placement import Batch, asked_ranks, place, placed
from hvdtrain.process.supervise import main

TRAIN = ["python", "-m", "hvdtrain", "train", "lm", "--run-dir", "runs/mine"]


def restricted(command, hosts, lost, batch=None):
    """Return the command on those of its hosts that are left."""
    left = {host: slots for host, slots in hosts.items() if host not in lost}
    asked = asked_ranks(command)
    return placed(command, place(left, asked, asked, lambda: Batch(batch)))


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
    ("lost", "batch", "expected_hosts", "ranks"),
    [
        (set(), None, "a:2,b:2,c:2", "6"),
        (set(), 4, "a:2,b:2,c:2", "6"),  # what was asked for is tried as it is: the ranks say why it cannot be
        ({"b"}, None, "a:2,c:2", "4"),
        ({"a", "c"}, None, "b:2", "2"),
        ({"b"}, 9, "a:2,c:1", "3"),
        ({"b"}, 8, "a:2,c:2", "4"),
    ],
)
def test_lost_hosts_are_left_out_and_ranks_follow(lost, batch, expected_hosts, ranks):
    command = ["horovodrun", "-np", "6", "-H", "a:2,b:2,c:2", *TRAIN]
    changed = restricted(command, named_hosts(command), lost, batch)
    assert changed == ["horovodrun", "-np", ranks, "-H", expected_hosts, *TRAIN]


def test_slots_and_batches_without_measure_take_no_time():
    command = ["horovodrun", "-np", "9" * 9, "-H", "a:999999999,b:1", *TRAIN]
    assert asked_ranks(restricted(command, named_hosts(command), {"b"}, 999_999_937)) == 999_999_999  # as asked
    command[2] = "999999998"
    assert asked_ranks(restricted(command, {"a": 999_999_997}, set(), 999_999_937)) == 999_999_937  # a prime
    assert asked_ranks(restricted(command, {"a": 999_999_936}, set(), 999_999_937)) == 1


def test_a_host_file_becomes_a_list():
    command = ["mpirun", "-n", "3", "--hostfile", "hosts", *TRAIN]
    assert restricted(command, {"a": 2, "b": 2}, {"a"}) == ["mpirun", "-n", "2", "-H", "b:2", *TRAIN]


def test_a_run_needs_a_directory():
    assert str(run_directory(["python", "--run-dir=x/y"])) == "x/y"
    assert str(run_directory(TRAIN)) == "runs/mine"
    with pytest.raises(ConfigError, match="--run-dir"):
        run_directory(["python", "-m", "hvdtrain"])


@pytest.mark.parametrize(
    ("words", "directory"),
    [
        (["--run-dir", "a", "--run-dir", "b"], "b"),
        (["--run-dir=a", "--run_dir", "b"], "b"),
        (["--run_dir=~/a"], "/home/of/a"),
        (["--run-dir", "~"], "/home/of"),
    ],
)
def test_the_directory_is_the_one_that_the_run_takes(monkeypatch, words, directory):
    """The last one counts, `_` is `-`, and a shell replaces no `~` behind an equals sign."""
    monkeypatch.setenv("HOME", "/home/of")
    assert run_directory(["python", "-m", "hvdtrain", "train", "lm", *words]) == Path(directory)
    with pytest.raises(ConfigError, match="there is no such user"):
        run_directory(["python", "--run-dir=~nosuchuser/x"])


def test_a_rank_supervises_nothing(monkeypatch, capsys):
    """`hvdtrain -np 2 supervise ...` would start two supervisors of one run."""
    for name, value in {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_GLOO_RENDEZVOUS_ADDR": "x"}.items():
        monkeypatch.setenv(name, value)
    assert main(["--", "true", "--run-dir", "x"]) == 2
    assert "start ranks once only, from outside of them" in capsys.readouterr().err


def test_hosts_are_asked_and_this_one_is_not(tmp_path):
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nfor word; do [ "$word" = gone ] && exit 255; done\nexit 0\n')
    ssh.chmod(0o755)
    assert lost_hosts(["there", "gone", "localhost"], [str(ssh)]) == {"gone"}
    assert lost_hosts(["there", "localhost"], [str(tmp_path / "missing")]) == {"there"}


def test_equal_signs_stay_where_they_are():
    command = ["mpirun", "--np=6", "--host=a:2,b:2,c:2", *TRAIN]
    assert restricted(command, named_hosts(command), {"b"}) == ["mpirun", "--np=4", "-H", "a:2,c:2", *TRAIN]


def test_hosts_without_slots_take_no_part():
    command = ["mpirun", "-H", "a:2,b:0,c:\u00b2,d:99999999999", *TRAIN]
    assert named_hosts(command) == {"a": 2, "c": 1, "d": 1}


@pytest.mark.parametrize("name", ["-oProxyCommand=touch x", "a b", "a;b", "$(a)", "x" * 300])
def test_a_name_that_ssh_would_take_for_an_option_is_refused(name):
    with pytest.raises(ConfigError, match="can be no host"):
        named_hosts(["mpirun", "-H", f"{name}:2,b:2", *TRAIN])


def test_a_host_file_of_odd_bytes_is_refused_in_one_sentence(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is no list of hosts"):
        named_hosts(["mpirun", "--hostfile", str(tmp_path / "pipe"), *TRAIN])
    for content in (b"a\0b\n", b"x" * (1 << 21)):
        (tmp_path / "hosts").write_bytes(content)
        with pytest.raises(ConfigError, match="is no list of hosts"):
            named_hosts(["mpirun", "--hostfile", str(tmp_path / "hosts"), *TRAIN])
    (tmp_path / "hosts").write_bytes(b"node1 slots=2\n\xff\xfe\n")
    with pytest.raises(ConfigError, match="can be no host"):
        named_hosts(["mpirun", "--hostfile", str(tmp_path / "hosts"), *TRAIN])
    with pytest.raises(ConfigError, match="is no list of hosts"):
        named_hosts(["mpirun", "--hostfile", "/dev/zero", *TRAIN])


@pytest.mark.parametrize(
    "flags",
    [
        *(["--max-restarts", value] for value in ("-1", "many", "1e3", "9" * 30)),
        *([flag, value] for flag in ("--pause", "--patience") for value in ("-1", "nan", "inf", "soon", "1e30")),
        ["--ssh", " "],
    ],
    ids=lambda flags: "=".join(flags)[:30],
)
def test_hostile_values_of_flags_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*flags, "--", "true", "--run-dir", "x"])
    assert stop.value.code == 2
    assert f"argument {flags[0]}: invalid" in capsys.readouterr().err


@pytest.mark.parametrize("has_run", [False, True])
def test_a_command_that_does_nothing_is_told(tmp_path, capfd, has_run):
    if has_run:
        (tmp_path / "run").mkdir()
    assert main(["--", "true", "--run-dir", str(tmp_path / "run")]) == 0
    said = f"supervise: the command returned 0, and there is no run in {tmp_path / 'run'}\n"
    assert capfd.readouterr().err == ("" if has_run else said)
