"""What the program does on a GPU, as far as a CPU can show: simulated devices, direct calls."""

import csv
import math
import platform
from datetime import datetime, timedelta, timezone
from functools import partial

import pytest
import torch
from conftest import CPU, differences, run, words
from test_decoding import SHAPES, decode, make, naive, prompt_of
from test_training import SHORT, spoil

import llm_pipeline as lp

GIB = 2**30


@pytest.fixture
def cuda(monkeypatch):
    """Simulate an 8 GiB card with 6 GiB free; returns a dict of the memory share asked for."""
    asked = {}
    answers = dict(
        is_available=lambda: True,
        device_count=lambda: 1,
        set_device=lambda device: None,
        mem_get_info=lambda device: (6 * GIB, 8 * GIB),
        set_per_process_memory_fraction=lambda share, device: asked.update(share=share),
        get_device_capability=lambda device: (8, 9),
    )
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(lp, "KERNELS", dict(lp.KERNELS))
    return asked


# --- the runtime ---


@pytest.mark.parametrize(
    "system, limit, share",
    [
        ("6.8.0-generic", 0.0, 1.0),
        ("5.15.153.1-microsoft-standard-WSL2", 0.0, 0.75),
        ("6.8.0-generic", 2.0, 0.25),
    ],
)
def test_memory_ends_where_the_card_ends(cuda, monkeypatch, system, limit, share):
    """WSL2's driver would spill into system memory."""
    monkeypatch.setattr(platform, "release", lambda: system)
    with lp.runtime(lp.RuntimeConfig(device="cuda", vram_limit_gb=limit)) as rt:
        assert (rt.device, rt.dtype) == (torch.device("cuda:0"), torch.bfloat16)
    assert cuda["share"] == share


def test_tf32_is_for_training_alone(cuda):
    with lp.runtime(lp.RuntimeConfig(device="cuda", dtype="float32")) as rt:
        assert torch.get_float32_matmul_precision() == "highest"
        with lp.training_precision(rt.device):
            assert torch.get_float32_matmul_precision() == "high"
        assert torch.get_float32_matmul_precision() == "highest"


def test_processes_do_not_share_a_card_by_accident(corpus, tmp_path):
    flags = ["--device", "cuda:0", "--out_dir", tmp_path]
    many = dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")
    run("train", *corpus, *flags, **many).fails(1, "cuda:0", "2 processes", "--device cuda")


def test_fp16_with_lasting_nan_stops(corpus, tmp_path, monkeypatch):
    """One overflow is skipped and the scale halved; endless NaN is an error."""
    real, calls = torch.amp.GradScaler, []

    def poison(loss, batch, call):
        calls.append(call)
        if call == 3 or call > 5:
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    spoil(monkeypatch, poison)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: real(device))
    flags = [*SHORT, *words("--max_steps 60 --eval_interval 100 --save_interval 4")]
    result = run("train", *corpus, *flags, "--out_dir", tmp_path)
    result.fails(1, "gradient norm nan", "not finite", "lower --lr")
    assert 20 < len(calls) < 30


# --- threads ---


@pytest.mark.parametrize("recipe", ["classic", "fast"])
def test_powers_of_two_threads_give_the_same_bits(recipe, corpus, tmp_path):
    """At sizes large enough for PyTorch to split the work: smaller ones all run on one thread."""
    command = ["train", *corpus, *words("--preset cpu-debug --max_steps 4 --n_layer 1")]
    for n in (1, 2, 4):
        where = ["--threads", n, "--out_dir", tmp_path / str(n)]
        run(*command, "--recipe", recipe, "--dtype", "float32", *where).ok()
    for n in ("2", "4"):
        assert not differences(tmp_path / "1" / "last.pth", tmp_path / n / "last.pth")


def test_threads_are_chosen_said_and_kept(two_threads, corpus, tmp_path):
    command = ["train", *corpus, *SHORT, "--out_dir", tmp_path]
    first = run(*command, "--stop_after", 2).ok()
    chosen = lp.load_checkpoint(tmp_path / "last.pth")["config"]["threads"]
    assert chosen in (1, 2) and f"--threads {chosen}" in first.err
    resumed = run(*command, "--resume").ok()
    assert "--threads" not in resumed.err and "threads was" not in resumed.err
    assert lp.load_checkpoint(tmp_path / "last.pth")["config"]["threads"] == chosen


