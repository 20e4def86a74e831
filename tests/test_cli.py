"""The command line: every problem named at once, settings from every source, no traceback."""

import json
import os
import random
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import (
    CPU,
    PROGRAM,
    ROOT,
    SHAPE,
    TINY,
    differences,
    needs,
    run,
    run_process,
    words,
    write_corpus,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llm_pipeline as lp

COMMANDS = words("train finetune eval sample prepare export bench")
ONE = [*TINY, "--max_steps", "1"]


def snapshot(folder) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


# --- help ---


def settings_of(command: str) -> dict:
    return {f.name: f for f in fields(lp.COMMANDS[command].settings)}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_all_lists_every_setting_with_its_default_and_its_choices(command):
    text = " ".join(run(command, "--help_all").ok().out.split())
    for name, field in settings_of(command).items():
        assert f"--{name} " in text or f"--no_{name} " in text
        if field.default not in ("", None) and field.type != "bool":
            assert f"default: {field.default}" in text
        for choice in field.metadata.get("choices", ()):
            assert choice in text, name
    assert " STR " not in text
    assert run(command, "--help-all").out == run(command, "--help_all").out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_what_a_first_user_needs(command):
    result = run(command, "--help").ok()
    shown = [line.split()[0] for line in result.out.splitlines() if line.startswith("  --")]
    names = [name.removeprefix("--").removeprefix("no_") for name in shown]
    assert 4 <= len(names) <= 11
    assert set(names) <= settings_of(command).keys()
    assert f"{command} --help_all" in result.out
    examples = result.out.split("Examples:")[1].strip().splitlines()
    assert 1 <= len(examples) <= 3
    assert run(command, "-h").out == result.out


def test_help_all_has_a_title_for_each_topic():
    lines = run("train", "--help_all").ok().out.splitlines()
    titles = [i for i, line in enumerate(lines) if line and not line.startswith(" ")][2:-1]
    kinds = {line.split()[0].removeprefix("--"): max(t for t in titles if t < i)
             for i, line in enumerate(lines) if line.startswith("  --")}  # fmt: skip
    title = {name: lines[i].split(":")[0] for name, i in kinds.items()}
    wanted = {"n_layer": "Model", "lr": "Optimisation", "data_dir": "Data", "device": "Machine",
              "out_dir": "Run", "tokenizer": "Tokenizer. Commands that take a checkpoint use the "
              "tokenizer inside it."}  # fmt: skip
    assert {name: title[name] for name in wanted} == wanted


def test_bench_offers_nothing_of_a_run():
    assert not settings_of("bench").keys() & {"resume", "wandb", "patience", "out_dir"}


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--help_all"]])
def test_help_says_what_the_program_is_its_commands_and_the_shortest_path(argv):
    result = run(*argv).ok()
    assert all(f"\n  {command} " in result.out for command in COMMANDS)
    assert "from raw text to a small GPT" in result.out
    assert "python llm_pipeline.py train --preset cpu-debug" in result.out
    assert len(result.out.splitlines()) < 30


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_command_lines_that_this_program_takes(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = run(command, "--help").out + run("--help").out
    for line in text.splitlines():
        if line.startswith("  python llm_pipeline.py"):
            name, config = lp.parse(shlex.split(line)[2:])
            assert isinstance(config, lp.COMMANDS[name].settings)


def test_importing_has_no_side_effect(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import llm_pipeline"
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


# --- problems ---

PROBLEMS = {
    "--lr nan": "lr",
    "--lr inf": "lr",
    "--lr -0.1": "lr",
    "--lr 0": "lr",
    "--lr 1e9": "lr",
    "--lr x": "lr",
    "--batch_size 0": "batch_size",
    "--batch_size -3": "batch_size",
    "--batch_size 2.5": "batch_size",
    "--batch_size 99999999999999999999": "batch_size",
    "--batch_size 1e400": "batch_size",
    "--n_layer 0": "n_layer",
    "--n_embd 1000000000": "n_embd",
    "--dropout 1": "dropout",
    "--val_fraction 0": "val_fraction",
    "--val_fraction 1": "val_fraction",
    "--seed -1": "seed",
    "--epochs 0": "epochs",
    "--max_steps -1": "max_steps",
    "--warmup_steps nan": "warmup_steps",
    "--lr_schedule cosinus": "lr_schedule",
    "--preset tiny8g": "tiny-8g",
    "--arch gpt3": "gpt2",
    "--dtype float8": "dtype",
    "--device gpu": "device",
    "--n_embd 510 --n_head 8": "n_embd 510 is not divisible by n_head 8",
    "--n_head 8 --n_kv_head 3 --n_embd 64": "n_kv_head 3",
    "--n_embd 6 --n_head 2 --pos rope": "even",
    "--batch_size 8 --grad_accum 3": "batch_size 8",
    "--resume --overwrite": "--overwrite",
    "--config missing.toml": "missing.toml",
    "--epcohs 3": "did you mean --epochs?",
    "--n-embed 64": "did you mean --n_embd?",
    "stray": "stray",
}


@pytest.mark.parametrize("flags", PROBLEMS)
def test_a_problem_is_named_before_anything_is_done(flags, tmp_path):
    result = run("train", *words(flags), cwd=tmp_path).fails(2, PROBLEMS[flags])
    assert result.out == ""
    assert not list(tmp_path.iterdir())


def test_all_problems_at_once(tmp_path):
    flags = "--lr nan --batch_size -1 --preset cpu_debug --dropuot 1 --n_embd 510 --n_head 8"
    result = run("train", *words(flags), cwd=tmp_path).fails(2)
    for name in ("lr", "batch_size", "preset", "dropuot", "n_embd 510"):
        assert any(name in line for line in result.errors), name
    assert result.err.splitlines() == result.errors


@pytest.mark.parametrize("argv", ["", "trian", "train --lr", "train --resume=5", "--lr 3"])
def test_usage_errors_are_one_line(argv, tmp_path):
    result = run(*words(argv), cwd=tmp_path).fails(2)
    assert len(result.err.splitlines()) == 1, result.err
    if argv == "trian":
        assert "did you mean train?" in result.err


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        ("sample --temperature -1", "temperature"),
        ("sample --top_p 0", "top_p"),
        ("sample --top_p nan", "top_p"),
        ("sample --max_new_tokens 0", "max_new_tokens"),
        ("sample --template jinja", "template"),
        ("eval --split test", "split"),
        ("eval --max_batches -1", "max_batches"),
        ("finetune --method qlora", "method"),
        ("finetune --hf_dataset json --streaming", "streaming"),
        ("train --hf_dataset json --streaming --max_steps 5 --answer_weight 3", "answer_weight"),
        ("finetune --lora_r 0", "lora_r"),
        ("finetune --objective dpo --sampled_softmax 9", "sampled_softmax"),
        ("finetune --dpo_beta inf", "dpo_beta"),
        ("prepare --vocab_size 3", "vocab_size"),
        ("prepare --min_frequency 0", "min_frequency"),
        ("export --adaptor", "did you mean --adapter?"),
        ("bench --vs jax", "vs"),
    ],
)
def test_problems_of_the_other_commands(argv, name, tmp_path):
    run(*words(argv), cwd=tmp_path).fails(2, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ("train --data_dir missing", "missing"),
        ("train --device cuda:99", "cuda:99"),
        ("train --data_dir empty", "empty"),
        ("train --fsdp --preset cpu-debug", "torchrun"),
        ("train --dtype float16 --device cpu", "float16"),
        ("train --tokenizer missing.json", "missing.json"),
        ("sample --ckpt missing.pth", "missing.pth"),
        ("eval --ckpt empty/x.pth", "x.pth"),
    ],
)
def test_what_is_not_there_is_named(argv, word, tmp_path):
    (tmp_path / "empty").mkdir()
    result = run(*words(argv), cwd=tmp_path)
    result.fails(result.code or 1, word)
    assert len(result.errors) == 1


