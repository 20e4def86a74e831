"""The training loop: exactness, resume, schedules, optimizers, stopping, faults in a step."""

import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    CPU,
    SHAPE,
    TINY,
    curve,
    differences,
    largest_difference,
    metrics,
    run,
    run_process,
    tensors,
    words,
    write_corpus,
)

import llm_pipeline as lp

SHORT = [*CPU, *SHAPE, *words("--batch_size 8 --max_steps 10 --lr 1e-3 --log_interval 1")]
TUNE = [*CPU, *words("--batch_size 4 --max_steps 8 --report_samples 0 --log_interval 1")]


def progress(path: Path) -> dict:
    return lp.load_checkpoint(path)["progress"]


def spoil(monkeypatch, change) -> None:
    """Inject a fault: `change(loss, batch, step)` sees every training loss before backward."""
    objective = lp.OBJECTIVES["ntp"]
    calls = []

    def spoiled(losses, batch, config):
        loss, stats = objective(losses, batch, config)
        if torch.is_grad_enabled():
            calls.append(1)
            loss = change(loss, batch, len(calls))
        return loss, stats

    monkeypatch.setitem(lp.OBJECTIVES, "ntp", spoiled)


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory, corpus) -> Path:
    """A base whose block holds whole records, so that batches of them are padded."""
    folder = tmp_path_factory.mktemp("wide")
    run("train", *corpus, *TINY, *words("--block_size 128 --max_steps 4"), "--out_dir", folder).ok()
    return folder / "best.pth"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus) -> Path:
    """The folder of an undisturbed run of SHORT; read-only."""
    folder = tmp_path_factory.mktemp("whole")
    run("train", *corpus, *SHORT, "--out_dir", folder).ok()
    return folder


# --- it learns ---


def test_overfit_batch(tmp_path):
    """The sanity check before a long run: a hundred steps learn one batch by heart."""
    flags = words("--preset cpu-debug --overfit_batch --max_steps 100 --lr 1e-2 --n_layer 1")
    flags += words("--n_embd 64 --block_size 32 --device cpu")
    result = run("train", *flags, "--out_dir", tmp_path / "run", cwd=tmp_path).ok()
    line = result.err.strip().splitlines()[-1]
    assert float(line.split(" loss ")[1].split()[0]) < 0.05, line
    assert not list(tmp_path.glob("run/*.pth"))  # nothing is saved


def test_training_lowers_the_loss(corpus, tmp_path):
    flags = [*TINY, *words("--max_steps 60 --lr 1e-2 --dropout 0 --log_interval 1")]
    run("train", *corpus, *flags, "--out_dir", tmp_path).ok()
    losses = [float(loss) for _, loss in curve(tmp_path)]
    assert losses[0] == pytest.approx(math.log(260), abs=0.3)
    assert sum(losses[-5:]) / 5 < losses[0] - 2


# --- the same command, the same bits ---


def test_same_command_same_bits(whole, corpus, tmp_path):
    run_process("train", *corpus, *SHORT, "--out_dir", tmp_path).ok()
    for name in ("best.pth", "last.pth"):
        assert differences(whole / name, tmp_path / name) == []
    for split in ("train", "val"):
        assert curve(whole, split) == curve(tmp_path, split)


@pytest.mark.parametrize(
    "change",
    [
        "--eval_interval 1",
        "--eval_interval 3 --eval_batches 1",
        "--log_interval 7",
        "--save_interval 1",
        "--patience 9",
    ],
)
def test_looking_does_not_disturb(change, whole, corpus, tmp_path):
    run("train", *corpus, *SHORT, *words(change), "--out_dir", tmp_path).ok()
    assert differences(whole / "last.pth", tmp_path / "last.pth") == []


def test_a_sampled_softmax_is_for_training_alone(corpus, tmp_path):
    """At a rate that moves no weight, validation is the same to the last bit."""
    command = ["train", *corpus, *SHORT, *words("--lr 1e-30 --dropout 0 --log_interval 1")]
    for n in (0, 20):
        run(*command, "--sampled_softmax", n, "--out_dir", tmp_path / str(n)).ok()
    assert curve(tmp_path / "0", "val") == curve(tmp_path / "20", "val")
    assert curve(tmp_path / "0", "train") != curve(tmp_path / "20", "train")


