"""Checkpoints: whole or not there, exact, and refused when they lie."""

import ast
import contextlib
import errno
import functools
import io
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import CPU, PROGRAM, SHAPE, curve, differences, run, words

import llm_pipeline as lp

SHORT = [*CPU, *SHAPE, *words("--batch_size 8 --max_steps 10 --lr 1e-3")]


def refused(path: Path) -> bool:
    """Whether loading refuses in the intended way; any other exception fails the test."""
    try:
        lp.load_checkpoint(path)
    except lp.UserError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        return True
    return False


def stored(path: Path) -> dict:
    """A checkpoint's state, unchanged from the file."""
    return torch.load(path, map_location="cpu", weights_only=True)


# --- damage ---


def damaged(content: bytes, rng: random.Random):
    """Copies with a flipped bit, cut short, or with a piece inserted, removed, or put at an end."""
    size = len(content)
    for place in [0, size - 1, size - 35, size - 41, size - 45, *rng.choices(range(size), k=25)]:
        changed = bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        yield bytes(changed)
    for length in [0, 1, 40, 41, 42, size - 1, *rng.choices(range(size), k=10)]:
        yield content[:length]
    for _ in range(8):
        a, b, n = (rng.randrange(1, size) for _ in range(3))
        piece = content[a : a + n]
        yield content[:b] + piece + content[b:]
        yield content[:a] + content[a + n :]
        yield content + piece
        yield piece + content


def test_damage_is_found(tiny_checkpoint, tmp_path):
    content, path = tiny_checkpoint.read_bytes(), tmp_path / "damaged.pth"
    for number, changed in enumerate(damaged(content, random.Random(1))):
        path.write_bytes(changed)
        assert refused(path), number
    path.write_bytes(content)
    assert not refused(path)


@pytest.mark.parametrize("command", ["sample --prompt x", "eval", "finetune", "export", "resume"])
def test_damage_stops_every_command_with_one_line(command, corpus, tiny_checkpoint, tmp_path):
    content = bytearray(tiny_checkpoint.read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / "last.pth").write_bytes(content)
    if command == "resume":
        result = run("train", *corpus, *SHORT, "--resume", "--out_dir", tmp_path)
    else:
        result = run(*words(command), "--ckpt", tmp_path / "last.pth", cwd=tmp_path)
    result.fails(1, "last.pth", "checksum")
    assert len(result.errors) == 1


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_that_do_not_fit_are_named(change, tiny_checkpoint, tmp_path):
    state, path = stored(tiny_checkpoint), tmp_path / "last.pth"
    weights, name = state["weights"], "blocks.0.mlp.up.weight"
    if change == "missing":
        del weights[name]
    elif change == "extra":
        weights[name := "blocks.9.extra"] = torch.zeros(3)
    else:
        weights[name] = weights[name].T.contiguous()
    lp.save_checkpoint(path, state)
    flags = words("--prompt x --max_new_tokens 2 --device cpu --ckpt")
    assert len(run("sample", *flags, path).fails(1, name).errors) == 1


# --- pickles that would run code ---


