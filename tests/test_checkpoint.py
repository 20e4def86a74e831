"""Checkpoints: whole or not there, exact, and refused when they lie."""

import ast
import builtins
import ctypes
import errno
import functools
import importlib
import io
import json
import marshal
import math
import operator
import os
import pickle
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import CPU, PROGRAM, SHAPE, curve, differences, metrics, run, tensors, words

import llm_pipeline as lp

SHORT = [*CPU, *SHAPE, *words("--batch_size 8 --max_steps 10 --lr 1e-3")]


def refused(path: Path) -> bool:
    """Whether loading says so in the one way that is meant; any other exception fails the test."""
    try:
        lp.load_checkpoint(path)
    except lp.UserError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        return True
    return False


def seal(archive: bytes) -> bytes:
    """Any archive without a comment, with the checksum that would make it acceptable."""
    file = io.BytesIO(archive)
    file.write(lp.seal_of(file, file.seek(-2, os.SEEK_END)))
    return file.getvalue()


def unsealed(state) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def stored(path: Path) -> dict:
    """A checkpoint's state as it stands in the file."""
    return torch.load(path, map_location="cpu", weights_only=True)


# --- what is saved is what is loaded ---


def test_round_trip(tiny_checkpoint, tmp_path):
    state = stored(tiny_checkpoint)
    lp.save_checkpoint(tmp_path / "again.pth", lp.load_checkpoint(tiny_checkpoint))
    assert differences(tiny_checkpoint, tmp_path / "again.pth") == []
    again = stored(tmp_path / "again.pth")
    assert {k: v for k, v in again.items() if k not in ("weights", "optimizer")} == {
        k: v for k, v in state.items() if k not in ("weights", "optimizer")
    }


def test_the_seal_of_this_test_is_the_seal_of_the_program(tiny_checkpoint, tmp_path):
    """Else the hostile files below would be refused for a wrong checksum alone."""
    path = tmp_path / "resealed.pth"
    path.write_bytes(seal(unsealed(stored(tiny_checkpoint))))
    assert differences(tiny_checkpoint, path) == []


def test_a_checkpoint_needs_nothing_else(tiny_checkpoint, tmp_path):
    shutil.copy(tiny_checkpoint, tmp_path / "moved.pth")
    flags = words("--prompt x --max_new_tokens 4 --device cpu --ckpt moved.pth")
    run("sample", *flags, cwd=tmp_path).ok()


def test_a_missing_checkpoint_is_named(tmp_path):
    for command in ("sample", "eval", "finetune", "export"):
        result = run(command, "--ckpt", tmp_path / "none.pth", cwd=tmp_path, HF_HUB_OFFLINE="1")
        result.fails(1, "none.pth")


# --- damage ---


