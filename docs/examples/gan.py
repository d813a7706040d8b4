"""A GAN that learns a ring: two networks, two optimizers, epochs over a data set, and a checkpoint to go on from.

horovodrun -np 2 python docs/examples/gan.py gan.pt          (again: it goes on)

Any number of ranks trains the same networks: rank r of N takes numbers r, r + N, ... of each batch and of its noise.
"""

import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

import hvdtrain

EPOCHS, BATCH, PATH = 30, 128, Path(sys.argv[1])


def ring(n):
    """Points on a circle, `(n, 2)`."""
    angle = 2 * torch.pi * torch.rand(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return TensorDataset(torch.cat((angle.cos(), angle.sin()), 1))


def main():
    world = hvdtrain.init()
    torch.manual_seed(0)
    generator = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2)).double()
    critic = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.LeakyReLU(0.2), torch.nn.Linear(32, 1)).double()
    of_generator = world.wrap(torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999)), generator)
    of_critic = world.wrap(torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.999)), critic)
    world.broadcast_state(generator, of_generator)
    world.broadcast_state(critic, of_critic)
    data = ring(20 * BATCH)
    sampler = world.sampler(len(data), seed=2)
    loader = DataLoader(data, batch_size=BATCH // world.size, sampler=sampler, drop_last=True)
    parts = {
        "generator": generator,
        "critic": critic,
        "of_generator": of_generator,
        "of_critic": of_critic,
        "sampler": sampler,
    }
    if PATH.exists():
        state = world.load(PATH)
        for name, part in parts.items():
            part.load_state_dict(state[name])
    bce = torch.nn.functional.binary_cross_entropy_with_logits

    while sampler.epoch < EPOCHS:
        draws = torch.Generator().manual_seed(sampler.epoch)
        for (real,) in loader:
            noise = torch.randn(BATCH, 2, dtype=torch.float64, generator=draws)[world.rank :: world.size]
            fake = generator(noise)
            ones, zeros = torch.ones(len(real), 1).double(), torch.zeros(len(real), 1).double()

            of_critic.zero_grad()
            loss = bce(critic(real), ones) + bce(critic(fake.detach()), zeros)
            loss.backward()
            of_critic.step()

            critic.requires_grad_(False)  # its gradient is not wanted here: it need not travel
            of_generator.zero_grad()
            bce(critic(fake), ones).backward()
            of_generator.step()
            critic.requires_grad_(True)

        radius = world.all_reduce(fake.detach().norm(dim=1).mean())
        if world.rank == 0:
            print(f"epoch {sampler.epoch}: mean radius of what is generated {radius:.6f} (the ring's is 1)")
        world.save({name: part.state_dict() for name, part in parts.items()}, PATH)


if __name__ == "__main__":  # the loader's workers, where there are any, import this file
    main()
