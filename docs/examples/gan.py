"""A GAN that learns a ring: two networks, two optimizers, one loop.

horovodrun -np 2 python docs/examples/gan.py
"""

import torch

import hvdtrain

world = hvdtrain.init()
torch.manual_seed(0)
generator = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
critic = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.LeakyReLU(0.2), torch.nn.Linear(32, 1))
of_generator = world.wrap(torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999)), generator)
of_critic = world.wrap(torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.999)), critic)
world.broadcast_state(generator, of_generator)
world.broadcast_state(critic, of_critic)
bce = torch.nn.functional.binary_cross_entropy_with_logits
torch.manual_seed(1 + world.rank)  # from here on, each rank draws its own samples

for step in range(1, 601):
    angle = 2 * torch.pi * torch.rand(128 // world.size, 1)
    real = torch.cat((angle.cos(), angle.sin()), 1)
    fake = generator(torch.randn(len(real), 2))
    ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)

    of_critic.zero_grad()
    loss = bce(critic(real), ones) + bce(critic(fake.detach()), zeros)
    loss.backward()
    of_critic.step()

    critic.requires_grad_(False)  # its gradient is not wanted here: it need not travel
    of_generator.zero_grad()
    bce(critic(fake), ones).backward()
    of_generator.step()
    critic.requires_grad_(True)

    if step % 200 == 0:
        radius = world.all_reduce(fake.detach().norm(dim=1).mean())
        if world.rank == 0:
            print(f"step {step}: mean radius of what is generated {radius.item():.2f} (the ring's is 1)")
