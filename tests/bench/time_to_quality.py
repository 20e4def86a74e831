"""Wall-clock time to a validation loss on tinyshakespeare: both recipes, and nanoGPT.

    python tests/bench/time_to_quality.py --data tinyshakespeare/input.txt [--nanogpt FOLDER]

Each run is a whole process: start-up, tokenizing, its own vocabulary, training and the report at
the end. Rows take turns, seed by seed. Losses are `eval`'s bits per byte over the whole validation
part, in nats. FOLDER: a checkout of nanoGPT in which data/shakespeare_char has been prepared. There
2,000 steps with its CPU settings (4 layers of 128, context 64, batch 12, no dropout) reach 1.8857
nats per character; its GPU settings, three minutes on an A100, reach 1.4697.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[2] / "llm_pipeline.py"
NANO = "--n_layer 4 --n_head 4 --n_embd 128 --block_size 64 --batch_size 12 --dropout 0 "
NANO += "--tokenizer byte "
ROWS = {
    "fast, a vocabulary of its own": "--recipe fast --n_layer 2 --n_head 2 --n_embd 128 "
    "--block_size 64 --batch_size 12 --max_steps 70",
    "fast, bytes": NANO + "--recipe fast --max_steps 160",
    "classic, bytes": NANO + "--lr 5e-3 --max_steps 1150",
    "fast, to the GPU's loss": "--recipe fast --preset cpu-debug --n_layer 4 --batch_size 16 "
    "--max_steps 400",
}
THEIRS = "--device=cpu --compile=False --eval_iters=20 --log_interval=500 --block_size=64 "
THEIRS += "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
THEIRS += "--lr_decay_iters=2000 --dropout=0.0"


def timed(command: list, threads: int, cwd: Path) -> tuple[float, str]:
    """(seconds, stdout) of a process."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=env, check=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    return time.perf_counter() - started, done.stdout


def ours(flags: str, data: Path, seed: int, threads: int) -> tuple[float, float]:
    """(seconds, nats per byte) of a run, which finds no token store."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        common = ["--data_dir", data, "--processed_dir", work / "stores", "--threads", threads]
        quiet = ["--eval_interval", 10**6, "--eval_batches", 0, "--save_interval", 10**6]
        train = ["train", *common, "--out_dir", work / "run", "--seed", seed, *quiet]
        seconds, _ = timed([PROGRAM, *train, *flags.split()], threads, work)
        result = work / "eval.json"
        score = ["eval", *common, "--ckpt", work / "run/best.pth", "--json", result]
        timed([PROGRAM, *score], threads, work)
        return seconds, json.loads(result.read_text())["bits_per_byte"] * math.log(2)


def nanogpt(folder: Path, threads: int) -> tuple[float, float]:
    """(seconds, nats per character) with its CPU settings."""
    command = ["train.py", "config/train_shakespeare_char.py", *THEIRS.split()]
    seconds, said = timed(command, threads, folder)
    return seconds, float(re.findall(r"val loss ([\d.]+)", said)[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--nanogpt", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, "nanoGPT"], default=[*ROWS, "nanoGPT"])
    options = parser.parse_args()
    figures: dict[str, list[tuple[float, float]]] = {}
    for seed in range(1, options.seeds + 1):
        for name in options.rows:
            if name in ROWS:
                found = ours(ROWS[name], options.data.resolve(), seed, options.threads)
            elif options.nanogpt:
                found = nanogpt(options.nanogpt, options.threads)
            else:
                continue
            figures.setdefault(name, []).append(found)
            print(f"seed {seed}  {name:<32}{found[0]:>8.1f} s  {found[1]:.4f}", flush=True)
    print(f"\n{'':<32}{'seconds, median':>16}{'nats, mean':>12}{'from':>9}{'to':>8}")
    for name, found in figures.items():
        seconds, losses = zip(*found, strict=True)
        print(f"{name:<32}{statistics.median(seconds):>16.1f}{statistics.mean(losses):>12.4f}"
              f"{min(losses):>9.4f}{max(losses):>8.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
