"""Sections 3 and 9: the model against references written here, and against transformers."""

import math
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import needs

import llm_pipeline as lp

MODERN = dict(pos="rope", norm="rmsnorm", mlp="swiglu", qk_norm=True, bias=False, norm_eps=1e-6)
SHAPES = {
    "gpt2": {},
    "gpt2 without biases": dict(bias=False),
    "relu": dict(mlp="relu"),
    "gelu_tanh": dict(mlp="gelu_tanh"),
    "swiglu with biases": dict(mlp="swiglu"),
    "rmsnorm": dict(norm="rmsnorm"),
    "qk_norm": dict(qk_norm=True),
    "rope": dict(pos="rope"),
    "alibi": dict(pos="alibi"),
    "alibi, six heads": dict(pos="alibi", n_head=6, n_embd=48),
    "alibi, grouped": dict(pos="alibi", n_kv_head=2),
    "one head": dict(n_head=1),
    "grouped": dict(n_kv_head=2),
    "one key head": dict(n_kv_head=1),
    "modern": MODERN,
    "modern, untied, grouped": MODERN | dict(tie_weights=False, n_kv_head=2, rope_theta=500.0),
    "modern, wide heads": MODERN | dict(head_dim=10),
}


def make(seed=0, **shape):
    """A small model whose every parameter, norms and biases included, is random."""
    shape = dict(vocab_size=61, block_size=16, n_layer=2, n_head=4, n_embd=32, dropout=0.0) | shape
    torch.manual_seed(seed)
    model = lp.GPT(lp.GPTConfig(**shape)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.ndim == 1 else 0.0, 0.25)
    return model


