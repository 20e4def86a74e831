"""What this program does on a GPU: one table, in under nine minutes.

    python tests/bench/gpu.py                    # all rows
    python tests/bench/gpu.py --only decode_8    # some rows; keeps the saved figures of the others
    python tests/bench/gpu.py --dry              # every row at toy size on the CPU

Nothing is downloaded: the text is tinyshakespeare/input.txt in the folder $LLM_PIPELINE_DATA, or
else generated, and then its loss is not comparable. Each row is a separate process with a time
limit; if one fails, the others still run. After each, gpu.json and gpu.md in --out_dir are updated.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from memory import write_text  # in this folder

PROGRAM = Path(__file__).resolve().parents[2] / "llm_pipeline.py"
TOTAL = 530  # seconds for all rows
PEER_LOSS = 1.4697  # nanoGPT on tinyshakespeare, 10.7 M parameters, three minutes of an A100
GPT2 = "--preset gpt2-124m --tokenizer bpe --vocab_size 50257 --rounds 3"
TOY = "--device cpu --dtype float32 --n_layer 1 --n_head 2 --n_embd 32 --block_size 32 "
TOY += "--batch_size 4 --grad_accum 1 "
TOY_OF = {"bench": TOY + "--rounds 1 --vocab_size 300", "train": TOY + "--max_steps 8"}


@dataclass(frozen=True)
class Row:
    """A measurement: the command's flags, its time limit, and the cells of the table."""

    name: str
    flags: str
    limit: int  # seconds
    shown: Callable[[dict, dict], str]  # from its figures, and those of the rows before it
    goal: str = ""


def training(row: dict, rows: dict) -> str:
    return (f"{row['train_tokens_per_s']:,.0f} tokens/s, MFU {row['mfu']:.1%}, "
            f"peak {row['peak_memory_bytes'] / 2**30:.2f} GiB, grad_accum {row['grad_accum']}, "
            f"checkpointing {row['grad_checkpointing']}")  # fmt: skip


def against_peer(row: dict, rows: dict) -> str:
    return f"{row['train_ratio']:.2f} x its tokens/s; {training(row, rows)}"


def decoding(row: dict, rows: dict) -> str:
    speed, limit = row["decode_tokens_per_s"], row["decode_limit_tokens_per_s"]
    return f"{speed:,.0f} tokens/s, {speed / limit:.1%} of the limit {limit:,.0f}"


def cost_of_determinism(row: dict, rows: dict) -> str:
    usual = rows.get(row["name"].replace("_deterministic", ""), {}).get("step_ms")
    step = f"{row['step_ms']:.2f} ms a step"
    return f"{step}, {row['step_ms'] / usual - 1:+.1%}" if usual else step


def time_to_loss(row: dict, rows: dict) -> str:
    reached = row["seconds_to_peer_loss"]
    return (f"best {row['best_loss']:.4f}, {row['params']:,} parameters, "
            + (f"{PEER_LOSS} after {reached:.0f} s" if reached else f"{PEER_LOSS} not reached")
            + f" of {row['seconds']:.0f} s, start-up and compilation included")  # fmt: skip


ROWS = [
    Row("tiny-8g", "bench --preset tiny-8g --vram_limit_gb 7.5", 60, training),
    Row("compact-8g", "bench --preset compact-8g --vram_limit_gb 7.5", 60, training),
    Row("small-16g", "bench --preset small-16g --vram_limit_gb 15", 60, training),
    Row("gpt2-124m", f"bench {GPT2}", 90, training, "MFU 50%"),
    Row("decode_1", f"bench {GPT2} --compile off", 60, decoding, "50% of the limit"),
    Row("decode_8", f"bench {GPT2} --compile off --decode_batch 8", 60, decoding,
        "50% of the limit"),
    Row("decode_1_compiled", f"bench {GPT2} --compile on", 120, decoding, "50% of the limit"),
    Row("time_to_loss", "train --recipe fast --tokenizer byte --n_layer 6 --n_head 6 --n_embd 384 "
        "--block_size 256 --batch_size 64 --dropout 0.2 --max_steps 1000 --eval_interval 100 "
        "--eval_batches 0 --compile on", 120, time_to_loss, "60 s"),
    Row("transformers", f"bench {GPT2} --vs hf", 120, against_peer, "1.5 x"),
    Row("tiny-8g_deterministic", "bench --preset tiny-8g --vram_limit_gb 7.5 --deterministic", 60,
        cost_of_determinism, "+10%"),
    Row("gpt2-124m_deterministic", f"bench {GPT2} --deterministic", 90,
        cost_of_determinism, "+10%"),
]  # fmt: skip