def test_debug_shows_where(tmp_path):
    result = run_process("sample", "--ckpt", tmp_path / "none.pth", "--debug")
    assert result.code == 1
    assert "Traceback" in result.err


# --- where settings come from ---


def test_dashes_and_underscores_are_the_same(corpus, tmp_path):
    run("train", *corpus, *ONE, "--no_bias", "--out_dir", tmp_path / "a").ok()
    dashed = [a.replace("_", "-") if a.startswith("--") else a for a in [*corpus, *ONE]]
    run("train", *dashed, "--no-bias", f"--out-dir={tmp_path / 'b'}").ok()
    a, b = snapshot(tmp_path / "a"), snapshot(tmp_path / "b")
    assert a == b
    assert a["bias"] is False


def test_precedence(corpus, tmp_path):
    """defaults < preset < recipe < config file < flags, with lr at every level."""
    (tmp_path / "c.json").write_text('{"lr": 0.04, "patience": 3, "recipe": "fast"}')
    base = ["train", *corpus, *CPU, *SHAPE, *words("--max_steps 1 --batch_size 2 --grad_accum 1")]
    layers = {
        "default": ("", 3e-4),
        "preset": ("--preset small-16g", 2e-4),
        "recipe": ("--preset small-16g --recipe fast", 0.02),
        "file": ("--preset small-16g --recipe fast --config c.json", 0.04),
        "flag": ("--preset small-16g --recipe fast --config c.json --lr 0.05", 0.05),
        "file's recipe": ("--preset small-16g --config c.json --lr 0.06", 0.06),
    }
    for name, (flags, lr) in layers.items():
        run(*base, *words(flags), "--out_dir", name, cwd=tmp_path).ok()
        config = snapshot(tmp_path / name)
        assert config["lr"] == lr, name
        fast = "recipe" in name or name in ("file", "flag")
        assert config["optimizer"] == ("muon" if fast else "adamw"), name
        assert config["patience"] == (3 if "c.json" in flags else 0)


def test_presets_are_as_documented():
    """The four that are fixed."""
    table = {
        "tiny-8g": (256, 6, 8, 512, 32, 1, 3e-4, 5),
        "compact-8g": (384, 6, 8, 512, 24, 2, 3e-4, 6),
        "small-16g": (512, 8, 8, 640, 32, 1, 2e-4, 6),
        "cpu-debug": (128, 2, 4, 256, 8, 1, 5e-4, 1),
    }
    names = words("block_size n_layer n_head n_embd batch_size grad_accum lr epochs")
    for preset, values in table.items():
        assert tuple(lp.PRESETS[preset][name] for name in names) == values


