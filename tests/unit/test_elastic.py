"""Which hosts a supervised run has: how they are listed, how ranks are placed on them, and when that changes."""

import json
import os
import re
import time

import pytest
from patience import wait_for

from hvdtrain.errors import ConfigError
from hvdtrain.process.aside import Aside, accused_hosts, sizes_of_logs
from hvdtrain.process.batch_size import asked_batch, saved_batch
from hvdtrain.process.discovery import HostsFile, HostsScript, NoListError, PbsHosts, SlurmHosts, hosts_in
from hvdtrain.process.lookout import Lookout
from hvdtrain.process.members import Members, Rules
from hvdtrain.process.placement import Batch, Placement, place, placed, training_words
from hvdtrain.process.progress import Place
from hvdtrain.process.run_files import holder_of, lacks_its_end
from hvdtrain.process.supervise import main
from hvdtrain.rundir.lock import claim
from hvdtrain.world.verdict import Report, judge

TRAIN = ["python", "-m", "hvdtrain", "train", "lm", "--run-dir", "runs/mine"]


def program(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return [str(path)]


def is_never():
    return False


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a:2\nb:3\n", {"a": 2, "b": 3}),
        ("# ours\n a \n\nb slots = 4 max-slots=9  # big\n", {"a": 7, "b": 4}),
        ("a:2\nb:0\n", {"a": 2}),
        ("a:2\na:2\nb:1\na:3\n", {"a": 3, "b": 1}),  # one host, whose last number holds
        ("[fe80::1]:2\n10.0.0.7:1\n", {"[fe80::1]": 2, "10.0.0.7": 1}),
    ],
)
def test_hosts_are_listed_as_horovod_lists_them(text, hosts):
    assert hosts_in(text, 7, "it") == hosts


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "lists no host"),
        ("# nothing\n\n", "lists no host"),
        ("a:0\n", "lists no host with slots"),
        ("a:2\nTraceback (most recent call last):\n", "'Traceback (most recent call last):' in line 2"),
        ("a:-1\n", "'a:-1' in line 1"),
        ("a:two\n", "'a:two' in line 1"),
        ("a:99999999\n", "no host:slots"),
        ("a slots=many\n", "no host:slots"),
        ("-oProxyCommand=x:1\n", "can be no host"),
        ("<html>\n", "can be no host"),
        ("\x00\n", "can be no host"),
    ],
)
def test_a_list_with_a_line_that_is_none_is_not_trusted(text, says):
    with pytest.raises(NoListError) as error:
        hosts_in(text, 1, "it")
    assert says in str(error.value)
    assert not error.value.is_lasting


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("echo a:1; echo no luck >&2; exit 3", "failed with exit code 3: no luck"),
        ("sleep 60", "did not end within 0.3 s"),
        ("sleep 60 & sleep 60", "did not end within 0.3 s"),
        ("yes a:1", "prints more than 1 MiB"),
        ("kill -9 $$", "failed with exit code -9"),
    ],
)
def test_a_script_that_fails_hangs_or_floods_is_one_sentence(tmp_path, body, says):
    began = time.monotonic()
    timeout = 0.3 if "sleep" in body else 60.0
    with pytest.raises(NoListError) as error:
        HostsScript(program(tmp_path / "hosts", body), timeout_s=timeout).look()
    assert says in str(error.value)
    assert time.monotonic() - began < 50


def test_a_script_whose_child_goes_on_is_read_all_the_same(tmp_path):
    assert HostsScript(program(tmp_path / "hosts", "echo a:1; sleep 3 &")).look() == {"a": 1}


def test_what_cannot_be_started_or_read_is_lasting(tmp_path):
    (tmp_path / "no program").write_text("a:1")
    for source in (HostsScript([str(tmp_path / "none")]), HostsScript([str(tmp_path / "no program")])):
        with pytest.raises(NoListError, match="cannot be started") as error:
            source.look()
        assert error.value.is_lasting
    with pytest.raises(NoListError, match="cannot be read") as error:
        HostsFile(tmp_path / "none").look()
    assert error.value.is_lasting


