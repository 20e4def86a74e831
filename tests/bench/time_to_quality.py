"""Steps and wall-clock to a validation loss: --recipe fast against --recipe classic.

    python tests/bench/time_to_quality.py --data tinyshakespeare/input.txt

Each run is a whole process, start-up and evaluation included, the two recipes in turns. The sizes
are nanoGPT's CPU settings (4 layers, 4 heads, 128 wide, context 64, batch 12, no dropout), with
which nanoGPT reaches 1.8857 nats a character after 1.54 M tokens.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "llm_pipeline.py"
SHAPE = ["--n_layer", "4", "--n_head", "4", "--n_embd", "128", "--block_size", "64",
         "--batch_size", "12", "--dropout", "0", "--tokenizer", "byte"]  # fmt: skip


def one_run(data: Path, out_dir: Path, seed: int, threads: int, *flags: str) -> tuple[float, float]:
    """(seconds, last validation loss over the whole validation part) of a training process."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, PROGRAM, "train", "--data_dir", data, "--out_dir", out_dir, *SHAPE,
         "--seed", str(seed), "--threads", str(threads), "--eval_interval", "100000",
         "--eval_batches", "0", "--save_interval", "100000", *flags],
        check=True, capture_output=True, cwd=out_dir.parent,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    seconds = time.perf_counter() - started
    with open(out_dir / "metrics.csv", newline="", encoding="utf-8") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["split"] == "val"]
    return seconds, losses[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--fast_steps", type=int, default=180)
    parser.add_argument("--more_steps", type=int, nargs="*", default=[390, 507])
    parser.add_argument("--classic_steps", type=int, default=1400)
    parser.add_argument("--classic_lr", default="3e-3")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    fast = {f"fast, {n} steps": ["--recipe", "fast", "--max_steps", str(n)]
            for n in (options.fast_steps, *options.more_steps)}  # fmt: skip
    classic = {f"classic, {options.classic_steps} steps": [
        "--recipe", "classic", "--lr", options.classic_lr, "--max_steps",
        str(options.classic_steps)]}  # fmt: skip
    figures: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as work:
        # The token store is made before the clock starts: both sides find it there.
        one_run(options.data.resolve(), Path(work) / "warm", 0, options.threads, "--max_steps", "1")
        for seed in range(options.seeds):
            for name, flags in (fast | classic).items():
                out_dir = Path(work) / f"{name}-{seed}".replace(", ", "-").replace(" ", "-")
                result = one_run(options.data.resolve(), out_dir, seed, options.threads, *flags)
                figures.setdefault(name, []).append(result)
                print(
                    f"seed {seed}  {name:<24}{result[0]:>8.1f} s  loss {result[1]:.4f}", flush=True
                )
    print(f"\n{'mean of seeds':<24}{'M tokens':>10}{'seconds':>10}{'loss':>10}")
    for name, results in figures.items():
        seconds, losses = zip(*results, strict=True)
        tokens = int(name.split()[1]) * 12 * 64 / 1e6
        print(f"{name:<24}{tokens:>10.3f}{statistics.mean(seconds):>10.1f}"
              f"{statistics.mean(losses):>10.4f}")  # fmt: skip
    sides = next(iter(fast)), next(iter(classic))
    first, last = (statistics.mean(s for s, _ in figures[name]) for name in sides)
    print(f"time of {sides[0]} over {sides[1]}: {first / last:.3f}")


if __name__ == "__main__":
    main()
