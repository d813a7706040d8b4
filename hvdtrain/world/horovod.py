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

import cloudpickle
import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError
from horovod.torch.mpi_ops import mpi_lib
from torch import Tensor, nn

from hvdtrain.errors import ConfigError, LaunchError, UsageError, one_line
from hvdtrain.install.clone import setup_command
from hvdtrain.process.launch import Launch
from hvdtrain.process.progress import Progress
from hvdtrain.process.stray import stray_hint
from hvdtrain.world.averaging import Averaging
from hvdtrain.world.carriers import ReduceOp
from hvdtrain.world.collectives import added_in_order
from hvdtrain.world.handing_over import explained, hand_over, outside_of_inference_mode
from hvdtrain.world.scattering import dumped_or_why, loaded, on_own_gpu, scattered, without_gpus
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
        return self._start(lambda own: hvd.allreduce_async_(own, op=_OPS[op], name=name), tensor, name, in_place=True)

    def start_all_gather(self, tensor: Tensor, name: str) -> Callable[[], Tensor]:
        """Gather in the background."""
        return self._start(lambda own: hvd.allgather_async(own, name=name), tensor, name)

    def start_all_to_all(self, tensor: Tensor, name: str) -> Callable[[], Tensor]:
        """Exchange in the background."""
        wait = self._start(lambda own: hvd.alltoall_async(own, name=name), tensor, name)
        each = len(tensor) // self.size

        def received() -> Tensor:
            result, counts = cast(Any, wait())
            if (counts != each).any():  # Horovod sends what there is
                raise UsageError(
                    f"'{name}' has {counts.tolist()} rows for rank {self.rank} on ranks 0 to {self.size - 1}: give"
                    " tensors of the same shape on every rank"
                )
            return cast(Tensor, result)

        return received

    def start_reduce_scatter(self, tensor: Tensor, lengths: Sequence[int], name: str) -> Callable[[], Tensor]:
        """Send the parts as they are, of unequal lengths.

        Not by `hvd.reducescatter`: under Gloo that takes four times as long as an all-reduce, and under MPI as long.
        """
        splits = torch.tensor(lengths, dtype=torch.int32)
        wait = self._start(lambda own: hvd.alltoall_async(own, splits=splits, name=name), tensor, name)
        return lambda: added_in_order(cast(Any, wait())[0].view(self.size, lengths[self.rank]))

    def start_broadcast_(self, tensor: Tensor, name: str, root: int = 0) -> Callable[[], Tensor]:
        """Broadcast in the background."""
        return self._start(
            lambda own: hvd.broadcast_async_(own, root_rank=root, name=name), tensor, name, in_place=True
        )

    def _start(
        self, begin: Callable[[Tensor], Any], tensor: Tensor, name: str, in_place: bool = False
    ) -> Callable[[], Tensor]:
        """Hand a tensor over; returns what waits for the result."""
        self.hand(tensor, name)
        return hand_over(begin, tensor, name, self.progress, in_place)

    def all_reduce_among(self, ranks: tuple[int, ...], tensor: Tensor, name: str, op: ReduceOp = "sum") -> Tensor:
        """Reduce in one of Horovod's process sets."""
        more = {} if len(ranks) == self.size else {"process_set": self._groups[ranks]}
        self.hand(tensor, name)
        with self._in_turn(name):
            return cast(Tensor, hvd.allreduce(tensor, op=_OPS[op], name=name, **more))

    def broadcast_pickled(self, value: Any, name: str, root: int) -> Any:
        """Send the structure pickled and each tensor in it as a tensor, without copies of it in the pickle."""
        tensors: list[Tensor] = []
        pickled = dumped_or_why(value, tensors) if self.rank == root else b""
        shapes = [(tensor.shape, tensor.dtype, tensor.device.type) for tensor in tensors]
        message = (pickled, shapes) if self.rank == root else None
        with self._in_turn(name):
            pickled, shapes = cast(Any, hvd.broadcast_object(message, root_rank=root, name=name))
        if isinstance(pickled, str):
            raise UsageError(f"'{name}' cannot be sent by rank {root}, as it does not pickle: {pickled}")
        if self.rank != root:
            tensors = [
                torch.empty(shape, dtype=dtype, device=self.device if kind == "cuda" else "cpu")
                for shape, dtype, kind in shapes
            ]
        self.broadcast_tensors({str(i): tensor for i, tensor in enumerate(tensors)}, name, root)
        return value if self.rank == root else loaded(pickled, tensors)

    def all_gather_pickled(self, value: T, name: str) -> list[T]:
        """Gather pickles; meant for small values. What was on a rank's GPU is on this one's then."""
        try:
            own = without_gpus(value) if self.device.type == "cuda" else value
            pickled: bytes | str = cloudpickle.dumps(own)
        except Exception as error:  # objects have many ways to refuse
            pickled = one_line(error)
        with self._in_turn(name):
            everyone = cast("list[bytes | str]", hvd.allgather_object(pickled, name=name))
        for rank, theirs in enumerate(everyone):
            if isinstance(theirs, str):
                raise UsageError(f"'{name}' cannot be sent by rank {rank}, as it does not pickle: {theirs}")
        return [on_own_gpu(cloudpickle.loads(theirs), self.device) for theirs in everyone]

    def scatter_pickled(self, values: Sequence[Any] | None, name: str) -> Any:
        """Send each rank its own alone."""
        return scattered(self, values, name, self._scatter)

    def _scatter(self, parts: Tensor, lengths: Sequence[int], name: str) -> Tensor:
        """Return what rank 0 has for this rank in its flat `parts`, rank 0's own first; others give an empty one."""
        splits = torch.tensor(lengths if self.rank == 0 else [0] * self.size, dtype=torch.int32)
        wait = self._start(lambda own: hvd.alltoall_async(own, splits=splits, name=name), parts, name)
        return cast(Tensor, cast(Any, wait())[0])

    @contextlib.contextmanager
    def _in_turn(self, name: str) -> Iterator[None]:
        """Within, a function of Horovod's is called that waits for its result."""
        with self.progress.during("communication"), outside_of_inference_mode():
            try:
                yield
            except HorovodInternalError as error:
                raise explained(error, name) from error

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
