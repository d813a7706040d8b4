"""What trackers show of a classifier of images: a few held-out ones side by side, and what they are taken for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_SHOWN, _COLUMNS = 16, 8


def shown_images(
    model: nn.Module,
    data: Any,
    classes: Sequence[str],
    images_of: Callable[[Any], Tensor],
    logits_of: Callable[[nn.Module, Any], Tensor],
) -> dict[str, Any]:
    """Return a picture of a few held-out images, and a line about each.

    Args:
        model: in evaluation mode.
        data: the held-out images; a batch begins with images and labels.
        classes: their names.
        images_of: returns a batch's images, uint8 `(n, 3 or 1, height, width)`.
        logits_of: returns the model's answer to a batch on its device, `(n, classes)`.
    """
    batch = data.batch(torch.linspace(0, len(data) - 1, min(_SHOWN, len(data))).long())
    device = next(model.parameters()).device
    likeliest = logits_of(model, tuple(part.to(device) for part in batch)).float().softmax(1).max(1)
    lines = [
        f"{number:2}  {classes[label] if label >= 0 else 'unread'}, taken for {classes[answer]} ({share:.0%})"
        for number, label, answer, share in zip(
            range(1, _SHOWN + 1), batch[1].tolist(), likeliest.indices.tolist(), likeliest.values.tolist(), strict=False
        )
    ]
    return {"images": side_by_side(images_of(batch)), "answers": "\n".join(lines)}


def side_by_side(images: Tensor) -> NDArray[np.uint8]:
    """Return images, uint8 `(n, 3 or 1, height, width)`, in rows of 8, as one, uint8 `(height, width, 3)`."""
    count, _, height, width = images.shape
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    whole = torch.zeros(rows * columns, 3, height, width, dtype=torch.uint8)
    whole[:count] = images
    picture: NDArray[np.uint8] = (
        whole.view(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2).reshape(rows * height, -1, 3).numpy()
    )
    return picture
