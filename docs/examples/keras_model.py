"""A Keras 3 model on its torch back end, in a recipe: the road for users of TensorFlow. Needs `pip install keras`.

horovodrun -np 2 python -m hvdtrain train docs/examples/keras_model.py
"""

import os

os.environ["KERAS_BACKEND"] = "torch"  # before keras is imported

import keras
import torch

import hvdtrain


def spirals(count, generator):
    """Return points on two spirals, float32 `(count, 2)`, and which spiral each is on, int64 `(count,)`."""
    label = torch.randint(2, (count,), generator=generator)
    angle = 6 * torch.rand(count, generator=generator).sqrt()
    radius = angle / 6 * (1 - 2 * label)
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    return hvdtrain.TensorSamples(points + 0.02 * torch.randn(count, 2, generator=generator), label)


def network(seed):
    """Return a Keras model, which is a torch module, built for two features on the CPU."""
    keras.utils.set_random_seed(seed)
    with keras.device("cpu"):
        return keras.Sequential(
            [
                keras.Input((2,)),
                keras.layers.Dense(64, "relu"),
                keras.layers.Dense(64, "relu"),
                keras.layers.Dropout(0.05),
                keras.layers.Dense(2),
            ]
        )


def loss_sums(model, batch):
    points, label = batch
    scores = model(points, training=model.training)  # what torch knows by train() and eval(), Keras is told
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
    return {"loss": loss(label, scores), "accuracy": (scores.argmax(1) == label).sum()}


class Spirals(hvdtrain.Recipe):
    """Tells two spirals apart."""

    def build(self, say):
        generator = torch.Generator().manual_seed(0)
        return hvdtrain.Task(
            model=network(self.train.seed),
            train_data=spirals(2000, generator),
            val_data=spirals(500, generator),
            loss_sums=loss_sums,
            metrics=("loss", "accuracy"),
        )


def recipe():
    return Spirals(
        train=hvdtrain.TrainConfig(epochs=20, global_batch_size=100),
        optim=hvdtrain.AdamWConfig(peak_lr=0.01, weight_decay=0.0),
        eval=hvdtrain.EvalConfig(every="5epochs"),
    )
