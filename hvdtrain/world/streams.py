"""Results on GPUs that a stream of the user's own goes on with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def keep_for_stream(result: Any) -> None:
    """Have torch keep a result's memory, once it is given back, until the current stream is done with it.

    What a gather returns is allocated by Horovod's own thread, as memory of the default stream. Given back, it would be
    taken at once for what that stream does next, which knows nothing of another stream that still reads it, nor of
    NCCL's, which may still write it where nobody has looked at the result.

    Args:
        result: of a collective whose end the current stream waits for: a tensor, or several.
    """
    for tensor in result if isinstance(result, tuple) else (result,):
        if isinstance(tensor, Tensor) and tensor.is_cuda:
            stream = torch.cuda.current_stream(tensor.device)
            if stream != torch.cuda.default_stream(tensor.device):
                tensor.record_stream(stream)
