"""Other libraries' loops around a wrapped optimizer: N ranks move the weights as one process does."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

SAMPLES, BATCH, EPOCHS, CLIP = 48, 12, 2, 0.5


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def forward(self, x=None, labels=None):
        return {"loss": F.cross_entropy(self.layers(x), labels)}


def samples(rank=0, size=1):
    """Return this rank's share of each batch of all ranks."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (SAMPLES,), generator=generator)
    return [{"x": x[i], "labels": y[i]} for i in range(SAMPLES) if i % BATCH % size == rank]


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=0.05)


def alone():
    model = Network()
    optimizer = adam(model)
    for _ in range(EPOCHS):
        for batch in DataLoader(samples(), BATCH):
            optimizer.zero_grad()
            model(**batch)["loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
    return model


def accelerate(world, model, loader, folder):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(model, world.wrap(adam(model), model), loader)
    for _ in range(EPOCHS):
        for batch in loader:
            accelerator.backward(model(**batch)["loss"])
            accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()


def lightning(world, model, loader, folder):
    import lightning

    logging.getLogger("lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, index):
            return self.model(**batch)["loss"]

        def configure_optimizers(self):
            return world.wrap(adam(self.model), self.model)

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(max_epochs=EPOCHS, accelerator="cpu", devices=1, gradient_clip_val=CLIP, **quiet)
    trainer.fit(Module(), loader)


def transformers(world, model, loader, folder):
    from transformers import Trainer, TrainingArguments

    settings = {"save_strategy": "no", "logging_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=loader.batch_size,
        num_train_epochs=EPOCHS,
        max_grad_norm=CLIP,
        train_sampling_strategy="sequential",
        **settings,
    )
    optimizer = world.wrap(adam(model), model)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    Trainer(model, arguments, train_dataset=loader.dataset, optimizers=(optimizer, schedule)).train()


@pytest.mark.parametrize("train", [accelerate, lightning, transformers], ids=lambda train: train.__name__)
@pytest.mark.filterwarnings("ignore")
def test_a_library_around_the_wrapped_optimizer(world, train, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # Lightning sets it when imported, and leaves it behind
    pytest.importorskip(train.__name__)
    pytest.importorskip("accelerate")
    # Accelerate takes mpirun's ranks for its own, on CPUs: docs/own-loop.md says so.
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    model = Network()
    train(world, model, DataLoader(samples(world.rank, world.size), BATCH // world.size), str(tmp_path))
    for ours, theirs in zip(model.parameters(), alone().parameters(), strict=True):
        assert (ours - theirs).abs().max() < 1e-10