def test_every_flipped_bit_is_found(tiny_checkpoint, tmp_path):
    content, path = bytearray(tiny_checkpoint.read_bytes()), tmp_path / "flipped.pth"
    rng, n = random.Random(1), len(tiny_checkpoint.read_bytes()) * 8
    places = [0, n - 1, n - 8 * 35, n - 8 * 41, n - 8 * 45] + [rng.randrange(n) for _ in range(40)]
    for place in places:
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        content[place // 8] ^= 1 << place % 8
        assert refused(path), f"bit {place}"
    path.write_bytes(content)
    assert not refused(path)


def test_every_truncation_is_found(tiny_checkpoint, tmp_path):
    content, path = tiny_checkpoint.read_bytes(), tmp_path / "cut.pth"
    rng = random.Random(2)
    lengths = [0, 1, 2, 40, 41, 42, len(content) - 41, len(content) - 1]
    for length in lengths + [rng.randrange(len(content)) for _ in range(20)]:
        path.write_bytes(content[:length])
        assert refused(path), length


def test_every_splice_is_found(tiny_checkpoint, tmp_path):
    content, path = tiny_checkpoint.read_bytes(), tmp_path / "spliced.pth"
    rng = random.Random(3)
    for _ in range(20):
        a, b, n = (rng.randrange(len(content)) for _ in range(3))
        piece = content[a : a + n]
        for changed in (
            content[:b] + piece + content[b:],  # inserted
            content[:b] + piece + content[b + len(piece) :],  # written over
            content[:a] + content[a + n :],  # taken out
            content + piece,  # appended
            piece + content,  # put before
        ):
            if changed != content:
                path.write_bytes(changed)
                assert refused(path), (a, b, n)


@pytest.mark.parametrize("command", ["sample --prompt x", "eval", "finetune", "export", "resume"])
def test_damage_stops_every_command_with_one_line(command, corpus, tiny_checkpoint, tmp_path):
    content = bytearray(tiny_checkpoint.read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / "last.pth").write_bytes(content)
    if command == "resume":
        result = run("train", *corpus, *SHORT, "--resume", "--out_dir", tmp_path)
    else:
        result = run(*words(command), "--ckpt", tmp_path / "last.pth", cwd=tmp_path)
    result.fails(result.code or 1, "last.pth", "checksum")
    assert len(result.errors) == 1


# --- pickles that would run code ---


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call

    def __call__(self):
        """Callable, so that the result of one call can be called by the next."""


def payloads(marker: Path) -> dict[str, object]:
    """Objects that would write `marker` when they are unpickled carelessly."""
    name, shell = str(marker), f"touch {marker}"
    code = f"open({name!r}, 'w').close()"
    inner = pickle.dumps(Call(os.system, shell))
    return {
        "os.system": Call(os.system, shell),
        "os.popen": Call(os.popen, shell),
        "subprocess.call": Call(subprocess.call, ["touch", name]),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", name]),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "open for writing": Call(open, name, "w"),
        "Path.touch": Call(operator.methodcaller("touch"), Path(name)),
        "os.open": Call(os.open, name, os.O_CREAT | os.O_WRONLY),
        "a chain of getters": Call(
            Call(operator.attrgetter("system"), Call(importlib.import_module, "os")), shell
        ),
        "functools.partial": Call(functools.partial(os.system, shell)),
        "pickle in a pickle": Call(pickle.loads, inner),
        "torch.load in a pickle": Call(
            functools.partial(torch.load, weights_only=False), io.BytesIO(inner)
        ),
        "map over system": Call(list, Call(map, os.system, [shell])),
        "import": Call(importlib.import_module, "this"),
        "__import__": Call(builtins.__import__, "this"),
        "ctypes": Call(ctypes.CDLL, name),
        "marshal": Call(exec, Call(marshal.loads, marshal.dumps(compile(code, "x", "exec")))),
        "shutil.copyfile": Call(shutil.copyfile, __file__, name),
    }


KINDS = sorted(payloads(Path("marker")))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_that_would_run_code_is_refused(kind, tiny_checkpoint, tmp_path):
    """Alone and inside a good checkpoint, with and without a valid seal, new and old format."""
    marker, path = tmp_path / "marker", tmp_path / "hostile.pth"
    payload = payloads(marker)[kind]
    state = stored(tiny_checkpoint)
    old = io.BytesIO()
    torch.save(payload, old, _use_new_zipfile_serialization=False)
    files = [pickle.dumps(payload), old.getvalue()]
    for value in (payload, state | {"data": payload}, state | {payload: 1}):
        archive = unsealed(value)
        files += [archive, seal(archive)]
    for number, content in enumerate(files):
        path.write_bytes(content)
        assert refused(path), number
        assert not marker.exists(), number


PLACES = {
    "sample": "sample --prompt x --ckpt {}",
    "eval": "eval --ckpt {}",
    "finetune": "finetune --ckpt {}",
    "export": "export --ckpt {}",
    "init_from": "train --init_from {}",
    "config": "train --config {}",
    "tokenizer": "train --tokenizer {}",
    "data": "train --data_dir {} --preset cpu-debug --max_steps 1",
    "eval data": "eval --ckpt good.pth --data_dir {}",
}


@pytest.mark.parametrize("place", PLACES)
def test_no_place_that_reads_a_file_runs_its_code(place, tiny_checkpoint, tmp_path):
    shutil.copy(tiny_checkpoint, tmp_path / "good.pth")
    marker = tmp_path / "marker"
    archive = unsealed(payloads(marker)["os.system"])
    raw = pickle.dumps(payloads(marker)["os.system"])
    for name, content in (("a.pth", seal(archive)), ("b.bin", archive), ("c.pkl", raw),
                          ("d.json", raw), ("e.yaml", b"!!python/object/apply:os.system "
                           b"['touch marker']"), ("f.parquet", raw)):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        command = [*words(PLACES[place].format(name)), "--device", "cpu"]
        result = run(*command, cwd=tmp_path, HF_HUB_OFFLINE="1")
        if (place, name) != ("data", "e.yaml"):  # any text is data to train on
            result.fails(result.code or 1)
        assert not marker.exists(), name


@pytest.mark.parametrize("place", ["resume", "folder"])
def test_no_folder_that_is_read_runs_its_code(place, corpus, tmp_path):
    marker = tmp_path / "marker"
    archive = unsealed(payloads(marker)["os.system"])
    for name in ("last.pth", "pytorch_model.bin", "model.safetensors", "config.json"):
        (tmp_path / name).write_bytes(seal(archive))
    if place == "resume":
        result = run("train", *corpus, *SHORT, "--resume", "--out_dir", tmp_path)
    else:
        result = run("sample", "--prompt", "x", "--ckpt", tmp_path)
    result.fails(result.code or 1)
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


# --- archives and contents that lie, with a valid seal ---


def try_all(path: Path, corpus: list, base: Path | None = None) -> list[str]:
    """The file as --ckpt and as the run (finetune from `base`) to resume: what was not clean."""
    wrong = []
    resume = ["train", *SHORT]
    if base:
        shutil.copy(path, path.with_name("last_finetune.pth"))
        resume = ["finetune", *CPU, "--report_samples", 0, "--ckpt", base]
    for command in (
        ["sample", *words("--prompt x --max_new_tokens 2 --device cpu --ckpt"), path],
        [*resume, *corpus, "--resume", "--out_dir", path.parent],
    ):
        try:
            result = run(*command)
        except Exception as error:
            wrong.append(f"{command[0]}: {type(error).__name__}: {error}")
            continue
        if result.code not in (0, 1, 2) or "Traceback" in result.err:
            wrong.append(f"{command[0]}: exit {result.code}: {result.err}")
    return wrong


def is_clean(path: Path) -> bool:
    """Whether loading succeeds or says no in the one way that is meant."""
    try:
        lp.load_checkpoint(path)
    except lp.UserError:
        pass
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
        return False
    return True


def test_damage_under_a_valid_seal_is_no_traceback(tiny_checkpoint, tmp_path):
    """Bits flipped and bytes cut before the checksum was made: in the archive and its pickle."""
    content, rng, path = unsealed(stored(tiny_checkpoint)), random.Random(6), tmp_path / "a.pth"
    pickled = content.index(b"data.pkl")
    for i in range(100):
        changed = bytearray(content)
        ends = (pickled, pickled + 9000) if i % 2 else (len(content) - 6000, len(content) - 2)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(*ends)] ^= 1 << rng.randrange(8)
        path.write_bytes(seal(bytes(changed)))
        assert is_clean(path), i


