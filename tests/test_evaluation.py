"""`eval`, the report, `bench`: every figure against one computed here, one token at a time."""

import json
import math
import random
import unicodedata

import numpy as np
import pytest
import torch
from conftest import CPU, needs, run, run_together, words
from torch.utils.data import DataLoader

import llm_pipeline as lp

BLOCK = 32
WORDS = ["sun", "moon", "river", "stone", "cloud", "bird", "lamp", "Größe", "你好", "naïve"]
LABELS = ["red", "sky", "ten"]
# Weights so large that every token of context matters, and a rate that leaves them so.
MODEL = [*CPU, "--n_layer", 1, "--n_head", 2, "--n_embd", 32, "--block_size", BLOCK]
MODEL += ["--init_std", 0.3, "--max_steps", 1, "--batch_size", 4, "--lr", 1e-9]
FIGURES = ("loss", "bits_per_byte", "tokens", "bytes", "records")
RT = lp.Runtime(torch.device("cpu"), torch.float32)


def prompt_of(row):
    return f"### Instruction: {row['instruction']}\n### Input: {row['input']}\n### Output:"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of three sources, and their records by source as (prompt, response) texts."""
    folder, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    raw = folder / "raw"
    raw.mkdir()

    def some(n):
        return " ".join(draw.choice(WORDS) for _ in range(n))

    tasks = [{"instruction": f"Say {i}.", "input": some(i % 4), "output": some(i % 20 + 1)}
             for i in range(20)]  # fmt: skip
    messages = [(draw.choice(LABELS), f"{i} {some(draw.randrange(4))}") for i in range(40)]
    lengths = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 3 * BLOCK + 5, 200]
    plain = ["".join(draw.choice("abcdefgh ") for _ in range(n - 1)) + "z" for n in lengths]
    (raw / "tasks.json").write_text(json.dumps(tasks), encoding="utf-8")
    lines = [json.dumps({"text": text}) + "\n" for text in plain]
    (raw / "plain.jsonl").write_text("".join(lines), encoding="utf-8")
    lines = [f"{label}\t{message}\n" for label, message in messages]
    (raw / "SMSSpamCollection").write_text("".join(lines), encoding="utf-8")
    asked = {"instruction": "classify if the SMS is spam or ham"}
    records = {
        "instructions": [(prompt_of(t), f" {t['output']}\n") for t in tasks],
        "plain.jsonl": [("", text) for text in plain],
        "sms": [(prompt_of(asked | {"input": m}), f" {label}\n") for label, m in messages],
    }
    return ["--data_dir", raw, "--processed_dir", folder / "processed"], records


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, texts):
    out = tmp_path_factory.mktemp("random")
    run("train", *texts[0], *MODEL, "--val_fraction", "0.4", "--out_dir", out).ok()
    return out / "best.pth"


def evaluate(checkpoint, flags, tmp_path, *more):
    path = tmp_path / "figures.json"
    result = run("eval", "--ckpt", checkpoint, *flags, "--device", "cpu", "--json", path, *more)
    return json.loads(result.ok().out and path.read_text(encoding="utf-8"))


def open_store(path, tmp_path, tokenizer=None, **settings):
    settings = dict(data_dir=path, processed_dir=tmp_path / "stores") | settings
    return lp.build_corpus_from_sources(tokenizer=tokenizer, **settings)


def random_model(vocab_size=260, block_size=64, **more):
    lp.set_seed(0)
    shape = dict(n_layer=1, n_head=2, n_embd=32, dropout=0.0, init_std=0.3) | more
    return lp.GPT(lp.GPTConfig(vocab_size=vocab_size, block_size=block_size, **shape)).eval()


def naive_losses(model, ids, block):
    """Loss of every id after the first, each from its own forward pass.

    Windows follow one another; the last reaches back for as much context as the block holds.
    """
    n, losses = len(ids) - 1, []
    for target in range(1, n + 1):
        end = min(((target - 1) // block + 1) * block, n)
        context = ids[max(0, end - block) : target]
        with torch.no_grad():
            logits = model(torch.tensor([context]))[0][0, -1]
        losses.append(-logits.double().log_softmax(0)[ids[target]].item())
    return losses


def record_ids(tokenizer, prompt, response):
    """As in a store, but without the eos of plain text, which is not scored."""
    ids = [*tokenizer.prefix, *tokenizer.encode(prompt), *tokenizer.encode(response)]
    return list(map(int, ids)) + ([tokenizer.sep_id] if prompt else [])


def naive_figures(loaded, records, block=BLOCK):
    """What `eval` should find in (prompt, response) records."""
    losses, size = [], 0
    for prompt, response in records:
        ids = record_ids(loaded.tokenizer, prompt, response)
        losses += naive_losses(loaded.model.eval(), ids, block)
        size += len((prompt + response).encode())
    loss = sum(losses) / len(losses)
    return dict(loss=loss, ppl=math.exp(min(20, loss)), tokens=len(losses), bytes=size,
                bits_per_byte=sum(losses) / math.log(2) / size)  # fmt: skip


def assert_figures(found, wanted, rel=1e-5):
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=rel), name


# --- scoring a loader ---


def test_perplexity_of_any_loader_equals_a_plain_loop():
    model, loss = random_model(), torch.nn.functional.cross_entropy
    data = lp.LMDataset(np.random.default_rng(0).integers(0, 256, 500), 16)
    batches = [tuple(batch) for batch in DataLoader(data, batch_size=3)]
    losses = [loss(model(x)[0].flatten(0, 1), y.flatten()).item() for x, y in batches]
    model.train()
    state = torch.get_rng_state()
    found = lp.evaluate_perplexity(model, DataLoader(data, batch_size=3), max_batches=4)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert found["loss"] == pytest.approx(np.mean(losses[:4]), rel=1e-5)
    assert found["ppl"] == pytest.approx(math.exp(found["loss"])) and found["tokens"] == 4 * 3 * 16
    batches[0][1][:, 5:] = -100
    found = lp.evaluate_perplexity(model, batches[:1])
    x, y = batches[0]
    wanted = loss(model(x)[0][:, :5].flatten(0, 1), y[:, :5].flatten()).item()
    assert found["loss"] == pytest.approx(wanted, rel=1e-5) and found["tokens"] == 15
    with pytest.raises(lp.UserError, match="no token"):
        lp.evaluate_perplexity(model, [(x, torch.full_like(y, -100))])


# --- figures of a corpus ---


@pytest.mark.parametrize("block", [BLOCK, 7])
def test_figures_equal_the_naive_loop(checkpoint, texts, tmp_path, block):
    flags, records = texts
    result = evaluate(checkpoint, flags, tmp_path, "--split", "all", "--block_size", block)
    loaded = lp.load_model(str(checkpoint), block_size=block)
    assert result["sources"].keys() == records.keys()
    for name, mine in records.items():
        found = result["sources"][name]
        assert_figures(found, naive_figures(loaded, mine, block))
        assert found["records"] == len(mine)
    everything = [record for mine in records.values() for record in mine]
    assert_figures(result, naive_figures(loaded, everything, block))


def word_level(library):
    names = [*lp.SPECIAL_TOKENS, "<unk>", "the", "sun", "#", ":", "Output"]
    vocabulary = {name: number for number, name in enumerate(names)}
    found = library.Tokenizer(library.models.WordLevel(vocabulary, unk_token="<unk>"))
    found.pre_tokenizer = library.pre_tokenizers.Whitespace()
    return found


def added_tokens(library):
    found = library.Tokenizer(library.models.BPE())
    found.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
    found.train_from_iterator(["the sun and the stone"], trainer)
    found.add_tokens(["the river", "Größe"])
    return found


@pytest.mark.parametrize("make", [word_level, added_tokens])
def test_bytes_are_those_of_the_text_whatever_the_tokens(make, tmp_path):
    library = needs("tokenizers")
    tokenizer = make(library)
    tokenizer.add_special_tokens(list(lp.SPECIAL_TOKENS))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    rows = [f"the sun and the river Größe 你好 {i}" for i in range(12)]
    tasks = [{"instruction": row, "input": "", "output": f"the {row} "} for row in rows]
    lines = "".join(json.dumps(row) + "\n" for row in [{"text": t} for t in rows] + tasks)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    flags = ["--data_dir", tmp_path / "a.jsonl", "--processed_dir", tmp_path / "p"]
    named = ["--tokenizer", tmp_path / "tokenizer.json", "--out_dir", tmp_path / "run"]
    run("train", *flags, *MODEL, *named, "--no_self_test").ok()
    result = evaluate(tmp_path / "run" / "best.pth", flags, tmp_path, "--split", "all")
    size = sum(len(row.encode()) for row in rows)
    size += sum(len(f"{prompt_of(t)} {t['output']}\n".encode()) for t in tasks)
    assert result["bytes"] == size
    nll = result["loss"] * result["tokens"]
    assert result["bits_per_byte"] == pytest.approx(nll / math.log(2) / size)
    unknown = result["unknown_tokens"]
    assert unknown > 100 if make is word_level else unknown == 0


def test_texts_without_a_first_token(tmp_path):
    """A foreign vocabulary may declare no bos; then nothing precedes a text."""
    library = needs("tokenizers")
    made = added_tokens(library)
    made.add_special_tokens(list(lp.SPECIAL_TOKENS))
    ids = {f"{name}_id": made.token_to_id(f"<|{name}|>") for name in ("pad", "eos", "sep")}
    tokenizer = lp.BPETokenizer(made.to_str(), bos_id=None, **ids)
    rows = [f"the sun and the river {i} Größe" for i in range(6)]
    tasks = [{"instruction": f"say {row}", "input": "", "output": row} for row in rows]
    lines = [json.dumps(row) + "\n" for row in [{"text": row} for row in rows] + tasks]
    (tmp_path / "a.jsonl").write_text("".join(lines), encoding="utf-8")
    store = open_store(tmp_path / "a.jsonl", tmp_path, tokenizer)
    loaded = lp.Loaded(random_model(tokenizer.vocab_size), tokenizer, {})
    records = [("", row) for row in rows]
    records += [(prompt_of(task), f" {task['output']}\n") for task in tasks]
    wanted = naive_figures(loaded, records, 64)
    figures = ("loss", "tokens", "bytes", "bits_per_byte")
    assert_figures(lp.report(loaded, store, RT, "all"), {name: wanted[name] for name in figures})
    with pytest.raises(lp.UserError, match="--prompt"):
        lp.sample_text(loaded.model, tokenizer, "")


def test_splits_add_up(checkpoint, texts, tmp_path):
    val, train, both = (evaluate(checkpoint, texts[0], tmp_path, "--split", s)
                        for s in ("val", "train", "all"))  # fmt: skip
    for name in ("tokens", "bytes", "records"):
        assert val[name] + train[name] == both[name] and val[name] > 0 < train[name]
        for result in (val, train, both):
            assert sum(s[name] for s in result["sources"].values()) == result[name]
    store = open_store(texts[0][1], tmp_path, val_fraction=0.4)  # as the checkpoint's data
    assert val["records"] == len(store.whole_records("val"))
    weighted = (val["loss"] * val["tokens"] + train["loss"] * train["tokens"]) / both["tokens"]
    assert weighted == pytest.approx(both["loss"], rel=1e-6)


def test_max_batches_bounds_each_source(checkpoint, texts, tmp_path):
    flags = [*texts[0], "--split", "train"]
    whole = evaluate(checkpoint, flags, tmp_path)["sources"]
    result = evaluate(checkpoint, flags, tmp_path, "--batch_size", 3, "--max_batches", 2)
    few = result["sources"]
    assert few.keys() == whole.keys()
    assert result["answers"]["train"]["records"] == 6 * len(few)
    for name, source in few.items():
        assert 0 < source["tokens"] <= min(6 * BLOCK, whole[name]["tokens"])
        share = source["tokens"] / whole[name]["tokens"]
        assert source["bytes"] == pytest.approx(share * whole[name]["bytes"], abs=1)
        assert sum(c["support"] for c in source.get("classes", {}).values()) <= 6


def test_a_conversation_is_scored_once_and_masked_answers_never(checkpoint, tmp_path):
    """The index has a row for each of its answers, over the same tokens."""
    records = []
    for n in range(9):
        turns = [{"role": "user", "content": f"ask {n}"},
                 {"role": "assistant", "content": "no " * 9, "weight": n % 2},
                 {"role": "user", "content": "Größe"},
                 {"role": "assistant", "content": f"yes {n}"}]  # fmt: skip
        records.append({"messages": turns})
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in records), encoding="utf-8")
    flags = ["--data_dir", path, "--processed_dir", tmp_path / "p", "--split", "all"]
    result = evaluate(checkpoint, flags, tmp_path)
    losses, size = [], 0
    model = lp.load_model(str(checkpoint)).model.eval()
    for n in range(9):  # (text, whether it counts)
        parts = [(prompt_of(dict(instruction=f"ask {n}", input="")), True)]
        parts += [(f" {'no ' * 9}\n", n % 2)]
        parts += [(prompt_of(dict(instruction="Größe", input="")), 1), (f" yes {n}\n", 1)]
        ids, scored = [257], []
        for place, (text, counts) in enumerate(parts):
            mine = [*text.encode(), *([259] if place % 2 else [])]
            ids, scored = ids + mine, scored + [counts] * len(mine)
            size += len(text.encode()) if counts else 0
        found = zip(naive_losses(model, ids, BLOCK), scored, strict=True)
        losses += [loss for loss, counts in found if counts]
    assert result["records"] == 9 and result["tokens"] == len(losses) and result["bytes"] == size
    assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    answers = result["answers"]["val"]["records"] + result["answers"]["train"]["records"]
    assert answers == 9 + 4


def test_what_is_scored_is_said_and_is_true(checkpoint, texts, tmp_path):
    own = run("eval", "--ckpt", checkpoint, *texts[0], *CPU).ok()
    assert "the data that the checkpoint was trained on; val was held out" in own.err
    records = sum(int(row.split()[-1]) for row in own.out.splitlines() if row.startswith("total"))
    assert f"{records} val records" in own.err and "warning" not in own.err
    (tmp_path / "raw").mkdir()
    lines = "".join(f'{{"text": "something else {i}"}}\n' for i in range(40))
    (tmp_path / "raw" / "other.jsonl").write_text(lines, encoding="utf-8")
    flags = ["--data_dir", tmp_path / "raw", "--processed_dir", tmp_path / "p", "--split", "all"]
    other = run("eval", "--ckpt", checkpoint, *flags, *CPU).ok().err
    assert "not the data that the checkpoint was trained on" in other
    assert "keeps its side" in other and "64 KiB" in other
    split = run("eval", "--ckpt", checkpoint, *flags, *CPU, "--split_seed", 5).ok().err
    assert "warning" in split and "trained on any of it" in split and "keeps its side" not in split


def test_an_empty_split_is_one_line(checkpoint, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.train.txt").write_text("all of it\n", encoding="utf-8")
    (tmp_path / "raw" / "a.valid.txt").write_text("", encoding="utf-8")
    flags = ["--data_dir", tmp_path / "raw", "--processed_dir", tmp_path / "p", *CPU]
    run("eval", "--ckpt", checkpoint, *flags).fails(1, "val split", "--split all")


# --- answers ---


def naive_guesses(model, records, block):
    """The most likely label of each record; a prompt that is too long loses its middle."""
    guesses = []
    for prompt, _ in records:
        scores = []
        for label in LABELS:
            head = [257, *prompt.encode()]
            answer = [*f" {label}\n".encode(), 259]
            if (kept := block + 1 - len(answer)) < len(head):
                head = head[: kept - kept // 2] + head[len(head) - kept // 2 :]
            with torch.no_grad():
                table = model(torch.tensor([head + answer[:-1]]))[0][0].double().log_softmax(-1)
            first = len(head) - 1
            scores.append(sum(table[first + i, t].item() for i, t in enumerate(answer)))
        guesses.append(LABELS[int(np.argmax(scores))])
    return guesses


@pytest.mark.parametrize("block", [64, 128])  # prompts cut, and whole
def test_classes_equal_scikit_learn(texts, tmp_path, block):
    metrics = needs("sklearn.metrics")
    flags, records = texts
    out = ["--block_size", block, "--out_dir", tmp_path / "run"]
    run("train", *flags, *MODEL, *out, "--seed", 3).ok()
    checkpoint = tmp_path / "run" / "best.pth"
    model = lp.load_model(str(checkpoint)).model.eval()
    result = evaluate(checkpoint, flags, tmp_path, "--split", "all", "--batch_size", 7)
    source = result["sources"]["sms"]
    truth = [response.strip() for _, response in records["sms"]]
    guesses = naive_guesses(model, records["sms"], block)
    assert len(set(guesses)) > 1
    assert source["accuracy"] == pytest.approx(metrics.accuracy_score(truth, guesses))
    assert source["confusion"]["labels"] == LABELS
    table = metrics.confusion_matrix(truth, guesses, labels=LABELS)
    assert source["confusion"]["true_by_predicted"] == table.tolist()
    rows = metrics.precision_recall_fscore_support(truth, guesses, labels=LABELS, zero_division=0)
    for label, *wanted in zip(LABELS, *rows, strict=True):
        found = source["classes"][label]
        assert [found[k] for k in ("precision", "recall", "f1")] == pytest.approx(wanted[:3])
        assert found["support"] == wanted[3]
    assert [name for name, s in result["sources"].items() if "classes" in s] == ["sms"]
    promised = {"loss", "ppl", "bits_per_byte", "tokens", "bytes"}
    assert result.keys() >= promised | {"sources"} and source.keys() >= promised
    out = run("eval", "--ckpt", checkpoint, *flags, *CPU, "--split", "all").ok().out
    for value in (result["loss"], result["bits_per_byte"], source["accuracy"], found["f1"]):
        assert f"{value:.4f}" in out


def test_classes_that_differ_by_a_space_are_two(checkpoint, tmp_path):
    answers = ["yes", "yes ", "no"]
    rows = [dict(question=f"q{n}", answer=answers[n % 3]) for n in range(60)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "qa.jsonl").write_text(lines, encoding="utf-8")
    flags = ["--data_dir", tmp_path / "qa.jsonl", "--processed_dir", tmp_path / "p"]
    result = evaluate(checkpoint, flags, tmp_path, "--split", "all")
    [source] = result["sources"].values()
    assert source["classes"].keys() == {*answers}
    assert [found["support"] for found in source["classes"].values()] == [20, 20, 20]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Twelve questions, and a model that has learned those that were not held out."""
    folder = tmp_path_factory.mktemp("learned")
    names = words("red blue red green red black white red grey red pink x")
    lines = "".join(f"{chr(97 + i) * 3},{name}\n" for i, name in enumerate(names))
    (folder / "qa.csv").write_text(f"question,answer\n{lines}", encoding="utf-8")
    flags = ["--data_dir", folder / "qa.csv", "--processed_dir", folder / "p"]
    shape = ["--n_layer", 1, "--n_head", 2, "--n_embd", 64, "--block_size", 80, "--dropout", 0]
    how = ["--max_steps", 120, "--batch_size", 7, "--lr", 4e-3, "--answer_weight", 5]
    how += ["--val_fraction", 0.25, "--eval_interval", 1000, "--out_dir", folder / "run"]
    run("train", *CPU, *flags, *shape, *how).ok()
    return folder / "run" / "last.pth", flags


