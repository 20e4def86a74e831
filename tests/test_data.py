"""Sources, records, the split, the token store, windows and batches."""

import gzip
import hashlib
import json
import os
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, needs, run
from hypothesis import given, settings
from hypothesis import strategies as st

import llm_pipeline as lp

IGNORE = -100  # a target that does not count
TEMPLATE = "### Instruction: {}\n### Input: {}\n### Output:"


def prepared(out: Path, source: Path, *flags, **more):
    """The store that `prepare` would make of a file or folder, without its report."""
    flags = ["--data_dir", source, "--processed_dir", out, *flags]
    config = lp.parse(["prepare", *map(str, flags)])[1]
    return lp.build_corpus_from_sources(config, **more)


def documents(store, split: str) -> list[str]:
    """The text of each record of a split, its special tokens left out."""
    texts = []
    for start, length, _, _ in store.index[split].tolist():
        texts.append(store.tokenizer.decode(store.tokens[split][start : start + length]))
    return texts


def everything(store) -> list[str]:
    return sorted(documents(store, "train") + documents(store, "val"))


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def instruction(task: str, text: str, answer: str) -> str:
    return f"{TEMPLATE.format(task, text)} {answer}\n"


# --- sources and shapes ---

TASKS = [(f"Task {i}, 你好", f"input {i}" * (i % 2), f"answer {i}") for i in range(30)]
PLAIN = [f"Plain text number {i}. Über 😀" for i in range(30)]
SHAPES = {
    "alpaca": [dict(instruction=t, input=i, output=o) for t, i, o in TASKS],
    "completion": [dict(prompt=t, input=i, completion=o) for t, i, o in TASKS],
    "response": [dict(prompt=t, input=i, response=o) for t, i, o in TASKS],
    "preference": [dict(instruction=t, input=i, chosen=o, rejected="no") for t, i, o in TASKS],
    "text": [dict(text=t) for t in PLAIN],
}


@pytest.mark.parametrize("packed", [False, True], ids=["", "gz"])
@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(tmp_path, shape, ending, packed):
    rows, path = SHAPES[shape], tmp_path / f"raw/file.{ending}"
    path.parent.mkdir()
    if ending == "parquet":
        pa, parquet = needs("pyarrow"), needs("pyarrow.parquet")
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        write(path, json.dumps(rows) if ending == "json" else jsonl(rows))
    if packed:
        write(path.with_name(path.name + ".gz"), gzip.compress(path.read_bytes()))
        path.unlink()
    wanted = PLAIN if shape == "text" else [instruction(*task) for task in TASKS]
    assert everything(prepared(tmp_path, path.parent)) == sorted(wanted)


def test_endings_in_upper_case(tmp_path):
    rows = jsonl(SHAPES["text"])
    write(tmp_path / "raw/a.JSONL", rows)
    write(tmp_path / "raw/b.TXT.GZ", gzip.compress(b"Text of B"))
    texts = everything(prepared(tmp_path, tmp_path / "raw", "--val_fraction", 1e-9))
    assert texts == sorted([*PLAIN, "Text of B"])


def test_messages(tmp_path):
    def turns(*said):
        roles = ("user", "assistant") if len(said) == 2 else ("system", "user", "assistant")
        return dict(messages=[dict(role=r, content=c) for r, c in zip(roles, said, strict=True)])

    rows = [turns(t, o) for t, _, o in TASKS] + [turns("Be kind.", "Hello?", "Hi!")]
    write(tmp_path / "raw/chat.jsonl", jsonl(rows))
    texts = everything(prepared(tmp_path, tmp_path / "raw"))
    assert {instruction(t, "", o) for t, _, o in TASKS} < set(texts)
    [long] = [t for t in texts if t.endswith("### Output: Hi!\n")]
    assert "Be kind." in long and "Hello?" in long


def test_every_shape_reads_an_instruction_with_a_text_column_alike(tmp_path):
    """Tables such as Alpaca's hold the whole text beside its parts."""
    pa, parquet = needs("pyarrow"), needs("pyarrow.parquet")
    rows = [dict(instruction=t, input=i, output=o, text=f"whole {t}") for t, i, o in TASKS]
    write(tmp_path / "a/rows.jsonl", jsonl(rows))
    (tmp_path / "b").mkdir()
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "b/rows.parquet")
    one, two = (prepared(tmp_path, tmp_path / n) for n in "ab")
    assert everything(one) == everything(two)


def test_sms_keeps_quotes_and_odd_lines(tmp_path):
    lines = [
        'ham\tHe said "hi',
        'spam\t"WIN" now\t£5',
        "ham\t  spaces  ",
        "",
        "ham\t你好\r",
        "ham\tx",
    ]
    write(tmp_path / "raw/sms_spam_collection/SMSSpamCollection", "\n".join(lines))
    texts = everything(prepared(tmp_path, tmp_path / "raw"))
    task = "classify if the SMS is spam or ham"
    wanted = [('He said "hi', "ham"), ('"WIN" now\t£5', "spam"), ("  spaces  ", "ham"),
              ("你好", "ham"), ("x", "ham")]  # fmt: skip
    assert texts == sorted(instruction(task, message, label) for message, label in wanted)


@pytest.mark.parametrize("name", ["x/y/SMSSpamCollection", "sms.tsv", "SMSSpamCollection.txt.gz"])
def test_sms_by_any_name(tmp_path, name):
    content = "".join(f"ham\tmessage {i}\n" for i in range(20)).encode()
    write(tmp_path / "raw" / name, gzip.compress(content) if name.endswith("gz") else content)
    assert len(everything(prepared(tmp_path, tmp_path / "raw"))) == 20


def test_the_real_sms_collection(tmp_path, data):
    store = prepared(tmp_path, data / "sms_spam_collection")
    lines = (data / "sms_spam_collection/SMSSpamCollection").read_text("utf-8").splitlines()
    assert len(lines) == 5574
    labels = [line.split("\t")[0] for line in lines]
    assert (labels.count("ham"), labels.count("spam")) == (4827, 747)
    counts = store.meta["counts"]["sms"]
    assert counts["records"] == 5574
    assert counts["skipped: duplicate"] == 403
    task = "classify if the SMS is spam or ham"
    pairs = {tuple(line.split("\t", 1)) for line in lines}
    assert everything(store) == sorted(instruction(task, text, label) for label, text in pairs)
    n_val = len(store.index["val"])
    assert n_val + len(store.index["train"]) == 5171
    assert 0.08 < n_val / 5171 < 0.12


def test_the_real_instructions(tmp_path, data):
    store = prepared(tmp_path, data / "instruction-data.json")
    rows = json.loads((data / "instruction-data.json").read_text("utf-8"))
    wanted = {instruction(r["instruction"], r["input"], r["output"]) for r in rows}
    assert everything(store) == sorted(wanted)


