"""A loop of your own with a DataLoader, a schedule, clipping, held-out accuracy, and a checkpoint to go on from.

horovodrun -np 2 python docs/examples/own_loop.py state.pt          (again: it goes on)
"""

import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

import hvdtrain

EPOCHS, PATH = 4, Path(sys.argv[1])


def spirals(n, seed):
    """Two spirals: points `(n, 2)` and which of the two each belongs to."""
    generator = torch.Generator().manual_seed(seed)
    t, label = torch.rand(n, generator=generator) * 9 + 1, torch.arange(n) % 2
    angle = t + torch.pi * label
    return TensorDataset(torch.stack((t * angle.cos(), t * angle.sin()), 1) / 5, label)


def main():
    world = hvdtrain.init()
    torch.manual_seed(0)
    train, held_out = spirals(2000, seed=1), spirals(400, seed=2)
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2)
    )
    sampler = world.sampler(len(train), seed=3)  # each rank reads its own samples
    loader = DataLoader(train, batch_size=64 // world.size, sampler=sampler, drop_last=True)
    optimizer = world.wrap(torch.optim.AdamW(model.parameters(), lr=0.01), model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, epochs=EPOCHS, steps_per_epoch=len(loader))
    world.broadcast_state(model, optimizer)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "sampler": sampler}
    if PATH.exists():
        state = world.load(PATH)
        for name, part in parts.items():
            part.load_state_dict(state[name])
    while sampler.epoch < EPOCHS:
        for x, label in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), label).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            x, label = held_out[world.rank :: world.size]
            right = world.all_reduce((model(x).argmax(1) == label).sum(), "sum")
        if world.rank == 0:
            print(f"epoch {sampler.epoch}: {right / len(held_out):.1%} of the held-out points are right")
        world.save({name: part.state_dict() for name, part in parts.items()}, PATH)


if __name__ == "__main__":  # the loader's workers, where there are any, import this file
    main()
