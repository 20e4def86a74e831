"""Speed of `prepare`: WikiText-2 with GPT-2's vocabulary, against the bare libraries; and bytes.

    LLM_PIPELINE_DATA=FOLDER python tests/bench/prepare.py [--rounds 5]

All sides take turns in this process, and the medians are printed. `prepare` is timed from the raw
file to the finished store; the libraries from text in memory to ids in memory.
"""

import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import tiktoken
import tokenizers
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

import llm_pipeline as lp

PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
CHUNK = 1 << 20  # characters that the libraries are given at a time


def prepare(source: Path, tokenizer: str, out: Path) -> int:
    """Run `prepare` up to the finished store; returns its number of tokens."""
    flags = ["--data_dir", str(source), "--tokenizer", tokenizer]
    config = lp.parse(["prepare", *flags])[1]
    with contextlib.redirect_stderr(io.StringIO()):
        store = lp.build_corpus_from_sources(config=config, folder=out)
    return sum(len(ids) for ids in store.tokens.values())


def pieces(text: str) -> list[str]:
    """The text in parts of about a megabyte, split at line ends."""
    found, line = [], 0
    while line < len(text):
        end = text.find("\n", line + CHUNK) + 1 or len(text)
        found.append(text[line:end])
        line = end
    return found


def in_turns(sides: dict, rounds: int) -> dict[str, tuple[float, int]]:
    """Median seconds and the result of each side, after one round that does not count."""
    seconds, results = {name: [] for name in sides}, {}
    for number in range(rounds + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            results[name] = side(number)
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: (statistics.median(seconds[name]), results[name]) for name in sides}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    data = Path(os.environ.get("LLM_PIPELINE_DATA") or sys.exit("LLM_PIPELINE_DATA is unset"))
    source, bpe = data / "wikitext-2/wiki.train.tokens", data / "gpt2_bpe"
    parts = pieces(source.read_text(encoding="utf-8"))
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    ranks = data_gym_to_mergeable_bpe_ranks(str(bpe / "vocab.bpe"), str(bpe / "encoder.json"))
    tik = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    model = tokenizers.models.BPE.from_file(str(bpe / "encoder.json"), str(bpe / "vocab.bpe"))
    hf = tokenizers.Tokenizer(model)
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    threads = os.cpu_count()

    with tempfile.TemporaryDirectory() as folder:
        repeated = Path(folder, "bytes.txt")
        repeated.write_bytes(source.read_bytes() * 10)
        size = repeated.stat().st_size
        sides = {
            "prepare --tokenizer gpt2": lambda n: prepare(source, str(bpe), Path(folder, f"b{n}")),
            "tiktoken alone": lambda n: sum(
                map(len, tik.encode_ordinary_batch(parts, num_threads=threads))
            ),
            "tokenizers alone": lambda n: sum(len(e.ids) for e in hf.encode_batch_fast(parts)),
            "prepare --tokenizer byte": lambda n: prepare(repeated, "byte", Path(folder, f"a{n}")),
        }
        found = in_turns(sides, rounds)
    ours = found["prepare --tokenizer gpt2"]
    for name, (seconds, tokens) in found.items():
        if name.endswith("byte"):
            print(f"{name:<28}{size / seconds / 1e6:>10.1f} MB/s  {seconds:.2f} s, {size:,} bytes")
            continue
        ratio = (ours[1] / ours[0]) / (tokens / seconds)
        print(f"{name:<28}{tokens / seconds / 1e6:>10.3f} M tokens/s  {seconds:.2f} s, "
              f"prepare / this: {ratio:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
