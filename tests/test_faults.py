"""Kills, signals, two runs in one folder, several processes: the result is the same bits."""

import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    CPU,
    ROOT,
    SHAPE,
    Child,
    curve,
    differences,
    finish,
    free_port,
    largest_difference,
    metrics,
    run,
    run_together,
    tensors,
    together,
    wait_for,
    words,
)

import llm_pipeline as lp

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="this system cannot fork: run on Linux or a Mac"
)
TEN = words("--max_steps 10 --batch_size 8 --lr 1e-3 --log_interval 1 --save_interval 1")
SHORT = [*CPU, *SHAPE, *TEN, "--eval_interval", "3"]
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}


# --- faults that a child injects into itself ---


def around_losses(before) -> None:
    """Call `before(training)` ahead of every pass through a model: each one enters autocast."""
    autocast = lp.Runtime.autocast

    def wrapped(rt):
        before(torch.is_grad_enabled())
        return autocast(rt)

    lp.Runtime.autocast = wrapped


def slow(seconds: float) -> None:
    """Delay every pass through a model."""
    around_losses(lambda training: time.sleep(seconds))


def signal_in(where: str, count: int, number: int) -> None:
    """Send this process a signal in its `count`-th step, evaluation or save."""
    calls = []

    def tick() -> None:
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), number)

    if where == "save":
        fsync = os.fsync
        os.fsync = lambda descriptor: (fsync(descriptor), tick())[0]
    else:
        around_losses(lambda training: tick() if training == (where == "step") else None)


def die_in(count: int) -> None:
    """End this process, as a power cut would, at its `count`-th sync or rename."""
    calls = []

    def wrap(function):
        def wrapped(*args):
            calls.append(1)
            if len(calls) == count:
                os._exit(9)
            return function(*args)

        return wrapped

    os.fsync, os.replace = wrap(os.fsync), wrap(os.replace)


# --- what must hold afterwards ---


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    run("train", *corpus, *SHORT, "--out_dir", folder).ok()
    return folder


@pytest.fixture
def command(corpus, tmp_path) -> list:
    return ["train", *corpus, *SHORT, "--out_dir", tmp_path / "run"]


def same(whole: Path, folder: Path) -> None:
    """Two finished runs have the same bits and curves, and left no temporary files."""
    for name in ("last.pth", "best.pth"):
        assert differences(whole / name, folder / name) == [], name
    for split in ("train", "val"):
        assert curve(whole, split) == curve(folder, split)
    steps = [step for step, _ in curve(folder)]
    assert steps == list(range(1, steps[-1] + 1))  # each exactly once
    assert not [p.name for p in folder.iterdir() if "tmp" in p.name]


def steps_done(folder: Path) -> int:
    return lp.load_checkpoint(folder / "last.pth")["progress"]["step"]


# --- kills ---


def kill_until_done(command: list, folder: Path, rng: random.Random, kills: int) -> int:
    """Kill the run at random moments, resuming it each time. Returns how many kills it took."""
    done = 0
    for _ in range(kills):
        child = Child(*command, "--resume", hook=functools.partial(slow, 0.02))
        child.process.join(rng.uniform(0.0, 0.8))
        if child.process.exitcode is None:
            child.send(signal.SIGKILL)
            done += 1
        assert child.finish().code in (0, -signal.SIGKILL)
        if (folder / "last.pth").exists() and (folder / "metrics.csv").exists():
            logged = [step for step, _ in curve(folder)]
            assert steps_done(folder) >= max(logged, default=0) - 1  # one save interval
    return done


def test_kills_at_random_moments(command, whole, tmp_path, count):
    """Six kills; sixty with `--count 10`."""
    for number in range(count):
        folder = tmp_path / f"run-{number}"
        kill_until_done([*command[:-1], folder], folder, random.Random(number), 6)
        run(*command[:-1], folder, "--resume").ok()
        same(whole, folder)


def test_killed_in_every_sync_and_rename_of_a_save(command, whole, tmp_path):
    """At the 1st, 2nd, 3rd ... until none is left."""
    base, folder, count, code = tmp_path / "base", tmp_path / "run", 0, 9
    run(*command[:-1], base, "--stop_after", 9).ok()
    while code == 9:
        count += 1
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base, folder)
        hook = functools.partial(die_in, count)
        code = Child(*command, "--resume", hook=hook).finish().code
        for name in ("last.pth", "best.pth"):
            assert tensors(folder / name)
        run(*command, "--resume").ok()
        same(whole, folder)
    assert code == 0 and count > 6


