"""`HorovodWorld`: the ranks of a Horovod job. This module and its siblings alone import horovod.

Each collective has an explicit name: Horovod names unnamed ones by a counter that each rank keeps on its own, and a
rank that is one call ahead hangs the job.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError
from horovod.torch.mpi_ops import mpi_lib
from torch import Tensor, nn

from hvdtrain.errors import ConfigError, DivergedError, LaunchError, one_line
from hvdtrain.install.clone import setup_command
from hvdtrain.process.launch import Launch
from hvdtrain.process.progress import Progress
from hvdtrain.process.stray import stray_hint
from hvdtrain.world.averaging import Averaging
from hvdtrain.world.carriers import ReduceOp
from hvdtrain.world.collectives import added_in_order
from hvdtrain.world.scattering import dumped, loaded, on_own_gpu, scattered, without_gpus
from hvdtrain.world.streams import keep_for_stream
from hvdtrain.world.world import World

T = TypeVar("T")
_KNOWS_BFLOAT16 = hasattr(mpi_lib, "horovod_torch_allreduce_async_torch_BFloat16Tensor")
# A thread that is so much nicer has a tenth of a core that another one wants (Linux, sched(7)).
_NICER = 10
_CYCLE, _NAP_MS = "HOROVOD_CYCLE_TIME", 100
_OPS = {"sum": hvd.Sum, "mean": hvd.Average, "min": hvd.Min, "max": hvd.Max, "adasum": hvd.Adasum}


class HorovodWorld(World):
    """The ranks of a Horovod job, over MPI, Gloo or NCCL. Make one with `hvdtrain.init()`."""

    def __init__(self, launch: Launch, groups: Mapping[tuple[int, ...], Any], threads: Collection[int] = ()) -> None:
        self.launch = launch
        self._groups, self._threads = groups, threads
        self.rank, self.size = hvd.rank(), hvd.size()
        self.local_rank, self.local_size = hvd.local_rank(), hvd.local_size()
        self.device = torch.device("cpu")
        self.progress = Progress()

    @property
    def adds_bfloat16(self) -> bool:  # type: ignore[override]
        """Return whether Horovod has the edits that bring it, and the tensors are MPI's or Gloo's; NCCL's are not."""
        return _KNOWS_BFLOAT16 and self.device.type == "cpu"

    def give_way(self) -> None:
        """Lower the priority of the threads that Horovod has started: a process may, and may not take it back."""
        for thread in self._threads:
            with contextlib.suppress(OSError):  # it has ended, or this is not Linux
                os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, 0) + _NICER)

    def check_averaging(self, averaging: Averaging) -> None:
        """Refuse Adasum where Horovod's cannot be had: under Gloo it hangs after an error."""
        if averaging.op != "adasum":
            return
        if not hvd.mpi_built() or not hvd.mpi_enabled():
            raise ConfigError(
                "--comm.op adasum needs MPI: Horovod's Gloo cannot do it. Start with mpirun or horovodrun --mpi, or use"
                " --comm.op average"
            )
        if self.size & (self.size - 1):
            raise ConfigError(
                f"--comm.op adasum needs 2, 4, 8, ... ranks, not {self.size}: start as many, or use --comm.op average"
            )

    def optimizer_type(
        self, inner: type[torch.optim.Optimizer], averaging: Averaging
    ) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """Return the class that `hvd.DistributedOptimizer` makes, and what it sets.

        Horovod makes it for a stand-in: given the user's optimizer, it would build that anew from its parameters alone,
        without its defaults and state, and hang hooks of its own on the parameters.
        """
        parameter = nn.Parameter(torch.zeros(1))
        stand_in = torch.optim.SGD([parameter])
        with torch.enable_grad():  # Horovod looks for what has computed a copy, which there is not under no_grad
            made = hvd.DistributedOptimizer(
                stand_in,
                named_parameters=[("stand-in", parameter)],
                backward_passes_per_step=averaging.accum_steps,
                op=hvd.Sum,
            )
        left_out = ("__dict__", "__weakref__", "step")
        methods = {name: value for name, value in vars(type(made)).items() if name not in left_out}
        attributes = {name: value for name, value in vars(made).items() if name not in vars(stand_in)}
        attributes.update(_parameter_names={}, _allreduce_delay={}, _requires_update=set(), _grad_accs=[])
        return type(inner.__name__, (inner,), methods), attributes

    def start_all_reduce_(self, tensor: Tensor, op: ReduceOp | Literal["adasum"], name: str) -> Callable[[], Tensor]:
        """Reduce in the background, in the tensor's own type."""
        self.hand(tensor, name)
        return self._waiting(hvd.allreduce_async_(tensor, op=_OPS[op], name=name), name)

    def start_all_gather(self, tensor: Tensor, name: str) -> Callable[[], Tensor]:
        """Gather in the background."""
        self.hand(tensor, name)
        return self._waiting(hvd.allgather_async(tensor, name=name), name)

    def start_all_to_all(self, tensor: Tensor, name: str) -> Callable[[], Tensor]:
        """Exchange in the background."""
        self.hand(tensor, name)
        wait = self._waiting(hvd.alltoall_async(tensor, name=name), name)
        return lambda: cast(Any, wait())[0]  # Horovod also returns how much came from each rank

    def start_reduce_scatter(self, tensor: Tensor, lengths: Sequence[int], name: str) -> Callable[[], Tensor]:
        """Send the parts as they are, of unequal lengths.

        Not by `hvd.reducescatter`: under Gloo that takes four times as long as an all-reduce, and under MPI as long.
        """
        self.hand(tensor, name)
        splits = torch.tensor(lengths, dtype=torch.int32)
        wait = self._waiting(hvd.alltoall_async(tensor, splits=splits, name=name), name)
        return lambda: added_in_order(cast(Any, wait())[0].view(self.size, lengths[self.rank]))

    def start_broadcast_(self, tensor: Tensor, name: str, root: int = 0) -> Callable[[], Tensor]:
        """Broadcast in the background."""
        self.hand(tensor, name)
        return self._waiting(hvd.broadcast_async_(tensor, root_rank=root, name=name), name)

    def _waiting(self, handle: Any, name: str) -> Callable[[], Tensor]:
        return _Waiting(self.progress, handle, name)

    def all_reduce_among(self, ranks: tuple[int, ...], tensor: Tensor, name: str, op: ReduceOp = "sum") -> Tensor:
        """Reduce in one of Horovod's process sets."""
        more = {} if len(ranks) == self.size else {"process_set": self._groups[ranks]}
        self.hand(tensor, name)
        try:
            with self.progress.during("communication"):
                return cast(Tensor, hvd.allreduce(tensor, op=_OPS[op], name=name, **more))
        except HorovodInternalError as error:
            _raise_in_words(error, name)
            raise

    def broadcast_pickled(self, value: Any, name: str, root: int) -> Any:
        """Send the structure pickled and each tensor in it as a tensor, without copies of it in the pickle."""
        tensors: list[Tensor] = []
        pickled = dumped(value, tensors) if self.rank == root else b""
        shapes = [(tensor.shape, tensor.dtype, tensor.device.type) for tensor in tensors]
        message = (pickled, shapes) if self.rank == root else None
        with self.progress.during("communication"):
            pickled, shapes = cast(Any, hvd.broadcast_object(message, root_rank=root, name=name))
        if self.rank != root:
            tensors = [
                torch.empty(shape, dtype=dtype, device=self.device if kind == "cuda" else "cpu")
                for shape, dtype, kind in shapes
            ]
        self.broadcast_tensors({str(i): tensor for i, tensor in enumerate(tensors)}, name, root)
        return value if self.rank == root else loaded(pickled, tensors)

    def all_gather_pickled(self, value: T, name: str) -> list[T]:
        """Gather pickles; meant for small values. What was on a rank's GPU is on this one's then."""
        own = without_gpus(value) if self.device.type == "cuda" else value
        with self.progress.during("communication"):
            found = hvd.allgather_object(own, name=name)
        return [on_own_gpu(item, self.device) for item in found]

    def scatter_pickled(self, values: Sequence[Any] | None, name: str) -> Any:
        """Send each rank its own alone."""
        return scattered(self, values, name, self._scatter)

    def _scatter(self, parts: Tensor, lengths: Sequence[int], name: str) -> Tensor:
        """Return what rank 0 has for this rank in its flat `parts`, rank 0's own first; others give an empty one."""
        self.hand(parts, name)
        splits = torch.tensor(lengths if self.rank == 0 else [0] * self.size, dtype=torch.int32)
        wait = self._waiting(hvd.alltoall_async(parts, splits=splits, name=name), name)
        return cast(Tensor, cast(Any, wait())[0])

    def answer_with_zeros(self, gpu: int | None = None) -> int:
        """Call Horovod's `join`. Zeros on another device than the others' tensors go by another library: all hang."""
        with self.progress.during("communication"):
            return int(hvd.join(-1 if gpu is None else gpu))

    def has_lost_contact(self, error: BaseException) -> bool:
        """Return whether it is Horovod's word for a rank that has gone."""
        return isinstance(error, HorovodInternalError)

    def close(self) -> None:
        """Shut Horovod down."""
        hvd.shutdown()


