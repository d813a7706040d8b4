"""The ranks: who they are, what they exchange, how gradients are averaged. Horovod and MPI live in here only."""

from hvdtrain.dist.batch_norm import has_synchronized_layers, synchronize_batch_norm
from hvdtrain.dist.buckets import in_buckets
from hvdtrain.dist.heartbeat import Heartbeat
from hvdtrain.dist.plain_mpi import plain_sum
from hvdtrain.dist.replicas import digest_of
from hvdtrain.dist.start import connect, init, pick_device, visible_gpus
from hvdtrain.dist.watch import watched
from hvdtrain.dist.world import ReduceOp, SoloWorld, World, WrappedOptimizer

__all__ = [
    "Heartbeat",
    "ReduceOp",
    "SoloWorld",
    "World",
    "WrappedOptimizer",
    "connect",
    "digest_of",
    "has_synchronized_layers",
    "in_buckets",
    "init",
    "pick_device",
    "plain_sum",
    "synchronize_batch_norm",
    "visible_gpus",
    "watched",
]