def test_fineweb_parquet_and_jsonl_are_the_same(tmp_path, data):
    one = prepared(tmp_path / "1", data / "fineweb/fineweb_10rows.parquet")
    two = prepared(tmp_path / "2", data / "fineweb/fineweb_10rows.jsonl")
    rows = (data / "fineweb/fineweb_10rows.jsonl").read_text("utf-8").splitlines()
    assert everything(one) == everything(two) == sorted(json.loads(r)["text"] for r in rows)
    for split in ("train", "val"):
        assert np.array_equal(one.tokens[split], two.tokens[split])


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a", "a.py", "a.txt.gz", "a.log.gz"])
def test_plain_files(tmp_path, name):
    text = "Ein Text, 你好.\n" * 5
    content = gzip.compress(text.encode()) if name.endswith("gz") else text.encode()
    write(tmp_path / "raw" / name, content)
    write(tmp_path / "raw/other.txt", "Other text\n" * 3)
    write(tmp_path / "raw/picture.png", b"\x89PNG\0\0\xff")
    write(tmp_path / "raw/.hidden.txt", "hidden")
    store = prepared(tmp_path, tmp_path / "raw", "--val_fraction", 0.01)
    assert everything(store) == sorted([text, "Other text\n" * 3])
    assert "skipped: not text" in store.meta["counts"]["picture.png"]


def test_byte_order_marks_are_dropped(tmp_path):
    write(tmp_path / "raw/a.txt", b"\xef\xbb\xbfHello there, Bob.")
    write(tmp_path / "raw/b.jsonl", b"\xef\xbb\xbf" + jsonl(SHAPES["text"]).encode())
    assert everything(prepared(tmp_path, tmp_path / "raw")) == sorted(["Hello there, Bob.", *PLAIN])


@pytest.mark.parametrize("delimiter", [r"\n", r"\n\n", "<|endoftext|>", "%%", "ab"])
@pytest.mark.parametrize("block", [lp.BLOCK, 97])
def test_doc_delimiter(tmp_path, delimiter, block, monkeypatch):
    """Delimiters are found wherever the blocks in which a file is read end."""
    monkeypatch.setattr(lp, "BLOCK", block)
    mark = delimiter.replace(r"\n", "\n")
    rng = random.Random(0)
    pieces = ["".join(rng.choices("xyz %<a", k=rng.randrange(1, 200))) for _ in range(1000)]
    text = mark.join(pieces)
    assert len(text) > lp.BLOCK
    pieces = [p for p in text.split(mark) if p.strip()]
    write(tmp_path / "raw/a.txt", text)
    store = prepared(tmp_path, tmp_path / "raw", "--doc_delimiter", delimiter)
    counted = store.meta["counts"]["a.txt"]
    assert counted["records"] - counted.get("skipped: short or empty", 0) >= len(set(pieces))
    assert everything(store) == sorted(set(pieces))


def test_text_field(tmp_path):
    write(tmp_path / "raw/a.jsonl", jsonl({"body": t, "id": 3} for t in PLAIN))
    assert everything(prepared(tmp_path, tmp_path / "raw", "--text_field", "body")) == sorted(PLAIN)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "lines"])
def test_min_chars(tmp_path, kind):
    """Short and blank texts are dropped and counted, whole files too."""
    texts = ["", " \n \t ", "short", "just ten.!", "this is long enough to stay"]
    flags = ["--min_chars", 10]
    if kind == "txt":
        for i, text in enumerate(texts):
            write(tmp_path / f"raw/{i}.txt", text)
    elif kind == "jsonl":
        write(tmp_path / "raw/a.jsonl", jsonl({"text": t} for t in texts))
    else:
        write(tmp_path / "raw/a.txt", "\0".join(texts).replace("\0", "%%"))
        flags += ["--doc_delimiter", "%%"]
    store = prepared(tmp_path, tmp_path / "raw", *flags, "--val_fraction", 0.01)
    assert everything(store) == sorted(texts[3:])
    dropped = [c.get("skipped: short or empty", 0) for c in store.meta["counts"].values()]
    assert sum(dropped) == 3


# --- the token stream ---


def test_template_and_special_tokens(tmp_path):
    write(tmp_path / "raw/a.json", json.dumps([dict(instruction="Do <|sep|>", output="ok")]))
    store = prepared(tmp_path, tmp_path / "raw", "--val_fraction", 1e-9)
    prompt = b"### Instruction: Do <|sep|>\n### Input: \n### Output:"
    assert store.tokens["train"].tolist() == [257, *prompt, *b" ok\n", 259]
    assert store.index["train"].tolist() == [(0, len(prompt) + 6, len(prompt) + 1, 0)]
    write(tmp_path / "raw/a.json", json.dumps([dict(text="<|eos|> x")]))
    store = prepared(tmp_path, tmp_path / "raw", "--val_fraction", 1e-9)
    assert store.tokens["train"].tolist() == [257, *b"<|eos|> x", 258]


def test_the_index_describes_the_tokens(tmp_path):
    write(tmp_path / "raw/a.jsonl", jsonl(SHAPES["alpaca"] + SHAPES["text"]))
    store = prepared(tmp_path, tmp_path / "raw")
    for split in ("train", "val"):
        tokens, end = store.tokens[split], 0
        for start, length, prompt, source in store.index[split].tolist():
            ids = tokens[start : start + length]
            assert start == end and ids[0] == 257 and (ids[1:-1] < 256).all()
            kind = store.sources[source]
            assert ids[-1] == (259 if kind == "instructions" else 258)
            head = bytes(ids[1:prompt].tolist())
            assert head.endswith(b"### Output:") if kind == "instructions" else head == b""
            end = start + length
        assert end == len(tokens)


