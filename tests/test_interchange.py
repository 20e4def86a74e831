"""Section 9, `export`, LoRA and DPO: against transformers, tokenizers and peft."""

import csv
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, Child, differences, finish, needs, run, start, tensors, wait_for

import llm_pipeline as lp

transformers = needs("transformers")
safetensors = needs("safetensors.torch")

SMALL = ["--n_layer", 2, "--n_head", 4, "--n_embd", 32, "--block_size", 64]
SMALL += [*CPU, "--batch_size", 4, "--max_steps", 2]
TUNE = [*CPU, "--batch_size", 4, "--max_steps", 3, "--lr", 1e-2, "--report_samples", 0]
LORA = ["--method", "lora", "--lora_r", 3, "--lora_alpha", 7]
ARCHS = {"gpt2": ["--arch", "gpt2"], "modern": ["--arch", "modern", "--n_kv_head", 2]}
GPT2 = dict(vocab_size=260, n_positions=64, n_embd=32, n_layer=2, n_head=4)
QWEN3 = dict(
    vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
    tie_word_embeddings=True,
)  # fmt: skip
SLIDING = dict(use_sliding_window=True, sliding_window=5, layer_types=["sliding_attention"] * 2)
PEERS = {
    "gpt2": ("gpt2", {}),
    "gpt2, untied": ("gpt2", dict(tie_word_embeddings=False)),
    "gpt2, exact gelu, narrow": ("gpt2", dict(activation_function="gelu", n_inner=40)),
    "gpt2, relu, one head": ("gpt2", dict(activation_function="relu", n_head=1)),
    "qwen3": ("qwen3", {}),
    "qwen3, untied": ("qwen3", dict(tie_word_embeddings=False)),
    "qwen3, grouped": ("qwen3", dict(num_key_value_heads=2)),
    "qwen3, one key head, wide": ("qwen3", dict(num_key_value_heads=1, head_dim=20)),
    "qwen3, width no multiple of its heads": ("qwen3", dict(hidden_size=36, num_attention_heads=8)),
    "qwen3, theta": ("qwen3", dict(rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen3, sliding": ("qwen3", SLIDING),
    "qwen3, more ids than its tokenizer": ("qwen3", dict(vocab_size=300)),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory, corpus):
    """A checkpoint of each architecture, and its export."""
    found = {}
    for arch, flags in ARCHS.items():
        folder = tmp_path_factory.mktemp(arch)
        run("train", *corpus, *SMALL, *flags, "--init_std", 0.1, "--out_dir", folder).ok()
        found[arch] = folder / "best.pth"
        export(found[arch], folder / "hf")
    return found


def export(ckpt, folder, *flags):
    assert run("export", "--ckpt", ckpt, "--out_dir", folder, *flags).ok().out == f"{folder}\n"
    return folder


def save_peer(name, folder, tokenizer_from, **save):
    """A random model of transformers' own class, saved by it, beside our byte tokenizer."""
    kind, shape = PEERS[name]
    torch.manual_seed(4)
    if kind == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2 | shape))
    else:
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**QWEN3 | shape))
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too
            parameter.normal_(float(parameter.ndim == 1), 0.2)
    model.eval().save_pretrained(folder, **save)
    for file in tokenizer_from.glob("tokenizer*"):
        shutil.copy(file, folder)
    return model


def load_peer(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def stored(folder):
    """Every tensor of a folder's safetensors files."""
    found = {}
    for file in Path(folder).glob("*.safetensors"):
        found |= safetensors.load_file(file)
    return found


def some_ids(length=64, rows=3, vocab=256):
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(2))


