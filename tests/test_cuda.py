"""What holds on a CPU holds on a GPU: operations, attention, decoding, dtypes, compiling, resuming.

Tests that take a `device` run on the CPU too, so that they are known to work; CUDA-only tests are
skipped, with the reason, if there is no GPU.
"""

import pytest
import torch
from conftest import SHAPE, differences, largest_difference, metrics, run, run_process, words
from test_decoding import decode, naive, prompt_of
from test_model import SHAPES, assert_close, gradients, make, random_ids, same_weights

import llm_pipeline as lp

NO_GPU = "needs a CUDA GPU: run tests/test_cuda.py on a machine that has one"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
ON_CUDA = [pytest.param("cuda", marks=needs_cuda)]
FLAGS = [*SHAPE, *words("--batch_size 4 --max_steps 12 --lr 1e-3 --log_interval 1")]


@pytest.fixture(params=DEVICES)
def device(request):
    """Each device in turn, with full fp32 products: earlier commands may have allowed TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield torch.device(request.param)
    torch.set_float32_matmul_precision(before)


def to(device, *tensors):
    return [t.to(device) for t in tensors]


# --- operations and models against the CPU in fp32 ---


@pytest.mark.parametrize("attn", ["manual", "sdpa"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_model_gives_the_logits_and_gradients_of_the_cpu(device, name, attn):
    reference = make(**SHAPES[name], attn="manual").train()
    model = same_weights(reference, attn=attn).train().to(device)
    x, y = random_ids(reference, 3), random_ids(reference, 3, seed=2)
    wanted_loss = reference.losses(x, y, "sum") / y.numel()
    wanted = {"logits": reference(x)[0], "loss": wanted_loss} | gradients(reference, wanted_loss)
    x, y = to(device, x, y)
    loss = model.losses(x, y, "sum") / y.numel()
    found = {"logits": model(x)[0], "loss": loss} | gradients(model, loss)
    assert_close({k: v.cpu() for k, v in found.items()}, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("queries", "masked"), [(33, False), (33, True), (1, True)])
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_attention_is_the_textbooks(device, dtype, heads, queries, masked):
    """Grouped keys with masks included: a kernel that is right for one may be wrong for both."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, t, 16) for n, t in ((4, queries), (heads, 33), (heads, 33)))
    mask = None
    if masked:
        mask = torch.where(torch.rand(queries, 33) < 0.3, -torch.inf, torch.randn(queries, 33))
        mask[:, 0] = 0.0  # something to see in every row
    inputs = [t.to(device, dtype).requires_grad_() for t in (q, k, v)]
    exact = [t.detach().cpu().float().requires_grad_() for t in inputs]
    there = None if mask is None else mask.to(device, dtype)
    here = None if mask is None else there.cpu().float()
    found, wanted = lp.attention_sdpa(*inputs, there, 0.0), lp.attention_manual(*exact, here, 0.0)
    found.float().square().sum().backward()
    wanted.square().sum().backward()
    error = 1e-4 if dtype == torch.float32 else 0.06
    pairs = [(found, wanted), *((a.grad, b.grad) for a, b in zip(inputs, exact, strict=True))]
    for mine, true in pairs:
        assert (mine.cpu().float() - true).norm() < error * true.norm()


