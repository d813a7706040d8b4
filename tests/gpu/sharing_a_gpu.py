"""Run a program as one of several ranks that share a GPU, where there are fewer GPUs than ranks.

    horovodrun -np 2 python tests/gpu/sharing_a_gpu.py -m hvdtrain train lm
    horovodrun -np 2 python tests/gpu/sharing_a_gpu.py nccl_ranks.py

NCCL refuses two ranks on one GPU of one host, so each rank is told that it is on a host of its own: what they say then
goes through the network's code. All that NCCL and Horovod do is real; how fast they are here says nothing.
"""

import os
import runpy
import sys
from pathlib import Path

RANK = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("HOROVOD_RANK") or "0"
os.environ["NCCL_HOSTID"] = f"rank-{RANK}"
os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
sys.path.insert(0, str(Path(__file__).parents[2]))


def main():
    from hvdtrain.world import start

    own_gpus = start.visible_gpus
    start.visible_gpus = lambda: tuple(f"{gpu} as rank {RANK} has it" for gpu in own_gpus())
    words = sys.argv[1:]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