@pytest.mark.parametrize(
    "text",
    [
        "The quick brown fox's 12345 dogs.\n\n  Don't -- stop!\t",
        "你好，世界。这是一个没有空格的句子！\n",
        "0123456789abcdef",
        "word\n\n\n   ",
    ],
    ids=["english", "chinese", "unbroken", "blank"],
)
def test_tokens_do_not_depend_on_block_boundaries(tmp_path, data, text, monkeypatch):
    """A file of many blocks has the ids of its text encoded in one go."""
    monkeypatch.setattr(lp, "BLOCK", 1 << 13)
    tokenizer = lp.load_tokenizer(str(data / "gpt2_bpe"))
    rng = random.Random(0)
    whole = "".join(text[rng.randrange(len(text)) :] for _ in range(400_000 // len(text.encode())))
    write(tmp_path / "raw/a.txt", whole)
    store = prepared(tmp_path, tmp_path / "raw", "--tokenizer", data / "gpt2_bpe")
    data_bytes = whole.encode()
    cut = len(data_bytes) - -(-len(data_bytes) // 10)
    while data_bytes[cut] & 0xC0 == 0x80:
        cut += 1
    for split, part in (("train", data_bytes[:cut]), ("val", data_bytes[cut:])):
        ids = store.tokens[split][1:-1]
        wanted = tokenizer.encode(part.decode())
        assert np.array_equal(ids, wanted)


# --- the split ---


def test_a_long_text_gives_its_last_tenth(tmp_path, data):
    store = prepared(tmp_path, data / "tinyshakespeare/input.txt")
    text = (data / "tinyshakespeare/input.txt").read_bytes()
    assert bytes(store.tokens["val"][1:-1].tolist()) == text[-111_540:]
    assert bytes(store.tokens["train"][1:-1].tolist()) == text[:-111_540]


def test_the_cut_of_a_long_text_keeps_characters_whole(tmp_path):
    for shift in range(3):
        text = "x" * shift + "你" * 30_000
        write(tmp_path / "raw/a.txt", text)
        store = prepared(tmp_path, tmp_path / "raw")
        parts = [documents(store, s)[0] for s in ("train", "val")]
        assert "".join(parts) == text
        assert abs(len(parts[1].encode()) - len(text.encode()) / 10) < 4


def test_no_validation_record_is_trained_on(tmp_path):
    rng = random.Random(0)
    texts = [f"text {rng.randrange(700)}" for _ in range(5000)]
    for i in range(4):
        write(tmp_path / f"raw/{i}.jsonl", jsonl({"text": t} for t in texts[i::4]))
    write(tmp_path / "raw/lines.json", json.dumps([{"text": t} for t in texts[:900]]))
    store = prepared(tmp_path, tmp_path / "raw")
    train, val = (documents(store, s) for s in ("train", "val"))
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted(set(texts))
    assert 0.05 < len(val) / len(set(texts)) < 0.16


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5])
def test_val_fraction(tmp_path, fraction):
    write(tmp_path / "raw/a.jsonl", jsonl({"text": f"text {i}"} for i in range(4000)))
    store = prepared(tmp_path, tmp_path / "raw", "--val_fraction", fraction)
    share = len(store.index["val"]) / 4000
    assert abs(share - fraction) < 4 * (fraction * (1 - fraction) / 4000) ** 0.5


def test_adding_data_moves_no_record(tmp_path):
    write(tmp_path / "raw/m.jsonl", jsonl({"text": f"text {i}"} for i in range(500)))
    before = prepared(tmp_path / "1", tmp_path / "raw")
    write(tmp_path / "raw/a.jsonl", jsonl({"text": f"more {i}"} for i in range(500)))
    write(tmp_path / "raw/z.jsonl", jsonl(SHAPES["alpaca"] + [{"text": "text 3"}]))
    after = prepared(tmp_path / "2", tmp_path / "raw")
    for split in ("train", "val"):
        assert set(documents(before, split)) <= set(documents(after, split))


def test_split_seed_moves_records(tmp_path):
    write(tmp_path / "raw/m.jsonl", jsonl({"text": f"text {i}"} for i in range(500)))
    one, two = (prepared(tmp_path / n, tmp_path / "raw", "--split_seed", n) for n in "12")
    assert set(documents(one, "val")) != set(documents(two, "val"))
    assert everything(one) == everything(two)


def test_named_splits(tmp_path):
    for name in ("train", "valid", "test"):
        write(tmp_path / f"raw/wiki.{name}.tokens", f"The {name} text.\n" * 5000)
    store = prepared(tmp_path, tmp_path / "raw")
    assert documents(store, "train") == ["The train text.\n" * 5000]
    assert documents(store, "val") == ["The valid text.\n" * 5000]
    assert any("test" in why for _, why, _ in store.meta["skipped"])


@pytest.mark.parametrize("layout", ["wiki.{}.tokens", "{}/wiki.tokens", "{}/deep/wiki.tokens"])
def test_one_part_of_a_split_keeps_its_role(tmp_path, layout):
    """What was trained on never validates, and what validates is never trained on."""
    for name in ("train", "valid", "test"):
        write(tmp_path / "raw" / layout.format(name), f"The {name} text.\n" * 5000)
    both = prepared(tmp_path, tmp_path / "raw")
    assert documents(both, "train") == ["The train text.\n" * 5000]
    assert documents(both, "val") == ["The valid text.\n" * 5000]

    def part(name: str) -> Path:
        path = tmp_path / "raw" / layout.format(name)
        return path.parent.parent if "deep" in layout else path

    alone = prepared(tmp_path / "1", part("train"))
    assert not len(alone.index["val"]) and documents(alone, "train") == documents(both, "train")
    for name, role in (("train", "train"), ("valid", "val"), ("test", "test")):
        config = lp.DataConfig(data_dir=str(part(name)))
        assert lp.data_role(config) == role
        side = "train" if role == "train" else "val"
        assert [record.split for record in lp.read_records(config, lp.Report())] == [side]
    flags = ["--data_dir", part("test"), "--processed_dir", tmp_path / "2"]
    run("train", *flags, *TINY, "--out_dir", tmp_path / "run").fails(1, "train")


def test_eval_of_one_part_scores_that_part(tmp_path, tiny_checkpoint):
    """Whole, and it says so; a training part holds nothing to validate on."""
    texts = {name: f"Some {name} text of its own.\n" * 50 for name in ("train", "valid", "test")}
    for name, text in texts.items():
        write(tmp_path / f"raw/wiki.{name}.txt", text)

    def scored(name: str, *more):
        path = tmp_path / f"raw/wiki.{name}.txt"
        flags = ["--data_dir", path, "--processed_dir", tmp_path / "out", "--device", "cpu"]
        return run("eval", "--ckpt", tiny_checkpoint, *flags, *more, "--json", tmp_path / "r.json")

    for name in ("valid", "test"):
        assert "part of a split: all of it validates" in scored(name).ok().err
        result = json.loads((tmp_path / "r.json").read_text())
        assert result["bytes"] == len(texts[name])
    scored("train").fails(1, "val")
    assert "all of it trains" in scored("train", "--split", "train").ok().err


def test_a_test_file_beside_a_training_file_is_not_trained_on(tmp_path):
    write(tmp_path / "raw/train.jsonl", jsonl({"text": f"train {i}"} for i in range(100)))
    write(tmp_path / "raw/test.jsonl", jsonl({"text": f"test {i}"} for i in range(100)))
    store = prepared(tmp_path, tmp_path / "raw")
    assert not [t for t in documents(store, "train") if t.startswith("test")]


# --- reuse ---


def stamp(store) -> tuple:
    """When the files were written: their inode numbers may be used again."""
    return tuple((store.folder / n).stat().st_mtime_ns for n in ("train.bin", "meta.json"))


def test_a_store_is_reused_until_something_changes(tmp_path):
    raw = tmp_path / "raw"
    write(raw / "a.jsonl", jsonl({"text": f"text {i}"} for i in range(50)))
    write(raw / "b.txt", "more text")

    def made(*flags) -> tuple:
        store = prepared(tmp_path / "out", raw, *flags, folder=tmp_path / "out/store")
        return stamp(store), store.fingerprint

    first = made()
    assert made() == first
    for flags in (["--split_seed", 5], ["--min_chars", 7], ["--val_fraction", 0.3],
                  ["--doc_delimiter", "x"], ["--max_docs", 5]):  # fmt: skip
        assert made(*flags)[0] != first[0]
    again = made()
    assert again[1] == first[1], "the same data has the same fingerprint"
    write(raw / "b.txt", "MORE text")
    os.utime(raw / "b.txt", (1, 1))
    changed = made()
    assert changed[1] != first[1]
    write(raw / "c.txt", "a third text")
    assert made()[1] != changed[1]
    (raw / "c.txt").unlink()
    assert made()[1] == changed[1]


def test_a_store_is_rebuilt_when_its_tokenizer_changes(tmp_path):
    raw, name = write(tmp_path / "raw/a.txt", "The cat sees the dog. " * 90), tmp_path / "own.json"
    specs = []
    for size in (300, 270):
        flags = ["--tokenizer", "bpe", "--vocab_size", size]
        specs.append(prepared(tmp_path / str(size), raw, *flags).tokenizer.spec()["json"])
        write(name, specs[-1])
        os.utime(name, (size, size))
        store = prepared(tmp_path / "out", raw, "--tokenizer", name)
        assert json.loads(store.tokenizer.spec()["json"]) == json.loads(specs[-1])
    assert specs[0] != specs[1]


# --- the toy corpus ---


def test_the_toy_corpus_is_for_the_default_folder_alone(tmp_path):
    (tmp_path / "data/raw").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    result = run("prepare", cwd=tmp_path).ok()
    assert "toy corpus" in result.err and "data/raw" in result.err
    run("prepare", "--data_dir", "other", cwd=tmp_path).fails(1, "other", "no files")
    write(tmp_path / "data/raw/a.jsonl", jsonl(SHAPES["text"]))
    assert "toy" not in run("prepare", cwd=tmp_path).ok().err


# --- bad input ---


def refused(tmp_path, *words, flags=(), code=1):
    flags = ["--data_dir", tmp_path / "raw", "--processed_dir", tmp_path / "out", *flags]
    result = run("prepare", *flags).fails(code, *words)
    assert len(result.errors) == 1
    assert not list((tmp_path / "out").glob("*/meta.json"))
    return result


GOOD = jsonl(SHAPES["text"])


@pytest.mark.parametrize(
    "name, content, word",
    [
        ("a.json", '[{"text": "a"}', "JSON"),
        ("a.json", '{\n"text": "a"}', "list"),
        ("a.json", "[" * 100_000 + "]" * 100_000, "JSON"),
        ("a.json", '[{"a":' * 100_000, "JSON"),
        ("a.json", "", "JSON"),
        ("a.json", "[5]", "entry 1"),
        ("a.json", '[{"text": "a"}, {"text": 5}]', "entry 2"),
        ("a.json", '[{"words": "a"}]', "(words)"),
        ("a.json", "[" + "9" * 5000 + "]", "a.json"),
        ("a.jsonl", GOOD + '{"text": \n' + GOOD, ":31"),
        ("a.jsonl", GOOD + "[" * 100_000, ":31"),
        ("a.jsonl", GOOD + '{"instruction": "a", "output": ["b"]}', ":31"),
        ("a.jsonl", GOOD + '{"instruction": "a"}', ":31"),
        ("a.jsonl", GOOD + '{"messages": [5]}', ":31"),
        ("a.jsonl", GOOD + '{"messages": [{"role": "user", "content": "x"}]}', ":31"),
        ("SMSSpamCollection", "ham\tone\nham two\nham\tthree\n", ":2"),
        ("SMSSpamCollection", "ham\tone\n\ttwo\n", ":2"),
        ("a.txt", b"abc\xffdef", "byte 3"),
        ("a.txt", b"x" * 3_000_000 + b"\xe4\xbd" + b"x" * 9, "byte 3000000"),
        ("a.txt", b"x" * 2_097_151 + b"\xe4\xbd", "byte 2097151"),
        ("a.jsonl", b'{"text": "\xc3\x28"}', "byte 10"),
        ("a.txt", "Größe".encode("utf-16"), "byte 0"),
        ("a.txt.gz", b"not gzip", "a.txt.gz"),
        ("a.txt.gz", gzip.compress(b"hello " * 5000, mtime=0)[:-9], "a.txt.gz"),
        ("a.jsonl.gz", gzip.compress(GOOD.encode(), mtime=0)[:40], "a.jsonl.gz"),
        ("a.csv", '"a"b,text\nx,y\n', "expected after"),
        ("a.csv", 'id,text\n1,"a"b\n', "expected after"),
        ("a.csv", "id,text\n1,a,b\n", "more cells"),
        ("a.csv", "text,text\na,b\n", "two columns"),
        ("a.jsonl", '{"text": null}', "is null"),
        ("a.parquet", b"PAR1 no table PAR1", "a.parquet"),
        ("a.parquet", b"", "a.parquet"),
    ],
)
def test_broken_files(tmp_path, name, content, word):
    write(tmp_path / "raw" / name, content)
    refused(tmp_path, name, word)


def test_a_missing_folder(tmp_path):
    refused(tmp_path, "raw", "does not exist")


def test_an_empty_folder(tmp_path):
    (tmp_path / "raw").mkdir()
    refused(tmp_path, "raw", "no files")
    write(tmp_path / "raw/a.bin", b"\0\1\2")
    refused(tmp_path, "raw", "1 file(s), none readable")


def test_files_without_text(tmp_path):
    write(tmp_path / "raw/a.txt", "")
    write(tmp_path / "raw/b.jsonl", "\n\n")
    refused(tmp_path, "raw")


def test_a_parquet_without_the_column(tmp_path):
    pa, parquet = needs("pyarrow"), needs("pyarrow.parquet")
    (tmp_path / "raw").mkdir()
    parquet.write_table(pa.table({"body": ["a", "b"], "id": [1, 2]}), tmp_path / "raw/a.parquet")
    refused(tmp_path, "a.parquet", "'text'", "body, id", "--text_field")
    parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "raw/a.parquet")
    refused(tmp_path, "a.parquet", "row 1", "int")
    parquet.write_table(pa.table({"text": ["good", None]}), tmp_path / "raw/a.parquet")
    refused(tmp_path, "a.parquet", "row 2")


