"""Section 12, `eval`: every figure against one computed here, a token at a time."""

import gzip
import json
import math
import random
import unicodedata

import numpy as np
import pytest
import torch
from conftest import CPU, needs, run, run_together

import llm_pipeline as lp

BLOCK = 32
WORDS = ["sun", "moon", "river", "stone", "cloud", "bird", "lamp", "Größe", "你好", "naïve"]
LABELS = ["red", "sky", "ten"]
# Weights so large that every token of context matters, and that stay as they are.
MODEL = [*CPU, "--n_layer", 1, "--n_head", 2, "--n_embd", 32, "--block_size", BLOCK]
MODEL += ["--init_std", 0.3, "--max_steps", 1, "--batch_size", 4, "--lr", 1e-9]


def prompt_of(row):
    return f"### Instruction: {row['instruction']}\n### Input: {row['input']}\n### Output:"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of three sources, and their records by source as (prompt, response) texts."""
    folder, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    raw = folder / "raw"
    raw.mkdir()

    def words(n):
        return " ".join(draw.choice(WORDS) for _ in range(n))

    tasks = [{"instruction": f"Say {i}.", "input": words(i % 4), "output": words(i % 20 + 1)}
             for i in range(20)]  # fmt: skip
    messages = [(draw.choice(LABELS), f"{i} {words(draw.randrange(4))}") for i in range(40)]
    lengths = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 3 * BLOCK + 5, 200]
    plain = ["".join(draw.choice("abcdefgh ") for _ in range(n - 1)) + "z" for n in lengths]
    (raw / "tasks.json").write_text(json.dumps(tasks), encoding="utf-8")
    lines = [json.dumps({"text": text}) + "\n" for text in plain]
    (raw / "plain.jsonl").write_text("".join(lines), encoding="utf-8")
    lines = [f"{label}\t{message}\n" for label, message in messages]
    (raw / "SMSSpamCollection").write_text("".join(lines), encoding="utf-8")
    records = {
        "instructions": [(prompt_of(t), f" {t['output']}\n") for t in tasks],
        "plain.jsonl": [("", text) for text in plain],
        "sms": [
            (
                prompt_of({"instruction": "classify if the SMS is spam or ham", "input": message}),
                f" {label}\n",
            )
            for label, message in messages
        ],
    }
    flags = ["--data_dir", raw, "--processed_dir", folder / "processed"]
    return flags, records


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, texts):
    out = tmp_path_factory.mktemp("random")
    run("train", *texts[0], *MODEL, "--val_fraction", "0.4", "--out_dir", out).ok()
    return out / "best.pth"


def evaluate(checkpoint, flags, tmp_path, *more):
    path = tmp_path / "figures.json"
    result = run("eval", "--ckpt", checkpoint, *flags, "--device", "cpu", "--json", path, *more)
    return json.loads(result.ok().out and path.read_text(encoding="utf-8"))


def naive_losses(model, ids, block):
    """Loss of every id after the first, each by a forward pass of its own.

    Windows follow one another; the last reaches back for as much context as the block holds.
    """
    n, losses = len(ids) - 1, []
    for target in range(1, n + 1):
        end = min(((target - 1) // block + 1) * block, n)
        context = ids[max(0, end - block) : target]
        with torch.no_grad():
            logits = model(torch.tensor([context]))[0, -1]
        losses.append(-logits.double().log_softmax(0)[ids[target]].item())
    return losses


def naive_figures(loaded, records, block=BLOCK):
    """What `eval` should find in (prompt, response) records."""
    tokenizer, model = loaded.tokenizer, loaded.model.eval()
    nll = text_nll = tokens = size = words = 0
    for prompt, response in records:
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt), *tokenizer.encode(response)]
        ids = list(map(int, ids)) + [tokenizer.sep_id] * bool(prompt)
        losses = naive_losses(model, ids, block)
        nll, tokens = nll + sum(losses), tokens + len(losses)
        text_nll += sum(losses) - (losses[-1] if prompt else 0.0)
        size += len((prompt + response).encode())
        words += len((prompt + response).split())
    loss = nll / tokens
    return dict(loss=loss, ppl=math.exp(min(20, loss)), tokens=tokens, bytes=size, words=words,
                word_ppl=math.exp(text_nll / words),
                bits_per_byte=text_nll / math.log(2) / size)  # fmt: skip


def assert_figures(found, wanted):
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


# --- loss ---


@pytest.mark.parametrize("block", [BLOCK, 7])
def test_figures_equal_the_naive_loop(checkpoint, texts, tmp_path, block):
    flags, records = texts
    result = evaluate(checkpoint, flags, tmp_path, "--split", "all", "--block_size", block)
    loaded = lp.load_model(str(checkpoint), block_size=block)
    assert result["sources"].keys() == records.keys()
    for name, mine in records.items():
        assert_figures(result["sources"][name], naive_figures(loaded, mine, block))
        assert result["sources"][name]["records"] == len(mine)
    everything = [record for mine in records.values() for record in mine]
    assert_figures(result, naive_figures(loaded, everything, block))


def test_simpler_models_of_the_same_text(checkpoint, texts, tmp_path):
    """gzip, and bytes by how often they occur: what bits per byte are to be compared with."""
    flags, records = texts
    result = evaluate(checkpoint, flags, tmp_path, "--split", "all")
    for name, mine in records.items():
        text = "".join(sorted((prompt + response for prompt, response in mine), key=len)).encode()
        share = np.bincount(np.frombuffer(text, np.uint8)) / len(text)
        entropy = -sum(p * math.log2(p) for p in share if p)
        source = result["sources"][name]
        assert source["unigram_bits_per_byte"] == pytest.approx(entropy)
        assert source["gzip_bits_per_byte"] == pytest.approx(
            8 * len(gzip.compress(text)) / len(text), rel=0.05
        )
    sizes = [source["bytes"] for source in result["sources"].values()]
    shares = [source["gzip_bits_per_byte"] for source in result["sources"].values()]
    assert result["gzip_bits_per_byte"] == pytest.approx(np.average(shares, weights=sizes))


def test_figures_of_a_bpe_model(texts, tmp_path):
    needs("tokenizers")
    flags, records = texts
    bpe = ["--tokenizer", "bpe", "--vocab_size", "300", "--out_dir", tmp_path / "run"]
    run("train", *flags, *MODEL, *bpe).ok()
    result = evaluate(tmp_path / "run" / "best.pth", flags, tmp_path, "--split", "all")
    everything = [record for mine in records.values() for record in mine]
    loaded = lp.load_model(str(tmp_path / "run" / "best.pth"))
    assert_figures(result, naive_figures(loaded, everything))


def test_batches_do_not_change_the_figures(checkpoint, texts, tmp_path):
    one, many = (evaluate(checkpoint, texts[0], tmp_path, "--batch_size", n) for n in (1, 64))
    assert_figures(one, {k: v for k, v in many.items() if k != "sources"})
    for name, source in many["sources"].items():
        assert one["sources"][name].get("confusion") == source.get("confusion")


def test_splits_add_up(checkpoint, texts, tmp_path):
    val, train, both = (evaluate(checkpoint, texts[0], tmp_path, "--split", s)
                        for s in ("val", "train", "all"))  # fmt: skip
    for name in ("tokens", "bytes", "words", "records"):
        assert val[name] + train[name] == both[name] and val[name] > 0 < train[name]
        for result in (val, train, both):
            assert sum(s[name] for s in result["sources"].values()) == result[name]
    weighted = (val["loss"] * val["tokens"] + train["loss"] * train["tokens"]) / both["tokens"]
    assert weighted == pytest.approx(both["loss"], rel=1e-6)
    for name, source in both["sources"].items():
        parts = [r["sources"][name]["records"] for r in (val, train) if name in r["sources"]]
        assert sum(parts) == source["records"]


def test_default_split_is_what_training_did_not_see(checkpoint, texts, tmp_path):
    """The checkpoint's own val_fraction (0.4) and seed, with nothing said."""
    result = evaluate(checkpoint, texts[0], tmp_path)
    config = lp.DataConfig(data_dir=str(texts[0][1]), processed_dir=str(tmp_path), val_fraction=0.4)
    store = lp.build_corpus_from_sources(config, lp.ByteTokenizer())
    index = store.index["val"]
    wanted = int((index["length"] - 1 - (index["prompt"] == 1)).sum())
    assert result["tokens"] == wanted
    assert sum(s["records"] for s in result["sources"].values()) == len(index)


