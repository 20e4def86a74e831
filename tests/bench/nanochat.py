"""Against karpathy/nanochat and jingyaogong/minimind: bits per byte of the same held-out text.

    git clone https://github.com/karpathy/nanochat     # pip install rustbpe tiktoken pyarrow pyyaml
    git clone https://github.com/jingyaogong/minimind  # pip install transformers datasets
    python tests/bench/nanochat.py --nanochat nanochat --minimind minimind --data FILE 2>log

Each has 4 layers of 256, a context of 128, batches of 16, and the same number of trained tokens and
threads, but its own architecture, optimizer, rates and schedule. Ours and nanochat each train a
vocabulary of 2,048, which counts in their time; minimind comes with 6,400. Tokens therefore differ,
but bits per byte and seconds are comparable. The text is cut after sentences into pieces that fit
the context, since nanochat's loader drops what does not; every tenth story is held out. All are
scored alike: each held-out piece by itself, after a beginning-of-text token (nanochat's own figures
are for rows as its loader packs them). The others have no flag for a seed, so for them it changes
only the order of the pieces.

Seconds are of whole processes, start-up included; nanochat evaluates five times on the way, ours
four times. nanochat compiles in every run: its third figure leaves out the extra time of its first
evaluation and first ten steps. To reach another's bits per byte, ours runs again with fewer steps
(the first of --parts that gets there); the third figure is the ratio of their seconds to ours.
"""

import argparse
import itertools
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

PROGRAM = Path(__file__).resolve().parents[2] / "llm_pipeline.py"
OURS = "--preset cpu-debug --recipe fast --n_layer 4 --batch_size 16 --tokenizer bpe "
OURS += "--vocab_size 2048 --eval_batches 20 --overwrite"
NANOCHAT = "--device-type cpu --depth 4 --aspect-ratio 64 --head-dim 64 --window-pattern L "
NANOCHAT += "--max-seq-len 128 --device-batch-size 16 --total-batch-size 2048 "
NANOCHAT += f"--eval-tokens {20 * 2048} --core-metric-every -1 --sample-every -1"
MINIMIND = "--hidden_size 256 --num_hidden_layers 4 --max_seq_len 128 --batch_size 16 --epochs 1 "
MINIMIND += "--accumulation_steps 1 --num_workers 0 --device cpu --data_path ../dataset/text.jsonl"


def pieces(text: str, limit: int = 300) -> tuple[list[str], list[str]]:
    """The pieces that train and those that are held out, none twice."""
    cut: tuple[dict, dict] = {}, {}
    for i, story in enumerate(re.split(r"\s*<\|endoftext\|>\s*|\n\s*\n", text.strip())):
        piece = ""
        for sentence in [*re.split(r"(?<=[.!?\"])\s+", story), " " * limit]:
            if len(f"{piece} {sentence}".encode()) > limit:
                cut[i % 10 == 9][piece] = None
                piece = ""
            piece = f"{piece} {sentence}".strip()
    train, held = ([piece for piece in part if 0 < len(piece.encode()) <= limit] for part in cut)
    return train, [piece for piece in held if piece not in cut[0]]


def timed(command: list, cwd: Path, threads: int, **more) -> tuple[float, list]:
    """(seconds, [(when, line)] of stdout) of a Python process."""
    more |= {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads, "PYTHONUNBUFFERED": 1}
    env = os.environ | {"HF_HOME": str(cwd / "hf")} | {name: str(more[name]) for name in more}
    command, started = [sys.executable, *map(str, command)], time.perf_counter()
    with subprocess.Popen(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE) as process:
        lines = [(time.perf_counter() - started, line) for line in process.stdout]
    if process.returncode:
        raise SystemExit(f"{command} failed:\n{''.join(line for _, line in lines[-20:])}")
    return time.perf_counter() - started, lines


def bits_a_byte(model, encode, held: list[str]) -> float:
    """encode: text -> ids after a bos; model: ids (B, T) -> logits (B, T, V)."""
    ids, nats = sorted((torch.tensor(encode(piece)) for piece in held), key=len), 0.0
    pad = torch.nn.utils.rnn.pad_sequence
    with torch.no_grad():
        for rows in (ids[i : i + 32] for i in range(0, len(ids), 32)):
            logits = model(pad([row[:-1] for row in rows], True)).float()
            y = pad([row[1:] for row in rows], True, -100)
            nats += float(torch.nn.functional.cross_entropy(logits.mT, y, reduction="sum"))
    return nats / math.log(2) / sum(len(piece.encode()) for piece in held)


