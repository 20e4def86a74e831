"""`export --gguf`: against the gguf package and llama.cpp."""

import re
import shutil

import numpy as np
import pytest
import torch
from conftest import CPU, needs, run, words

import llm_pipeline as lp

gguf = needs("gguf")
needs("xllamacpp")

SHAPE = words("--n_layer 2 --n_head 4 --n_embd 64 --block_size 256 --init_std 0.08 --dropout 0")
SHORT = [*CPU, *words("--batch_size 4 --max_steps 12 --lr 3e-3")]
ARCHS = {"gpt2": [], "modern": words("--arch modern --n_kv_head 2")}
TOKENIZERS = {"bytes": [], "bpe": words("--tokenizer bpe --vocab_size 320")}
# The largest difference of log-probabilities, in nats. llama.cpp approximates GELU by tanh, in f16.
NATS = {"gpt2": 4e-3, "modern": 1e-5}
HARD = [
    " leading", "trailing ", "a\n\n\n b\t\r\n", "it's I'LL don't", "12345 3.14", "e\u0301 Größe",
    "你好 мир", "😀👨\u200d👩", "<|sep|> <|eos|>", "x" * 50, " " * 30 + "y", "\u00a0\u2003z",
    "a\x00b", "### Output: yes", "",
]  # fmt: skip


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, corpus):
    """{(architecture, tokenizer): a tuned checkpoint}, made when asked for."""
    found = {}

    def make(arch, tokenizer):
        if (arch, tokenizer) not in found:
            folder = tmp_path_factory.mktemp(f"{arch}-{tokenizer}")
            flags = [*ARCHS[arch], *TOKENIZERS[tokenizer], "--out_dir", folder]
            run("train", *corpus, *SHORT, *SHAPE, *flags).ok()
            more = ["--ckpt", folder / "best.pth", "--out_dir", folder, "--report_samples", 0]
            run("finetune", *corpus, *SHORT, *more).ok()
            found[arch, tokenizer] = folder / "best_finetune.pth"
        return found[arch, tokenizer]

    return make


def to_gguf(ckpt, file, *flags, kind="f32"):
    return run("export", "--ckpt", ckpt, "--gguf", file, "--gguf_type", kind, *flags)


def logits(model, ids):
    """(T, V) of one sequence."""
    with torch.no_grad():
        return model(torch.tensor([ids]))[0]


def value(reader, key):
    return reader.get_field(key).contents()


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("arch", ARCHS)
def test_llama_cpp_computes_what_we_do(arch, tokenizer, tuned, tmp_path):
    """Ids of hard texts, log-probabilities, 100 greedy tokens; and the gate said so before."""
    file, loaded = tmp_path / "model.gguf", lp.load_model(str(tuned(arch, tokenizer)))
    result = to_gguf(tuned(arch, tokenizer), file).ok()
    assert float(re.search(r"agree to (\S+),", result.err)[1]) <= NATS[arch]
    assert "100 of 100 greedy tokens" in result.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Modelfile", "model.gguf"]
    ask, model, ours = lp.llama_server(file, 256), loaded.model.eval(), loaded.tokenizer
    ends = (ours.eos_id, ours.sep_id)
    for text in HARD:
        ids = ask("/tokenize", content=text, add_special=True, parse_special=False)["tokens"]
        assert ids == [ours.bos_id, *ours.encode(text).tolist()], repr(text)
    for text in (lp.instruction_prompt("Repeat 3.", "moon tree"), "sun moon tree", "Größe"):
        prompt = [ours.bos_id, *ours.encode(text).tolist()]
        request = dict(prompt=prompt, temperature=0, return_tokens=True)
        told = ask("/completion", n_predict=100, **request)["tokens"]
        steps = lp.generate(model, torch.tensor(prompt), 100, ends, temperature=0.0)
        assert [t for (t,) in steps if t >= 0] == [t for t in told if t not in ends]
        step = ask("/completion", n_predict=1, n_probs=ours.vocab_size, **request)
        table = logits(model, prompt)[-1].log_softmax(-1)
        for top in step["completion_probabilities"][0]["top_logprobs"]:
            assert top["logprob"] == pytest.approx(float(table[top["id"]]), abs=NATS[arch])