@pytest.mark.parametrize("ending", ["json", "toml", "yaml", "yml"])
def test_config_files(ending, corpus, tmp_path):
    if ending == "toml" and sys.version_info < (3, 11):
        pytest.skip("TOML needs Python 3.11 or newer")
    text = {
        "json": '{"lr": 0.002, "bias": false, "n_layer": 2, "lr_schedule": "wsd"}',
        "toml": 'lr = 0.002\nbias = false\nn_layer = 2\nlr_schedule = "wsd"\n',
    }.get(ending, "lr: 0.002\nbias: false\nn_layer: 2\nlr_schedule: wsd\n")
    file = tmp_path / f"c.{ending}"
    file.write_text(text, encoding="utf-8")
    flags = [*corpus, *CPU, *words("--n_head 2 --n_embd 32 --block_size 32 --max_steps 1")]
    run("train", *flags, "--config", file, "--out_dir", tmp_path / "run").ok()
    config = snapshot(tmp_path / "run")
    wanted = (0.002, False, 2, "wsd")
    assert (config["lr"], config["bias"], config["n_layer"], config["lr_schedule"]) == wanted


def test_a_snapshot_is_a_config(corpus, tmp_path):
    """config.json and nothing else repeats the run, bit for bit."""
    flags = words("--recipe fast --max_steps 6 --n_kv_head 1")
    run("train", *corpus, *TINY, *flags, "--out_dir", tmp_path / "a").ok()
    config = tmp_path / "a/config.json"
    run("train", "--config", config, "--out_dir", tmp_path / "b").ok()
    assert differences(tmp_path / "a/last.pth", tmp_path / "b/last.pth") == []
    a, b = snapshot(tmp_path / "a"), snapshot(tmp_path / "b")
    assert a == b


def test_a_snapshot_holds_nothing_of_its_session(corpus, tmp_path):
    """Else its --overwrite would destroy the run that it is the snapshot of."""
    command = ["train", *corpus, *TINY, "--max_steps", 2, "--out_dir", tmp_path / "a"]
    run(*command).ok()
    run(*command, "--overwrite").ok()
    config = tmp_path / "a/config.json"
    run("train", "--config", config, "--out_dir", tmp_path / "a").fails(1, "--overwrite")
    assert not {"overwrite", "resume", "out_dir"} & set(snapshot(tmp_path / "a"))


def test_a_finetune_snapshot_is_a_config(corpus, tiny_checkpoint, tmp_path):
    flags = [*corpus, *CPU, *words("--max_steps 3 --batch_size 4 --report_samples 0")]
    run("finetune", *flags, "--ckpt", tiny_checkpoint, "--out_dir", tmp_path / "a").ok()
    config = tmp_path / "a/config_finetune.json"
    run("finetune", "--config", config, "--out_dir", tmp_path / "b").ok()
    assert differences(tmp_path / "a/last_finetune.pth", tmp_path / "b/last_finetune.pth") == []


