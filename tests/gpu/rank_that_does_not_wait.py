"""One of two ranks: gradients are averaged while its GPU is kept busy, and the host must be through before it is.

Given "shard", the optimizer's state is spread over the ranks. Prints a line of JSON: whether the GPU was still busy
when `step` returned, and whether the weights are right.
"""

import json
import sys

import torch

import hvdtrain

CYCLES = 2_000_000_000  # about a second


def main():
    world = hvdtrain.init()
    torch.manual_seed(0)
    model = torch.nn.Linear(512, 512).to(world.device)
    twin = torch.nn.Linear(512, 512).to(world.device)
    twin.load_state_dict(model.state_dict())
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = world.wrap(plain, model, shard="shard" in sys.argv)
    x = torch.full((8, 512), float(world.rank + 1), device=world.device)
    for step in range(2):  # the first one makes NCCL's communicator, and tells who has gradients
        torch.cuda.synchronize()
        if step:
            torch.cuda._sleep(CYCLES)
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
        is_busy = not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    own = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(2):
        own.zero_grad()
        sum(
            twin(torch.full_like(x, float(rank + 1))).square().mean() / world.size for rank in range(world.size)
        ).backward()
        own.step()
    is_right = all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )
    if world.rank == 0:
        print(json.dumps({"is_busy": is_busy, "is_right": is_right}), flush=True)
    world.close()


if __name__ == "__main__":
    main()
