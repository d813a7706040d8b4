"""Worker processes: the same batches at any number of them, and one that dies or hangs is named."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from patience import wait_for
from users_data import Augmented, Bad, Locked, Pair

from hvdtrain.data.loader import Loader, Reading
from hvdtrain.data.order import SampleOrder
from hvdtrain.data.users import MapSamples
from hvdtrain.errors import DataError, WorkerError
from hvdtrain.settings import BatchPlan


def order_of(num_samples, size=1):
    return SampleOrder(num_samples, BatchPlan(8, 2, 4 // size, size), 0)


def read(workers, size=1, steps=range(6)):
    """Return all batches of some steps, those of all ranks together, and the processes that read them."""
    seen, processes = {}, set()
    for rank in range(size):
        data = MapSamples(Augmented())
        order = order_of(21, size)
        with Loader(data, order, rank, reading=Reading(workers)) as loader:
            for step in steps:
                for place, samples in enumerate(item.samples for item in order.requests(step, rank)):
                    batch = loader.read(step, place)
                    assert type(batch["more"]) is Pair
                    assert batch["more"].label.tolist() == samples.tolist()
                    assert batch["more"].image.shape == (len(samples), 2, 3)
                    assert batch["name"] == [f"sample {i}" for i in samples]
                    processes |= set(batch["process"].tolist())
                    for sample, drawn in zip(samples.tolist(), batch["drawn"].tolist(), strict=True):
                        seen[step, sample] = tuple(drawn)
    return seen, processes


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_batches_are_the_same_at_any_number_of_workers_and_ranks():
    plain, own = read(0)
    assert own == {os.getpid()}
    assert len(plain) == len(set(plain.values())) == 42  # two epochs of 21 samples
    seen, processes = read(3)
    assert seen == plain
    assert len(processes) == 3
    assert not own & processes
    assert not any(map(is_running, processes))
    later = {place: drawn for place, drawn in plain.items() if place[0] >= 4}
    assert read(1, size=2, steps=range(4, 6))[0] == later  # as after a resume on more ranks


def loader_of(kind, workers=1, patience_s=60.0):
    """Return a loader that reads 0, 1, 2, ... in batches of 2."""

    class InOrder(SampleOrder):
        def global_batch(self, step):
            return torch.arange(8 * step, min(8 * step + 8, 16))

    order = InOrder(16, BatchPlan(8, 2, 4, 1), 0)
    return Loader(MapSamples(Bad(kind)), order, 0, reading=Reading(workers, patience_s=patience_s))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_comes_where_the_batch_is_needed(workers):
    with loader_of("raise", workers) as loader:
        assert loader.read(0, 0).tolist() == [0, 1]
        assert loader.read(0, 1).tolist() == [2, 3]
        with pytest.raises(ValueError, match="sample 5 is broken") as caught:
            loader.read(0, 2)
        if workers:
            assert "users_data.py" in str(caught.value.__cause__)  # where it was raised
        assert loader.read(0, 3).tolist() == [6, 7]


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("odd", r"reading has failed in a data worker: users_data\.OddError"),
        ("kill", r"data worker 0 of rank 0 \(process \d+\) was killed by SIGKILL.* while it read the samples 4, 5"),
        ("exit", r"data worker 0 of rank 0 \(process \d+\) has ended by itself with exit code 3 while .* samples 4, 5"),
    ],
)
def test_a_worker_that_fails_is_named(kind, says):
    with loader_of(kind) as loader:
        loader.read(0, 0)
        loader.read(0, 1)
        with pytest.raises(WorkerError, match=says):
            loader.read(0, 2)


def test_a_worker_that_hangs_is_named_and_shows_where_it_is(capfd):
    with loader_of("hang") as patient:
        patient.read(0, 0)
        patient.read(0, 1)  # it has started, and hangs next
        patient._reader._workers[0]._patience_s = 1.0
        with pytest.raises(WorkerError, match=r"data worker 0 of rank 0 \(process \d+\) hangs: .* the samples 4, 5"):
            patient.read(0, 2)
        process = patient._reader._workers[0]._process
    assert process.returncode == -signal.SIGKILL
    assert "users_data.py" in capfd.readouterr().err


def test_data_that_cannot_be_pickled_is_refused():
    with pytest.raises(DataError, match=r"--data.workers needs data that can be pickled, and MapSamples cannot"):
        Loader(MapSamples(Locked()), order_of(21), 0, reading=Reading(1)).read(0, 0)


def test_signals_to_the_job_leave_workers_alone_and_they_end_with_their_rank(tmp_path):
    """A script without `if __name__` guard for its classes; its rank is killed without a chance to say anything."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys, time
            from hvdtrain.data.loader import Loader, Reading
            from hvdtrain.data.order import SampleOrder
            from hvdtrain.data.users import MapSamples
            from hvdtrain.settings import BatchPlan

            class Mine:
                def __len__(self):
                    return 8
                def __getitem__(self, i):
                    return os.getpid(), os.environ.get("OMPI_COMM_WORLD_RANK", "none")

            if __name__ == "__main__":
                loader = Loader(MapSamples(Mine()), SampleOrder(8, BatchPlan(2, 2, 1, 1), 0), 0, reading=Reading(1))
                processes, ranks = loader.read(0, 0)
                print(int(processes[0]), ranks[0], flush=True)
                os.kill(int(processes[0]), 15)
                os.kill(int(processes[0]), 2)
                loader.read(1, 0), loader.read(2, 0), loader.read(3, 0), loader.read(4, 0)
                print("alive", flush=True)
                time.sleep(60)
            """
        )
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMPI_COMM_WORLD_RANK": "0"}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as rank:
        process, launched = rank.stdout.readline().split()
        assert launched == "none"
        assert rank.stdout.readline() == "alive\n"
        assert is_running(int(process))
        rank.kill()
    wait_for(lambda: not is_running(int(process)))


def test_a_loop_of_ones_own_without_guard_is_told_what_to_write(tmp_path):
    """The worker of a DataLoader runs the program again: it must not become a rank."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import hvdtrain
            from torch.utils.data import DataLoader

            world = hvdtrain.init()
            loader = DataLoader(range(8), num_workers=1, sampler=world.sampler(8), multiprocessing_context="spawn")
            next(iter(loader))
            """
        )
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 1
    assert "such as a DataLoader's worker, runs this program" in done.stderr
    assert 'write what begins training under `if __name__ == "__main__":`' in done.stderr


def test_a_script_without_guard_is_told_what_to_write(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import hvdtrain
            from hvdtrain.data.loader import Loader, Reading
            from hvdtrain.data.order import SampleOrder
            from hvdtrain.data.users import MapSamples
            from hvdtrain.settings import BatchPlan

            class Mine(list):
                pass

            world = hvdtrain.init()
            loader = Loader(MapSamples(Mine(range(8))), SampleOrder(8, BatchPlan(2, 2, 1, 1), 0), 0, reading=Reading(1))
            loader.read(0, 0)
            """
        )
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "hvdtrain.errors.LaunchError: data worker 0 of rank 0 runs this program to find its data set: write what begins"
        ' training under `if __name__ == "__main__":`'
    )