def logits(model, ids):
    with torch.no_grad():
        out = model.eval()(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


def assert_same_logits(one, two, ids=None):
    ids = some_ids() if ids is None else ids
    torch.testing.assert_close(logits(one, ids), logits(two, ids), rtol=0, atol=1e-4)


def entry_names(folder):
    return sorted(p.name for p in folder.iterdir())


# --- weights ---


@pytest.mark.parametrize("name", PEERS)
def test_round_trip_is_bit_for_bit(name, bases, tmp_path):
    peer = save_peer(name, tmp_path / "theirs", bases["gpt2"].parent / "hf")
    ours = lp.load_model(str(tmp_path / "theirs"))
    assert_same_logits(ours.model, peer)
    export(tmp_path / "theirs", tmp_path / "back")
    before, after = stored(tmp_path / "theirs"), stored(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key
    assert_same_logits(load_peer(tmp_path / "back"), peer)
    assert isinstance(ours.tokenizer, lp.ByteTokenizer)


@pytest.mark.parametrize("arch", ARCHS)
def test_greedy_generation_survives_the_crossing(arch, bases):
    loaded, peer = lp.load_model(str(bases[arch])), load_peer(bases[arch].parent / "hf")
    prompt = some_ids(8, 1)[0]
    steps = lp.generate(loaded.model.eval(), prompt, 56, temperature=0.0)
    theirs = peer.generate(
        prompt[None], max_new_tokens=56, do_sample=False, eos_token_id=None, pad_token_id=256
    )
    assert [ids[0] for ids in steps] == theirs[0, 8:].tolist()


@pytest.mark.parametrize("name", ["gpt2, untied", "qwen3, grouped"])
def test_several_files_and_other_dtypes(name, bases, tmp_path):
    tokenizer = bases["gpt2"].parent / "hf"
    peer = save_peer(name, tmp_path / "shards", tokenizer, max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert_same_logits(lp.load_model(str(tmp_path / "shards")).model, peer)
    peer.to(torch.bfloat16).save_pretrained(tmp_path / "low")
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "low")
    assert_same_logits(lp.load_model(str(tmp_path / "low")).model, load_peer(tmp_path / "low"))


def test_a_base_model_without_its_head(bases, tmp_path):
    """As OpenAI's own GPT-2 is stored: no prefix, and the causal mask as a buffer."""
    peer = save_peer("gpt2", tmp_path, bases["gpt2"].parent / "hf")
    plain = {k.removeprefix("transformer."): v for k, v in stored(tmp_path).items()}
    plain |= {f"h.{i}.attn.bias": torch.ones(64, 64).tril()[None, None] for i in (0, 1)}
    safetensors.save_file(plain, tmp_path / "model.safetensors", {"format": "pt"})
    assert_same_logits(lp.load_model(str(tmp_path)).model, peer)


@pytest.mark.parametrize(
    "changes",
    [
        dict(rope_parameters="absent", rope_theta=1e6),
        dict(rope_parameters="absent", rope_theta=1e6, rope_scaling=None),
        dict(layer_types="absent", use_sliding_window=False, sliding_window=4),
        dict(layer_types="absent", use_sliding_window=True, sliding_window=4, max_window_layers=0),
        dict(layer_types="absent", use_sliding_window=True, sliding_window=4, max_window_layers=2),
        dict(head_dim="absent", num_attention_heads=4, hidden_size=32),
    ],
    ids=str,
)
def test_settings_in_their_older_spelling(changes, bases, tmp_path):
    shape = "qwen3, one key head, wide" if "head_dim" in changes else "qwen3"
    save_peer(shape, tmp_path, bases["gpt2"].parent / "hf")
    edit_json(**changes)(tmp_path)
    if "head_dim" in changes:  # transformers' default is 128
        peer = transformers.Qwen3ForCausalLM(transformers.AutoConfig.from_pretrained(tmp_path))
        peer.save_pretrained(tmp_path)
        edit_json(**changes)(tmp_path)
    assert_same_logits(lp.load_model(str(tmp_path)).model, load_peer(tmp_path))


@pytest.mark.parametrize("name", ["gpt2", "qwen3, grouped"])
def test_train_and_finetune_begin_with_their_weights(name, bases, corpus, tmp_path):
    peer = save_peer(name, tmp_path / "hf", bases["gpt2"].parent / "hf")
    still = [*CPU, "--max_steps", 1, "--batch_size", 4, "--lr", 1e-30, "--weight_decay", 0]
    run("train", *corpus, *still, "--init_from", tmp_path / "hf", "--out_dir", tmp_path / "a").ok()
    tune = ["--ckpt", tmp_path / "hf", "--out_dir", tmp_path / "b", "--report_samples", 0]
    run("finetune", *corpus, *still, *tune).ok()
    for best in ("a/best.pth", "b/best_finetune.pth"):
        assert_same_logits(lp.load_model(str(tmp_path / best)).model, peer)


def test_a_shorter_block_is_cut_and_a_longer_one_refused(bases, corpus, tmp_path):
    save_peer("gpt2", tmp_path / "hf", bases["gpt2"].parent / "hf")
    tune = ["finetune", *corpus, *TUNE, "--ckpt", tmp_path / "hf", "--out_dir", tmp_path / "run"]
    run(*tune, "--block_size", 128).fails(1, "--block_size 128", "64")
    run(*tune, "--block_size", 32).ok()
    assert lp.load_model(str(tmp_path / "run" / "best_finetune.pth")).model.config.block_size == 32


# --- tokenizers ---


def random_texts(n, seed=0):
    draw = random.Random(seed)
    pools = [range(32, 127), range(0x20), range(0x80, 0x800), range(0x800, 0xD800),
             range(0xE000, 0x10000), range(0x10000, 0x110000)]  # fmt: skip
    for _ in range(n):
        yield "".join(chr(draw.choice(draw.choice(pools))) for _ in range(draw.randrange(20)))


def test_exported_byte_tokenizer_is_ours(bases):
    theirs = transformers.AutoTokenizer.from_pretrained(bases["gpt2"].parent / "hf")
    ours = lp.ByteTokenizer()
    texts = [*random_texts(10_000), " leading", "trailing ", "a  b . , n't", "e\u0301", ""]
    found = theirs(texts, add_special_tokens=False)["input_ids"]
    for text, ids in zip(texts, found, strict=True):
        assert ids == ours.encode(text).tolist(), repr(text)
    assert theirs.batch_decode(found) == texts
    assert len(theirs) == 260
    names = ("pad", "bos", "eos", "sep")
    assert [getattr(theirs, f"{n}_token_id") for n in names] == [256, 257, 258, 259]


def test_exported_bpe_tokenizer_is_ours(corpus, tmp_path):
    bpe = ["--tokenizer", "bpe", "--vocab_size", 320, "--out_dir", tmp_path / "run"]
    run("train", *corpus, *SMALL, *bpe).ok()
    folder = export(tmp_path / "run" / "best.pth", tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = lp.load_model(str(tmp_path / "run" / "best.pth")).tokenizer
    back = lp.load_model(str(folder)).tokenizer
    for text in [*random_texts(500), "Repeat 3. sun moon tree ### Output: sunsun"]:
        ids = ours.encode(text).tolist()
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert back.encode(text).tolist() == ids
        assert theirs.decode(ids) == ours.decode(ids) == text
    for name in ("pad_id", "bos_id", "eos_id", "sep_id"):
        wanted = getattr(ours, name)
        assert getattr(theirs, f"{name[:3]}_token_id") == wanted == getattr(back, name)


# --- what else stands in an exported folder ---


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, bases, corpus):
    """A fully tuned checkpoint."""
    folder = tmp_path_factory.mktemp("tuned")
    run("finetune", *corpus, *TUNE, "--ckpt", bases["gpt2"], "--out_dir", folder).ok()
    return folder / "best_finetune.pth"


def said(role, content, **more):
    return {"role": role, "content": content, **more}


# name: (messages, the same as (instruction, input, system, answer) turn by turn)
CHATS = {
    "one answer": ([said("user", "Name a colour."), said("assistant", "red")],
                   [("Name a colour.", "", "", "red")]),
    "input": ([said("user", "Translate.", input="sun\nmoon"), said("assistant", "Sonne")],
              [("Translate.", "sun\nmoon", "", "Sonne")]),
    "system": ([said("system", "Be short."), said("user", "Why?"), said("assistant", "So.")],
               [("Why?", "", "Be short.", "So.")]),
    "turns": ([said("system", "Be."), said("user", "a", input="b"), said("assistant", "c"),
               said("user", " d "), said("assistant", "e\n\n f"), said("user", "g")],
              [("a", "b", "Be.", "c"), (" d ", "", "", "e\n\n f"), ("g", "", "", None)]),
    "parts": ([said("user", [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}])],
              [("a b", "", "", None)]),
    "an answer as llama.cpp's server gives it": (
        [said("user", "a"), said("assistant", " b\n"), said("user", "c")],
        [("a", "", "", "b"), ("c", "", "", None)]),
    "code and foreign text": (
        [said("user", "{{ x }} {% if %} Größe 你好"), said("assistant", "'\\n' \"q\"")],
        [("{{ x }} {% if %} Größe 你好", "", "", "'\\n' \"q\"")]),
    "empty": ([said("user", ""), said("assistant", "")], [("", "", "", "")]),
}  # fmt: skip


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def talker(request, tuned, corpus, tmp_path_factory):
    """(our tokenizer, theirs) of a tuned model's export."""
    folder, ckpt = tmp_path_factory.mktemp(request.param), tuned
    if request.param == "bpe":
        bpe = ["--tokenizer", "bpe", "--vocab_size", 320, "--out_dir", folder]
        run("train", *corpus, *SMALL, *bpe).ok()
        base = ["--ckpt", folder / "best.pth", "--out_dir", folder]
        run("finetune", *corpus, *TUNE, *base).ok()
        ckpt = folder / "best_finetune.pth"
    export(ckpt, folder / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    return lp.load_model(str(ckpt)).tokenizer, theirs, folder / "hf"


def as_trained(ours, turns):
    """The ids of a record: bos, then each turn's prompt, response, separator."""
    ids = [ours.bos_id]
    for instruction, input, system, answer in turns:
        ids += ours.encode(lp.instruction_prompt(instruction, input, system)).tolist()
        if answer is not None:
            ids += [*ours.encode(lp.instruction_response(answer)).tolist(), ours.sep_id]
    return ids


@pytest.mark.parametrize("shape", CHATS)
def test_chat_template_renders_what_was_trained(shape, talker):
    ours, theirs, _ = talker
    messages, turns = CHATS[shape]
    for settings in ({}, {"add_generation_prompt": True}):
        found = theirs.apply_chat_template(messages, return_dict=False, **settings)
        assert found == as_trained(ours, turns), theirs.decode(found)


def test_special_tokens_in_a_message(talker):
    """Characters in ours; transformers finds them in the rendered text, and the card says so."""
    ours, theirs, folder = talker
    found = theirs.apply_chat_template([said("user", "a<|sep|>b")], return_dict=False)
    wanted = as_trained(ours, [("a<|sep|>b", "", "", None)])
    assert theirs.sep_token_id in found and ours.sep_id not in wanted
    assert theirs.decode(found) == theirs.decode(wanted)
    assert "`<|sep|>`, stay characters" in (folder / "README.md").read_text(encoding="utf-8")


def test_unknown_roles_are_refused_by_the_template(talker, bases):
    with pytest.raises(Exception, match="roles are"):
        talker[1].apply_chat_template([said("tool", "x")])
    plain = transformers.AutoTokenizer.from_pretrained(bases["gpt2"].parent / "hf")
    assert plain.chat_template is None


def test_chat_template_gives_the_ids_of_the_store(tuned, corpus, tmp_path):
    """The records of the corpus itself, as `prepare` stores them."""
    theirs = transformers.AutoTokenizer.from_pretrained(export(tuned, tmp_path / "hf"))
    run("prepare", *corpus, "--out_dir", tmp_path / "store").ok()
    store = np.concatenate(
        [np.fromfile(tmp_path / "store" / f"{split}.bin", np.uint16) for split in ("train", "val")]
    )
    records = [part.tolist() for part in np.split(store, np.flatnonzero(store == 257)[1:])]
    rows = (Path(corpus[1]) / "words.jsonl").read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, rows):
        asked = said("user", row["instruction"], input=row["input"])
        chat = [asked, said("assistant", row["output"])]
        assert theirs.apply_chat_template(chat, return_dict=False) in records


def test_chat_template_gives_the_ids_of_stored_conversations(tuned, tmp_path):
    theirs = transformers.AutoTokenizer.from_pretrained(export(tuned, tmp_path / "hf"))
    ask, answer = (lambda n: said("user", f"Count {n}.")), (lambda n: said("assistant", f"{n} ü"))
    chats = [[ask(1), answer(1)], [ask(2), answer(2), ask(3), answer(3), ask(4), answer(4)],
             [said("system", "Be short."), ask(5), answer(5), ask(6), answer(6)]]  # fmt: skip
    (tmp_path / "raw").mkdir()
    lines = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
    (tmp_path / "raw" / "chats.jsonl").write_text(lines, encoding="utf-8")
    run("prepare", "--data_dir", tmp_path / "raw", "--out_dir", tmp_path / "store").ok()
    store = np.concatenate(
        [np.fromfile(tmp_path / "store" / f"{split}.bin", np.uint16) for split in ("train", "val")]
    )
    records = sorted(part.tolist() for part in np.split(store, np.flatnonzero(store == 257)[1:]))
    assert records == sorted(theirs.apply_chat_template(c, return_dict=False) for c in chats)


@pytest.mark.parametrize("arch", ARCHS)
def test_pipeline_answers(arch, bases):
    folder = bases[arch].parent / "hf"
    pipe = transformers.pipeline("text-generation", model=str(folder), device="cpu")
    [answer] = pipe("sun moon", max_new_tokens=5, do_sample=False)
    assert answer["generated_text"].startswith("sun moon")
    config = transformers.GenerationConfig.from_pretrained(folder)
    assert config.bos_token_id == 257 and set(config.eos_token_id) == {258, 259}


def test_pipeline_answers_chats(tuned, tmp_path):
    folder = export(tuned, tmp_path / "hf")
    pipe = transformers.pipeline("text-generation", model=str(folder), device="cpu")
    chat = [{"role": "user", "content": "Repeat 3."}]
    [answer] = pipe(chat, max_new_tokens=5, do_sample=False)
    assert [m["role"] for m in answer["generated_text"]] == ["user", "assistant"]


def test_model_card_names_settings_and_figures(bases):
    card = (bases["gpt2"].parent / "hf" / "README.md").read_text(encoding="utf-8")
    shape = json.loads((bases["gpt2"].parent / "hf" / "config.json").read_text(encoding="utf-8"))
    assert shape["n_ctx"] == shape["n_positions"] == 64
    assert card.startswith("---\n") and "library_name: transformers" in card
    state = lp.load_checkpoint(bases["gpt2"])
    assert f"{state['progress']['best']:.4f}" in card
    assert "batch_size | 4" in card


def test_exported_tokenizer_puts_bos_before_a_text(bases, corpus, tmp_path):
    bpe = ["--tokenizer", "bpe", "--vocab_size", 320, "--out_dir", tmp_path / "run"]
    run("train", *corpus, *SMALL, *bpe).ok()
    for folder in (bases["gpt2"].parent / "hf", export(tmp_path / "run/best.pth", tmp_path / "hf")):
        theirs, ours = (
            transformers.AutoTokenizer.from_pretrained(folder),
            lp.load_model(str(folder)),
        )
        for text in ("sun moon", ""):
            wanted = ours.tokenizer.encode(text).tolist()
            assert theirs(text)["input_ids"] == [theirs.bos_token_id, *wanted]
            assert theirs(text, add_special_tokens=False)["input_ids"] == wanted


def test_a_tuned_folder_counts_as_tuned(bases, tuned, tmp_path):
    folder = export(tuned, tmp_path / "hf")
    flags = ["--prompt", "Repeat 3.", "--temperature", 0, "--max_new_tokens", 12, *CPU]
    wanted = run("sample", "--ckpt", tuned, *flags).ok().out
    assert run("sample", "--ckpt", folder, *flags).ok().out == wanted
    assert run("sample", "--ckpt", folder, *flags, "--template", "raw").ok().out != wanted
    assert lp.load_model(str(folder)).is_tuned
    assert not lp.load_model(str(bases["gpt2"].parent / "hf")).is_tuned


def test_a_run_folder_is_told_from_a_model(bases):
    result = run("sample", "--ckpt", bases["gpt2"].parent, "--prompt", "x")
    assert len(result.fails(1, "best.pth").errors) == 1
    assert "model_type" not in result.err


# --- refusals ---


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--pos", "alibi"], "pos=alibi"),
        (["--norm", "rmsnorm"], "norm=rmsnorm"),
        (["--mlp", "swiglu"], "mlp=swiglu"),
        (["--n_kv_head", 2], "n_kv_head=2"),
        (["--attn_window", 8], "attn_window=8"),
        (["--qk_norm"], "qk_norm=True"),
        (["--no_bias"], "bias=False"),
        (["--arch", "modern", "--mlp", "gelu"], "mlp=gelu"),
        (["--arch", "modern", "--no_qk_norm"], "qk_norm=False"),
        (["--arch", "modern", "--pos", "learned"], "norm=rmsnorm"),
    ],
)
def test_what_no_class_holds_is_refused_by_name(flags, name, corpus, tmp_path):
    run("train", *corpus, *SMALL, "--out_dir", tmp_path / "run", *flags).ok()
    result = run("export", "--ckpt", tmp_path / "run" / "best.pth", "--out_dir", tmp_path / "hf")
    result.fails(1, name)
    assert len(result.errors) == 1 and entry_names(tmp_path) == ["run"]


