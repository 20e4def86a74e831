"""Hugging Face folders in and out, chat templates, LoRA: against transformers and peft."""

import json
import math
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, Child, metrics, needs, run, words
from test_tokenizers import random_strings, sentencepiece_like

import llm_pipeline as lp

transformers = needs("transformers")
safetensors = needs("safetensors.torch")

SMALL = ["--n_layer", 2, "--n_head", 4, "--n_embd", 32, "--block_size", 64]
SMALL += [*CPU, "--batch_size", 4, "--max_steps", 2]
TUNE = [*CPU, "--batch_size", 4, "--max_steps", 3, "--lr", 1e-2, "--report_samples", 0]
LORA = ["--method", "lora", "--lora_r", 3, "--lora_alpha", 7]
BPE = ["--tokenizer", "bpe", "--vocab_size", 320]
ARCHS = {"gpt2": ["--arch", "gpt2"], "modern": ["--arch", "modern", "--n_kv_head", 2]}
GPT2 = dict(vocab_size=260, n_positions=64, n_embd=32, n_layer=2, n_head=4)
QWEN3 = dict(
    vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
    tie_word_embeddings=True,
)  # fmt: skip
PEERS = {
    "gpt2": ("gpt2", {}),
    "gpt2, untied, exact gelu, narrow, one head": ("gpt2", dict(
        tie_word_embeddings=False, activation_function="gelu", n_inner=40, n_head=1)),
    "qwen3, grouped": ("qwen3", dict(num_key_value_heads=2)),
    "qwen3, untied, one key head, wide, theta": ("qwen3", dict(
        tie_word_embeddings=False, num_key_value_heads=1, head_dim=20,
        rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen3, more ids than its tokenizer": ("qwen3", dict(vocab_size=300)),
}  # fmt: skip


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


@pytest.fixture(scope="module")
def hf(bases):
    return bases["gpt2"].parent / "hf"


def export(ckpt, folder, *flags):
    assert run("export", "--ckpt", ckpt, "--out_dir", folder, *flags).ok().out == f"{folder}\n"
    return folder


def save_peer(name, folder, tokenizer_from, **save):
    """A random model of a transformers class, saved by it next to our byte tokenizer."""
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


def load(folder):
    return lp.load_model(str(folder)).model


def stored(folder):
    """Every tensor of a folder's safetensors files."""
    found = {}
    for file in Path(folder).glob("*.safetensors"):
        found |= safetensors.load_file(file)
    return found


def logits(model):
    """Logits of three random sequences, (3, 64, V)."""
    ids = torch.randint(0, 256, (3, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        out = model.eval()(ids)
    return out[0] if isinstance(out, tuple) else out.logits


def assert_same_logits(one, two):
    torch.testing.assert_close(logits(one), logits(two), rtol=0, atol=1e-4)


def edit_json(name="config.json", **changes):
    def edit(folder):
        path = folder / name
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


# --- weights ---


@pytest.mark.parametrize("name", PEERS)
def test_round_trip_is_bit_for_bit(name, hf, tmp_path):
    peer = save_peer(name, tmp_path / "theirs", hf)
    ours = lp.load_model(str(tmp_path / "theirs"))
    assert_same_logits(ours.model, peer)
    export(tmp_path / "theirs", tmp_path / "back")
    before, after = stored(tmp_path / "theirs"), stored(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key
    assert_same_logits(load_peer(tmp_path / "back"), peer)
    assert isinstance(ours.tokenizer, lp.ByteTokenizer)


def test_a_base_model_without_its_head(hf, tmp_path):
    """As OpenAI's own GPT-2 is stored: no prefix, and the causal mask as a buffer."""
    peer = save_peer("gpt2", tmp_path, hf)
    plain = {k.removeprefix("transformer."): v for k, v in stored(tmp_path).items()}
    plain |= {f"h.{i}.attn.bias": torch.ones(64, 64).tril()[None, None] for i in (0, 1)}
    safetensors.save_file(plain, tmp_path / "model.safetensors", {"format": "pt"})
    assert_same_logits(load(tmp_path), peer)


@pytest.mark.parametrize("name", ["gpt2", "qwen3, grouped"])
def test_train_and_finetune_begin_with_their_weights(name, hf, corpus, tmp_path):
    peer = save_peer(name, tmp_path / "hf", hf)
    still = [*CPU, "--max_steps", 1, "--batch_size", 4, "--lr", 1e-30, "--weight_decay", 0]
    run("train", *corpus, *still, "--init_from", tmp_path / "hf", "--out_dir", tmp_path / "a").ok()
    tune = ["--ckpt", tmp_path / "hf", "--out_dir", tmp_path / "b", "--report_samples", 0]
    run("finetune", *corpus, *still, *tune).ok()
    for best in ("a/best.pth", "b/best_finetune.pth"):
        assert_same_logits(load(tmp_path / best), peer)


def test_a_shorter_block_is_cut_and_a_longer_one_refused(hf):
    with pytest.raises(lp.UserError, match="this model has learned 64"):
        lp.load_model(str(hf), block_size=128)
    model = lp.load_model(str(hf), block_size=32).model
    assert model.config.block_size == len(model.positions.weight) == 32


# --- what is refused ---


def only_pickle(folder):
    torch.save(stored(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


WTE, FC = "transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"
YARN = dict(rope_type="yarn", factor=4.0, rope_theta=1e4)
BROKEN = {  # name: (model, how it is broken, a word of the error)
    "missing tensor": ("gpt2", edit_tensors(lambda t: t.pop(FC)), FC),
    "unknown tensor": ("gpt2", edit_tensors(lambda t: t.update(extra=torch.zeros(2))), "extra"),
    "wrong shape": ("gpt2", edit_tensors(lambda t: t.update({FC: torch.ones(31)})), FC),
    "not a number": ("gpt2", edit_tensors(lambda t: t[WTE].fill_(math.nan)), "logits"),
    "quantised": ("gpt2", edit_tensors(
        lambda t: t.update({n: t[n].to(torch.float8_e4m3fn) for n in [*t][:4]})), "F8"),
    "whole numbers": ("gpt2", edit_tensors(lambda t: t.update({WTE: t[WTE].to(torch.int8)})), "I8"),
    "pickle": ("gpt2", only_pickle, "pickles"),
    "truncated": ("gpt2", truncate, ""),
    "unknown architecture": ("gpt2", edit_json(model_type="llama"), "llama"),
    "unknown activation": ("gpt2", edit_json(activation_function="mish"), "mish"),
    "scaled by layer": ("gpt2", edit_json(scale_attn_by_inverse_layer_idx=True), "logits"),
    "broken config": ("gpt2", lambda folder: (folder / "config.json").write_text("{"), "config"),
    "no config": ("gpt2", lambda folder: (folder / "config.json").unlink(), "config.json"),
    "broken tokenizer": ("gpt2", lambda folder: (folder / "tokenizer.json").write_text("{"),
                         "tokenizer.json"),
    "no tokenizer": ("gpt2", lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    "stretched positions": ("qwen3, grouped", edit_json(rope_parameters=YARN), "rope_type"),
    "stretched, older": ("qwen3, grouped", edit_json(
        rope_parameters="absent", rope_scaling=dict(type="linear", factor=2.0)), "rope_type"),
    "sliding layers": ("qwen3, grouped", edit_json(
        layer_types=["sliding_attention", "full_attention"], sliding_window=64,
        use_sliding_window=True), "sliding"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_folders_are_refused_in_one_line(what, hf, tmp_path):
    name, spoil, word = BROKEN[what]
    save_peer(name, tmp_path / "hf", hf)
    spoil(tmp_path / "hf")
    result = run("sample", "--ckpt", tmp_path / "hf", "--prompt", "x")
    assert len(result.fails(1, word, str(tmp_path / "hf")).errors) == 1


def test_names_that_lead_nowhere(bases, tmp_path):
    for name in ("no-one/such-model", tmp_path / "missing"):
        run("sample", "--ckpt", name, "--prompt", "x").fails(1, str(name), "no such")
    run("sample", "--ckpt", bases["gpt2"].parent, "--prompt", "x").fails(1, "best.pth")


UNHELD = {"--pos alibi": "pos=alibi", "--n_kv_head 2": "n_kv_head=2",
          "--arch modern --no_qk_norm": "qk_norm=False",
          "--arch modern --pos learned": "norm=rmsnorm"}  # fmt: skip


@pytest.mark.parametrize(("flags", "name"), UNHELD.items())
def test_what_no_class_holds_is_refused_by_name(flags, name, corpus, tmp_path):
    run("train", *corpus, *SMALL, "--out_dir", tmp_path / "run", *flags.split()).ok()
    run("export", "--ckpt", tmp_path / "run" / "best.pth", "--out_dir", tmp_path / "hf").fails(
        1, name
    )
    assert not (tmp_path / "hf").exists()


# --- tokenizers and chat templates of exported folders ---


@pytest.fixture(scope="module", params=["bytes", "bpe", "bpe of other names"])
def talker(request, corpus, tmp_path_factory):
    """(our tokenizer, theirs, the folder) of a tuned model's export."""
    folder, flags = tmp_path_factory.mktemp("talker"), []
    if request.param != "bytes":
        flags = [*BPE, "--extra_special_tokens", "<|tool|>"]
    if request.param == "bpe of other names":
        flags += ["--special_tokens", "</s>,<pad>,<unk>"]  # no bos, no separator
    run("train", *corpus, *SMALL, *flags, "--out_dir", folder).ok()
    base = ["--ckpt", folder / "best.pth", "--out_dir", folder]
    run("finetune", *corpus, *TUNE, *base).ok()
    ckpt = folder / "best_finetune.pth"
    theirs = transformers.AutoTokenizer.from_pretrained(export(ckpt, folder / "hf"))
    return lp.load_model(str(ckpt)).tokenizer, theirs, folder / "hf"


def test_exported_tokenizer_is_ours(talker):
    ours, theirs, folder = talker
    back = lp.load_model(str(folder)).tokenizer
    assert type(back) is type(ours)
    named = [" leading", "trailing ", "a  b . , n't", "e\u0301", "", "a<|tool|>"]
    texts = [*(text for text in random_strings(4000) if "<|" not in text), *named]
    for text, ids in zip(texts, theirs(texts, add_special_tokens=False)["input_ids"], strict=True):
        assert ids == ours.encode(text).tolist() == back.encode(text).tolist(), repr(text)
        assert theirs.decode(ids) == ours.decode(ids) == text
        assert theirs(text)["input_ids"] == [*ours.prefix, *ids]
    for role in ("pad", "bos", "eos", "sep"):
        number = getattr(ours, f"{role}_id")
        assert getattr(theirs, f"{role}_token_id") == number == getattr(back, f"{role}_id")
    config = transformers.GenerationConfig.from_pretrained(folder)
    assert config.bos_token_id == ours.bos_id and set(config.eos_token_id) == set(ours.end_ids)


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
    "developer": ([said("developer", "Be short."), said("user", "Why?")],
                  [("Why?", "", "Be short.", None)]),
    "turns": ([said("system", "Be."), said("user", "a", input="b"), said("assistant", "c"),
               said("user", " d "), said("assistant", "e\n\n f"), said("user", "g")],
              [("a", "b", "Be.", "c"), (" d ", "", "", "e\n\n f"), ("g", "", "", None)]),
    "answers between spaces": (
        [said("user", "a"), said("assistant", " b\n"), said("user", ""), said("assistant", "  c"),
         said("user", "\n"), said("assistant", "d\n\n")],
        [("a", "", "", " b\n"), ("", "", "", "  c"), ("\n", "", "", "d\n\n")]),
    "code and foreign text": (
        [said("user", "{{ x }} {% if %} Größe 你好"), said("assistant", "'\\n' \"q\"")],
        [("{{ x }} {% if %} Größe 你好", "", "", "'\\n' \"q\"")]),
    "empty": ([said("system", ""), said("user", ""), said("assistant", "")], [("", "", "", "")]),
}  # fmt: skip


def as_trained(ours, turns):
    """The ids of a record: bos, then each turn's prompt, response, separator."""
    ids = list(ours.prefix)
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


def test_chat_template_gives_the_ids_of_the_store(talker, tmp_path):
    """Conversations as `prepare` stores them; answers keep their spaces and newlines."""
    theirs = talker[1]
    chats = [CHATS[name][0] for name in ("one answer", "system", "answers between spaces")]
    chats.append([*CHATS["one answer"][0], said("user", "And one more?"), said("assistant", "ü")])
    (tmp_path / "raw").mkdir()
    lines = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
    (tmp_path / "raw" / "chats.jsonl").write_text(lines, encoding="utf-8")
    store = lp.build_corpus_from_sources(
        tmp_path / "raw", lp.load_tokenizer(str(talker[2])), folder=tmp_path / "store"
    )
    found = []
    for split in ("train", "val"):
        rows = store.index[split]
        ends = [int(r["start"] + r["length"]) for r in rows if r["last"]]
        parts = np.split(np.asarray(store.tokens[split]), ends[:-1])
        found += [part.tolist() for part in parts if len(part)]
    assert sorted(found) == sorted(theirs.apply_chat_template(c, return_dict=False) for c in chats)


def test_what_the_template_refuses(talker):
    image = {"type": "image", "url": "x.png"}
    for message, word in ((said("tool", "x"), "roles are"), (said("user", [image]), "image")):
        with pytest.raises(Exception, match=word):
            talker[1].apply_chat_template([message])


def test_a_tuned_folder_counts_as_tuned(talker, hf):
    folder = talker[2]
    flags = ["--prompt", "Repeat 3.", "--temperature", 0, "--max_new_tokens", 12, *CPU]
    wanted = run("sample", "--ckpt", folder.parent / "best_finetune.pth", *flags).ok().out
    assert run("sample", "--ckpt", folder, *flags).ok().out == wanted
    assert lp.load_model(str(folder)).expects_template
    assert not lp.load_model(str(hf)).expects_template
    assert transformers.AutoTokenizer.from_pretrained(hf).chat_template is None


@pytest.mark.parametrize("arch", ARCHS)
def test_what_an_exported_folder_says(arch, bases):
    """The names that transformers 4 reads, and weights as readable as the other files."""
    folder = bases[arch].parent / "hf"
    shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert arch == "gpt2" or shape["rope_theta"] == 1e4
    said = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    mode = stat.S_IMODE((folder / "model.safetensors").stat().st_mode)
    assert mode == stat.S_IMODE((folder / "config.json").stat().st_mode)


def test_texts_trained_without_bos_are_exported_without(bases, corpus, tmp_path):
    """The export computes what the checkpoint does; the conversations of a tuned one have a bos."""
    flags = ["--no_add_special_tokens", "--out_dir", tmp_path]
    run("train", *corpus, *SMALL, *flags).ok()
    run("finetune", *corpus, *TUNE, "--ckpt", tmp_path / "best.pth", "--out_dir", tmp_path).ok()
    for name in ("best", "best_finetune"):
        folder = export(tmp_path / f"{name}.pth", tmp_path / name)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert theirs("ab")["input_ids"] == [97, 98]
        bos = 257 if name == "best_finetune" else None
        declared = transformers.GenerationConfig.from_pretrained(folder).bos_token_id
        assert theirs.bos_token_id == load_peer(folder).config.bos_token_id == declared == bos
        if bos:
            chat = [said("user", "a"), said("assistant", "b")]
            wanted = as_trained(lp.ByteTokenizer(), [("a", "", "", "b")])
            assert theirs.apply_chat_template(chat, return_dict=False) == wanted
        flags = ["--prompt", "ab", "--temperature", 0, "--max_new_tokens", 9, *CPU]
        answers = [run("sample", "--ckpt", ckpt, *flags).ok().out
                   for ckpt in (folder, tmp_path / f"{name}.pth")]  # fmt: skip
        assert answers[0] == answers[1]


def test_a_chat_with_other_ids_in_one_piece_is_refused(bases, corpus, tmp_path):
    """A vocabulary that marks the first word of a text, as some of SentencePiece's do."""
    sentencepiece_like(tmp_path, scheme="first", fallback=True)
    flags = ["--tokenizer", tmp_path / "tokenizer.json", "--out_dir", tmp_path]
    run("train", *corpus, *SMALL, *flags).ok()
    tune = ["--ckpt", tmp_path / "best.pth", "--out_dir", tmp_path]
    run("finetune", *corpus, *TUNE, *tune).ok()
    flags = ["--ckpt", tmp_path / "best_finetune.pth", "--out_dir", tmp_path / "hf"]
    run("export", *flags).fails(1, "turn by turn", "another tokenizer")


# --- a foreign vocabulary next to the model ---


def foreign_folder(folder, hf, **said):
    """A Qwen3 model with its own vocabulary: no bos, two ends of text."""
    tokenizers = needs("tokenizers")
    save_peer("qwen3, more ids than its tokenizer", folder, hf)
    library = tokenizers.ByteLevelBPETokenizer()
    names = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    text = "the cat sees the dog and the other cat sings far away " * 9
    library.train_from_iterator([text], vocab_size=300, special_tokens=names)
    library.save(str(folder / "tokenizer.json"))
    config = dict(tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>", bos_token=None) | said
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ends = json.dumps({"eos_token_id": [1, 0, 70_000], "bos_token_id": 0})
    (folder / "generation_config.json").write_text(ends)
    return folder


@pytest.mark.parametrize("eos", ["<|im_end|>", None], ids=["declared", "undeclared"])
def test_all_ends_of_text_and_no_bos(eos, hf, tmp_path):
    folder = foreign_folder(tmp_path / "hf", hf, eos_token=eos)
    tokenizer = lp.load_model(str(folder)).tokenizer
    assert tokenizer.bos_id is None and list(tokenizer.prefix) == []
    assert (tokenizer.eos_id, set(tokenizer.end_ids)) == (1, {0, 1})  # 70,000 is no id
    back = export(folder, tmp_path / "back")
    theirs = transformers.AutoTokenizer.from_pretrained(back)
    assert theirs("a b")["input_ids"] == tokenizer.encode("a b").tolist()
    assert theirs.bos_token is None
    config = transformers.GenerationConfig.from_pretrained(back)
    assert config.bos_token_id is None and set(config.eos_token_id) == {0, 1}


def test_generation_stops_at_the_second_end(hf, tmp_path):
    """A head that gives 0, <|endoftext|>, after this prompt; the tokenizer declares <|im_end|>."""
    folder = foreign_folder(tmp_path / "hf", hf)
    ids = lp.load_tokenizer(str(folder)).encode("the cat").astype(int)
    with torch.no_grad():
        last = load_peer(folder).model(torch.from_numpy(ids)[None]).last_hidden_state[0, -1]
    head = 0.1 * torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    head[0] = last  # and something else after that
    edit_tensors(lambda t: t.update({"lm_head.weight": head}))(folder)
    edit_json(tie_word_embeddings=False)(folder)
    assert lp.load(str(folder), device="cpu").generate("the cat", temperature=0.0) == ""


def test_more_ids_than_the_model_has_rows(hf, tmp_path):
    save_peer("gpt2", tmp_path / "hf", hf)
    for file in foreign_folder(tmp_path / "other", hf).glob("tokenizer*"):
        shutil.copy(file, tmp_path / "hf")
    run("sample", "--ckpt", tmp_path / "hf", "--prompt", "x").fails(1, "ids", "260")


# --- where exports go ---


def test_export_replaces_nothing(bases, tmp_path):
    export(bases["gpt2"], tmp_path / "hf")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.txt").write_text("keep me")
    (tmp_path / "file").write_text("keep me")
    before = sorted(tmp_path.rglob("*"))
    for flag, place in (("--out_dir", "hf"), ("--out_dir", "mine"), ("--gguf", "file")):
        argv = ["export", "--ckpt", bases["modern"], flag, tmp_path / place]
        run(*argv).fails(1, "already exists", str(tmp_path / place))
        assert sorted(tmp_path.rglob("*")) == before
    assert load_peer(tmp_path / "hf").config.model_type == "gpt2"


def killed_while_it_writes():
    lp.check_tokenizer = lambda *_: os._exit(9)


def small_files_only():
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_an_export_that_does_not_end_leaves_nothing(bases, tmp_path):
    """The next one removes what a killed one left, and leaves nothing itself on a full disk."""
    argv = ["export", "--ckpt", bases["gpt2"], "--out_dir", tmp_path / "hf"]
    assert Child(*argv, hook=killed_while_it_writes).finish().code == 9
    assert [path.name for path in tmp_path.iterdir()] == [".hf.writing"]
    Child(*argv, hook=small_files_only).finish().fails(1, "cannot write")
    assert not list(tmp_path.iterdir())


# --- LoRA ---


@pytest.fixture(scope="module", params=list(ARCHS))
def lora(request, tmp_path_factory, bases, corpus):
    """(base, tuned with adapters)."""
    needs("peft")
    folder, base = tmp_path_factory.mktemp("lora"), bases[request.param]
    run("finetune", *corpus, *TUNE, *LORA, "--ckpt", base, "--out_dir", folder).ok()
    return base, folder / "best_finetune.pth"


def test_lora_merged_equals_unmerged(lora, tmp_path):
    base, tuned = lora
    merged, adapted = load(tuned), lp.load_model(str(tuned), merge=False).model
    assert_same_logits(merged, adapted)
    assert (logits(merged) - logits(load(base))).abs().max() > 1e-2
    assert merged.state_dict().keys() == load(base).state_dict().keys()
    assert_same_logits(adapted, load_peer(export(tuned, tmp_path / "hf")))


def test_a_run_from_merged_adapters(lora, corpus, tmp_path):
    flags = [*corpus[:4], *CPU, "--max_steps", 1, "--batch_size", 4, "--out_dir", tmp_path]
    best = run("train", "--init_from", lora[1], *flags).ok().out.split()[-1]
    assert not any("lora" in name for name in lp.load_model(best).model.state_dict())


def test_lora_in_bf16_leaves_the_base_as_it_was(bases, corpus, tmp_path):
    needs("peft")
    flags = [*corpus, *TUNE, *LORA, "--dtype", "bfloat16", "--ckpt", bases["gpt2"]]
    run("finetune", *flags, "--out_dir", tmp_path).ok()
    tuned = str(tmp_path / "best_finetune.pth")
    merged, adapted = (lp.load_model(tuned, merge=merge).model for merge in (True, False))
    assert torch.equal(adapted.tok_emb.weight, load(bases["gpt2"]).tok_emb.weight)
    assert_same_logits(merged, adapted)


def test_an_adapter_and_its_base(lora, tmp_path):
    """They load in peft and as --ckpt."""
    peft = needs("peft")
    base, tuned = lora
    flags = ["export", "--ckpt", tuned, "--out_dir", tmp_path / "adapter", "--adapter"]
    run(*flags).fails(1, "--base_model")
    wrong = export(tuned, tmp_path / "merged")
    run(*flags, "--base_model", wrong).fails(1, "logits differ")
    root = base.parent / "hf"
    adapter = export(tuned, tmp_path / "adapter", "--adapter", "--base_model", root)
    assert_same_logits(load(tuned), peft.PeftModel.from_pretrained(load_peer(root), adapter))
    assert_same_logits(load(tuned), peft.AutoPeftModelForCausalLM.from_pretrained(adapter))
    assert_same_logits(load(tuned), load(adapter))
    edit_json("adapter_config.json", base_model_name_or_path=None)(adapter)
    run("sample", "--ckpt", adapter, "--prompt", "x").fails(1, str(adapter), "names no base")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # from peft's call to transformers
def test_an_adapter_that_peft_made(hf, tmp_path):
    peft = needs("peft")
    save_peer("qwen3, grouped", tmp_path / "hf", hf)
    targets = ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=8, target_modules=targets)
    model = peft.get_peft_model(load_peer(tmp_path / "hf"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "adapter")
    assert_same_logits(load(tmp_path / "adapter"), model)


@pytest.mark.parametrize(("arch", "targets"), [("gpt2", "up,down"), ("modern", "qkv")])
def test_adapters_of_few_targets(arch, targets, bases, corpus, tmp_path):
    """Tuned from an exported folder, which the adapter names."""
    peft = needs("peft")
    flags = ["--lora_targets", targets, "--ckpt", bases[arch].parent / "hf", "--out_dir", tmp_path]
    run("finetune", *corpus, *TUNE, *LORA, *flags).ok()
    adapter = export(tmp_path / "best_finetune.pth", tmp_path / "adapter", "--adapter")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(adapter)
    assert_same_logits(load(tmp_path / "best_finetune.pth"), model)


def test_what_has_no_adapter_exports_none(bases, corpus, tmp_path):
    run("export", "--ckpt", bases["gpt2"], "--out_dir", tmp_path / "a", "--adapter").fails(
        1, "lora"
    )
    assert not list(tmp_path.iterdir())
    flags = ["--ckpt", bases["gpt2"], "--out_dir", tmp_path, "--lora_targets", "qkv,heads"]
    result = run("finetune", *corpus, *TUNE, *LORA, *flags)
    assert result.code in (1, 2) and "--lora_targets" in result.err


def test_dpo_with_adapters_begins_at_its_base(bases, tmp_path):
    """The base is the reference, without a copy: there is no margin at first."""
    needs("peft")
    pairs = [dict(prompt=f"Say {n}.", chosen=f"{n}", rejected="no") for n in range(40)]
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    (tmp_path / "pairs.jsonl").write_text(lines, encoding="utf-8")
    flags = words(
        "--objective dpo --dropout 0 --val_fraction 0.2 --eval_interval 3 --log_interval 1"
    )
    flags += ["--data_dir", tmp_path / "pairs.jsonl", "--processed_dir", tmp_path / "processed"]
    tune = [*TUNE, "--max_steps", 12, *LORA, "--ckpt", bases["modern"], "--out_dir", tmp_path]
    run("finetune", *tune, *flags).ok()
    train, val = (metrics(tmp_path, split, "_finetune") for split in ("train", "val"))
    assert float(train[0]["reward_margin"]) == pytest.approx(0.0, abs=1e-3)
    assert float(train[0]["loss"]) == pytest.approx(math.log(2), abs=1e-3)
    assert float(val[-1]["loss"]) < math.log(2)