def test_measuring_threads_draws_nothing(two_threads):
    before, config = torch.get_rng_state(), lp.RuntimeConfig()
    shape = lp.GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=32)
    lp.choose_threads(config, lp.Runtime(torch.device("cpu"), torch.float32), shape, 4)
    assert config.threads == torch.get_num_threads()
    assert torch.equal(before, torch.get_rng_state())


# --- the log ---


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_log_goes_on_at_a_step_and_takes_further_columns(tmp_path):
    path = tmp_path / "m.csv"
    log = lp.CSVLogger(str(path))
    log.log(1, 0, "train", 2.5)
    log.log(2, 0, "train", 2.25, lr=0.1)
    log.log(2, 0, "val", 2.0, **{"a, b": 1})
    log.log(3, 0, "train", 1.5)
    with open(path, "ab") as file:  # what a crash may leave
        file.write(b"4,0,train,\xff\0\n5,0,tra")
    log = lp.CSVLogger(path, 2)
    log.log(3, 0, "train", 9.0)
    rows = rows_of(path)
    assert list(rows[0]) == [*words("step epoch split loss timestamp lr"), "a, b"]
    found = [[row[name] for name in ("step", "loss", "lr", "a, b")] for row in rows]
    assert found == [["1", "2.5", "", ""], ["2", "2.25", "0.1", ""], ["2", "2.0", "", "1"],
                     ["3", "9.0", "", ""]]  # fmt: skip
    age = datetime.now(timezone.utc) - datetime.fromisoformat(rows[0]["timestamp"])
    assert timedelta(0) <= age < timedelta(minutes=1)


def test_a_file_that_is_no_log_is_left_alone(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(lp.UserError, match="is not a log"):
        lp.CSVLogger(tmp_path / "other.csv")
    assert (tmp_path / "other.csv").read_text() == "a,b\n1,2\n"


# --- kernels and compilation ---


@pytest.fixture
def cuda_kernels(monkeypatch):
    """Use the GPU's kernels on this CPU; torch.compile only collects graphs, and compiles none."""
    graphs, compile = [], torch.compile
    twins = {(n, "cpu"): twin for (n, kind), twin in lp.KERNELS.items() if kind == "cuda"}
    monkeypatch.setattr(lp, "KERNELS", twins)
    backend = lambda module, inputs: graphs.append(module) or module.forward  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda f: compile(f, backend=backend))
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


@pytest.mark.filterwarnings("error:Dynamo detected")
def test_padded_widths_share_their_graphs(cuda_kernels):
    """The loop over chunks would make new ones for each width, and give up after eight."""
    shape = dict(vocab_size=4100, n_layer=1, n_head=2, n_kv_head=1, n_embd=16, block_size=64)
    model, rt = lp.GPT(lp.GPTConfig(**shape)), lp.Runtime(torch.device("cpu"), torch.float32)
    losses = lp.distribute(model, lp.OptimConfig(compile="on"), rt, 1)
    before = len(cuda_kernels)
    for T in (16, 32, 48):
        x = torch.randint(4100, (2, T))
        found = losses(x, x, "sum")
        torch.testing.assert_close(found, model.eval().losses(x, x, "sum"), rtol=0.02, atol=0)
        model.train()
        found.backward()
    assert len(cuda_kernels) - before <= 2


def test_compilation_that_fails_ends_no_run(capsys):
    """There is no CUDA here: what would be compiled by default runs uncompiled, with a note."""
    rt = lp.Runtime(torch.device("cuda:0"), torch.float32)
    model = lp.GPT(lp.GPTConfig(n_layer=1, n_head=1, n_embd=8))
    losses = lp.distribute(model, lp.OptimConfig(compile="auto"), rt, 10_000)
    assert type(losses) is lp.Losses
    assert "without compiling" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "sample"])
