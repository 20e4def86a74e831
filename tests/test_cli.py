"""The command line: help, usage errors, where settings come from, what a failure leaves behind."""

import json
import os
import random
import shlex
import subprocess
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
from conftest import (
    CPU,
    PROGRAM,
    ROOT,
    TINY,
    differences,
    needs,
    run,
    run_process,
    words,
    write_corpus,
)

import llm_pipeline as lp

COMMANDS = words("train finetune eval sample prepare export bench")
ONE = [*TINY, "--max_steps", "1"]


def snapshot(folder) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def settings_of(command: str) -> dict:
    return {f.name: f for f in fields(lp.COMMANDS[command][0])}


def flags_shown(text: str) -> list[str]:
    lines = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    return [name.removeprefix("--").removeprefix("no_") for name in lines]


# --- help ---


@pytest.mark.parametrize("command", COMMANDS)
def test_help_all_lists_every_setting_with_its_default_and_its_choices(command):
    result = run(command, "--help_all").ok()
    text = " ".join(result.out.split())
    assert sorted(flags_shown(result.out)) == sorted(settings_of(command))
    for name, field in settings_of(command).items():
        if field.default not in ("", None) and field.type != "bool":
            assert f"default: {field.default}" in text.replace("- ", "-"), name
        for choice in field.metadata.get("choices", ()):
            assert choice in text, name
    assert run(command, "--help-all").out == result.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_what_a_first_user_needs(command):
    result = run(command, "-h").ok()
    shown = flags_shown(result.out)
    assert 4 <= len(shown) <= 20
    assert result.out.startswith(f"usage: llm_pipeline.py {command} [")
    assert run(command, "--help").out == result.out
    if command in ("train", "bench"):
        assert {"n_layer", "n_head", "n_embd", "block_size", "threads"} <= set(shown)
    assert {*lp.FIRST_FLAGS.split()} <= {name for c in COMMANDS for name in settings_of(c)}
    examples = [line for line in result.out.split("examples:")[1].splitlines() if line]
    for line in examples:  # the program must accept them
        name, config = lp.parse(shlex.split(line, comments=True)[2:])
        assert isinstance(config, lp.COMMANDS[name][0])
    assert examples


@pytest.mark.parametrize("argv", ["", "--help", "-h", "--help_all"])
def test_the_program_says_what_it_is_its_commands_and_the_shortest_path(argv):
    result = run(*words(argv)).ok()
    assert all(f"\n    {command} " in result.out for command in COMMANDS)
    assert "python llm_pipeline.py train --preset cpu-debug" in result.out
    assert run("--version").ok().out.startswith(f"llm_pipeline.py {lp.__version__}, torch ")


def test_the_command_lines_of_the_readme_are_taken(tmp_path, monkeypatch):
    for package in words("tokenizers peft gguf datasets transformers"):
        needs(package)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("python llm_pipeline.py ")]
    for line in lines:
        name, config = lp.parse(shlex.split(line, comments=True)[2:])
        assert isinstance(config, lp.COMMANDS[name][0])
    assert len(lines) > 9