def test_a_malformed_row_of_a_table_is_skipped_alone(tmp_path):
    write(tmp_path / "raw/a.csv", 'text\nalpha\n"bad"x\nbeta\n"worse"y\ngamma\n')
    flags = "--data_dir", tmp_path / "raw", "--bad_records", "skip", "--out_dir", tmp_path / "st"
    result = run("prepare", *flags).ok()
    assert re.search(r"skipped: .*expected after.*: 2 \(first: .*a\.csv:3\)", result.err), (
        result.err
    )
    store = lp.TokenStore(tmp_path / "st")
    texts = b"".join(
        bytes(store.tokens[s][store.tokens[s] < 256].astype("u1")) for s in store.tokens
    )
    assert sorted([texts.count(word) for word in (b"alpha", b"beta", b"gamma")]) == [1, 1, 1]


def test_a_quote_without_an_end_costs_its_own_line(tmp_path):
    write(tmp_path / "raw/a.csv", 'text,n\n"two\nlines",1\n"open,2\nbeta,3\ngamma,4\n')
    config = lp.DataConfig(data_dir=str(tmp_path / "raw"), bad_records="skip")
    report = lp.Report()
    found = [record.response for record in lp.read_records(config, report)]
    assert found == ["two\nlines", "beta", "gamma"]
    assert list(report.examples.values()) == [f"{tmp_path}/raw/a.csv:4"]


def test_bad_records_skip(tmp_path):
    bad = ['{"text": 5}', "{", "5", '{"x": 1}', '{"text": "good"}']
    write(tmp_path / "raw/a.jsonl", "\n".join(bad))
    lines = [f"ham\tmessage {i}" for i in range(20)] + ["no tab", "\tno label"]
    write(tmp_path / "raw/SMSSpamCollection", "\n".join(lines))
    write(tmp_path / "raw/b.json", json.dumps([{"text": "fine"}, 7]))
    flags = ["--data_dir", tmp_path / "raw", "--processed_dir", tmp_path / "out"]
    result = run("prepare", *flags, "--bad_records", "skip", "--out_dir", tmp_path / "st").ok()
    store = lp.TokenStore(tmp_path / "st")
    assert len(everything(store)) == 22
    assert {"good", "fine"} < set(everything(store))
    for where in ("a.jsonl:1", "b.json: entry 2", "SMSSpamCollection:21"):
        assert where in result.err
    assert "no tab between label and message: 2" in result.err