def test_compilation_that_was_asked_for_and_fails(
    command, corpus, tiny_checkpoint, tmp_path, monkeypatch
):
    def broken(*inputs):
        raise RuntimeError("fatal error: Python.h:\nNo such file")

    monkeypatch.setattr(torch, "compile", lambda function: broken)
    flags = {"train": [*corpus, *SHORT, "--out_dir", tmp_path],
             "sample": ["--ckpt", tiny_checkpoint, "--device", "cpu", "--prompt", "a"]}  # fmt: skip
    result = run(command, *flags[command], "--compile", "on")
    result.fails(1, "--compile off", "Python.h: No such file")


# --- the self-test ---


@pytest.fixture
def untrusted(monkeypatch):
    """Make the self-test compare this CPU with itself."""
    monkeypatch.setattr(lp, "TRUSTED", ())


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sound_device_passes_and_draws_nothing(untrusted, arch, dtype):
    before = torch.get_rng_state()
    shape = lp.GPTConfig(n_layer=9, n_head=4, n_kv_head=2, n_embd=64, **lp.ARCHS[arch])
    lp.self_test(shape, lp.Runtime(torch.device("cpu"), dtype))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("command", ["train", "finetune", "bench"])
def test_wrong_results_stop_a_command_before_it_begins(
    command, untrusted, corpus, tiny_checkpoint, tmp_path, monkeypatch
):
    wrong = lambda *args: lp.head_loss.plain(*args) * 1.01  # noqa: E731
    monkeypatch.setitem(lp.KERNELS, ("head_loss", "cpu"), wrong)
    flags = {"train": [*corpus, *SHORT, "--out_dir", tmp_path],
             "finetune": [*corpus, "--ckpt", tiny_checkpoint, "--out_dir", tmp_path,
                          "--report_samples", 0],
             "bench": words("--n_layer 1 --n_head 2 --n_embd 16 --rounds 1")}  # fmt: skip
    result = run(command, *CPU, *flags[command])
    result.fails(1, "cpu computes wrongly in float32: loss", "--no_self_test")
    assert not list(tmp_path.glob("*.pth"))
    if command == "train":
        run(command, *flags[command], "--no_self_test").ok()


@pytest.mark.parametrize(("factor", "said"), [(1.1, r"10\.0%"), (math.nan, "nan%")])
def test_wrong_gradients_are_noticed_too(untrusted, monkeypatch, factor, said):
    def wrong(*args):
        loss = lp.head_loss.plain(*args)
        loss.register_hook(lambda gradient: factor * gradient)
        return loss

    monkeypatch.setitem(lp.KERNELS, ("head_loss", "cpu"), wrong)
    shape = lp.GPTConfig(n_layer=1, n_head=2, n_embd=32)
    with pytest.raises(lp.UserError, match=f"gradients off by {said}"):
        lp.self_test(shape, lp.Runtime(torch.device("cpu"), torch.float32))


# --- decoding in one graph ---


@pytest.fixture
def static(monkeypatch):
    """Make a model decode with the step that graphs and compilers use, and CUDA's attention."""
    kernels = lp.KERNELS | {("attention_sdpa", "cpu"): lp.attention_on_cuda}
    monkeypatch.setattr(lp, "KERNELS", kernels)

    def make_static(model):
        model.compiled_step = partial(lp.static_logits, model)
        return model

    return make_static


@pytest.mark.parametrize("length", [1, 9, 16, 40])
@pytest.mark.parametrize("name", SHAPES)
def test_static_shapes_decode_the_same(static, name, length):
    """For every shape, also past a full cache."""
    model, prompt = make(**SHAPES[name]), prompt_of(length)
    assert decode(static(model), prompt, 45, temperature=0.0) == [naive(model, prompt, 45)]


def test_a_graph_that_fails_is_done_without(static, capsys):
    def fail(*inputs):
        raise RuntimeError("operation not permitted when stream is capturing")

    model, prompt = static(make()), prompt_of(5)
    model.compiled_step = fail
    assert decode(model, prompt, 20, temperature=0.0) == [naive(model, prompt, 20)]
    assert capsys.readouterr().err.count("without a graph") == 1