def test_importing_has_no_side_effect(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import llm_pipeline"
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


# --- usage errors stop a command before it does anything, in one line after the usage line ---

PROBLEMS = {
    "train --lr nan": "lr must be a number above 0.0 up to 10.0, not 'nan'",
    "train --lr -0.1": "lr must be a number above 0.0",
    "train --lr": "--lr: expected one argument",
    "train --batch_size 2.5": "batch_size must be a whole number",
    "train --dropout 1": "dropout must be",
    "train --lr_schedule cosinus": "one of constant, linear, cosine, wsd",
    "train --arch gpt3": "gpt2, modern",
    "train --device gpu": "--device must be auto",
    "train --resume=5": "--resume",
    "train --data_dir a\0b": "data_dir must be text",
    "train --n_embd 510 --n_head 8": "n_embd 510 is not divisible by n_head 8",
    "train --batch_size 8 --grad_accum 3": "batch_size 8",
    "train --resume --overwrite": "--overwrite",
    "train --minutes 3 --max_steps 9": "--max_steps",
    "train --epcohs 3": "did you mean --epochs?",
    "train --n-embed 64": "did you mean --n_embd?",
    "train --learning_rate 1e-3": "did you mean --lr?",
    "train --top_p 1": "--top_p belongs to sample",
    "train stray": "unexpected 'stray': settings are given as --name value",
    "train resume": "unexpected 'resume'",
    "trian": "invalid choice: 'trian' (choose from",
    "--lr 3": "llm_pipeline.py: error",
    "sample --template jinja": "template must be one of",
    "sample --prompt --top-k 3": "--prompt: expected one argument",
    "eval --split test": "split must be one of val, train, all",
    "eval --checkpoint x.pth": "did you mean --ckpt?",
    "finetune --objective DPO --sampled_softmax 9": "leave --sampled_softmax out",
    "prepare --streaming": "--hf_dataset",
    "export --gguf x --adapter": "--gguf and --adapter",
}  # fmt: skip


@pytest.mark.parametrize("argv", PROBLEMS)
def test_a_problem_is_named_before_anything_is_done(argv, tmp_path):
    result = run(*argv.split(" "), cwd=tmp_path).fails(2, PROBLEMS[argv])
    assert result.out == ""
    assert result.err.startswith("usage: llm_pipeline.py ")
    assert len(result.err.splitlines()) == 2, result.err
    assert not list(tmp_path.iterdir())


# --- later failures are one line ---

FAILURES = {
    "train --data_dir missing --out_dir runs/a": "missing",
    "train --data_dir empty --out_dir runs/a --processed_dir stores/b": "empty",
    "train --device cuda:99": "cuda:99",
    "train --tokenizer missing.json --data_dir text.txt": "missing.json",
    "train --resume --out_dir runs/a": "runs/a",
    "finetune --ckpt missing.pth": "missing.pth",
    "sample --ckpt missing.pth": "missing.pth",
    "eval --ckpt empty/x.pth": "x.pth",
    "prepare --data_dir empty --out_dir store": "empty",
    "export --ckpt missing.pth --out_dir hf": "missing.pth",
    "train --tokenizer bpe --data_dir text.txt": "pip install tokenizers",
    "prepare --hf_dataset wikitext": "pip install datasets",
    "train --data_dir text.txt --out_dir text.txt/x": "text.txt/x as a folder: Not a directory",
    f"train --data_dir text.txt --out_dir {300 * 'x'}": "File name too long",
    f"train --data_dir {300 * 'x'}": "File name too long",
    f"sample --ckpt {300 * 'x'}": "File name too long",
}


@pytest.mark.parametrize("argv", FAILURES)
def test_a_failed_command_says_why_and_leaves_no_folder(argv, tmp_path, monkeypatch):
    for package in ("tokenizers", "datasets"):  # as if they were not installed
        monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("Once upon a time. " * 300)
    result = run(*words(argv), cwd=tmp_path).fails(1, FAILURES[argv])
    assert len(result.errors) == 1
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["empty", "text.txt"]


def test_a_failed_run_takes_only_its_own_folder_away(tmp_path):
    """Another run in the same parent may have a name that ends like a lock's."""
    with pytest.raises(ZeroDivisionError), lp.run_lock(tmp_path / "runs/a"):
        (tmp_path / "runs/block").mkdir()
        (tmp_path / "runs/block/last.pth").write_bytes(b"weights")
        1 / 0  # noqa: B018
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["block"]
    assert (tmp_path / "runs/block/last.pth").exists()


def test_what_is_said_of_an_error_and_debug_shows_where(tmp_path):
    result = run_process("sample", "--ckpt", tmp_path / "none.pth", "--debug", cwd=tmp_path)
    assert result.code == 1
    assert "Traceback" in result.err
    for error in (MemoryError(), RuntimeError("x: can't allocate memory: 99 b")):
        assert "lower --batch_size" in lp.explanation(error)


# --- where settings come from ---


def test_dashes_and_underscores_are_the_same():
    one = lp.parse(words("train --max_steps 3 --no_bias --data_dir a-b"))[1]
    other = lp.parse(words("train --max-steps=3 --no-bias --data-dir=a-b"))[1]
    assert one == other
    assert (one.max_steps, one.bias, one.data_dir) == (3, False, "a-b")
    assert lp.parse(["sample", "--prompt=--out-dir is"])[1].prompt == "--out-dir is"
    assert lp.parse(["sample", "--prompt", "--out-dir is"])[1].prompt == "--out-dir is"
    assert lp.parse(words("train --no_tie_weights --tie_weights"))[1].tie_weights  # the last wins


def test_precedence(tmp_path, monkeypatch):
    """defaults < arch < preset < recipe < config file < flags, with lr at every level."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.json").write_text('{"lr": 0.04, "patience": 3, "recipe": "fast"}')
    layers = {
        "": 3e-4,
        "--preset small-16g": 2e-4,
        "--preset small-16g --recipe fast --n_embd 128 --max_steps 400": 0.02,
        "--preset small-16g --recipe fast --config c.json": 0.04,
        "--preset small-16g --recipe fast --config c.json --lr 0.05": 0.05,
    }
    for flags, lr in layers.items():
        config = lp.parse(["train", *words(flags)])[1]
        assert config.lr == lr, flags
        assert config.optimizer == ("muon" if "fast" in flags else "adamw")
        assert config.patience == (3 if "c.json" in flags else 0)
        assert ("lr" in config.explicit) == (lr in (0.04, 0.05))
    assert lp.parse(words("train --arch modern"))[1].norm == "rmsnorm"
    assert lp.parse(words("train --arch modern --norm layernorm"))[1].norm == "layernorm"
    assert lp.parse(words("train --recipe fast"))[1].arch == "modern"
    assert lp.parse(words("train --recipe fast --arch gpt2"))[1].pos == "learned"
    assert lp.parse(words("train --overfit_batch"))[1].dropout == 0
    tuned = lp.parse(words("finetune --preset small-16g"))[1]
    assert (tuned.batch_size, tuned.lr, tuned.epochs) == (32, 1e-4, 3)


def test_presets_are_as_documented_in_any_case():
    table = {
        "Tiny-8G": (256, 6, 8, 512, 32, 1, 3e-4, 5),
        "Compact-8G": (384, 6, 8, 512, 24, 2, 3e-4, 6),
        "Small-16G": (512, 8, 8, 640, 32, 1, 2e-4, 6),
        "CPU-Debug": (128, 2, 4, 256, 8, 1, 5e-4, 1),
    }
    names = words("block_size n_layer n_head n_embd batch_size grad_accum lr epochs")
    for preset, values in table.items():
        config = lp.parse(["train", "--preset", preset])[1]
        assert tuple(getattr(config, name) for name in names) == values
        assert config == lp.parse(["train", "--preset", preset.lower()])[1]


NESTED = {
    "json": """{"data": {"dataset_name": "wikitext", "dataset_config": "wikitext-2-raw-v1",
        "seq_length": 128}, "model": {"hidden_size": 64, "num_attention_heads": 4},
        "training": {"batch_size": 32, "optimizer": {"learning_rate": 0.002}}}""",
    "yaml": """data: {dataset_name: wikitext, dataset_config: wikitext-2-raw-v1, seq_length: 128}
model: {hidden_size: 64, num_attention_heads: 4}
training:\n  batch_size: 32\n  optimizer: {learning_rate: 2e-3}""",
}


@pytest.mark.parametrize("ending", NESTED)
def test_nested_config_files_with_the_names_of_others(ending, tmp_path, capsys):
    needs(ending)
    file = tmp_path / f"c.{ending}"
    file.write_text(NESTED[ending], encoding="utf-8")
    for package in ("datasets", "tokenizers"):
        needs(package)
    config = lp.parse(["train", "--config", str(file)])[1]
    assert (config.hf_dataset, config.hf_config) == ("wikitext", "wikitext-2-raw-v1")
    assert (config.block_size, config.batch_size, config.lr) == (128, 32, 2e-3)
    assert (config.n_embd, config.n_head) == (64, 4)
    for command in COMMANDS:
        lp.parse([command, "--config", str(file)])
    capsys.readouterr()
    lp.parse(["sample", "--config", str(file)])
    assert "left out 7 settings of other commands" in capsys.readouterr().err


def test_yaml_says_off_and_numbers_in_its_own_way(tmp_path):
    needs("yaml")
    file = tmp_path / "c.yaml"
    file.write_text("compile: off\nlr: 1e-4\nbias: no\npreset: CPU-Debug\n")
    config = lp.parse(["train", "--config", str(file)])[1]
    assert (config.compile, config.lr, config.bias) == ("off", 1e-4, False)
    assert config.preset == "cpu-debug"
    file.write_text("torch_compile: true\n")
    assert lp.parse(["train", "--config", str(file)])[1].compile == "on"


@pytest.fixture(scope="module")
def a_run(corpus, tmp_path_factory) -> Path:
    """The folder of a short run, with a finetune of it."""
    folder = tmp_path_factory.mktemp("config") / "run"
    flags = words("--recipe fast --max_steps 6 --n_kv_head 1")
    run("train", *corpus, *TINY, *flags, "--out_dir", folder).ok()
    flags = words("--max_steps 3 --batch_size 4 --report_samples 0 --eval_batches 1 --method lora")
    run("finetune", *corpus, *CPU, *flags, "--ckpt", folder / "best.pth", "--out_dir", folder).ok()
    return folder


def test_a_snapshot_and_nothing_else_repeats_the_run(a_run, tmp_path):
    for command, suffix in (("train", ""), ("finetune", "_finetune")):
        config = a_run / f"config{suffix}.json"
        run(command, "--config", config, "--out_dir", tmp_path).ok()
        last = f"last{suffix}.pth"
        assert differences(a_run / last, tmp_path / last) == []
        assert json.loads(config.read_text()) == json.loads((tmp_path / config.name).read_text())


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("suffix", ["", "_finetune"])
def test_a_snapshot_is_a_config_for_every_command(command, suffix, a_run):
    file = a_run / f"config{suffix}.json"
    stored, config = json.loads(file.read_text()), lp.parse([command, "--config", str(file)])[1]
    for name in words("data_dir processed_dir val_fraction device dtype threads"):
        if hasattr(config, name):
            assert getattr(config, name) == stored[name], name
            assert name in config.explicit


def test_a_snapshot_of_a_run_on_a_store_is_a_config(corpus, tmp_path):
    """The store's vocabulary came out smaller than requested."""
    needs("tokenizers")
    bpe = words("--tokenizer bpe --vocab_size 4000")
    store = run("prepare", *corpus, *bpe, "--out_dir", tmp_path / "st").ok().out.split()[-1]
    flags = ["--data_dir", store, *TINY, "--max_steps", 2, "--out_dir"]
    run("train", *flags, tmp_path / "a").ok()
    assert snapshot(tmp_path / "a")["vocabulary"]["size"] < 4000
    run("train", "--config", tmp_path / "a/config.json", "--out_dir", tmp_path / "b").ok()
    assert differences(tmp_path / "a/last.pth", tmp_path / "b/last.pth") == []


def test_a_snapshot_holds_nothing_of_its_session(a_run, tmp_path):
    """Otherwise its --overwrite would destroy the run that it is a snapshot of."""
    assert not {"overwrite", "resume", "out_dir", "config"} & set(snapshot(a_run))
    run("train", "--config", a_run / "config.json", "--out_dir", a_run).fails(1, "--overwrite")


BAD_CONFIGS = {
    "broken.json": (b'{"lr": 0.1', "broken.json"),
    "list.json": (b"[1, 2]", "table"),
    "deep.json": (b"[" * 100_000 + b"]" * 100_000, "deep.json"),
    "nan.json": (b'{"lr": NaN}', "lr must be a number"),
    "type.json": (b'{"training": {"bias": 1}}', "bias must be true or false"),
    "bool.json": (b'{"n_layer": true}', "n_layer must be a whole number"),
    "text.json": (b'{"out_dir": 5}', "out_dir must be text"),
    "unknown.json": (b'{"model": {"n_layerz": 2}}', "did you mean --n_layer?"),
    "twice.json": (b'{"lr": 0.1, "training": {"learning_rate": 0.2}}', "lr appears twice"),
    "empty.json": (b"", "empty.json"),
    "other.json": (b'{"config": "more.json"}', "cannot name another"),
    "broken.yaml": (b"lr: [1, 2", "broken.yaml"),
    "python.yaml": (b"lr: !!python/object/apply:os.system ['touch pwned']", "python.yaml"),
    "number.yaml": (b"3: 4\nlr: 0.1", "unknown setting --3"),
    "null.json": (b'{"optimiser": null}', "did you mean --optimizer?"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_bad_config_is_named(name, tmp_path):
    content, word = BAD_CONFIGS[name]
    (tmp_path / name).write_bytes(content)
    run("train", "--config", name, cwd=tmp_path).fails(2, name, word)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_home_and_variables_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "books")
    (tmp_path / "c.json").write_text('{"processed_dir": "$PLACE/stores"}')
    config = lp.parse(["train", "--data_dir=~/$PLACE", "--config", "~/c.json"])[1]
    assert (config.data_dir, config.processed_dir) == (f"{tmp_path}/books", "books/stores")
    assert lp.parse(["sample", "--prompt", "~ $PLACE"])[1].prompt == "~ $PLACE"
    assert lp.settle(lp.EvalConfig, dict(ckpt=Path("~/best.pth"))).ckpt == f"{tmp_path}/best.pth"


# --- what a resumed run may change ---


def test_a_resumed_run_keeps_its_settings_but_for_what_may_change(corpus, tmp_path):
    base = ["train", *corpus, *TINY, "--max_steps", 4, "--out_dir", tmp_path]
    run(*base, "--stop_after", 2).ok()
    again = ["train", "--resume", "--out_dir", tmp_path, *corpus]
    for flags in (
        "--lr 0.5",
        "--max_steps 9",
        "--epochs 9",
        "--n_layer 2",
        "--seed 3",
        "--preset cpu-debug",
    ):
        name, init = words(flags)[0][2:], f"--init_from {tmp_path / 'last.pth'}"
        run(*again, *words(flags)).fails(1, f"--resume cannot change {name}", init)
    run(*again, *words("--lr 1e-3 --log_interval 1 --save_interval 7")).ok()
    stored = snapshot(tmp_path)
    assert (stored["lr"], stored["log_interval"], stored["save_interval"]) == (1e-3, 1, 7)
    assert (stored["max_steps"], stored["n_embd"]) == (4, 32)


# --- the environment ---


def test_training_ends_well_whatever_the_locale(tmp_path):
    folder = tmp_path / "数据"
    write_corpus(folder / "raw")
    flags = ["--data_dir", folder / "raw", "--out_dir", folder / "run", *ONE]
    result = subprocess.run(
        [sys.executable, str(PROGRAM), "train", *map(str, flags)],
        cwd=tmp_path, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.decode() == f"{folder / 'run/best.pth'}\n"


def test_what_needs_one_process_runs_once(corpus, tiny_checkpoint, tmp_path):
    sample = ["sample", "--ckpt", tiny_checkpoint, *words("--prompt x --max_new_tokens 2")]
    prepare = ["prepare", *corpus, "--out_dir", tmp_path / "store"]
    for argv in (sample, prepare):
        results = [run(*argv, RANK=str(rank), WORLD_SIZE="2").ok() for rank in (0, 1)]
        assert results[0].out
        assert results[1].out == ""


# --- output ---


def test_a_json_that_cannot_be_written_is_said(corpus, tiny_checkpoint, tmp_path):
    scored = ["eval", *corpus, *CPU, "--ckpt", tiny_checkpoint, "--max_batches", "1"]
    assert "ppl" in run(*scored, "--json", tmp_path / "none/x.json").fails(1, "x.json").out


@pytest.mark.parametrize("argv", ["sample --prompt x --ckpt", "--help"])
def test_a_reader_that_goes_away_is_no_traceback(argv, tiny_checkpoint, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    argv = [*words(argv), tiny_checkpoint] if "ckpt" in argv else words(argv)
    done = subprocess.run([sys.executable, str(PROGRAM), *map(str, argv)], stdout=writer,
                          stderr=subprocess.PIPE, text=True, cwd=tmp_path)  # fmt: skip
    os.close(writer)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


# --- mutated command lines ---

ODD = ["nan", "-inf", "-1", "0", "1e400", "3.5", "", "x", " ", "\0", "你好", "--", "-", "true",
       "[]", "1e-5", "9" * 40, "\ud800", "%(default)s", "a\nb", "-h5", "--n_embd=", "--=",
       "cuda:99", "..", "none/x", "raw", "base.pth", "text.txt", "~"]  # fmt: skip
# Settings that would use the network, compile, or fill a disk are left out.
LEFT_OUT = words("download compile hf_dataset wandb tokenizer check_model init_from threads "
                 "debug max_new_tokens num_samples minutes")  # fmt: skip
BASES = {
    "train": "--n_layer 1 --n_head 2 --n_embd 32 --block_size 32 --batch_size 4 --max_steps 1 "
             "--overwrite --data_dir raw",
    "eval": "--ckpt base.pth --max_batches 1 --data_dir raw",
    "sample": "--ckpt base.pth --prompt x --max_new_tokens 3",
    "prepare": "--data_dir raw --block_size 32",
}  # fmt: skip


@pytest.mark.parametrize("command", BASES)
def test_mutated_command_lines(command, corpus, tiny_checkpoint, tmp_path):
    """With a few words changed, dropped or inserted, it works, or one line says why not."""
    (tmp_path / "raw").symlink_to(corpus[1])
    (tmp_path / "text.txt").write_text("Once upon a time. " * 300)
    (tmp_path / "base.pth").write_bytes(tiny_checkpoint.read_bytes())
    good = [command, *words(BASES[command]), "--device", "cpu"]
    run(*good, cwd=tmp_path).ok()
    draw = random.Random(command)
    flags = [f"--{name}" for name in settings_of(command) if name not in LEFT_OUT]
    for _ in range(15):
        argv = list(good)
        for _ in range(draw.randint(1, 3)):
            i = draw.randrange(len(argv))
            j = draw.randint(0, len(argv[i]))
            letter = chr(draw.choice([32, 34, 45, 48, 61, 92, 120, 228, 20320]))
            changed = [draw.choice(ODD)], [], [argv[i][:j] + letter + argv[i][j + 1 :]]
            more = [argv[i], draw.choice(flags), draw.choice(ODD)]
            argv[i : i + 1] = draw.choice([*changed, more, more])
        result = run(*argv, cwd=tmp_path)
        assert result.code in (0, 1, 2), argv
        assert "Traceback" not in result.err, argv
        assert result.code == 0 or result.errors, (argv, result.err)
        assert "--debug shows where" not in result.err, argv  # an unforeseen error


# --- the fast recipe reads the corpus ---


def fast(path: Path, *names: str, **flags) -> list:
    """The values that it gives these settings."""
    base = dict(recipe="fast", preset="cpu-debug", device="cpu", data_dir=str(path))
    config = lp.settle(lp.TrainConfig, base | flags)
    return [getattr(config, name) for name in names]


def test_the_fast_recipe_fits_itself_to_the_corpus(tmp_path):
    """Small text gets a small vocabulary, several passes and dropout; explicit settings win."""
    small, large = tmp_path / "small.txt", tmp_path / "large.txt"
    small.write_text("A line of a book.\n" * 40_000)  # 0.72 MB
    large.write_text("A line of a book.\n" * 200_000)  # 3.6 MB
    plan, drops = words("tokenizer vocab_size epochs"), words("token_dropout dropout")
    assert fast(small, *plan, *drops) == ["bpe", 700, 6, 0.1, 0.1]
    assert fast(large, *plan, *drops) == ["bpe", 3300, 1, 0.0, 0.0]
    assert fast(small, *plan, vocab_size=900) == ["bpe", 900, 6]
    assert fast(small, *drops, max_steps=100) == [0.0, 0.0]  # part of one pass
    assert fast(small, *drops, max_steps=800) == [0.1, 0.0]  # a token is about 2.4 bytes of it
    assert fast(small, *drops, dropout=0.3) == [0.1, 0.3]


def test_the_fast_recipe_samples_large_softmaxes_and_slows_down_wide_models(tmp_path):
    needs("tokenizers")
    (tmp_path / "a.txt").write_text("A line of a book.\n" * 10_000)
    large = partial(fast, tmp_path, "sampled_softmax")
    assert large(tokenizer="bpe", vocab_size=4000) == [0]
    assert large(tokenizer="bpe", vocab_size=8192) == [2048]
    assert large(tokenizer="gpt2") == [4096]
    assert large(tokenizer="gpt2", device="cuda") == [0]
    for width, steps, lr in ((128, 400, 0.02), (64, 9, 0.02), (256, 400, 0.01), (128, 1600, 0.01)):
        flags = dict(tokenizer="byte", n_embd=width, max_steps=steps)
        assert fast(tmp_path, "lr", "muon_lr", **flags) == [lr, 0.6 * lr]


def test_the_fast_recipe_weighs_answers_where_all_records_have_one(tmp_path):
    """With even a few lines of plain text among them, they are windows as before."""
    rows = [dict(instruction="Say it.", input=f"word {i}", output=f"{i}") for i in range(8_000)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))  # 0.5 MB
    plan = words("answer_weight epochs dropout batch_size")
    assert fast(tmp_path, *plan) == [30, 6, 0.3, 16]
    assert fast(tmp_path, *plan, answer_weight=0) == [0, 6, 0.1, 8]
    (tmp_path / "text.txt").write_text("A line of a book.\n" * 9)
    assert fast(tmp_path, *plan) == [0, 6, 0.1, 8]