def test_a_tensor_that_claims_more_than_it_holds(tiny_checkpoint, tmp_path):
    """One stored number, 10**12 elements of stride 0: no memory is taken for it."""
    import resource

    bomb = torch.zeros(1).expand(10**6, 10**6)
    state, path = stored(tiny_checkpoint), tmp_path / "bomb.pth"
    name = next(iter(state["weights"]))
    moments = state["optimizer"][name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for changed in (
        state | {"weights": state["weights"] | {name: bomb}},
        state | {"optimizer": state["optimizer"] | {name: moments | {"exp_avg": bomb}}},
        state | {"optimizer": {name: {"exp_avg": bomb}}},
    ):
        lp.save_checkpoint(path, changed)
        assert path.stat().st_size < 10**6
        assert refused(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


@pytest.mark.parametrize(
    "claim",
    [
        {"n_embd": 10**9},
        {"n_layer": 10**9},
        {"vocab_size": 2**62},
        {"block_size": 10**12},
        {"n_inner": -1},
        {"n_head": 0},
        {"n_embd": "64"},
        {"dropout": float("nan")},
        {"dropout": 2.0},
        {"pos": "rope" * 1000},
        {"n_layer": 64},
        {"n_embd": 2**16, "n_head": 2, "head_dim": 2**12},
        {"block_size": 2**20, "pos": "alibi"},
        {"unknown": 1},
    ],
)
def test_a_model_that_claims_another_size(claim, tiny_checkpoint, tmp_path):
    state = stored(tiny_checkpoint)
    state["model_config"] |= claim
    lp.save_checkpoint(tmp_path / "lie.pth", state)
    result = run("sample", *words("--prompt x --device cpu --ckpt"), tmp_path / "lie.pth")
    result.fails(1)
    assert len(result.errors) == 1


def test_a_zip_bomb_is_refused(tiny_checkpoint, tmp_path):
    source = zipfile.ZipFile(io.BytesIO(unsealed(stored(tiny_checkpoint))))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in source.infolist():
            archive.writestr(entry.filename, source.read(entry))
        archive.writestr("archive/data/bomb", bytes(2**26))
    (tmp_path / "bomb.pth").write_bytes(seal(packed.getvalue()))
    assert refused(tmp_path / "bomb.pth")


WRONG = [None, -1, 10**30, float("nan"), "text", [], {}, True, [1] * 3, {"a": {"b": 1}}, 1.5]


@pytest.fixture(scope="module")
def lora_checkpoint(tmp_path_factory, corpus, tiny_checkpoint) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    flags = words("--method lora --max_steps 2 --batch_size 4 --report_samples 0 --device cpu")
    run("finetune", *corpus, *flags, "--ckpt", tiny_checkpoint, "--out_dir", folder).ok()
    return folder / "best_finetune.pth"


def lies(state: dict, rng: random.Random, share: float = 0.15):
    """(what was changed, a state): each section and each field gone, or of other type and size."""
    for section, value in state.items():
        yield f"{section} gone", {k: v for k, v in state.items() if k != section}
        for wrong in rng.sample(WRONG, 1 if share < 1 else 4):
            yield f"{section} = {wrong}", state | {section: wrong}
        for field in value if isinstance(value, dict) else ():
            wrong = rng.choice(WRONG)
            rest = {k: v for k, v in value.items() if k != field}
            if rng.random() < share:
                yield f"{section}.{field} = {wrong}", state | {section: rest | {field: wrong}}
            if rng.random() < share / 4:
                yield f"{section}.{field} gone", state | {section: rest}


@pytest.mark.parametrize("lora", [False, True])
def test_every_field_may_lie(lora, tiny_checkpoint, lora_checkpoint, corpus, tmp_path):
    path, rng, wrong = tmp_path / "last.pth", random.Random(5), []
    base = tiny_checkpoint if lora else None
    for what, state in lies(stored(lora_checkpoint if lora else tiny_checkpoint), rng):
        lp.save_checkpoint(path, state)
        wrong += [f"{what}: {line}" for line in try_all(path, corpus, base)]
    assert not wrong, "\n".join(wrong)


def changed_weight(change):
    """A function that puts another tensor in place of the first weight."""

    def apply(state):
        name = next(iter(state["weights"]))
        state["weights"][name] = change(state["weights"][name])

    return apply


def changed_moment(key, change):
    """A function that puts another tensor in place of the first parameter's moment `key`."""

    def apply(state):
        moments = next(iter(state["optimizer"].values()))
        moments[key] = change(moments[key])

    return apply


LIES = {  # name: (change, in words what is said about it)
    "moments without a shape": (changed_moment("exp_avg", lambda t: t.sum()), "another shape"),
    "steps with a shape": (changed_moment("step", lambda t: t[None]), "another shape"),
    "moments that are not finite": (changed_moment("exp_avg_sq", lambda t: t / 0), "finite"),
    "weights that are not numbers": (changed_weight(lambda t: t * math.nan), "finite"),
    "weights of eight bits": (changed_weight(lambda t: t.to(torch.float8_e4m3fn)), "floating"),
    "whole numbers": (changed_weight(lambda t: t.long()), "floating"),
    "weights without values": (changed_weight(lambda t: t.to("meta")), "plain tensor"),
    "sparse weights": (changed_weight(lambda t: t.to_sparse()), "plain tensor"),
    "a step beyond the last": (lambda s: s["progress"].update(step=99), "step 99 of 12"),
    "micro-batches of nothing": (lambda s: s["progress"].update(grad_accum=0), "grad_accum"),
    "micro-batches that do not divide": (lambda s: s["progress"].update(grad_accum=3), "divide"),
    "settings that are not plain": (lambda s: s["data"].update(x={1: 2}), "not text"),
    "moments of an unknown weight": (lambda s: s["optimizer"].update(x={"step": torch.zeros(())}),
                                     ""),
    "a type of its own": (lambda s: s["versions"].update(x=torch.float32), "plain data"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused_at_the_door(lie, tiny_checkpoint, tmp_path):
    """By one rule for all tensors, before anything computes with them, for every command."""
    change, word = LIES[lie]
    state, path = stored(tiny_checkpoint), tmp_path / "last.pth"
    change(state)
    lp.save_checkpoint(path, state)
    for argv in (["train", *SHORT, "--resume", "--out_dir", tmp_path],
                 [*words("sample --prompt x --device cpu --ckpt"), path]):  # fmt: skip
        result = run(*argv).fails(1, "last.pth is not a usable checkpoint", word)
        assert len(result.errors) == 1


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
def test_a_missing_moment_is_not_invented(key, tiny_checkpoint, corpus, tmp_path):
    state = stored(tiny_checkpoint)
    del next(iter(state["optimizer"].values()))[key]
    lp.save_checkpoint(tmp_path / "last.pth", state)
    run("train", *corpus, "--resume", "--out_dir", tmp_path).fails(1, "optimizer")


def test_a_run_that_began_before_a_setting_existed_goes_on(corpus, tmp_path):
    flags = ["train", *corpus, *SHORT, "--out_dir", tmp_path]
    run(*flags, "--stop_after", 2).ok()
    state = lp.load_checkpoint(tmp_path / "last.pth")
    del state["config"]["answer_weight"], state["config"]["token_dropout"]
    del state["model_config"]["token_dropout"]
    lp.save_checkpoint(tmp_path / "last.pth", state)
    run(*flags, "--resume").ok()
    run(*flags, "--resume", "--answer_weight", 2).fails(1, "answer_weight (from 0 to 2)")


def test_adapters_without_targets_are_refused(lora_checkpoint, tmp_path):
    state = stored(lora_checkpoint)
    state["lora"]["targets"] = []
    lp.save_checkpoint(tmp_path / "a.pth", state)
    result = run(*words("sample --prompt x --device cpu --ckpt"), tmp_path / "a.pth")
    assert len(result.fails(1, "adapters").errors) == 1


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "integers", "half", "moments"])
def test_weights_that_do_not_fit(change, tiny_checkpoint, corpus, tmp_path):
    state, path = stored(tiny_checkpoint), tmp_path / "last.pth"
    weights, name = state["weights"], next(iter(state["weights"]))
    if change == "missing":
        del weights[name]
    elif change == "extra":
        weights["blocks.9.extra"] = torch.zeros(3)
    elif change == "shape":
        weights[name] = weights[name].T.contiguous()
    elif change == "integers":
        weights[name] = weights[name].long()
    elif change == "moments":
        state["optimizer"][name]["exp_avg"] = torch.zeros(3, 3)
    else:
        weights[name] = weights[name].half()
    lp.save_checkpoint(path, state)
    assert try_all(path, corpus) == []
    if change in ("missing", "extra", "shape"):
        flags = words("--prompt x --max_new_tokens 2 --device cpu --ckpt")
        run("sample", *flags, path).fails(1, "blocks.9.extra" if change == "extra" else name)


# --- a folder that holds something ---


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, corpus, tiny_checkpoint) -> Path:
    """The folder of a short finetune, beside its base; not to be written to."""
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


@pytest.mark.parametrize("there", [False, True])
def test_resume_where_nothing_is_says_that_it_starts(there, corpus, tmp_path):
    folder = tmp_path / "mistyped"
    if there:
        folder.mkdir()
    result = run("train", *corpus, *SHORT, "--resume", "--out_dir", folder).ok()
    assert f"{folder} holds no run" in result.err
    assert "from step 0" in result.err
    assert curve(folder, "val")


def test_a_folder_is_locked_before_it_is_looked_at(corpus, tmp_path, monkeypatch):
    """A run that begins while another prepares its data into the same folder is refused."""
    command, inner = ["train", *corpus, *SHORT, "--out_dir", tmp_path / "run"], []
    build = lp.build_corpus_from_sources

    def meanwhile(*args, **more):
        if not inner:
            inner.append(None)
            inner[0] = run(*command)
        return build(*args, **more)

    monkeypatch.setattr(lp, "build_corpus_from_sources", meanwhile)
    run(*command).ok()
    inner[0].fails(1, "another run")


@pytest.mark.parametrize("move", [shutil.copytree, shutil.move])
def test_a_folder_resumes_where_it_is_now(move, corpus, tmp_path):
    """Not where it was, which its settings might say: `ckpts` is the default folder."""
    run("train", *corpus, *SHORT, "--out_dir", tmp_path / "old", "--stop_after", 4).ok()
    before = (tmp_path / "old/last.pth").read_bytes()
    move(tmp_path / "old", tmp_path / "ckpts")
    run("train", "--resume", cwd=tmp_path).ok()
    assert lp.load_checkpoint(tmp_path / "ckpts/last.pth")["progress"]["step"] == 10
    if move is shutil.copytree:
        assert (tmp_path / "old/last.pth").read_bytes() == before
    else:
        assert not (tmp_path / "old").exists()


def test_a_checkpoint_is_read_once(corpus, tmp_path, monkeypatch):
    run("train", *corpus, *SHORT, "--out_dir", tmp_path, "--stop_after", 4).ok()
    loads, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **m: (loads.append(a), load(*a, **m))[1])
    run("train", "--resume", "--out_dir", tmp_path).ok()
    assert [Path(a[0]).name for a in loads].count("last.pth") == 1


