"""hvdtrain against a bare Horovod loop, PyTorch DDP and one process: same model, data, precision, threads, clipping.

    python benchmarks/speed.py --ranks 2 --steps 60 --repeats 5
    python benchmarks/speed.py --ranks 1 --nanogpt DIR --runners hvdtrain nanogpt

With a clone of github.com/karpathy/nanoGPT, its model of the same layers, width and length is trained by the loop of
its train.py: random windows, the next batch read between forward and backward, AdamW of its own choosing. The inner
width of our feed-forward layers then makes both models equally large.

Each runner is launched in turn, `--repeats` times; a launch gives the median time of a step, without warm-up.
Ratios are of launches that followed each other. hvdtrain is the command that users type; the others are the shortest
correct loops, below.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

WINDOW = 5  # steps whose mean is one measurement, as hvdtrain logs them
RUNNERS = ("hvdtrain", "horovod", "ddp", "one process", "nanogpt")


def settings(given: argparse.Namespace) -> list[str]:
    """Return hvdtrain's flags for the model and batch of the comparison."""
    return [
        *("--model.num-layers", str(given.layers), "--model.hidden-size", str(given.hidden_size)),
        *("--data.sequence-length", str(given.length), "--train.steps", str(given.steps)),
        *("--train.micro-batch-size", str(given.batch), "--train.accum-steps", "1", "--optim.warmup-steps", "0"),
        *("--log.every", str(WINDOW), "--eval.every", "1000000", "--checkpoint.every", "1000000"),
        *("--train.precision", given.precision),
        *(("--model.intermediate-size", str(given.intermediate_size)) if given.intermediate_size else ()),
    ]


def launcher(runner: str, given: argparse.Namespace) -> list[str]:
    """Return the command that starts this runner's ranks."""
    ranks = str(given.ranks)
    if runner == "one process" or given.ranks == 1:
        return [sys.executable]
    if runner in ("ddp", "nanogpt"):
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    if given.controller == "gloo":
        return ["horovodrun", "--gloo", "-np", ranks, sys.executable]
    return ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", ranks, sys.executable]


