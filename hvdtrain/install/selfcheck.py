"""Two real ranks and one all-reduce: what a set-up ends with. Run by `horovodrun -np 2`; Collective."""

import sys

import horovod.torch as hvd
import torch

hvd.init()
total = hvd.allreduce(torch.tensor([float(hvd.rank() + 1)]), op=hvd.Sum, name="selfcheck").item()
expected = hvd.size() * (hvd.size() + 1) / 2
if hvd.size() != 2 or total != expected:
    sys.exit(f"rank {hvd.rank()} of {hvd.size()} (2 were started) got the sum {total:g}, not {expected:g}")
hvd.shutdown()