class Call:
    """Pickles as a function call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def payloads(marker: Path) -> list:
    """Objects that would write `marker` if they were unpickled carelessly."""
    shell = f"touch {marker}"
    return [
        Call(os.system, shell),
        Call(eval, f"open({str(marker)!r}, 'w').close()"),
        Call(open, str(marker), "w"),
        Call(subprocess.call, ["touch", str(marker)]),
        Call(functools.partial(os.system, shell)),
        Call(pickle.loads, pickle.dumps(Call(os.system, shell))),
    ]


def test_a_pickle_that_would_run_code_is_refused(tiny_checkpoint, tmp_path):
    """Alone and inside a good checkpoint, with and without a valid checksum, old and new format."""
    marker, path, state = tmp_path / "marker", tmp_path / "hostile.pth", stored(tiny_checkpoint)
    for payload in payloads(marker):
        old, new = io.BytesIO(), io.BytesIO()
        torch.save(payload, old, _use_new_zipfile_serialization=False)
        torch.save(state | {"data": payload}, new)
        for content in (pickle.dumps(payload), old.getvalue(), new.getvalue()):
            path.write_bytes(content)
            assert refused(path)
        lp.save_checkpoint(path, state | {"data": payload})
        assert refused(path)
        assert not marker.exists()


def test_the_source_has_no_unsafe_load():
    tree = ast.parse(PROGRAM.read_text(encoding="utf-8"))
    loads = 0
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, flags = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name == "torch.load":
            loads += 1
            assert flags.get("weights_only") == "True"
        assert not name.startswith(("pickle.", "marshal.", "dill.", "os.system", "os.popen"))
        assert name not in ("eval", "exec", "yaml.load", "torch.hub.load", "__import__")
        assert flags.get("weights_only", "True") == "True"
        for flag in ("allow_pickle", "trust_remote_code", "shell"):
            assert flags.get(flag, "False") == "False", (name, flag)
    assert loads


# --- folders that are not empty ---


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, corpus, tiny_checkpoint) -> Path:
    """The folder of a base and a short finetune of it; read-only."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    shutil.copytree(tiny_checkpoint.parent, folder)
    flags = words("--max_steps 4 --batch_size 4 --report_samples 0")
    run("finetune", *corpus, *CPU, *flags, "--ckpt", folder / "best.pth", "--out_dir", folder).ok()
    return folder


@pytest.mark.parametrize("suffix", ["", "_finetune"])
def test_a_best_without_its_last_is_never_replaced(suffix, corpus, tuned, tmp_path):
    shutil.copytree(tuned, tmp_path / "run")
    (tmp_path / f"run/last{suffix}.pth").unlink()
    best = tmp_path / f"run/best{suffix}.pth"
    before = best.read_bytes()
    command = ["finetune", "--ckpt", tuned / "best.pth"] if suffix else ["train", *SHORT]
    command += [*corpus, *CPU, "--out_dir", tmp_path / "run"]
    start = "--ckpt" if suffix else "--init_from"
    run(*command, "--resume").fails(1, f"{start} {best}", "--overwrite")
    refused = run(*command).fails(1, "--overwrite")
    assert "--resume" not in refused.err
    assert best.read_bytes() == before


def test_resume_where_nothing_is_says_that_it_starts(corpus, tmp_path):
    result = run("train", *corpus, *SHORT, "--resume", "--out_dir", tmp_path / "mistyped").ok()
    assert "mistyped holds no run" in result.err
    assert "from step 0" in result.err
    flags = [*CPU, *SHAPE, "--resume", "--stop_after", 1, "--out_dir", tmp_path / "other"]
    assert "300 steps" in run("train", *corpus, *flags).ok().err  # as without --resume


def test_a_run_of_another_command_is_not_gone_on_with(corpus, tiny_checkpoint, tmp_path):
    flags = ["--ckpt", tiny_checkpoint, *CPU, "--max_steps", 1, "--report_samples", 0]
    run("finetune", *corpus, *flags, "--out_dir", tmp_path).ok()
    (tmp_path / "last_finetune.pth").rename(tmp_path / "last.pth")
    run("train", "--resume", "--out_dir", tmp_path).fails(1, "belongs to finetune")


def test_a_folder_resumes_where_it_is_now_and_needs_no_other_flags(corpus, tmp_path):
    """Not where it was, which its settings might name: `ckpts` is the default folder."""
    run("train", *corpus, *SHORT, "--out_dir", tmp_path / "old", "--stop_after", 4).ok()
    (tmp_path / "old").rename(tmp_path / "ckpts")
    run("train", "--resume", cwd=tmp_path).ok()
    assert lp.load_checkpoint(tmp_path / "ckpts/last.pth")["progress"]["step"] == 10
    assert not (tmp_path / "old").exists()


def test_a_run_goes_on_without_the_files_that_it_began_with(corpus, tiny_checkpoint, tmp_path):
    """Its base is deleted; in the copy, only last.pth is left of its folder."""
    base = tmp_path / "base.pth"
    shutil.copy(tiny_checkpoint, base)
    flags = [*corpus, *CPU, *words("--batch_size 4 --max_steps 6 --eval_interval 2 --lr 1e-9")]
    command = ["train", *flags, "--init_from", base, "--out_dir"]
    run(*command, tmp_path / "whole").ok()
    run(*command, tmp_path / "parts", "--stop_after", 4).ok()
    base.unlink()
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "parts/last.pth", tmp_path / "copy")
    for folder in (tmp_path / "parts", tmp_path / "copy"):
        best = run("train", "--resume", "--out_dir", folder).ok().out.split()[-1]
        assert differences(tmp_path / "whole/last.pth", folder / "last.pth") == []
        assert stored(Path(best))["progress"]["best"] < math.inf