def test_max_batches_bounds_each_source(checkpoint, texts, tmp_path):
    flags = [*texts[0], "--split", "all"]
    whole = evaluate(checkpoint, flags, tmp_path)
    few = evaluate(checkpoint, flags, tmp_path, "--batch_size", "3", "--max_batches", "2")
    assert few["sources"].keys() == whole["sources"].keys()
    for name, source in few["sources"].items():
        assert 0 < source["tokens"] <= min(6 * BLOCK, whole["sources"][name]["tokens"])
        assert source["records"] <= 6
        assert sum(c["support"] for c in source.get("classes", {}).values()) <= 6
    assert evaluate(checkpoint, flags, tmp_path, "--max_batches", "1000000") == whole


def test_another_split_seed_is_warned_of(checkpoint, texts):
    quiet = run("eval", "--ckpt", checkpoint, *texts[0], *CPU).ok()
    assert "warning" not in quiet.err
    for flag in (["--split_seed", "5"], ["--val_fraction", "0.2"]):
        loud = run("eval", "--ckpt", checkpoint, *texts[0], *CPU, *flag).ok()
        assert "warning" in loud.err and flag[0] in loud.err


def test_what_is_scored_is_said_and_is_true(checkpoint, texts, tmp_path):
    own = run("eval", "--ckpt", checkpoint, *texts[0], *CPU).ok()
    assert "the data that the checkpoint was trained on; the val records were held out" in own.err
    records = sum(int(row.split()[-1]) for row in own.out.splitlines() if row.startswith("total"))
    assert f"{records} val records" in own.err
    (tmp_path / "raw").mkdir()
    lines = "".join(f"something else {i}\n" for i in range(40))
    (tmp_path / "raw" / "other.txt").write_text(lines, encoding="utf-8")
    flags = ["--data_dir", tmp_path / "raw", "--processed_dir", tmp_path / "p", "--split", "all"]
    flags += ["--doc_delimiter", "\\n"]
    other = run("eval", "--ckpt", checkpoint, *flags, *CPU).ok().err
    assert "not the data that the checkpoint was trained on" in other
    assert "keeps its side" in other and "64 KiB" in other
    split = run("eval", "--ckpt", checkpoint, *flags, *CPU, "--split_seed", 5).ok().err
    assert "may have been trained on any of it" in split and "keeps its side" not in split


