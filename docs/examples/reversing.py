"""A recipe with an encoder and a decoder: a word goes in, the same word comes out backwards.

horovodrun -np 2 python -m hvdtrain train docs/examples/reversing.py
"""

from dataclasses import dataclass

import torch

import hvdtrain

LETTERS, LENGTH, START = 26, 8, 26


class Reverser(torch.nn.Module):
    """A small transformer: letters `(n, LENGTH)` and what was written so far `(n, LENGTH)` give the next letters."""

    def __init__(self, width=64):
        super().__init__()
        self.letters = torch.nn.Embedding(LETTERS + 1, width)
        self.places = torch.nn.Parameter(torch.randn(LENGTH, width) * 0.1)
        self.body = torch.nn.Transformer(
            width, 4, 1, 1, dim_feedforward=128, dropout=0.0, batch_first=True, norm_first=False
        )
        self.head = torch.nn.Linear(width, LETTERS)

    def forward(self, words, written):
        mask = torch.nn.Transformer.generate_square_subsequent_mask(LENGTH)
        source, target = (self.letters(letters) + self.places for letters in (words, written))
        return self.head(self.body(source, target, tgt_mask=mask, tgt_is_causal=True))


def loss_sums(model, batch):
    (words,) = batch
    answer = words.flip(1)
    written = torch.cat((torch.full_like(answer[:, :1], START), answer[:, :-1]), 1)
    logits = model(words, written)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answer.flatten(), reduction="none")
    # One target a word: its letters' mean loss, and the share of them that is right.
    return {
        "loss": loss.view(len(words), LENGTH).mean(1).sum(),
        "right": (logits.argmax(2) == answer).float().mean(1).sum(),
    }


@dataclass(frozen=True, kw_only=True)
class Reversing(hvdtrain.Recipe):
    """Random words of eight letters."""

    def build(self, say):
        torch.manual_seed(self.train.seed)
        words = torch.randint(LETTERS, (6000, LENGTH))
        return hvdtrain.Task(
            model=Reverser(),
            train_data=hvdtrain.TensorSamples(words[:5500]),
            val_data=hvdtrain.TensorSamples(words[5500:]),
            loss_sums=loss_sums,
            metrics=("loss", "right"),
        )


def recipe():
    return Reversing(
        train=hvdtrain.TrainConfig(steps=300, global_batch_size=100), optim=hvdtrain.AdamWConfig(peak_lr=0.003)
    )
