"""Runs that were never trained: their directories, as a generator of metrics makes them up."""

import json
import math
import random

LOG = """\
2026-11-20 08:00:00,100 INFO hvdtrain 0.1.0: lm on {ranks} ranks, 1 host, started by hand
data:       made up: 1,000,000 training tokens
model:      Decoder, 672,768 parameters
2026-11-20 08:10:00,100 INFO warning: made up at step {half}
2026-11-20 09:00:00,100 INFO hvdtrain 0.1.0: lm on {ranks} ranks, 1 host, started by hand
2026-11-20 09:00:01,100 INFO continues at step {half} of {steps}, from somewhere
2026-11-20 10:00:00,100 INFO finished in 2h: loss 1
2026-11-20 10:00:01,100 INFO a sample: <b>once</b> upon a time
2026-11-20 10:00:02,100 INFO everything is in {folder}
"""


def make_run(
    folder,
    lines=200,
    every=10,
    ranks=2,
    seed=0,
    peak_lr=0.001,
    spike_at=None,
    evaluate_every=20,
    extra=(),
    slow_rank=None,
):
    """Make up the directory of a run of `lines` lines of training metrics; returns it.

    Args:
        spike_at: the number of a line whose loss is 1000.
        evaluate_every: lines of training between two of evaluation.
        extra: more metrics' names.
        slow_rank: a rank whose own time is twice the others'; with it, lines tell where time goes.
    """
    draw = random.Random(seed)
    steps = lines * every
    (folder / "logs").mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for number in range(1, lines + 1):
            line = _training(number, every, steps, draw, peak_lr, spike_at, extra)
            times = {} if slow_rank is None else _times(line["time/step_s"], ranks, slow_rank, draw)
            file.write(json.dumps({**line, **times}) + "\n")
            if number % evaluate_every == 0:
                loss = 2.5 + 3 * math.exp(-5 * number / lines)
                file.write(
                    json.dumps({"step": number * every, "val/loss": loss, "val/perplexity": math.exp(loss)}) + "\n"
                )
        file.write(json.dumps({"step": steps, "val/loss": 2.5, "time/train_s": 1.0, "event": "finished"}) + "\n")
    settings = (
        f"[train]\nsteps = {steps}\nseed = {seed}\n[optim]\npeak_lr = {peak_lr}\n[data]\npath = 'text <i>&</i>'\n"
    )
    (folder / "config.toml").write_text(settings)
    hosts = [{"host": f"node{rank // 8}", "pid": 100 + rank, "device": "CPU", "threads": 1} for rank in range(ranks)]
    environment = {"packages": {"torch": "2.13.0", "hvdtrain": "0.1.0"}, "python": "3.11.7", "ranks": hosts}
    (folder / "environment.json").write_text(json.dumps(environment))
    log = LOG.format(ranks=ranks, half=steps // 2, steps=steps, folder=folder)
    (folder / "logs" / "rank-000.log").write_text(log)
    for step in (steps // 2, steps):
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    return folder


def _training(number, every, steps, draw, peak_lr, spike_at, extra):
    step, share = number * every, number * every / steps
    seconds = 0.1 + 0.01 * draw.random()
    line = {
        "step": step,
        "train/epoch": share,
        "train/loss": 1000.0 if number == spike_at else 2.0 + 3 * math.exp(-5 * share) + 0.1 * draw.gauss(0, 1),
        "train/lr": peak_lr * (1 - share),
        "train/grad_norm": 1 + 0.2 * draw.random(),
        "throughput/tokens_per_s": 2048 / seconds,
        "time/step_s": seconds,
        "time/left_s": seconds * (steps - step),
    }
    return line | {name: draw.random() for name in extra}


def _times(step_s, ranks, slow_rank, draw):
    shares = {"data": 0.1, "compute": 0.5, "communication": 0.25, "optimizer": 0.1, "other": 0.05}
    own = [step_s * (0.9 if rank == slow_rank else 0.45) * (1 + 0.01 * draw.random()) for rank in range(ranks)]
    by_rank = {f"time/own_s/rank-{rank:03}": float(f"{seconds:.4g}") for rank, seconds in enumerate(own)}
    return {f"time/{part}_s": share * step_s for part, share in shares.items()} | by_rank
