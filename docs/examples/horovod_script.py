"""A script that was written for Horovod, with one line changed: the import.

horovodrun -np 2 python docs/examples/horovod_script.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import hvdtrain.compat.horovod as hvd  # was: import horovod.torch as hvd

hvd.init()
torch.manual_seed(42)

digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
train = torch.utils.data.TensorDataset(images[:1500], labels[:1500])
sampler = torch.utils.data.distributed.DistributedSampler(train, num_replicas=hvd.size(), rank=hvd.rank())
loader = torch.utils.data.DataLoader(train, batch_size=32, sampler=sampler)

model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05 * hvd.size(), momentum=0.9)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())

for epoch in range(5):
    sampler.set_epoch(epoch)
    for data, target in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data), target)
        loss.backward()
        optimizer.step()
    right = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean()
    accuracy = hvd.allreduce(right, name="accuracy")
    if hvd.rank() == 0:
        print(f"epoch {epoch}: accuracy {accuracy.item():.3f}")