def test_dropout_drops_its_share_and_keeps_the_mean(device):
    torch.manual_seed(0)
    dropped = lp.dropout(torch.ones(1 << 18, device=device), 0.3)
    assert abs(float((dropped == 0).float().mean()) - 0.3) < 0.005
    assert abs(float(dropped.mean()) - 1.0) < 0.02


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chunked_loss_is_the_plain_one(device, dtype, reduction):
    torch.manual_seed(0)
    h, weight = torch.randn(3000, 32) / 4, torch.randn(5000, 32) / 4
    y, scale = torch.randint(0, 5000, (3000,)), torch.rand(3000)
    y[:100] = lp.IGNORE
    scale = scale if reduction == "none" else torch.ones(())
    results = []
    for where, loss_of in (("cpu", lp.head_loss.plain), (device, lp.chunked_head_loss)):
        inputs = [t.clone().to(where).requires_grad_() for t in (h, weight)]
        kind = torch.device(where).type
        with torch.autocast(kind, dtype, enabled=where != "cpu" and dtype != torch.float32):
            loss = (loss_of(*inputs, y.to(where), reduction) * scale.to(where)).sum()
        loss.backward()
        results.append([t.detach().cpu().float() for t in (loss, *(i.grad for i in inputs))])
    for wanted, found in zip(*results, strict=True):
        error = 1e-4 if dtype == torch.float32 else 0.02
        assert (found - wanted).norm() < error * wanted.norm()


# --- decoding ---


@pytest.mark.parametrize("name", ["gpt2", "modern, untied, grouped", "alibi"])
def test_cached_decoding_is_the_naive_one(device, name):
    model, prompt = make(**SHAPES[name]), prompt_of(9)
    wanted = naive(model, prompt, 30)
    there = lp.for_decoding(same_weights(model), device, torch.float32)
    assert decode(there, prompt.to(device), 30, temperature=0.0) == [wanted]
    assert decode(there, prompt.to(device), 30, temperature=0.0, num_samples=3) == [wanted] * 3


# --- runs ---


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_a_resumed_run_has_the_same_bits(device, corpus, tmp_path, arch):
    flags = [*corpus, *FLAGS, "--device", device, "--arch", arch, "--deterministic"]
    run("train", *flags, "--out_dir", tmp_path / "whole").ok()
    run("train", *flags, "--out_dir", tmp_path / "parts", "--stop_after", 5).ok()
    run("train", *flags, "--out_dir", tmp_path / "parts", "--resume").ok()
    assert differences(tmp_path / "whole/last.pth", tmp_path / "parts/last.pth") == []


def losses(folder):
    return torch.tensor([float(row["loss"]) for row in metrics(folder)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_learns_as_fp32_does(device, corpus, tmp_path, dtype):
    if device.type == "cpu" and dtype == "float16":
        pytest.skip(NO_GPU)
    flags = [*corpus, *FLAGS, "--device", device, "--max_steps", 30, "--dropout", 0]
    for name in ("float32", dtype):
        run("train", *flags, "--dtype", name, "--out_dir", tmp_path / name).ok()
    exact, low = losses(tmp_path / "float32"), losses(tmp_path / dtype)
    assert exact[-1] < exact[0] - 0.5
    assert (low - exact).abs().max() < 0.1


@pytest.mark.parametrize("kind", ON_CUDA)
def test_compiling_changes_rounding_alone(kind, corpus, tmp_path):
    flags = [*corpus, *FLAGS, "--device", kind, "--dtype", "float32", "--dropout", 0]
    for compiled in ("on", "off"):
        out = ["--compile", compiled, "--out_dir", tmp_path / compiled]
        run("train", *flags, *out).ok()
    assert largest_difference(tmp_path / "on/last.pth", tmp_path / "off/last.pth") < 1e-3


@pytest.mark.parametrize("kind", ON_CUDA)
def test_out_of_memory_under_a_real_cap_goes_on_with_smaller_micro_batches(kind, tmp_path):
    """About 5 GB of activations a step, in 1.5 GB."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i * i} sheep. " for i in range(20_000)), encoding="utf-8")
    sizes = words("--n_layer 4 --n_head 4 --n_embd 256 --block_size 512 --batch_size 64")
    more = words("--dtype float32 --max_steps 3 --compile off --vram_limit_gb 1.5 --dropout 0.1")
    folders = ["--out_dir", tmp_path / "run", "--processed_dir", tmp_path / "stores"]
    flags = ["--data_dir", text, *folders, *sizes, *more, "--device", kind]
    assert "out of memory at step 1: continuing with" in run_process("train", *flags).ok().err
    assert metrics(tmp_path / "run")[-1]["step"] == "3"
