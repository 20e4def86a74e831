"""What other work on the machine costs: the choice of threads, and the clock of --minutes.

    python tests/bench/beside.py threads [--loops 2] [--pairs 3]
    python tests/bench/beside.py minutes --data TEXT [--minutes 1 3] [--loops 1] [--pairs 3]

OpenMP's threads wait for each other, so if another process wants one of the cores, two threads may
be slower than one. `threads` trains with one thread, with all, and with as many as the program
chooses (`--threads 0`), in turn, on a quiet machine and next to busy loops. `minutes` times whole
processes and prints their model size and number of steps.
"""

import argparse
import contextlib
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import datetime
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[2] / "llm_pipeline.py"
FLAGS = ["--preset", "cpu-debug", "--device", "cpu", "--compile", "off", "--log_interval", "1"]
FLAGS += ["--eval_interval", "100000", "--eval_batches", "1", "--save_interval", "100000"]


@contextlib.contextmanager
def busy_loops(n: int):
    """`n` processes that do nothing but count."""
    command = [sys.executable, "-c", "while True: pass"]
    loops = [subprocess.Popen(command) for _ in range(n)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def train(work: str, data: Path, *flags) -> Path:
    """Train in a separate process; returns the run's folder."""
    folders = ["--data_dir", data, "--out_dir", f"{work}/run", "--processed_dir", f"{work}/st"]
    command = [sys.executable, PROGRAM, "train", *folders, *map(str, flags)]
    subprocess.run(command, check=True, capture_output=True, cwd=work)
    return Path(work, "run")


def steps_per_second(data: Path, threads: int, steps: int) -> float:
    """Measured over the second half of a run."""
    with tempfile.TemporaryDirectory() as work:
        run = train(work, data, *FLAGS, "--threads", threads, "--max_steps", steps)
        with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    times = [datetime.fromisoformat(row["timestamp"]).timestamp() for row in rows]
    half = len(times) // 2
    return (len(times) - 1 - half) / (times[-1] - times[half])


def compare_threads(options: argparse.Namespace) -> None:
    speeds = defaultdict(list)
    for _ in range(options.pairs):
        for loops in (0, options.loops):
            for threads in (1, os.cpu_count(), 0):
                with busy_loops(loops):
                    speed = steps_per_second(options.data, threads, options.steps)
                speeds[loops, threads].append(speed)
                print(f"{loops} loops, --threads {threads}: {speed:.2f} steps/s", flush=True)
    print()
    for (loops, threads), found in speeds.items():
        print(f"{loops} loops, --threads {threads}: median {statistics.median(found):.2f}")


def keep_time(options: argparse.Namespace) -> None:
    for minutes in options.minutes:
        for loops in (0, options.loops):
            for _ in range(options.pairs):
                with busy_loops(loops), tempfile.TemporaryDirectory() as work:
                    started = time.perf_counter()
                    run = train(work, options.data, "--minutes", minutes)
                    seconds = time.perf_counter() - started
                    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
                size = f"{config['n_layer']} x {config['n_embd']}, {config['max_steps']} steps"
                print(f"--minutes {minutes:g}, {loops} loops: {seconds:.1f} s, {size}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["threads", "minutes"])
    parser.add_argument("--data", type=Path, default=PROGRAM.with_name("README.md"))
    parser.add_argument("--loops", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 3])
    options = parser.parse_args()
    options.data = options.data.resolve()
    {"threads": compare_threads, "minutes": keep_time}[options.what](options)


if __name__ == "__main__":
    main()
