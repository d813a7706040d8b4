"""Which tensors an approximating format of gradients sends as they are: those the user names, or a vocabulary's."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from hvdtrain.errors import ConfigError
from hvdtrain.models.vocabulary import of_vocabulary
from hvdtrain.settings.compression import AUTO, NOTHING, SPARING, patterns_in

_MOST_SHOWN = 3


def exact_names(model: nn.Module, compression: str, exact: str) -> frozenset[str]:
    """Return the names of parameters, as `named_parameters` has them, that are not to be compressed.

    Args:
        model: whose gradients travel.
        compression: the format's name, as `powersgd` or `powersgd:4`.
        exact: as `--comm.compression-exact` says it.

    Raises:
        ConfigError: a pattern fits no parameter.
    """
    if exact == NOTHING or (exact == AUTO and compression.partition(":")[0] not in SPARING):
        return frozenset()
    if exact == AUTO:
        chosen = of_vocabulary(model)
    else:
        # A parameter that is shared has several names, and any of them will do.
        named = list(model.named_parameters(remove_duplicate=False))
        chosen = set()
        for pattern in patterns_in(exact):
            found = {parameter for name, parameter in named if fnmatchcase(name, pattern)}
            if not found:
                some = ", ".join(name for name, _ in named[:_MOST_SHOWN])
                raise ConfigError(
                    f"--comm.compression-exact: no parameter's name fits '{pattern[:80]}'; names are such as {some}"
                )
            chosen |= found
    return frozenset(name for name, parameter in model.named_parameters() if parameter in chosen)
