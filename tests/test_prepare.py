"""`prepare`: sources, report, reuse, kills, downloads, model check; training from what it makes."""

import contextlib
import hashlib
import http.server
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, Child, differences, needs, run, wait_for

import llm_pipeline as lp

needs_fork = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="this system cannot fork: run on Linux or a Mac"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Keep what `datasets` caches in a temporary folder, and nobody on the network."""
    if "datasets" in sys.modules:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module", autouse=True)
def datasets_are_loaded():
    needs("datasets")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def rows(n: int = 60, size: int = 30) -> list[dict]:
    rng = random.Random(0)
    words = ["sun", "moon", "你好", "river", "stone", "Größe", "bird", "fish"]
    return [{"text": f"{i} " + " ".join(rng.choices(words, k=size)), "id": i} for i in range(n)]


def write_rows(path: Path, found: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in found]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def prepare(out: Path, *flags, **more):
    return run("prepare", "--out_dir", out, *flags, **more)


def content(folder: Path) -> dict[str, bytes]:
    names = [f"{split}.{end}" for split in ("train", "val") for end in ("bin", "idx")]
    return {name: (folder / name).read_bytes() for name in names}


def texts(folder: Path) -> list[str]:
    store, found = lp.TokenStore(folder), []
    for split in ("train", "val"):
        for start, length, *_ in store.index[split].tolist():
            found.append(store.tokenizer.decode(store.tokens[split][start : start + length]))
    return sorted(found)


# --- sources ---


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
@pytest.mark.parametrize("builder", ["json", "parquet", "text"])
def test_streams_and_local_files_give_the_same_store(tmp_path, builder, tokenizer):
    found, flags = rows(), ["--tokenizer", tokenizer, "--vocab_size", 300]
    if builder == "json":
        path = write_rows(tmp_path / "a.jsonl", [*found, found[3], {"text": " ", "id": 0}])
    elif builder == "parquet":
        pa, parquet = needs("pyarrow"), needs("pyarrow.parquet")
        path = tmp_path / "a.parquet"
        parquet.write_table(pa.Table.from_pylist([*found, found[3]]), path, row_group_size=7)
    else:
        path = tmp_path / "a.txt"
        path.write_text("\n".join(["", *(r["text"] for r in found), found[3]["text"], ""]))
    local = ["--doc_delimiter", r"\n"] if builder == "text" else []
    prepare(tmp_path / "local", "--data_dir", path, *local, *flags).ok()
    hub = ["--hf_dataset", builder, "--hf_files", path, *flags]
    prepare(tmp_path / "hub", *hub).ok()
    prepare(tmp_path / "stream", *hub, "--streaming").ok()
    assert texts(tmp_path / "local") == sorted(r["text"] for r in found)
    assert content(tmp_path / "local") == content(tmp_path / "hub") == content(tmp_path / "stream")


def test_instructions_from_a_builder(tmp_path):
    """A table that holds both an instruction and its whole text is read alike everywhere."""
    pa, parquet = needs("pyarrow"), needs("pyarrow.parquet")
    found = [
        dict(instruction=f"Do {i}", input="", output=f"{i}", text=f"all {i}") for i in range(9)
    ]
    parquet.write_table(pa.Table.from_pylist(found), tmp_path / "a.parquet")
    flags = ["--val_fraction", 0.2]
    prepare(tmp_path / "local", "--data_dir", tmp_path / "a.parquet", *flags).ok()
    hub = ["--hf_dataset", "parquet", "--hf_files", tmp_path / "a.parquet", *flags]
    prepare(tmp_path / "hub", *hub, "--streaming").ok()
    assert content(tmp_path / "local") == content(tmp_path / "hub")
    assert "### Input: \n### Output: 3\n" in "".join(texts(tmp_path / "hub"))


def test_fineweb_in_both_ways(tmp_path, data):
    path = data / "fineweb/fineweb_10rows.parquet"
    flags = ["--tokenizer", data / "gpt2_bpe"]
    prepare(tmp_path / "local", "--data_dir", path, *flags).ok()
    hub = ["--hf_dataset", "parquet", "--hf_files", path, "--streaming"]
    prepare(tmp_path / "hub", *hub, *flags).ok()
    assert content(tmp_path / "local") == content(tmp_path / "hub")
    assert len(texts(tmp_path / "hub")) == 10


def test_several_files_by_a_pattern(tmp_path):
    found = rows()
    for i in range(3):
        write_rows(tmp_path / f"raw/{i}.jsonl", found[i::3])
    hub = ["--hf_dataset", "json", "--hf_files", tmp_path / "raw/*.jsonl"]
    prepare(tmp_path / "hub", *hub).ok()
    assert texts(tmp_path / "hub") == sorted(r["text"] for r in found)


def test_a_dataset_name_without_a_network(tmp_path, offline):
    for streaming in ([], ["--streaming"]):
        flags = ["--hf_dataset", "nobody/no-such-set", *streaming]
        result = prepare(tmp_path / "st", *flags).fails(1, "nobody/no-such-set", "network")
        assert len(result.errors) == 1
    assert not (tmp_path / "st").exists()


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["whole", "stream"])
@pytest.mark.parametrize("kind", ["broken", "types", "missing", "parquet", "column"])
def test_a_builder_over_bad_files(tmp_path, kind, streaming):
    path, builder = tmp_path / "a.jsonl", "json"
    if kind == "broken":
        write_rows(path, rows()).open("a").write("{broken\n")
    elif kind == "types":
        write_rows(path, [{"text": 5}])
    elif kind == "column":
        write_rows(path, [{"words": "a"}])
    elif kind == "parquet":
        path, builder = tmp_path / "a.parquet", "parquet"
        path.write_bytes(b"PAR1 no table PAR1")
    flags = ["--hf_dataset", builder, "--hf_files", path, *streaming]
    result = prepare(tmp_path / "st", *flags).fails(1)
    assert len(result.errors) == 1
    assert not (tmp_path / "st").exists()


def test_a_changed_file_behind_a_builder_is_read_again(tmp_path):
    found = rows()
    for part in (found[:30], found):
        path = write_rows(tmp_path / "a.jsonl", part)
        prepare(tmp_path / "st", "--hf_dataset", "json", "--hf_files", path, "--streaming").ok()
        assert texts(tmp_path / "st") == sorted(r["text"] for r in part)


# --- limits ---


@pytest.mark.parametrize("n", [1, 7, 59])
def test_max_docs(tmp_path, n):
    write_rows(tmp_path / "a.jsonl", rows())
    flags = ["--data_dir", tmp_path / "a.jsonl", "--max_docs", n, "--val_fraction", 1e-9]
    prepare(tmp_path / "st", *flags).ok()
    assert texts(tmp_path / "st") == sorted(r["text"] for r in rows()[:n])


@pytest.mark.parametrize("most", [500, 5000])
def test_max_tokens(tmp_path, most):
    write_rows(tmp_path / "a.jsonl", rows())
    flags = ["--data_dir", tmp_path / "a.jsonl", "--max_tokens", most]
    prepare(tmp_path / "st", *flags).ok()
    total = sum(len(t) for t in lp.TokenStore(tmp_path / "st").tokens.values())
    longest = max(len(r["text"].encode()) + 2 for r in rows())
    assert most <= total <= most + longest, "it stops after the document that reaches the limit"


# --- the report ---


def test_the_report(tmp_path):
    found = [*rows(), rows()[0], {"text": "  ", "id": 0}]
    write_rows(tmp_path / "a.jsonl", found)
    result = prepare(tmp_path / "st", "--data_dir", tmp_path / "a.jsonl", "--block_size", 32).ok()
    store = lp.TokenStore(tmp_path / "st")
    assert result.out.splitlines()[-1] == str(tmp_path / "st")
    report = json.loads((tmp_path / "st/report.json").read_text("utf-8"))
    figures = report["figures"]
    tokens = {s: len(t) for s, t in store.tokens.items()}
    assert figures["records read"] == 62
    assert figures["dropped, duplicate"] == figures["dropped, short or empty"] == 1
    assert figures["records, train"] + figures["records, val"] == 60
    for split in ("train", "val"):
        assert figures[f"tokens, {split}"] == tokens[split]
        assert figures[f"records, {split}"] == len(store.index[split])
    size = sum(len(r["text"].encode()) for r in rows())
    assert figures["bytes per token"] == pytest.approx(size / sum(tokens.values()), abs=1e-3)
    assert figures["tokens per second"] > 0
    lengths = np.concatenate([store.index[s]["length"] for s in ("train", "val")])
    percentiles = report["length_percentiles"]
    assert percentiles["100"] == lengths.max()
    assert percentiles["50"] == np.sort(lengths)[29]
    for name, value in figures.items():
        assert re.search(rf"{re.escape(name)} +{value:,}\n", result.out), name
    assert "plot_curves.py" in result.err and "safe to delete" in result.err


def test_the_sample_batch(tmp_path):
    write_rows(tmp_path / "a.jsonl", rows())
    flags = ["--tokenizer", "bpe", "--vocab_size", 300, "--block_size", 24]
    prepare(tmp_path / "st", "--data_dir", tmp_path / "a.jsonl", *flags).ok()
    batch = json.loads((tmp_path / "st/sample_batch.json").read_text("utf-8"))
    store = lp.TokenStore(tmp_path / "st")
    assert np.array(batch["input_ids"]).shape == (4, 24)
    assert batch["labels"] == batch["input_ids"], "Hugging Face models shift labels themselves"
    stream = "".join(f",{i}" for i in store.tokens["train"].tolist()) + ","
    for ids, text in zip(batch["input_ids"], batch["text"], strict=True):
        assert "".join(f",{i}" for i in ids) + "," in stream
        assert text == store.tokenizer.decode(ids)


def test_the_preview(tmp_path):
    found = [dict(instruction="Say it " + "x" * 40, output="yes") for _ in range(1)]
    write_rows(tmp_path / "a.jsonl", [*found, {"text": "plain words"}])
    flags = ["--data_dir", tmp_path / "a.jsonl", "--val_fraction", 1e-9]
    out = prepare(tmp_path / "st", *flags, "--preview", 5, "--block_size", 40).ok().out
    lines = [line.split(maxsplit=3) for line in out.splitlines()]
    states = [(int(w[1]), w[2]) for w in lines if len(w) == 4 and w[0].isdigit() and w[1].isdigit()]
    store = lp.TokenStore(tmp_path / "st")
    index = store.index["train"]
    assert len(states) == index["length"].sum(), "each token of each record, once"
    starts = [i for i, (token, _) in enumerate(states) if token == store.tokenizer.bos_id]
    shown = sorted((states[starts[0] : starts[1]], states[starts[1] :]), key=len)
    second, first = shown
    (start, length, prompt, _), plain = index[0].tolist(), index[1].tolist()
    assert [i for i, _ in first] == store.tokens["train"][start : start + length].tolist()
    assert [s for _, s in first[prompt:]] == ["trained"] * (length - prompt)
    kept = [s for _, s in first[:prompt]]
    assert kept.count("masked") == 41 - (length - prompt) and kept.count("cut") == length - 41
    assert kept[0] == kept[-1] == "masked"
    assert [s for _, s in second] == ["masked"] + ["trained"] * (plain[1] - 1)


def test_the_report_and_preview_of_a_conversation(tmp_path):
    """One record, three answers, each of them trained."""
    turns = [{"role": role, "content": f"{role} {i}"}
             for i in range(3) for role in ("user", "assistant")]  # fmt: skip
    write_rows(tmp_path / "a.jsonl", [{"messages": turns}])
    flags = ["--data_dir", tmp_path / "a.jsonl", "--val_fraction", 1e-9, "--preview", 1]
    out = prepare(tmp_path / "st", *flags, "--block_size", 512).ok().out
    assert re.search(r"records, train +1\n", out) and re.search(r"trained answers, train +3\n", out)
    found = [line.split(maxsplit=3) for line in out.splitlines()]
    tokens = [w for w in found if len(w) == 4 and w[2] in ("trained", "masked", "cut")]
    trained = bytes(int(w[1]) for w in tokens if w[2] == "trained" and int(w[1]) < 256).decode()
    assert trained == "".join(f" assistant {i}\n" for i in range(3))
    assert [w[2] for w in tokens if w[1] == "259"] == ["trained"] * 3


def test_the_preview_of_a_huge_record_is_short(tmp_path):
    (tmp_path / "book.txt").write_text("A sentence of a book. " * 2000, encoding="utf-8")
    flags = ["--data_dir", tmp_path / "book.txt", "--preview", 2]
    result = prepare(tmp_path / "st", *flags).ok()
    assert len(result.out.splitlines()) < 300
    left = re.search(r"\.\.\. ([\d,]+) tokens left out", result.out)[1]
    length = int(lp.TokenStore(tmp_path / "st").index["train"]["length"][0])
    assert int(left.replace(",", "")) == length - 200
    assert f"{length - 1:>6}" in result.out, "the end is shown"


def test_a_second_run_reuses_the_store(tmp_path):
    write_rows(tmp_path / "raw/a.jsonl", rows(2000))
    flags = ["--data_dir", tmp_path / "raw"]
    first = prepare(tmp_path / "st", *flags).ok()
    before = {n: (tmp_path / "st" / n).stat().st_mtime_ns for n in content(tmp_path / "st")}
    second = prepare(tmp_path / "st", *flags).ok()
    assert {n: (tmp_path / "st" / n).stat().st_mtime_ns for n in before} == before
    assert "unchanged" in second.err and "unchanged" not in first.err
    assert second.out == first.out
    third = prepare(tmp_path / "st", *flags, "--split_seed", 3).ok()
    assert (tmp_path / "st/train.bin").stat().st_mtime_ns != before["train.bin"]
    assert "unchanged" not in third.err


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    write_rows(tmp_path / "a.jsonl", rows())
    (tmp_path / "st").mkdir()
    (tmp_path / "st/thesis.tex").write_text("precious")
    prepare(tmp_path / "st", "--data_dir", tmp_path / "a.jsonl").fails(1, "st", "other files")
    assert [p.name for p in (tmp_path / "st").iterdir()] == ["thesis.tex"]


def test_a_failed_run_leaves_the_store_before_it(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", rows())
    prepare(tmp_path / "st", "--data_dir", path).ok()
    before = content(tmp_path / "st")
    path.open("a").write("{broken\n")
    prepare(tmp_path / "st", "--data_dir", path).fails(1, "a.jsonl:61")
    assert content(tmp_path / "st") == before
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["st"]


# --- kills ---


def killed_at_random_moments(folder: Path, rng: random.Random, kills: int, size: int) -> None:
    """Never a store of `size` rows that loads and is wrong; the next run starts clean."""
    raw, out = write_rows(folder / "raw/a.jsonl", rows(size)), folder / "out/st"
    settings = [["--data_dir", raw, "--split_seed", seed] for seed in (1, 2)]
    right, started = [], time.monotonic()
    for seed, flags in enumerate(settings):
        prepare(folder / f"right{seed}", *flags).ok()
        right.append(content(folder / f"right{seed}"))
    takes = (time.monotonic() - started) / 2
    assert right[0] != right[1]
    for round in range(kills):
        child = os.fork()
        if child == 0:
            try:
                prepare(out, *settings[round % 2])
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0, takes))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        try:
            lp.TokenStore(out)
        except lp.UserError:
            continue
        assert content(out) in right
    shutil.rmtree(out, ignore_errors=True)  # so that the last run has a store to make
    prepare(out, *settings[0]).ok()
    assert content(out) == right[0]
    left = [p.name for p in out.parent.iterdir() if p.name != "st" and not p.name.endswith("lock")]
    assert not left


@needs_fork
def test_killed_at_random_moments(tmp_path):
    """A few; tests/bench/faults.py has more."""
    killed_at_random_moments(tmp_path, random.Random(0), 3, 400)


@needs_fork
@pytest.mark.parametrize("first", [True, False], ids=["new", "rebuilt"])
def test_killed_before_each_renaming(tmp_path, first):
    """The moments that chance hardly hits: between the last steps of making a store."""
    raw, out = write_rows(tmp_path / "raw/a.jsonl", rows(40)), tmp_path / "out/st"
    settings = [["--data_dir", raw, "--split_seed", seed] for seed in (1, 2)]
    right = []
    for seed, flags in enumerate(settings):
        prepare(tmp_path / f"right{seed}", *flags).ok()
        right.append(content(tmp_path / f"right{seed}"))
    for moment in range(12):
        shutil.rmtree(out, ignore_errors=True)
        if not first:
            prepare(out, *settings[0]).ok()
        child = os.fork()
        if child == 0:
            try:
                kill_at(moment)
                prepare(out, *settings[1])
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(lp.UserError):
            lp.TokenStore(out)
            assert content(out) in right
        if not os.WIFSIGNALED(status):
            break
    assert moment >= 2, "there are some renamings"
    prepare(out, *settings[1]).ok()
    assert content(out) == right[1]


def kill_at(moment: int) -> None:
    """End this process as by SIGKILL when it is about to rename a file for the n-th time."""
    calls = []

    def dying(rename):
        def wrapper(*args, **more):
            if len(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(args)
            return rename(*args, **more)

        return wrapper

    os.rename, os.replace = dying(os.rename), dying(os.replace)


# --- stores that lie ---


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    tasks = [dict(instruction=f"Do {i}", input="x " * i, output=f"{i}") for i in range(20)]
    write_rows(folder / "raw/a.jsonl", [*rows(), *tasks])
    prepare(folder / "st", "--data_dir", folder / "raw").ok()
    return folder / "st"


def spoiled(store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store, tmp_path / "st", dirs_exist_ok=True))


def seal(folder: Path) -> None:
    """Make the checksums those of the files, as whoever wrote them would have."""
    meta = json.loads((folder / "meta.json").read_text("utf-8"))
    for name, entry in meta["files"].items():
        data = (folder / name).read_bytes()
        entry["blake2b"] = hashlib.blake2b(data, digest_size=16).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta), "utf-8")


def train(data_dir: Path, out: Path, *flags):
    return run("train", "--data_dir", data_dir, *TINY, "--out_dir", out, *flags)


def test_truncated_tokens_are_refused(store, tmp_path):
    for name in content(store):
        folder = spoiled(store, tmp_path)
        file = folder / name
        file.write_bytes(file.read_bytes()[:-24])
        result = train(folder, tmp_path / "run").fails(1, str(folder), name)
        assert len(result.errors) == 1
        (folder / name).unlink()
        train(folder, tmp_path / "run").fails(1, str(folder))


def test_ids_outside_the_vocabulary_are_refused(store, tmp_path):
    folder = spoiled(store, tmp_path)
    for split in ("train", "val"):
        ids = np.fromfile(store / f"{split}.bin", "<u2")
        ids[10:] = 60_000
        ids.tofile(folder / f"{split}.bin")
    train(folder, tmp_path / "run").fails(1, str(folder), "train.bin")
    seal(folder)
    train(folder, tmp_path / "run").fails(1, str(folder), "vocabulary")


@pytest.mark.parametrize(
    "field, value",
    [("start", 10**6), ("start", 2**64 - 1), ("length", 10**6), ("length", 2**64 - 5),
     ("prompt", 10**6), ("source", 99), ("prompt", 0), ("length", 0)],
)  # fmt: skip
def test_an_index_that_points_elsewhere_is_refused(store, tmp_path, field, value):
    folder = spoiled(store, tmp_path)
    index = np.fromfile(store / "train.idx", lp.INDEX)
    index[field][len(index) // 2] = value
    index.tofile(folder / "train.idx")
    seal(folder)
    train(folder, tmp_path / "run").fails(1, str(folder))


def test_a_mutated_meta_json_is_refused_or_harmless(store, tmp_path):
    """Each field gone or of another type: no command meets it with a traceback."""
    meta = json.loads((store / "meta.json").read_text("utf-8"))
    folder = spoiled(store, tmp_path)
    lost = object()
    for name in meta:
        for value in (lost, None, 5, -1.5, "x", [], {}, [5], {"train": "x"}, [[[]]]):
            changed = {k: v for k, v in meta.items() if k != name}
            changed |= {} if value is lost else {name: value}
            (folder / "meta.json").write_text(json.dumps(changed), "utf-8")
            result = run("prepare", "--data_dir", folder)
            assert result.code == 0 or len(result.errors) == 1, (name, value, result)
            try:
                opened = lp.TokenStore(folder)
                assert isinstance(opened.fingerprint, str)
            except lp.UserError:
                pass
    for whole in ("", "{", "[]", "5", "null", "[" * 100_000, "\0"):
        (folder / "meta.json").write_text(whole)
        run("prepare", "--data_dir", folder).fails(1, str(folder))


# --- training from a store ---


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_training_from_a_prepared_folder(tmp_path, tokenizer):
    """It needs no further flag: the store knows its tokenizer."""
    write_rows(tmp_path / "raw/a.jsonl", rows())
    data = ["--data_dir", tmp_path / "raw", "--processed_dir", tmp_path / "processed"]
    flags = [*data, "--tokenizer", tokenizer, "--vocab_size", 300]
    folder = run("prepare", *flags).ok().out.splitlines()[-1]
    train(folder, tmp_path / "a").ok()
    run("train", *flags, *TINY, "--out_dir", tmp_path / "b").ok()
    assert differences(tmp_path / "a/last.pth", tmp_path / "b/last.pth") == []
    run("eval", "--ckpt", tmp_path / "a/best.pth", "--data_dir", folder).ok()


def test_a_store_of_another_tokenizer_is_refused(tmp_path, store):
    """A checkpoint brings its tokenizer; a store of other ids is no data for it."""
    train(store, tmp_path / "a").ok()
    write_rows(tmp_path / "raw/a.jsonl", rows())
    flags = ["--data_dir", tmp_path / "raw", "--tokenizer", "bpe", "--vocab_size", 300]
    prepare(tmp_path / "bpe", *flags).ok()
    ckpt = ["--ckpt", tmp_path / "a/best.pth"]
    run("eval", *ckpt, "--data_dir", tmp_path / "bpe").fails(1, "bpe", "tokenizer")


# --- training from a stream ---

STREAMS = {
    "many": (rows(80), 8),
    "long": ([{"text": "sun moon " * 400}, {"text": "river " * 300}, {"text": "x " * 500}], 8),
    "wraps": (rows(12), 4),
}


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("stop", [3, 8])
def test_a_stopped_stream_goes_on_bit_for_bit(tmp_path, kind, stop):
    found, buffer = STREAMS[kind]
    path = write_rows(tmp_path / "a.jsonl", found)
    flags = ["--hf_dataset", "json", "--hf_files", path, "--streaming", "--shuffle_buffer", buffer]
    flags += ["--val_fraction", 0.3, "--eval_interval", 5, "--eval_batches", 2]
    flags += ["--split_seed", 7]
    command = ["train", *flags, *TINY]
    run(*command, "--out_dir", tmp_path / "whole").ok()
    run(*command, "--out_dir", tmp_path / "parts", "--stop_after", stop)
    assert lp.load_checkpoint(tmp_path / "parts/last.pth")["progress"]["step"] == stop
    run(*command, "--out_dir", tmp_path / "parts", "--resume").ok()
    assert differences(tmp_path / "whole/last.pth", tmp_path / "parts/last.pth") == []


def stream(path: Path, processed: Path, *flags, rank=0, world_size=1):
    """Loaders of training and validation batches from a stream, windows of 16 tokens."""
    flags = ["--hf_dataset", "json", "--hf_files", path, "--streaming", "--shuffle_buffer", 8,
             "--batch_size", 4, "--val_fraction", 0.3, "--max_steps", 9, *flags]  # fmt: skip
    config = lp.parse(["train", *map(str, flags), "--processed_dir", str(processed)])[1]
    rt = lp.Runtime(torch.device("cpu"), torch.float32, rank, world_size)
    store = lp.build_corpus_from_sources(config)
    return *lp.create_dataloaders(config, store, 16, rt), store


def test_a_stream_is_shared_by_processes(tmp_path, monkeypatch):
    """The first process writes; the others read what it wrote, and tokenize nothing."""
    path = write_rows(tmp_path / "a.jsonl", rows(40))
    whole = stream(path, tmp_path)[0]
    wanted = [whole.step(step)[0].x for step in range(6)]
    for world_size in (2, 4):
        loaders = [stream(path, tmp_path / f"{world_size}", rank=rank, world_size=world_size)[0]
                   for rank in range(world_size)]  # fmt: skip
        for step in range(6):
            parts = [loaders[0].step(step)]
            with monkeypatch.context() as patch:
                patch.setattr(lp, "is_main", lambda: False)
                parts += [loader.step(step) for loader in loaders[1:]]
            assert torch.equal(torch.cat([batch.x for batch, _ in parts]), wanted[step])
            assert {n for _, n in parts} == {4 * 16}
        assert all(loader.dataset.store.writer is None for loader in loaders[2:])


def trained_windows(loader, steps: int) -> set[tuple]:
    found = set()
    for step in range(steps):
        batch, _ = loader.step(step)
        assert torch.equal(batch.x[:, 1:], batch.y[:, :-1])
        found |= {tuple(row) for row in batch.x.tolist()}
    return found


def test_a_stream_is_the_store_of_the_same_data(tmp_path):
    """Split, duplicates and a long document alike: a record of 100 KB gives its last tenth."""
    found = rows(60, 8)
    long = {"text": " ".join(f"word{i}" for i in range(12_000)), "id": 99}
    path = write_rows(tmp_path / "a.jsonl", [*found[:30], long, *found[30:], found[3]])
    prepare(tmp_path / "st", "--data_dir", path, "--val_fraction", 0.3).ok()
    store = lp.TokenStore(tmp_path / "st")
    train, val, streamed = stream(path, tmp_path / "out")
    windows = {}
    for split, loader in (("train", train), ("val", val)):
        tokens = store.tokens[split].tolist()
        windows[split] = {tuple(tokens[i : i + 16]) for i in range(0, len(tokens) - 16, 16)}
        if split == "train":
            steps = -(-len(windows[split]) // 4) + 2  # to the end of the shuffle buffer
            assert trained_windows(loader, steps) == windows[split]
        else:
            scored = torch.cat([batch.x for batch in loader.fixed(10**6)])
            assert set(map(tuple, scored.tolist())) == windows[split]
        assert streamed.tokens[split].tolist() == tokens
    assert not windows["train"] & windows["val"]
    counts = streamed.meta["counts"]["json"]
    assert counts["skipped: duplicate"] == 1 and counts["records"] == 62


def test_eval_after_streaming_scores_nothing_that_was_trained_on(tmp_path):
    """Long documents too: as whole records they would fall on one side."""
    rng = random.Random(1)
    books = [{"text": " ".join(str(rng.random()) for _ in range(5000))} for _ in range(4)]
    path = write_rows(tmp_path / "a.jsonl", books)
    hub = ["--hf_dataset", "json", "--hf_files", path]
    train_loader, _, streamed = stream(path, tmp_path, "--val_fraction", 0.1)
    trained_windows(train_loader, 20)
    config = lp.parse(["eval", *map(str, hub), "--processed_dir", str(tmp_path)])[1]
    for name in lp.SPLIT_SETTINGS:  # as `open_split_store` does
        setattr(config, name, getattr(lp.DataConfig, name))
    scored = lp.build_corpus_from_sources(config, lp.ByteTokenizer())
    held_out = scored.tokenizer.decode(scored.tokens["val"])
    trained_on = streamed.tokenizer.decode(streamed.tokens["train"])
    assert len(held_out) > 1000
    for start in range(0, len(held_out) - 64, 64):
        assert held_out[start : start + 64] not in trained_on


@pytest.mark.parametrize("damage", ["none", "gone", "cut", "overwritten", "half a batch"])
def test_resumed_twice_inside_one_shuffle_segment(tmp_path, damage):
    """And with the folder of the stream deleted, damaged, or left by a killed process."""
    path, out = write_rows(tmp_path / "a.jsonl", rows(80)), tmp_path / "out"
    flags = ["--hf_dataset", "json", "--hf_files", path, "--streaming", "--shuffle_buffer", 64,
             "--val_fraction", 0.3, "--eval_batches", 2, "--processed_dir", out]  # fmt: skip
    command = ["train", *flags, *TINY, "--max_steps", 14]
    run(*command, "--out_dir", tmp_path / "whole").ok()
    for n, more in enumerate((["--stop_after", 5], ["--resume", "--stop_after", 3], ["--resume"])):
        (folder,) = out.glob("*-stream")
        if damage == "gone" and n:
            shutil.rmtree(folder)
        elif damage == "cut":
            os.truncate(folder / "train.bin", 100)
        elif damage == "overwritten":
            ids = np.fromfile(folder / "train.bin", "<u2")
            ids[50] ^= 1
            ids.tofile(folder / "train.bin")
        elif damage == "half a batch":
            for name in ("train.bin", "val.idx", "seen.bin"):
                with open(folder / name, "ab") as file:
                    file.write(b"\1" * 7)
        run(*command, "--out_dir", tmp_path / "parts", *more)
    assert differences(tmp_path / "whole/last.pth", tmp_path / "parts/last.pth") == []


@needs_fork
def test_a_stream_killed_before_each_commit(tmp_path, monkeypatch):
    """The store grows by small batches here; a kill in one costs that batch and nothing else."""
    monkeypatch.setattr(lp.StreamStore, "ROWS", 5)
    path = write_rows(tmp_path / "a.jsonl", [*rows(30), *rows(10)])

    def tokens(folder: Path) -> list:
        store = stream(path, folder)[2]
        store.grow("train", 10**6)
        assert store.meta["counts"]["json"]["skipped: duplicate"] == 10
        return [store.tokens[split].tolist() for split in ("train", "val")]

    wanted = tokens(tmp_path / "whole")
    for moment in range(1, 30):
        child = os.fork()
        if child == 0:
            try:
                kill_at(moment)
                tokens(tmp_path / "parts")
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            break
    assert moment > 2 and tokens(tmp_path / "parts") == wanted


def test_two_runs_write_one_stream(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lp.StreamStore, "ROWS", 5)
    path = write_rows(tmp_path / "a.jsonl", rows(40))
    wanted = stream(path, tmp_path / "alone")[2]
    wanted.grow("train", 10**6)
    report = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert ["json", "40"] in [line[:2] for line in report], (
        "the stream has ended: its report is shown"
    )
    one, other = (stream(path, tmp_path / "both")[2] for _ in range(2))
    for size in range(1000, 10**4, 1000):
        one.grow("train", size)
        other.grow("train", size + 500)
    assert one.meta["ended"] and other.meta["ended"]
    assert one.tokens["train"].tolist() == wanted.tokens["train"].tolist()


def test_limits_of_a_stream(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", rows(60))
    for flags in (["--max_docs", 7], ["--max_tokens", 2000]):
        store = stream(path, tmp_path, *flags)[2]
        store.grow("train", 10**6)
        hub = ["--hf_dataset", "json", "--hf_files", path, "--val_fraction", 0.3, *flags]
        prepare(tmp_path / "st", *hub, "--overwrite").ok()
        assert (
            store.tokens["train"].tolist()
            == lp.TokenStore(tmp_path / "st").tokens["train"].tolist()
        )


def test_what_a_stream_cannot_do(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", rows(60))
    hub = ["--hf_dataset", "json", "--hf_files", path, "--streaming"]
    run("train", *hub).fails(2, "--max_steps")
    run("train", *hub, "--max_steps", 3, "--tokenizer", "bpe").fails(2, "--tokenizer bpe")
    run("train", "--streaming", "--max_steps", 3).fails(2, "--hf_dataset")


# --- what may be replaced, and what is trusted ---


def test_a_foreign_meta_json_protects_its_folder(tmp_path):
    """Only a store of this program may be replaced."""
    write_rows(tmp_path / "a.jsonl", rows())
    for content_ in ('{"title": "my thesis"}', "[1, 2]", "no json", ""):
        (tmp_path / "st").mkdir(exist_ok=True)
        (tmp_path / "st/meta.json").write_text(content_)
        flags = ["--data_dir", tmp_path / "a.jsonl", "--overwrite"]
        prepare(tmp_path / "st", *flags).fails(1, "st", "other files")
        assert (tmp_path / "st/meta.json").read_text() == content_


def test_a_folder_named_like_a_leftover_stays(tmp_path):
    """Of what may be a killed run's, only what a run makes is swept."""
    path = write_rows(tmp_path / "a.jsonl", rows())
    for name in (".store.mine", ".store.st"):
        (tmp_path / name / "new").mkdir(parents=True)
        (tmp_path / name / "notes.txt").write_text("precious")
    prepare(tmp_path / "st", "--data_dir", path).ok()
    for name in (".store.mine", ".store.st"):
        assert [p.name for p in (tmp_path / name).iterdir()] == ["notes.txt"]