def test_an_empty_split_is_one_line(checkpoint, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.train.txt").write_text("all of it\n", encoding="utf-8")
    (tmp_path / "raw" / "a.valid.txt").write_text("", encoding="utf-8")
    flags = ["--data_dir", tmp_path / "raw", "--processed_dir", tmp_path / "p", *CPU]
    run("eval", "--ckpt", checkpoint, *flags).fails(1, "val split", "--split all")


def test_a_conversation_is_scored_once(checkpoint, tmp_path):
    """It has a row of the index for each answer, over the same tokens."""
    some = [{"messages": [{"role": role, "content": f"{role} {n} says {i}"}
                          for i in range(3) for role in ("user", "assistant")]}
            for n in range(9)]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    flags = ["--data_dir", path, "--processed_dir", tmp_path / "p", "--split", "all"]
    result = evaluate(checkpoint, flags, tmp_path)
    config = lp.DataConfig(data_dir=str(path), processed_dir=str(tmp_path / "q"))
    store = lp.build_corpus_from_sources(config, lp.ByteTokenizer())
    assert result["tokens"] == sum(map(len, store.tokens.values())) - 9
    assert sum(source["records"] for source in result["sources"].values()) == 9


# --- classes ---


def naive_guesses(model, records, block):
    """The likeliest label of each record, its prompt cut in the middle where it is too long."""
    guesses = []
    for prompt, _ in records:
        scores = []
        for label in LABELS:
            head = [257, *prompt.encode()]
            answer = [*f" {label}\n".encode(), 259]
            if (kept := block + 1 - len(answer)) < len(head):
                head = head[: kept - kept // 2] + head[len(head) - kept // 2 :]
            with torch.no_grad():
                table = model(torch.tensor([head + answer[:-1]]))[0].double().log_softmax(-1)
            first = len(head) - 1
            scores.append(sum(table[first + i, t].item() for i, t in enumerate(answer)))
        guesses.append(LABELS[int(np.argmax(scores))])
    return guesses


@pytest.mark.parametrize("block", [64, 128])  # prompts cut, and whole
def test_classes_equal_scikit_learn(texts, tmp_path, block):
    metrics = needs("sklearn.metrics")
    flags, records = texts
    out = ["--block_size", block, "--out_dir", tmp_path / "run"]
    run("train", *flags, *MODEL, *out, "--seed", 5).ok()
    checkpoint = tmp_path / "run" / "best.pth"
    model = lp.load_model(str(checkpoint)).model.eval()
    result = evaluate(checkpoint, flags, tmp_path, "--split", "all")
    source = result["sources"]["sms"]
    truth = [response.strip() for _, response in records["sms"]]
    guesses = naive_guesses(model, records["sms"], block)
    assert len(set(guesses)) > 1
    assert source["accuracy"] == pytest.approx(metrics.accuracy_score(truth, guesses))
    assert source["majority"] == pytest.approx(max(map(truth.count, LABELS)) / len(truth))
    assert source["confusion"]["labels"] == LABELS
    table = metrics.confusion_matrix(truth, guesses, labels=LABELS)
    assert source["confusion"]["true_by_predicted"] == table.tolist()
    rows = metrics.precision_recall_fscore_support(truth, guesses, labels=LABELS, zero_division=0)
    for label, *wanted in zip(LABELS, *rows, strict=True):
        found = source["classes"][label]
        assert [found[k] for k in ("precision", "recall", "f1")] == pytest.approx(wanted[:3])
        assert found["support"] == wanted[3]


def test_json_and_table(tmp_path):
    """Spam and ham from their own format; the keys that the design promises."""
    sms = tmp_path / "raw" / "sms_spam_collection" / "SMSSpamCollection"
    sms.parent.mkdir(parents=True)
    lines = [f"{'spam' if i % 3 else 'ham'}\tmessage {i} says {i * i}\n" for i in range(60)]
    sms.write_text("".join(lines), encoding="utf-8")
    flags = ["--data_dir", tmp_path / "raw", "--processed_dir", tmp_path / "p"]
    run("train", *flags, *MODEL, "--out_dir", tmp_path / "run").ok()
    checkpoint = tmp_path / "run" / "best.pth"
    result = evaluate(checkpoint, flags, tmp_path, "--split", "all")
    figures = {"loss", "ppl", "bits_per_byte", "tokens", "bytes"}
    assert result.keys() >= figures | {"sources"}
    source = result["sources"]["sms"]
    assert source.keys() >= figures | {"records", "accuracy", "classes"}
    assert source["classes"].keys() == {"ham", "spam"}
    assert source["classes"]["spam"].keys() == {"precision", "recall", "f1", "support"}
    assert source["classes"]["spam"]["support"] == 40
    out = run("eval", "--ckpt", checkpoint, *flags, *CPU, "--split", "all").ok().out
    ham = source["classes"]["ham"]
    for value in (result["loss"], result["bits_per_byte"], source["accuracy"], ham["f1"]):
        assert f"{value:.4f}" in out
    assert "ham" in out and "spam" in out


def test_free_text_gets_no_classes(checkpoint, texts, tmp_path):
    result = evaluate(checkpoint, texts[0], tmp_path, "--split", "all")
    for name, source in result["sources"].items():
        assert ("classes" in source) is (name == "sms")


# --- several processes ---


def test_two_processes_give_the_same_figures(checkpoint, texts, tmp_path):
    wanted = evaluate(checkpoint, texts[0], tmp_path, "--split", "all", "--batch_size", "4")
    path = tmp_path / "two.json"
    flags = ["--split", "all", "--batch_size", "4", "--json", path, "--device", "cpu"]
    results = run_together("eval", "--ckpt", checkpoint, *texts[0], *flags)
    assert sum(result.err.count("total") for result in results) == 1  # one process prints
    found = json.loads(path.read_text(encoding="utf-8"))
    assert_figures(found, {k: v for k, v in wanted.items() if k != "sources"})
    assert found["sources"].keys() == wanted["sources"].keys()
    for name, source in wanted["sources"].items():
        assert found["sources"][name].get("confusion") == source.get("confusion")
        assert found["sources"][name]["records"] == source["records"]
        assert found["sources"][name]["loss"] == pytest.approx(source["loss"], rel=1e-9)


# --- what training ends with ---


def test_training_ends_with_figures_and_samples(texts, tmp_path):
    """Where the part that is scored is the whole, the figures are those of `eval`."""
    flags = [*texts[0], *MODEL, "--val_fraction", "0.4", "--out_dir", tmp_path / "run"]
    many = ["--max_steps", 40, "--batch_size", 64]  # one batch at the end: all records of a source
    result = run("train", *flags, *many).ok()
    card = run("eval", "--ckpt", tmp_path / "run" / "best.pth", *texts[0], "--device", "cpu")
    rows = {line.split()[0]: line for line in card.ok().out.splitlines() if line}
    ending = result.err.split("\ndone: ")[1].splitlines()
    for name in ("plain.jsonl", "sms", "total"):
        assert rows[name] in ending, name
    assert sum("always predicting" in line for line in ending) == 1
    truths = [line.split(None, 1)[1] for line in ending if line.startswith("  truth")]
    responses = [" ".join(text.split()) for rows in texts[1].values() for _, text in rows]
    assert len(truths) == 3 == sum(line.startswith("  model") for line in ending)
    assert all(any(truth[:8] in text for text in responses) for truth in truths)


def test_the_end_of_training_is_short_and_safe_to_show(tmp_path):
    """Of many files it shows the total alone; what a model writes steers no terminal."""
    (tmp_path / "raw").mkdir()
    for number in range(40):
        text = f"{number}: \x1b[31mred\x07" * 9
        (tmp_path / "raw" / f"{number}.txt").write_text(text)
    flags = ["--data_dir", tmp_path / "raw", "--processed_dir", tmp_path / "p", *MODEL]
    few = ["--val_fraction", "0.5", "--max_steps", 2]
    result = run("train", *flags, *few, "--out_dir", tmp_path / "run").ok()
    ending = result.err.split("\ndone: ")[1]
    assert "\ntotal " in ending and ".txt" not in ending
    assert "\ufffd[31mred\ufffd" in ending
    shown = ending.replace("\n", "")
    assert not [c for c in shown if unicodedata.category(c) == "Cc"]


def test_training_without_validation_ends_without_figures(texts, tmp_path):
    flags = [*texts[0], *MODEL, "--val_fraction", "1e-9", "--out_dir", tmp_path / "run"]
    assert "gzip" not in run("train", *flags).ok().err


# --- the finetune report ---


@pytest.fixture
def tuning(tmp_path, corpus, tiny_checkpoint):
    """Flags of a short finetune, and the figures it leaves."""
    flags = ["finetune", *corpus, "--ckpt", tiny_checkpoint, "--out_dir", tmp_path / "run", *CPU,
             "--max_steps", 4, "--batch_size", 4, "--report_samples", 5]  # fmt: skip

    def report():
        return json.loads((tmp_path / "run" / "report_finetune.json").read_text("utf-8"))

    return flags, report


def test_a_resumed_finetune_keeps_its_first_report(tuning, monkeypatch):
    flags, report = tuning
    made, original = [], lp.finetune_report

    def counted(*args):
        made.append(args)
        return original(*args)

    monkeypatch.setattr(lp, "finetune_report", counted)
    run(*flags, "--stop_after", 2).ok()
    before = report()["before"]
    assert len(made) == 1 and "after" not in report()
    result = run(*flags, "--resume").ok()
    assert len(made) == 2
    assert report()["before"] == before != report()["after"]
    assert "verdict" in result.err


def test_the_report_has_losses_and_answers(tuning, tiny_checkpoint):
    flags, report = tuning
    result = run(*flags, "--lr", 1e-9).ok()
    before, after = report()["before"], report()["after"]
    names = {"loss_all", "loss_response", "loss_base", "exact_match", "stops_by_itself", "answers"}
    assert before.keys() == after.keys() == names
    assert before["loss_all"] == pytest.approx(after["loss_all"], rel=1e-4), "a tiny step"
    assert len(after["answers"]) == 3
    for answer in after["answers"]:
        assert answer["prompt"].startswith("###")
        assert answer["wanted"] in result.err
    assert before["answers"] == after["answers"]


def test_what_a_base_forgot_is_told_on_its_own_data_alone(tuning, tmp_path, tiny_checkpoint):
    flags, report = tuning
    (tmp_path / "raw").mkdir()
    rows = [{"instruction": f"Say {i}.", "output": "yes"} for i in range(40)]
    (tmp_path / "raw" / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    base = tmp_path / "base"
    own = ["--data_dir", tmp_path / "raw", "--processed_dir", tmp_path / "processed"]
    run("train", *own, *MODEL, "--out_dir", base).ok()
    flags = [*flags, "--ckpt", base / "best.pth"]
    run(*flags).ok()
    assert "loss_base" in report()["before"]
    (tmp_path / "raw" / "a.json").write_text(json.dumps(rows[5:]), encoding="utf-8")
    run(*flags, "--overwrite").ok()
    assert "loss_base" not in report()["before"]


def test_the_verdict():
    config = lp.FinetuneConfig(ckpt="base.pth", loss_on="response")
    before = {"loss_response": 2.0, "exact_match": 0.5, "loss_base": 1.0}
    better = lp.finetune_verdict(config, before, {"loss_response": 1.5, "exact_match": 0.75})
    assert "better on held-out responses, by 0.5000" in better[-1]
    assert all(line.endswith("better") for line in better[1:3])
    after = {"loss_response": 2.25, "exact_match": 0.5, "loss_base": 1.25}
    worse = lp.finetune_verdict(config, before, after)
    assert "not better on held-out responses than base.pth" in worse[-2]
    assert "forgot" in worse[-1] and "0.2500" in worse[-1]
    config.objective = "dpo"
    assert "verdict" not in "".join(lp.finetune_verdict(config, before, after))


# --- the benchmark ---


def test_the_benchmark_prints_units_and_saves_plain_numbers(tmp_path):
    shape = ["--n_layer", 1, "--n_head", 2, "--n_embd", 32, "--block_size", 16, "--batch_size", 2]
    path = tmp_path / "bench.json"
    flags = [*CPU, *shape, "--rounds", 1, "--max_steps", 1000, "--json", path]
    out = run("bench", *flags, "--data_dir", tmp_path).ok().out
    found = json.loads(path.read_text(encoding="utf-8"))
    promised = {"params", "device", "dtype", "train_tokens_per_s", "step_ms", "matmul_peak_flops",
                "mfu", "peak_memory_bytes", "decode_tokens_per_s", "decode_limit_tokens_per_s",
                "whole_run_tokens", "whole_run_seconds"}  # fmt: skip
    assert found.keys() >= promised
    assert all(isinstance(found[name], int | float) for name in promised - {"device", "dtype"})
    assert found["whole_run_tokens"] == 1000 * 2 * 16
    for unit in (" tok/s", "FLOP/s", " GiB", "%", " ms", "32 k tokens"):
        assert unit in out, unit
    table = dict(line.rsplit("  ", 1) for line in out.splitlines())
    assert len(table) == len(out.splitlines()) >= len(promised)


@pytest.mark.parametrize(
    ("value", "unit", "wanted"),
    [
        (20734, " tok/s", "20.7 k tok/s"),
        (412.4, " tok/s", "412 tok/s"),
        (999.6, "", "1 k"),
        (1.18e12, "FLOP/s", "1.18 TFLOP/s"),
        (0, " tokens", "0 tokens"),
        (3e21, "FLOP/s", "3e+06 PFLOP/s"),
    ],
)
def test_numbers_with_prefixes(value, unit, wanted):
    assert lp.with_prefix(value, unit) == wanted
