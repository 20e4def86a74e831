"""The token store: ids, index, bytes, masks, its folder, and blocks of a stream of texts."""

import importlib.util
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, differences, needs, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import llm_pipeline as lp


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def build(folder: Path, rows: list[dict], tokenizer=None, **more) -> lp.TokenStore:
    path = write_rows(folder / "raw/rows.jsonl", rows)
    return lp.build_corpus_from_sources(path, tokenizer, processed_dir=folder / "p", **more)


def chat(*messages, **flags) -> dict:
    """A row of messages: user, assistant, user, ...; flags: {number: extra keys of a message}."""
    roles = ("user", "assistant")
    made = [{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)]
    for number, extra in flags.items():
        made[int(number.strip("m"))] |= extra
    return {"messages": made}


# --- vocabularies of every kind ---


def saved(folder: Path, model, normalizer=None, cutter=None, decoder=None):
    """A tokenizer of the library, with the special tokens of this program, as a folder."""
    library = needs("tokenizers").Tokenizer(model)
    for part, value in dict(normalizer=normalizer, pre_tokenizer=cutter, decoder=decoder).items():
        if value:
            setattr(library, part, value)
    library.add_special_tokens(["<|pad|>", "<|bos|>", "<|eos|>", "<|sep|>"])
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    return lp.load_tokenizer(str(folder))


def byte_fallback(folder: Path):
    """Like SentencePiece's: a mark before each word and the text, bytes for rare characters."""
    tokenizers = needs("tokenizers")
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *"▁theao:#"]
    pieces += ["▁t", "▁th", "▁the", "▁a", "##", "###"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "a"), ("#", "#"), ("##", "#")]
    numbers = {piece: number for number, piece in enumerate(pieces)}
    model = tokenizers.models.BPE(numbers, merges, byte_fallback=True, unk_token="<unk>")
    normal, back = tokenizers.normalizers, tokenizers.decoders
    marks = normal.Sequence([normal.Prepend("▁"), normal.Replace(" ", "▁")])
    unmark = [back.Replace("▁", " "), back.ByteFallback(), back.Fuse(), back.Strip(" ", 1, 0)]
    return saved(folder, model, marks, None, back.Sequence(unmark))


def word_level(folder: Path):
    tokenizers = needs("tokenizers")
    words = ["[UNK]", "the", "a", "###", ":", "Output", "Input", "Instruction", "sun"]
    model = tokenizers.models.WordLevel({w: n for n, w in enumerate(words)}, "[UNK]")
    return saved(folder, model, cutter=tokenizers.pre_tokenizers.Whitespace())


def bpe(folder: Path):
    needs("tokenizers")
    rows = [{"text": f"the sun and the moon {i} Größe 你好"} for i in range(40)]
    return build(folder, rows, "bpe", vocab_size=300).tokenizer


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("vocabularies")
    made = {"byte": lp.ByteTokenizer(), "bpe": bpe(folder / "bpe")}
    made["byte fallback"] = byte_fallback(folder / "fallback")
    return made | {"word level": word_level(folder / "words")}


