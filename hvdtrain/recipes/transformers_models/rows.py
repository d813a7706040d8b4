"""Log-probabilities of rows: what a model of transformers gives to the targets of each document by itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvdtrain.models.loss import IGNORE_INDEX, positions_at_once
from hvdtrain.recipes.transformers_models.forward import Head, run
from hvdtrain.recipes.transformers_models.heads import row_of


def row_log_probs(
    model: nn.Module, head: Head | None, tokens: Tensor, targets: Tensor, loss_bytes: int | None = None
) -> Tensor:
    """Return the log-probability of each row's targets, all together, `(R,)`, in fp32 or wider.

    Args:
        model: of transformers.
        head: the model's, where it can be given a part of the hidden states.
        tokens: int64 `(R, L)`; what fills a row up comes after its document.
        targets: int64 `(R, L)`, the token that follows each; `IGNORE_INDEX` where it does not count.
        loss_bytes: logits that may exist at once, where there is a head.
    """
    inputs = {"input_ids": tokens}
    if head is not None:
        chunk = positions_at_once(head.num_logits(model), targets.device, loss_bytes)
        if targets.numel() > chunk:
            output = head.body(model, inputs)
            losses = [head.row_loss(model, row_of(output, i), targets[i : i + 1], chunk) for i in range(len(tokens))]
            return -torch.stack(losses)
    logits = run(model, inputs).logits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nats = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return -nats.view(targets.shape).sum(1)
