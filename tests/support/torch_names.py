"""Every public name of torch that has to do with training loops, and why some of them need no loop of their own."""

import inspect

import torch
from loops import OPTIMIZERS, SCHEDULERS
from torch.autograd import graph
from torch.nn.modules import module as of_modules
from torch.nn.utils import parametrizations, parametrize, prune, rnn, stateless
from torch.optim import lr_scheduler, swa_utils
from torch.optim import optimizer as of_optimizers
from torch.utils import checkpoint


def _is_foreign(value):
    return inspect.isfunction(value) and not value.__module__.startswith("torch")


def _names(prefix, space, only=None):
    """Return the public names of a module or class: those it declares, else those that it defines itself."""
    names = getattr(space, "__all__", None)
    if names is None:
        names = [name for name in dir(space) if not name.startswith("_")]
        if inspect.ismodule(space):
            names = [name for name in names if getattr(getattr(space, name), "__module__", "") == space.__name__]
        else:  # transformers hangs a method of its own on nn.Module
            names = [name for name in names if not _is_foreign(getattr(space, name))]
    return {f"{prefix}.{name}" for name in names if only is None or only in name}


def all_names():
    """Return every name that must be run or have its reason."""
    return set().union(
        _names("optim", torch.optim),
        _names("optimizer", of_optimizers),
        _names("Optimizer", torch.optim.Optimizer),
        _names("lr_scheduler", lr_scheduler),
        _names("LRScheduler", lr_scheduler.LRScheduler),
        _names("swa_utils", swa_utils),
        _names("amp", torch.amp),
        _names("GradScaler", torch.amp.GradScaler),
        _names("utils", torch.nn.utils),
        _names("parametrize", parametrize),
        _names("parametrizations", parametrizations),
        _names("prune", prune),
        _names("rnn", rnn),
        _names("stateless", stateless),
        _names("Module", torch.nn.Module),
        _names("module", of_modules, only="register_module"),
        _names("Tensor", torch.Tensor, only="grad"),
        _names("Tensor", torch.Tensor, only="hook"),
        _names("Tensor", torch.Tensor, only="backward"),
        _names("autograd", torch.autograd),
        _names("graph", graph),
        _names("checkpoint", checkpoint),
        _names("func", torch.func),
    )


IN_THE_TABLE = {
    **{f"optim.{name}": f"torch.optim: {name}" for name in (*OPTIMIZERS, "Muon", "SparseAdam")},
    "optim.LBFGS": "torch.optim: LBFGS(line_search_fn='strong_wolfe'), step(closure)",
    **{f"lr_scheduler.{name}": f"lr_scheduler: {name}, made before or after wrap()" for name in SCHEDULERS},
    "swa_utils.SWALR": "lr_scheduler: swa_utils.SWALR, made before or after wrap()",
    **{
        f"swa_utils.{name}": "loops: swa_utils.AveragedModel, update_bn()"
        for name in ("AveragedModel", "update_bn", "get_ema_multi_avg_fn")
    },
    "Optimizer.register_step_pre_hook": "torch.optim: step hooks registered before wrap()",
    "Optimizer.register_step_post_hook": "torch.optim: step hooks registered after wrap()",
    "amp.autocast": "torch.amp: autocast()",
    "amp.GradScaler": "torch.amp: scaler.scale(loss).backward(); scaler.step(optimizer); scaler.update()",
    **{f"GradScaler.{name}": "torch.amp: one scaler, two optimizers" for name in ("scale", "step")},
    **{f"utils.{name}": f"torch.nn.utils: {name}()" for name in ("clip_grad_norm_", "clip_grad_value_")},
    **{
        f"utils.{name}": "torch.nn.utils: get_total_norm(), clip_grads_with_norm_()"
        for name in ("get_total_norm", "clip_grads_with_norm_")
    },
    **{
        f"utils.{name}": "torch.nn.utils: parameters_to_vector(), vector_to_parameters()"
        for name in ("parameters_to_vector", "vector_to_parameters")
    },
    **{
        f"parametrizations.{name}": f"torch.nn.utils: parametrizations.{name}()"
        for name in ("weight_norm", "spectral_norm", "orthogonal")
    },
    "checkpoint.checkpoint": "loops: torch.utils.checkpoint(use_reentrant=True)",
}
"""Names that a loop of `loops.py` shows, by its name."""