KINDS = ["byte", "bpe", "byte fallback", "word level"]
TEXTS = st.text(st.sampled_from("the aSun#:'1é你😀\n\t\x00\u2028"), min_size=1, max_size=30)
TALKS = st.lists(st.lists(TEXTS, min_size=2, max_size=5), max_size=3)
SLOW = dict(deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, **SLOW)
@given(plain=st.lists(TEXTS, max_size=4), talks=TALKS, data=st.data())
def test_counted_bytes_are_the_text(tmp_path_factory, vocabularies, kind, plain, talks, data):
    """And the masked tokens are those of the marked answers, with any tokenizer."""
    rows = [{"text": text} for text in plain]
    for texts in talks:
        texts = texts[: len(texts) // 2 * 2]
        weights = {
            f"m{i}": {"weight": data.draw(st.integers(0, 1))} for i in range(1, len(texts), 2)
        }
        rows.append(chat(*texts, **weights))
    folder, report = tmp_path_factory.mktemp("store"), lp.Report()
    path = write_rows(folder / "rows.jsonl", rows)
    config = lp.PrepareConfig(data_dir=str(path), bad_records="skip")
    found = lp.read_records(config, report)
    kept = [r for r, _, _ in lp.split_records(found, config, report)]
    if not kept:
        return
    store = lp.build_corpus_from_sources(
        path, vocabularies[kind], bad_records="skip", processed_dir=folder / "p"
    )
    scored = masked = 0
    for record in kept:
        for turn in record.turns:
            scored += len((turn.prompt + turn.response * turn.trained).encode())
            masked += not turn.trained
    counts = store.meta["counts"].values()
    assert scored == sum(row.get(f"{s}_bytes", 0) for row in counts for s in ("train", "val"))
    ranges = {split: store.masked(split).tolist() for split in ("train", "val")}
    assert sum(map(len, ranges.values())) == masked
    for split, found in ranges.items():
        for _, end in found:
            assert store.tokens[split][end - 1] == store.tokenizer.sep_id
        targets = np.ones(len(store.tokens[split]), bool)
        for start, end in found:
            targets[start:end] = False
        for row in store.index[split]:
            first, last = row["start"] + row["prompt"], row["start"] + row["length"]
            assert targets[int(first) : int(last)].all() == bool(row["trained"])


def test_unknown_words_are_counted(tmp_path, vocabularies):
    store = build(
        tmp_path, [{"text": "the sun is a sun"}, {"text": "the"}], vocabularies["word level"]
    )
    assert sum(row["unknown_tokens"] for row in store.meta["counts"].values()) == 1
    result = run("prepare", "--data_dir", store.folder).ok()
    assert "tokens unknown" in result.out


# --- ids ---


def long_text(rng: random.Random, size: int) -> str:
    words = ["sun", "don't", "Größe", "123", "...", "\n\n", "  ", "\t", "你好，世界。", "x" * 50]
    parts = [rng.choice(words) + rng.choice(["", " ", "\n", "\u2028", "!"]) for _ in range(size)]
    return "".join(parts)[:size]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spaces", [True, False])
def test_ids_of_a_long_text_are_those_of_one_encoding(tmp_path, vocabularies, kind, spaces):
    text, tokenizer = long_text(random.Random(1), 200_000), vocabularies[kind]
    text = text if spaces else "".join(text.split())
    (tmp_path / "raw").mkdir()
    for split, content in {"train": text, "valid": "the"}.items():  # by name: nothing is cut off
        (tmp_path / f"raw/{split}.txt").write_bytes(content.encode())
    store = lp.build_corpus_from_sources(tmp_path / "raw", tokenizer, processed_dir=tmp_path / "p")
    wanted = tokenizer.encode(text).tolist()
    assert store.tokens["train"].tolist() == [tokenizer.bos_id, *wanted, tokenizer.eos_id]


@pytest.mark.parametrize("kind", ["byte", "bpe", "byte fallback"])
def test_a_turn_has_the_ids_of_its_whole_text(tmp_path, vocabularies, kind):
    """As a chat template encodes it; they begin with the ids of the prompt alone."""
    tokenizer = vocabularies[kind]
    row = chat("the sun", " a ", "and the moon", "", "the", "tea\n")
    store = build(tmp_path, [row], tokenizer, val_fraction=1e-9)
    turns = lp.record_from_row(row).turns
    wanted = [tokenizer.bos_id]
    for turn in turns:
        assert len(wanted) + len(tokenizer.encode(turn.prompt)) in store.index["train"]["prompt"]
        wanted += [*tokenizer.encode(turn.prompt + turn.response).tolist(), tokenizer.sep_id]
    assert store.tokens["train"].tolist() == wanted


def test_a_tokenizer_that_joins_prompt_and_answer_is_refused(tmp_path):
    tokenizers = needs("tokenizers")
    letters = sorted(set(lp.instruction_prompt("the sun") + lp.instruction_response("tea")))
    pieces = {piece: n for n, piece in enumerate([*letters, ": "])}
    tokenizer = saved(tmp_path / "tok", tokenizers.models.BPE(pieces, [(":", " ")]))
    path = write_rows(tmp_path / "a.jsonl", [{"instruction": "the sun", "output": "tea"}])
    flags = ["--data_dir", path, "--processed_dir", tmp_path / "p", "--tokenizer", tmp_path / "tok"]
    run("prepare", *flags).fails(1, "--tokenizer", "prompt")
    assert tokenizer.encode("a") is not None


def test_plain_texts_without_special_tokens(tmp_path):
    rows = [{"text": "ab"}, {"text": "cd"}, {"instruction": "Do", "output": "x"}]
    store = build(tmp_path, rows, val_fraction=1e-9, add_special_tokens=False)
    turn = [257, *b"### Instruction: Do\n### Input: \n### Output: x\n", 259]
    assert store.tokens["train"].tolist() == [*b"abcd", *turn]
    assert store.index["train"]["prompt"].tolist() == [0, 0, len(turn) - 4]
    assert store.index["train"]["length"].tolist() == [2, 2, len(turn)]
    path = tmp_path / "raw/rows.jsonl"
    flags = ["--data_dir", path, "--no_add_special_tokens", "--processed_dir", tmp_path / "p"]
    folder = run("prepare", *flags, "--val_fraction", 1e-9).ok().out.splitlines()[-1]
    assert folder == str(store.folder)


def test_a_checkpoint_keeps_what_its_data_was(tmp_path):
    """No bos before a text if it learned none; records are cut as before, so that none leaks."""
    (tmp_path / "book.txt").write_text("".join(f"line {i} of it\n" for i in range(400)))
    flags = ["--data_dir", tmp_path / "book.txt", "--processed_dir", tmp_path / "p"]
    cut = ["--doc_delimiter", r"\n", "--no_add_special_tokens"]
    run("train", *flags, *cut, *TINY, "--out_dir", tmp_path / "run").ok()
    ckpt = tmp_path / "run/best.pth"
    assert "data that the checkpoint was trained on" in run("eval", *flags, "--ckpt", ckpt).ok().err
    assert len([p for p in (tmp_path / "p").iterdir() if p.is_dir()]) == 1
    run("sample", "--ckpt", ckpt, "--prompt", "").fails(1, "--prompt")
    model, tokenizer = lp.load_model(str(ckpt)).model.eval(), lp.ByteTokenizer()
    prompt = torch.tensor([list(b"line")])
    wanted = model.generate(prompt, 8, temperature=0)[0, 4:].tolist()
    text = lp.load(str(ckpt)).generate("line", temperature=0, max_new_tokens=8)
    assert text == tokenizer.decode(wanted)
    other = prepared(*flags, "--doc_delimiter", "of")
    result = run("eval", "--ckpt", ckpt, "--data_dir", other, "--device", "cpu").ok()
    assert "may have been trained on any of it" in result.err


# --- the index ---


def test_a_row_for_each_answer(tmp_path):
    """Ids by hand: bos, then prompt, answer and sep of each turn. Trained or not, each answer has a
    row; the last row of a record covers it whole."""
    rows = [chat("Q1", "a", "Q2", "bb", "Q3", "c", m3={"weight": 0}), {"text": "text"}]
    store = build(tmp_path, rows, val_fraction=0)
    ids, wanted = [257], []
    for n, (question, answer) in enumerate((("Q1", "a"), ("Q2", "bb"), ("Q3", "c"))):
        ids += f"### Instruction: {question}\n### Input: \n### Output:".encode()
        before = len(ids)
        ids += [*f" {answer}\n".encode(), 259]
        wanted.append((0, len(ids), before, 0, n != 1, n == 2))
    wanted.append((len(ids), 6, 1, 1, True, True))
    assert store.tokens["train"].tolist() == [*ids, 257, *b"text", 258]
    assert store.index["train"].tolist() == wanted
    ((start, end),) = store.masked("train").tolist()
    assert ids[start:end] == [*b" bb\n", 259]
    assert store.whole_records("train").tolist() == [2, 3]
    assert store.masked("val").shape == (0, 2)


# --- the folder ---


def flags_of(tmp_path: Path) -> list:
    return ["--data_dir", tmp_path / "raw", "--processed_dir", tmp_path / "p"]


def prepared(*flags) -> Path:
    return Path(run("prepare", *flags).ok().out.splitlines()[-1])


ROWS = [{"instruction": f"Say {i}.", "output": str(i)} for i in range(60)]


def test_a_store_is_found_again_until_something_changes(tmp_path):
    path, flags = write_rows(tmp_path / "raw/a.jsonl", ROWS), flags_of(tmp_path)
    first = prepared(*flags)
    made = (first / "train.bin").stat().st_mtime_ns
    assert prepared(*flags) == first and (first / "train.bin").stat().st_mtime_ns == made
    assert first.name.startswith("raw-")
    others = {
        prepared(*flags, "--split_seed", 3),
        prepared(*flags, "--no_add_special_tokens"),
        prepared(*flags, "--tokenizer", "bpe", "--vocab_size", 300),
        prepared(*flags, "--tokenizer", "bpe", "--vocab_size", 280),
    }
    times = path.stat()
    path.write_text(path.read_text("utf-8").replace("Say", "SAY"), "utf-8")
    others.add(prepared(*flags))
    assert len(others | {first}) == 6
    shutil.rmtree(tmp_path / "p")
    assert times.st_size == path.stat().st_size and first not in {prepared(*flags)}


def test_another_template_or_reader_makes_another_store(tmp_path, monkeypatch):
    write_rows(tmp_path / "raw/a.jsonl", ROWS)
    first = prepared(*flags_of(tmp_path))
    monkeypatch.setitem(lp.READERS, ".chat", lp.json_rows)
    assert prepared(*flags_of(tmp_path)) != first
    source = Path(lp.__file__).read_text("utf-8").replace("### Output:", "### Answer:")
    (tmp_path / "edited.py").write_text(source, "utf-8")
    spec = importlib.util.spec_from_file_location("edited", tmp_path / "edited.py")
    edited = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "edited", edited)
    spec.loader.exec_module(edited)
    store = edited.build_corpus_from_sources(tmp_path / "raw", processed_dir=tmp_path / "p")
    assert b"### Answer:" in bytes(store.tokens["train"][:60].clip(0, 255).astype(np.uint8))