# --- resume, bit for bit ---

RESUMED = {
    "adamw": "--eval_interval 3",
    "accumulation": "--grad_accum 4 --eval_interval 4",
    "muon": "--optimizer muon",
    "fast": "--recipe fast",
    "modern, checkpointing": "--arch modern --grad_checkpointing --n_kv_head 1",
    "sliding": "--stride 5 --max_steps 10",
    "answers": "--answer_weight 7 --grad_accum 2",
    "sampled softmax": "--sampled_softmax 20 --grad_accum 2 --dropout 0.1",
}


def resumed_is_whole(command: list, folder: Path, steps: int, suffix: str = "") -> None:
    """A run resumed at each of its steps, and one resumed once that then crosses the end of an
    epoch, both end like the uninterrupted run."""
    whole, split = folder / "whole", folder / "split"
    run(*command, "--out_dir", whole).ok()
    for stops in ([1] * (steps - 1), [3]):
        shutil.rmtree(split, ignore_errors=True)
        for done, more in zip(itertools.accumulate(stops), stops, strict=True):
            stopped = run(*command, "--out_dir", split, "--resume", "--stop_after", more).ok()
            assert progress(split / f"last{suffix}.pth")["step"] == done, stopped.err
        run(*command, "--out_dir", split, "--resume").ok()
        for name in (f"last{suffix}.pth", f"best{suffix}.pth"):
            assert differences(whole / name, split / name) == [], (stops, name)
        for part in ("train", "val"):
            assert curve(whole, part, suffix) == curve(split, part, suffix), stops


@pytest.mark.parametrize("name", RESUMED)
def test_resume_from_every_step(name, corpus, tmp_path):
    """10 steps are two and a half epochs, so some stops fall on the end of an epoch."""
    resumed_is_whole(["train", *corpus, *SHORT, *words(RESUMED[name])], tmp_path, 10)
    if name not in ("sliding", "answers", "fast"):  # two of them read whole records
        assert {row["epoch"] for row in metrics(tmp_path / "whole")} == {"0", "1", "2"}


@pytest.mark.parametrize("flags", ["", "--method lora --lora_dropout 0.1 --loss_on response"])
def test_resume_finetune_from_every_step(flags, corpus, wide_checkpoint, tmp_path):
    command = ["finetune", *corpus[:4], *TUNE, "--ckpt", wide_checkpoint, *words(flags)]
    resumed_is_whole(command, tmp_path, 8, "_finetune")