def test_encoding_errors_replace(tmp_path):
    write(tmp_path / "raw/a.txt", b"abc\xff def, \xe4\xbd and more")
    refused(tmp_path, "a.txt", "byte 3", "--encoding_errors replace")
    store = prepared(
        tmp_path, tmp_path / "raw", "--encoding_errors", "replace", "--val_fraction", 1e-9
    )
    assert everything(store) == ["abc\ufffd def, \ufffd and more"]


@pytest.mark.skipif(os.name == "nt", reason="file names are text on Windows")
def test_a_file_name_that_is_not_utf8(tmp_path):
    (tmp_path / "raw").mkdir()
    with open(os.fsencode(tmp_path / "raw") + b"/\xff.txt", "w") as file:
        file.write("some text")
    flags = ["--data_dir", tmp_path / "raw", "--out_dir", tmp_path / "st"]
    run("prepare", *flags, "--val_fraction", 1e-9).ok()
    assert everything(lp.TokenStore(tmp_path / "st")) == ["some text"]


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_lone_surrogates_in_json(tmp_path, tokenizer):
    rows = [{"text": f"{i} \ud800 x \udfff"} for i in range(30)]
    write(tmp_path / "raw/a.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    flags = ["--data_dir", tmp_path / "raw", "--out_dir", tmp_path / "st", "--preview", 2]
    run("prepare", *flags, "--tokenizer", tokenizer).ok()
    got = everything(lp.TokenStore(tmp_path / "st"))
    lost = "\ufffd" if tokenizer == "bpe" else None
    wanted = [r["text"] if lost is None else f"{i} {lost} x {lost}" for i, r in enumerate(rows)]
    assert got == sorted(wanted)


def mutated(rng: random.Random, content: bytes) -> bytes:
    found = bytearray(content)
    for _ in range(rng.randrange(1, 6)):
        at, n = rng.randrange(len(found) + 1), rng.randrange(1, 9)
        kind = rng.randrange(4)
        if kind == 0:
            del found[at : at + n]
        elif kind == 1:
            found[at:at] = rng.randbytes(n)
        elif kind == 2:
            found[at:at] = rng.choice(
                [b'"', b"{", b"\\u", b"\n", b"\t", b"\0", b"null", b"[", b"1e999"]
            )
        else:
            del found[rng.randrange(len(found) + 1) :]
    return bytes(found)


def test_mutated_files(tmp_path):
    """Whatever a file holds: a store, or one clear line. tests/bench/faults.py tries more."""
    pa, parquet = needs("pyarrow"), needs("pyarrow.parquet")
    parquet.write_table(pa.Table.from_pylist(SHAPES["alpaca"]), tmp_path / "a.parquet")
    parquet.write_table(pa.Table.from_pylist(SHAPES["text"]), tmp_path / "t.parquet")
    chat = [dict(role="user", content="a"), dict(role="assistant", content="b")]
    sources = [
        ("a.json", json.dumps(SHAPES["alpaca"][:4]).encode()),
        ("a.jsonl", jsonl([*SHAPES["preference"][:4], dict(messages=chat)]).encode()),
        ("SMSSpamCollection", b"ham\tone\nspam\ttwo\nham\tthree\n"),
        ("a.txt", "Some text, 你好.".encode()),
        ("a.jsonl.gz", gzip.compress(GOOD.encode())),
        ("a.parquet", (tmp_path / "a.parquet").read_bytes()),
        ("t.parquet", (tmp_path / "t.parquet").read_bytes()),
        ("unknown", b"text of no known ending"),
    ]
    rng, outcomes = random.Random(0), []
    for round in range(80):
        name, content = sources[round % len(sources)]
        raw = tmp_path / "raw"
        shutil.rmtree(raw, ignore_errors=True)
        write(raw / name, mutated(rng, content))
        bad = rng.choice(["error", "skip"])
        flags = ["--processed_dir", tmp_path / "out", "--bad_records", bad]
        config = lp.parse(["prepare", "--data_dir", str(raw), *map(str, flags)])[1]
        try:
            store = lp.build_corpus_from_sources(config)
            outcomes.append(len(everything(store)))
        except lp.UserError as error:
            assert "\n" not in str(error)
            outcomes.append(None)
    assert None in outcomes and any(outcomes)


# --- the split by prompt ---


def split(config, pairs: bool = False) -> list[tuple]:
    """(record, its side) of every record."""
    report = lp.Report()
    records = lp.read_records(config, report)
    found = lp.split_records(records, config, report, lp.SeenHashes(), pairs)
    return [(record, side) for record, side, _ in found]


def test_the_side_follows_the_first_prompt(tmp_path):
    """What one stage trains on, no other stage validates on, whatever its answers are."""
    chat = [dict(role="user", content="p{}"), dict(role="assistant", content="hello")]
    rows = {
        "tuning": [dict(prompt=f"p{i}", completion=f"one {i}") for i in range(200)],
        "other": [dict(prompt=f"p{i}", completion=f"two {i}") for i in range(200)],
        "pairs": [dict(prompt=f"p{i}", chosen="yes", rejected="no") for i in range(200)],
        "chats": [
            dict(messages=[m | {"content": m["content"].format(i)} for m in chat * 2])
            for i in range(200)
        ],
    }
    sides = {}
    for name, lines in rows.items():
        path = write(tmp_path / f"{name}.jsonl", jsonl(lines))
        config = lp.DataConfig(data_dir=str(path))
        assert config.split_by == "prompt"
        sides[name] = {r.turns[0].prompt: side for r, side in split(config, name == "pairs")}
    assert sides["tuning"] == sides["other"] == sides["pairs"] == sides["chats"]
    assert 5 < list(sides["tuning"].values()).count("val") < 45


def test_the_old_rule_still_splits_by_content(tmp_path):
    """Sides that checkpoints from before --split_by know: of a hash of prompt and answer."""
    path = write(tmp_path / "a.jsonl", jsonl(SHAPES["alpaca"]))
    config = lp.DataConfig(data_dir=str(path), split_by="content")
    for record, side in split(config):
        data = f"{record.prompt}\0{record.response}\0".encode()
        salt = config.split_seed.to_bytes(8, "little")
        place = hashlib.blake2b(data, digest_size=16, salt=salt).digest()[8:]
        assert side == ("val" if int.from_bytes(place, "little") < 2**64 // 10 else "train")


def test_near_duplicates_are_counted(tmp_path, data):
    """The known figure of the SMS collection under the old split; `prepare` shows it."""
    flags = ["--data_dir", data / "sms_spam_collection", "--out_dir", tmp_path / "st"]
    out = run("prepare", *flags, "--split_by", "content").ok().out
    assert "sms: 24 of 511 validation records are near-duplicates" in out
    report = json.loads((tmp_path / "st/report.json").read_text(encoding="utf-8"))
    assert report["near_duplicates"] == {"sms": [24, 511]}


def test_near_duplicates_against_every_pair():
    rng = random.Random(0)
    sets = [set(rng.sample(range(60), rng.randrange(1, 40))) for _ in range(60)]
    sets += [s ^ set(rng.sample(range(60), rng.randrange(3))) for s in sets]
    arrays = [np.array(sorted(s), np.uint64) for s in sets]
    half = len(sets) // 2
    wanted = {
        i
        for i, one in enumerate(sets[:half])
        if any(len(one & two) >= 0.8 * len(one | two) for two in sets[half:])
    }
    assert 10 < len(wanted) < half
    assert set(np.flatnonzero(lp.twins(arrays[:half], arrays[half:])).tolist()) == wanted


# --- which files ---


def skipped(folder: Path, **more) -> dict[str, str]:
    """{name: why} of what the walk over a folder leaves out."""
    report = lp.Report()
    list(lp.read_records(lp.DataConfig(data_dir=str(folder), **more), report))
    return {
        source: what.removeprefix("skipped: ")
        for source, row in report.rows.items()
        for what in row
        if what.startswith("skipped: ")
    }


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_to_folders_are_followed_once(tmp_path):
    write(tmp_path / "far/b.txt", "Text of B")
    write(tmp_path / "raw/real/a.txt", "Text of A")
    (tmp_path / "raw/link").symlink_to(tmp_path / "far")
    (tmp_path / "raw/again").symlink_to(tmp_path / "raw/real")
    (tmp_path / "raw/real/loop").symlink_to(tmp_path / "raw")
    (tmp_path / "raw/broken").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "raw/pipe")
    found = everything(prepared(tmp_path, tmp_path / "raw", "--val_fraction", 1e-9))
    assert found == ["Text of A", "Text of B"]
    left_out = skipped(tmp_path / "raw")
    assert left_out["broken"] == "a broken link" and left_out["pipe"] == "not a regular file"
    assert "read already" in left_out["again"] and "read already" in left_out["loop"]


@pytest.mark.skipif(
    getattr(os, "geteuid", lambda: 0)() == 0, reason="root may read anything: run as another user"
)
def test_what_may_not_be_read_is_named(tmp_path):
    write(tmp_path / "raw/a.txt", "Text of A")
    write(tmp_path / "raw/closed/b.txt", "Text of B")
    write(tmp_path / "raw/c", "Text of C").chmod(0)
    (tmp_path / "raw/closed").chmod(0)
    try:
        left_out = skipped(tmp_path / "raw")
    finally:
        (tmp_path / "raw/closed").chmod(0o700)
    assert "Permission denied" in left_out["closed"] and "Permission denied" in left_out["c"]


def test_what_the_program_made_is_not_read_back(tmp_path, tiny_checkpoint):
    """Stores and runs below --data_dir: a second run reads what the first one read."""
    write(tmp_path / "data/raw/a.jsonl", jsonl(SHAPES["text"]))
    shutil.copytree(tiny_checkpoint.parent, tmp_path / "data/run")
    run("prepare", "--data_dir", "data", "--out_dir", "data/store", cwd=tmp_path).ok()
    for _ in range(2):
        run("prepare", "--data_dir", "data", cwd=tmp_path).ok()
    left_out = skipped(tmp_path / "data", processed_dir=str(tmp_path / "data/processed"))
    assert left_out == {
        "store": "a token store",
        "run": "a run of this program",
        "processed": "where token stores are kept",
    }


def test_reading_many_files_takes_work_in_proportion(tmp_path):
    """Twice as many files: twice as many calls, not four times as many."""

    def calls(n: int) -> int:
        for i in range(n):
            write(tmp_path / f"{n}/part.{i}.txt", f"Text {i}")
        config, count = lp.DataConfig(data_dir=str(tmp_path / str(n))), 0

        def counted(frame, event, value):
            nonlocal count
            count += event == "call"

        sys.setprofile(counted)
        try:
            assert sum(1 for _ in lp.read_records(config, lp.Report())) == n
        finally:
            sys.setprofile(None)
        return count

    assert calls(400) < 2.2 * calls(200)


def test_a_data_dir_that_was_named_is_not_the_toy_corpus(tmp_path):
    (tmp_path / "data/raw").mkdir(parents=True)
    run("prepare", "--data_dir", "data/raw", cwd=tmp_path).fails(1, "data/raw", "no files")
    shutil.rmtree(tmp_path / "data")
    run("prepare", "--data_dir", "data/raw", cwd=tmp_path).fails(1, "data/raw", "does not exist")


def test_the_settings_of_a_run_on_the_toy_corpus_can_be_used_again(tmp_path):
    run("train", *TINY, "--out_dir", "one", cwd=tmp_path).ok()
    again = run("train", "--config", "one/config.json", "--out_dir", "two", cwd=tmp_path).ok()
    assert "done" in again.err and (tmp_path / "two/best.pth").exists()
    run("eval", "--ckpt", "one/best.pth", "--device", "cpu", "--max_batches", 2, cwd=tmp_path).ok()


def test_names_that_no_file_can_have(tmp_path):
    for name in ("x" * 300, "x" * 300 + "/a.txt", "a\0b"):
        with pytest.raises(lp.UserError, match="--data_dir"):
            list(lp.read_records(lp.DataConfig(data_dir=name), lp.Report()))
    write(tmp_path / "a.txt", "text")
    with pytest.raises(lp.UserError, match="does not exist"):
        lp.find_files(lp.DataConfig(data_dir=str(tmp_path / "a.txt/b")))


@pytest.mark.parametrize(
    "name, content, word",
    [
        ("a.pdf", b"%PDF-1.7\n%\xe2\xe3\n", "pdftotext"),
        ("a.docx", b"PK\x03\x04\x14\0", "office document"),
        ("a.csv", b"id,words\n1,x\n", "--text_field"),
    ],
)
def test_files_of_other_kinds_say_what_to_do(tmp_path, name, content, word):
    write(tmp_path / "raw" / name, content)
    refused(tmp_path, name, word)


def test_advice_about_plain_text(tmp_path):
    write(tmp_path / "raw/a.txt", "One story.\n<|endoftext|>\nAnother.\n" * 9)
    write(tmp_path / "raw/code/a.py", "print(1)\n")
    write(tmp_path / "raw/code/b.py", "print(2)\n")
    flags = ["--data_dir", tmp_path / "raw", "--out_dir", tmp_path / "st"]
    said = run("prepare", *flags).ok().err
    assert said.count("--doc_delimiter '<|endoftext|>'") == 1
    assert said.count("source code, read as plain text") == 1
    again = run("prepare", *flags, "--overwrite", "--doc_delimiter", "<|endoftext|>")
    assert "'<|endoftext|>'" not in again.err


def test_replaced_bytes_are_counted(tmp_path):
    """Invalid sequences, not the replacement characters that a text holds itself."""
    bad = "a\ufffdb".encode() + b"\xff" + b"x" * (lp.BLOCK - 7) + b"\xe4\xbd" + b" \xf0\x9f\x98"
    write(tmp_path / "raw/short.txt", b"abc\xff def, \xe4\xbd and \xef\xbf\xbd more")
    write(tmp_path / "raw/long.txt", bad + "\ufffd".encode() * 30_000 + b"\xff")
    write(tmp_path / "raw/lines.jsonl", b'{"text": "one \xff"}\n{"text": "two"}\n')
    store = prepared(tmp_path, tmp_path / "raw", "--encoding_errors", "replace")
    what = "invalid UTF-8 replaced by U+FFFD"
    counts = {name: row.get(what) for name, row in store.meta["counts"].items()}
    assert counts == {"short.txt": 2, "long.txt": 4, "lines.jsonl": 1}


def test_max_tokens_of_one_large_file(tmp_path):
    """The part that is read is the text: its last tenth validates, the rest is never opened."""
    text = "".join(f"Line {i} of a long text.\n" for i in range(20_000))
    write(tmp_path / "raw/a.txt", text.encode() + b"\xff" * 100_000)
    store = prepared(tmp_path, tmp_path / "raw", "--max_tokens", 100_000)
    train, val = (documents(store, split)[0] for split in ("train", "val"))
    assert train + val == text[:100_000]
    assert len(val) == 10_000


def test_a_parquet_file_with_dates_out_of_range(tmp_path):
    pa, parquet = needs("pyarrow"), needs("pyarrow.parquet")
    (tmp_path / "raw").mkdir()
    far = pa.array([2**60], pa.timestamp("ms"))
    parquet.write_table(pa.table({"text": far}), tmp_path / "raw/a.parquet")
    refused(tmp_path, "a.parquet")


def test_a_lone_surrogate_in_a_rejected_answer(tmp_path):
    rows = [dict(prompt=f"p{i}", chosen="yes", rejected="no \ud800") for i in range(20)]
    write(tmp_path / "raw/a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    store = prepared(tmp_path, tmp_path / "raw", pairs=True)
    assert any("\ud800" in text for text in documents(store, "train"))


# --- windows ---


class Numbers:
    """A store whose tokens are their own positions."""

    def __init__(self, n: int):
        self.tokens = {"train": np.arange(n, dtype=np.int64)}
        self.tokenizer = lp.ByteTokenizer()

    def ids(self, split, start, length):
        return self.tokens[split][np.asarray(start)[..., None] + np.arange(length)]


def loader(dataset, batch_size=4, grad_accum=1, rank=0, world_size=1):
    rt = lp.Runtime(torch.device("cpu"), torch.float32, rank, world_size)
    return lp.Loader(dataset, batch_size, grad_accum, rt)


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**63 - 1))
def test_permutation_is_a_bijection(n, key):
    assert sorted(lp.permuted(np.arange(n), n, key).tolist()) == list(range(n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 2**16, 2**16 + 1, 2**20 - 1])