def start(launch: Launch, groups: Sequence[tuple[int, ...]] = ()) -> HorovodWorld:
    """Start Horovod and hold its world against the launcher's. Collective.

    `groups` of ranks, smaller than the world, can then reduce among themselves.

    Raises:
        LaunchError: Horovod sees another number of ranks than the launcher started: each would train alone.
    """
    sets = {ranks: hvd.ProcessSet(list(ranks)) for ranks in groups}
    before = _threads()
    with _long_naps(is_wanted=not sets):
        hvd.init(process_sets=list(sets.values()))
    if hvd.size() != launch.size:
        hint = stray_hint(launch)
        raise LaunchError(
            f"{launch.launcher} started {launch.size} ranks, but Horovod sees {hvd.size()}"
            f"{hint + '; if one has, ' if hint else ': '}it was built for another MPI, or HOROVOD_CONTROLLER is set for"
            f" another launcher. Run {setup_command()} with this MPI's mpicc and mpirun first on PATH, and unset"
            " HOROVOD_CONTROLLER"
        )
    return HorovodWorld(launch, sets, _threads() - before)


def _threads() -> set[int]:
    """Return the numbers of this process's threads, as Linux has them."""
    with contextlib.suppress(OSError):
        return {int(path.name) for path in Path("/proc/self/task").iterdir()}
    return set()