BAD_CONFIGS = {
    "broken.json": (b'{"lr": 0.1', "broken.json"),
    "list.json": (b"[1, 2]", "table"),
    "deep.json": (b"[" * 100_000 + b"]" * 100_000, "deep.json"),
    "nan.json": (b'{"lr": NaN}', "lr"),
    "huge.json": (b'{"n_layer": 1e308}', "n_layer"),
    "digits.json": (b'{"n_layer": ' + b"9" * 5000 + b"}", "digits.json"),
    "type.json": (b'{"lr": "fast", "bias": 1, "n_layer": [2], "out_dir": {}}', "lr"),
    "bool.json": (b'{"n_layer": true}', "n_layer"),
    "unknown.json": (b'{"learning_rate": 0.1, "n_layers": 2}', "did you mean n_layer?"),
    "bytes.json": (b"\xff\xfe\x00\x01", "bytes.json"),
    "empty.json": (b"", "empty.json"),
    "broken.toml": (b"lr = = 2", "broken.toml"),
    "broken.yaml": (b"lr: [1, 2", "broken.yaml"),
    "python.yaml": (b"lr: !!python/object/apply:os.system ['touch pwned']", "python.yaml"),
    "number.yaml": (b"3: 4\nlr: 0.1", "3"),
    "nul.json": (b'{"out_dir": "a\\u0000b"}', "out_dir"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_bad_config_is_named(name, tmp_path):
    content, word = BAD_CONFIGS[name]
    (tmp_path / name).write_bytes(content)
    run("train", "--config", name, cwd=tmp_path).fails(2, word)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_every_problem_of_a_config_is_named(tmp_path):
    (tmp_path / "c.json").write_text('{"lr": "fast", "bias": 1, "n_layers": 2, "seed": -1}')
    result = run("train", "--config", "c.json", "--epochs", 0, cwd=tmp_path).fails(2)
    for name in ("lr", "bias", "n_layers", "seed", "epochs"):
        assert any(name in line for line in result.errors), name


def test_settings_of_other_commands_in_a_config_are_left_out_with_a_word(corpus, tmp_path):
    (tmp_path / "c.json").write_text('{"lr": 0.002, "lora_r": 4, "temperature": 0.5}')
    flags = [*corpus, *ONE, "--config", tmp_path / "c.json", "--out_dir", tmp_path / "run"]
    result = run("train", *flags).ok()
    assert "left out lora_r, temperature" in result.err


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_config_that_is_not_a_file_is_refused_at_once(kind, tmp_path):
    path = tmp_path / "c.json"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    result = run_process("train", "--config", path, within=30).fails(2, f"{path} is not a file")
    assert len(result.errors) == 1


def test_a_value_may_begin_with_dashes(tiny_checkpoint):
    flags = ["--ckpt", tiny_checkpoint, *words("--device cpu --max_new_tokens 1 --template raw")]
    for argv in (
        ["--prompt", "--out-dir is"],
        ["--prompt=--out-dir is"],
        ["--prompt", "--out-dir"],
    ):
        config = lp.parse(["sample", *map(str, flags), *argv])[1]
        assert config.prompt in ("--out-dir is", "--out-dir")
    run("sample", "--prompt", "--top-k", 3, *flags).fails(2, "--prompt needs a value")


# What people type who come from another program.
FOREIGN = {
    "train --learning_rate 1e-3": "did you mean --lr?",
    "train --bs 4": "did you mean --batch_size?",
    "train --max-epochs 4": "did you mean --epochs?",
    "finetune --num_train_epochs 4": "did you mean --epochs?",
    "eval --checkpoint x.pth": "did you mean --ckpt?",
    "train --max_length 4": "did you mean --block_size?",
    "sample --max_length 4": "did you mean --max_new_tokens?",
    "sample --max_tokens 4": "did you mean --max_new_tokens?",
    "eval --model x.pth": "did you mean --ckpt?",
    "train --gpu 0": "did you mean --device?",
    "train --temperature 1": "--temperature belongs to sample",
    "sample --lora_r 4": "--lora_r belongs to finetune",
    "train --qwertyuiop 1": "--help_all lists all",
}


@pytest.mark.parametrize("argv", FOREIGN)
def test_names_from_elsewhere_get_a_hint(argv, tmp_path):
    result = run(*words(argv), cwd=tmp_path).fails(2, FOREIGN[argv])
    assert len(result.errors) == 1
    (tmp_path / "c.json").write_text('{"learning_rate": 1}')
    run("train", "--config", "c.json", cwd=tmp_path).fails(2, "did you mean lr?")


PACKAGES = {
    "train --tokenizer bpe": "tokenizers",
    "train --tokenizer gpt2": "tokenizers",
    "finetune --method lora": "peft",
    "train --wandb project": "wandb",
    "prepare --hf_dataset json --hf_files *.jsonl": "datasets",
    "bench --vs hf": "transformers",
}


@pytest.mark.parametrize("argv", PACKAGES)
def test_a_missing_package_is_named_before_work_starts(argv, tmp_path, monkeypatch):
    package = PACKAGES[argv]
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    result = run(*words(argv), cwd=tmp_path).fails(2, f"pip install {package}")
    assert len(result.errors) == 1
    assert not list(tmp_path.iterdir())


# --- the environment ---


@pytest.mark.parametrize(
    ("env", "word"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({"RANK": "-1"}, "RANK"),
        ({"RANK": "1e3"}, "RANK"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "torchrun"),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_malformed_place_among_processes_is_one_line(command, env, word, corpus, tmp_path):
    flags = [*corpus, *ONE] if command == "train" else []
    result = run(command, *flags, cwd=tmp_path, **env)
    result.fails(result.code or 1, word)
    assert len(result.errors) == 1
    assert "Error:" not in result.err


@pytest.mark.parametrize("encoding", ["ascii", "utf-16"])
def test_training_ends_well_whatever_the_locale(encoding, tmp_path):
    folder = tmp_path / "数据"
    write_corpus(folder / "raw")
    flags = ["--data_dir", folder / "raw", "--out_dir", folder / "run", *ONE]
    result = subprocess.run(
        [sys.executable, str(PROGRAM), "train", *map(str, flags)],
        cwd=tmp_path, capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.decode() == f"{folder / 'run/best.pth'}\n"


def test_a_prompt_on_stdin_that_is_not_utf8(tiny_checkpoint):
    command = [sys.executable, str(PROGRAM), "sample", "--ckpt", str(tiny_checkpoint)]
    done = subprocess.run(command, input=b"\xff\xfe", capture_output=True)
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: the prompt")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything: run as another user")
def test_what_may_not_be_read_is_named(tmp_path):
    (tmp_path / "c.json").write_text("{}")
    (tmp_path / "c.json").chmod(0)
    run("train", "--config", tmp_path / "c.json").fails(2, "c.json")


@pytest.mark.parametrize(
    "argv",
    [
        "train --out_dir LONG", "train --data_dir LONG", "train --processed_dir LONG",
        "train --config LONG", "train --init_from LONG", "train --resume --out_dir LONG",
        "eval --ckpt LONG", "eval --json LONG", "sample --ckpt LONG", "prepare --out_dir LONG",
        "export --out_dir LONG", "finetune --ckpt LONG", "train --tokenizer LONG",
        "train --out_dir FILE", "train --processed_dir FILE", "prepare --out_dir FILE",
        "train --out_dir FILE/x", "export --out_dir FILE", "export --out_dir FILE/x",
        "eval --json FILE/x", "sample --ckpt FILE/x", "train --data_dir FILE/x",
    ],
)  # fmt: skip
def test_names_that_cannot_be_are_one_line(argv, corpus, tiny_checkpoint, tmp_path):
    (tmp_path / "file").write_text("x")
    command, *flags = [w.replace("LONG", "x" * 300).replace("FILE", "file") for w in words(argv)]
    base = {"train": [*corpus, *ONE], "export": ["--ckpt", tiny_checkpoint]}.get(command, [])
    base = base or [*corpus, *(["--ckpt", tiny_checkpoint] if command == "eval" else [])]
    base = [] if command == "sample" else base
    result = run(command, *base, *flags, cwd=tmp_path)
    result.fails(result.code or 1)
    assert len(result.errors) == 1, result.err
    assert "Error:" not in result.err


@pytest.mark.parametrize(
    "argv", ["train --lr 1e-320", "sample --temperature 1e-320", "train --device cuda:" + "9" * 20]
)
def test_numbers_out_of_every_range(argv, tmp_path):
    run(*words(argv), cwd=tmp_path).fails(2, words(argv)[1].strip("-"))


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you "
                                 "tried to allocate 99 bytes. Error code 12")],
)  # fmt: skip
def test_running_out_of_memory_says_what_to_lower(error):
    assert "lower --batch_size" in lp.explanation(error)


def test_a_model_that_no_memory_can_hold(corpus, tmp_path):
    flags = words("--n_embd 65536 --n_inner 1048576 --n_layer 1024 --n_head 1024")
    run("train", *corpus, *flags, "--out_dir", tmp_path).fails(1, "memory")


# --- results as JSON ---


@pytest.fixture
def scored(corpus, tiny_checkpoint):
    """`eval` on the small corpus; more flags may follow."""
    return ["eval", *corpus, *CPU, "--ckpt", tiny_checkpoint, "--max_batches", "1"]


def test_json_is_written_through_a_link(scored, tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "target.json")
    for _ in range(2):  # a new target, then one that is there
        run(*scored, "--json", tmp_path / "link.json").ok()
        assert (tmp_path / "link.json").is_symlink()
        assert "loss" in json.loads((tmp_path / "target.json").read_text())


def test_json_goes_into_pipes_and_devices_which_stay(scored, tmp_path):
    """Ones that a broken program could not harm: never /dev/null, not even as root."""
    pipe, terminal = tmp_path / "pipe", os.openpty()
    os.mkfifo(pipe)
    run(*scored, "--json", pipe).fails(1, str(pipe))  # nobody reads
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    run(*scored, "--json", pipe).ok()
    run(*scored, "--json", os.ttyname(terminal[1])).ok()
    assert "loss" in json.loads(os.read(reader, 65536))
    assert '"loss"' in os.read(terminal[0], 65536).decode()
    assert pipe.is_fifo()
    for handle in (reader, *terminal):
        os.close(handle)


def test_json_goes_to_stdout_wherever_that_goes(scored, tmp_path):
    command = [sys.executable, str(PROGRAM), *map(str, scored), "--json", "/proc/self/fd/1"]
    if not Path("/proc/self/fd/1").exists():
        pytest.skip("this system has no /proc: run the tests on Linux")
    with open(tmp_path / "out.txt", "w") as out:  # what stdout is called looks like a file
        subprocess.run(command, stdout=out, check=True)
    card, brace, figures = (tmp_path / "out.txt").read_text().partition("{\n")
    assert "perplexity" in card or "ppl" in card
    assert "loss" in json.loads(brace + figures)


@pytest.mark.parametrize("content", [b"notes of a year", b"PK\x03\x04", b"{broken"])
def test_json_replaces_nothing_but_json(content, scored, tmp_path):
    target = tmp_path / "precious"
    target.write_bytes(content)
    result = run(*scored, "--json", target).fails(2, "--json", "name another file")
    assert result.out == ""
    assert target.read_bytes() == content
    run("bench", "--json", target).fails(2, "--json")
    target.write_bytes(b"")
    run(*scored, "--json", target).ok()


@pytest.mark.parametrize("name", ["", "none/x.json"])
def test_json_where_no_file_can_be_is_refused_before_work(name, scored, tmp_path):
    result = run(*scored, "--json", tmp_path / name).fails(2, "--json")
    assert result.out == ""


# --- under torchrun ---


def test_what_needs_one_process_runs_once(corpus, tiny_checkpoint, tmp_path):
    sample = ["sample", "--ckpt", tiny_checkpoint, *words("--prompt x --max_new_tokens 2")]
    prepare = ["prepare", *corpus, "--out_dir", tmp_path / "store"]
    for argv in (sample, prepare):
        results = [run(*argv, RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)]
        assert [result.ok().code for result in results] == [0, 0]
        assert results[0].out
        assert results[1].out == ""


# --- output ---


@pytest.mark.parametrize("argv", ["sample --prompt x --ckpt", "--help"])
def test_a_reader_that_goes_away_is_no_traceback(argv, tiny_checkpoint, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    argv = [*words(argv), tiny_checkpoint] if "ckpt" in argv else words(argv)
    done = subprocess.run([sys.executable, str(PROGRAM), *map(str, argv)], stdout=writer,
                          stderr=subprocess.PIPE, text=True, cwd=tmp_path)  # fmt: skip
    os.close(writer)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full: run on Linux")
@pytest.mark.parametrize("argv", ["sample --prompt x --ckpt", "--help"])
def test_a_full_disk_under_stdout_is_said(argv, tiny_checkpoint):
    argv = [*words(argv), tiny_checkpoint] if "ckpt" in argv else words(argv)
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, str(PROGRAM), *map(str, argv)], stdout=full,
                              stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: stdout cannot be written"), last
    assert "No space left" in last


def test_text_that_the_terminal_cannot_show(tiny_checkpoint):
    flags = words("--max_new_tokens 60 --temperature 100 --top_k 0 --device cpu")
    result = run_process(
        "sample", *flags, "--prompt", "你好", "--ckpt", tiny_checkpoint,
        PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C",
    )  # fmt: skip
    assert result.code == 0, result.err


def test_results_go_to_stdout_and_all_else_to_stderr(corpus, tmp_path):
    result = run("train", *corpus, *ONE, "--out_dir", tmp_path).ok()
    assert result.out == f"{tmp_path / 'best.pth'}\n"
    assert "parameters" in result.err


# --- mutated command lines ---

ODD = [
    "nan", "inf", "-inf", "-1", "0", "1e400", "7", "3.5", "", "x", " ", "\0", "你好", "--", "-",
    "true", "[]", "{}", "1e-5", "9" * 40, "\ud800", "%s", "%(default)s", "$HOME", "a\nb", "-h5",
    "--n_embd=", "--=", "--no-lr", "cuda:99", "mps", ".", "..", "none/x", "@x",
]  # fmt: skip
# What would fetch from a network, compile, or fill a disk is left out.
LEFT_OUT = {"download", "mirror", "compile", "hf_dataset", "wandb", "tokenizer", "check_model",
            "init_from", "ckpt", "threads", "debug", "max_new_tokens", "num_samples"}  # fmt: skip


@st.composite
def mutated(draw) -> list[str]:
    """A good command line with a few words changed, dropped, doubled, swapped or put in."""
    command = draw(st.sampled_from(["train", "finetune", "eval", "sample", "prepare"]))
    argv = [command, *BASES[command]]
    flags = [f"--{f.name}" for f in fields(lp.COMMANDS[command].settings) if f.name not in LEFT_OUT]
    for _ in range(draw(st.integers(1, 4))):
        i = draw(st.integers(0, len(argv) - 1))
        what = draw(st.sampled_from(["odd", "drop", "twice", "swap", "flag", "letter"]))
        if what == "odd":
            argv[i] = draw(st.sampled_from(ODD))
        elif what == "drop" and len(argv) > 1:
            del argv[i]
        elif what == "twice":
            argv.insert(i, argv[i])
        elif what == "swap":
            j = draw(st.integers(0, len(argv) - 1))
            argv[i], argv[j] = argv[j], argv[i]
        elif what == "flag":
            argv[i + 1 : i + 1] = [draw(st.sampled_from(flags)), draw(st.sampled_from(ODD))]
        elif argv[i]:
            j = draw(st.integers(0, len(argv[i]) - 1))
            argv[i] = argv[i][:j] + draw(st.characters(codec="utf-8")) + argv[i][j + 1 :]
    return argv


SMALL = words("--device cpu --data_dir raw --processed_dir stores")
BASES = {
    "train": words("--n_layer 1 --n_head 2 --n_embd 32 --block_size 32 --batch_size 4 --max_steps 1"
                   " --overwrite") + SMALL,
    "finetune": words("--ckpt base.pth --max_steps 1 --batch_size 4 --report_samples 0 --overwrite")
                + SMALL,
    "eval": words("--ckpt base.pth --max_batches 1") + SMALL,
    "sample": words("--ckpt base.pth --prompt x --max_new_tokens 3 --device cpu"),
    "prepare": words("--block_size 32") + SMALL,
}  # fmt: skip


@pytest.fixture(scope="module")
def playground(tmp_path_factory, corpus, tiny_checkpoint):
    """A folder in which every base command works."""
    folder = tmp_path_factory.mktemp("playground") / "inner"
    folder.mkdir()
    (folder / "raw").symlink_to(corpus[1])
    (folder / "base.pth").write_bytes(tiny_checkpoint.read_bytes())
    for command, flags in BASES.items():
        run(command, *flags, cwd=folder).ok()
    return folder


def check_mutant(argv: list[str], folder, **env: str) -> str:
    """What is wrong with the way the program took this command line; "" if nothing."""
    try:
        result = run(*argv, cwd=folder, **env)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if result.code not in (0, 1, 2):
        return f"exit {result.code}"
    if "Traceback" in result.err:
        return result.err
    if result.code and not result.errors:
        return f"exit {result.code} without a line that says why: {result.err}"
    if "--debug shows where" in result.err:
        return f"an error that nobody foresaw: {result.err}"
    return ""


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(argv=mutated())
def test_mutated_command_lines(playground, argv):
    assert check_mutant(argv, playground) == "", argv


# --- composed command lines: good ones with settings of every kind, valid, odd or absurd ---

NUMBERS = words("0 1 2 3 7 33 64 0.5 0.999 1e-5 1e-29 1e-320 1e308 nan -inf -1 1e9 65536 1048576")
NUMBERS += ["9" * 400, "0x10", "1_000", "\uff11", "", "x", "true", " 1", "1e3"]
TEXTS = words(
    "x \\ \\n -- - --lr % {} * ** [ ( json parquet text byte gpt2 auto cuda:99 qkv qkv, 你好"
)
TEXTS += ["", "\n", "\udcff", "a" * 5000]
# Only names inside the folder: the program does what it is told, even to those outside.
PLACES = words("raw text.txt empty pipe bad.bin c.json list.json loop none none/x text.txt/x base "
               "base/best.pth base/last.pth base/best_finetune.pth base/config.json store . %s "
               "base/metrics.csv store/meta.json store/train.bin pairs.jsonl spam.tsv stores "
               "base.pth")  # fmt: skip
PLACES += ["x" * 300, "\udcff", "a\nb"]
PATHS = words("data_dir processed_dir out_dir config ckpt init_from json tokenizer hf_files "
              "check_model gguf")  # fmt: skip
UNBOUNDED = {"download", "mirror", "compile", "threads", "debug", "max_new_tokens", "num_samples",
             "vocab_size", "max_steps", "epochs", "rounds", "wandb"}  # fmt: skip
FULL_BASES = BASES | {
    "export": words("--ckpt base.pth --out_dir hf --overwrite --device cpu"),
    "bench": words("--n_layer 1 --n_head 2 --n_embd 32 --block_size 32 --batch_size 4 --rounds 1"
                   " --data_dir raw --device cpu"),
}  # fmt: skip
PLACES_AMONG_PROCESSES = [{}] * 12 + [
    {"RANK": "1"}, {"WORLD_SIZE": "x"}, {"RANK": "0", "WORLD_SIZE": "0"}, {"LOCAL_RANK": "z"}
]  # fmt: skip


def furnish(folder: Path) -> None:
    """Put things of every kind into a playground, for `composed` to name."""
    (folder / "text.txt").write_text("Once upon a time. " * 300)
    (folder / "bad.bin").write_bytes(random.Random(0).randbytes(3000))
    (folder / "c.json").write_text('{"lr": 0.1, "lora_r": 3}')
    (folder / "list.json").write_text("[1]")
    rows = [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(30)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "spam.tsv").write_text("".join(f"ham\tmessage {i}\n" for i in range(40)))
    (folder / "empty").mkdir(exist_ok=True)
    for name in ("loop", "pipe"):
        (folder / name).unlink(missing_ok=True)
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    if not (folder / "base").exists():
        flags = words(
            "--ckpt base.pth --max_steps 1 --batch_size 4 --report_samples 0 --method lora"
        )
        run("train", *BASES["train"], "--out_dir", "base", cwd=folder).ok()
        run("finetune", *flags, *SMALL, "--out_dir", "base", cwd=folder).ok()
        run("prepare", *BASES["prepare"], "--out_dir", "store", cwd=folder).ok()


def composed_value(spec, rng: random.Random) -> str:
    choices, limits = list(lp.choices_of(spec)), spec.metadata
    if choices and rng.random() < 0.7:
        return rng.choice(choices)
    if spec.type.startswith(("int", "float")):
        low = limits.get("low", limits.get("above", 0))
        near = [low, low + 1, min(limits.get("high", 50), 50), limits.get("high", 7)]
        return str(rng.choice(near)) if rng.random() < 0.5 else rng.choice(NUMBERS)
    if spec.name in PATHS:
        return rng.choice(PLACES) if rng.random() < 0.8 else rng.choice(TEXTS)
    return rng.choice(TEXTS + PLACES)


def composed(rng: random.Random) -> tuple[list[str], dict[str, str]]:
    """(command line, environment): a good one with a few settings more."""
    command = rng.choices(list(FULL_BASES), [5, 4, 3, 3, 4, 2, 1])[0]
    specs = [f for f in fields(lp.COMMANDS[command].settings) if f.name not in UNBOUNDED]
    argv = [*FULL_BASES[command]]
    for spec in rng.choices(specs, k=rng.choice([1, 1, 1, 2, 2, 3, 5])):
        if spec.type == "bool":
            argv.append(rng.choice(["--", "--no_"]) + spec.name)
        else:
            value = composed_value(spec, rng)
            joined = rng.random() < 0.5
            argv += [f"--{spec.name}={value}"] if joined else [f"--{spec.name}", value]
    if rng.random() < 0.1:
        argv.insert(rng.randrange(len(argv)), rng.choice(TEXTS))
    return [command, *argv], rng.choice(PLACES_AMONG_PROCESSES)


def test_composed_command_lines(playground):
    furnish(playground)
    rng = random.Random(1)
    for _ in range(50):
        argv, env = composed(rng)
        assert check_mutant(argv, playground, **env) == "", argv


def test_the_program_can_be_called_from_anywhere(tmp_path):
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "sample", "--ckpt", "none.pth"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")


def test_the_fast_recipe_fits_itself_to_the_corpus(tmp_path):
    """A vocabulary in proportion; passes over small text, dropout; what was asked for stands."""
    small, large = tmp_path / "small.txt", tmp_path / "large.txt"
    small.write_text("A line of a book.\n" * 40_000)  # 0.72 MB
    large.write_text("A line of a book.\n" * 200_000)  # 3.6 MB

    def settings(path, **more):
        config = lp.settle(
            lp.TrainConfig, dict(recipe="fast", preset="cpu-debug", data_dir=str(path)) | more
        )
        drops = config.token_dropout, config.dropout
        return config.tokenizer, config.vocab_size, config.epochs, drops

    assert settings(small) == ("bpe", 700, 6, (0.1, 0.1))
    assert settings(large) == ("bpe", 3300, 1, (0.0, 0.0))
    assert settings(small, vocab_size=900)[:2] == ("bpe", 900)
    assert settings(small, tokenizer="byte", epochs=1)[::3] == ("byte", (0.0, 0.0))
    assert settings(small, max_steps=100)[3] == (0.0, 0.0)  # a part of one pass
    assert settings(small, max_steps=800)[3] == (0.1, 0.0)  # a token is some 2.4 bytes of it
    assert settings(small, max_steps=800, tokenizer="byte")[3] == (0.0, 0.0)
    assert settings(small, dropout=0.3)[3] == (0.1, 0.3)


@pytest.mark.parametrize(
    ("flags", "n"),
    [
        (dict(tokenizer="byte"), 0),
        (dict(tokenizer="bpe", vocab_size=4000), 0),
        (dict(tokenizer="bpe", vocab_size=8192), 2048),
        (dict(tokenizer="gpt2"), 4096),
        (dict(tokenizer="gpt2", device="cuda"), 0),
        (dict(tokenizer="gpt2", hf_dataset="text", streaming=True, max_steps=9), 4096),
        (dict(tokenizer="gpt2", sampled_softmax=7), 7),
    ],
)
def test_the_fast_recipe_samples_the_softmax_of_a_large_vocabulary_on_a_cpu(tmp_path, flags, n):
    (tmp_path / "a.txt").write_text("A line of a book.\n" * 10_000)
    for package in ("tokenizers", "datasets"):
        needs(package)
    base = dict(recipe="fast", device="cpu", data_dir=str(tmp_path))
    assert lp.settle(lp.TrainConfig, base | flags).sampled_softmax == n


def test_the_fast_recipe_slows_down_wide_models_and_long_runs():
    def rates(**flags):
        config = lp.settle(lp.TrainConfig, dict(recipe="fast", tokenizer="byte", n_head=2) | flags)
        return config.lr, config.muon_lr

    assert rates(n_embd=128, max_steps=400) == rates(n_embd=64, max_steps=9) == (0.02, 0.012)
    assert rates(n_embd=256, max_steps=400) == (0.01, 0.006)
    assert rates(n_embd=128, max_steps=1600) == (0.01, 0.006)
    assert rates(n_embd=256, max_steps=1600, lr=0.3) == (0.3, 0.003)


def test_the_fast_recipe_weighs_answers_where_all_records_have_one(tmp_path):
    """A quarter of a page of plain text among them, and they are windows as before."""
    rows = [dict(instruction="Say it.", input=f"word {i}", output=f"{i}") for i in range(8_000)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))  # 0.5 MB

    def settings(**more):
        flags = dict(recipe="fast", preset="cpu-debug", data_dir=str(tmp_path)) | more
        config = lp.settle(lp.TrainConfig, flags)
        return config.answer_weight, config.epochs, config.dropout, config.batch_size

    assert settings() == (30, 6, 0.3, 16)
    assert settings(answer_weight=0) == (0, 6, 0.1, 8)
    assert settings(tokenizer="byte")[0] == 0  # they would not fit into a block
    store = tmp_path.parent / "store"
    run("prepare", "--data_dir", tmp_path, "--out_dir", store).ok()
    assert settings(data_dir=str(store))[0] == 0  # of bytes
    flags = "--tokenizer", "bpe", "--vocab_size", 400, "--out_dir", f"{store}_bpe"
    run("prepare", "--data_dir", tmp_path, *flags).ok()
    assert settings(data_dir=f"{store}_bpe") == settings(vocab_size=400)
    recipe = dict(recipe="fast", data_dir=f"{store}_bpe")
    assert lp.settle(lp.TrainConfig, recipe).vocab_size == 400
    (tmp_path / "text.txt").write_text("A line of a book.\n" * 9)
    assert settings() == (0, 6, 0.1, 8)
