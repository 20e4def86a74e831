"""How long a run is: little data, --minutes, the notes before it begins and when it ends."""

import csv
import functools
import json
import re
import signal
import time
from pathlib import Path

import pytest
from conftest import CPU, SHAPE, Child, curve, differences, metrics, needs, run, words

import llm_pipeline as lp

# --- little data ---

ANSWERS = words("red blue green white black seven nine north south yes")
THINGS = words("door roof wall lamp boat horse apple cloud paper river stone field glass candle "
               "bridge garden engine window market forest")  # fmt: skip
QUESTIONS = [(f"What of the {thing}?", ANSWERS[i % 10]) for i, thing in enumerate(THINGS)]


def questions(folder: Path) -> list:
    """Flags of a CSV of twenty questions with their answers."""
    with open(folder / "qa.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("question", "answer"), *QUESTIONS])
    return ["--data_dir", folder / "qa.csv", "--processed_dir", folder / "stores", *CPU]


def exact(ckpt: Path, flags: list) -> float:
    """The share of the trained questions that are answered exactly."""
    where = ["--data_dir", flags[1], "--processed_dir", flags[3], "--split", "train"]
    result = run("eval", "--ckpt", ckpt, *where, *CPU, "--json", ckpt.parent / "eval.json").ok()
    assert result.out
    return json.loads((ckpt.parent / "eval.json").read_text())["answers"]["train"]["exact"]


SMALL = words("--arch modern --n_layer 2 --n_head 2 --n_embd 64 --block_size 96 --dropout 0")


@pytest.mark.parametrize("recipe", ["classic", "fast"])
def test_training_on_twenty_questions_learns_them(recipe, tmp_path):
    """With no length given: a note says that enough steps are taken. Nothing is held out."""
    flags = [*questions(tmp_path), "--val_fraction", 0, "--recipe", recipe]
    if recipe == "classic":
        flags += ["--lr", 3e-3]
    result = run("train", *flags, *SMALL, "--out_dir", tmp_path / "run").ok()
    assert re.search(r"300 steps, \d+ passes over little data", result.err)
    assert exact(tmp_path / "run/last.pth", flags) > 0.9


def test_tuning_on_twenty_questions_learns_them_and_names_the_right_file(tmp_path, monkeypatch):
    """Held-out questions cannot be answered, so the best loss on them comes much earlier."""
    monkeypatch.setattr(lp, "FEWEST_STEPS", 120)  # to keep the test quick
    flags = questions(tmp_path)
    base = [*words("--max_steps 20 --lr 1e-3"), *SMALL]
    run("train", *flags, *base, "--val_fraction", 0.2, "--out_dir", tmp_path / "base").ok()
    tune = ["finetune", *flags, "--ckpt", tmp_path / "base/last.pth", "--lr", 3e-3]
    result = run(*tune, "--out_dir", tmp_path / "run").ok()
    last = tmp_path / "run/last_finetune.pth"
    assert exact(last, flags) > 0.9
    assert f"use {last} to ask about the training data" in result.err
    assert (
        f"--ckpt {last}" in result.err and f"--ckpt {tmp_path}/run/best_finetune.pth" in result.err
    )


def test_what_little_data_sets_is_written_down(tmp_path, monkeypatch):
    """Stopped and resumed, or repeated from its config.json, it is the same run. If few steps are
    asked for, a note says so beforehand."""
    monkeypatch.setattr(lp, "FEWEST_STEPS", 20)
    flags = ["train", *questions(tmp_path), *SMALL, *words("--batch_size 8 --val_fraction 0.3")]
    run(*flags, "--out_dir", tmp_path / "a").ok()
    run(*flags, "--out_dir", tmp_path / "b", "--stop_after", 7).ok()
    run(*flags, "--out_dir", tmp_path / "b", "--resume").ok()
    run("train", "--config", tmp_path / "a/config.json", "--out_dir", tmp_path / "c").ok()
    for other in "bc":
        assert curve(tmp_path / "a", "val") == curve(tmp_path / other, "val")
        assert differences(tmp_path / "a/best.pth", tmp_path / other / "best.pth") == []
    few = run(*flags, "--out_dir", tmp_path / "d", "--epochs", 2).ok().err
    assert 0 < few.index("only 2 steps: --epochs 20 or --max_steps 20") < few.index("parameters,")
    assert "answer_weight 10" in few


def test_a_store_that_was_tuned_on_trains(corpus, tiny_checkpoint, tmp_path):
    """Its settings do not mention a tokenizer."""
    places = ["--data_dir", corpus[1], "--processed_dir", tmp_path, *words("--val_fraction 0.2")]
    tune = ["--ckpt", tiny_checkpoint, "--max_steps", 1, "--report_samples", 0]
    run("finetune", *places, *CPU, *tune, "--out_dir", tmp_path / "tuned").ok()
    store = next(tmp_path.glob("*/meta.json")).parent
    for recipe in ("classic", "fast"):
        flags = [*CPU, *SHAPE, "--recipe", recipe, "--epochs", 1, "--out_dir", tmp_path / recipe]
        run("train", "--data_dir", store, *flags).ok()


def test_a_stride_is_of_windows(corpus, tiny_checkpoint, tmp_path):
    """Whole records, which so few questions would otherwise be read as, have none."""
    flags = [*corpus, *CPU, "--epochs", 1, "--stride", 40, "--out_dir", tmp_path / "run"]
    run("train", *flags, *SHAPE, "--recipe", "fast").ok()
    run("train", *flags, "--answer_weight", 3).fails(2, "exclude")
    run("finetune", *flags, "--ckpt", tiny_checkpoint).fails(2, "--stride belongs to train")


def test_the_context_holds_the_records(tmp_path):
    """If every record has an answer, the fast recipe's block grows to fit them."""
    rows = [{"question": f"q{i} " + "long " * 40, "answer": "short"} for i in range(40)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [*CPU, "--data_dir", tmp_path / "long.jsonl", "--processed_dir", tmp_path / "stores",
             *words("--preset cpu-debug --n_layer 1 --n_embd 32 --max_steps 1")]  # fmt: skip
    fast = run("train", *flags, "--recipe", "fast", "--out_dir", tmp_path / "fast").ok()
    assert "do not fit" not in fast.err
    assert lp.load_model(str(tmp_path / "fast/last.pth")).model.config.block_size > 200
    named = ["--recipe", "fast", "--block_size", 64, "--out_dir", tmp_path / "named"]
    assert "records do not fit into 64 tokens" in run("train", *flags, *named).ok().err
    assert lp.load_model(str(tmp_path / "named/last.pth")).model.config.block_size == 64


# --- runs limited by time ---

# So little text that, on any machine, a few passes end long before the minutes do.
TIMED = [*CPU, *words("--batch_size 4 --minutes 5 --log_interval 1")]


@pytest.fixture
def few_steps(monkeypatch) -> None:
    monkeypatch.setattr(lp, "FEWEST_STEPS", 20)
    monkeypatch.setattr(lp, "PASSES", 2)


def test_minutes_are_the_run_of_their_settings(few_steps, corpus, tmp_path):
    """The config.json that the note names gives the same bits; so does stopping and resuming."""
    flags = [*corpus, *SHAPE, *TIMED]
    result = run("train", *flags, "--out_dir", tmp_path / "a").ok()
    assert "since more would teach little" in result.err
    assert f"--config {tmp_path}/a/config.json" in result.err
    run("train", "--config", tmp_path / "a/config.json", "--out_dir", tmp_path / "b").ok()
    run("train", *flags, "--stop_after", 5, "--out_dir", tmp_path / "c").ok()
    resumed = run("train", *flags, "--resume", "--out_dir", tmp_path / "c").ok()  # same minutes
    assert "minutes 5" not in resumed.err and "whatever --minutes says" in resumed.err
    for other in "bc":
        assert differences(tmp_path / "a/last.pth", tmp_path / other / "last.pth") == []
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    assert not list(tmp_path.glob("a/.*.tmp"))


def test_a_neighbour_that_comes_moves_the_end(tmp_path, monkeypatch):
    """If steps become slower than planned, fewer are taken; the last still has a rate near zero."""
    step = lp.train_step

    def disturbed(run, batch):
        if run.progress.step > 10 and isinstance(run.after_step, functools.partial):  # no trial
            time.sleep(0.5)
        return step(run, batch)

    monkeypatch.setattr(lp, "train_step", disturbed)
    (tmp_path / "book.txt").write_text("".join(f"{i} times {i} is {i * i}. " for i in range(9999)))
    flags = ["--data_dir", tmp_path / "book.txt", "--processed_dir", tmp_path / "stores", *CPU]
    flags += [*SHAPE, *words("--tokenizer byte --minutes 0.2 --log_interval 1 --eval_interval 999")]
    result = run("train", *flags, "--out_dir", tmp_path / "run").ok()
    planned = int(re.search(r"minutes 0.2: ([\d,]+) steps", result.err)[1].replace(",", ""))
    taken = metrics(tmp_path / "run")
    assert len(taken) < planned
    assert float(taken[-1]["lr"]) < 0.1 * max(float(row["lr"]) for row in taken)
    assert f"the same {len(taken)} steps" in result.err and "moved its end" in result.err


def test_minutes_choose_a_size(few_steps, corpus, tmp_path, monkeypatch):
    """The largest that sees enough tokens; explicit settings win."""
    rungs = [dict(n_layer=1, n_head=2, n_embd=width, block_size=32) for width in (16, 32, 64)]
    monkeypatch.setattr(lp, "RUNGS", rungs)
    chosen = {}
    for enough in (1e-9, 1e9):
        monkeypatch.setattr(lp, "ENOUGH", enough)
        out = tmp_path / str(enough)
        run("train", *corpus, *TIMED, "--dropout", 0.3, "--out_dir", out).ok()
        written = json.loads((out / "config.json").read_text())
        assert written["dropout"] == 0.3
        chosen[enough] = written["n_embd"]
    assert chosen == {1e-9: 64, 1e9: 16}


def test_minutes_read_the_corpus_as_the_base_does(corpus, tmp_path):
    """With --init_from, in the base's tokens only; a stop while it measures saves no checkpoint."""
    needs("tokenizers")
    bpe = words("--tokenizer bpe --vocab_size 300 --max_steps 1")
    run("train", *corpus, *CPU, *SHAPE, *bpe, "--out_dir", tmp_path / "base").ok()
    flags = [*corpus, *CPU, "--processed_dir", tmp_path / "stores", "--out_dir", tmp_path / "run"]
    begin = ["--init_from", tmp_path / "base/best.pth", "--minutes", 5]
    result = Child("train", *flags, *begin, hook=interrupted_while_it_measures).finish()
    assert result.code == 130
    assert len(list((tmp_path / "stores").glob("*/meta.json"))) == 1
    assert not list((tmp_path / "run").glob("*.pth"))


def interrupted_while_it_measures():
    measure = lp.Clock.__init__

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        measure(*args)

    lp.Clock.__init__ = interrupted


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ("--minutes -1", 2, "minutes"),
        ("--minutes 1 --max_steps 9", 2, "exclude"),
        ("--minutes 1e-4", 1, "--minutes 0.0001"),
        ("--minutes 1 --streaming --hf_dataset json", 2, "--max_tokens"),
    ],
)
def test_minutes_that_cannot_be(flags, code, said, corpus, tmp_path):
    result = run("train", *corpus, *CPU, *SHAPE, *words(flags), "--out_dir", tmp_path)
    result.fails(code, said)
    assert not list(tmp_path.glob("*.pth"))