def test_exact_answers_are_those_that_greedy_decoding_writes(learned, tmp_path):
    checkpoint, flags = learned
    result = evaluate(checkpoint, flags, tmp_path)
    loaded = lp.load_model(str(checkpoint))
    store = open_store(flags[1], tmp_path, val_fraction=0.25)
    for split in ("train", "val"):
        exact, losses, rows = 0, [], store.index[split]
        for row in rows:
            start, length, prompt = (int(row[name]) for name in ("start", "length", "prompt"))
            ids = store.ids(split, start, length).tolist()
            idx = torch.tensor([ids[:prompt]])
            steps = lp.generate(loaded.model, idx, length - prompt, (259,), temperature=0.0)
            made = [token for (token,) in steps if token >= 0]
            exact += made == ids[prompt:-1]
            losses += naive_losses(loaded.model, ids, 80)[prompt - 1 :]
        found = result["answers"][split]
        assert found["records"] == len(rows) > 0
        assert found["exact"] == pytest.approx(exact / len(rows))
        assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert result["answers"]["train"]["exact"] > 0.8, "the model has learned them"
    shown = run("eval", "--ckpt", checkpoint, *flags, *CPU).ok().out
    assert "held-out answers: exactly right" in shown
    for example in evaluate(checkpoint, flags, tmp_path, "--split", "train")["examples"]:
        assert example["given"].startswith("### Instruction: ")
        assert example["given"].endswith("### Output:")
        assert example["model"] == example["truth"] != ""