def test_killed_while_the_store_is_written(corpus, tmp_path, whole):
    """A half-written token store is never used."""
    stores, folder = tmp_path / "stores", tmp_path / "run"
    command = ["train", *corpus, "--processed_dir", stores, *SHORT, "--out_dir", folder]
    for count in range(1, 5):
        shutil.rmtree(stores, ignore_errors=True)
        hook = functools.partial(die_in, count)
        assert Child(*command, "--overwrite", hook=hook).finish().code == 9
    run(*command, "--overwrite").ok()
    same(whole, folder)


# --- signals ---


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize(
    ("where", "count"), [("step", 1), ("step", 6), ("evaluation", 2), ("save", 3), ("save", 9)]
)
def test_a_signal_stops_saves_and_resumes(where, count, number, command, whole, tmp_path):
    child = Child(*command, hook=functools.partial(signal_in, where, count, number))
    result = child.finish()
    assert result.code == CODES[number], result.err
    assert "Traceback" not in result.err
    assert signal.Signals(number).name in result.err
    assert steps_done(tmp_path / "run") < 10
    run(*command, "--resume").ok()
    same(whole, tmp_path / "run")


def test_a_second_signal_exits_at_once(command, tmp_path):
    child = Child(*command, hook=functools.partial(slow, 30))
    wait_for(lambda: (tmp_path / "run/metrics.csv").exists())
    time.sleep(0.5)
    child.send(signal.SIGTERM)
    time.sleep(0.5)
    child.send(signal.SIGTERM)
    assert child.finish(10).code == -signal.SIGTERM  # the system's default


@pytest.mark.parametrize("number", CODES)
def test_a_signal_during_eval_ends_it(number, tiny_checkpoint, corpus):
    flags = words("--device cpu --batch_size 1 --split all --ckpt")
    hook = functools.partial(signal_in, "evaluation", 3, number)
    result = Child("eval", *corpus, *flags, tiny_checkpoint, hook=hook).finish()
    assert result.code == CODES[number], result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("number", CODES)
def test_a_signal_while_a_store_is_made_leaves_nothing(number, corpus, tmp_path):
    argv = ["prepare", *corpus[:2], "--processed_dir", tmp_path / "stores"]
    hook = functools.partial(signal_in, "save", 1, number)
    result = Child(*argv, hook=hook).finish()
    assert result.code == CODES[number], result.err
    assert not list(tmp_path.rglob("*.tmp*")) + list(tmp_path.rglob("meta.json"))
    run(*argv).ok()


def test_hang_ups_cost_no_step(command, whole, tmp_path):
    """The shell and the terminal both send one, and the terminal accepts no more output."""
    child = Child(*command, hook=functools.partial(slow, 0.3))
    wait_for(lambda: (tmp_path / "run/metrics.csv").exists() and curve(tmp_path / "run"))
    for _ in range(3):
        child.send(signal.SIGHUP)
    result = child.finish()
    assert result.code == 129, result.err
    assert 0 < steps_done(tmp_path / "run") < 10
    run(*command, "--resume").ok()
    same(whole, tmp_path / "run")


def ignore_hang_ups() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal_in("step", 3, signal.SIGHUP)


def test_nohup_is_respected(command, whole, tmp_path):
    assert Child(*command, hook=ignore_hang_ups).finish().code == 0
    same(whole, tmp_path / "run")


# --- two runs, one folder ---


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_the_second_run_is_refused(flag, command, whole, tmp_path):
    first = Child(*command, hook=functools.partial(slow, 0.15))
    wait_for((tmp_path / "run/last.pth").exists)
    result = run(*command, flag).fails(1, str(tmp_path / "run"), "another run")
    assert len(result.errors) == 1
    assert first.finish().code == 0
    same(whole, tmp_path / "run")


def test_two_runs_may_build_the_same_store(corpus, whole, tmp_path):
    """Even at the same time: each ends up with the complete store."""
    stores = ["--processed_dir", tmp_path / "stores"]
    folders = [tmp_path / name for name in "abc"]
    children = [Child("train", *corpus, *stores, *SHORT, "--out_dir", f) for f in folders]
    for child, folder in zip(children, folders, strict=True):
        assert child.finish().code == 0
        same(whole, folder)


# --- several processes ---


@pytest.fixture(scope="module")
def whole_of_two(corpus, tmp_path_factory) -> Path:
    """The folder of an undisturbed run by two processes."""
    folder = tmp_path_factory.mktemp("whole-of-two")
    run_together("train", *corpus, *SHORT, "--out_dir", folder)
    return folder


def test_two_processes_give_the_bits_of_two_micro_batches(whole_of_two, corpus, tmp_path):
    run("train", *corpus, *SHORT, "--out_dir", tmp_path, "--grad_accum", 2).ok()
    for name in ("last.pth", "best.pth"):
        assert differences(tmp_path / name, whole_of_two / name) == []
    one, two = curve(tmp_path), curve(whole_of_two)
    assert [step for step, _ in one] == [step for step, _ in two]  # once, by the first process
    values = [[float(loss) for _, loss in rows] for rows in (one, two)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)  # a sum over processes is in float64