def test_the_other_command_does_not_resume(corpus, tuned, tmp_path):
    shutil.copy(tuned / "last_finetune.pth", tmp_path / "last.pth")
    run("train", *corpus, "--resume", "--out_dir", tmp_path).fails(1, "finetune")


@pytest.mark.parametrize("name", ["best.pth", "last.pth", "config.json", "metrics.csv"])
@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]])
def test_files_of_others_are_never_replaced(name, flags, corpus, tmp_path):
    file, beside = tmp_path / "run" / name, tmp_path / "run/.notes.tmp"
    file.parent.mkdir()
    file.write_bytes(b'{"model_type": "gpt2"}' if name.endswith("json") else b"a,b\n1,2\n" * 99)
    beside.write_bytes(b"mine")
    before = file.read_bytes()
    result = run("train", *corpus, *SHORT, *flags, "--out_dir", tmp_path / "run")
    unsound = "--resume" in flags and name == "last.pth"
    result.fails(1, str(file), "not of this program" if unsound else "--out_dir")
    assert file.read_bytes() == before
    assert beside.exists()


@pytest.mark.parametrize("name", ["config.json", "metrics.csv"])
def test_a_run_that_goes_on_replaces_no_file_of_others(name, started, tmp_path):
    (tmp_path / "run" / name).write_text("my notes")
    run(*started).fails(1, name, "not written by a run")
    assert (tmp_path / "run" / name).read_text() == "my notes"


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
    """Else records that the base was trained on would validate."""
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