def test_permutation_at_the_edges(n):
    found = lp.permuted(np.arange(n), n, 7)
    assert len(np.unique(found)) == n and found.min() == 0 and found.max() == n - 1


def test_permutation_of_huge_ranges_and_any_order():
    n = 10**12
    index = np.array([0, 1, n - 1, 12345])
    found = lp.permuted(index, n, 3)
    assert len(set(found.tolist())) == 4 and found.min() >= 0 and found.max() < n
    assert lp.permuted(index[::-1], n, 3).tolist() == found[::-1].tolist()
    assert lp.permuted(index, n, 4).tolist() != found.tolist()


def test_permutations_are_well_mixed():
    n = 1000
    first = [lp.permuted(np.arange(n), n, key)[0] for key in range(1000)]
    counts = np.histogram(first, bins=10, range=(0, n))[0]
    assert counts.min() > 60 and counts.max() < 140
    order = lp.permuted(np.arange(n), n, 5)
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.15


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(
    n=st.integers(2, 400),
    block=st.integers(2, 40),
    stride=st.integers(0, 50),
    epoch=st.integers(0, 9),
)
def test_windows_stay_inside_and_cover(n, block, stride, epoch):
    data = lp.LMDataset(Numbers(n), "train", block, stride, seed=3)
    ids = data.epoch_ids(epoch, np.arange(len(data)))
    assert len(set(ids.tolist())) == len(data)
    batch = data.batch(ids)
    assert batch.x.shape == (len(data), min(block, n - 1))
    assert torch.equal(batch.y, batch.x + 1)
    assert batch.x.min() >= 0 and batch.y.max() <= n - 1
    starts = np.sort(ids)
    step = min(stride or block, n)
    assert (np.diff(starts) == step).all(), "one grid"
    lost = starts[0] + (n - 1 - batch.y.max().item())
    assert lost < 2 * step, "at most the grid's shift and an incomplete window are left out"
    assert data.n_targets(ids) == batch.y.numel()