def test_an_example_prompt_is_of_a_held_out_record(learned, tmp_path):
    store = open_store(learned[1][1], tmp_path, val_fraction=0.25)
    _, instruction = lp.example_flags(store, "val")
    held_out = store.tokenizer.decode(store.tokens["val"])
    assert lp.instruction_prompt(instruction) in held_out
    (tmp_path / "a.txt").write_text("Once upon a time there was a river. " * 9, encoding="utf-8")
    _, first = lp.example_flags(open_store(tmp_path / "a.txt", tmp_path), "val")
    assert len(first.split()) == 6


def test_two_reports_stand_beside_each_other(learned, checkpoint, tmp_path):
    store = open_store(learned[1][1], tmp_path, val_fraction=0.25)
    before, after = (lp.report(lp.load_model(str(c)), store, RT) for c in (checkpoint, learned[0]))
    lines = lp.report_lines(after, before)
    (row,) = (line for line in lines if "training answers: exactly right" in line)
    assert f"right 0.0% -> {after['answers']['train']['exact']:.1%}, loss" in row
    assert any(line.startswith("total, before") for line in lines)
    shown = [line.split(None, 1)[0] for line in lines if line.startswith("  ")]
    assert shown[-4:] == ["given", "truth", "model", "before"]


# --- several processes, and the end of a training ---