def test_a_store_of_other_data_is_replaced_only_when_asked(tmp_path):
    one, other = (
        write_rows(tmp_path / name, rows(n)) for name, n in (("a.jsonl", 60), ("b.jsonl", 9))
    )
    prepare(tmp_path / "st", "--data_dir", one).ok()
    before = content(tmp_path / "st")
    prepare(tmp_path / "st", "--data_dir", other).fails(1, "st", "--overwrite")
    assert content(tmp_path / "st") == before
    (tmp_path / "st/notes.txt").write_text("precious")
    prepare(tmp_path / "st", "--data_dir", other, "--overwrite").fails(1, "notes.txt")
    (tmp_path / "st/notes.txt").unlink()
    prepare(tmp_path / "st", "--data_dir", other, "--overwrite").ok()
    assert texts(tmp_path / "st") == sorted(r["text"] for r in rows(9))


def test_a_store_sets_settings_of_data_alone(store, tmp_path):
    """Its meta.json has no say in where a run writes or how it learns."""
    folder = spoiled(store, tmp_path)
    meta = json.loads((folder / "meta.json").read_text("utf-8"))
    foreign = dict(out_dir=str(tmp_path / "elsewhere"), lr=9.0, batch_size=7, max_steps=99, seed=5)
    meta["settings"] |= foreign
    (folder / "meta.json").write_text(json.dumps(meta), "utf-8")
    train(folder, tmp_path / "run").ok()
    assert not (tmp_path / "elsewhere").exists()
    config = json.loads((tmp_path / "run/config.json").read_text("utf-8"))
    assert not any(config.get(name) == value for name, value in foreign.items())
    for name, value in dict(val_fraction=5.0, min_chars=-3, split_by="luck", text_field=4).items():
        changed = meta | {"settings": meta["settings"] | {name: value}}
        (folder / "meta.json").write_text(json.dumps(changed), "utf-8")
        train(folder, tmp_path / "other").fails(1, str(folder), name)