def test_default_windows_do_not_overlap():
    data = lp.LMDataset(Numbers(1000), "train", 16)
    targets = data.batch(data.epoch_ids(0, np.arange(len(data)))).y.flatten().tolist()
    assert len(set(targets)) == len(targets) > 950


def test_stride_one_is_the_sliding_window():
    data = lp.LMDataset(Numbers(100), "train", 10, 1)
    starts = {s for e in range(3) for s in data.epoch_ids(e, np.arange(len(data))).tolist()}
    assert len(data) in (89, 90)
    assert starts <= set(range(90)) and len(starts) >= 89


def test_every_token_is_trained_on_within_some_epochs():
    data = lp.LMDataset(Numbers(103), "train", 10)
    seen = set()
    for epoch in range(200):
        seen |= set(data.batch(data.epoch_ids(epoch, np.arange(len(data)))).y.flatten().tolist())
    assert seen == set(range(1, 103))


def test_epochs_differ_and_repeat():
    data, again = (lp.LMDataset(Numbers(5000), "train", 8, seed=5) for _ in "12")
    places = np.arange(len(data))
    epochs = [data.epoch_ids(e, places).tolist() for e in range(5)]
    assert epochs == [again.epoch_ids(e, places).tolist() for e in range(5)]
    assert len(set(map(tuple, epochs))) == 5
    assert len({min(e) for e in epochs}) > 1, "the grid shifts"
    other = lp.LMDataset(Numbers(5000), "train", 8, seed=6)
    assert other.epoch_ids(0, places).tolist() != epochs[0]


def test_a_corpus_shorter_than_a_block():
    data = lp.LMDataset(Numbers(6), "train", 100)
    assert len(data) == 1
    batch, n_targets = loader(data, 4).step(0)
    assert batch.x.tolist() == [[0, 1, 2, 3, 4]] * 4 and n_targets == 20
    with pytest.raises(lp.UserError):
        lp.LMDataset(Numbers(1), "train", 100)


def test_no_window_crosses_from_train_to_val(tmp_path):
    write(tmp_path / "raw/a.txt", "a" * 90_000 + "b" * 10_000)
    store = prepared(tmp_path, tmp_path / "raw")
    for split, letter in (("train", ord("a")), ("val", ord("b"))):
        data = lp.LMDataset(store, split, 64, 1)
        batch = data.batch(np.arange(len(data)))
        assert set(batch.x.unique().tolist()) <= {letter, 257, 258}
        assert set(batch.y.unique().tolist()) <= {letter, 257, 258}