@pytest.mark.parametrize("objective", ["ntp", "dpo"])
def test_a_finetune_can_overfit_one_batch(objective, corpus, pairs, tiny_checkpoint, tmp_path):
    command = pairs if objective == "dpo" else ["finetune", *corpus, *CPU, "--batch_size", 4]
    flags = words("--overfit_batch --lr 1e-2 --report_samples 0")
    result = run(*command, *flags, "--ckpt", tiny_checkpoint, "--out_dir", tmp_path / "run").ok()
    assert "overfitted one batch" in result.out
    assert not (tmp_path / "run").exists()


def test_more_micro_batches_are_other_masks(corpus, tmp_path):
    command = ["train", *corpus, *SHORT, "--out_dir", tmp_path / "run"]
    run(*command, "--stop_after", 2).ok()
    assert "masks" not in run(*command, "--resume", "--stop_after", 2).ok().err
    resumed = run(*command, "--resume", "--grad_accum", 2, "--stop_after", 2).ok()
    assert "other masks" in resumed.err
    base = [*command[:-1], tmp_path / "dry", "--dropout", 0]
    run(*base, "--stop_after", 2).ok()
    assert "masks" not in run(*base, "--resume", "--grad_accum", 2).ok().err


@pytest.mark.parametrize("suffix", ["", "_finetune"])
def test_the_advice_after_divergence_can_be_followed(suffix, corpus, tuned, tmp_path, monkeypatch):
    command = ["finetune", "--ckpt", tuned / "best.pth", "--report_samples", 0] if suffix else [
        "train", *SHAPE]  # fmt: skip
    command += [*corpus, *CPU, *words("--batch_size 8 --max_steps 10 --save_interval 1")]
    with monkeypatch.context() as patch:
        step, calls = lp.train_step, []

        def diverge(*args):
            calls.append(1)
            if len(calls) == 5:
                raise lp.Diverged("step 5: loss nan")
            return step(*args)

        patch.setattr(lp, "train_step", diverge)
        result = run(*command, "--out_dir", tmp_path / "run").fails(1, "--lr", "--out_dir")
    last = tmp_path / f"run/last{suffix}.pth"
    way = ["--ckpt" if suffix else "--init_from", last]
    assert " ".join(map(str, way)) in result.err
    flags = [*corpus, *CPU, *words("--batch_size 8 --max_steps 2 --lr 1e-5")]
    flags += ["--report_samples", 0] if suffix else []
    run(command[0], *flags, *way, "--out_dir", tmp_path / "again").ok()


