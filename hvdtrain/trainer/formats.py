"""States of training that earlier versions have saved, turned into today's form."""

from __future__ import annotations

from typing import Any

import torch

# Counts that format 1 kept beside each other.
_NEW: dict[str, Any] = {"exported": None, "extra_state": {}}
_FLAT = ("step", "is_evaluation_due", "optimizer", "config", "global_batch_size", "fingerprint")


def upgraded(state: dict[str, Any], version: int) -> dict[str, Any]:
    """Return what `saved_state.training_state` would save today, from a checkpoint's format version on."""
    return {**_NEW, **(_from_1(state) if version == 1 else state)}


def _from_1(state: dict[str, Any]) -> dict[str, Any]:
    """Move what belongs to components to them."""
    windows = state["windows"]
    targets = torch.zeros(len(windows), 1, dtype=windows.dtype)
    targets[0] = state["window_targets"]
    components: dict[str, Any] = {
        "window": [{"totals": totals} for totals in torch.cat((windows, targets), 1)],
        "skipped_steps": {"in_window": state["skipped"], "in_a_row": state["skipped_in_a_row"]},
    }
    if state["scaler"]:
        components["loss_scaler"] = state["scaler"]
    if "norms" in state:
        components["noise_scale"] = {"sums": state["norms"]}
    return {**{name: state[name] for name in _FLAT}, "components": components}