def ours(work: Path, options, seed: int, steps: int) -> tuple[float, float]:
    """(bits per byte, seconds); no run finds a token store."""
    where = ["--data_dir", "text", "--processed_dir", f"stores{steps}"]
    run = ["--seed", seed, "--max_steps", steps, "--eval_interval", -(-steps // 4)]
    run += ["--threads", options.threads, "--out_dir", "run", *where, *OURS.split()]
    seconds, _ = timed([PROGRAM, "train", *run], work, options.threads)
    score = ["eval", "--ckpt", "run/last.pth", *where, "--json", "eval.json"]
    timed([PROGRAM, *score, "--threads", options.threads], work, options.threads)
    found = json.loads((work / "eval.json").read_text())
    assert found["bytes"] == sum(len(piece.encode()) for piece in options.held)
    return found["bits_per_byte"], seconds


def nanochat(work: Path, options, steps: int) -> tuple[float, float, float]:
    """(bits per byte, seconds, seconds without compilation)"""
    import pyarrow
    from pyarrow import parquet

    (work / "wandb.py").touch()
    (work / "base_data_climbmix").mkdir()  # its last file is held out
    for name, part in ("0", options.train), ("1", options.held):
        file = work / "base_data_climbmix" / f"{name}.parquet"
        parquet.write_table(pyarrow.table({"text": part}), file, row_group_size=500)
    env = {"NANOCHAT_BASE_DIR": work, "TORCHINDUCTOR_CACHE_DIR": work / "compiled"}
    env["PYTHONPATH"] = f"{options.nanochat}{os.pathsep}{work}"
    run = ["-m", "scripts.tok_train", "--vocab-size", 2048]
    first, _ = timed(run, work, options.threads, **env)
    run = ["-m", "scripts.base_train", "--num-iterations", steps, "--eval-every", -(-steps // 4)]
    second, lines = timed([*run, *NANOCHAT.split()], work, options.threads, **env)
    said = "".join(line for _, line in lines)
    curve = re.findall(r"Step (\d+) \| Validation bpb: ([\d.]+)", said)
    print("nanochat's own bits a byte:", *(f"step {int(step)} {bits}," for step, bits in curve))
    dts = [float(ms) / 1000 for ms in re.findall(r"dt: ([\d.]+)ms", said)]
    evals = [b - a for (a, _), (b, line) in itertools.pairwise(lines) if "Validation bpb" in line]
    compiling = sum(dts[:10]) - 10 * statistics.median(dts[10:])
    compiling += evals[0] - statistics.median(evals[1:])
    sys.path.insert(0, str(options.nanochat))
    os.environ["NANOCHAT_BASE_DIR"] = str(work)
    from nanochat.checkpoint_manager import load_model

    model, tokenizer, _ = load_model("base", torch.device("cpu"), phase="eval")
    bits = bits_a_byte(model, lambda text: tokenizer(text, prepend="<|bos|>"), options.held)
    return bits, first + second, first + second - compiling


def minimind(work: Path, options, steps: int) -> tuple[float, float]:
    """(bits per byte, seconds); it pads each piece, and padding is not a trained token."""
    from transformers import AutoTokenizer

    for name in ("trainer", "model", "dataset"):  # it writes next to them
        shutil.copytree(options.minimind / name, work / name)
    tokenizer, left = AutoTokenizer.from_pretrained(work / "model"), steps * 16 * 128
    with open(work / "dataset/text.jsonl", "w") as file:
        for piece in itertools.cycle(options.train):
            left -= len(tokenizer(piece).input_ids) + 1  # that many targets
            if left < 0:
                break
            file.write(json.dumps({"text": piece}) + "\n")
    run = ["train_pretrain.py", *MINIMIND.split()]
    seconds, _ = timed(run, work / "trainer", options.threads)
    sys.path.insert(0, str(options.minimind))
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=256, num_hidden_layers=4)).eval()
    model.load_state_dict(torch.load(work / "out/pretrain_256.pth"))
    encode = lambda text: tokenizer(tokenizer.bos_token + text).input_ids  # noqa: E731
    return bits_a_byte(lambda ids: model(ids).logits, encode, options.held), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("--nanochat", "--minimind"):
        parser.add_argument(name, type=lambda name: Path(name).resolve(), help="its clone")
    parser.add_argument("--data", type=Path, required=True, help="stories between <|endoftext|>")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=550, help="of 2,048 tokens; at least 12")
    parser.add_argument("--parts", type=float, nargs="*", default=[0.4, 0.55, 0.7, 0.85])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    rows: dict[str, list] = {}

    def note(name: str, *found: float) -> None:
        rows.setdefault(name, []).append(found)
        print(f"{name:<28}", *(f"{x:>9.4g}" for x in found), flush=True)

    train, options.held = pieces(options.data.read_text(encoding="utf-8"))
    others = [other for other in (nanochat, minimind) if getattr(options, other.__name__)]
    print(f"{len(train)} pieces train, {len(options.held)} are held out: bits a byte, seconds")
    for seed in options.seeds:
        options.train = random.Random(seed).sample(train, len(train))
        with tempfile.TemporaryDirectory() as name:
            print(f"seed {seed}")
            work = Path(name).resolve()
            for part, texts in ("train", options.train), ("valid", options.held):
                (work / "text").mkdir(exist_ok=True)
                lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
                (work / "text" / f"{part}.jsonl").write_text(lines)
            runs = {1.0: ours(work, options, seed, options.steps)}
            note("ours", *runs[1.0])
            for other in others:
                (work / other.__name__).mkdir()
                bits, seconds, *rest = other(work / other.__name__, options, options.steps)
                note(other.__name__, bits, seconds, *rest)
                for part in sorted({*options.parts, 1.0}):
                    if part not in runs:
                        runs[part] = ours(work, options, seed, round(part * options.steps))
                    if runs[part][0] <= bits:
                        note(f"ours to {other.__name__}'s", *runs[part], seconds / runs[part][1])
                        break
                else:
                    print(f"ours does not come to {other.__name__}'s bits a byte")
    print("medians")
    for name, found in rows.items():
        medians = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"{name:<28}", *(f"{x:>9.4g}" for x in medians), f"  of {len(found)}")


if __name__ == "__main__":
    main()