@pytest.mark.parametrize("lr", [1e-3, 1e-12])
def test_a_finetune_is_compared_with_its_base(lr, corpus, tiny_checkpoint, tmp_path):
    """Also when it is stopped and goes on: best_finetune.pth is not worse without a word."""
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


@pytest.mark.parametrize("objective", ["ntp", "dpo"])
def test_a_log_has_the_columns_that_are_filled(objective, corpus, pairs, tiny_checkpoint, tmp_path):
    command = pairs if objective == "dpo" else ["finetune", *corpus, *CPU, "--log_interval", 1]
    flags = ["--report_samples", 0, "--max_steps", 2, "--ckpt", tiny_checkpoint]
    run(*command, *flags, "--out_dir", tmp_path / "run").ok()
    rows = metrics(tmp_path / "run", "train", "_finetune")
    assert all(all(row.values()) for row in rows)
    assert ("reward_margin" in rows[0]) == (objective == "dpo")


@pytest.mark.parametrize(
    "tail", [b"\0" * 200_000, b"5,0,train,\xff\xfe", b"5,0,train,1.0\0,1,1,1,1\n"]
)
def test_a_log_with_a_broken_tail_does_not_block(tail, started, tmp_path):
    rows = curve(tmp_path / "run")
    with open(tmp_path / "run/metrics.csv", "ab") as file:
        file.write(tail)
    run(*started).ok()
    assert curve(tmp_path / "run")[: len(rows)] == rows
    assert b"\0" not in (tmp_path / "run/metrics.csv").read_bytes()