def test_gpt2_with_the_same_gelu_is_closer(tuned, corpus, tmp_path):
    more = words("--mlp gelu_tanh --batch_size 8 --max_steps 30")
    flags = [*more, "--out_dir", tmp_path / "run"]
    run("train", *corpus, *SHORT, *SHAPE, *flags).ok()
    result = to_gguf(tmp_path / "run" / "best.pth", tmp_path / "model.gguf").ok()
    assert float(re.search(r"agree to (\S+),", result.err)[1]) <= 1e-3
    assert "tanh" not in result.err
    assert "tanh" in to_gguf(tuned("gpt2", "bytes"), tmp_path / "b" / "model.gguf").ok().err


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_smaller_types(kind, tuned, tmp_path):
    file = tmp_path / "model.gguf"
    to_gguf(tuned("modern", "bpe"), file, kind=kind).ok()
    reader = gguf.GGUFReader(file)
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    assert types["token_embd.weight"] == types["blk.1.ffn_gate.weight"] == kind.upper()
    assert types["output_norm.weight"] == types["blk.0.attn_q_norm.weight"] == "F32"
    wanted = lp.load_model(str(tuned("modern", "bpe"))).model.blocks[1].mlp.down.weight.detach()
    stored = next(t for t in reader.tensors if t.name == "blk.1.ffn_down.weight")
    found = gguf.quants.dequantize(stored.data, stored.tensor_type)
    np.testing.assert_allclose(found, wanted.numpy(), atol=float(wanted.abs().max()) / 200)


def test_what_the_file_says(tuned, tmp_path):
    to_gguf(tuned("gpt2", "bytes"), tmp_path / "model.gguf").ok()
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert value(reader, "general.architecture") == "gpt2"
    assert value(reader, "gpt2.context_length") == 256
    assert value(reader, "tokenizer.ggml.add_bos_token") is True
    assert value(reader, "tokenizer.ggml.eot_token_id") == 259
    assert list(value(reader, "tokenizer.ggml.eos_token_ids")) == [258, 259]
    recipe = (tmp_path / "Modelfile").read_text(encoding="utf-8")
    assert "FROM ./model.gguf\n" in recipe and 'PARAMETER stop "<|sep|>"' in recipe
    assert "### Instruction: {{ .Content }}\n### Input: \n### Output:" in recipe
    assert "PARAMETER num_ctx 256" in recipe


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (words("--arch modern --attn_window 8"), "--attn_window"),
        (words("--mlp relu"), "relu"),
        (words("--pos alibi"), "alibi"),
        (words("--n_inner 40 --gguf_type q8_0"), "32"),
    ],
    ids=str,
)
def test_refused_by_name(flags, word, corpus, tmp_path):
    kind = flags[flags.index("--gguf_type") + 1] if "--gguf_type" in flags else "f32"
    flags = [f for f in flags if f not in ("--gguf_type", kind)]
    run("train", *corpus, *SHORT, *SHAPE, "--max_steps", 1, *flags, "--out_dir", tmp_path).ok()
    before = sorted(tmp_path.iterdir())
    to_gguf(tmp_path / "best.pth", tmp_path / "m.gguf", kind=kind).fails(1, word)
    assert sorted(tmp_path.iterdir()) == before


def test_tokenizers_that_cut_otherwise_are_refused(tuned, tmp_path):
    tokenizers = needs("tokenizers")
    folder = tmp_path / "hf"
    run("export", "--ckpt", tuned("modern", "bpe"), "--out_dir", folder).ok()
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for change in ("pre_tokenizer", "normalizer"):
        other = tokenizers.Tokenizer.from_str(library.to_str())
        if change == "normalizer":
            other.normalizer = tokenizers.normalizers.NFC()
        else:
            other.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
        other.save(str(folder / "tokenizer.json"))
        to_gguf(folder, tmp_path / "m.gguf").fails(1, "llama.cpp")
        assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_file_that_llama_cpp_refuses_does_not_appear(tuned, tmp_path, monkeypatch):
    """The gate: a wrong scale of the norms, which no tensor shows."""
    monkeypatch.setattr(gguf.GGUFWriter, "add_layer_norm_rms_eps", lambda self, eps: None)
    to_gguf(tuned("modern", "bytes"), tmp_path / "m.gguf").fails(1, "failed its check")
    wrong = gguf.GGUFWriter.add_rope_freq_base
    monkeypatch.undo()
    monkeypatch.setattr(
        gguf.GGUFWriter, "add_rope_freq_base", lambda self, base: wrong(self, base * 7)
    )
    to_gguf(tuned("modern", "bytes"), tmp_path / "m.gguf").fails(1, "log-probabilities differ")
    assert not list(tmp_path.iterdir())


def test_replaces_its_own_files_only(tuned, tmp_path):
    file = tmp_path / "model.gguf"
    to_gguf(tuned("gpt2", "bytes"), file).ok()
    to_gguf(tuned("gpt2", "bytes"), file).fails(1, "--overwrite")
    (tmp_path / "Modelfile").write_text("FROM mine")
    to_gguf(tuned("gpt2", "bytes"), file, "--overwrite").fails(1, "Modelfile")
    (tmp_path / "Modelfile").unlink()
    shutil.copy(tuned("gpt2", "bytes"), file)
    to_gguf(tuned("gpt2", "bytes"), file, "--overwrite").fails(1, "not an export")
    file.unlink()
    to_gguf(tuned("gpt2", "bytes"), file, "--overwrite").ok()
