"""Changes to the engine of Horovod 0.28.1: it waits well, and knows bfloat16. What it computed before stays as it is.

As released, its background loop sleeps out a cycle of 1 ms before it looks at what was enqueued, whoever waits for a
result polls for it and takes Python's lock at each turn, and a rank that is early polls within MPI.

- **Park**: who waits for a result sleeps until it is there.
- **Wake**: what is enqueued wakes the loop. While results are outstanding the loop goes on at once, so that ranks
  cannot stay out of phase; where nothing comes of that several times in a row, it sleeps for a sixteenth of the time
  waited so far.
- **Patience**: a rank that waits for a later one in a negotiation sleeps between its looks. Waiting being cheap, an
  idle loop joins one every 10 ms instead of each 1 ms. `HOROVOD_CYCLE_TIME` is heeded as before.
- **Stream**: on GPUs, the stream of whoever asks for a result waits for it, and the host goes on.
- **Faults**: wherever a GPU is waited for, NCCL's errors are looked for, and end the job in order.
- **Limits**: where NCCL starts, is aborted or ends, nothing can be looked for: a time limit ends the process.
- **Bfloat16**: tensors of that type travel as they are; on CPUs they are added as fp32 and rounded once.

With the response cache off, or process sets that come and go, ranks wait within MPI before the first patient place;
with process sets, those who are in none wait for the others' cycle too: there an idle cycle stays at 1 ms.
"""

from __future__ import annotations

from hvdtrain.install.edits import Edit
from hvdtrain.install.engine.bfloat16 import bfloat16_edits
from hvdtrain.install.engine.bfloat16_cpu import bfloat16_cpu_edits
from hvdtrain.install.engine.bfloat16_gpu import bfloat16_gpu_edits
from hvdtrain.install.engine.bfloat16_sums import bfloat16_sum_edits
from hvdtrain.install.engine.faults import fault_edits
from hvdtrain.install.engine.limits import limit_edits
from hvdtrain.install.engine.park import park_edits
from hvdtrain.install.engine.patience import patience_edits
from hvdtrain.install.engine.stream import stream_edits
from hvdtrain.install.engine.wake import wake_edits


def engine_edits() -> tuple[Edit, ...]:
    """Return the changes to the engine."""
    waiting = (*park_edits(), *wake_edits(), *patience_edits(), *stream_edits(), *fault_edits(), *limit_edits())
    bfloat16 = (*bfloat16_edits(), *bfloat16_sum_edits(), *bfloat16_cpu_edits(), *bfloat16_gpu_edits())
    return (*waiting, *bfloat16)
