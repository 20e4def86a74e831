"""What waiting threads cost while other work runs: training beside busy loops.

    python tests/bench/beside.py [--threads 2] [--loops 2] [--pairs 3]

OpenMP's threads spin while they wait for each other. On a core that another process wants, that
takes the time which the thread they wait for needs. GOMP_SPINCOUNT bounds the spinning. Settings
take turns, each quiet and beside busy loops; medians of steps a second are printed.
"""

import argparse
import contextlib
import csv
import os
import statistics
import subprocess
import sys
import tempfile
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


def steps_per_second(data: Path, threads: int, steps: int, spin: str) -> float:
    """Of the second half of a run in a process of its own."""
    with tempfile.TemporaryDirectory() as work:
        folders = ["--data_dir", data, "--out_dir", f"{work}/run", "--processed_dir", f"{work}/st"]
        more = ["--threads", str(threads), "--max_steps", str(steps)]
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": spin}
        subprocess.run([sys.executable, PROGRAM, "train", *folders, *FLAGS, *more],
                       check=True, capture_output=True, cwd=work, env=env)  # fmt: skip
        with open(f"{work}/run/metrics.csv", newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    times = [datetime.fromisoformat(row["timestamp"]).timestamp() for row in rows]
    half = len(times) // 2
    return (len(times) - 1 - half) / (times[-1] - times[half])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=PROGRAM.with_name("README.md"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--loops", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    data, speeds = options.data.resolve(), {}
    for _ in range(options.pairs):
        for loops in (0, options.loops):
            for spin in ("20000", "300000"):  # ours; libgomp's own
                with busy_loops(loops):
                    speed = steps_per_second(data, options.threads, options.steps, spin)
                speeds.setdefault((loops, spin), []).append(speed)
                print(f"{loops} loops, GOMP_SPINCOUNT {spin}: {speed:.2f} steps/s", flush=True)
    print()
    for (loops, spin), found in speeds.items():
        print(f"{loops} loops, GOMP_SPINCOUNT {spin:<12} median {statistics.median(found):.2f}")


if __name__ == "__main__":
    main()