@pytest.mark.parametrize("flags", ["--optimizer adamw", "--fsdp", "--recipe fast --fsdp"])
def test_two_processes_train_like_one(flags, corpus, tmp_path):
    common = words("--dropout 0 --grad_clip 0.1")  # so small that every step is clipped
    base = ["train", *corpus, *SHORT, *common, *words(flags), "--out_dir"]
    alone = [a for a in base if a != "--fsdp"]
    run(*alone, tmp_path / "one").ok()
    run_together(*base, tmp_path / "two")
    distance = largest_difference(tmp_path / "one/last.pth", tmp_path / "two/last.pth")
    assert distance < (1e-2 if "fast" in flags else 1e-4)  # Muon multiplies in bf16
    vals = [[float(loss) for _, loss in curve(tmp_path / x, "val")] for x in ("one", "two")]
    assert vals[0] == pytest.approx(vals[1], rel=1e-3)


def test_an_evaluation_leaves_sharded_gradients_alone(corpus, tmp_path):
    """At this rate no evaluation is the best; saving one would put the shards back in place."""
    base = ["train", *corpus, *SHORT, *words("--dropout 0 --lr 1e-10 --eval_interval 1")]
    run(*base, "--out_dir", tmp_path / "one").ok()
    run_together(*base, "--fsdp", "--out_dir", tmp_path / "two")
    one, two = ([float(row["grad_norm"]) for row in metrics(tmp_path / f)] for f in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize("flags", [[], ["--fsdp"]])
def test_saved_by_two_resumed_by_one_and_by_two(flags, corpus, tmp_path):
    base = ["train", *corpus, *SHORT, "--dropout", "0", "--out_dir"]
    run(*base, tmp_path / "whole").ok()
    run_together(*base, tmp_path / "two", *flags, "--stop_after", 5)
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    run(*base, tmp_path / "one", "--resume", *(["--no_fsdp"] if flags else [])).ok()
    run_together(*base, tmp_path / "two", *flags, "--resume")
    for name in ("one", "two"):
        assert largest_difference(tmp_path / "whole/last.pth", tmp_path / name / "last.pth") < 1e-4
        assert [s for s, _ in curve(tmp_path / name)] == list(range(1, 11))


def signal_one(rank: int, where: str, number: int) -> None:
    if os.environ["RANK"] == str(rank):
        signal_in(where, 4, number)


@pytest.mark.parametrize("where", ["step", "evaluation"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_all(rank, where, whole_of_two, corpus, tmp_path):
    base = ["train", *corpus, *SHORT, "--out_dir"]
    hook = functools.partial(signal_one, rank, where, signal.SIGTERM)
    children = together(*base, tmp_path / "run", hook=hook)
    assert [child.finish(30).code for child in children] == [143, 143]
    assert steps_done(tmp_path / "run") < 10
    run_together(*base, tmp_path / "run", "--resume")
    same(whole_of_two, tmp_path / "run")


def test_the_death_of_a_process_ends_the_others(corpus, tmp_path):
    base = ["train", *corpus, *SHORT, "--out_dir", tmp_path / "run"]
    children = together(*base, hook=functools.partial(slow, 0.15))
    wait_for((tmp_path / "run/last.pth").exists)
    children[1].send(signal.SIGKILL)
    children[1].finish()
    result = children[0].finish(40)
    assert result.code == 1, result.err
    assert len(result.errors) == 1
    assert "Traceback" not in result.err
    run(*base, "--resume").ok()


WRAPPER = f"""
import functools, sys
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT)!r}]
import llm_pipeline, test_faults
test_faults.slow(0.2)
sys.exit(llm_pipeline.main())
"""


def test_sigterm_to_torchrun(whole_of_two, corpus, tmp_path):
    base = ["train", *corpus, *SHORT, "--out_dir"]
    (tmp_path / "wrapper.py").write_text(WRAPPER)
    argv = [*words("-m torch.distributed.run --nproc_per_node 2 --master_port"), free_port()]
    argv += [tmp_path / "wrapper.py", *base, tmp_path / "run"]
    process = subprocess.Popen(
        [sys.executable, *map(str, argv)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for((tmp_path / "run/last.pth").exists, 60)
    process.send_signal(signal.SIGTERM)
    result = finish(process, 40)
    assert result.code != 0
    assert 0 < steps_done(tmp_path / "run") < 10
    assert "saving and stopping" in result.err
    run_together(*base, tmp_path / "run", "--resume")
    same(whole_of_two, tmp_path / "run")
