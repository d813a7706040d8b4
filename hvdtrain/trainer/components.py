"""The table of components, in the order in which they are called."""

from __future__ import annotations

from hvdtrain.trainer.bucket_order import BucketOrder
from hvdtrain.trainer.buffers import ChangingBuffers
from hvdtrain.trainer.callback import callback_components
from hvdtrain.trainer.component import Component, ComponentFactory
from hvdtrain.trainer.early_stopping import EarlyStopping
from hvdtrain.trainer.ema import WeightAverage
from hvdtrain.trainer.grad_norms import GradNorms
from hvdtrain.trainer.job import Job
from hvdtrain.trainer.left_behind import own_progress, unsent_gradients
from hvdtrain.trainer.modes import Frozen, Modes
from hvdtrain.trainer.noise import NoiseScale
from hvdtrain.trainer.plateau import Plateau
from hvdtrain.trainer.scaler import LossScaler
from hvdtrain.trainer.skipped import SkippedSteps
from hvdtrain.trainer.slow_network import SlowNetwork
from hvdtrain.trainer.slow_ranks import SlowRanks
from hvdtrain.trainer.spikes import Spikes
from hvdtrain.trainer.stream_place import StreamPlace
from hvdtrain.trainer.timeline import Timeline
from hvdtrain.trainer.utilization import Utilization
from hvdtrain.trainer.window import MetricWindow
from hvdtrain.trainer.wire import Traffic, WireFormat

# The loss scaler comes before what looks at gradients: after it, gradients have their own size.
COMPONENTS: tuple[ComponentFactory, ...] = (
    Modes,
    LossScaler.of,
    ChangingBuffers,
    MetricWindow,
    SlowRanks.of,
    SlowNetwork.of,
    Utilization.of,
    Spikes.of,
    NoiseScale.of,
    GradNorms.of,
    WeightAverage.of,
    EarlyStopping.of,
    SkippedSteps,
    WireFormat.of,
    unsent_gradients,
    own_progress,
    BucketOrder.of,
    Traffic.of,
    StreamPlace.of,
    Plateau.of,
    Timeline.of,
)


def build_components(job: Job) -> list[Component]:
    """Return the components that the job's settings ask for, then those of the task, the strategy and callbacks."""
    factories = (*COMPONENTS, *job.task.components)
    components = [component for build in factories if (component := build(job)) is not None]
    return [*components, *job.strategy.components(job), *callback_components(job), Frozen(job)]