def test_two_processes_give_the_same_figures(checkpoint, texts, tmp_path):
    wanted = evaluate(checkpoint, texts[0], tmp_path, "--split", "all", "--batch_size", "4")
    path = tmp_path / "two.json"
    flags = ["--split", "all", "--batch_size", "4", "--json", path, "--device", "cpu"]
    results = run_together("eval", "--ckpt", checkpoint, *texts[0], *flags)
    assert sum(result.err.count("total") for result in results) == 1  # one process prints
    found = json.loads(path.read_text(encoding="utf-8"))
    for one, other in [(found, wanted), *((found["sources"][n], wanted["sources"][n])
                                          for n in wanted["sources"])]:  # fmt: skip
        assert_figures(one, {n: other[n] for n in FIGURES}, rel=1e-6)
        assert one.get("confusion") == other.get("confusion")
    for split, row in wanted["answers"].items():
        assert_figures(found["answers"][split], row, rel=1e-6)


def test_training_ends_with_the_report(texts, tmp_path):
    """If everything is scored, the figures are those of `eval`."""
    flags = [*texts[0], *MODEL, "--val_fraction", "0.4", "--out_dir", tmp_path / "run"]
    many = ["--max_steps", 40, "--batch_size", 64]  # one batch at the end: all records of a source
    result = run("train", *flags, *many).ok()
    card = run("eval", "--ckpt", tmp_path / "run" / "best.pth", *texts[0], "--device", "cpu")
    rows = {line.split()[0]: line for line in card.ok().out.splitlines() if line}
    ending = result.err.split("done: ")[1].splitlines()
    for name in ("plain.jsonl", "sms", "total"):
        assert rows[name] in ending, name
    for word in ("given", "truth", "model"):
        assert sum(line.startswith(f"  {word}") for line in ending) == 3


