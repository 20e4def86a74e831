"""Files, rows and records: what is read, what is refused, and which side of the split it is on."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
from conftest import needs, run
from hypothesis import given, settings
from hypothesis import strategies as st

import llm_pipeline as lp

TEMPLATE = "### Instruction: {}\n### Input: {}\n### Output:"


def split(path: Path, pairs: bool = False, **more) -> tuple[list[tuple[lp.Record, str]], lp.Report]:
    """(record, its side) of every record of a file or folder, and the report."""
    config, report = lp.DataConfig(data_dir=str(path), **more), lp.Report()
    found = lp.split_records(lp.read_records(config, report), config, report, pairs)
    return [(record, side) for record, side, _ in found], report


def text(record: lp.Record) -> str:
    return "".join(turn.prompt + turn.response for turn in record.turns)


def texts(path: Path, side: str = "", **more) -> list[str]:
    """The sorted texts of all records, or of those on one side."""
    return sorted(
        text(record) for record, where in split(path, **more)[0] if where == side or not side
    )


def parts(path: Path, **more) -> dict[str, str]:
    """What each side gets of a file whose only record is a long text."""
    config = lp.DataConfig(data_dir=str(path), **more)
    return {side: text(record) for record, side in lp.corpus_records(config, lp.Report())}


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
ROWS = [dict(instruction=t, input=i, output=o) for t, i, o in TASKS] + [dict(text=t) for t in PLAIN]
PACKERS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstd().compress(data),
}


def zstd():
    return needs("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
def test_endings(tmp_path, ending, packed):
    path = tmp_path / f"file.{ending}"
    if ending == "parquet":
        pa, parquet = needs("pyarrow"), needs("pyarrow.parquet")
        columns = dict.fromkeys(("instruction", "input", "output", "text"))
        parquet.write_table(pa.Table.from_pylist([columns | row for row in ROWS]), path)
    else:
        write(path, json.dumps(ROWS) if ending == "json" else jsonl(ROWS))
    content = path.read_bytes()
    path.unlink()
    path = write(path.with_name(path.name + packed), PACKERS[packed](content))
    assert texts(path) == sorted([*PLAIN, *(instruction(*task) for task in TASKS)])


@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz", ".zst"])
def test_a_torn_packed_file_is_an_error(tmp_path, packed):
    content = PACKERS[packed](random.Random(0).randbytes(30_000).hex().encode())
    write(tmp_path / f"a.txt{packed}", content[:-9])
    with pytest.raises(lp.UserError, match="cannot read"):
        texts(tmp_path)


@pytest.mark.parametrize("name", ["x/y/SMSSpamCollection", "sms.tsv", "SMSSpamCollection.txt.gz"])
def test_sms_keeps_quotes_and_spaces(tmp_path, name):
    found = [
        ("ham", 'He said "hi'),
        ("spam", '"WIN" now\t£5'),
        ("ham", "  spaces  "),
        ("ham", "你好"),
    ]
    content = "\n".join("\t".join(row) for row in found).encode()
    write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    task = "classify if the SMS is spam or ham"
    assert texts(tmp_path) == sorted(instruction(task, message, label) for label, message in found)


def test_the_real_sms_collection(data):
    found, report = split(data / "sms_spam_collection")
    lines = (data / "sms_spam_collection/SMSSpamCollection").read_text("utf-8").splitlines()
    assert len(lines) == report.rows["sms"]["records"] == 5574
    assert report.rows["sms"]["skipped: duplicate"] == 403
    task = "classify if the SMS is spam or ham"
    pairs = {tuple(line.split("\t", 1)) for line in lines}
    wanted = sorted(instruction(task, message, label) for label, message in pairs)
    assert sorted(text(record) for record, _ in found) == wanted
    assert [side for _, side in found].count("val") == 554
    assert "--" not in "".join(report.lines()), "nothing to advise"


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a", "a.py", "a.txt.gz", "a.log.gz"])
def test_plain_files(tmp_path, name):
    content = "Ein Text, 你好.\n" * 5
    write(tmp_path / name, gzip.compress(content.encode()) if name.endswith("gz") else content)
    write(tmp_path / "other.txt", "Other text\n" * 3)
    write(tmp_path / "picture.png", b"\x89PNG\0\0\xff")
    write(tmp_path / ".hidden.txt", "hidden")
    found, report = split(tmp_path)
    assert sorted(text(record) for record, _ in found) == sorted([content, "Other text\n" * 3])
    assert "skipped: not text" in report.rows["picture.png"]


@pytest.mark.parametrize("delimiter", [r"\n", "<|endoftext|>", "%%", "ab"])
def test_doc_delimiter(tmp_path, delimiter, monkeypatch):
    """Delimiters are found even across the blocks in which a file is read."""
    monkeypatch.setattr(lp, "BLOCK", 97)
    mark, rng = delimiter.replace(r"\n", "\n"), random.Random(0)
    pieces = ["".join(rng.choices("xyz %<a", k=rng.randrange(1, 200))) for _ in range(1000)]
    path = write(tmp_path / "a.txt", mark.join(pieces))
    wanted = {piece for piece in mark.join(pieces).split(mark) if piece.strip()}
    assert texts(path, doc_delimiter=delimiter) == sorted(wanted)


def test_min_chars(tmp_path):
    """Short and blank texts are dropped and counted as such, whole files too."""
    rows = ["", " \n \t ", "short", "just ten.!", "", "this is long enough to stay"]
    for i, row in enumerate(rows):
        write(tmp_path / f"files/{i}.txt", row)
    write(tmp_path / "rows/a.jsonl", jsonl({"text": row} for row in rows))
    write(tmp_path / "documents/a.txt", "%%".join(rows))
    for folder, more in (("files", {}), ("rows", {}), ("documents", dict(doc_delimiter="%%"))):
        found, report = split(tmp_path / folder, min_chars=10, **more)
        assert sorted(text(record) for record, _ in found) == sorted([rows[3], rows[5]])
        assert sum(row["skipped: short or empty"] for row in report.rows.values()) == 4


def test_many_files_count_as_their_folders(tmp_path):
    """A table of thousands of sources is useless; masks, errors and the split stay per file."""

    def sources() -> dict[str, int]:
        return {name: row["records"] for name, row in split(tmp_path)[1].rows.items()}

    for i in range(20):
        write(tmp_path / f"{i}.txt", f"Text {i}.")
    assert sources() == {f"{i}.txt": 1 for i in range(20)}
    for i in range(9):
        write(tmp_path / f"books/{i}/text.txt", f"Book {i}.")
        write(tmp_path / f"photos/{i}.png", b"\x89PNG\0\0\xff")
    assert sources() == {tmp_path.name: 20, "books": 9, "photos": 0}
    for i in range(30):
        write(tmp_path / f"{i}/text.txt", f"Folder {i}.")
    assert sources() == {tmp_path.name: 59}
    joined = split(tmp_path, join_rows=True)[0]
    assert len(joined) == 59, "each file is its own text"


# --- long texts ---


def test_a_long_text_gives_its_last_tenth(data):
    found = parts(data / "tinyshakespeare/input.txt")
    whole = (data / "tinyshakespeare/input.txt").read_text("utf-8")
    assert found == {"train": whole[:-111_540], "val": whole[-111_540:]}


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(
    letters=st.text(st.sampled_from("xé你😀"), min_size=1, max_size=9),
    fraction=st.floats(0.01, 0.9),
)
def test_the_cut_of_a_long_text_keeps_characters_whole(tmp_path_factory, letters, fraction):
    whole = letters * (70_000 // len(letters.encode()) + 1)
    path = write(tmp_path_factory.mktemp("raw") / "a.txt", whole)
    found = parts(path, val_fraction=fraction)
    assert found["train"] + found["val"] == whole
    assert abs(len(found["val"].encode()) - fraction * len(whole.encode())) <= 4


def test_a_huge_text_is_read_in_parts_whose_last_tenth_validates(tmp_path, monkeypatch):
    monkeypatch.setattr(lp, "BLOCK", 1000)
    monkeypatch.setattr(lp, "PIECE", 100_000)
    whole = "".join(f"Line {i} of a long text.\n" for i in range(12_000))
    found, report = split(write(tmp_path / "a.txt", whole))
    assert "".join(text(record) for record, _ in found) == whole
    assert [side for _, side in found][:-1] == ["both"] * (len(whole) // 100_000)
    assert report.rows["a.txt"]["records"] == len(found)


def test_max_tokens_reads_little_more_of_a_file_than_it_needs(tmp_path):
    """The rest of the file is invalid, but is never reached."""
    whole = "".join(f"Line {i} of a long text.\n" for i in range(40_000))
    path = write(tmp_path / "a.txt", whole.encode() + b"\xff" * 100_000)
    for n in (50_000, 200_000):
        store = lp.build_corpus_from_sources(path, max_tokens=n, processed_dir=tmp_path / "p")
        train, val = len(store.tokens["train"]), len(store.tokens["val"])
        assert n <= train + val < n + 140_000 and 0.09 < val / (train + val) < 0.11


def test_the_only_plain_text_gives_its_last_tenth(tmp_path):
    """By its hash alone, one text in ten would go into validation entirely."""
    for seed in range(12):
        path = write(tmp_path / f"{seed}/play.txt", ("To be or not. " * 30)[:400])
        write(tmp_path / f"{seed}/qa.jsonl", jsonl([dict(question="Who?", answer="I.")]))
        for place in (path, path.parent):
            sides = [side for record, side in split(place, split_seed=seed)[0] if record.is_plain]
            assert sides == ["both"]
        assert len(parts(path, split_seed=seed)["val"]) == 40
    write(tmp_path / "0/second.txt", "Another text.")
    assert not [side for _, side in split(tmp_path / "0")[0] if side == "both"]


def test_texts_of_which_none_validates_are_named(tmp_path):
    """With a second text, both are split by their hash, here both into training."""
    for name in ("two", "three"):
        write(tmp_path / f"raw/{name}.txt", f"The text of {name}.")
        result = run("prepare", "--data_dir", tmp_path / "raw", "--processed_dir", tmp_path).ok()
        assert ("none validates" in result.err) == (name == "three")
    flags = ["--val_fraction", 0, "--processed_dir", tmp_path]
    assert "none validates" not in run("prepare", "--data_dir", tmp_path / "raw", *flags).ok().err


# --- the split ---


def test_no_validation_record_is_trained_on(tmp_path):
    rng = random.Random(0)
    rows = [f"text {rng.randrange(700)}" for _ in range(5000)]
    for i in range(4):
        write(tmp_path / f"{i}.jsonl", jsonl({"text": t} for t in rows[i::4]))
    write(tmp_path / "lines.json", json.dumps([{"text": t} for t in rows[:900]]))
    train, val = texts(tmp_path, "train"), texts(tmp_path, "val")
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted(set(rows))
    assert 0.05 < len(val) / len(set(rows)) < 0.16
    assert 0.35 < len(texts(tmp_path, "val", val_fraction=0.5)) / len(set(rows)) < 0.65
    assert not texts(tmp_path, "val", val_fraction=0.0)


def test_adding_data_moves_no_record(tmp_path):
    write(tmp_path / "m.jsonl", jsonl({"text": f"text {i}"} for i in range(500)))
    before = {side: set(texts(tmp_path, side)) for side in ("train", "val")}
    write(tmp_path / "a.jsonl", jsonl({"text": f"more {i}"} for i in range(500)))
    write(tmp_path / "z.jsonl", jsonl([*ROWS[:30], {"text": "text 3"}]))
    for side in ("train", "val"):
        assert before[side] <= set(texts(tmp_path, side))


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
        found, _ = split(path, name == "pairs")
        sides[name] = {record.turns[0].prompt: side for record, side in found}
    assert sides["tuning"] == sides["other"] == sides["pairs"] == sides["chats"]
    assert 5 < list(sides["tuning"].values()).count("val") < 45


@pytest.mark.parametrize("split_by", ["prompt", "content"])
def test_the_rule_of_the_split(tmp_path, split_by):
    """A keyed hash of the prompt, or of prompt and answer: sides that every version agrees on."""
    path = write(tmp_path / "a.jsonl", jsonl(ROWS[:30]))
    for record, side in split(path, split_by=split_by)[0]:
        [turn] = record.turns
        content = turn.prompt if split_by == "prompt" else f"{turn.prompt}\0{turn.response}\0"
        place = hashlib.blake2b(content.encode(), digest_size=16, salt=(1337).to_bytes(8, "little"))
        number = int.from_bytes(place.digest()[8:], "little")
        assert side == ("val" if number < 2**64 // 10 else "train")


def test_one_prompt_for_all_is_on_one_side_and_says_what_to_do(tmp_path):
    rows = [dict(prompt="Write a poem.", completion=f"Poem {i}") for i in range(200)]
    flags = ["--data_dir", write(tmp_path / "a.jsonl", jsonl(rows)), "--processed_dir", tmp_path]
    for seed in (1, 21):  # for training, for validation
        result = run("prepare", *flags, "--split_seed", seed).ok()
        assert "--split_by content" in result.err
        store = lp.TokenStore(Path(result.out.splitlines()[-1]))
        assert [len(store.tokens[side]) > 0 for side in ("train", "val")] == [seed == 1, seed != 1]
    result = run("prepare", *flags, "--split_by", "content").ok()
    assert "split_by" not in result.err


def test_repeats_on_both_sides_are_never_kept(tmp_path):
    for name in ("train", "val"):
        write(tmp_path / f"{name}.jsonl", jsonl({"text": f"text {i % 5}"} for i in range(10)))
    train = texts(tmp_path, "train", keep_duplicates=True)
    assert len(train) == 10 and not texts(tmp_path, "val", keep_duplicates=True)


# --- roles of names ---


WORDS = {
    "train": ["train", "training"],
    "val": ["valid", "validation", "val", "dev", "eval", "evaluation"],
    "test": ["test", "testing"],
}
NAMES = st.tuples(
    st.sampled_from([word for words in WORDS.values() for word in words]),
    st.sampled_from(["{}", "data_{}", "{}-00000-of-00001", "my.{}", "X-{}_v2", "{}2024"]),
    st.sampled_from(["{}.jsonl", "{}/a.jsonl", "{}/deep/a.jsonl"]),
    st.booleans(),
)


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(
    names=st.lists(NAMES, min_size=1, max_size=4), other=st.sampled_from(["data", "evaluate_me"])
)
def test_what_names_hold_out_is_never_trained_on(tmp_path_factory, names, other):
    """Held-out files and folders next to training data, however exactly they are named."""
    raw, role = tmp_path_factory.mktemp("raw"), {}
    write(raw / f"{other}.jsonl", jsonl({"text": f"{other} {i}"} for i in range(20)))
    for word, name, layout, upper in names:
        name = layout.format(name.format(word.upper() if upper else word))
        write(raw / name, jsonl({"text": f"{name} {i}"} for i in range(20)))
        role[name] = next(r for r, words in WORDS.items() if word in words)
    found = {side: {t.rpartition(" ")[0] for t in texts(raw, side)} for side in ("train", "val")}
    held_out = {name for name, r in role.items() if r != "train"}
    assert not held_out & found["train"]
    assert {name for name, r in role.items() if r == "val"} <= found["val"]
    assert not {name for name, r in role.items() if r == "test"} & (found["val"] | found["train"])
    assert other in found["train"]


@pytest.mark.parametrize("layout", ["wiki.{}.tokens", "{}/wiki.tokens", "{}/deep/wiki.tokens"])
def test_one_part_of_a_split_keeps_its_role(tmp_path, layout):
    """What was trained on never validates, and what validates is never trained on."""
    for name in ("train", "valid", "test"):
        write(tmp_path / layout.format(name), f"The {name} text.\n" * 5000)
    for name, role in (("train", "train"), ("valid", "val"), ("test", "test")):
        path = tmp_path / layout.format(name)
        path = path.parent.parent if "deep" in layout else path
        assert lp.data_role(lp.DataConfig(data_dir=str(path))) == role
        side = "train" if role == "train" else "val"
        assert [side for _, side in split(path)[0]] == [side]


@pytest.mark.parametrize(
    "name", ["eval.jsonl", "train.jsonl", "test.jsonl", "my test data/a.jsonl"]
)
def test_a_name_that_stands_alone_does_not_count(tmp_path, name):
    write(tmp_path / "raw" / name, jsonl({"text": f"text {i}"} for i in range(100)))
    assert {side for _, side in split(tmp_path / "raw")[0]} == {"train", "val"}
    write(tmp_path / "raw/test_2.jsonl", jsonl({"text": f"other {i}"} for i in range(100)))
    if name == "train.jsonl":  # next to only a test file, it is split by hash, too
        assert all(t.startswith("text") for t in texts(tmp_path / "raw"))
        assert texts(tmp_path / "raw", "val")


# --- the toy corpus ---


def test_the_toy_corpus_is_for_the_default_folder_alone(tmp_path, monkeypatch):
    """However it is spelled, empty or absent; another folder, or unreadable files, is an error."""
    monkeypatch.chdir(tmp_path)
    for _ in ("absent", "empty"):
        for name in ("./data/raw", "data/raw/", "data/../data/raw", str(tmp_path / "data/raw")):
            assert len(texts(name)) > 2000
        assert "built-in toy corpus" in run("prepare", "--data_dir", "./data/raw").ok().err
        Path("data/raw").mkdir(parents=True, exist_ok=True)
    Path("other").mkdir()
    with pytest.raises(lp.UserError, match="no files"):
        texts("other")
    write(Path("data/raw/a.bin"), b"\0\1\2")
    with pytest.raises(lp.UserError, match="none readable"):
        texts("data/raw")
    write(Path("data/raw/a.jsonl"), jsonl([{"text": t} for t in PLAIN]))
    assert texts("data/raw") == sorted(PLAIN)


# --- bad input ---

GOOD = jsonl([{"text": t} for t in PLAIN])


@pytest.mark.parametrize(
    "name, content, word",
    [
        ("a.json", "5", "list"),
        ("a.json", '[{"a":' * 100_000, "JSON"),
        ("a.json", "", "JSON"),
        ("a.json", "[5]", "entry 1"),
        ("a.json", '[{"text": "a"}, {"text": 5}]', "entry 2"),
        ("a.jsonl", GOOD + '{"text": \n' + GOOD, ":31"),
        ("a.jsonl", GOOD + "[" * 100_000, ":31"),
        ("a.jsonl", GOOD + '{"instruction": "a"}', ":31"),
        ("a.jsonl", GOOD + '{"messages": [5]}', ":31"),
        ("SMSSpamCollection", "ham\tone\nham two\nham\tthree\n", ":2"),
        ("SMSSpamCollection", "ham\tone\n\ttwo\n", ":2"),
        ("a.txt", b"abc\xffdef", "byte 3"),
        ("a.txt", b"x" * 3_000_000 + b"\xe4\xbd" + b"x" * 9, "byte 3000000"),
        ("a.jsonl", b'{"text": "\xc3\x28"}', "byte 10"),
        ("a.txt", "Größe".encode("utf-16") + b"\0", "UTF-16 at byte 12"),
        ("a.txt", "Größe".encode("utf-16-le"), "UTF-8 at byte 4"),
        ("a.csv", 'text\n"Size\0"\n', "NULs"),
        ("a.jsonl", '{"text": "\\u0000"}', "NULs"),
        ("a.txt.gz", b"not gzip", "a.txt.gz"),
        ("a.jsonl.gz", gzip.compress(GOOD.encode(), mtime=0)[:40], "a.jsonl.gz"),
        ("a.csv", 'id,text\n1,"a"b\n', "expected after"),
        ("a.csv", "id,text\n1,a,b\n", "more cells"),
        ("a.csv", "text,text\na,b\n", "two columns"),
        ("a.parquet", b"PAR1 no table PAR1", "a.parquet"),
        ("a.pdf", b"%PDF-1.7\n%\xe2\xe3\n", "not text"),
    ],
)
def test_broken_files(tmp_path, name, content, word):
    write(tmp_path / name, content)
    with pytest.raises(lp.UserError) as caught:
        texts(tmp_path)
    assert word in str(caught.value) and name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing", "x" * 300, "x" * 300 + "/a.txt", "a\0b", "a.txt/b"])
def test_folders_that_do_not_exist(tmp_path, name):
    write(tmp_path / "a.txt", "text")
    with pytest.raises(lp.UserError, match="--data_dir"):
        texts(tmp_path / name)


def test_bad_records_skip(tmp_path):
    bad = ['{"text": 5}', "{", "5", '{"x": 1}', '{"text": "good"}']
    write(tmp_path / "a.jsonl", "\n".join(bad))
    lines = [f"ham\tmessage {i}" for i in range(20)] + ["no tab", "\tno label"]
    write(tmp_path / "SMSSpamCollection", "\n".join(lines))
    write(tmp_path / "b.json", json.dumps([{"text": "fine"}, 7]))
    write(tmp_path / "c.csv", "text,n\nalpha,1\nbad,1,2\nbeta,\ngamma\n")
    found, report = split(tmp_path, bad_records="skip")
    kept = [text(record) for record, _ in found]
    assert len(kept) == 25 and {"good", "fine", "alpha", "beta", "gamma"} < set(kept)
    table = "\n".join(report.lines())
    for where in ("a.jsonl:1", "b.json: entry 2", "SMSSpamCollection:21", "c.csv:3"):
        assert where in table
    assert "no tab between label and message: 2" in table


@pytest.mark.skipif(os.name == "nt", reason="file names are text on Windows")
def test_a_file_name_that_is_not_utf8(tmp_path):
    (tmp_path / "raw").mkdir()
    with open(os.fsencode(tmp_path / "raw") + b"/\xff.txt", "w") as file:
        file.write("some text")
    flags = ["--data_dir", tmp_path / "raw", "--out_dir", tmp_path / "st"]
    run("prepare", *flags).ok()


@pytest.mark.parametrize("key", ["text", "rejected"])
def test_lone_surrogates_in_json(tmp_path, key):
    row = {"prompt": "p", "chosen": "yes"} if key == "rejected" else {}
    path = write(tmp_path / "a.jsonl", json.dumps(row | {key: "no \ud800 x"}) + "\n")
    [(record, _)], _ = split(path, pairs=key == "rejected")
    assert "\ud800" in record.rejected + text(record)


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
    """Whatever a file holds: records, or one clear line."""
    pa, parquet = needs("pyarrow"), needs("pyarrow.parquet")
    parquet.write_table(pa.Table.from_pylist(ROWS[:30]), tmp_path / "a.parquet")
    parquet.write_table(pa.Table.from_pylist([{"text": t} for t in PLAIN]), tmp_path / "t.parquet")
    chat = [dict(role="user", content="a"), dict(role="assistant", content="b", weight=0)]
    pairs = [dict(prompt=f"{i}", chosen="a", rejected="b") for i in range(4)]
    sources = [
        ("a.json", json.dumps(ROWS[:30][:4]).encode()),
        ("a.jsonl", jsonl([*pairs, dict(messages=chat * 2)]).encode()),
        ("SMSSpamCollection", b"ham\tone\nspam\ttwo\nham\tthree\n"),
        ("a.txt", "Some text, 你好.".encode("utf-16")),
        ("a.csv", b'sep=;\r\ntext;label\r\n"one";ham\r\n"two";ham\r\nthree;spam\r\n'),
        ("a.jsonl.xz", lzma.compress(GOOD.encode())),
        ("a.parquet", (tmp_path / "a.parquet").read_bytes()),
        ("t.parquet", (tmp_path / "t.parquet").read_bytes()),
        ("unknown", b"text of no known ending"),
    ]
    rng, outcomes = random.Random(0), []
    for round in range(270):
        name, content = sources[round % len(sources)]
        raw = tmp_path / "raw"
        shutil.rmtree(raw, ignore_errors=True)
        write(raw / name, mutated(rng, content))
        try:
            outcomes.append(len(texts(raw, bad_records=rng.choice(["error", "skip"]))))
        except lp.UserError as error:
            assert "\n" not in str(error)
            outcomes.append(None)
    assert None in outcomes and any(outcomes)


# --- which files ---


def skipped(folder: Path, **more) -> dict[str, str]:
    """{name: why} of what is left out of a folder."""
    return {
        source: what.removeprefix("skipped: ")
        for source, row in split(folder, **more)[1].rows.items()
        for what in row
        if what.startswith("skipped: ")
    }


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_to_folders_are_said_and_not_followed(tmp_path):
    write(tmp_path / "far/b.txt", "Text of B")
    write(tmp_path / "raw/a/a.txt", "Text of A")
    (tmp_path / "raw/b.txt").symlink_to(tmp_path / "far/b.txt")
    (tmp_path / "raw/far").symlink_to(tmp_path / "far")
    (tmp_path / "raw/a/loop").symlink_to(tmp_path / "raw")
    (tmp_path / "raw/broken").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "raw/pipe")
    assert texts(tmp_path / "raw") == ["Text of A", "Text of B"]
    assert set(skipped(tmp_path / "raw")) == {"far", "loop", "broken", "pipe"}


@pytest.mark.skipif(
    getattr(os, "geteuid", lambda: 0)() == 0, reason="root may read anything: run as another user"
)
def test_what_may_not_be_read_is_an_error(tmp_path):
    write(tmp_path / "one/closed/b.txt", "Text of B")
    write(tmp_path / "two/c", "Text of C").chmod(0)
    (tmp_path / "one/closed").chmod(0)
    try:
        for folder, name in (("one", "closed"), ("two", "c")):
            with pytest.raises(lp.UserError, match=f"cannot read .*{name}.*Permission denied"):
                texts(tmp_path / folder)
    finally:
        (tmp_path / "one/closed").chmod(0o700)


def test_what_the_program_wrote_is_not_read_back(tmp_path):
    """Stores, runs and exports below --data_dir: a second run reads what the first one read."""
    write(tmp_path / "a.jsonl", jsonl([{"text": t} for t in PLAIN]))
    names = "store/meta.json store/train.idx run/last.pth run/metrics.csv processed/x/y.txt"
    for name in [*names.split(), "export/config.json", "export/model.safetensors"]:
        write(tmp_path / name, "written")
    found, _ = split(tmp_path, processed_dir=str(tmp_path / "processed"))
    assert sorted(text(record) for record, _ in found) == sorted(PLAIN)
    left_out = skipped(tmp_path, processed_dir=str(tmp_path / "processed"))
    assert set(left_out) == {"store", "run", "export", "processed"}
