"""A line fit: the smallest loop of your own.

python docs/examples/line.py, or: horovodrun -np 2 python docs/examples/line.py
"""

import torch

import hvdtrain

world = hvdtrain.init()  # one process, or the ranks of a launcher
torch.manual_seed(world.rank)  # each rank draws other points

line = torch.nn.Linear(1, 1)
optimizer = world.wrap(torch.optim.SGD(line.parameters(), lr=0.1), line)
world.broadcast_state(line, optimizer)  # all ranks begin with rank 0's weights

for _ in range(200):
    x = torch.rand(32, 1)
    y = 3 * x - 1 + 0.01 * torch.randn(32, 1)
    optimizer.zero_grad()
    loss = (line(x) - y).square().mean()
    loss.backward()  # the mean over the ranks is taken here
    optimizer.step()

loss = world.all_reduce(loss.detach())
if world.rank == 0:
    print(f"y = {line.weight.item():.2f} x + {line.bias.item():.2f}, loss {loss.item():.5f} on {world.size} ranks")
