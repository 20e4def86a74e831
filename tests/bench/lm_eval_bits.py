"""Bits per byte from `eval` and from EleutherAI's lm_eval on the same text: they must agree.

    pip install lm_eval
    python tests/bench/lm_eval_bits.py --ckpt ckpts/best.pth --text data/raw/input.txt

Exports the checkpoint, writes the text as a JSON Lines file with an lm_eval task for it (kept in
--out_dir, for use with `lm_eval --model hf --include_path`), and prints both figures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[2] / "llm_pipeline.py"
TASK = """\
task: local_text
dataset_path: json
dataset_kwargs:
  data_files: {{train: {file}}}
output_type: loglikelihood_rolling
test_split: train
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""


def documents(path: Path, count: int) -> list[str]:
    """Distinct pieces of a text, one to five paragraphs each: shorter and longer than a block."""
    paragraphs = iter(dict.fromkeys(path.read_text(encoding="utf-8").split("\n\n")))
    pieces = ("\n\n".join(itertools.islice(paragraphs, i % 5 + 1)) for i in range(count))
    return list(dict.fromkeys(piece for piece in pieces if piece.strip()))


def pipeline(*argv) -> None:
    subprocess.run([sys.executable, PROGRAM, *map(str, argv)], check=True, stdout=sys.stderr)


def our_figures(ckpt: str, corpus: Path, folder: Path) -> dict:
    where = ["--data_dir", corpus, "--processed_dir", folder, "--split", "all"]
    pipeline("eval", "--ckpt", ckpt, *where, "--json", folder / "eval.json")
    return json.loads((folder / "eval.json").read_text(encoding="utf-8"))


def their_bits(ckpt: str, corpus: Path, folder: Path) -> float:
    import lm_eval
    from lm_eval.tasks import TaskManager

    pipeline("export", "--ckpt", ckpt, "--out_dir", folder / "hf")
    task = TASK.format(file=json.dumps(str(corpus)))
    (folder / "local_text.yaml").write_text(task, encoding="utf-8")
    model = {"pretrained": str(folder / "hf"), "dtype": "float32"}
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    results = lm_eval.simple_evaluate(
        "hf", model_args=model, tasks=["local_text"], task_manager=tasks, device="cpu",
        bootstrap_iters=0,
    )  # fmt: skip
    return results["results"]["local_text"]["bits_per_byte,none"]


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--ckpt", default="ckpts/best.pth", help="a checkpoint for `export`")
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text file")
    parser.add_argument("--docs", type=int, default=100, help="documents to score")
    parser.add_argument("--out_dir", type=Path, help="keep the export and the task here")
    args = parser.parse_args(argv)
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        print(f"error: {error}: pip install lm_eval", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.out_dir or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        corpus = folder / "documents.jsonl"
        lines = [json.dumps({"text": text}) + "\n" for text in documents(args.text, args.docs)]
        corpus.write_text("".join(lines), encoding="utf-8")
        try:
            ours = our_figures(args.ckpt, corpus, folder)
            theirs = their_bits(args.ckpt, corpus, folder)
        except subprocess.CalledProcessError as error:
            return error.returncode  # the program has said why
    difference = abs(ours["bits_per_byte"] - theirs)
    print(f"documents {len(lines)}, bytes {ours['bytes']}")
    print(f"eval      {ours['bits_per_byte']:.6f} bits per byte")
    print(f"lm_eval   {theirs:.6f} bits per byte")
    print(f"difference {difference:.1e}: {'equal' if difference < 1e-4 else 'NOT EQUAL'}")
    return 0 if difference < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