def launch(runner: str, given: argparse.Namespace) -> float:
    """Return the median seconds of a step in one launch of a runner."""
    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder) / "times.json"
        environ = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": str(given.threads)}
        if runner == "hvdtrain":
            command = [*launcher(runner, given), "-m", "hvdtrain", "train", "lm", "--run-dir", folder, *settings(given)]
        else:
            own = [f"--{name.replace('_', '-')}={value}" for name, value in vars(given).items() if value is not None]
            command = [*launcher(runner, given), __file__, "--runner", runner, "--times", str(times), *own]
        if runner not in ("ddp", "nanogpt") and environ.get("OMPI_MCA_mpi_yield_when_idle") is None:
            environ["OMPI_MCA_mpi_yield_when_idle"] = "1"  # as hvdtrain sets it: fair to the bare loop
        done = subprocess.run(command, env=environ, cwd=REPOSITORY, timeout=1800, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{runner} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        if runner == "hvdtrain":
            lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
            steps = [json.loads(line)["time/step_s"] for line in lines if "time/step_s" in line]
        else:
            steps = json.loads(times.read_text())
    return statistics.median(steps[2:])


def work(runner: str, given: argparse.Namespace) -> None:
    """Be one rank of a runner: the shortest loop that is correct. Writes the mean of each window of steps."""
    import torch

    from hvdtrain.config import BatchPlan
    from hvdtrain.data.order import SampleOrder
    from hvdtrain.data.text import TextConfig, prepare_text
    from hvdtrain.data.windows import TokenWindows
    from hvdtrain.models.decoder import Decoder, DecoderConfig
    from hvdtrain.models.loss import next_token_loss

    rank, size = 0, 1
    if runner == "horovod":
        import horovod.torch as hvd

        hvd.init()
        rank, size = hvd.rank(), hvd.size()
    elif runner == "ddp":
        torch.distributed.init_process_group("gloo")
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    text = prepare_text(TextConfig(sequence_length=given.length, val_fraction=0.01), lambda line: None)
    data = TokenWindows(text.train_path, text.dtype, given.length)
    order = SampleOrder(len(data), BatchPlan(given.batch * size, given.batch, 1, size), 0)
    config = DecoderConfig(num_layers=given.layers, hidden_size=given.hidden_size, num_heads=4)
    model = Decoder(config, text.vocab_size, seed=0)
    trained: torch.nn.Module = torch.nn.parallel.DistributedDataParallel(model) if runner == "ddp" else model
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    groups = [{"params": matrices}, {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    if runner == "horovod":
        optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=given.precision == "bf16")
    windows, started = [], time.perf_counter()
    for step in range(given.steps):
        for positions in order.micro_batches(step, rank):
            tokens, targets = data.batch(order.global_batch(step)[positions])
            model.zero_grad()
            with autocast:
                total, count = next_token_loss(trained(tokens), targets)
            (total / count).backward()
        if runner == "horovod":
            optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if runner == "horovod":
            with optimizer.skip_synchronize():
                optimizer.step()
        else:
            optimizer.step()
        if (step + 1) % WINDOW == 0:
            windows.append((time.perf_counter() - started) / WINDOW)
            started = time.perf_counter()
    if rank == 0:
        given.times.write_text(json.dumps(windows))


def work_as_nanogpt(given: argparse.Namespace) -> None:
    """Be one rank of nanoGPT's loop on the same text. Writes the mean of each window of steps."""
    import numpy as np
    import torch

    from hvdtrain.data.text import TextConfig, prepare_text

    sys.path.insert(0, str(given.nanogpt))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    is_parallel = given.ranks > 1
    if is_parallel:
        torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank() if is_parallel else 0
    torch.manual_seed(1337 + rank)
    text = prepare_text(TextConfig(sequence_length=given.length, val_fraction=0.01), lambda line: None)
    tokens = np.memmap(text.train_path, dtype=text.dtype, mode="r")
    shape = {"n_layer": given.layers, "n_head": 4, "n_embd": given.hidden_size, "block_size": given.length}
    model = GPT(GPTConfig(**shape, vocab_size=text.vocab_size, dropout=0.0, bias=False))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    trained = torch.nn.parallel.DistributedDataParallel(model) if is_parallel else model
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=given.precision == "bf16")

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.randint(len(tokens) - given.length, (given.batch,))
        rows = [torch.from_numpy(tokens[i : i + given.length + 1].astype(np.int64)) for i in starts]
        both = torch.stack(rows)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()

    windows, following, started = [], batch(), time.perf_counter()
    for step in range(given.steps):
        with autocast:
            _, loss = trained(*following)
        following = batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % WINDOW == 0:
            windows.append((time.perf_counter() - started) / WINDOW)
            started = time.perf_counter()
    if rank == 0:
        given.times.write_text(json.dumps(windows))


def as_large_as_nanogpt(given: argparse.Namespace) -> int:
    """Return the multiple of 16 with which the decoder has about, and not more than, the parameters of nanoGPT's model.

    Its feed-forward layers have 8 C^2 parameters, ours 3 C I; it has T C more, for positions.
    """
    exact = 8 * given.hidden_size / 3 + given.length / (3 * given.layers)
    return int(exact) // 16 * 16


def main() -> None:
    """Measure, print and write down; or be a rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--intermediate-size", type=int, help="default: the recipe's, or what makes nanoGPT as large")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8, help="samples of a rank")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--controller", choices=["mpi", "gloo"], default="mpi")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--runners", nargs="+", default=None, choices=RUNNERS)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--nanogpt", type=Path, help="a clone of nanoGPT, for the runner of that name")
    parser.add_argument("--runner", choices=RUNNERS, help=argparse.SUPPRESS)
    parser.add_argument("--times", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.runner:
        work_as_nanogpt(given) if given.runner == "nanogpt" else work(given.runner, given)
        return
    import machine

    output, runners = (
        given.output,
        given.runners or [runner for runner in RUNNERS if runner != "nanogpt" or given.nanogpt],
    )
    if "nanogpt" in runners and given.nanogpt is None:
        parser.error("the runner nanogpt needs --nanogpt DIR, a clone of github.com/karpathy/nanoGPT")
    if given.nanogpt:
        given.nanogpt = given.nanogpt.resolve()
        given.intermediate_size = given.intermediate_size or as_large_as_nanogpt(given)
    given.output = given.runners = None
    seconds: dict[str, list[float]] = {runner: [] for runner in runners}
    for repeat in range(given.repeats):
        for runner in runners:
            seconds[runner].append(launch(runner, given))
            print(f"repeat {repeat + 1}: {runner} {1e3 * seconds[runner][-1]:.1f} ms", file=sys.stderr, flush=True)
    ours = seconds[runners[0]]
    rows = [
        f"{runner:12} {machine.spread([1e3 * s for s in times], 1):26}"
        f" {machine.spread([a / b for a, b in zip(ours, times, strict=True)])}"
        for runner, times in seconds.items()
    ]
    inner = f" (inner width {given.intermediate_size})" if given.intermediate_size else ""
    table = "\n".join(
        (
            machine.describe(),
            "",
            f"decoder of {given.layers} layers x {given.hidden_size}{inner},"
            f" {given.batch} x {given.length} tokens a rank, {given.ranks} ranks of {given.threads} thread,"
            f" {given.precision}, {given.controller};"
            f" {given.repeats} interleaved launches of {given.steps} steps; median [quartiles]",
            "",
            "runner       ms a step                  hvdtrain's time / this one's",
            *rows,
        )
    )
    print(table)
    if output:
        output.write_text(table + "\n")


if __name__ == "__main__":
    main()