_KIND = "a module or type whose names are in this list themselves"
_QUERY = "asks, changes nothing"
_PARTS = "yields modules and tensors, which the optimizer is given"
_DEVICE = "moves to a device that the machine may not have; `to` and `cpu` are run"
_INNER = "torch calls it itself, for what is run"
_INFERENCE = "for a model that is no longer trained"
_EXTRA = "no tensors that `wrap` or `broadcast_state` know; the trainer saves it (tests/unit/test_users_code.py)"
_SUBCLASS = "a method that a class of one's own defines"
_SAME = "the same as another name that is run"

REASONS = {
    **dict.fromkeys(("optim.lr_scheduler", "optim.swa_utils", "utils.parametrizations", "utils.parametrize"), _KIND),
    **dict.fromkeys(("utils.rnn", "utils.stateless", "optimizer.Optimizer", "autograd.grad_mode"), _KIND),
    **dict.fromkeys(("autograd.Variable", "autograd.variable", "Module.T_destination"), _KIND),
    **dict.fromkeys(("Optimizer.OptimizerPreHook", "Optimizer.OptimizerPostHook"), _KIND),
    **dict.fromkeys(("checkpoint.CheckpointError", "checkpoint.GraphExecGroup", "autograd.NestedIOFunction"), _KIND),
    **dict.fromkeys(("amp.is_autocast_available", "Tensor.retains_grad", "Tensor.grad_fn"), _QUERY),
    **dict.fromkeys(("autograd.gradcheck", "autograd.gradgradcheck", "func.hessian", "func.debug_unwrap"), _QUERY),
    **dict.fromkeys(("Module.get_buffer", "Module.get_parameter", "Module.get_submodule"), _QUERY),
    **dict.fromkeys(("Module.extra_repr", "Module.dump_patches", "Module.call_super_init"), _QUERY),
    **{f"Module.{name}": _PARTS for name in ("parameters", "buffers", "modules", "children", "named_parameters")},
    **{f"Module.{name}": _PARTS for name in ("named_buffers", "named_modules", "named_children")},
    **{f"Module.{name}": _DEVICE for name in ("cuda", "ipu", "xpu", "mtia")},
    **{f"Module.{name}": _EXTRA for name in ("get_extra_state", "set_extra_state")},
    **{
        f"Module.register_{name}": "hooks of a state dictionary, which `wrap` does not read"
        for name in (
            "state_dict_pre_hook",
            "state_dict_post_hook",
            "load_state_dict_pre_hook",
            "load_state_dict_post_hook",
        )
    },
    **{
        f"module.register_module_{name}": "runs when a module is built"
        for name in ("buffer_registration_hook", "module_registration_hook", "parameter_registration_hook")
    },
    "Module.forward": _SUBCLASS,
    "Optimizer.profile_hook_step": "torch calls it when it makes a class of optimizers",
    **{f"utils.fuse_{name}": _INFERENCE for name in ("conv_bn_eval", "conv_bn_weights", "linear_bn_eval")},
    "utils.fuse_linear_bn_weights": _INFERENCE,
    "rnn.invert_permutation": _INNER,
    **{f"prune.{name}": _SAME for name in ("CustomFromMask", "Identity", "L1Unstructured", "LnStructured")},
    **{f"prune.{name}": _SAME for name in ("RandomStructured", "RandomUnstructured", "PruningContainer")},
    "prune.BasePruningMethod": _SUBCLASS,
    "func.replace_all_batch_norm_modules_": "statistics of each rank's own samples, as docs/own-loop.md says",
    "parametrize.cached": "for the whole process, which the ranks of these tests share; computes nothing new",
    "stateless.functional_call": "deprecated for torch.func's, which is run",
    "Tensor.requires_grad": "the attribute that `requires_grad_` sets",
    "Tensor._backward_hooks": _INNER,
    "autograd.enforce_grad_layout_policy": _INNER,
    "graph.disable_saved_tensors_hooks": "forbids what is run",
    "graph.increment_version": "tells autograd of a change; `p.grad.add_` is run, and has this effect",
    **{
        f"graph.{name}": "for devices with streams and compiled graphs"
        for name in (
            "region_activation_memory_budget",
            "set_override_stale_capture_stream",
            "set_warn_on_accumulate_grad_stream_mismatch",
        )
    },
    **{
        f"checkpoint.{name}": _INNER
        for name in (
            "CheckpointFunction",
            "DefaultDeviceType",
            "SAC_IGNORED_OPS",
            "SelectiveCheckpointContext",
            "check_backward_validity",
            "detach_variable",
            "get_device_states",
            "noop_context_fn",
            "set_checkpoint_debug_enabled",
            "set_device_states",
        )
    },
    **dict.fromkeys(
        ("func.rearrange", "func.functionalize", "func.linearize"),
        "a function of tensors, without gradients of its own",
    ),
}
"""Names that need no loop, and why."""