def test_pairs_are_no_texts_to_learn(tmp_path):
    """Their store holds rejected answers as well."""
    rows = [dict(prompt=f"q{i}", chosen="yes", rejected="no") for i in range(9)]
    store = build(tmp_path, rows, pairs=True)
    again = lp.build_corpus_from_sources(store.folder, pairs=True)
    assert again.fingerprint == store.fingerprint
    for command in ("prepare", "train"):
        result = run(command, "--data_dir", store.folder, "--out_dir", tmp_path / "run")
        result.fails(1, "pairs", "raw data")


def test_a_vocabulary_is_trained_once_and_its_store_found_by_other_commands(tmp_path):
    needs("tokenizers")
    write_rows(tmp_path / "raw/a.jsonl", ROWS)
    flags, out = flags_of(tmp_path), ["--out_dir", tmp_path / "run"]
    small = ["--tokenizer", "bpe", "--vocab_size", 300]
    run("train", *flags, *small, *TINY, "--max_steps", 2, *out).ok()
    (store,) = (p for p in (tmp_path / "p").iterdir() if p.is_dir())
    (vocabulary,) = (tmp_path / "p").glob("bpe-*.json")
    made = [f.stat().st_mtime_ns for f in (store / "train.bin", vocabulary)]
    ckpt = ["--ckpt", tmp_path / "run/best.pth"]
    run("eval", *flags, *ckpt).ok()
    run("finetune", *flags, *ckpt, "--max_steps", 1, *out).ok()
    assert prepared(*flags, *small) == store
    assert [p for p in (tmp_path / "p").iterdir() if p.is_dir()] == [store]
    assert [f.stat().st_mtime_ns for f in (store / "train.bin", vocabulary)] == made


