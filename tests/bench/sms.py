"""SMS spam with nothing but the fast recipe, against a linear SVM on the same records.

    python tests/bench/sms.py --data sms_spam_collection              # ten splits of all messages
    python tests/bench/sms.py --data sms_spam_collection --balanced   # 747 spam, 747 ham

Needs scikit-learn. All our figures come from `eval`. The SVM uses TF-IDF of character n-grams
(2 to 5, within words). --balanced samples as *Build a Large Language Model (From Scratch)* does,
duplicates included: 70% for training, 10% to choose the checkpoint, 20% for the test.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
TRAIN = "--preset cpu-debug --recipe fast --eval_batches 0"
ASKED = "classify if the SMS is spam or ham"


def program(*argv) -> None:
    command = [sys.executable, ROOT / "llm_pipeline.py", *argv]
    subprocess.run([*map(str, command)], check=True, capture_output=True)


def scored(data: Path, test: list, work: Path, flags: list) -> dict:
    """Train on `data`; returns what `eval` reports for the messages."""
    common = ["--processed_dir", work / "stores", "--threads", 1]
    program("train", "--data_dir", data, *common, "--out_dir", work, *TRAIN.split(), *flags)
    program("eval", *test, *common, "--ckpt", work / "best.pth", "--json", work / "eval.json")
    (figures,) = json.loads((work / "eval.json").read_text())["sources"].values()
    return figures


def svm(train: list[tuple[str, str]], test: list[tuple[str, str]]) -> tuple[float, float]:
    """Accuracy and spam F1 of the SVM, from (label, text) pairs."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    features = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
    labels, texts = zip(*train, strict=True)
    model = make_pipeline(features, LinearSVC()).fit(texts, labels)
    truth, texts = zip(*test, strict=True)
    guess = model.predict(texts)
    return accuracy_score(truth, guess), f1_score(truth, guess, pos_label="spam")


def records(store_folder: Path, split: str) -> list[tuple[str, str]]:
    """(label, text) of each record of a token store."""
    import llm_pipeline as lp

    store, found = lp.TokenStore(store_folder), []
    for start, length, prompt, *_ in store.index[split].tolist():
        ids = store.ids(split, start, length)
        text = store.tokenizer.decode(ids[1:prompt]).split("### Input: ", 1)[1]
        label = store.tokenizer.decode(ids[prompt:]).strip()
        found.append((label, text.removesuffix("\n### Output:")))
    return found


def one_split(data: Path, seed: int, work: Path) -> tuple[dict, tuple[float, float]]:
    """Ours and the SVM, on one split of the whole collection."""
    flags = ["--seed", seed, "--split_seed", seed]
    figures = scored(data, ["--data_dir", data], work, flags)
    (meta,) = (work / "stores").glob("*/meta.json")
    sides = (records(meta.parent, split) for split in ("train", "val"))
    return figures, svm(*sides)


def one_balanced(data: Path, seed: int, work: Path) -> tuple[dict, tuple[float, float]]:
    """Ours and the SVM, on one draw of a balanced subset."""
    (file,) = data.rglob("SMSSpamCollection")
    lines = file.read_text(encoding="utf-8").split("\n")
    rows = [tuple(line.split("\t", 1)) for line in lines if line]
    spam, ham = ([row for row in rows if row[0] == label] for label in ("spam", "ham"))
    rng = random.Random(seed)
    drawn = rng.sample(ham, len(spam)) + spam
    rng.shuffle(drawn)
    first, second = int(0.7 * len(drawn)), int(0.8 * len(drawn))
    parts = {"train": drawn[:first], "valid": drawn[first:second], "test": drawn[second:]}
    for name, part in parts.items():
        path = work / ("held" if name == "test" else "data") / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        rows = (dict(instruction=ASKED, input=text, output=label) for label, text in part)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    test = ["--data_dir", work / "held/test.jsonl", "--split", "all"]
    figures = scored(work / "data", test, work, ["--seed", seed])
    return figures, svm(parts["train"] + parts["valid"], parts["test"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(1, 11))
    parser.add_argument("--balanced", action="store_true")
    parser.add_argument("--at_once", type=int, default=2, help="parallel runs, one thread each")
    options = parser.parse_args()
    measure = one_balanced if options.balanced else one_split

    def row(seed: int) -> tuple[float, float, float, float]:
        with tempfile.TemporaryDirectory() as work:
            figures, theirs = measure(options.data.resolve(), seed, Path(work))
        found = figures["accuracy"], figures["classes"]["spam"]["f1"], *theirs
        print(f"{seed:>6}" + "".join(f"{value:>12.4f}" for value in found), flush=True)
        return found

    titles = "accuracy", "spam F1", "SVM's", "SVM's F1"
    print("  seed" + "".join(f"{title:>12}" for title in titles), flush=True)
    with ThreadPoolExecutor(options.at_once) as pool:
        rows = list(pool.map(row, options.seeds))
    for name, of in (("mean", statistics.mean), ("median", statistics.median)):
        print(f"{name:>6}" + "".join(f"{of(column):>12.4f}" for column in zip(*rows, strict=True)))


if __name__ == "__main__":
    main()