def test_a_store_split_otherwise_than_the_checkpoint_is_refused(tmp_path, store):
    train(store, tmp_path / "run").ok()
    entries = [{"instruction": f"Say {i}.", "output": str(i)} for i in range(60)]
    path = write_rows(tmp_path / "a.jsonl", entries)
    prepare(tmp_path / "other", "--data_dir", path, "--val_fraction", 0.4).ok()
    ckpt = ["--ckpt", tmp_path / "run/best.pth", "--data_dir", tmp_path / "other"]
    result = run("eval", *ckpt).fails(1, "--val_fraction 0.4", "0.1")
    assert len(result.errors) == 1
    run("finetune", *ckpt, "--out_dir", tmp_path / "ft").fails(1, "--val_fraction 0.4")
    run("eval", *ckpt, "--split", "all").ok()
    run("eval", *ckpt, "--val_fraction", 0.4).ok()
    prepare(tmp_path / "same", "--data_dir", path).ok()
    result = run("eval", "--ckpt", tmp_path / "run/best.pth", "--data_dir", tmp_path / "same").ok()


def test_changed_content_is_noticed_when_that_is_cheap_and_by_eval(store, tmp_path, monkeypatch):
    train(store, tmp_path / "run").ok()
    folder = spoiled(store, tmp_path)
    ids = np.fromfile(folder / "val.bin", "<u2")
    ids[5] ^= 1
    ids.tofile(folder / "val.bin")
    train(folder, tmp_path / "other").fails(1, str(folder), "val.bin")
    monkeypatch.setattr(lp, "CHEAP", 0)
    train(folder, tmp_path / "large").ok()
    ckpt = ["--ckpt", tmp_path / "run/best.pth"]
    run("eval", *ckpt, "--data_dir", folder).fails(1, str(folder), "val.bin")