def test_a_store_brings_its_settings(tmp_path):
    write_rows(tmp_path / "raw/a.jsonl", ROWS)
    store = prepared(
        *flags_of(tmp_path), "--tokenizer", "bpe", "--vocab_size", 300, "--split_seed", 5
    )
    flags = ["--data_dir", store, *TINY, "--max_steps", 2]
    run("train", *flags, "--tokenizer", "byte", "--out_dir", tmp_path / "a").fails(1, "tokenizer")
    result = run("train", *flags, "--split_seed", 7, "--out_dir", tmp_path / "a")
    result.fails(1, "--split_seed 5", str(store))
    run("train", *flags, "--out_dir", tmp_path / "a").ok()
    config = json.loads((tmp_path / "a/config.json").read_text("utf-8"))
    assert (config["tokenizer"], config["vocab_size"], config["split_seed"]) == ("bpe", 300, 5)
    raw = [*flags_of(tmp_path), "--tokenizer", "bpe", "--vocab_size", 300, "--split_seed", 5]
    run("train", *raw, *TINY, "--max_steps", 2, "--out_dir", tmp_path / "b").ok()
    assert differences(tmp_path / "a/last.pth", tmp_path / "b/last.pth") == []


def test_a_store_of_another_tokenizer_is_no_data_for_a_checkpoint(tmp_path):
    write_rows(tmp_path / "raw/a.jsonl", ROWS)
    run("train", *flags_of(tmp_path), *TINY, "--max_steps", 2, "--out_dir", tmp_path / "a").ok()
    other = prepared(*flags_of(tmp_path), "--tokenizer", "bpe", "--vocab_size", 300)
    run("eval", "--ckpt", tmp_path / "a/best.pth", "--data_dir", other).fails(1, "tokenizer")


