"""Costs that should not grow: those of training with the corpus, of decoding with the sequence.

    python tests/bench/cost.py [--sizes 1 1000] [--rounds 5]

Corpora are generated text of that many megabytes, prepared as bytes. Runs on them take turns; the
start-up time and speed printed are medians. Decoding is timed in one process, one token at a time,
at the end of a context of 1,024 against its beginning.
"""

import argparse
import csv
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from memory import run, write_text  # in this folder

import llm_pipeline as lp

MODEL = ["--n_layer", "4", "--n_head", "4", "--n_embd", "128", "--block_size", "128"]
MODEL += [
    "--batch_size",
    "16",
    "--dropout",
    "0",
    "--eval_batches",
    "1",
    "--eval_interval",
    "100000",
]
MODEL += ["--device", "cpu", "--save_interval", "100000", "--log_interval", "20", "--threads", "2"]


def training(folder: Path, sizes: list[int], rounds: int) -> None:
    """Print seconds of a one-step run and tokens a second of a longer one, by corpus size."""
    for size in sizes:
        text = write_text(folder / "text.txt", size, "words")
        run("prepare", "--data_dir", text, "--out_dir", folder / f"{size}")
        text.unlink()
    starts, speeds = ({size: [] for size in sizes} for _ in range(2))
    for _ in range(rounds):
        for size in sizes:
            flags = ["--data_dir", folder / f"{size}", "--out_dir", folder / "run", "--overwrite"]
            starts[size].append(run("train", *flags, *MODEL, "--max_steps", 1)[0])
            run("train", *flags, *MODEL, "--max_steps", 200)
            with open(folder / "run/metrics.csv", newline="", encoding="utf-8") as file:
                rows = [float(r["tokens_per_s"]) for r in csv.DictReader(file) if r["tokens_per_s"]]
            speeds[size].append(statistics.median(rows))
    for size in sizes:
        print(f"{size:>6} MB: start and one step {statistics.median(starts[size]):.2f} s, "
              f"{statistics.median(speeds[size]):,.0f} tokens/s", flush=True)  # fmt: skip


def decoding(rounds: int, block_size: int = 1024) -> None:
    """Print milliseconds per token in the first and in the last eighth of a context."""
    torch.set_num_threads(2)
    config = lp.GPTConfig(block_size=block_size, n_layer=6, n_head=8, n_embd=512)
    dtype = lp.pick_dtype("auto", torch.device("cpu"))
    model = lp.for_decoding(lp.GPT(config), torch.device("cpu"), dtype)
    part, first, last = block_size // 8, [], []
    for _ in range(rounds):
        times = [time.perf_counter()]
        for _ in lp.generate(model, torch.arange(1)[None], block_size - 1, temperature=0.0):
            times.append(time.perf_counter())
        steps = [b - a for a, b in itertools.pairwise(times)][1:]  # without the prefill
        first.append(statistics.median(steps[:part]))
        last.append(statistics.median(steps[-part:]))
    early, late = (1e3 * statistics.median(times) for times in (first, last))
    print(f"decoding: {early:.2f} ms a token at first, {late:.2f} at the end: {late / early:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 10, 1000], help="megabytes")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    decoding(options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        training(Path(folder), options.sizes, options.rounds)


if __name__ == "__main__":
    main()