def test_stores_of_the_format_before(tmp_path):
    """Refused where it is named, rebuilt among our own."""
    write_rows(tmp_path / "raw/a.jsonl", rows())
    flags = ["--data_dir", tmp_path / "raw", "--processed_dir", tmp_path / "out"]
    folder = Path(run("prepare", *flags).ok().out.splitlines()[-1])
    wanted, meta = content(folder), (folder / "meta.json").read_text("utf-8")
    (folder / "meta.json").write_text(meta.replace("store.2", "store.1"), "utf-8")
    run("prepare", "--data_dir", folder).fails(1, str(folder), "store.1", "prepare")
    assert run("prepare", *flags).ok().out.splitlines()[-1] == str(folder)
    assert content(folder) == wanted
    assert "store.2" in (folder / "meta.json").read_text("utf-8")


# --- one name for one content ---


def test_folders_of_one_name_have_stores_of_their_own(tmp_path):
    made = []
    for name, n in (("a", 20), ("b", 30)):
        write_rows(tmp_path / name / "raw/x.jsonl", rows(n))
        flags = ["--data_dir", tmp_path / name / "raw", "--processed_dir", tmp_path / "out"]
        made.append(run("prepare", *flags).ok().out.splitlines()[-1])
    assert made[0] != made[1]
    assert [len(texts(Path(folder))) for folder in made] == [20, 30]