def test_a_named_folder_is_never_replaced(tmp_path):
    write_rows(tmp_path / "raw/a.jsonl", ROWS)
    flags = [*flags_of(tmp_path), "--out_dir", tmp_path / "st"]
    prepared(*flags)
    before = (tmp_path / "st/train.bin").read_bytes()
    prepared(*flags)
    write_rows(tmp_path / "raw/a.jsonl", ROWS[:40])
    run("prepare", *flags).fails(1, "st", "remove it")
    assert (tmp_path / "st/train.bin").read_bytes() == before
    (tmp_path / "mine").mkdir()
    prepared(*flags_of(tmp_path), "--out_dir", tmp_path / "mine")
    for place in (tmp_path / "folder/meta.json", tmp_path / "file"):
        place.parent.mkdir(exist_ok=True)
        place.write_text("precious")
        out = tmp_path / place.relative_to(tmp_path).parts[0]
        run("prepare", *flags_of(tmp_path), "--out_dir", out).fails(1, str(out), "remove it")
        assert place.read_text() == "precious"


def test_a_damaged_store_is_refused(tmp_path):
    write_rows(tmp_path / "raw/a.jsonl", ROWS)
    store = prepared(*flags_of(tmp_path))

    def refused(name: str, damage: Callable[[bytes], bytes | None], *words: str) -> None:
        copy = Path(shutil.copytree(store, tmp_path / "copy", dirs_exist_ok=True))
        content = damage((copy / name).read_bytes())
        (copy / name).unlink() if content is None else (copy / name).write_bytes(content)
        result = run("train", "--data_dir", copy, *TINY, "--out_dir", tmp_path / "run")
        assert len(result.fails(1, str(copy), *words).errors) == 1

    for name in ("train.bin", "train.idx", "val.bin", "val.idx"):
        refused(name, lambda data: data[:-24])
        refused(name, lambda data: data[:10] + bytes([data[10] ^ 1]) + data[11:])
    refused("val.idx", lambda data: None)
    refused("meta.json", lambda data: data[:-24])
    refused("meta.json", lambda data: data.replace(lp.STORE_FORMAT.encode(), b"old.1"), "old.1")


# --- blocks of a stream of texts ---


@pytest.mark.parametrize("n_workers", [0, 2])
def test_token_blocks_join_and_cut(n_workers):
    texts = [f"{i} word " * (i % 5) for i in range(60)]
    blocks = lp.TokenBlocks(texts, lp.ByteTokenizer(), block_size=16)
    loader = DataLoader(blocks, batch_size=4, num_workers=n_workers)
    batches = list(loader)
    first = batches[0]
    assert first["input_ids"].shape == (4, 16) and first["input_ids"].dtype == torch.int64
    assert torch.equal(first["labels"], first["input_ids"])
    assert torch.equal(first["attention_mask"], torch.ones(4, 16, dtype=torch.int64))
    rows = sorted(bytes(row.tolist()) for batch in batches for row in batch["input_ids"])
    shares = [texts] if not n_workers else [texts[0::2], texts[1::2]]
    joined = ["".join(share).encode() for share in shares]
    assert rows == sorted(j[i : i + 16] for j in joined for i in range(0, len(j) - 15, 16))
    assert list(lp.TokenBlocks(iter(["ab"]), lp.ByteTokenizer(), 16)) == []
