"""Kernels that torch's compiler makes of a block for a GPU, and what they pass over: counted without one.

    python benchmarks/gpu_kernels.py --output benchmarks/results/gpu_kernels.txt

A block of lm-124m in bf16, 16 x 1024 tokens, forward and backward, goes through torch's compiler as far as to the
kernels that it would have Triton write: no GPU and no Triton is there, nothing is computed. What is put together is so
as on GPUs; else the compiler decides as for CPUs: a kernel more or less is possible.
What lies outside of the blocks is not compiled but for the loss, and is counted by arithmetic.
A byte counts once for each kernel that reads or writes it; the times are those bytes at the rate of an H100's memory,
so no kernel is faster. Products and attention are a library's, and limited by what they compute.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import machine  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from torch._functorch._aot_autograd.utils import make_boxed_func  # noqa: E402
from torch._functorch.partitioners import min_cut_rematerialization_partition  # noqa: E402
from torch._inductor import config, lowering  # noqa: E402
from torch._inductor.compile_fx import _recursive_post_grad_passes  # noqa: E402
from torch._inductor.debug import DebugContext  # noqa: E402
from torch._inductor.decomposition import select_decomp_table  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode  # noqa: E402
from torch._inductor.virtualized import V  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

from hvdtrain.models import linear  # noqa: E402
from hvdtrain.models.decoder import Decoder  # noqa: E402
from hvdtrain.models.elementwise import rotary_tables  # noqa: E402
from hvdtrain.models.private_torch import FakeTensorMode  # noqa: E402
from hvdtrain.recipes import load_recipe  # noqa: E402

BATCH, LENGTH, VOCAB = 16, 1024, 50_304
IN_PLACE = {"max_pointwise_cat_inputs": 1, "max_complex_pointwise_cat_inputs": 1}
"""Has the compiler write what is put together into parts of the whole, instead of choosing by place in one kernel."""
BYTES_PER_S = 3.35e12  # of an H100 SXM's memory, by its data sheet


class Kernel(NamedTuple):
    """One that is launched."""

    name: str
    is_others: bool
    """A product or attention, from a library."""
    num_bytes: int
    """That it reads and writes."""


def put_together_as_on_gpus() -> None:
    """Have the compiler decide as for GPUs whether what is put together is a kernel of its own, from now on.

    It asks for the device in the function that does so, and nowhere else: there the answer is another one.
    """
    asked = 'cpu_device = inputs[0].get_device().type == "cpu"'
    source = inspect.getsource(lowering.cat)
    if source.count(asked) != 1:
        raise SystemExit("torch's compiler puts tensors together in another way than in torch 2.13: look at it anew")
    exec(source.replace(asked, "cpu_device = False"), vars(lowering))
    for name in lowering.lowerings:
        if str(name).startswith("aten.cat"):
            lowering.lowerings[name] = lowering.cat


def kernels_of(traced: torch.fx.GraphModule, inputs: Sequence[Tensor], mode: FakeTensorMode) -> list[Kernel]:
    """Return the kernels for what was traced with these tensors, which have no storage."""
    as_for_gpus = config.patch(cpu_backend="triton")
    with as_for_gpus, V.set_fake_mode(mode), V.set_debug_handler(DebugContext()), torch.no_grad():
        _recursive_post_grad_passes(traced, is_inference=False)
        graph = GraphLowering(traced, example_inputs=inputs)
        with V.set_graph_handler(graph), V.set_extern_kernel_nodes([]):
            graph.run(*inputs)
            graph.init_wrapper_code()
            graph._update_scheduler()
            return [
                Kernel(_name(node), isinstance(node, ExternKernelSchedulerNode), node.get_read_write_buffers_sizes())
                for node in graph.scheduler.nodes
                if not isinstance(node, NopKernelSchedulerNode) and node.get_read_write_buffers_sizes()
            ]


@torch.library.custom_op("gpu_kernels::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Stand for a GPU's attention, whose kernels are a library's."""
    raise NotImplementedError


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("gpu_kernels::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Stand for its backward pass."""
    raise NotImplementedError


@_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = _attention_backward(grad, *ctx.saved_tensors)
    return found


_attention.register_autograd(_differentiate, setup_context=_keep)


def attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> Tensor:
    """Compute causal attention, as far as a compiler sees of it."""
    kind = torch.get_autocast_dtype("cpu")
    out: Tensor = _attention(q.to(kind), k.to(kind), v.to(kind))[0]
    return out


def _name(node: Any) -> str:
    if isinstance(node, ExternKernelSchedulerNode):
        return str(getattr(node.node, "python_kernel_name", None) or getattr(node.node, "op_overload", "library"))
    origins = {str(origin.target) for part in node.get_nodes() for origin in part.node.get_origins()}
    return " ".join(sorted(origin.replace("aten.", "").partition(".")[0] for origin in origins))


def kernels_of_part(module: torch.fx.GraphModule) -> list[Kernel]:
    """Return the kernels for a graph, forward or backward."""
    mode = FakeTensorMode()
    with mode:
        values = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
        inputs = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype) for v in values]
        traced = make_fx(module)(*inputs)
    return kernels_of(traced, inputs, mode)


