"""Notes the copies between devices for which the host waits: a GPU must then have done all that it was given."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Copies(TorchDispatchMode):
    """Keeps what is copied so, in `found`, and counts the copies that nobody waits for, in `num_others`."""

    def __init__(self):
        super().__init__()
        self.found, self.num_others = [], 0
        self._made = _MadeOnDevice(self)

    def __enter__(self):
        self._made.__enter__()
        return super().__enter__()

    def __exit__(self, *raised):
        super().__exit__(*raised)
        self._made.__exit__(*raised)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._to_copy.default and kwargs.get("device") not in (None, args[0].device):
            self.note(args[0], kwargs.get("non_blocking"))
        elif func is aten.copy_.default and args[0].device != args[1].device:
            self.note(args[1], args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        return func(*args, **kwargs)

    def note(self, tensor, non_blocking):
        self.num_others += bool(non_blocking)
        if not non_blocking:
            self.found.append(tensor)


class _MadeOnDevice(TorchFunctionMode):
    """Notes what is made of plain numbers on a device: torch makes it in host memory, copies it and waits for that."""

    def __init__(self, copies):
        super().__init__()
        self._copies = copies

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        is_of_numbers = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor)
        if is_of_numbers and made.device.type != "cpu":
            self._copies.note(made, False)
        return made