def test_the_store_of_training_is_found_by_eval_and_finetune(tmp_path):
    entries = [{"instruction": f"Say {i}.", "output": str(i)} for i in range(60)]
    path = write_rows(tmp_path / "raw/a.jsonl", entries)
    data = ["--data_dir", path.parent, "--processed_dir", tmp_path / "out"]
    bpe = ["--tokenizer", "bpe", "--vocab_size", 300]
    command = ["train", *data, *TINY, *bpe, "--max_steps", 2, "--out_dir"]
    run(*command, tmp_path / "run").ok()
    (folder,) = (p for p in (tmp_path / "out").iterdir() if p.is_dir())
    made = (folder / "train.bin").stat().st_mtime_ns
    run("eval", *data, "--ckpt", tmp_path / "run/best.pth").ok()
    run("finetune", *data, "--ckpt", tmp_path / "run/best.pth", "--max_steps", 1,
        "--out_dir", tmp_path / "run").ok()  # fmt: skip
    run(*command, tmp_path / "again").ok()
    assert [p for p in (tmp_path / "out").iterdir() if p.is_dir()] == [folder]
    assert (folder / "train.bin").stat().st_mtime_ns == made


@pytest.mark.parametrize("source", ["file", "hub folder", "pattern"])
def test_an_edit_of_equal_size_and_time_is_noticed(tmp_path, source):
    path = write_rows(tmp_path / "set/deep/a.jsonl", rows())
    flags = {
        "file": ["--data_dir", tmp_path / "set"],
        "hub folder": ["--hf_dataset", tmp_path / "set/deep"],
        "pattern": ["--hf_dataset", "json", "--hf_files", tmp_path / "set/**/*.jsonl"],
    }[source]
    prepare(tmp_path / "st", *flags).ok()
    before, times = path.read_bytes(), path.stat()
    path.write_bytes(before.replace(b"moon", b"MOON"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    prepare(tmp_path / "st", *flags).ok()
    assert "MOON" in "".join(texts(tmp_path / "st"))
    assert "moon" not in "".join(texts(tmp_path / "st"))


# --- signals ---


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_a_signal_ends_prepare_and_leaves_nothing(tmp_path, number, tokenizer):
    raw = write_rows(tmp_path / "raw/a.jsonl", rows(2000))
    out = tmp_path / "out/st"
    flags = ["--data_dir", raw.parent, "--out_dir", out, "--tokenizer", tokenizer]
    child = Child("prepare", *flags, hook=partial(slow_reading, tmp_path / "reading"))
    wait_for((tmp_path / "reading").exists)
    child.send(number)
    result = child.finish()
    assert result.code == 128 + number and "Traceback" not in result.err
    left = [p.name for p in out.parent.iterdir()] if out.parent.exists() else []
    assert [name for name in left if not name.endswith(".lock")] == []


def slow_reading(mark: Path) -> None:
    """Records come one a tenth of a second, so that a signal meets the work."""
    read_records = lp.read_records

    def slowly(*args):
        for record in read_records(*args):
            mark.touch()
            time.sleep(0.1)
            yield record

    lp.read_records = slowly


# --- conversations in a store ---


def test_a_row_for_each_trained_answer(tmp_path):
    """Over the same tokens; the last row of a record covers it whole."""
    turns = [lp.Turn("Q1:", " a\n"), lp.Turn("Q2:", " bb\n", trained=False), lp.Turn("Q3:", " c\n")]
    found = [lp.Record("chat", turns), lp.Record("plain", [lp.Turn("", "text")])]
    config, tokenizer = lp.DataConfig(), lp.ByteTokenizer()
    writer = lp.StoreWriter(tmp_path, tokenizer, config)
    for record in found:
        writer.write_all(lp.record_pieces(record, "train", 4, config))
    writer.close()
    tokens = np.fromfile(tmp_path / "train.bin", "<u2")
    chat = [257, *b"Q1: a\n", 259, *b"Q2: bb\n", 259, *b"Q3: c\n", 259]
    assert tokens.tolist() == [*chat, 257, *b"text", 258]
    index = np.fromfile(tmp_path / "train.idx", lp.INDEX).tolist()
    first = len(b"_Q1: a\n_")
    assert index == [
        (0, first, 4, 0),
        (0, len(chat), len(chat) - len(b" c\n_"), 0),
        (len(chat), 6, 1, 1),
    ]
    store = object.__new__(lp.TokenStore)
    store.index = {"train": np.array(index, lp.INDEX)}
    assert store.whole_records("train").tolist() == [1, 2]


# --- the model check ---


@pytest.fixture(scope="module")
def small_gpt2(tmp_path_factory):
    transformers = needs("transformers")
    torch.manual_seed(0)
    shape = dict(vocab_size=260, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))
    with torch.no_grad():  # sharp enough that one place more or less shows
        model.transformer.wte.weight.mul_(30)
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder)
    return folder