def test_a_run_cleans_up_what_a_killed_one_left_and_no_more(corpus, tmp_path):
    for name in (".last.pth.77.tmp", "..last.pth.77.tmp.77.tmp", ".m.gguf.77.tmp", ".x.json.8.tmp"):
        (tmp_path / name).write_bytes(b"")
    run("train", *corpus, *SHORT, "--max_steps", 1, "--out_dir", tmp_path).ok()
    assert {file.name for file in tmp_path.glob("*.tmp")} == {".m.gguf.77.tmp", ".x.json.8.tmp"}


def test_a_signal_while_the_base_is_evaluated(corpus, tiny_checkpoint, tmp_path, monkeypatch):
    real, calls = lp.estimate_loss, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(lp, "estimate_loss", interrupted)
    flags = [*corpus, *CPU, *words("--batch_size 4 --max_steps 2 --report_samples 0")]
    command = ["finetune", *flags, "--ckpt", tiny_checkpoint, "--out_dir", tmp_path]
    assert run(*command).code == 143
    assert stored(tmp_path / "last_finetune.pth")["progress"]["step"] == 0
    run(*command, "--resume").ok()


@pytest.mark.parametrize(
    ("name", "flag"),
    [*((n, f) for n in ("best.pth", "last.pth") for f in ("--overwrite", "--resume")),
     ("config.json", "--no_resume"), ("metrics.csv", "--no_resume"), ("metrics.csv", "--resume")],
)  # fmt: skip
def test_files_of_others_are_never_replaced(name, flag, corpus, tmp_path):
    file, beside = tmp_path / "run" / name, tmp_path / "run/.notes.tmp"
    file.parent.mkdir()
    file.write_bytes(before := b"a,b\n1,2\n" * 99)
    beside.write_bytes(b"mine")
    result = run("train", *corpus, *SHORT, flag, "--out_dir", tmp_path / "run")
    resumed = flag == "--resume" and name != "best.pth"
    result.fails(1, name, "of this program" if resumed else "--out_dir")
    assert file.read_bytes() == before
    assert beside.exists()


# --- what a run begins with ---


@pytest.fixture
def pairs(tmp_path) -> list:
    rows = [{"prompt": f"p{i}", "chosen": "yes" * (i % 5 + 1), "rejected": "no"} for i in range(40)]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    flags = words("--objective dpo --batch_size 4 --report_samples 0 --log_interval 1")
    return ["finetune", *CPU, *flags, "--data_dir", tmp_path / "raw", "--processed_dir",
            tmp_path / "stores"]  # fmt: skip


def test_preferences_keep_the_base_that_they_began_with(pairs, tiny_checkpoint, tmp_path):
    command = [*pairs, "--max_steps", 4, "--out_dir", tmp_path / "run"]
    run(*command, "--ckpt", tiny_checkpoint, "--stop_after", 2).ok()
    state, other, moved = stored(tiny_checkpoint), tmp_path / "other.pth", tmp_path / "moved.pth"
    shutil.copy(tiny_checkpoint, moved)
    next(iter(state["weights"].values())).mul_(1.01)
    lp.save_checkpoint(other, state)
    before = (tmp_path / "run/last_finetune.pth").read_bytes()
    run(*command, "--ckpt", other, "--resume").fails(1, "another base", "--ckpt")
    assert (tmp_path / "run/last_finetune.pth").read_bytes() == before
    run(*command, "--ckpt", moved, "--resume").ok()