@pytest.mark.parametrize("flag", ["--config", "--ckpt"])
def test_a_pipe_is_refused_at_once(flag, tmp_path):
    pipe = tmp_path / "pipe.pth"
    os.mkfifo(pipe)
    command = ["train", "--config", pipe] if flag == "--config" else ["sample", "--ckpt", pipe]
    result = run(*command, "--prompt", "x") if flag == "--ckpt" else run(*command)
    result.fails(result.code or 1, "pipe.pth")


@pytest.mark.parametrize("what", ["file", "dangling link", "below a file", "long name"])
def test_something_in_the_way_of_a_folder(what, corpus, tmp_path):
    folder = tmp_path / "run"
    if what == "file":
        folder.write_text("x")
    elif what == "dangling link":
        folder.symlink_to(tmp_path / "nowhere")
    elif what == "below a file":
        folder.write_text("x")
        folder = folder / "in"
    else:
        folder = tmp_path / ("x" * 300)
    result = run("train", *corpus, *SHORT, "--out_dir", folder).fails(1, folder.name[:50])
    assert len(result.errors) == 1
    assert "Error:" not in result.err


# --- saving under adverse conditions ---


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*") if "tmp" in p.name]


@pytest.fixture
def started(corpus, tmp_path) -> list:
    """A run stopped at step 4 in tmp_path/run; returns the command that goes on."""
    command = ["train", *corpus, *SHORT, "--save_interval", "1", "--out_dir", tmp_path / "run"]
    run(*command, "--stop_after", 4).ok()
    return [*command, "--resume"]


