"""`prepare`: sources, limits, report, kills, streams, downloads, model check."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, Child, differences, free_port, needs, run, wait_for

import llm_pipeline as lp

needs_fork = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="this system cannot fork: run on Linux or a Mac"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Keep the cache of `datasets` in a temporary folder."""
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
    processed = ["--processed_dir", out.parent / "processed"]
    return run("prepare", "--out_dir", out, *processed, *flags, **more)


def content(folder: Path) -> dict[str, bytes]:
    names = [f"{split}.{end}" for split in ("train", "val") for end in ("bin", "idx")]
    return {name: (folder / name).read_bytes() for name in names}


def texts(folder: Path) -> list[str]:
    store, found = lp.TokenStore(folder), []
    for split in ("train", "val"):
        for row in store.index[split][store.whole_records(split)]:
            found.append(store.tokenizer.decode(store.ids(split, row["start"], row["length"])))
    return sorted(found)


# --- sources ---


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "txt"])
def test_a_file_and_a_data_set_and_its_stream_give_the_same_store(tmp_path, ending):
    found, tokenizer = rows(), "bpe" if ending == "jsonl" else "byte"
    flags = ["--tokenizer", tokenizer, "--vocab_size", 300]
    path = tmp_path / f"set/a.{ending}"
    path.parent.mkdir()
    if ending == "jsonl":
        write_rows(path, [*found, found[3], {"text": " ", "id": 0}])
    elif ending == "parquet":
        pa, parquet = needs("pyarrow"), needs("pyarrow.parquet")
        parquet.write_table(pa.Table.from_pylist([*found, found[3]]), path, row_group_size=7)
    else:
        path.write_text("\n".join(["", *(r["text"] for r in found), found[3]["text"], ""]))
    local = ["--doc_delimiter", r"\n"] if ending == "txt" else []
    prepare(tmp_path / "local", "--data_dir", path, *local, *flags).ok()
    hub = ["--hf_dataset", path.parent, *flags]
    prepare(tmp_path / "hub", *hub).ok()
    prepare(tmp_path / "stream", *hub, "--streaming").ok()
    assert texts(tmp_path / "local") == sorted(r["text"] for r in found)
    assert content(tmp_path / "local") == content(tmp_path / "hub") == content(tmp_path / "stream")


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["whole", "stream"])
@pytest.mark.parametrize("kind", ["name", "broken", "column"])
def test_a_data_set_that_cannot_be_read(tmp_path, kind, streaming, offline):
    name, word = tmp_path / "set", str(tmp_path / "set")
    if kind == "broken":
        write_rows(name / "a.jsonl", rows()).open("a").write("{broken\n")
    elif kind == "column":
        write_rows(name / "a.jsonl", [{"words": "a"}])
    else:
        name, word = "nobody/no-such-set", "network"
    result = prepare(tmp_path / "st", "--hf_dataset", name, *streaming).fails(1, word)
    assert len(result.errors) == 1 and not (tmp_path / "st").exists()


# --- limits ---


def test_max_docs(tmp_path):
    write_rows(tmp_path / "a.jsonl", rows())
    prepare(tmp_path / "st", "--data_dir", tmp_path / "a.jsonl", "--max_docs", 7).ok()
    assert texts(tmp_path / "st") == sorted(r["text"] for r in rows()[:7])


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
    figures = json.loads((tmp_path / "st/report.json").read_text("utf-8"))
    tokens = {s: len(t) for s, t in store.tokens.items()}
    assert figures["records read"] == 62
    assert figures["dropped, duplicate"] == figures["dropped, short or empty"] == 1
    assert figures["records, train"] + figures["records, val"] == 60
    for split in ("train", "val"):
        assert figures[f"tokens, {split}"] == tokens[split]
        assert figures[f"records, {split}"] == len(store.index[split])
    streamed = re.search(
        r"streamed (\d+) batches of 4 x 32 in .* about [\d,]+ tokens/s", result.out
    )
    assert int(streamed[1]) == 25
    size = sum(len(r["text"].encode()) for r in rows())
    assert figures["bytes per token"] == pytest.approx(size / sum(tokens.values()), abs=1e-3)
    assert figures["tokens per second"] > 0
    lengths = np.concatenate([store.index[s]["length"] for s in ("train", "val")])
    assert figures["tokens in a record, 100%"] == lengths.max()
    assert figures["tokens in a record, 50%"] == np.sort(lengths)[29]
    for name, value in figures.items():
        assert re.search(rf"{re.escape(name)} +{value:,}\n", result.out), name
    hint = result.err.splitlines()[-1].removeprefix("next: python llm_pipeline.py ").split()
    assert "plot_curves.py" in result.err and hint[0] == "train"
    run(*hint, *TINY, "--out_dir", tmp_path / "run").ok()


