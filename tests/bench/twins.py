"""What each faster twin of section 9 gains on this CPU: steps and decoding with and without it.

    python tests/bench/twins.py [--rounds 15] [--threads 2]

Each task runs with all twins and, alternating with that, without each of them. A row gives how many
times as long a step then takes: the median over rounds. It leaves out twins that a task cannot use.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import llm_pipeline as lp

PLAIN = {"adamw": torch.optim.AdamW, "muon": lp.Muon}
# A task: flags of `bench`, size of the vocabulary, twins that it may use.
STEPS = {
    "classic, cpu-debug": ("--preset cpu-debug", 260, ("dropout", "attention_sdpa", "adamw")),
    "fast, cpu-debug, 1,024 ids": (
        "--preset cpu-debug --n_layer 4 --batch_size 16 --recipe fast", 1024,
        ("attention_sdpa", "newton_schulz", "muon", "adamw"),
    ),
    "fast, the same, 8,192 ids": (
        "--preset cpu-debug --n_layer 4 --batch_size 16 --recipe fast", 8192, ("head_loss",),
    ),
    "classic, tiny-8g, batch 4, 50,257 ids": (
        "--preset tiny-8g --batch_size 4", 50257, ("dropout", "attention_sdpa", "head_loss"),
    ),
}  # fmt: skip


def stepper(config, rt, vocab_size: int, without: str) -> Callable:
    """A function that takes a training step without one of the twins ("": with all)."""
    lp.set_seed(1)
    model = lp.GPT(lp.model_config(config, vocab_size))
    kinds = lp.OPTIMIZERS | ({without: PLAIN[without]} if without in PLAIN else {})
    run = lp.Run(
        config, rt, model, model.losses, lp.next_token_loss,
        lp.make_optimizers(model, config, kinds), None, None, None, lp.Progress(total=10**9),
        torch.amp.GradScaler("cpu", enabled=False),
    )  # fmt: skip
    ids = torch.randint(vocab_size, (config.batch_size, config.block_size + 1))
    batch = lp.Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    return lambda: lp.train_step(run, batch)


def decoder(config, rt, without: str) -> Callable:
    """A function that decodes 64 tokens."""
    lp.set_seed(1)
    model = lp.for_decoding(lp.GPT(lp.model_config(config, 260)), rt.device, rt.dtype)
    idx = torch.arange(64)[None]
    return lambda: list(lp.generate(model, idx, 64, temperature=0.0))


def in_turns(sides: dict[str, Callable], rounds: int) -> Iterator[tuple[str, float, float]]:
    """(twin left out, median of its times over those with all, seconds) of each side."""
    twins, seconds = dict(lp.KERNELS), {name: [] for name in sides}
    for number, (name, side) in itertools.product(range(rounds + 2), sides.items()):
        if (name, "cpu") in lp.KERNELS:
            del lp.KERNELS[name, "cpu"]
        began = time.perf_counter()
        side()
        if number > 1:  # two rounds warm up
            seconds[name].append(time.perf_counter() - began)
        lp.KERNELS.update(twins)
    for name, took in seconds.items():
        ratios = [a / b for a, b in zip(took, seconds[""], strict=True)]
        yield name, statistics.median(ratios), statistics.median(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    for task, (flags, vocab_size, twins) in STEPS.items():
        config = lp.parse(["bench", "--threads", str(options.threads), *flags.split()])[1]
        with lp.runtime(config) as rt:
            sides = {name: stepper(config, rt, vocab_size, name) for name in ("", *twins)}
            print(f"{task}, {str(rt.dtype)[6:]}")
            for name, ratio, seconds in in_turns(sides, options.rounds):
                what = f"without {name}" if name else "with all"
                print(f"  {what:<24}{1e3 * seconds:>9.1f} ms{ratio:>8.2f}", flush=True)
    config = lp.parse(["bench", "--preset", "tiny-8g", "--threads", str(options.threads)])[1]
    with lp.runtime(config) as rt:
        sides = {name: decoder(config, rt, name) for name in ("", "attention_sdpa")}
        print("decoding, tiny-8g, 64 tokens behind 64")
        for name, ratio, seconds in in_turns(sides, options.rounds):
            what = f"without {name}" if name else "with all"
            print(f"  {what:<24}{1e3 * seconds:>9.1f} ms{ratio:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