def test_a_file_is_read_again(tmp_path):
    source = HostsFile(tmp_path / "hosts", slots=2)
    source.path.write_text("a\n")
    assert source.look() == {"a": 2}
    source.path.write_text("a\nb:1\n")
    assert source.look() == {"a": 2, "b": 1}


def test_pbs_names_a_host_once_for_each_slot(tmp_path):
    (tmp_path / "nodes").write_text("b\na\nb\n")
    assert PbsHosts(tmp_path / "nodes").look() == {"b": 2, "a": 1}


def test_slurm_says_which_nodes_can_be_used(tmp_path, monkeypatch):
    """Stand-ins for its three programs, which print what Slurm 22.05's do."""
    program(tmp_path / "scontrol", "for n in 1 2 3; do echo node$n; done")
    program(tmp_path / "squeue", "echo 'node[1-3]'")
    program(tmp_path / "sinfo", "echo 'node1 mixed'; echo 'node2 down*'; echo 'node3 draining'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert SlurmHosts("7", "node[1-3]", "2(x2),1").look() == {"node1": 2, "node3": 1}


@pytest.mark.parametrize(
    ("slots", "most", "asked", "batch", "hosts"),
    [
        ({"a": 2, "b": 2}, None, None, Batch(), {"a": 2, "b": 2}),
        ({"a": 2, "b": 2}, 3, None, Batch(), {"a": 2, "b": 1}),
        ({"a": 1, "b": 1, "c": 1}, None, None, Batch(32), {"a": 1, "b": 1}),  # 32 divides among 2, not among 3
        ({"a": 1, "b": 1, "c": 1}, None, None, Batch(24, 4), {"a": 1, "b": 1, "c": 1}),
        ({"a": 1, "b": 1, "c": 1}, None, None, Batch(24, 12), {"a": 1, "b": 1}),
        ({"a": 4}, 3, 3, Batch(32), {"a": 3}),  # as the command asks: the ranks will say why it cannot be
    ],
)
def test_as_many_ranks_as_the_batch_lets_be_used(slots, most, asked, batch, hosts):
    assert place(slots, most, asked, lambda: batch).hosts == hosts


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["srun", "-N{num_hosts}", "-n", "{ranks}", "-w", "{host_names}"], ["srun", "-N2", "-n", "3", "-w", "a,b"]),
        (["mpirun", "-np", "{ranks}", "-H", "{hosts}"], ["mpirun", "-np", "3", "-H", "a:2,b:1"]),
        (["mpirun", "--bind-to", "none"], ["mpirun", "-H", "a:2,b:1", "-np", "3", "--bind-to", "none"]),
        (["/opt/bin/mpirun", "-n", "9"], ["/opt/bin/mpirun", "-H", "a:2,b:1", "-n", "3"]),
        (["horovodrun", "-np=9", "--hostfile=f"], ["horovodrun", "-np=3", "-H", "a:2,b:1"]),
    ],
)
def test_ranks_and_hosts_are_filled_in(command, expected):
    assert placed([*command, *TRAIN], Placement({"a": 2, "b": 1}, 3)) == [*expected, *TRAIN]


def test_a_command_without_a_launcher_gets_one(monkeypatch, tmp_path):
    program(tmp_path / "horovodrun", "")
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    expected = [str(tmp_path / "horovodrun"), "-np", "2", "-H", "a:2", *TRAIN]
    assert placed(TRAIN, Placement({"a": 2}, 2)) == expected
    with pytest.raises(ConfigError, match=re.escape("where do the ranks and hosts belong in 'sh my-launcher ...'")):
        placed(["sh", "my-launcher"], Placement({"a": 2}, 2))


