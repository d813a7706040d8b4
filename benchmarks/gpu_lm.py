"""One command on a GPU machine: set up, check, and measure the model of the size of GPT-2 small in bf16.

    python3 benchmarks/gpu_lm.py --nanogpt DIR --output benchmarks/results/gpu_lm.txt

Runs `launch/setup.sh`, `doctor`, the tests in tests/gpu, `bench lm-124m`, which tells step time by part, tokens/s, MFU
and what each setting does, on one GPU and then on all; then speed.py: a model of that size against the bare loops, and
against nanoGPT's loop where a clone of it is given. Parts of it were run, on one H100: results/gpu_h100.txt.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PYTHON = str(REPOSITORY / ".venv" / "bin" / "python")


def run(title: str, words: list[str], timeout_s: int, output: list[str]) -> None:
    """Run a command in the repository, show and keep what it says."""
    output.append(f"== {title}: {' '.join(Path(word).name if '/' in word else word for word in words)}")
    print(output[-1], flush=True)
    done = subprocess.run(
        words, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s
    )
    output += [done.stdout.rstrip(), f"exit code {done.returncode}", ""]
    print(done.stdout, flush=True)
    if done.returncode:
        sys.exit(f"{title} ended with {done.returncode}")


def main() -> None:
    """Set up, check, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--nanogpt", type=Path, help="a clone of github.com/karpathy/nanoGPT")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    output: list[str] = []
    run("setup", ["launch/setup.sh"], 3600, output)
    asked = [PYTHON, "-c", "import torch; print(torch.cuda.device_count())"]
    count = int(subprocess.run(asked, capture_output=True, text=True, check=True, timeout=120).stdout)
    if count == 0:
        sys.exit("this torch sees no GPU: see what `python -m hvdtrain doctor` says")
    run("doctor", [PYTHON, "-m", "hvdtrain", "doctor"], 300, output)
    run("tests", [PYTHON, "-m", "pytest", "-q", "tests/gpu"], 1800, output)
    settings = ["--train.micro-batch-size", str(given.micro_batch), "--train.accum-steps", "1"]
    for ranks in dict.fromkeys((1, count)):
        start = [str(Path(PYTHON).with_name("horovodrun")), "-np", str(ranks)] if ranks > 1 else []
        run(f"bench on {ranks}", [*start, PYTHON, "-m", "hvdtrain", "bench", "lm-124m", *settings], 3600, output)
    shape = ["--layers", "12", "--hidden-size", "768", "--heads", "12", "--length", "1024", "--precision", "bf16"]
    shape += ["--vocab-size", "50304", "--compile", "blocks", "--steps", "60", "--batch", str(given.micro_batch)]
    nanogpt = ["--nanogpt", str(given.nanogpt)] if given.nanogpt else []
    for ranks in dict.fromkeys((1, count)):
        compare = [PYTHON, "benchmarks/speed.py", "--ranks", str(ranks), *shape, *nanogpt]
        run(f"speed on {ranks}", compare, 3600, output)
    if given.output:
        given.output.write_text("\n".join(output) + "\n")


if __name__ == "__main__":
    main()