def check(store: Path, model, *flags):
    return run("prepare", "--data_dir", store, "--check_model", model, *flags)


def test_a_model_that_shifts_its_labels(store, small_gpt2):
    import transformers

    out = check(store, small_gpt2, "--block_size", 48).ok().out
    model = transformers.AutoModelForCausalLM.from_pretrained(small_gpt2).eval()
    ids = torch.tensor(json.loads((store / "sample_batch.json").read_text())["input_ids"])
    with torch.no_grad():
        logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 260), ids[:, 1:].flatten())
    printed = [float(x) for x in re.findall(r"\d+\.\d{4}", out)]
    assert printed[-2:] == pytest.approx([loss.item()] * 2, abs=2e-4)
    assert "(4, 48)" in out and "(4, 48, 260)" in out


@pytest.fixture
def unshifted(small_gpt2, tmp_path):
    """The same weights in a class that compares each logit with its own input."""
    import transformers

    class UnshiftedConfig(transformers.GPT2Config):
        model_type = "unshifted"

    class Unshifted(transformers.GPT2LMHeadModel):
        config_class = UnshiftedConfig

        def forward(self, input_ids=None, labels=None, **more):
            out = super().forward(input_ids=input_ids, **more)
            if labels is not None:
                out.loss = torch.nn.functional.cross_entropy(
                    out.logits.flatten(0, 1), labels.flatten()
                )
            return out

    transformers.AutoConfig.register("unshifted", UnshiftedConfig, exist_ok=True)
    transformers.AutoModelForCausalLM.register(UnshiftedConfig, Unshifted, exist_ok=True)
    shape = transformers.GPT2Config.from_pretrained(small_gpt2).to_dict()
    model = Unshifted(UnshiftedConfig(**{k: v for k, v in shape.items() if k != "model_type"}))
    source = transformers.GPT2LMHeadModel.from_pretrained(small_gpt2)
    model.load_state_dict(source.state_dict())
    model.save_pretrained(tmp_path / "unshifted")
    return tmp_path / "unshifted"