def test_training_is_found_behind_a_launcher():
    assert training_words(["mpirun", "-wdir", "/x/hvdtrain", *TRAIN]) == TRAIN
    assert training_words(["mpirun", "-np", "2", "/bin/hvdtrain", "train"]) == ["/bin/hvdtrain", "train"]
    assert training_words(["mpirun", "true"]) == []


class TestBatch:
    def test_is_the_saved_one(self, tmp_path):
        folder = tmp_path / "checkpoints" / "step-00000010"
        folder.mkdir(parents=True)
        (tmp_path / "checkpoints" / "latest").write_text("step-00000010\n")
        (folder / "manifest.json").write_text(json.dumps({"global_batch_size": 24}))
        assert saved_batch(tmp_path) == Batch(24)
        (folder / "manifest.json").write_text("[[[")
        assert saved_batch(tmp_path) is None
        assert asked_batch(["mpirun", "true", "--train.global-batch-size", "7"]) == Batch(7)

    def test_is_asked_of_the_command(self, tmp_path):
        """A stand-in that prints a configuration, as `--print-config` does."""
        python = tmp_path / "python"
        table = "[data]\\nglobal_batch_size = 1\\n[train]\\nglobal_batch_size = 24\\nmicro_batch_size = 4\\n"
        program(python, f"printf '{table}'")
        assert asked_batch(["mpirun", str(python), "-m", "hvdtrain"]) == Batch(24, 4)
        program(python, "printf '[train]\\nglobal_batch_size = \"none\"\\nmicro_batch_size = 4\\n'")
        with pytest.raises(ConfigError, match=re.escape("--train.micro-batch-size 4 alone")):
            asked_batch([str(python), "-m", "hvdtrain"])
        program(python, "printf '[train]\\nglobal_batch_size = 8\\nmicro_batch_size = 4\\naccum_steps = 2\\n'")
        with pytest.raises(ConfigError, match=re.escape("leave --train.accum-steps out")):
            asked_batch([str(python), "-m", "hvdtrain"])


def test_hosts_that_fail_repeatedly_are_put_aside_for_longer_and_longer():
    now = [0.0]
    aside = Aside(300.0, clock=lambda: now[0])
    assert aside.blame("a") == 0.0
    assert aside.blame("b", is_new=True) == 300.0
    assert aside.blame("a") == 300.0
    assert aside.hosts() == {"a", "b"}
    now[0] = 301.0
    assert aside.hosts() == set()
    assert aside.blame("a") == 600.0
    now[0] = 301.0 + 3600
    assert aside.blame("a") == 0.0  # it was long ago
    assert Aside(0.0).blame("a", is_new=True) == 0.0


def test_the_ranks_logs_say_whose_host_was_lost(tmp_path):
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "rank-000.log"
    log.write_text("hvdtrain: rank 1 on old.example is gone, killed or crashed: it was last seen at step 4\n")
    sizes = sizes_of_logs(tmp_path)
    assert accused_hosts(tmp_path, sizes, ["old"]) == set()
    silent = judge([Report("rank 1 on node2.example", Place("step", 3, 1.0), 99.0)], None, 5.0)
    with log.open("a") as file:
        file.write(f"hvdtrain: {silent}\nat step 3; the stacks of all threads:\n")
    assert accused_hosts(tmp_path, sizes, ["node1", "node2", "old"]) == {"node2"}


def test_who_holds_a_run_directory_is_known(tmp_path):
    assert holder_of(tmp_path) == ""
    held = claim(tmp_path / "run")
    child = os.fork()
    if child == 0:  # a POSIX lock keeps other processes out, not its own
        os._exit(0 if holder_of(tmp_path / "run") == f"process {os.getppid()} on {os.uname().nodename}" else 1)
    assert os.waitpid(child, 0)[1] == 0
    held.release()
    assert holder_of(tmp_path / "run") == ""