def test_resume_of_a_mistyped_folder_begins_no_run_of_defaults(tmp_path):
    result = run("train", "--resume", "--out_dir", tmp_path / "typo")
    result.fails(1, "typo holds no run to resume")
    assert not (tmp_path / "typo/config.json").exists()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, corpus) -> Path:
    """The folder of a run stopped at step 4; read-only."""
    folder = tmp_path_factory.mktemp("stopped")
    run("train", *corpus, *SHORT, "--out_dir", folder, "--stop_after", 4).ok()
    return folder


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("--lr 2e-3", "lr"),
        ("--seed 9", "seed"),
        ("--batch_size 4", "batch_size"),
        ("--n_embd 64", "n_embd"),
        ("--weight_decay 0.2", "weight_decay"),
        ("--max_steps 20", "max_steps"),
        ("--optimizer muon", "optimizer"),
        ("--dropout 0", "dropout"),
        ("--stride 3", "stride"),
        ("--split_seed 5", "split_seed"),
    ],
)
def test_resume_refuses_a_changed_setting_by_name(flags, name, stopped, corpus, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    command = ["train", *corpus, *SHORT, *words(flags), "--resume", "--out_dir", tmp_path / "run"]
    result = run(*command)
    result.fails(result.code or 1, name)
    assert (tmp_path / "run/last.pth").read_bytes() == (stopped / "last.pth").read_bytes()


def test_resume_refuses_changed_data(tmp_path):
    write_corpus(tmp_path / "raw")
    command = ["train", *SHORT, *words("--data_dir raw --processed_dir stores --out_dir run")]
    run(*command, "--stop_after", 4, cwd=tmp_path).ok()
    with open(tmp_path / "raw/words.jsonl", "a") as file:
        file.write(json.dumps({"text": "one more record"}) + "\n")
    run(*command, "--resume", cwd=tmp_path).fails(1, "data")


@pytest.mark.parametrize("name", ["torch", "threads"])
def test_resume_warns_of_another_version(name, stopped, corpus, tmp_path):
    command = ["train", *corpus, *SHORT, "--out_dir", tmp_path]
    state = lp.load_checkpoint(stopped / "last.pth")
    state["versions"][name] = "2.10.0" if name == "torch" else 64
    lp.save_checkpoint(tmp_path / "last.pth", state)
    result = run(*command, "--resume").ok()
    assert any(name in line for line in result.err.splitlines() if "warning" in line), result.err


# --- gradients ---


def first_gradient(folder: Path, *command) -> dict[str, torch.Tensor]:
    """AdamW's first moment after one step is a tenth of the gradient."""
    run(*command, *words("--max_steps 1 --grad_clip 0"), "--out_dir", folder).ok()
    suffix = "_finetune" if command[0] == "finetune" else ""
    found = tensors(folder / f"last{suffix}.pth", ("optimizer",))
    return {n: t * 10 for n, t in found.items() if n.endswith(".exp_avg")}


@pytest.mark.parametrize("loss_on", ["all", "response"])
def test_accumulation_gives_the_same_gradient_on_padded_batches(
    loss_on, corpus, wide_checkpoint, tmp_path
):
    """Records of different lengths: dividing by micro-batches instead of targets would differ."""
    command = ["finetune", *corpus[:4], *CPU, "--ckpt", wide_checkpoint, "--loss_on", loss_on]
    command += words("--batch_size 8 --dropout 0 --report_samples 0")
    whole = first_gradient(tmp_path / "1", *command)
    for accum in (2, 4):
        parts = first_gradient(tmp_path / f"{accum}", *command, "--grad_accum", accum)
        for name, gradient in whole.items():
            distance = (parts[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
            assert distance < 1e-5, (accum, name, float(distance))


def small_store(corpus):
    return lp.build_corpus_from_sources(corpus[1], processed_dir=corpus[3], val_fraction=0.2)


def batch_of(data, numbers) -> lp.Batch:
    return data.collate([data[i] for i in numbers])


def test_padding_does_not_count(corpus):
    """The loss of a padded batch is the sum of its records' losses, each alone without padding."""
    store = small_store(corpus)
    model = lp.GPT(lp.GPTConfig(block_size=128, n_layer=1, n_head=2, n_embd=32)).eval()
    for loss_on in ("all", "response"):
        records = lp.InstructionDataset(store, "train", 128, loss_on=loss_on)
        batch = batch_of(records, range(len(records)))
        assert (batch.y != lp.IGNORE).sum() == batch.n_targets < batch.y.numel()
        whole = model.losses(batch.x, batch.y, "sum")
        alone = [batch_of(records, [i]) for i in range(len(records))]
        assert len({one.x.shape[1] for one in alone}) > 1
        assert whole.item() == pytest.approx(
            sum(model.losses(one.x, one.y, "sum").item() for one in alone), rel=1e-5
        )


def test_answers_that_weigh_more(corpus):
    """The loss is that of all tokens plus six times that of the answers alone; halves add up."""
    store = small_store(corpus)
    model = lp.GPT(lp.GPTConfig(block_size=64, n_layer=1, n_head=2, n_embd=32)).eval()
    weighted = lp.InstructionDataset(store, "train", 64, answer_weight=7)
    ids = range(len(weighted))
    loss, _ = lp.next_token_loss(model.losses, batch_of(weighted, ids))
    first = batch_of(weighted, ids[:8])
    halves = [lp.next_token_loss(model.losses, half)[0] for half in first.split(2)]
    one = lp.next_token_loss(model.losses, first)[0]
    assert sum(halves).item() == pytest.approx(one.item(), rel=1e-5)
    sums, counts = [], []
    for loss_on in ("all", "response"):
        batch = batch_of(lp.InstructionDataset(store, "train", 64, loss_on), ids)
        sums.append(lp.next_token_loss(model.losses, batch)[0].item())
        counts.append(batch.n_targets)
    assert loss.item() == pytest.approx(sums[0] + 6 * sums[1], rel=1e-5)
    assert batch_of(weighted, ids).n_targets == counts[0] + 6 * counts[1]


def test_the_gradient_is_of_the_mean_over_targets(corpus, tmp_path):
    """By hand: the seeded model, the first batch of the first epoch, one backward pass."""
    base = ["train", *corpus, *TINY, *words("--dropout 0 --grad_clip 0 --log_interval 1")]
    gradient = first_gradient(tmp_path / "a", *base)
    first = float(curve(tmp_path / "a")[0][1])
    state = lp.load_checkpoint(tmp_path / "a/last.pth")
    torch.manual_seed(state["config"]["seed"])
    start = lp.GPT(lp.GPTConfig(**state["model_config"]))
    train, _ = lp.create_dataloaders(small_store(corpus), 32, 4, state["config"]["seed"])
    _, loss = start(*next(iter(train)))
    assert loss.item() == pytest.approx(first, rel=1e-5)
    loss.backward()
    for name, parameter in start.named_parameters():
        wanted = gradient[f"optimizer.{name}.exp_avg"]
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-6)


def test_weight_decay_is_on_matrices_only(corpus, tmp_path):
    """After one step with and without decay, only the decayed weights differ."""
    base = ["train", *corpus, *TINY, *words("--max_steps 1 --dropout 0 --lr 0.01")]
    run(*base, "--weight_decay", 0, "--out_dir", tmp_path / "a").ok()
    run(*base, "--weight_decay", 1, "--out_dir", tmp_path / "b").ok()
    free, decayed = (tensors(tmp_path / f"{x}/last.pth", ("weights",)) for x in "ab")
    for name, weight in free.items():
        moved = not torch.equal(weight, decayed[name])
        assert moved == (weight.ndim == 2), name


# --- schedules and optimizers ---


def closed_form(schedule: str, step: int, total: int, warmup: int) -> float:
    """Share of the full rate at step 0, 1, ..., with min_lr_ratio 0.1 and decay_fraction 0.5."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    t = (step - warmup) / (total - warmup)
    return {
        "constant": 1.0,
        "linear": 1 - 0.9 * t,
        "cosine": 0.1 + 0.9 * (1 + math.cos(math.pi * t)) / 2,
        "wsd": 1.0 if t <= 0.5 else 0.1 + 0.9 * (1 - t) / 0.5,
    }[schedule]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_schedule_has_its_closed_form(schedule, corpus, tmp_path):
    flags = words(f"--lr_schedule {schedule} --max_steps 40 --warmup_steps 3 --log_interval 1")
    run("train", *corpus, *TINY, *flags, "--out_dir", tmp_path).ok()
    rates = [float(row["lr"]) for row in metrics(tmp_path)]
    wanted = [1e-3 * closed_form(schedule, step, 40, 3) for step in range(40)]
    assert rates == pytest.approx(wanted, rel=1e-9)


def muon_steps(optimizer, weights: list[torch.nn.Parameter], gradients) -> list[torch.Tensor]:
    for step in gradients:
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
    return [w.detach() for w in weights]


def parameters(values: list[torch.Tensor]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(v.clone()) for v in values]


def test_batched_muon_is_torch_muon():
    torch.manual_seed(0)
    shapes = [(32, 32), (32, 64), (64, 32), (32, 32), (96, 32)]
    start = [torch.randn(s) for s in shapes]
    gradients = [[torch.randn(s) for s in shapes] for _ in range(4)]
    settings = dict(lr=0.02, weight_decay=0.1)
    ours, theirs = parameters(start), parameters(start)
    mine = muon_steps(lp.Muon(ours, {}, **settings), ours, gradients)
    reference = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
    torchs = muon_steps(reference, theirs, gradients)
    for a, b, first in zip(mine, torchs, start, strict=True):
        assert (a - b).norm() / (b - first).norm() < 0.01  # bf16 products in another order


# --- how a run ends, and what it leaves ---


def test_files_and_columns(corpus, tmp_path):
    result = run("train", *corpus, *SHORT, "--out_dir", tmp_path / "run").ok()
    best = tmp_path / "run/best.pth"
    assert Path(result.out.splitlines()[-1]) == best
    assert best.exists()
    header = (tmp_path / "run/metrics.csv").read_text().splitlines()[0]
    assert header.split(",")[:5] == words("step epoch split loss timestamp")
    assert [step for step, _ in curve(tmp_path / "run")] == list(range(1, 11))
    assert [step for step, _ in curve(tmp_path / "run", "val")] == [4, 8, 10]  # epochs' ends
    names = {p.name for p in (tmp_path / "run").iterdir()} - {".lock"}
    assert names == {"best.pth", "last.pth", "metrics.csv", "config.json"}


def test_best_is_the_best(corpus, tmp_path):
    flags = words("--max_steps 40 --eval_interval 1 --lr 3 --lr_schedule constant --eval_batches 0")
    run("train", *corpus, *TINY, *flags, "--out_dir", tmp_path).ok()
    values = {step: float(loss) for step, loss in curve(tmp_path, "val")}
    best = progress(tmp_path / "best.pth")
    assert best["step"] == min(values, key=values.get) < 40
    assert progress(tmp_path / "last.pth")["step"] == 40


def test_early_stopping(corpus, tmp_path):
    """At this rate the loss soon bounces; the run ends after three evaluations in vain."""
    flags = words("--max_steps 200 --eval_interval 2 --lr 0.3 --patience 3 --grad_clip 0")
    result = run("train", *corpus, *TINY, *flags, "--out_dir", tmp_path).ok()
    assert "stopped early" in result.err
    values = [float(loss) for _, loss in curve(tmp_path, "val")]
    assert len(values) - 1 - values.index(min(values)) == 3
    assert progress(tmp_path / "last.pth")["step"] < 200


def test_no_loss_is_no_miss(corpus, tmp_path):
    """With nothing held out, the run resumes at a step that is due for an evaluation."""
    flags = [*corpus, "--val_fraction", 0, *TINY, "--patience", 1, "--out_dir", tmp_path]
    run("train", *flags, "--stop_after", 3).ok()
    run("train", *flags, "--resume", *words("--eval_interval 3 --stop_after 1")).ok()
    assert progress(tmp_path / "last.pth")["step"] == 4


def test_epochs_and_max_steps(corpus, tmp_path):
    base = ["train", *corpus, *CPU, *SHAPE, *words("--batch_size 8 --answer_weight 0")]
    run(*base, "--epochs", 3, "--out_dir", tmp_path / "epochs").ok()
    assert progress(tmp_path / "epochs/last.pth")["step"] == 3 * 4
    run(*base, "--max_steps", 7, "--out_dir", tmp_path / "steps").ok()
    assert progress(tmp_path / "steps/last.pth")["step"] == 7


def test_a_run_is_not_overwritten_by_accident(corpus, tmp_path):
    command = ["train", *corpus, *SHORT, "--out_dir", tmp_path]
    run(*command).ok()
    before = (tmp_path / "best.pth").read_bytes()
    run(*command).fails(1, "--resume", "--overwrite", "--out_dir", "last.pth")
    assert (tmp_path / "best.pth").read_bytes() == before


def test_overwrite_starts_afresh(whole, corpus, tmp_path):
    run("train", *corpus, *SHORT, "--seed", 9, "--out_dir", tmp_path).ok()
    run("train", *corpus, *SHORT, "--overwrite", "--out_dir", tmp_path).ok()
    assert differences(whole / "best.pth", tmp_path / "best.pth") == []
    assert curve(whole) == curve(tmp_path)


def test_finetune_shares_the_folder_of_its_base(corpus, tmp_path):
    run("train", *corpus, *SHORT, "--out_dir", tmp_path).ok()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    flags = [*corpus[:4], *TUNE, "--ckpt", tmp_path / "best.pth", "--out_dir", tmp_path]
    result = run("finetune", *flags).ok()
    assert Path(result.out.splitlines()[-1]) == tmp_path / "best_finetune.pth"
    assert {n: (tmp_path / n).read_bytes() for n in before} == before
    new = {"best_finetune.pth", "last_finetune.pth", "config_finetune.json"}
    assert new <= {p.name for p in tmp_path.iterdir()}
    assert [step for step, _ in curve(tmp_path, suffix="_finetune")] == list(range(1, 9))


def test_lora_trains_the_adapters_alone(corpus, tiny_checkpoint, tmp_path):
    flags = [*corpus[:4], *TUNE, "--ckpt", tiny_checkpoint, *words("--method lora --lr 1e-2")]
    run("finetune", *flags, "--out_dir", tmp_path).ok()
    state = lp.load_checkpoint(tmp_path / "best_finetune.pth")
    assert state["optimizer"]
    assert all("lora_" in name for name in state["optimizer"])
    base = lp.load_checkpoint(tiny_checkpoint)["weights"]
    for name, weight in base.items():
        twins = [w for n, w in state["weights"].items()
                 if n.replace(".base_layer", "") == name]  # fmt: skip
        assert len(twins) == 1, name
        assert torch.equal(twins[0], weight), name


# --- a step that goes wrong ---


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_before_the_update(where, corpus, tmp_path, monkeypatch):
    def poison(loss, batch, call):
        if call != 7:
            return loss
        if where == "loss":
            return loss * math.nan
        loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    command = ["train", *corpus, *SHORT, *words("--save_interval 2 --eval_interval 2")]
    run(*command, "--out_dir", tmp_path / "clean").ok()
    with monkeypatch.context() as patch:
        spoil(patch, poison)
        run(*command, "--out_dir", tmp_path / "b").fails(1, "step 7", "finite", "last.pth")
    assert progress(tmp_path / "b/last.pth")["step"] == 6
    for name in ("last.pth", "best.pth"):
        assert all(t.isfinite().all() for t in tensors(tmp_path / "b" / name).values())
    run(*command, "--resume", "--out_dir", tmp_path / "b").ok()
    assert differences(tmp_path / "clean/last.pth", tmp_path / "b/last.pth") == []
    assert curve(tmp_path / "clean") == curve(tmp_path / "b")


def test_running_out_of_memory_until_checkpointing_helps(corpus, tmp_path, monkeypatch):
    """Micro-batches shrink to one row, then checkpointing is turned on; the result is the same."""
    failures = []

    def fail(loss, batch, call):
        if batch.x.shape[0] > 1 or len(failures) < 4:
            failures.append(batch.x.shape[0])
            raise torch.OutOfMemoryError("injected")
        return loss

    command = ["train", *corpus, *SHORT, "--dropout", 0, "--out_dir"]
    run(*command, tmp_path / "clean").ok()
    with monkeypatch.context() as patch:
        spoil(patch, fail)
        assert "out of memory at step 1" in run(*command, tmp_path / "b").ok().err
    assert failures == [8, 4, 2, 1]
    end = progress(tmp_path / "b/last.pth")
    assert (end["grad_accum"], end["grad_checkpointing"]) == (8, True)
    assert largest_difference(tmp_path / "clean/last.pth", tmp_path / "b/last.pth") < 1e-4


def test_running_out_of_memory_for_good_says_what_to_do(corpus, tmp_path, monkeypatch):
    def fail(loss, batch, call):
        raise torch.OutOfMemoryError("injected")

    spoil(monkeypatch, fail)
    result = run("train", *corpus, *SHORT, "--out_dir", tmp_path).fails(1, "memory", "block_size")
    assert len(result.errors) == 1


def test_commands_do_not_import_the_compiler(corpus, tmp_path):
    """Importing it takes two seconds, longer than a short command runs."""
    train = [*map(str, ["train", *corpus, *SHORT, "--out_dir", tmp_path])]
    sample = ["sample", "--ckpt", str(tmp_path / "best.pth"), "--prompt", "a"]
    code = f"""import sys, llm_pipeline as lp
assert lp.main({train}) == 0 and lp.main({sample}) == 0
assert "torch._dynamo" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True)