def edit_json(**changes):
    def edit(folder):
        path = folder / "config.json"
        settings = json.loads(path.read_text(encoding="utf-8")) | changes
        kept = {k: v for k, v in settings.items() if v != "absent"}
        path.write_text(json.dumps(kept), encoding="utf-8")

    return edit


def edit_tensors(change):
    def edit(folder):
        found = stored(folder)
        change(found)
        safetensors.save_file(found, folder / "model.safetensors", {"format": "pt"})

    return edit


def only_pickle(folder):
    torch.save(stored(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


BROKEN = {
    "missing tensor": (
        edit_tensors(lambda t: t.pop("transformer.h.1.mlp.c_fc.weight")),
        "transformer.h.1.mlp.c_fc.weight",
    ),
    "unknown tensor": (edit_tensors(lambda t: t.update(extra=torch.zeros(2))), "extra"),
    "wrong shape": (
        edit_tensors(lambda t: t.update({"transformer.ln_f.weight": torch.ones(31)})),
        "_f.weight",
    ),
    "wrong rank": (
        edit_tensors(lambda t: t.update({"transformer.wte.weight": torch.ones(260)})),
        "shape (260,)",
    ),
    "not a number": (
        edit_tensors(lambda t: t["transformer.wte.weight"].fill_(math.nan)),
        "transformer.wte.weight",
    ),
    "quantised": (
        edit_tensors(lambda t: t.update({n: t[n].to(torch.float8_e4m3fn) for n in [*t][:4]})),
        "float8",
    ),
    "whole numbers": (
        edit_tensors(lambda t: t.update({n: t[n].to(torch.int8) for n in [*t][:1]})),
        "int8",
    ),
    "pickle": (only_pickle, "pytorch_model.bin"),
    "truncated": (truncate, ""),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
    "unknown architecture": (edit_json(model_type="llama"), "llama"),
    "no architecture": (edit_json(model_type="absent"), "model_type"),
    "unknown activation": (edit_json(activation_function="mish"), "mish"),
    "missing setting": (edit_json(n_embd="absent"), "n_embd"),
    "setting of a wrong type": (edit_json(n_head="many"), "n_head"),
    "impossible setting": (edit_json(n_head=5), "n_head"),
    "attention scaled otherwise": (
        edit_json(scale_attn_by_inverse_layer_idx=True),
        "scale_attn_by_inverse_layer_idx",
    ),
    "attention not scaled": (edit_json(scale_attn_weights=False), "scale_attn_weights"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "broken tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        "tokenizer.json",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_folders_are_refused_in_one_line(what, bases, corpus, tmp_path):
    spoil, word = BROKEN[what]
    save_peer("gpt2", tmp_path / "hf", bases["gpt2"].parent / "hf")
    spoil(tmp_path / "hf")
    for command in (
        ["finetune", "--ckpt", tmp_path / "hf", *corpus, *TUNE, "--out_dir", tmp_path / "run"],
        ["train", "--init_from", tmp_path / "hf", *corpus, *CPU, "--out_dir", tmp_path / "run"],
        ["export", "--ckpt", tmp_path / "hf", "--out_dir", tmp_path / "back"],
    ):
        result = run(*command).fails(1, word, str(tmp_path / "hf"))
        assert len(result.errors) == 1
        left = {p.name for p in tmp_path.rglob("*") if (tmp_path / "hf") not in (p, *p.parents)}
        assert left <= {"run", ".lock"}, "something was left behind"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (dict(attention_bias=True), "attention"),
        (dict(rope_parameters=dict(rope_type="yarn", factor=4.0, rope_theta=1e4)), "rope"),
        (dict(rope_parameters="absent", rope_scaling=dict(type="linear", factor=2.0)), "rope"),
        (dict(layer_types=["sliding_attention", "full_attention"]), "sliding"),
        (dict(hidden_act="relu"), "hidden_act"),
    ],
    ids=str,
)
def test_qwen3_variants_that_we_lack_are_refused(changes, word, bases, tmp_path):
    save_peer("qwen3", tmp_path / "hf", bases["gpt2"].parent / "hf")
    edit_json(**changes)(tmp_path / "hf")
    result = run("export", "--ckpt", tmp_path / "hf", "--out_dir", tmp_path / "back")
    assert len(result.fails(1, word).errors) == 1


def test_parts_of_a_fused_matrix_are_checked_one_by_one(bases, tmp_path):
    """Query and key exchanged: their rows add up, and still each is wrong."""
    save_peer("qwen3, grouped", tmp_path / "hf", bases["gpt2"].parent / "hf")
    found = stored(tmp_path / "hf")
    q, k = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "qk")
    found[q], found[k] = found[k], found[q]
    safetensors.save_file(found, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    result = run("export", "--ckpt", tmp_path / "hf", "--out_dir", tmp_path / "back")
    assert len(result.fails(1, "q_proj").errors) == 1


def test_export_replaces_only_exports_and_only_when_told(bases, tmp_path):
    """Not a folder of other files, not a run's; files of others in an export's folder stay."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.txt").write_text("keep me")
    command = ["export", "--ckpt", bases["gpt2"], "--out_dir"]
    run(*command, tmp_path / "mine").fails(1, "--overwrite")
    for folder in (tmp_path / "mine", bases["modern"].parent):
        before = entry_names(folder)
        run(*command, folder, "--overwrite").fails(1, "not an export", str(folder))
        assert entry_names(folder) == before
    export(bases["modern"], tmp_path / "hf")
    (tmp_path / "hf" / "notes").mkdir()
    (tmp_path / "hf" / "notes" / "mine.txt").write_text("keep me")
    run(*command, tmp_path / "hf").fails(1, "--overwrite")
    run(*command, tmp_path / "hf", "--overwrite").ok()
    assert entry_names(tmp_path) == ["hf", "mine"]
    assert (tmp_path / "hf" / "notes" / "mine.txt").read_text() == "keep me"
    assert load_peer(tmp_path / "hf").config.model_type == "gpt2"


def test_a_folder_with_other_weights_is_not_replaced(bases, tmp_path):
    """An export that transformers saved again, in parts: its parts would be loaded beside ours."""
    folder = export(bases["gpt2"], tmp_path / "hf")
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    again = ["export", "--ckpt", bases["gpt2"], "--out_dir", folder, "--overwrite"]
    run(*again).fails(1, "not an export")


def stopped_between_the_renames():
    rename = Path.rename

    def stop_after_first(self, target):
        rename(self, target)
        if target.name == "old":
            raise KeyboardInterrupt

    Path.rename = stop_after_first


def test_stopped_while_it_replaces(bases, tmp_path):
    export(bases["modern"], tmp_path / "hf")
    argv = ["export", "--ckpt", bases["gpt2"], "--out_dir", tmp_path / "hf", "--overwrite"]
    assert Child(*argv, hook=stopped_between_the_renames).finish().code == 130
    assert entry_names(tmp_path) == ["hf"]
    assert load_peer(tmp_path / "hf").config.model_type == "qwen3"


def test_an_interrupted_export_leaves_nothing(bases, tmp_path):
    process = start("export", "--ckpt", bases["gpt2"], "--out_dir", tmp_path / "hf")
    wait_for(lambda: (tmp_path / ".export.hf" / "new").exists(), within=60)
    process.send_signal(signal.SIGINT)
    assert finish(process).code == 130
    assert not entry_names(tmp_path)


def small_files_only():
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


@pytest.mark.parametrize("flags", [["--out_dir", "hf"], ["--gguf", "m.gguf"]], ids=str)
def test_a_full_disk_leaves_nothing(flags, bases, tmp_path):
    if "--gguf" in flags:
        needs("gguf")
    flags = [flags[0], tmp_path / flags[1]]
    result = Child("export", "--ckpt", bases["gpt2"], *flags, hook=small_files_only).finish()
    assert len(result.fails(1, "cannot write").errors) == 1
    assert not entry_names(tmp_path)


def killed_between_the_renames():
    rename = Path.rename

    def stop_after_first(self, target):
        rename(self, target)
        os._exit(9)

    Path.rename = stop_after_first


def test_killed_while_it_replaces(bases, tmp_path):
    """The next export finds the old one where the kill left it, and the files of others."""
    export(bases["modern"], tmp_path / "hf")
    (tmp_path / "hf" / "mine.txt").write_text("keep me")
    argv = ["export", "--ckpt", bases["gpt2"], "--out_dir", tmp_path / "hf", "--overwrite"]
    assert Child(*argv, hook=killed_between_the_renames).finish().code == 9
    assert entry_names(tmp_path) == [".export.hf"]
    run("sample", "--ckpt", tmp_path / "hf", "--prompt", "x").fails(1, ".export.hf/old")
    export(bases["gpt2"], tmp_path / "other")  # sweeps
    assert entry_names(tmp_path) == ["hf", "other"]
    assert load_peer(tmp_path / "hf").config.model_type == "qwen3"
    assert (tmp_path / "hf" / "mine.txt").read_text() == "keep me"


def test_a_link_stays_one(bases, tmp_path):
    """The folder that it leads to is replaced, as often as one likes."""
    (tmp_path / "hf").symlink_to("there")
    for _ in range(2):
        run("export", "--ckpt", bases["gpt2"], "--out_dir", tmp_path / "hf", "--overwrite").ok()
    assert entry_names(tmp_path) == ["hf", "there"]
    assert (tmp_path / "hf").is_symlink() and load_peer(tmp_path / "there")


# --- LoRA ---


@pytest.fixture(scope="module", params=list(ARCHS))
def lora(request, tmp_path_factory, bases, corpus):
    """(base, tuned with adapters)."""
    folder, base = tmp_path_factory.mktemp("lora"), bases[request.param]
    result = run("finetune", *corpus, *TUNE, *LORA, "--ckpt", base, "--out_dir", folder).ok()
    assert result.out.strip() == str(folder / "best_finetune.pth")
    return base, folder / "best_finetune.pth", result.err


def test_lora_trains_its_adapters_alone(lora):
    needs("peft")
    base, tuned, log = lora
    before, after = tensors(base, ("weights",)), tensors(tuned, ("weights",))
    plain = {name.replace(".base_layer", ""): t for name, t in after.items() if "lora_" not in name}
    assert before.keys() == plain.keys()
    assert all(torch.equal(before[name], plain[name]) for name in before)
    adapters = {name: t for name, t in after.items() if "lora_" in name}
    assert len(adapters) == 2 * 4 * 2  # A and B, four matrices, two layers
    assert all(t.abs().max() > 0 for t in adapters.values())
    count = sum(t.numel() for t in adapters.values())
    assert f"{count:,}" in log
    state = lp.load_checkpoint(tuned)
    moments = [t for name, t in tensors(tuned, ("optimizer",)).items() if "exp_avg_sq" in name]
    assert sum(t.numel() for t in moments) == count
    assert state["lora"]["r"] == 3


def test_lora_merged_equals_unmerged(lora):
    base, tuned, _ = lora
    merged = lp.load_model(str(tuned)).model
    adapted = lp.load_model(str(tuned), merge=False).model
    assert_same_logits(merged, adapted)
    moved = (logits(merged, some_ids()) - logits(lp.load_model(str(base)).model, some_ids())).abs()
    assert moved.max() > 1e-2
    assert merged.state_dict().keys() == lp.load_model(str(base)).model.state_dict().keys()


def test_lora_in_bf16_leaves_the_base_as_it_was(bases, corpus, tmp_path):
    flags = [*corpus, *TUNE, *LORA, "--dtype", "bfloat16", "--ckpt", bases["gpt2"]]
    run("finetune", *flags, "--out_dir", tmp_path).ok()
    tuned = str(tmp_path / "best_finetune.pth")
    merged, adapted = (lp.load_model(tuned, merge=merge).model for merge in (True, False))
    base = lp.load_model(str(bases["gpt2"])).model
    assert torch.equal(adapted.tok_emb.weight, base.tok_emb.weight)
    assert_same_logits(merged, adapted)


def test_lora_checkpoint_is_self_contained(lora, corpus, tmp_path):
    _, tuned, _ = lora
    moved = shutil.copy(tuned, tmp_path / "alone.pth")
    wanted = run("eval", "--ckpt", tuned, *corpus, *CPU).ok().out
    assert run("eval", "--ckpt", moved, *corpus, *CPU).ok().out == wanted
    ids = some_ids(5, 1)[0]
    model = lp.load_model(str(moved)).model.eval()
    assert len(list(lp.generate(model, ids, 5))) == 5


def test_lora_exports_merged(lora, tmp_path):
    _, tuned, _ = lora
    peer = load_peer(export(tuned, tmp_path / "hf"))
    assert_same_logits(lp.load_model(str(tuned), merge=False).model, peer)


def test_peft_loads_the_adapter_on_the_exported_base(lora, tmp_path):
    peft = needs("peft")
    base, tuned, _ = lora
    root = export(tuned, tmp_path / "base", "--no_merge")
    assert all(torch.equal(t, stored(base.parent / "hf")[name]) for name, t in stored(root).items())
    adapter = export(tuned, tmp_path / "adapter", "--adapter")
    model = peft.PeftModel.from_pretrained(load_peer(root), adapter)
    assert_same_logits(lp.load_model(str(tuned)).model, model)
    assert_same_logits(lp.load_model(str(tuned)).model, model.merge_and_unload())


def test_auto_peft_finds_the_base(lora, tmp_path):
    """Named by --base_model, or because the adapter was tuned upon that folder."""
    peft = needs("peft")
    base, tuned, _ = lora
    root = base.parent / "hf"
    adapter = export(tuned, tmp_path / "adapter", "--adapter", "--base_model", root)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(adapter)
    assert_same_logits(lp.load_model(str(tuned)).model, model)
    other = ["--adapter", "--base_model", export(tuned, tmp_path / "merged"), "--overwrite"]
    result = run("export", "--ckpt", tuned, "--out_dir", adapter, *other)
    result.fails(1, "failed its check")


def test_an_adapter_tuned_upon_a_folder_names_it(bases, corpus, tmp_path):
    peft = needs("peft")
    flags = [*TUNE, *LORA, "--ckpt", bases["modern"].parent / "hf", "--out_dir", tmp_path / "run"]
    run("finetune", *corpus, *flags).ok()
    tuned = tmp_path / "run" / "best_finetune.pth"
    adapter = export(tuned, tmp_path / "adapter", "--adapter")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(adapter)
    assert_same_logits(lp.load_model(str(tuned)).model, model)


def test_adapter_of_few_targets(bases, corpus, tmp_path):
    peft = needs("peft")
    for arch, targets in (("gpt2", "proj"), ("gpt2", "up,down"), ("modern", "qkv")):
        work = tmp_path / f"{arch}-{targets}"
        flags = ["--lora_targets", targets, "--ckpt", bases[arch], "--out_dir", work]
        run("finetune", *corpus, *TUNE, *LORA, *flags).ok()
        tuned = work / "best_finetune.pth"
        adapter = export(tuned, work / "adapter", "--adapter")
        model = peft.PeftModel.from_pretrained(load_peer(bases[arch].parent / "hf"), adapter)
        assert_same_logits(lp.load_model(str(tuned)).model, model)


def test_lora_resumes_bit_for_bit(bases, corpus, tmp_path):
    flags = [*corpus, *TUNE, *LORA, "--lora_dropout", 0.3, "--ckpt", bases["gpt2"]]
    run("finetune", *flags, "--out_dir", tmp_path / "one").ok()
    run("finetune", *flags, "--out_dir", tmp_path / "two", "--stop_after", 2).ok()
    run("finetune", *flags, "--out_dir", tmp_path / "two", "--resume").ok()
    names = ("one", "two")
    assert not differences(*(tmp_path / name / "last_finetune.pth" for name in names))


def test_what_has_no_adapter_exports_none(bases, tmp_path):
    result = run("export", "--ckpt", bases["gpt2"], "--out_dir", tmp_path / "a", "--adapter")
    result.fails(1, "--adapter", "lora")
    assert not entry_names(tmp_path)


def test_unknown_target_is_refused(bases, corpus, tmp_path):
    flags = ["--ckpt", bases["gpt2"], "--out_dir", tmp_path, "--lora_targets", "qkv,heads"]
    result = run("finetune", *corpus, *TUNE, *LORA, *flags)
    assert (
        result.code in (1, 2) and "--lora_targets" in result.err and "Traceback" not in result.err
    )


# --- preferences ---


class Fixed(torch.nn.Module):
    """A model whose logits are given."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def losses(self, idx, targets, reduction="none"):
        losses = F.cross_entropy(
            self.logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100
        )
        return losses.view_as(targets)


def test_dpo_loss_is_the_closed_form():
    torch.manual_seed(0)
    pairs, width, beta = 3, 7, 0.3
    model = Fixed(torch.randn(2 * pairs, width, 11))
    y = torch.randint(0, 11, (2 * pairs, width))
    for row in range(2 * pairs):
        y[row, : row % 4] = lp.IGNORE
    reference = torch.randn(2 * pairs) * 5
    batch = lp.Batch(torch.zeros_like(y), y, reference)
    config = lp.FinetuneConfig(dpo_beta=beta)
    found, count, stats = lp.OBJECTIVES["dpo"](model.losses, batch, config)

    table = model.logits.detach().log_softmax(-1)
    said = [sum(table[row, t, y[row, t]].item() for t in range(width) if y[row, t] >= 0)
            for row in range(2 * pairs)]  # fmt: skip
    margins = [beta * ((said[i] - reference[i].item()) - (said[i + 1] - reference[i + 1].item()))
               for i in range(0, 2 * pairs, 2)]  # fmt: skip
    assert count == pairs
    assert found.item() == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins), rel=1e-5)
    assert float(stats["reward_margin"]) == pytest.approx(sum(margins), rel=1e-5)
    assert float(stats["reward_accuracy"]) == sum(m > 0 for m in margins)
    found.backward()
    slope = beta / (1 + math.exp(margins[0]))  # of the loss, by the first chosen answer's logits
    wanted = slope * (table[0].exp() - F.one_hot(y[0].clamp(min=0), 11)) * (y[0] >= 0)[:, None]
    torch.testing.assert_close(model.logits.grad[0], wanted)