def test_init_from_keeps_the_split_of_its_base(corpus, tmp_path):
    """Otherwise the run would validate on records that its base was trained on."""
    flags = [*corpus, *SHORT, "--max_steps", 2]
    run("train", *flags, "--split_seed", 5, "--out_dir", tmp_path / "base").ok()
    flags += ["--init_from", tmp_path / "base/best.pth", "--out_dir"]
    unnamed = [f for f in map(str, flags) if f not in ("--val_fraction", "0.2")]
    run("train", *unnamed, tmp_path / "same").ok()
    asked = run("train", *flags, tmp_path / "other", "--split_seed", 6).ok()
    data = [lp.load_checkpoint(tmp_path / f / "last.pth")["data"] for f in ("base", "same")]
    assert data[0] == data[1]
    assert "warning: --split_seed 6" in asked.err
    run("train", "--resume", "--out_dir", tmp_path / "other").ok()


@pytest.mark.parametrize("lr", [1e-3, 1e-12])
def test_a_finetune_is_compared_with_its_base(lr, corpus, tiny_checkpoint, tmp_path):
    """Even after a stop and a resume, the end says whether best_finetune.pth beats its base."""
    flags = [*corpus, *CPU, *words("--batch_size 4 --max_steps 6 --report_samples 0"), "--lr", lr]
    command = ["finetune", *flags, "--ckpt", tiny_checkpoint, "--out_dir", tmp_path]
    run(*command, "--stop_after", 2).ok()
    result = run(*command, "--resume").ok()
    first, *_, last = curve(tmp_path, "val", "_finetune")
    assert first[0] == 0
    base = float(first[1])
    word = "better" if float(last[1]) < base else "NOT better"
    assert f", {word} than its base's {base:.4f}" in result.err
    assert (word == "better") == (lr > 1e-6)


# --- saving under adverse conditions ---


@pytest.fixture
def started(corpus, tmp_path) -> list:
    """A run stopped at step 4 in tmp_path/run; returns the command that resumes it."""
    command = ["train", *corpus, *SHORT, "--save_interval", "1", "--out_dir", tmp_path / "run"]
    run(*command, "--stop_after", 4).ok()
    return [*command, "--resume"]


def failing_disk(monkeypatch, function: str) -> None:
    """Only checkpoints hit the fault, so the run gets as far as its first save."""
    real = getattr(os, function)

    def fail(*args, **more):
        about = os.readlink(f"/proc/self/fd/{args[0]}") if function == "fsync" else str(args[1])
        if ".pth" in about:
            raise OSError(errno.EIO, "Input/output error")
        return real(*args, **more)

    monkeypatch.setattr(os, function, fail)


@contextlib.contextmanager
def files_up_to(size: int):
    """The limit on a file's size makes a write fail mid-save, as a full disk does."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("fault", ["fsync", "replace", 0.3, 0.9])
def test_a_failing_disk_loses_nothing(fault, started, tmp_path, monkeypatch):
    """The checkpoint is the one from before, and no temporary file is left."""
    last = tmp_path / "run/last.pth"
    before = last.read_bytes()
    if isinstance(fault, str):
        with monkeypatch.context() as patch:
            failing_disk(patch, fault)
            result = run(*started)
    else:
        with files_up_to(10_000 + int(fault * len(before))):
            result = run(*started)
    result.fails(1, "last.pth", "cannot write")
    assert len(result.errors) == 1
    assert last.read_bytes() == before
    assert not [p.name for p in last.parent.rglob("*") if "tmp" in p.name]
    run(*started).ok()


def test_saves_are_synced_before_and_after_their_rename(corpus, tmp_path, monkeypatch):
    """Otherwise a power cut could leave the new file empty or missing. best.pth comes first: killed
    between the two, a run has a best that its last does not know of, never the reverse."""
    events, sync, replace = [], os.fsync, os.replace

    def watch_sync(descriptor):
        sync(descriptor)
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def watch_rename(source, target):
        events.append((str(source), Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_sync)
    monkeypatch.setattr(os, "replace", watch_rename)
    run("train", *corpus, *SHORT, "--max_steps", 4, "--out_dir", tmp_path).ok()
    names = []
    for before, event, after in zip(events, events[1:], events[2:], strict=False):
        if isinstance(event, tuple):
            names.append(event[1])
            assert before == event[0] and after == str(tmp_path)
    assert [name for name in names if name.endswith(".pth")] == ["best.pth", "last.pth"]
