"""Horovod's own names for programs that were written for it, on hvdtrain's exchange, which closes its traps.

    import hvdtrain.compat.horovod as hvd          # was: import horovod.torch as hvd

What is different is in docs/own-loop.md and docs/design.md: clipping and loss scalers need no special calls, two runs
are equal bit by bit, layers may be frozen and unfrozen, a rank without a batch hangs nothing.
"""

from __future__ import annotations

import sys
from typing import Any

from hvdtrain.compat.grouped import (
    grouped_allgather,
    grouped_allgather_async,
    grouped_allreduce,
    grouped_allreduce_,
    grouped_allreduce_async,
    grouped_allreduce_async_,
    grouped_reducescatter,
    grouped_reducescatter_async,
)
from hvdtrain.compat.movement import (
    allgather,
    allgather_async,
    allgather_object,
    alltoall,
    alltoall_async,
    barrier,
    broadcast,
    broadcast_,
    broadcast_async,
    broadcast_async_,
    broadcast_object,
    join,
    reducescatter,
    reducescatter_async,
)
from hvdtrain.compat.optimizer import (
    DistributedOptimizer,
    SyncBatchNorm,
    broadcast_optimizer_state,
    broadcast_parameters,
)
from hvdtrain.compat.place import (
    ProcessSet,
    add_process_set,
    ccl_built,
    cross_rank,
    cross_size,
    cuda_built,
    ddl_built,
    global_process_set,
    gloo_built,
    gloo_enabled,
    init,
    is_initialized,
    local_rank,
    local_size,
    mpi_built,
    mpi_enabled,
    mpi_threads_supported,
    nccl_built,
    rank,
    remove_process_set,
    rocm_built,
    shutdown,
    size,
    start_timeline,
    stop_timeline,
    world,
)
from hvdtrain.compat.reductions import (
    Adasum,
    Average,
    Compression,
    Max,
    Min,
    Product,
    Sum,
    allreduce,
    allreduce_,
    allreduce_async,
    allreduce_async_,
    poll,
    sparse_allreduce_async,
    synchronize,
)

# Horovod's name -> why it is not here, and what is instead.
ELSEWHERE = {
    "elastic": (
        "Horovod's elastic driver is not used: begin from a checkpoint after a failure, by hvdtrain supervise and"
        " World.save and World.load in a loop of your own"
    ),
    "HorovodInternalError": (
        "what Horovod raises when another rank has gone belongs to its elastic driver: without it a rank can only end,"
        " and begin again from a checkpoint"
    ),
    "check_extension": "Horovod's own start-up has looked already",
}

__all__ = [
    "Adasum",
    "Average",
    "Compression",
    "DistributedOptimizer",
    "Max",
    "Min",
    "ProcessSet",
    "Product",
    "Sum",
    "SyncBatchNorm",
    "add_process_set",
    "allgather",
    "allgather_async",
    "allgather_object",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "alltoall",
    "alltoall_async",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "ccl_built",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "grouped_allgather",
    "grouped_allgather_async",
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
    "grouped_reducescatter",
    "grouped_reducescatter_async",
    "init",
    "is_initialized",
    "join",
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "poll",
    "rank",
    "reducescatter",
    "reducescatter_async",
    "remove_process_set",
    "rocm_built",
    "shutdown",
    "size",
    "sparse_allreduce_async",
    "start_timeline",
    "stop_timeline",
    "synchronize",
    "world",
]


def __getattr__(name: str) -> Any:
    if name not in ELSEWHERE:
        raise AttributeError(f"hvdtrain.compat.horovod has no '{name}'")
    why = f"hvdtrain.compat.horovod has no '{name}': {ELSEWHERE[name]}"
    # `from ... import name` asks whether there is the name, and would say no more than that there is not.
    is_import = sys._getframe(1).f_code.co_filename.startswith("<frozen importlib")
    raise ImportError(why, name=name) if is_import else AttributeError(why)