def dpo_rows(folder, split):
    with open(folder / "metrics_finetune.csv", encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["split"] == split]


@pytest.mark.parametrize("method", [[], LORA], ids=["full", "lora"])
def test_dpo_raises_reward_accuracy(method, data, bases, tmp_path):
    entries = json.loads(next((data / "preference").glob("*.json")).read_text(encoding="utf-8"))
    short = [e for e in entries if len(e["chosen"] + e["rejected"]) < 80][:120]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "pairs.json").write_text(json.dumps(short), encoding="utf-8")
    flags = ["--data_dir", tmp_path / "raw", "--processed_dir", tmp_path / "processed", *CPU]
    flags += ["--objective", "dpo", "--batch_size", 8, "--max_steps", 30, "--lr", 1e-2]
    flags += ["--val_fraction", 0.2, "--eval_interval", 10, "--log_interval", 1, "--ckpt"]
    flags += [bases["modern"], "--out_dir", tmp_path / "run", "--report_samples", 0]
    flags += ["--dropout", 0]
    run("finetune", *flags, *method).ok()
    train, val = (dpo_rows(tmp_path / "run", split) for split in ("train", "val"))
    first = train[0]
    assert float(first["reward_margin"]) == pytest.approx(0.0, abs=1e-3)  # it is the reference
    assert float(first["loss"]) == pytest.approx(math.log(2), abs=1e-3)
    start, end = val[0], val[-1]
    assert int(end["step"]) == 30
    assert float(end["reward_accuracy"]) > 0.55 > float(first["reward_accuracy"])
    assert float(end["reward_margin"]) > float(start["reward_margin"]) - 1e-9
    assert float(end["loss"]) < math.log(2)
    assert float(np.mean([float(row["reward_accuracy"]) for row in train[-5:]])) > 0.75


def test_dpo_without_pairs_is_refused(bases, corpus, tmp_path):
    flags = ["--ckpt", bases["gpt2"], "--out_dir", tmp_path / "run", "--objective", "dpo"]
    assert len(run("finetune", *corpus, *TUNE, *flags).fails(1).errors) == 1


def test_missing_package_is_named(bases, tmp_path):
    """Without safetensors: the line to type."""
    code = (
        "import sys; sys.modules['safetensors'] = sys.modules['safetensors.torch'] = None\n"
        "import llm_pipeline; sys.exit(llm_pipeline.main(sys.argv[1:]))"
    )
    argv = ["export", "--ckpt", str(bases["gpt2"]), "--out_dir", str(tmp_path / "hf")]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    here = str(Path(lp.__file__).parent)
    result = finish(subprocess.Popen([sys.executable, "-c", code, *argv], cwd=here, **pipes))
    result.fails(1, "pip install", "safetensors")
    assert not entry_names(tmp_path)