def test_the_sample_batch(tmp_path):
    write_rows(tmp_path / "a.jsonl", rows())
    flags = ["--tokenizer", "bpe", "--vocab_size", 300, "--block_size", 24]
    prepare(tmp_path / "st", "--data_dir", tmp_path / "a.jsonl", *flags).ok()
    batch = json.loads((tmp_path / "st/sample_batch.json").read_text("utf-8"))
    store = lp.TokenStore(tmp_path / "st")
    assert np.array(batch["input_ids"]).shape == (4, 24)
    assert batch["labels"] == batch["input_ids"], "Hugging Face models shift labels themselves"
    assert batch["attention_mask"] == [[1] * 24] * 4
    stream = "".join(f",{i}" for i in store.tokens["train"].tolist()) + ","
    for ids, text in zip(batch["input_ids"], batch["text"], strict=True):
        assert "".join(f",{i}" for i in ids) + "," in stream
        assert text == store.tokenizer.decode(ids)


def previewed(out: str) -> list[tuple[int, str]]:
    """(id, state) of every token that a preview shows."""
    found = re.findall(r"^ +\d+ +(\d+)  (masked|trained)", out, re.M)
    return [(int(number), state) for number, state in found]


def test_the_preview(tmp_path):
    """Each token of each record, once."""
    rows = [dict(instruction="Say it", output="yes"), {"text": "plain words"}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    flags = ["--data_dir", path, "--val_fraction", 0, "--preview", 5]
    found = previewed(prepare(tmp_path / "st", *flags).ok().out)
    store = lp.TokenStore(tmp_path / "st")
    assert [number for number, _ in found] == store.tokens["train"].tolist()
    prompt, response = lp.instruction_prompt("Say it"), lp.instruction_response("yes")
    states = ["masked"] * (1 + len(prompt)) + ["trained"] * (len(response) + 1)
    assert [state for _, state in found] == [*states, "masked", *["trained"] * 12]


def test_the_report_and_preview_of_a_conversation(tmp_path):
    """One record, three answers, of which one is not to be trained: two samples."""
    turns = [{"role": role, "content": f"{role} {i}"}
             for i in range(3) for role in ("user", "assistant")]  # fmt: skip
    turns[3]["weight"] = 0
    write_rows(tmp_path / "a.jsonl", [{"messages": turns}])
    flags = ["--data_dir", tmp_path / "a.jsonl", "--val_fraction", 1e-9, "--preview", 2]
    out = prepare(tmp_path / "st", *flags).ok().out
    for name, value in {"records": 1, "answers": 3, "answers not trained": 1}.items():
        assert re.search(rf"{name}, train +{value}\n", out)
    tokens = previewed(out)
    trained = bytes(n for n, state in tokens if state == "trained" and n < 256).decode()
    assert trained == " assistant 0\n assistant 2\n"
    states = ["trained", "masked", "masked", "trained"]
    assert [state for n, state in tokens if n == 259] == states


# --- kills ---


def forked(action) -> int:
    """The pid of a copy of this process that runs only `action`."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return child


@needs_fork
@pytest.mark.parametrize("kind", ["at random", "before each renaming"])
def test_kills(tmp_path, count, kind):
    """A store never loads if it is wrong; the next run starts clean."""
    rng, out = random.Random(0), tmp_path / "out/st"
    raw = write_rows(tmp_path / "raw/a.jsonl", rows(400))
    started = time.monotonic()
    prepare(tmp_path / "right", "--data_dir", raw).ok()
    takes, right = time.monotonic() - started, content(tmp_path / "right")
    for moment in range(4 * count if kind == "at random" else 12):
        shutil.rmtree(out, ignore_errors=True)
        if kind == "at random":
            child = forked(lambda: prepare(out, "--data_dir", raw))
            time.sleep(rng.uniform(0, takes))
            os.kill(child, signal.SIGKILL)
        else:
            child = forked(lambda m=moment: (kill_at(m), prepare(out, "--data_dir", raw)))
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(lp.UserError):
            lp.TokenStore(out)
            assert content(out) == right
        if kind != "at random" and not os.WIFSIGNALED(status):
            break
    assert moment >= 2, "there are some renamings"
    shutil.rmtree(out, ignore_errors=True)
    prepare(out, "--data_dir", raw).ok()
    assert content(out) == right
    left = [p.name for p in out.parent.iterdir() if p.name != "st" and not p.name.endswith("lock")]
    assert not left


def kill_at(moment: int) -> None:
    """Send this process SIGKILL when it is about to rename a file after `moment` renames."""
    calls = []

    def dying(rename):
        def wrapper(*args, **more):
            if len(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(args)
            return rename(*args, **more)

        return wrapper

    os.rename, os.replace = dying(os.rename), dying(os.replace)


# --- streams ---


def stream_flags(path: Path, *flags) -> list:
    return ["--hf_dataset", path.parent, "--streaming", "--val_fraction", 0.3,
            "--processed_dir", path.parent.with_name("processed"), *flags]  # fmt: skip


def test_a_stream_is_read_as_far_as_the_run_needs(tmp_path):
    """TINY takes 12 steps of 4 windows of 32 tokens; the store ends with the record that holds
    the last of them. Validation is what the split has set aside by then."""
    path = write_rows(tmp_path / "set/a.jsonl", rows(800))
    run("train", *stream_flags(path), *TINY, "--out_dir", tmp_path / "run").ok()
    (folder,) = (f for f in (tmp_path / "processed").iterdir() if f.is_dir())
    store = lp.TokenStore(folder)
    need, longest = 12 * 4 * 32 + 1, max(len(r["text"].encode()) + 2 for r in rows(800))
    assert need <= len(store.tokens["train"]) < need + longest
    assert len(store.tokens["val"]) > longest
    prepare(tmp_path / "all", "--data_dir", path, "--val_fraction", 0.3).ok()
    whole = lp.TokenStore(tmp_path / "all")
    for split, tokens in store.tokens.items():
        assert tokens.tolist() == whole.tokens[split][: len(tokens)].tolist()


@pytest.mark.parametrize("gone", [False, True])
def test_a_stopped_run_on_a_stream_goes_on_bit_for_bit(tmp_path, gone):
    """Even if its store was deleted."""
    path = write_rows(tmp_path / "set/a.jsonl", rows(200))
    command = ["train", *stream_flags(path), *TINY, "--eval_interval", 5]
    run(*command, "--out_dir", tmp_path / "whole").ok()
    run(*command, "--out_dir", tmp_path / "parts", "--stop_after", 5)
    if gone:
        shutil.rmtree(tmp_path / "processed")
    run(*command, "--out_dir", tmp_path / "parts", "--resume").ok()
    assert differences(tmp_path / "whole/last.pth", tmp_path / "parts/last.pth") == []


def test_a_vocabulary_of_a_stream(tmp_path):
    path = write_rows(tmp_path / "set/a.jsonl", rows(200))
    flags = stream_flags(path, "--tokenizer", "bpe", "--vocab_size", 300)
    prepare(tmp_path / "st", *flags, "--max_tokens", 3000).ok()
    assert 3000 <= sum(map(len, lp.TokenStore(tmp_path / "st").tokens.values())) < 3300


def test_a_vocabulary_is_of_what_is_read(tmp_path):
    """The end of a stream may be far away."""
    late = [dict(text=f"zqzqzq zqzqzq {n}") for n in range(300)]
    path = write_rows(tmp_path / "set/a.jsonl", rows(100) + late)
    flags = stream_flags(path, "--tokenizer", "bpe", "--vocab_size", 400)
    prepare(tmp_path / "all", *flags, "--max_docs", 400).ok()
    prepare(tmp_path / "st", *flags, "--max_tokens", 300).ok()
    words = [(tmp_path / name / "tokenizer.json").read_text("utf-8") for name in ("all", "st")]
    assert ["zqzq" in text for text in words] == [True, False]


def test_a_split_that_is_not_reached_is_not_kept(tmp_path):
    path = write_rows(tmp_path / "set/train.jsonl", rows(400))
    write_rows(tmp_path / "set/validation.jsonl", rows(9))
    flags = ["--hf_dataset", path.parent, "--data_dir", tmp_path / "raw", "--max_tokens", 200]
    prepare(tmp_path / "st", *flags, "--save_raw").ok()
    assert [file.name for file in (tmp_path / "raw/set").iterdir()] == ["train.jsonl"]


def test_rows_of_the_hub_are_kept_when_asked(tmp_path):
    path = write_rows(tmp_path / "set/a.jsonl", rows(40))
    flags = ["--hf_dataset", path.parent, "--data_dir", tmp_path / "raw", "--max_docs", 30]
    prepare(tmp_path / "st", *flags, "--save_raw").ok()
    assert texts(tmp_path / "st") == sorted(row["text"] for row in rows(30))
    kept = (tmp_path / "raw/set/train.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in kept] == rows(30)


# --- signals ---


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_prepare_and_leaves_nothing(tmp_path, number):
    raw = write_rows(tmp_path / "raw/a.jsonl", rows(2000))
    out = tmp_path / "out/st"
    flags = ["--data_dir", raw.parent, "--out_dir", out, "--processed_dir", tmp_path / "p"]
    child = Child("prepare", *flags, hook=partial(slow_reading, tmp_path / "reading"))
    wait_for((tmp_path / "reading").exists)
    child.send(number)
    result = child.finish()
    assert result.code == 128 + number and "Traceback" not in result.err
    left = [p.name for p in out.parent.iterdir()] if out.parent.exists() else []
    assert [name for name in left if not name.endswith(".lock")] == []


def slow_reading(mark: Path) -> None:
    """Slow reading to ten records a second, so that a signal arrives mid-work."""
    read_records = lp.read_records

    def slowly(*args):
        for record in read_records(*args):
            mark.touch()
            time.sleep(0.1)
            yield record

    lp.read_records = slowly


# --- the model check ---


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    tasks = [dict(instruction=f"Do {i}", input="x " * i, output=f"{i}") for i in range(20)]
    write_rows(folder / "raw/a.jsonl", [*rows(), *tasks])
    prepare(folder / "st", "--data_dir", folder / "raw").ok()
    return folder / "st"


@pytest.fixture(scope="module")
def small_gpt2(tmp_path_factory):
    transformers = needs("transformers")
    torch.manual_seed(0)
    shape = dict(vocab_size=260, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))
    with torch.no_grad():  # sharp enough for a shift by one place to show
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


def test_a_model_that_does_not_shift_is_refused(store, small_gpt2, monkeypatch):
    """One that compares each logit with its own input."""
    import transformers

    def forward(self, input_ids, labels):
        logits = shifted(self, input_ids).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return transformers.modeling_outputs.CausalLMOutput(loss, logits)

    shifted = transformers.GPT2LMHeadModel.forward
    monkeypatch.setattr(transformers.GPT2LMHeadModel, "forward", forward)
    check(store, small_gpt2, "--block_size", 48).fails(1, str(small_gpt2), "shift")


def test_a_model_that_cannot_take_the_batch(store, small_gpt2, tmp_path, offline):
    import transformers

    result = check(store, small_gpt2, "--block_size", 100).fails(1, str(small_gpt2))
    assert len(result.errors) == 1 and "--block_size 100" in result.err
    shape = dict(vocab_size=100, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).save_pretrained(tmp_path / "s")
    check(store, tmp_path / "s", "--block_size", 32).fails(1, "257", "--block_size 32")
    check(store, tmp_path / "nowhere").fails(1, "nowhere")


# --- downloads ---


def zipped(archive: Path, folder: Path, *names: str) -> None:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr("readme", "Citation: see the paper.")
        for name in names:
            file.write(folder / name, f"{folder.name}/{name}")


@pytest.fixture
def mirror(data, tmp_path, monkeypatch):
    """The folder that the addresses of all downloads point to."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    shutil.copy(data / "instruction-data.json", folder)
    shutil.copy(data / "tinyshakespeare/input.txt", folder)
    zipped(folder / "sms+spam+collection.zip", data / "sms_spam_collection", "SMSSpamCollection")
    parts = [f"wiki.{split}.tokens" for split in ("train", "valid", "test")]
    zipped(folder / "wikitext-2-v1.zip", data / "wikitext-2", *parts)
    for name, (address, digests) in DOWNLOADS.items():
        there = (folder / address.rsplit("/", 1)[1]).as_uri()
        monkeypatch.setitem(lp.DOWNLOADS, name, (there, digests))
    return folder


@pytest.fixture
def fetch(mirror, tmp_path):
    def go(name: str = "instructions"):
        flags = ["--data_dir", tmp_path / "raw", "--processed_dir", tmp_path / "out"]
        return run("prepare", "--download", name, *flags)

    return go


DOWNLOADS = {name: what for name, what in lp.DOWNLOADS.items() if isinstance(what, tuple)}


def files_in(folder: Path) -> dict[str, bytes]:
    found = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


@pytest.mark.parametrize("name", DOWNLOADS)
def test_download(fetch, mirror, data, tmp_path, name):
    result = fetch(name).ok()
    files = files_in(tmp_path / "raw")
    assert sorted(files) == sorted(DOWNLOADS[name][1])
    assert sorted(result.out.splitlines()) == sorted(str(tmp_path / "raw" / f) for f in files)
    assert all(content == (data / file).read_bytes() for file, content in files.items())
    assert not (tmp_path / "out").exists(), "nobody asked for tokens"
    shutil.rmtree(mirror)
    fetch(name).ok()  # what is there is not fetched again
    hint = result.err.splitlines()[-1].removeprefix("next: python llm_pipeline.py ").split()
    if name == "wikitext-2":  # training on it takes long
        return
    (tmp_path / "raw/other.txt").write_text("something else " * 100)
    places = ["--processed_dir", tmp_path / "p", "--out_dir", tmp_path / "run"]
    assert hint[-2:] == ["--minutes", "5"]
    run(*hint[:-2], *TINY, "--max_steps", 1, "--eval_batches", 1, *places).ok()
    (made,) = (f for f in (tmp_path / "p").iterdir() if f.is_dir())
    assert "other.txt" not in lp.TokenStore(made).sources, "the hint names its own folder"


@pytest.mark.parametrize("name", ["instruction-data.json", "sms+spam+collection.zip"])
def test_a_broken_download_is_one_line_and_then_made_good(fetch, mirror, tmp_path, name):
    file, kind = mirror / name, "sms_spam" if name.endswith("zip") else "instructions"
    whole, middle = file.read_bytes(), file.stat().st_size // 2
    for damaged in (whole[:middle], whole[:middle] + bytes(64) + whole[middle + 64 :], b"", None):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        result = fetch(kind).fails(1, kind, "same command")
        assert len(result.errors) == 1
        assert not files_in(tmp_path / "raw"), "no part is left"
    file.write_bytes(whole)
    fetch(kind).ok()
    assert len(files_in(tmp_path / "raw")) == 1


def test_no_network(fetch, monkeypatch):
    for address, word in (
        (f"http://127.0.0.1:{free_port()}/a.json", "Connection refused"),
        ("not an address", "not an address"),
    ):
        monkeypatch.setitem(lp.DOWNLOADS, "instructions", (address, {"a.json": "0"}))
        fetch().fails(1, "instructions", word, "same command")


def test_names_of_downloads(tmp_path):
    """One that is not pinned prints the flags that read it from the Hub."""
    flags = ["--data_dir", tmp_path / "raw", "--download"]
    result = run("prepare", *flags, "tinyshakespear")
    assert result.code == 2 and "tinyshakespeare" in result.err
    out = run("prepare", *flags, "wikitext-103-raw-v1").ok().out.split()
    assert out[:2] == ["python", "llm_pipeline.py"]
    config = lp.parse(out[2:])[1]
    assert config.hf_config == "wikitext-103-raw-v1" and config.join_rows