def test_the_end_of_training_is_safe_to_show(tmp_path):
    """A model's text cannot control the terminal."""
    (tmp_path / "raw").mkdir()
    for number in range(4):
        text = f"{number}: \x1b[31mred\x07" * 9
        (tmp_path / "raw" / f"{number}.txt").write_text(text)
    flags = ["--data_dir", tmp_path / "raw", "--processed_dir", tmp_path / "p", *MODEL]
    few = ["--val_fraction", "0.5", "--max_steps", 2]
    result = run("train", *flags, *few, "--out_dir", tmp_path / "run").ok()
    ending = result.err.split("done: ")[1].split("next:")[0]
    assert "\ufffd[31mred\ufffd" in ending
    assert not [c for c in ending.replace("\n", "") if unicodedata.category(c) == "Cc"]


# --- the benchmark ---


@pytest.mark.parametrize("vs", ["", "hf"])
def test_the_benchmark(tmp_path, vs):
    if vs:
        needs("transformers")
    shape = ["--n_layer", 1, "--n_head", 2, "--n_embd", 32, "--block_size", 16, "--batch_size", 2]
    path = tmp_path / "bench.json"
    flags = [*CPU, *shape, "--rounds", 1, "--json", path, "--no_self_test", "--vs", vs]
    out = run("bench", *flags).ok().out
    found = json.loads(path.read_text(encoding="utf-8"))
    promised = set(words("params device dtype train_tokens_per_s step_ms matmul_peak_flops mfu"))
    promised |= {"peak_memory_bytes", "decode_tokens_per_s", "decode_limit_tokens_per_s"}
    if vs:
        promised |= {"hf_train_tokens_per_s", "hf_decode_tokens_per_s"}
        promised |= {"train_ratio", "decode_ratio"}
    assert found.keys() >= promised
    assert all(found[name] > 0 for name in promised - {"device", "dtype"})
    assert found["mfu"] <= 1 and found["decode_limit_tokens_per_s"] >= found["decode_tokens_per_s"]
    assert all(name in out for name in promised)


def test_a_ceiling_is_never_below_what_was_reached(monkeypatch):
    """Even if another process slows the measurement of the ceiling."""
    measure = lp.measure
    monkeypatch.setattr(lp, "measure", lambda *args: (measure(*args)[0], 1e9))
    shape = dict(n_layer=1, n_head=2, n_embd=32, block_size=16)
    config, model = lp.BenchConfig(**shape, batch_size=2, rounds=1), random_model(block_size=16)
    assert lp.bench_training(config, RT, model)["mfu"] == pytest.approx(1.0)
    found = lp.bench_decoding(config, RT, model)
    assert found["decode_limit_tokens_per_s"] == found["decode_tokens_per_s"]