def command_of(row: Row, text: Path, work: Path, dry: bool) -> list[str]:
    command, *flags = row.flags.split()
    if command == "train":
        files = ["--data_dir", text, "--out_dir", work / "run", "--processed_dir", work / "stores"]
    else:
        files = ["--json", work / "bench.json"]
    toy = TOY_OF[command].split() if dry else []
    return [sys.executable, str(PROGRAM), command, *flags, *map(str, files), *toy]


def trained(folder: Path, started: float) -> dict:
    """Best loss of a run, its loss curve, and the seconds it took to match the peer."""
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "val"]
    times = [datetime.fromisoformat(row["timestamp"]).timestamp() - started for row in rows]
    curve = [(at, float(row["loss"])) for at, row in zip(times, rows, strict=True)]
    reached = [seconds for seconds, loss in curve if loss <= PEER_LOSS]
    return {"best_loss": min(loss for _, loss in curve), "curve": curve,
            "seconds_to_peer_loss": min(reached, default=None)}  # fmt: skip


def measure(row: Row, text: Path, dry: bool, limit: float) -> dict:
    """The figures of a row, or an `error`: the last line that its process wrote."""
    with tempfile.TemporaryDirectory() as name:
        work, started = Path(name), time.time()
        command = command_of(row, text, work, dry)
        result = {"name": row.name, "command": " ".join(["llm_pipeline.py", *command[2:]])}
        # At toy size, compiling would take longer than everything else.
        env = os.environ | ({"TORCHDYNAMO_DISABLE": "1"} if dry else {})
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=limit)
        except subprocess.TimeoutExpired:
            return result | {"error": f"not done after {limit:.0f} s"}
        result["seconds"] = time.time() - started
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            return result | {"error": said[-1][:300]}
        if command[2] == "train":
            sizes = [line for line in done.stderr.splitlines() if " parameters, " in line]
            params = sizes[-1].split(" parameters, ")[0].split()[-1].replace(",", "")
            return result | {"params": int(params)} | trained(work / "run", started)
        result |= json.loads((work / "bench.json").read_text(encoding="utf-8"))
        return result | {"notes": [line for line in done.stderr.splitlines() if "memory" in line]}


def table(rows: dict[str, dict], about: dict) -> str:
    """The results as Markdown."""
    device = next((row["device"] for row in rows.values() if "device" in row), "no device")
    lines = [f"{device}, torch {about['torch']}, text: {about['text']}", ""]
    lines += ["| row | result | goal | seconds |", "|---|---|---|---:|"]
    for row in ROWS:
        if found := rows.get(row.name):
            failed = f"failed: {found.get('error')}"
            cell = failed if "error" in found else row.shown(found, rows)
            lines.append(f"| {row.name} | {cell} | {row.goal} | {found.get('seconds', 0):.0f} |")
    return "\n".join([*lines, "", *(f"    {row['command']}" for row in rows.values())]) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--only", nargs="+", choices=[row.name for row in ROWS], metavar="ROW")
    parser.add_argument("--out_dir", type=Path, default=Path("gpu_results"))
    options = parser.parse_args(argv)
    options.out_dir.mkdir(parents=True, exist_ok=True)
    saved = options.out_dir / ("dry.json" if options.dry else "gpu.json")
    rows = json.loads(saved.read_text())["rows"] if options.only and saved.exists() else {}
    end = time.monotonic() + TOTAL
    with tempfile.TemporaryDirectory() as work:
        text = Path(os.environ.get("LLM_PIPELINE_DATA", "")) / "tinyshakespeare" / "input.txt"
        if not text.exists():
            text = write_text(Path(work) / "generated.txt", 1, "words")
        version = subprocess.run([sys.executable, "-c", "import torch; print(torch.__version__)"],
                                 capture_output=True, text=True).stdout.strip()  # fmt: skip
        about = {"torch": version, "text": "/".join(text.parts[-2:])}
        for row in ROWS:
            if row.name in (options.only or [row.name]):
                limit = min(row.limit, end - time.monotonic())
                rows[row.name] = (
                    measure(row, text, options.dry, limit) if limit > 5
                    else {"name": row.name, "command": row.flags, "error": "no time left"}
                )  # fmt: skip
                written = json.dumps(about | {"rows": rows}, indent=2)
                saved.write_text(written + "\n", encoding="utf-8")
                saved.with_suffix(".md").write_text(table(rows, about), encoding="utf-8")
                said = rows[row.name].get("error", "done")
                print(f"{row.name}: {said}", file=sys.stderr, flush=True)
    print(table(rows, about))


if __name__ == "__main__":
    main()