@pytest.mark.parametrize("end", ['["event"]', '"event"', "[" * 100_000 + '"event"', '{"event": 3}', '{"event": "x"}'])
def test_a_last_line_of_any_kind_is_read(tmp_path, end):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + end + "\n")
    assert lacks_its_end(tmp_path) is not end.startswith("[[")


def test_what_is_no_file_is_not_waited_for(tmp_path):
    for name in ("metrics.jsonl", "lock"):
        os.mkfifo(tmp_path / name)
    assert lacks_its_end(tmp_path) is False
    assert holder_of(tmp_path) == ""
    assert sizes_of_logs(tmp_path / ("x" * 300)) == {}


class Job:
    """Members of a job whose hosts are a file, and which a stand-in for ssh finds in a folder."""

    def __init__(self, folder, listed, **rules):
        self.folder, self.file, self.up, self.said = folder, folder / "hosts", folder / "up", []
        self.up.mkdir()
        ssh = program(folder / "ssh", f"for host; do :; done; shift $(($# - 2)); test -e {self.up}/$1")
        (folder / "checkpoints").mkdir()
        self.list(listed)
        self.lookout = Lookout(HostsFile(self.file), ssh, 0.1)
        python = program(folder / "python", r"printf '[train]\nglobal_batch_size = 12\n'")
        command = ["mpirun", *python, "-m", "hvdtrain"]
        self.members = Members(command, folder, self.lookout, Rules(**rules), self.said.append)

    def list(self, text, up=None):
        for line in text.split() if up is None else up:
            (self.up / line.partition(":")[0]).touch()
        new = self.file.with_suffix(".new")
        new.write_text(text)
        new.replace(self.file)  # in one step, and after they are up: the lookout looks at any time

    def save(self, step):
        (self.folder / "checkpoints" / "latest").write_text(str(step))

    def place(self):
        return dict(self.members.place_next(is_never).hosts)

    def check_words(self):
        """Fail where a noun or a verb does not fit the number of what it is said of."""
        for line in self.said:
            assert not re.search(r"\b1 [a-z]+s\b", line), line
            assert not re.search(r"\b[a-z], [a-z] (is|was|has|does)\b", line), line
            assert not re.search(r"(?<!, )\b[a-z] (are|were|have|do)\b", line), line

    def change(self):
        """Return the change that is wanted, once one is."""
        change = wait_for(self.members.change)
        self.said.append(change.reason)
        return change

    def is_left_alone(self):
        """Return whether no change is wanted by what two looks find that begin now."""
        return all(self.lookout.fresh(is_never) and self.members.change() is None for _ in range(2))

    def until_said(self, text):
        def is_said():
            assert self.members.change() is None
            return any(text in line for line in self.said)

        wait_for(is_said, what=lambda: self.said)


@pytest.fixture
def job(tmp_path):
    jobs = []

    def job(listed, **rules):
        jobs.append(Job(tmp_path, listed, **rules))
        jobs[-1].lookout.start()
        return jobs[-1]

    yield job
    for one in jobs:
        one.lookout.close()
        one.check_words()