def test_a_model_that_does_not_shift_is_refused(store, unshifted):
    check(store, unshifted, "--block_size", 48).fails(1, "unshifted", "shift")


def test_a_model_that_cannot_take_the_batch(store, small_gpt2, tmp_path, offline):
    import transformers

    result = check(store, small_gpt2, "--block_size", 100).fails(1, str(small_gpt2))
    assert len(result.errors) == 1 and "--block_size 100" in result.err
    shape = dict(vocab_size=100, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).save_pretrained(tmp_path / "s")
    check(store, tmp_path / "s", "--block_size", 32).fails(1, "100", "260")
    check(store, tmp_path / "nowhere").fails(1, "nowhere")
    model = transformers.GPT2LMHeadModel.from_pretrained(small_gpt2)
    with torch.no_grad():
        model.transformer.wte.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "nan")
    check(store, tmp_path / "nan", "--block_size", 32).fails(1, "nan")


# --- downloads ---


class Mirror:
    """A small HTTP server on the loopback address that misbehaves as it is told."""

    def __init__(self, files: dict[str, bytes]):
        self.files, self.modes, self.asked = files, [], 0
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                mirror.answer(self)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()

    def answer(self, handler) -> None:
        mode = self.modes.pop(0) if self.modes else "good"
        self.asked += 1
        body = self.files.get(handler.path.strip("/"))
        if mode == "refuse" or body is None:
            handler.send_error(503 if body is not None else 404)
            return
        if mode == "corrupt":
            body = body[:100] + b"????" + body[104:]
        handler.send_response(200)
        if mode != "no length":
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: len(body) // 2] if mode in ("truncate", "no length") else body)


