"""Peak memory of `prepare` on 100 MB and on 1 GB of text.

    python tests/bench/memory.py [--sizes 100 1000] [--kinds words chinese lines]

Each run is a separate process; its peak is what the operating system reports. Kinds: `words` is
English-like prose, `chinese` has no spaces, `lines` is split into one short record per line.
"""

import argparse
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[2] / "llm_pipeline.py"


def write_text(path: Path, megabytes: int, kind: str) -> Path:
    """Random text in which no two megabytes are the same."""
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwyp"
    if kind == "chinese":
        letters = "的一是不了人我在有他这中大来上国"
    words = ["".join(rng.choices(letters, k=rng.randrange(1, 10))) for _ in range(20_000)]
    joint = "，" if kind == "chinese" else " "
    written = 0
    with open(path, "wb") as file:
        while written < megabytes * 10**6:
            if kind == "lines":
                number = written
                text = "".join(f"{number + i} {rng.choice(words)}\n" for i in range(50_000))
            else:
                text = joint.join(rng.choices(words, k=100_000)) + joint
                text = re.sub(r"(\w+\W){40}", lambda m: m.group()[:-1] + ".\n", text)
            written += file.write(text.encode())
    return path


def run(*argv) -> tuple[float, float]:
    """Seconds and peak resident megabytes of one command of the program."""
    command = [sys.executable, str(PROGRAM), *map(str, argv)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(errors.decode()[-2000:])
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - started, usage.ru_maxrss * unit / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000], help="megabytes")
    parser.add_argument("--kinds", nargs="+", default=["words"])
    parser.add_argument("--folder", help="parent of the temporary text and stores")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for kind in options.kinds:
            for size in options.sizes:
                text = write_text(folder / "text.txt", size, kind)
                for tokenizer in ("byte", "bpe"):
                    flags = ["--data_dir", text, "--tokenizer", tokenizer, "--vocab_size", 8192]
                    flags += ["--doc_delimiter", r"\n"] if kind == "lines" else []
                    flags += ["--processed_dir", folder / f"{kind}-{size}-{tokenizer}"]
                    seconds, peak = run("prepare", *flags)
                    print(f"prepare {size:>5} MB {kind:<8}{tokenizer:<6}"
                          f"{peak:>8.0f} MB peak{seconds:>8.1f} s", flush=True)  # fmt: skip
                text.unlink()


if __name__ == "__main__":
    main()