class TestMembers:
    @pytest.mark.parametrize(
        ("rules", "says"),
        [
            (
                {"min_ranks": 5, "max_ranks": 5},
                "--min-ranks 5 can never be had: the global batch of 12 samples",
            ),
            ({"min_ranks": 13}, "divides among 12 ranks at most. Ask for fewer"),
            ({"min_ranks": 2, "max_ranks": 1}, "the command has 1 rank at most. Ask for fewer"),
            ({"min_ranks": 8, "max_ranks": 11}, "divides among 6 ranks at most of up to 11. Ask for fewer"),
        ],
    )
    def test_what_no_hosts_could_fulfil_is_not_waited_for(self, job, rules, says):
        hosts = job("a:1\n", **rules)
        for listed in ("a:1\n", "a:20\n"):
            hosts.list(listed)
            hosts.lookout.fresh(is_never)
            with pytest.raises(ConfigError, match=re.escape(says)):
                hosts.place()

    def test_a_host_without_an_address_is_left_out(self, job):
        hosts = job("a:1 b:1".replace(" ", "\n"))
        hosts.list("a:1\nb:1\nnowhere:4\n", up=["a", "b"])
        assert hosts.place() == {"a": 1, "b": 1}
        assert "without nowhere, which cannot be reached" in hosts.said

    def test_a_new_host_is_taken_in_after_the_next_save(self, job):
        hosts = job("a:1\n")
        hosts.save(1)
        assert hosts.place() == {"a": 1}
        hosts.list("a:1\nb:1\n")
        hosts.until_said("b can be had: the run grows from 1 to 2 ranks at its next save")
        hosts.save(2)
        change = hosts.change()
        assert (change.is_saving, change.may_take_long) == (True, True)
        assert hosts.members.note_end(False, True, ())
        assert hosts.place() == {"a": 1, "b": 1}

    def test_a_new_host_that_goes_before_the_save_changes_nothing(self, job):
        hosts = job("a:1\n")
        assert hosts.place() == {"a": 1}
        hosts.list("a:1\nb:1\n")
        hosts.until_said("b can be had")
        hosts.list("a:1\n")
        assert hosts.is_left_alone()
        hosts.save(2)
        assert hosts.is_left_alone()

    def test_it_grows_on_request_alone_where_that_is_asked_for(self, job):
        hosts = job("a:1\n", grow="request")
        hosts.place()
        hosts.members.ask_to_grow()
        hosts.until_said("asked to grow, but there is nothing to grow to: 1 slot on a")
        hosts.list("a:1\nb:1\n")
        hosts.until_said("when SIGUSR2 asks for it")
        hosts.save(2)
        assert hosts.is_left_alone()
        hosts.members.ask_to_grow()
        assert "growing from 1 to 2" in hosts.change().reason

    def test_it_never_grows_where_that_is_asked_for(self, job):
        hosts = job("a:1\n", grow="never")
        hosts.place()
        hosts.list("a:1\nb:1\n")
        assert hosts.is_left_alone()
        hosts.save(2)
        assert hosts.is_left_alone()

    def test_a_host_that_comes_and_goes_is_put_aside(self, job):
        hosts = job("a:1\nb:1\n")
        for _ in range(2):
            hosts.list("a:1\nb:1\n")
            hosts.place()
            hosts.list("a:1\n")
            assert "b is not listed any more" in hosts.change().reason
            assert hosts.place() == {"a": 1}
        hosts.list("a:1\nb:1\n")
        assert "b has failed or left repeatedly: it is put aside for 300 s" in hosts.said
        assert hosts.place() == {"a": 1}
        hosts.save(3)
        assert hosts.is_left_alone()

    def test_hosts_that_leave_are_asked_to_save_if_they_answer(self, job):
        hosts = job("a:1\nb:1\nc:1\n")
        assert hosts.place() == {"a": 1, "b": 1, "c": 1}
        hosts.list("a:1\nb:1\n")
        change = hosts.change()
        assert (change.reason, change.is_saving) == ("c is not listed any more, and still answers", True)
        assert hosts.place() == {"a": 1, "b": 1}
        (hosts.up / "b").unlink()
        hosts.list("a:1\n")
        change = hosts.change()
        assert (change.reason, change.is_saving) == ("b is not listed any more, and does not answer", False)

    @pytest.mark.parametrize(
        ("listed", "gone", "reason"),
        [
            ("a:2\nb:1\n", "", "c, d are not listed any more, and still answer"),
            ("a:2\nb:1\n", "d", "c, d are not listed any more, and do not all answer"),
            ("a:1\nb:1\nc:1\nd:1\n", "", "a is listed with fewer slots, and still answers"),
            ("a:1\nb:1\nd:1\n", "", "c is not listed any more, a is listed with fewer slots, and still answer"),
        ],
    )
    def test_it_is_said_what_has_become_of_each_host(self, job, listed, gone, reason):
        """A host with fewer slots is listed all the same; several hosts take another verb than one."""
        hosts = job("a:2\nb:1\nc:1\nd:1\n", max_ranks=5)
        hosts.members._asked_batch = Batch()
        assert hosts.place() == {"a": 2, "b": 1, "c": 1, "d": 1}
        for host in gone:
            (hosts.up / host).unlink()
        hosts.list(listed, up=[])
        change = hosts.change()
        assert (change.reason, change.is_saving) == (reason, not gone)

    def test_a_host_that_has_fewer_slots_again_and_again_is_kept(self, job):
        """It is listed, and has not failed: to put it aside would take the slots that are left."""
        hosts = job("a:3\n")
        for slots in (3, 2, 1):
            hosts.list(f"a:{slots}\n")
            assert hosts.place() == {"a": slots}
            hosts.list(f"a:{slots - 1}\n" if slots > 1 else "a:1\n")
            if slots > 1:
                assert hosts.change().reason == "a is listed with fewer slots, and still answers"
        assert hosts.members._aside.hosts() == set()
        assert not any("put aside" in line for line in hosts.said)

    def test_several_silent_hosts_and_one_slot_are_words_that_fit(self, job):
        hosts = job("a:1\nb:1\nc:1\n", lost_after_s=0.6, min_ranks=1)
        hosts.place()
        for host in "bc":
            (hosts.up / host).unlink()
        assert hosts.change().reason == "b, c have not answered for 0.6 s"
        assert hosts.place() == {"a": 1}
        for host in "bc":
            hosts.members._put_aside(host, hosts.members._aside.blame(host))
            (hosts.up / host).touch()
        hosts.list("b:1\nc:1\n")
        assert hosts.place() == {"b": 1, "c": 1}
        assert "b, c were put aside, and are taken: there are no others" in hosts.said

    def test_a_host_that_is_silent_is_lost_after_a_while(self, job):
        hosts = job("a:1\nb:1\n", lost_after_s=0.6)
        hosts.place()
        (hosts.up / "b").unlink()
        change = hosts.change()
        assert time.monotonic() - hosts.lookout.latest.heard["b"] >= 0.6
        assert (change.reason, change.is_saving) == ("b has not answered for 0.6 s", False)
        assert hosts.place() == {"a": 1}

    def test_a_list_that_fails_changes_nothing_and_is_said_once(self, job):
        hosts = job("a:1\nb:1\n")
        hosts.place()
        hosts.list("Error: no\n", up=[])
        hosts.until_said("going on with what was listed last")
        assert hosts.is_left_alone()
        hosts.list("a:1\nb:1\n")
        hosts.until_said("lists hosts again")
        assert len([line for line in hosts.said if "no host:slots" in line]) == 1

    def test_it_waits_for_ranks_enough_and_can_be_stopped(self, job):
        hosts = job("a:1\n", min_ranks=2)
        asked = []

        def is_stopped():
            asked.append(1)
            if len(asked) == 3:
                hosts.list("a:1\nb:1\n")
            return False

        assert dict(hosts.members.place_next(is_stopped).hosts) == {"a": 1, "b": 1}
        assert any("1 slot on a: waiting for hosts of 2 ranks" in line for line in hosts.said)
        hosts.list("a:1\n")
        assert hosts.members.place_next(lambda: True) is None

    def test_it_gives_up_waiting_where_that_is_asked_for(self, job):
        hosts = job("a:1\n", min_ranks=2, longest_wait_s=0.2)
        with pytest.raises(TimeoutError, match=re.escape("1 slot on a; waited for 0.2 s: giving up")):
            hosts.members.place_next(is_never)

    def test_a_new_host_with_which_the_run_does_not_start_is_put_aside(self, job):
        hosts = job("a:1\n")
        hosts.place()
        hosts.members.note_end(False, True, ())
        hosts.list("a:1\nb:1\n")
        assert hosts.place() == {"a": 1, "b": 1}
        assert not hosts.members.note_end(True, False, ())
        assert "b has failed or left repeatedly: it is put aside for 300 s" in hosts.said
        assert hosts.place() == {"a": 1}

    def test_a_host_whose_ranks_are_lost_twice_is_put_aside_unless_there_is_no_other(self, job):
        hosts = job("a:1\nb:1\n")
        for _ in range(2):
            hosts.place()
            hosts.members.note_end(True, True, {"b"})
        assert hosts.place() == {"a": 1}
        hosts.list("b:1\n")
        assert hosts.place() == {"b": 1}
        assert "b was put aside, and is taken: there are no others" in hosts.said

    def test_a_host_that_is_lost_explains_the_end(self, job):
        hosts = job("a:1\nb:1\n")
        hosts.place()
        (hosts.up / "b").unlink()
        assert hosts.members.note_end(True, True, ())
        assert hosts.place() == {"a": 1}

    @pytest.mark.parametrize(("is_there", "looks_more"), [(False, 0), (True, 1)])
    def test_a_host_that_is_gone_is_not_asked_twice(self, tmp_path, is_there, looks_more):
        """The look that is under way when a run ends is believed where it misses a host, for which it takes seconds."""
        (tmp_path / "hosts").write_text("a:1\n")
        asked = tmp_path / "asked"
        ssh = program(tmp_path / "ssh", f"touch {asked}; sleep 2; {'true' if is_there else 'false'}")
        lookout = Lookout(HostsFile(tmp_path / "hosts"), ssh, 0.1)
        lookout.start()
        wait_for(asked.exists)
        under_way = lookout.latest.number + 1
        look = lookout.missing({"a"})
        lookout.close()
        assert look.number == under_way + looks_more
        assert ("a" in look.there) is is_there

    def test_ranks_follow_what_the_batch_lets_be_used(self, job):
        hosts = job("a:3\nb:2\n")
        assert hosts.place() == {"a": 3, "b": 1}
        assert "using 4 of 5 slots: the global batch does not divide among more" in hosts.said

    def test_a_source_that_never_was_ends_it(self, tmp_path):
        lookout = Lookout(HostsFile(tmp_path / "none"), ["true"], 0.1)
        lookout.start()
        with pytest.raises(ConfigError, match="cannot be read"):
            lookout.fresh(is_never)
        lookout.close()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--hosts-script", "a", "--hosts-file", "b"], "leave one of them out"),
        (["--min-ranks", "4", "--max-ranks", "2"], "nothing lists the hosts"),
        (["--hosts-file", "b", "--min-ranks", "4", "--max-ranks", "2"], "--max-ranks 2 is less than --min-ranks 4"),
        (["--hosts-script", "/no/such"], "/no/such cannot be started"),
        (["--hosts-file", "/no/such"], "/no/such cannot be read"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(flags, says, capsys, monkeypatch, tmp_path):
    for name in ("SLURM_JOB_ID", "PBS_NODEFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    assert main([*flags, "--", "mpirun", "true", "--run-dir", "x"]) == 2
    assert says in capsys.readouterr().err


def test_a_command_that_says_nowhere_where_ranks_belong_is_refused_before_hosts_are_waited_for(capsys, tmp_path):
    (tmp_path / "hosts").write_text("a:1\n")
    assert main(["--hosts-file", str(tmp_path / "hosts"), "--", "sh", "launch", "--run-dir", "x"]) == 2
    assert "where do the ranks and hosts belong" in capsys.readouterr().err


def test_a_quote_in_a_path_is_said(capsys):
    """A folder named rank 0's: it is read as a shell would read it."""
    with pytest.raises(SystemExit, match="2"):
        main(["--hosts-script", "/rank 0's/hosts.sh", "--", "mpirun", "true", "--run-dir", "x"])
    assert "a quote is not closed in" in capsys.readouterr().err