def intact(folder: Path, content: bytes) -> None:
    """The checkpoint is the one from before, and no temporary file was left."""
    assert (folder / "last.pth").read_bytes() == content
    assert tensors(folder / "last.pth")
    assert leftovers(folder) == []


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failing_disk_loses_nothing(function, started, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    before = (folder / "last.pth").read_bytes()
    real = getattr(os, function)

    def fail(*args, **more):
        """Only checkpoints meet the fault: the run gets as far as its first save."""
        about = os.readlink(f"/proc/self/fd/{args[0]}") if function == "fsync" else str(args[1])
        if ".pth" in about:
            raise OSError(errno.EIO, "Input/output error")
        return real(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        result = run(*started).fails(1, "last.pth", "Input/output error")
    assert len(result.errors) == 1
    intact(folder, before)
    run(*started).ok()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_file_that_may_not_grow(share, started, tmp_path):
    """The limit on a file's size makes write fail in the midst of a save, as a full disk does."""
    import resource

    folder = tmp_path / "run"
    before = (folder / "last.pth").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        size = 10_000 + int(share * len(before))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        result = run(*started)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    result.fails(1, "last.pth", "bytes")
    assert len(result.errors) == 1
    intact(folder, before)
    run(*started).ok()


@pytest.fixture
def mount(tmp_path):
    """Mount something for a while; skips where that is not allowed."""
    mounted = []

    def mount(*argv) -> Path:
        point = Path(argv[-1])
        point.mkdir(exist_ok=True)
        if (
            not shutil.which("mount")
            or subprocess.run(["mount", *argv], capture_output=True).returncode
        ):
            pytest.skip("mounting needs root: run the tests as root to see it")
        mounted.append(point)
        return point

    yield mount
    for point in reversed(mounted):
        subprocess.run(["umount", point], check=True)


@pytest.mark.parametrize("free", [0, 1000, 100_000])
def test_a_full_disk(free, corpus, tmp_path, mount):
    disk = mount("-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path / "disk"))
    command = ["train", *corpus, *SHORT, "--save_interval", "1", "--out_dir", disk / "run"]
    run(*command, "--stop_after", 4).ok()
    before = (disk / "run/last.pth").read_bytes()
    room = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(bytes(max(0, room - free)))
    result = run(*command, "--resume").fails(1, str(disk / "run"), "bytes")
    assert len(result.errors) == 1
    intact(disk / "run", before)
    (disk / "filler").unlink()
    run(*command, "--resume").ok()
    run("train", *corpus, *SHORT, "--out_dir", tmp_path / "whole").ok()
    assert differences(tmp_path / "whole/last.pth", disk / "run/last.pth") == []


def test_a_full_disk_before_the_first_save(corpus, tmp_path, mount):
    disk = mount("-t", "tmpfs", "-o", "size=200k", "none", str(tmp_path / "disk"))
    result = run("train", *corpus, *SHORT, "--out_dir", disk / "run").fails(1, "bytes")
    assert len(result.errors) == 1
    assert not list(disk.glob("run/*.pth"))
    assert leftovers(disk) == []


def test_a_read_only_folder(corpus, tmp_path, started, mount):
    folder = tmp_path / "run"
    before = (folder / "last.pth").read_bytes()
    if os.getuid():
        folder.chmod(0o500)
    else:  # permissions do not bind root: a read-only mount does
        mount("--bind", str(folder), str(folder))
        if subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)]).returncode:
            pytest.skip(
                "this system mounts nothing read-only: run the tests as another user than root"
            )
    try:
        result = run(*started).fails(1, str(folder))
    finally:
        if os.getuid():
            folder.chmod(0o700)
    assert len(result.errors) == 1
    intact(folder, before)


def test_stale_temporaries_are_swept(started, tmp_path):
    folder = tmp_path / "run"
    for name in (".last.pth.999999.tmp", ".metrics.csv.999999.tmp", ".best.pth.1.tmp"):
        (folder / name).write_bytes(b"half")
    run(*started).ok()
    assert leftovers(folder) == []


def test_nothing_is_renamed_before_it_is_synced(corpus, tmp_path, monkeypatch):
    """Else a power cut may leave the new name with nothing in it; then the folder's own sync."""
    synced, waiting, replace, fsync = set(), [], os.replace, os.fsync

    def watch_sync(descriptor):
        fsync(descriptor)
        stat = os.fstat(descriptor)
        synced.add((stat.st_ino, stat.st_size))
        if stat.st_ino == tmp_path.stat().st_ino:
            waiting.clear()

    def watch_rename(source, target):
        assert (os.stat(source).st_ino, os.stat(source).st_size) in synced, target
        waiting.append(target)
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_sync)
    monkeypatch.setattr(os, "replace", watch_rename)
    run("train", *corpus, *SHORT, "--out_dir", tmp_path).ok()
    assert synced
    assert not waiting


def test_best_is_written_before_last(corpus, tmp_path, monkeypatch):
    """A run killed between the two has a best that its last knows nothing of, never the reverse."""
    names, replace = [], os.replace

    def watch(source, target):
        names.append(Path(target).name)
        return replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    run("train", *corpus, *SHORT, "--max_steps", 4, "--out_dir", tmp_path).ok()
    assert [n for n in names if n.endswith(".pth")] == ["best.pth", "last.pth"]


def test_a_broken_log_is_mended(started, tmp_path):
    """A crash may cut metrics.csv anywhere: whole rows up to the resumed step stay."""
    log = tmp_path / "run/metrics.csv"
    rows = curve(tmp_path / "run", "val")
    with open(log, "a") as file:
        file.write("9,2,train,1.0,1.0,1,1,1,,,\n4,0,tra")
    run(*started).ok()
    assert curve(tmp_path / "run", "val")[: len(rows)] == rows
    steps = [step for step, _ in curve(tmp_path / "run")]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("command", ["train", "sample"])
def test_stdout_that_is_full(command, corpus, tiny_checkpoint, tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full: run the tests on Linux")
    argv = {
        "train": ["train", *corpus, *SHORT, "--out_dir", tmp_path],
        "sample": [*words("sample --prompt x --device cpu --ckpt"), tiny_checkpoint],
    }[command]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, str(PROGRAM), *map(str, argv)],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "error: stdout cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