def block_kernels(
    joined: bool = True,
    residual: torch.dtype = torch.float32,
    blocks: int = 1,
    options: Mapping[str, Any] | None = None,
) -> tuple[list[Kernel], list[Kernel]]:
    """Return the kernels of a compiled block, forward and backward.

    Args:
        joined: as blocks are on GPUs; else by a product for each weight.
        residual: type of what is added from block to block.
        blocks: compiled as one.
        options: of the compiler.
    """
    found: list[torch.fx.GraphModule] = []

    def note(module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        found.append(copy.deepcopy(module))
        outputs = next(iter(reversed(module.graph.nodes))).args[0]

        def nothing(*given: Any) -> list[Any]:
            """Return what has the right shapes."""
            values = [None if node is None else node.meta["val"] for node in outputs]
            return [None if v is None else torch.empty_strided(v.shape, v.stride(), dtype=v.dtype) for v in values]

        return make_boxed_func(nothing)

    shape: Any = load_recipe("lm-124m").model
    layers = Decoder(shape, 8).model.layers[:blocks]
    x = torch.empty(BATCH, LENGTH, shape.hidden_size, dtype=residual, requires_grad=True)
    rope = rotary_tables(torch.arange(LENGTH), shape.head_size, shape.rope_theta, like=x)
    backend = aot_autograd(
        fw_compiler=note,
        bw_compiler=note,
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch._dynamo.reset()

    def decide(x: Tensor) -> bool:
        return joined

    def compute(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        for block in layers:
            x = block(x, rope)
        return x

    patches = (
        mock.patch.object(linear, "_gains_by_one", decide),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention),
    )
    with patches[0], patches[1], torch.autocast("cpu", torch.bfloat16):
        torch.compile(compute, backend=backend, fullgraph=True)(x, rope).sum().backward()
    with config.patch(dict(options or {})):
        forward, backward = map(kernels_of_part, found)
    return forward, backward


def rows_of(title: str, kernels: Sequence[Kernel]) -> list[str]:
    """Return lines of a table."""
    own = [kernel for kernel in kernels if not kernel.is_others]
    num_bytes = sum(kernel.num_bytes for kernel in own)
    head = (
        f"{title}: {len(kernels) - len(own)} products and attentions, {len(own)} other kernels, which pass over"
        f" {num_bytes / 1e6:,.0f} MB: {num_bytes / BYTES_PER_S * 1e3:.3f} ms"
    )
    return [head, *(f"  {kernel.num_bytes / 1e6:8.1f} MB  {kernel.name[:110]}" for kernel in kernels), ""]


def rows_outside() -> list[str]:
    """Return what is passed over outside of the blocks, by arithmetic: parameters and logits times bytes."""
    shape: Any = load_recipe("lm-124m").model
    with torch.device("meta"):
        model = Decoder(shape, VOCAB)
    weights, table, logits = model.num_parameters(), VOCAB * shape.hidden_size, BATCH * LENGTH * VOCAB
    passes = {
        "logits, read twice, and their gradient": 6 * logits,
        "the output layer's weight, cast": 6 * table,
        "its gradient of the first of two chunks, in fp32": 6 * table,
        "that of the second, added": 10 * table,
        "the sum, times what backward begins with": 8 * table,
        "the embedding's gradient: zeros, and its sum with the output layer's": 16 * table,
        "the norm of all gradients": 4 * weights,
        "clipping by a pass of its own, as before": 8 * weights,
        "clipping by the optimizer's kernel, which writes gradients back": 4 * weights,
        "AdamW: four numbers read, three written": 28 * weights,
    }
    head = f"outside of the blocks, {weights:,} parameters, a vocabulary of {VOCAB:,}, by arithmetic:"
    rows = (f"  {size / 1e6:8.1f} MB  {size / BYTES_PER_S * 1e3:.3f} ms  {name}" for name, size in passes.items())
    return [head, *rows, ""]


def main() -> None:
    """Count, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    lines = [machine.describe(), "", "counted, not measured: no GPU was there", ""]
    put_together_as_on_gpus()
    ways: dict[str, dict[str, Any]] = {
        "products apart": {"joined": False},
        "products joined, as it is": {},
        "what is put together where it is made": {"options": IN_PLACE},
        "bfloat16 added from block to block": {"residual": torch.bfloat16},
        "two compiled as one": {"blocks": 2},
    }
    for name, way in ways.items():
        forward, backward = block_kernels(**way)
        lines += rows_of(f"a block, {name}, forward", forward) + rows_of(f"a block, {name}, backward", backward)
        own = sum(kernel.num_bytes for kernel in (*forward, *backward) if not kernel.is_others) / way.get("blocks", 1)
        lines[-1:] = [f"twelve blocks, {name}: {12 * own / BYTES_PER_S * 1e3:.2f} ms in what passes over memory", ""]
    lines += rows_outside()
    print("\n".join(lines))
    if given.output:
        given.output.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