# --- whole records ---


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A store of records of 6 to 200 tokens of prompt and 3 to 120 of response."""
    folder = tmp_path_factory.mktemp("records")
    rng = random.Random(0)
    rows = []
    for i in range(240):
        letters = "".join(rng.choices("abcdefgh", k=rng.randrange(160)))
        rows.append(dict(instruction=f"t{i}", input=letters, output="Z" * rng.randrange(1, 120)))
    write(folder / "raw/a.jsonl", jsonl(rows))
    return prepared(folder, folder / "raw")


def by_hand(store, number: int, block_size: int, loss_on: str) -> tuple[list, list]:
    """Inputs and targets of one record as the design describes them."""
    start, length, prompt, _ = store.index["train"][number].tolist()
    ids = store.tokens["train"][start : start + length].tolist()
    head, answer = ids[:prompt], ids[prompt:][:block_size]
    room = block_size + 1 - len(answer)
    if len(head) > room:
        tail = room // 2
        head = head[: room - tail] + head[len(head) - tail :]
    ids = head + answer
    kept = [IGNORE] * (len(head) - 1) + answer if loss_on == "response" else ids[1:]
    return ids[:-1], kept


@pytest.mark.parametrize("loss_on", ["all", "response"])
@pytest.mark.parametrize("block_size", [400, 120, 60, 2])
def test_instruction_batches(records, block_size, loss_on):
    data = lp.InstructionDataset(records, "train", block_size, 1, loss_on, 8)
    pad = records.tokenizer.pad_id
    for step in range(8):
        ids = data.epoch_ids(0, np.arange(step * 8, step * 8 + 8))
        batch = data.batch(ids)
        width = batch.x.shape[1]
        assert width <= block_size and batch.x.shape == batch.y.shape
        for row, number in enumerate(ids.tolist()):
            x, y = by_hand(records, number, block_size, loss_on)
            padding = width - len(x)
            assert batch.x[row].tolist() == x + [pad] * padding
            assert batch.y[row].tolist() == y + [IGNORE] * padding
        assert data.n_targets(ids) == (batch.y != IGNORE).sum().item()


def test_cut_records_are_counted_and_keep_their_response(records):
    lengths = records.index["train"]["length"]
    for block_size in (400, 120, 60):
        data = lp.InstructionDataset(records, "train", block_size)
        assert data.n_cut == (lengths > block_size + 1).sum()
        assert len(data) == len(lengths)
    data = lp.InstructionDataset(records, "train", 140, loss_on="response")
    ids = np.arange(len(data))
    assert data.n_targets(ids) == (lengths - records.index["train"]["prompt"]).sum()
    batch = data.batch(ids)
    assert (batch.x[:, 0] == records.tokenizer.bos_id).all()


def test_batches_hold_records_of_like_length(records):
    data = lp.InstructionDataset(records, "train", 400, batch_size=8)
    n = len(data) // 8
    bucketed = random_order = 0
    order = np.random.default_rng(0).permutation(len(data))
    ids_of = loader(data, 8)
    for step in range(n):
        bucketed += ids_of.step(step)[0].x.numel()
        random_order += data.batch(order[step * 8 : step * 8 + 8]).x.numel()
    assert bucketed < 0.8 * random_order


def test_an_epoch_takes_each_record_once_and_leaves_none_out_for_good(records):
    data = lp.InstructionDataset(records, "train", 400, seed=4, batch_size=32)
    batches = loader(data, 32)
    n = batches.steps_per_epoch
    assert n == len(data) // 32
    seen = set()
    for epoch in range(20):
        ids = np.concatenate([batches.ids(epoch * n + step) for step in range(n)]).tolist()
        assert len(set(ids)) == len(ids)
        seen |= set(ids)
    assert seen == set(range(len(data)))


def test_pairs(tmp_path):
    rows = [dict(prompt=f"p{i}", chosen="yes" * (i % 5 + 1), rejected="no") for i in range(40)]
    rows += [dict(prompt="same", chosen="x", rejected="x"), dict(prompt="none", completion="y")]
    write(tmp_path / "raw/a.jsonl", jsonl(rows))
    store = prepared(tmp_path, tmp_path / "raw", pairs=True)
    assert len(store.index["train"]) + len(store.index["val"]) == 80
    data = lp.PreferenceDataset(store, "train", 200, batch_size=6)
    ids = data.epoch_ids(0, np.arange(6))
    batch = data.batch(ids)
    assert batch.x.shape[0] == 12 and data.n_targets(ids) == 6
    for chosen, rejected in zip(batch.x[0::2], batch.x[1::2], strict=True):
        texts = [store.tokenizer.decode(r) for r in (chosen, rejected)]
        assert texts[0].split("Output:")[0] == texts[1].split("Output:")[0]
        assert "yes" in texts[0] and texts[1].endswith("### Output: no\n")


# --- processes ---


@pytest.mark.parametrize("kind", ["windows", "records"])
@pytest.mark.parametrize("grad_accum", [1, 2])
def test_any_number_of_processes_sees_the_same_global_batch(records, kind, grad_accum):
    def dataset():
        if kind == "windows":
            return lp.LMDataset(records, "train", 32, seed=2)
        return lp.InstructionDataset(records, "train", 100, seed=2)

    for step in (0, 1, 5, 40, 400):
        whole, n_targets = loader(dataset(), 8, grad_accum).step(step)
        for world_size in (2, 4):
            parts = [
                loader(dataset(), 8, grad_accum, rank, world_size).step(step)
                for rank in range(world_size)
            ]
            assert {n for _, n in parts} == {n_targets}
            rows = [torch.cat([b.x, b.y], 1) for b, _ in parts]
            rows = sorted(torch.cat(rows).tolist())
            assert rows == sorted(torch.cat([whole.x, whole.y], 1).tolist())
            if grad_accum == 1:
                assert torch.equal(torch.cat([b.x for b, _ in parts]), whole.x)


@pytest.mark.parametrize("kind", ["windows", "records"])
def test_a_batch_is_a_function_of_seed_and_step(records, kind):
    def dataset(seed):
        if kind == "windows":
            return lp.LMDataset(records, "train", 32, seed=seed)
        return lp.InstructionDataset(records, "train", 100, seed=seed)

    one = loader(dataset(2), 8)
    forwards = [one.step(s)[0] for s in range(60)]
    two = loader(dataset(2), 8)
    for step in (59, 3, 30, 0):
        batch = two.step(step)[0]
        assert torch.equal(batch.x, forwards[step].x) and torch.equal(batch.y, forwards[step].y)
    other = loader(dataset(3), 8)
    assert other.ids(0).tolist() != one.ids(0).tolist()


def test_fixed_batches_are_the_same_every_time_and_shared_out(records):
    for dataset in (
        lp.LMDataset(records, "train", 32),
        lp.InstructionDataset(records, "train", 100),
    ):
        first = [b.y for b in loader(dataset, 8).fixed(3)]
        second = [b.y for b in loader(dataset, 8).fixed(3)]
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        total = sum((y != IGNORE).sum().item() for y in first)
        for world_size in (2, 4):
            shares = [
                list(loader(dataset, 8, 1, r, world_size).fixed(3)) for r in range(world_size)
            ]
            assert len({len(s) for s in shares}) == 1, "processes go in step"
            assert sum((b.y != IGNORE).sum().item() for s in shares for b in s) == total


def test_a_data_set_smaller_than_a_batch_repeats_itself(tmp_path):
    write(tmp_path / "raw/a.jsonl", jsonl(SHAPES["alpaca"][:5]))
    store = prepared(tmp_path, tmp_path / "raw", "--val_fraction", 1e-9)
    batch, n_targets = loader(lp.InstructionDataset(store, "train", 200), 16).step(3)
    assert batch.x.shape[0] == 16 and n_targets == (batch.y != IGNORE).sum()
