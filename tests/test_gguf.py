"""`export --gguf`: against the gguf package and llama.cpp."""

import json
from urllib.request import ProxyHandler, Request, build_opener

import pytest
import torch
from conftest import CPU, needs, run, words

import llm_pipeline as lp

gguf = needs("gguf")
llama = needs("xllamacpp")

SHAPE = words("--n_layer 2 --n_head 4 --n_embd 64 --block_size 256 --init_std 0.08 --dropout 0")
SHORT = [*CPU, *words("--batch_size 4 --max_steps 12 --lr 3e-3")]
ARCHS = {"gpt2": [], "modern": words("--arch modern --n_kv_head 2")}
TOKENIZERS = {
    "bytes": [],
    "bpe": words("--tokenizer bpe --vocab_size 320 --extra_special_tokens <|tool|>"),
}
# The largest difference of log-probabilities, in nats. llama.cpp approximates GELU by tanh, in f16.
NATS = {"gpt2": 4e-3, "modern": 1e-5}
HARD = [
    " leading", "trailing ", "a\n\n\n b\t\r\n", "it's I'LL don't", "12345 3.14", "e\u0301 Größe",
    "你好 мир", "😀👨\u200d👩", "<|sep|> <|eos|>", "x" * 50, " " * 30 + "y", "\u00a0\u2003z",
    "a\x00b", "### Output: yes", "a<|tool|>b", "",
]  # fmt: skip


def post(url, request=None, within=60):
    """The JSON answer."""
    body = None if request is None else json.dumps(request).encode()
    asked = Request(url, body, {"Content-Type": "application/json"})
    with build_opener(ProxyHandler({})).open(asked, timeout=within) as answer:
        return json.load(answer)


def llama_server(file, n_ctx=256):
    """llama.cpp's server on the loopback address, exact: (path, request) -> its JSON answer."""
    params = llama.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(file), n_ctx, 1
    params.verbosity, params.warmup, params.fit_params = -1, False, False
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = llama.Server(params)
    return lambda path, **request: post(server.listening_address + path, request)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, corpus):
    """A function (architecture, tokenizer) -> a tuned checkpoint, made once."""
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


def log_probabilities(model, ids):
    """Log-probabilities of the token after the ids, (V,)."""
    with torch.no_grad():
        return model(torch.tensor([ids]))[0][0, -1].log_softmax(-1)


def largest_difference(ask, loaded, prompt):
    """Between our log-probabilities of the next token and llama.cpp's."""
    request = dict(prompt=prompt, n_predict=1, n_probs=loaded.tokenizer.vocab_size, temperature=0)
    [step] = ask("/completion", **request)["completion_probabilities"]
    ours = log_probabilities(loaded.model, prompt)
    return max(abs(top["logprob"] - float(ours[top["id"]])) for top in step["top_logprobs"])


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("arch", ARCHS)
def test_llama_cpp_computes_what_we_do(arch, tokenizer, tuned, tmp_path):
    """Ids of hard texts, log-probabilities, 100 greedy tokens."""
    file, loaded = tmp_path / "model.gguf", lp.load_model(str(tuned(arch, tokenizer)))
    result = to_gguf(tuned(arch, tokenizer), file).ok()
    assert ("tanh" in result.err) == (arch == "gpt2")  # --mlp gelu
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.gguf"]
    ask, model, ours = llama_server(file), loaded.model.eval(), loaded.tokenizer
    for text in HARD:
        ids = ask("/tokenize", content=text, add_special=True, parse_special=False)["tokens"]
        assert ids == [ours.bos_id, *ours.encode(text).tolist()], repr(text)
    for text in (lp.instruction_prompt("Repeat 3.", "moon tree"), "sun moon tree", "Größe"):
        prompt = [ours.bos_id, *ours.encode(text).tolist()]
        request = dict(prompt=prompt, temperature=0, return_tokens=True)
        told = ask("/completion", n_predict=100, **request)["tokens"]
        steps = lp.generate(model, torch.tensor([prompt]), 100, ours.end_ids, temperature=0.0)
        wanted = [t for (t,) in steps if t >= 0]
        assert wanted == [t for t in told if t not in ours.end_ids]
        assert largest_difference(ask, loaded, prompt) <= NATS[arch]


@pytest.mark.parametrize(("kind", "nats"), [("f16", 0.05), ("bf16", 0.3), ("q8_0", 0.5)])
def test_smaller_types(kind, nats, tuned, tmp_path):
    file, loaded = tmp_path / "model.gguf", lp.load_model(str(tuned("modern", "bpe")))
    to_gguf(tuned("modern", "bpe"), file, kind=kind).ok()
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
    assert types["token_embd.weight"] == types["blk.1.ffn_gate.weight"] == kind.upper()
    assert types["output_norm.weight"] == types["blk.0.attn_q_norm.weight"] == "F32"
    prompt = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode("sun moon tree").tolist()]
    assert largest_difference(llama_server(file), loaded, prompt) <= nats


def test_texts_trained_without_bos_begin_without(corpus, tmp_path):
    flags = ["--no_add_special_tokens", "--out_dir", tmp_path]
    run("train", *corpus, *SHORT, *SHAPE, *flags).ok()
    to_gguf(tmp_path / "best.pth", tmp_path / "new" / "m.gguf").ok()
    ask = llama_server(tmp_path / "new" / "m.gguf")
    assert ask("/tokenize", content="ab", add_special=True)["tokens"] == [97, 98]


REFUSED = [("--mlp relu", "f32", "relu"),
           ("--pos alibi", "f32", "alibi"), ("--n_inner 40", "q8_0", "--gguf_type")]  # fmt: skip


@pytest.mark.parametrize(("flags", "kind", "word"), REFUSED)
def test_refused_by_name(flags, kind, word, corpus, tmp_path):
    flags = [*words(flags), "--max_steps", 1, "--out_dir", tmp_path]
    run("train", *corpus, *SHORT, *SHAPE, *flags).ok()
    before = sorted(tmp_path.iterdir())
    to_gguf(tmp_path / "best.pth", tmp_path / "m.gguf", kind=kind).fails(1, word)
    assert sorted(tmp_path.iterdir()) == before


def test_other_ways_to_cut_text_are_refused(tuned, tmp_path):
    """The error names the tool that knows them: the export only writes GPT-2's."""
    tokenizers = needs("tokenizers")
    run("export", "--ckpt", tuned("modern", "bpe"), "--out_dir", tmp_path / "hf").ok()
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    library.save(str(tmp_path / "hf" / "tokenizer.json"))
    to_gguf(tmp_path / "hf", tmp_path / "m.gguf").fails(1, "convert_hf_to_gguf.py")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_a_file_that_differs_does_not_appear(tuned, tmp_path, monkeypatch):
    """Every tensor is read back and compared."""
    quantize = gguf.quants.quantize
    monkeypatch.setattr(gguf.quants, "quantize", lambda data, kind: quantize(data * 1.01, kind))
    to_gguf(tuned("modern", "bytes"), tmp_path / "m.gguf").fails(1, "failed its check")
    assert not list(tmp_path.iterdir())
