"""SMS spam: train, finetune and eval over several seeds, beside a linear SVM on the same split.

    python tests/bench/sms.py --data sms_spam_collection

Needs scikit-learn. Every figure of ours is `eval`'s own. The SVM sees character n-grams (2 to 5,
within words) by TF-IDF, trains on the very records of the training split and predicts the others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
TRAIN = "--tokenizer bpe --vocab_size 2000 --recipe fast --n_layer 2 --n_head 2 --n_kv_head 2 "
TRAIN += "--n_embd 128 --block_size 128 --batch_size 16 --epochs 4 --lr 0.015 "
TRAIN += "--dropout 0.2 --min_lr_ratio 0.1"
FINETUNE = "--recipe fast --loss_on response --epochs 5 --batch_size 16 --dropout 0.3 "
FINETUNE += "--report_samples 0"


def program(*argv) -> float:
    """Run the program; seconds, start-up included."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, ROOT / "llm_pipeline.py", *map(str, argv)], check=True, capture_output=True
    )
    return time.perf_counter() - started


def svm(store_folder: Path) -> tuple[float, float]:
    """Accuracy and spam F1 of the SVM on the records of a token store."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    import llm_pipeline as lp

    store = lp.TokenStore(store_folder)

    def records(split: str) -> tuple[list[str], list[bool]]:
        texts, labels = [], []
        for start, length, prompt, _ in store.index[split].tolist():
            ids = store.ids(split, start, length)
            text = store.tokenizer.decode(ids[1:prompt])
            texts.append(text.split("### Input: ", 1)[1].removesuffix("\n### Output:"))
            labels.append(store.tokenizer.decode(ids[prompt:]).strip() == "spam")
        return texts, labels

    features = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
    model = make_pipeline(features, LinearSVC()).fit(*records("train"))
    texts, truth = records("val")
    guess = model.predict(texts)
    return accuracy_score(truth, guess), f1_score(truth, guess)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--split_seeds", type=int, nargs="+", default=[1337])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    print(f"{'split':>6}{'seed':>6}{'seconds':>10}{'accuracy':>10}{'spam F1':>10}")
    accuracy, f1 = [], []
    with tempfile.TemporaryDirectory() as work:
        for split in options.split_seeds:
            common = ["--data_dir", options.data.resolve(), "--threads", options.threads,
                      "--processed_dir", f"{work}/{split}"]  # fmt: skip
            for seed in options.seeds:
                run = f"{work}/{split}-{seed}"
                ours = [*common, "--seed", seed, "--out_dir", run]
                seconds = program("train", *ours, *TRAIN.split(), "--split_seed", split)
                base = ["--ckpt", f"{run}/best.pth"]
                seconds += program("finetune", *ours, *FINETUNE.split(), *base)
                program("eval", *common, "--ckpt", f"{run}/best_finetune.pth",
                        "--json", f"{run}/eval.json")  # fmt: skip
                figures = json.loads(Path(f"{run}/eval.json").read_text())["sources"]["sms"]
                accuracy.append(figures["accuracy"])
                f1.append(figures["classes"]["spam"]["f1"])
                print(f"{split:>6}{seed:>6}{seconds:>10.0f}{accuracy[-1]:>10.4f}{f1[-1]:>10.4f}",
                      flush=True)  # fmt: skip
            stores = Path(f"{work}/{split}").glob("*/meta.json")
            theirs = svm(next(stores).parent)
            print(f"{split:>6}{'SVM':>6}{'':>10}{theirs[0]:>10.4f}{theirs[1]:>10.4f}", flush=True)
    print(
        f"mean of ours: accuracy {statistics.mean(accuracy):.4f}, spam F1 {statistics.mean(f1):.4f}"
    )


if __name__ == "__main__":
    main()
