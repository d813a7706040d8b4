"""The ranks: who they are, what they exchange, how gradients are averaged. Horovod and MPI live in here only."""

from hvdtrain.world.asking import Asking
from hvdtrain.world.averaging import Averaging
from hvdtrain.world.batch_norm import has_synchronized_layers, synchronize_batch_norm
from hvdtrain.world.buckets import in_buckets
from hvdtrain.world.build_info import ask_horovod
from hvdtrain.world.carriers import ReduceOp
from hvdtrain.world.codec import Codec
from hvdtrain.world.codecs import CODECS, codec_for, codec_of
from hvdtrain.world.echo import Cargo, EchoWorld, Message, begin_exchange, messages_of
from hvdtrain.world.heartbeat import Heartbeat
from hvdtrain.world.int8 import Int8
from hvdtrain.world.means import BesideGradients
from hvdtrain.world.plain_mpi import plain_sum
from hvdtrain.world.powersgd import PowerSGD
from hvdtrain.world.replicas import digest_of, keep_per_rank, per_rank_buffers
from hvdtrain.world.sampler import RankSampler
from hvdtrain.world.solo import SoloWorld
from hvdtrain.world.start import connect, init, pick_device, visible_gpus
from hvdtrain.world.topk import TopK
from hvdtrain.world.watch import watched
from hvdtrain.world.world import World
from hvdtrain.world.wrapped import WrappedOptimizer

__all__ = [
    "CODECS",
    "Asking",
    "Averaging",
    "BesideGradients",
    "Cargo",
    "Codec",
    "EchoWorld",
    "Heartbeat",
    "Int8",
    "Message",
    "PowerSGD",
    "RankSampler",
    "ReduceOp",
    "SoloWorld",
    "TopK",
    "World",
    "WrappedOptimizer",
    "ask_horovod",
    "begin_exchange",
    "codec_for",
    "codec_of",
    "connect",
    "digest_of",
    "has_synchronized_layers",
    "in_buckets",
    "init",
    "keep_per_rank",
    "messages_of",
    "per_rank_buffers",
    "pick_device",
    "plain_sum",
    "synchronize_batch_norm",
    "visible_gpus",
    "watched",
]
