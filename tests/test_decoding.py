"""Section 6 and `sample`: against a loop without a cache, and against transformers."""

import copy
import shutil

import numpy as np
import pytest
import torch
from conftest import needs, run, run_process

import llm_pipeline as lp

MODERN = dict(pos="rope", norm="rmsnorm", mlp="swiglu", qk_norm=True, bias=False, norm_eps=1e-6)
SHAPES = {
    "gpt2": {},
    "modern": MODERN,
    "modern, grouped": MODERN | dict(n_kv_head=2),
    "modern, one key head": MODERN | dict(n_kv_head=1),
    "alibi": dict(pos="alibi"),
}


def make(seed=0, std=0.3, **shape):
    """A small model whose weights are large enough for its choices to depend on the context."""
    small = dict(block_size=16, n_layer=2, n_head=4, n_embd=32, dropout=0.0, tie_weights=False)
    torch.manual_seed(seed)
    model = lp.GPT(lp.GPTConfig(**small | dict(vocab_size=61) | shape)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if p.ndim == 1 and not name.endswith("bias") else 0.0, std)
    return model


def naive(model, prompt, count):
    """Greedy decoding without a cache: the whole context again for every token."""
    block = model.config.block_size
    context = prompt[-block:]
    made = []
    for _ in range(count):
        if len(context) > block:
            context = context[-max(1, block // 2) :]  # full: continue from the last half
        with torch.no_grad():
            logits = model(context[None])[0][0, -1]
        made.append(int(logits.argmax()))
        context = torch.cat([context, torch.tensor(made[-1:])])
    return made


def decode(model, prompt, count, **settings):
    """One list of ids for each sample."""
    steps = list(lp.generate(model, prompt[None], count, **settings))
    return [list(sample) for sample in zip(*steps, strict=True)]


def prompt_of(length, seed=1):
    return torch.randint(0, 61, (length,), generator=torch.Generator().manual_seed(seed))


# --- the cache ---


@pytest.mark.parametrize("length", [1, 2, 8, 15, 16, 17, 40])
@pytest.mark.parametrize("name", SHAPES)
def test_cached_equals_naive(name, length):
    model, prompt = make(**SHAPES[name]), prompt_of(length)
    wanted = naive(model, prompt, 45)
    assert decode(model, prompt, 45, temperature=0.0) == [wanted]
    assert len(set(wanted)) > 2  # the choice depends on the context


def test_repetition_penalty_counts_prompt_and_output():
    model, prompt = make(), prompt_of(6)
    (made,) = decode(model, prompt, 8, temperature=0.0, repetition_penalty=1e6)
    assert len({*prompt.tolist(), *made}) == len(set(prompt.tolist())) + 8
    assert made != decode(model, prompt, 8, temperature=0.0)[0]


@pytest.mark.parametrize("shape", [{}, MODERN | dict(n_kv_head=2)])
def test_greedy_equals_transformers_over_200_tokens(shape):
    needs("transformers")
    model, prompt = make(std=0.2, block_size=256, vocab_size=300, **shape), prompt_of(20)
    peer = lp.to_peer(model).eval()
    how = dict(max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0)
    theirs = peer.generate(prompt[None], **how)
    ours = decode(model, prompt, 200, temperature=0.0)[0]
    assert ours == theirs[0, 20:].tolist()
    assert len(set(ours)) > 10


# --- sampling ---


CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [{}, MODERN, dict(tie_weights=True, n_embd=24)])
def test_weights_packed_for_decoding_give_the_same_logits(shape):
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU packs no bf16: run on one with AVX-512")
    expected = make(**shape).bfloat16()
    ready = lp.for_decoding(copy.deepcopy(expected), CPU, torch.bfloat16)
    assert type(ready.blocks[0].mlp.up) is lp.PackedLinear
    for idx in (prompt_of(12).expand(3, -1), prompt_of(1)[None]):
        with torch.inference_mode():
            found, wanted = ready(idx)[0], expected(idx)[0]
        assert torch.allclose(found, wanted, atol=0.05 * wanted.abs().max().item())


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("name", ["gpt2", "modern, grouped"])
def test_a_compiled_step_decodes_the_same(name, capsys):
    """Past a full cache, and for two samples."""
    model = lp.for_decoding(make(**SHAPES[name]), CPU, torch.float32, compiled=True)
    made = decode(model, prompt_of(8), 40, num_samples=2, temperature=0.0)
    assert made == 2 * [naive(model, prompt_of(8), 40)]
    assert "without a graph" not in capsys.readouterr().err


def test_samples_share_a_prefill_and_follow_the_seed():
    model, prompt = make(), prompt_of(10)
    prefills = []
    hidden = type(model).hidden

    def counted(self, idx, *rest, **more):
        prefills.append(tuple(idx.shape))
        return hidden(self, idx, *rest, **more)

    model.hidden = counted.__get__(model)
    first = decode(model, prompt, 5, num_samples=3, seed=7)
    assert [shape for shape in prefills if shape[1] > 1] == [(1, 10)]
    assert first == decode(model, prompt, 5, num_samples=3, seed=7)
    assert first != decode(model, prompt, 5, num_samples=3, seed=8)
    assert len({tuple(sample) for sample in first}) == 3


def test_samples_at_temperature_0_are_the_greedy_one():
    for name in ("gpt2", "modern"):
        model, prompt = make(**SHAPES[name]), prompt_of(10)
        wanted = naive(model, prompt, 30)
        assert decode(model, prompt, 30, num_samples=3, temperature=0.0) == [wanted] * 3
        tiny = decode(model, prompt, 30, temperature=1e-9)
        assert tiny == [wanted]  # the limit, and no overflow on the way


def test_a_stopped_sample_stays_stopped():
    model, prompt = make(std=0.05), prompt_of(4)
    stop = tuple(range(0, 61, 3))
    samples = decode(model, prompt, 200, num_samples=8, seed=3, stop_ids=stop)
    free = decode(model, prompt, 200, num_samples=8, seed=3)
    for sample, whole in zip(samples, free, strict=True):
        end = next(i for i, token in enumerate(whole) if token in stop)
        assert sample[:end] == whole[:end]
        assert set(sample[end:]) <= {-1}
    assert len(samples[0]) < 200  # it ends when all have stopped


def support(logits, draws=400, **settings):
    """The tokens that `sample_next` ever draws, by row."""
    generator = torch.Generator().manual_seed(0)
    many = logits.repeat_interleave(draws, 0)
    if "seen" in settings:
        settings["seen"] = settings["seen"].repeat_interleave(draws, 0)
    drawn = lp.sample_next(many, generator=generator, **settings).view(len(logits), draws)
    return [set(row.tolist()) for row in drawn]


WARPERS = [
    *(dict(top_k=k) for k in (1, 4, 100)),
    *(dict(top_p=p) for p in (0.3, 0.8)),
    *(dict(min_p=p) for p in (0.2, 1.0)),
    dict(temperature=1.6, top_k=6, top_p=0.9, min_p=0.15),
    dict(repetition_penalty=1.8, top_k=5),
    dict(repetition_penalty=0.5, temperature=1.3, top_p=0.7),
]


@pytest.mark.parametrize("settings", WARPERS, ids=str)
def test_filters_are_those_of_transformers(settings):
    needs("transformers")
    from transformers.generation import logits_process as theirs

    logits = torch.randn(20, 12, generator=torch.Generator().manual_seed(5)) * 2
    ids = torch.randint(0, 12, (20, 3), generator=torch.Generator().manual_seed(6))
    seen = torch.zeros(20, 12, dtype=torch.bool).scatter_(1, ids, True)
    chain = theirs.LogitsProcessorList()
    if "repetition_penalty" in settings:
        penalty = settings["repetition_penalty"]
        chain.append(theirs.RepetitionPenaltyLogitsProcessor(penalty))
    chain.append(theirs.TemperatureLogitsWarper(float(settings.get("temperature", 1.0))))
    for name, kind in dict(top_k="TopK", top_p="TopP", min_p="MinP").items():
        if name in settings:
            chain.append(getattr(theirs, f"{kind}LogitsWarper")(settings[name]))
    wanted = chain(ids, logits.clone()).softmax(-1)
    for row, drawn in enumerate(support(logits, **settings, seen=seen)):
        allowed = set((wanted[row] > 0).nonzero().flatten().tolist())
        likely = set((wanted[row] > 0.03).nonzero().flatten().tolist())
        assert likely <= drawn <= allowed, row
    many = logits[:1].expand(20_000, -1)
    drawn = lp.sample_next(
        many, **settings, seen=seen[:1].expand(20_000, -1),
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    found = torch.bincount(drawn, minlength=12) / 20_000
    torch.testing.assert_close(found, wanted[0], atol=0.015, rtol=0)


# --- the command ---


def sample(ckpt, *flags):
    flags = [*flags, "--temperature", 0, "--max_new_tokens", 40]
    return run("sample", "--ckpt", ckpt, "--device", "cpu", *flags).ok().out


def greedy_text(ckpt, text, count=40):
    """The naive loop's text, up to an end token."""
    loaded = lp.load_model(str(ckpt))
    ids = np.array([257, *text.encode()])
    made = naive(loaded.model.eval(), torch.from_numpy(ids), count)
    end = next((i for i, token in enumerate(made) if token in (258, 259)), count)
    return lp.ByteTokenizer().decode(made[:end])


@pytest.mark.parametrize("prompt", ["", "the quick brown fox " * 20])
def test_prompts_of_any_length(prompt, tiny_checkpoint):
    assert (
        sample(tiny_checkpoint, "--prompt", prompt) == greedy_text(tiny_checkpoint, prompt) + "\n"
    )


def test_sample_prints_the_text_alone(tiny_checkpoint):
    wanted = greedy_text(tiny_checkpoint, "sun")
    flags = ["--prompt", "sun", "--temperature", "0", "--max_new_tokens", "40"]
    result = run_process("sample", "--ckpt", tiny_checkpoint, "--device", "cpu", *flags).ok()
    assert result.out == wanted + "\n"
    two = sample(tiny_checkpoint, "--prompt", "sun", "--num_samples", "2")
    assert two == f"{wanted}\n{wanted}\n"


def test_no_top_p_leaves_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    assert lp.sample_next(logits, top_p=0.0).tolist() == [1, 0]


def test_a_model_that_fails_to_generate_stays_in_training():
    model = make().train()
    with pytest.raises(TypeError):
        model.generate(torch.zeros(1, 2, dtype=torch.long), 3, no_such_setting=1)
    assert model.training