@pytest.fixture
def mirror(data):
    served = Mirror(
        {
            "instruction-data.json": (data / "instruction-data.json").read_bytes(),
            "sms+spam+collection.zip": zipped(data, "sms_spam_collection", "SMSSpamCollection"),
            "wikitext-2-v1.zip": zipped(
                data, "wikitext-2", *(f"wiki.{s}.tokens" for s in ("train", "valid", "test"))
            ),
            "input.txt": (data / "tinyshakespeare/input.txt").read_bytes(),
        }
    )
    yield served
    served.server.shutdown()
    served.server.server_close()


def zipped(data: Path, folder: str, *names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("readme", "Citation: see the paper.")
        for name in names:
            archive.write(data / folder / name, f"{folder}/{name}")
    return buffer.getvalue()


@pytest.fixture
def fetch(mirror, tmp_path):
    def go(name: str = "instructions"):
        flags = ["--data_dir", tmp_path / "raw", "--processed_dir", tmp_path / "out"]
        return run("prepare", "--download", name, *flags, "--mirror", mirror.address)

    return go


def files_in(folder: Path) -> dict[str, bytes]:
    found = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


@pytest.mark.parametrize("name", ["instructions", "tinyshakespeare", "sms_spam"])
def test_download(fetch, mirror, data, tmp_path, name):
    out = fetch(name).ok().out
    files = files_in(tmp_path / "raw")
    assert len(files) == 1
    assert out == f"{tmp_path / 'raw' / next(iter(files))}\n"
    assert all(content == (data / file).read_bytes() for file, content in files.items())
    assert not (tmp_path / "out").exists(), "nobody asked for tokens"
    asked = mirror.asked
    fetch(name).ok()
    assert mirror.asked == asked, "what is there is not fetched again"


def test_download_of_several_files(mirror, data, tmp_path):
    found = lp.download("wikitext-2", tmp_path, mirror.address)
    files = files_in(tmp_path)
    assert found == [tmp_path / file for file in lp.DOWNLOADS["wikitext-2"][1]]
    assert len(files) == 3
    assert all(content == (data / file).read_bytes() for file, content in files.items())


@pytest.mark.parametrize("mode", ["truncate", "no length", "corrupt", "refuse"])
def test_a_broken_download_is_one_line_and_then_made_good(fetch, mirror, data, tmp_path, mode):
    mirror.modes = [mode]
    result = fetch().fails(1, "instruction")
    assert len(result.errors) == 1
    assert "again" in result.err or "same command" in result.err or "503" in result.err
    assert not files_in(tmp_path / "raw"), "no part is left"
    fetch().ok()
    content = (tmp_path / "raw/instruction-data.json").read_bytes()
    assert content == (data / "instruction-data.json").read_bytes()
    assert len(files_in(tmp_path / "raw")) == 1


@pytest.mark.parametrize("damage", ["middle", "end", "other", "empty"])
def test_a_damaged_archive(fetch, mirror, tmp_path, damage):
    name = "sms+spam+collection.zip"
    whole = mirror.files[name]
    middle = len(whole) // 2
    mirror.files[name] = {
        "middle": whole[:middle] + bytes(64) + whole[middle + 64 :],
        "end": whole[:-30] + b"\xff" * 4 + whole[-26:],
        "other": zipped(tmp_path, "."),
        "empty": b"",
    }[damage]
    result = fetch("sms_spam").fails(1)
    assert len(result.errors) == 1
    assert not (tmp_path / "out").exists()
    mirror.files[name] = whole
    fetch("sms_spam").ok()
    assert list(files_in(tmp_path / "raw")) == ["sms_spam_collection/SMSSpamCollection"]


def test_no_network(tmp_path, mirror):
    mirror.server.shutdown()
    mirror.server.server_close()
    flags = ["--download", "instructions", "--data_dir", tmp_path / "raw"]
    result = run("prepare", *flags, "--mirror", mirror.address).fails(1, "instructions", "network")
    assert len(result.errors) == 1
    run("prepare", *flags, "--mirror", "not an address").fails(1, "not an address")


def test_an_unknown_download(tmp_path):
    flags = ["--download", "tinyshakespear", "--data_dir", tmp_path / "raw"]
    result = run("prepare", *flags)
    assert result.code in (1, 2) and len(result.errors) == 1
    assert "tinyshakespeare" in result.err


# --- a store and the commands that use it ---


def test_a_store_brings_its_settings(tmp_path):
    entries = [{"instruction": f"Say {i}.", "output": str(i)} for i in range(60)]
    path = write_rows(tmp_path / "a.jsonl", entries)
    store = tmp_path / "store"
    prepare(store, "--data_dir", path, "--tokenizer", "bpe", "--vocab_size", 300).ok()
    flags = ["--data_dir", store, "--device", "cpu", "--batch_size", 4]
    train = ["train", *flags, *TINY, "--max_steps", 2]
    run(*train, "--tokenizer", "byte", "--out_dir", tmp_path / "a").fails(1, "tokenizer")
    run(*train, "--split_seed", 7, "--out_dir", tmp_path / "a").fails(1, "split_seed")
    run(*train, "--out_dir", tmp_path / "a").ok()
    run("train", "--config", tmp_path / "a/config.json", "--out_dir", tmp_path / "b").ok()
    assert differences(tmp_path / "a/last.pth", tmp_path / "b/last.pth") == []
    best = ["--ckpt", tmp_path / "a/best.pth"]
    run("finetune", *flags, *best, "--max_steps", 2, "--out_dir", tmp_path / "a").ok()
    run("eval", *flags, *best).ok()


def test_max_tokens_counts_what_it_left(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", rows(60))
    report = prepare(tmp_path / "store", "--data_dir", path, "--max_tokens", 2000).ok().out
    figures = {line[:28].strip(): line[28:].strip() for line in report.splitlines()}
    written = sum(int(figures[f"records, {split}"]) for split in ("train", "val"))
    assert int(figures["records read"]) == written + int(figures["dropped, past --max_tokens"])
    assert 0.8 < float(figures["bytes per token"]) <= 1


def test_a_link_to_itself_cannot_be_a_store(tmp_path):
    (tmp_path / "a.txt").write_text("some text to keep\n" * 50)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    flags = ["--data_dir", tmp_path / "a.txt", "--out_dir", tmp_path / "loop"]
    result = run("prepare", *flags, "--processed_dir", tmp_path / "p").fails(1, "loop")
    assert "RuntimeError" not in result.err and (tmp_path / "loop").is_symlink()