@contextlib.contextmanager
def _long_naps(*, is_wanted: bool) -> Iterator[None]:
    """Have the engine that Horovod starts within, if it is one that wakes for work, seldom look for it when idle.

    What is enqueued wakes it. But a look that has begun is a negotiation with all ranks, whose end what is enqueued
    meanwhile waits for: on a slow network an engine that looks every 10 ms is always in one. What the user has set is
    left alone, and so is an engine that does not wake, or asks in other ways.
    """
    others = ("HOROVOD_CACHE_CAPACITY", "HOROVOD_DYNAMIC_PROCESS_SETS", _CYCLE)
    is_set = is_wanted and _KNOWS_BFLOAT16 and not any(name in os.environ for name in others)
    if is_set:
        os.environ[_CYCLE] = str(_NAP_MS)
    try:
        yield
    finally:
        if is_set:
            del os.environ[_CYCLE]


def _raise_in_words(error: HorovodInternalError, name: str) -> None:
    """Raise DivergedError where Horovod tells all ranks that they gave different tensors; its words name none."""
    if "ismatched" in str(error):
        raise DivergedError(
            f"'{name}' is not the same on all ranks ({one_line(error)}): freeze, unfreeze and add the same layers on"
            " all ranks at the same step, and give collectives tensors of one shape and type"
        ) from error


class _Waiting:
    """What waits for a collective when it is called; `is_done` tells, without waiting, whether it need not."""

    def __init__(self, progress: Progress, handle: Any, name: str) -> None:
        self._progress, self._handle, self._name = progress, handle, name

    def __call__(self) -> Tensor:
        try:
            with self._progress.during("communication"):
                result = hvd.synchronize(self._handle)
        except HorovodInternalError as error:
            _raise_in_words(error, self._name)
            raise
        keep_for_stream(result)
        return cast(Tensor, result)

    def is_done(self) -> bool:
        """Any thread may ask."""
        try:
            return bool(hvd.poll(self._handle))
        except (ValueError, RuntimeError):  # its result was fetched meanwhile
            return True