def same_weights(model, **changes):
    """The same weights in a model with other settings."""
    settings = {k: v for k, v in vars(model.config).items() if k != "explicit"} | changes
    twin = lp.GPT(lp.GPTConfig(**settings)).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def random_ids(model, batch=2, length=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(found, wanted, rtol=1e-4, atol=1e-5):
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(
            found[name], wanted[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- the whole model, one query at a time, in double precision ---


def alibi_slopes(n_heads):
    """The paper's rule, as published: powers of 2^(-8/n), with every other one for 2n between."""
    if math.log2(n_heads).is_integer():
        start = 2 ** (-(2 ** -(math.log2(n_heads) - 3)))
        return [start * start**i for i in range(n_heads)]
    closest = 2 ** math.floor(math.log2(n_heads))
    return alibi_slopes(closest) + alibi_slopes(2 * closest)[0::2][: n_heads - closest]


def reference_logits(model, ids):
    c, w = model.config, {k: v.double() for k, v in model.state_dict().items()}
    q_width, kv_width = c.n_head * c.head_dim, c.n_kv_head * c.head_dim

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def rms(x, weight):
        return x / ((x * x).mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight

    def norm(x, name):
        if c.norm == "rmsnorm":
            return rms(x, w[f"{name}.weight"])
        x = x - x.mean(-1, keepdim=True)
        x = x / ((x * x).mean(-1, keepdim=True) + c.norm_eps).sqrt()
        return x * w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0)

    def turned(vector, t):
        if c.pos != "rope":
            return vector
        pairs = torch.complex(vector[: c.head_dim // 2], vector[c.head_dim // 2 :])
        for i in range(c.head_dim // 2):
            angle = t * c.rope_theta ** (-2 * i / c.head_dim)
            pairs[i] *= complex(math.cos(angle), math.sin(angle))
        return torch.cat([pairs.real, pairs.imag])

    def attention(x, name):
        rows = linear(x, f"{name}.qkv")
        q = rows[:, :q_width].view(-1, c.n_head, c.head_dim)
        k = rows[:, q_width : q_width + kv_width].view(-1, c.n_kv_head, c.head_dim)
        v = rows[:, q_width + kv_width :].view(-1, c.n_kv_head, c.head_dim)
        if c.qk_norm:
            q, k = rms(q, w[f"{name}.q_norm.weight"]), rms(k, w[f"{name}.k_norm.weight"])
        out = torch.zeros_like(q)
        for h in range(c.n_head):
            kv = h // (c.n_head // c.n_kv_head)
            slope = alibi_slopes(c.n_head)[h] if c.pos == "alibi" else 0.0
            for t in range(len(x)):
                scores = [
                    turned(q[t, h], t) @ turned(k[s, kv], s) / math.sqrt(c.head_dim)
                    - slope * (t - s)
                    for s in range(t + 1)
                ]
                out[t, h] = torch.stack(scores).softmax(0) @ v[: t + 1, kv]
        return linear(out.flatten(1), f"{name}.proj")

    def mlp(x, name):
        up = linear(x, f"{name}.up")
        if c.mlp == "swiglu":
            gate, value = up.chunk(2, -1)
            up = gate / (1 + (-gate).exp()) * value
        elif c.mlp == "relu":
            up = up * (up > 0)
        elif c.mlp == "gelu":
            up = up * (1 + torch.erf(up / math.sqrt(2))) / 2
        else:
            up = up * (1 + (math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)).tanh()) / 2
        return linear(up, f"{name}.down")

    x = w["tok_emb.weight"][ids]
    if c.pos == "learned":
        x = x + w["positions.weight"][: len(ids)]
    for i in range(c.n_layer):
        x = x + attention(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn")
        x = x + mlp(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp")
    return norm(x, "norm_f") @ w["head.weight"].T


@pytest.mark.parametrize("attn", ["manual", "sdpa"])
@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_the_reference(name, attn):
    model = make(**SHAPES[name], attn=attn)
    ids = random_ids(model, 1, 12)
    with torch.no_grad():
        found = model(ids)[0][0].double()
    torch.testing.assert_close(found, reference_logits(model, ids[0]), rtol=1e-4, atol=1e-4)


def test_alibi_slopes_are_those_of_the_paper():
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    for n_head in (1, 2, 3, 6, 8, 12, 16):
        config = lp.GPTConfig(n_head=n_head, n_embd=4 * n_head, pos="alibi")
        bias = lp.alibi(config, torch.tensor([7]), torch.tensor([7, 6, 0]))
        slopes = torch.tensor(alibi_slopes(n_head))
        torch.testing.assert_close(bias[:, 0, 1], -slopes)
        torch.testing.assert_close(bias[:, 0, 2], -7 * slopes)
        assert (bias[:, 0, 0] == 0).all()


# --- explicit and fused attention ---


@pytest.mark.parametrize("name", SHAPES)
def test_manual_equals_sdpa_forward_and_backward(name):
    manual = make(**SHAPES[name], attn="manual").train()
    fused = same_weights(manual, attn="sdpa").train()
    x, y = random_ids(manual, 3), random_ids(manual, 3, seed=2)
    results = []
    for model in (manual, fused):
        logits, loss = model(x, y)
        results.append({"logits": logits, "loss": loss} | gradients(model, loss))
    assert_close(results[1], results[0])


def cached_logits(model, ids, prefill):
    """Logits of `ids`, of which the first `prefill` go into the cache at once, the rest singly."""
    cache = lp.KVCache(model.config, len(ids), ids.device, torch.float32)
    parts = [ids[:, :prefill], *ids[:, prefill:].split(1, 1)]
    with torch.no_grad():
        return torch.cat([model.head(model.hidden(part, cache)) for part in parts], 1)


@pytest.mark.parametrize("attn", ["manual", "sdpa"])
@pytest.mark.parametrize("name", SHAPES)
def test_logits_with_a_cache_equal_those_without(name, attn):
    model = make(**SHAPES[name], attn=attn)
    ids = random_ids(model)
    with torch.no_grad():
        whole, _ = model(ids)
    for prefill in (1, 7, 15):
        torch.testing.assert_close(cached_logits(model, ids, prefill), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attn", ["manual", "sdpa"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_token_changes_nothing_before_it(name, attn):
    model = make(**SHAPES[name], attn=attn)
    ids = random_ids(model, 1)
    with torch.no_grad():
        before = model(ids)[0][0]
        for t in (0, 5, 15):
            changed = ids.clone()
            changed[0, t] = (ids[0, t] + 1) % 61
            after = model(changed)[0][0]
            torch.testing.assert_close(after[:t], before[:t], rtol=1e-5, atol=1e-6)
            assert (after[t] - before[t]).abs().max() > 1e-2


@pytest.mark.parametrize("name", SHAPES)
def test_layers_stand_on_a_config_alone(name):
    """A block by itself computes what it does inside the model."""
    model = make(**SHAPES[name])
    seen = {}
    model.blocks[0].register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
    with torch.no_grad():
        model(random_ids(model))
        torch.testing.assert_close(model.blocks[0](seen["x"]), seen["y"])
        fresh = lp.CausalSelfAttention(model.config)
        assert fresh(seen["x"]).shape == seen["x"].shape


def test_generate_continues_each_row():
    """As a naive loop does that feeds the whole row again for each token."""
    model = make(pos="rope")
    ids = random_ids(model, 3, 5)
    found = model.generate(ids, 8, temperature=0.0)
    wanted = ids
    with torch.no_grad():
        for _ in range(8):
            wanted = torch.cat([wanted, model(wanted)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(found, wanted)
    again = model.generate(ids, 8, top_k=5, seed=3)
    assert torch.equal(again, model.generate(ids, 8, top_k=5, seed=3))
    assert not torch.equal(again, model.generate(ids, 8, top_k=5, seed=4))


# --- the same weights in transformers ---


def assert_equals_transformers(model, peer):
    tensors = lp.to_hf(lp.model_weights(model), model.config)
    missing, unexpected = peer.load_state_dict(tensors, strict=False)
    tied = {"lm_head.weight"} if model.config.tie_weights else set()
    assert set(missing) <= tied and not unexpected
    peer.tie_weights()
    ids = random_ids(model, 2, model.config.block_size)
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[0], peer.eval()(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", [{}, dict(n_head=1), dict(n_inner=40, mlp="gelu_tanh")])
def test_gpt2_is_transformers_gpt2(shape, tied):
    transformers = needs("transformers")
    model = make(**shape, tie_weights=tied)
    c = model.config
    act = {"gelu": "gelu", "gelu_tanh": "gelu_new"}[c.mlp]
    peer = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=61, n_positions=16, n_embd=32, n_layer=2, n_head=c.n_head,
            n_inner=c.n_inner, activation_function=act, tie_word_embeddings=tied,
        )
    )  # fmt: skip
    assert_equals_transformers(model, peer)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        dict(n_kv_head=2),
        dict(n_kv_head=1, head_dim=12),
        dict(head_dim=16, n_inner=24, rope_theta=1e6),
    ],
    ids=str,
)
def test_modern_is_transformers_qwen3(shape, tied):
    transformers = needs("transformers")
    model = make(**MODERN | shape, tie_weights=tied)
    c = model.config
    peer = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=61, hidden_size=32, intermediate_size=c.n_inner, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim,
            max_position_embeddings=16, rms_norm_eps=1e-6, tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        )
    )  # fmt: skip
    assert_equals_transformers(model, peer)


# --- the loss ---


def test_logits_and_losses():
    model = make()
    x, y = random_ids(model), random_ids(model, seed=2)
    y[0, 3:] = lp.IGNORE
    logits, mean = model(x, y)
    assert logits.shape == (2, 16, 61) and model(x)[1] is None
    naive = [-logits[b, t].log_softmax(0)[y[b, t]] for b in range(2) for t in range(16)
             if y[b, t] != lp.IGNORE]  # fmt: skip
    torch.testing.assert_close(mean, torch.stack(naive).mean())
    torch.testing.assert_close(model.losses(x, y, "sum"), torch.stack(naive).sum())
    single = model.losses(x, y)
    assert single.shape == (2, 16) and (single[0, 3:] == 0).all()
    torch.testing.assert_close(single.sum(), torch.stack(naive).sum())


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_cross_entropy_equals_the_plain_one(dtype, tied, reduction):
    model = make(vocab_size=5000, block_size=160, n_layer=1, n_embd=16, tie_weights=tied)
    with torch.no_grad():
        model.norm_f.weight.fill_(0.5)
    x, y = random_ids(model, 24, 150), random_ids(model, 24, 150, seed=2)  # several chunks
    y[0, :50] = y[-1, -7:] = y[13] = lp.IGNORE
    weights = torch.rand(24, 150) if reduction == "none" else torch.ones(24, 150)
    results = []
    for plain in (True, False):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            if plain:
                flat = model(x)[0].view(-1, 5000)
                losses = F.cross_entropy(flat, y.ravel(), ignore_index=lp.IGNORE, reduction="none")
                loss = (losses.view_as(y) * weights).sum()
            else:
                losses = model.losses(x, y, reduction)
                loss = losses if reduction == "sum" else (losses * weights).sum()
        results.append({"loss": loss} | gradients(model, loss / 3))
    for name, wanted in results[0].items():
        error = (results[1][name] - wanted).norm() / wanted.norm().clamp(min=1e-6)
        assert error < (1e-5 if dtype == torch.float32 else 2e-2), f"{name}: {error}"


def test_all_targets_ignored_gives_no_loss_and_no_gradient():
    model = make(vocab_size=5000)
    x = random_ids(model)
    loss = model.losses(x, torch.full_like(x, lp.IGNORE), "sum")
    assert loss == 0
    assert all((g == 0).all() for g in gradients(model, loss).values())


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_hopeless_target_costs_what_it_should(reduction):
    """Its probability underflows in fp32; the loss must not stop at 85 nats."""
    h, weight = torch.full((2, 8), 5.0), torch.zeros(5000, 8)
    weight[7] = 5.0  # a logit of 200, the others 0
    y = torch.tensor([9, 7])
    found = lp.head_loss(h, weight, y, reduction)
    wanted = lp.head_loss.plain(h, weight, y, reduction)
    assert wanted.max() > 199
    torch.testing.assert_close(found, wanted)


# --- a softmax over sampled ids ---


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("vocab_size", [300, 5000])  # logits whole, and in chunks
def test_a_softmax_over_all_ids_in_another_order_is_the_softmax(vocab_size, reduction):
    model = make(vocab_size=vocab_size, tie_weights=False).train()
    x, y = random_ids(model, 8), random_ids(model, 8, seed=2)
    y[0, :7] = lp.IGNORE
    results = []
    for losses in (model.losses, lp.over_sampled_ids(model.losses, vocab_size - 1, vocab_size)):
        loss = losses(x, y, reduction)
        results.append({"losses": loss.detach()} | gradients(model, loss.sum()))
    assert_close(results[1], results[0])


@pytest.mark.parametrize(("vocab_size", "n"), [(300, 100), (5000, 2500)])
def test_sampled_ids_stand_for_the_others(vocab_size, n):
    """Each softmax holds the targets; over many draws its denominator is that of all ids."""
    torch.manual_seed(0)
    h, weight = torch.randn(5, 8), torch.randn(vocab_size, 8) * 0.3
    targets = torch.tensor([[7, lp.IGNORE, 7, 299, 0]])
    seen = []

    def losses(idx, places, reduction, among):
        ids, bias = among
        assert len(ids) == 3 + n and ids.unique().shape == ids.shape
        assert torch.equal(ids[places.clamp(min=0)][places >= 0], targets[targets >= 0])
        assert (bias[:3] == 0).all() and places[0, 1] == lp.IGNORE
        found = lp.head_loss(h, weight[ids], places.flatten(), "none", bias)
        plain = lp.head_loss.plain(h, weight[ids], places.flatten(), "none", bias)
        torch.testing.assert_close(found, plain)
        # loss = log(denominator) - logit
        logits = (h * weight[targets.clamp(min=0)[0]]).sum(-1)
        seen.append((found + logits).exp()[places[0] >= 0])

    sampled = lp.over_sampled_ids(losses, n, vocab_size)
    for _ in range(400):
        sampled(targets, targets)
    found = torch.stack(seen)
    wanted = (h @ weight.T).exp().sum(-1)[targets[0] >= 0]
    error = found.std(0) / 400**0.5
    assert ((found.mean(0) - wanted).abs() < 4 * error).all()
    assert (error < 0.02 * wanted).all()  # or the test proves nothing


# --- the faster twins of section 9 ---


@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (1, 9), (1, 90)])
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_attention_equals_the_textbooks(dtype, masked, heads, queries, keys):
    torch.manual_seed(0)
    shapes = (4, queries), (heads, keys), (heads, keys)
    q, k, v = (torch.randn(2, *shape, 8, dtype=dtype) for shape in shapes)
    mask = torch.randn(4, queries, keys, dtype=dtype) if masked else None
    found = lp.attention_folded(q, k, v, mask, 0.0)
    wanted = lp.attention_manual(q, k, v, mask, 0.0)
    tight = dtype == torch.float32
    torch.testing.assert_close(
        found, wanted, rtol=1e-5 if tight else 0.05, atol=1e-5 if tight else 0.05
    )


def test_dropout_by_bytes_keeps_the_mean_and_drops_the_share():
    x = torch.ones(1 << 20)
    for p in (0.001, 0.1, 0.5, 0.9):
        torch.manual_seed(0)
        mine, torchs = lp.dropout_by_bytes(x, p), F.dropout(x, p)
        assert (mine == 0).sum() > 0
        assert abs((mine == 0).float().mean() - p) < 0.003
        assert abs(mine.mean() - torchs.mean()) < 0.01


# --- construction ---


def test_initial_weights():
    depth = 8
    model = lp.GPT(lp.GPTConfig(vocab_size=500, n_layer=depth, n_head=4, n_embd=128, bias=True))
    for name, p in model.named_parameters():
        residual = name.endswith(("attn.proj.weight", "mlp.down.weight"))
        if p.ndim == 2:
            wanted = 0.02 / math.sqrt(2 * depth) if residual else 0.02
            assert abs(p.std().item() / wanted - 1) < 0.05, name
            assert abs(p.mean().item()) < wanted / 20, name
        else:
            assert (p == (0.0 if name.endswith("bias") else 1.0)).all(), name


def test_zero_init_makes_each_block_the_identity():
    model = lp.GPT(lp.GPTConfig(n_layer=2, n_head=2, n_embd=32, zero_init=True, **MODERN)).eval()
    ids = random_ids(model)
    with torch.no_grad():
        wanted = model.head(model.norm_f(model.tok_emb(ids)))
        torch.testing.assert_close(model(ids)[0], wanted)


def test_first_loss_is_that_of_a_uniform_guess():
    model = lp.GPT(lp.GPTConfig(n_layer=2, n_head=4, n_embd=64)).eval()
    x, y = random_ids(model, 8, 64), random_ids(model, 8, 64, seed=2)
    loss = model.losses(x, y).mean()
    assert abs(loss.item() - math.log(260)) < 0.1


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_one_matrix(tied):
    model = make(tie_weights=tied)
    assert (model.head.weight is model.tok_emb.weight) is tied
    assert model.n_params() == make(tie_weights=True).n_params() + (0 if tied else 61 * 32)
    with torch.no_grad():
        model.tok_emb.weight.zero_()
    assert (model.head.weight == 0).all().item() is tied


def test_parameter_counts_are_the_published_ones():
    with torch.device("meta"):
        sizes = lp.PRESETS["gpt2-124m"]
        shape = {k: sizes[k] for k in ("block_size", "n_layer", "n_head", "n_embd")}
        gpt2 = lp.GPT(lp.GPTConfig(vocab_size=50257, **shape))
        qwen3 = lp.GPT(  # Qwen3-0.6B
            lp.GPTConfig(
                vocab_size=151936, n_layer=28, n_head=16, n_kv_head=8, n_embd=1024, head_dim=128,
                n_inner=3072, **MODERN
            )
        )  # fmt: skip
    assert gpt2.n_params() == 124_439_808
    assert qwen3.n_params() == 596_049_920


def test_impossible_shapes_are_refused():
    for shape in (dict(n_embd=30, n_head=4), dict(n_head=4, n_embd=32, n_kv_head=3),
                  dict(pos="rope", n_embd=12, n_head=4)):  # fmt: skip
        with pytest.raises(lp.UserError):
            lp.GPT(lp.GPTConfig(n_layer=1, **shape))
    with pytest.raises(ValueError, match="block_size"):
        make()(torch.zeros(1, 17, dtype=torch.long))


def test_positions_without_a_table_go_beyond_the_block():
    for pos in ("rope", "alibi"):
        assert make(pos=pos)(torch.zeros(1, 40, dtype=torch.long))[0].shape == (1, 40, 61)


def test_dropout_acts_in_training_alone():
    model = make(dropout=0.5)
    ids = random_ids(model)
    with torch.no_grad():
        assert torch.equal(model(ids)[0], model(ids)[0])
        for attn in ("manual", "sdpa"):
            noisy = same_weights(model, attn=attn).train()
            assert not torch.equal(noisy(ids)[0], noisy(ids)[0])


@pytest.mark.parametrize("name", ["gpt2", "modern, untied, grouped", "alibi"])
def test_checkpointing_gives_the_same_gradients(name):
    model = make(**SHAPES[name] | dict(dropout=0.2)).train()
    x, y = random_ids(model), random_ids(model, seed=2)
    results = []
    for model.grad_checkpointing in (False, True):
        torch.manual_seed(3)
        loss = model.losses(x, y, "sum")
        results.append({"loss": loss} | gradients(model, loss))
    assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(
    not (os.environ.get("LLM_PIPELINE_SLOW") and shutil.which("g++")),
    reason="compiles for a minute: needs a C++ compiler and LLM_PIPELINE_SLOW=1",
)
@pytest.mark.parametrize("name", ["gpt2", "modern, untied, grouped"])
def test_compiled_equals_eager(name):
    model = make(**SHAPES[name]).train()
    x, y = random_ids(model), random_ids(model, seed=2)
    results = []
    for net in (lp.Losses(model), torch.compile(lp.Losses(model))):
        loss = net(x, y, "sum")
        results.append({"loss": loss.detach()} | gradients(model, loss))
    assert_close(results[1], results[0])


@pytest.mark.parametrize("pos", ["learned", "rope"])
def test_token_dropout_hides_whole_tokens_in_training_alone(pos):
    """Their embeddings, not their positions; the others are scaled to keep the mean."""
    model = make(pos=pos, token_dropout=0.25, block_size=512, vocab_size=61)
    ids, seen = random_ids(model, 8, 512), []
    model.drop.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for mode in (False, True):
            torch.manual_seed(0)
            model.train(mode)(ids)
    place = model.positions(torch.arange(512)) if pos == "learned" else 0.0
    whole = model.tok_emb(ids)
    torch.testing.assert_close(seen[0], whole + place)
    found = seen[1] - place
    hidden = found.abs().amax(-1) < 1e-6
    assert abs(float(hidden.float().mean()) - 0.25) < 0.03
    torch.testing.assert_close(found[~hidden], whole[~hidden] / 0.75, rtol=1e-4, atol=1e-5)
