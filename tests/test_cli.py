"""The command line: every problem named at once, settings from every source, no traceback."""

import json
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import (
    CPU,
    PROGRAM,
    ROOT,
    SHAPE,
    TINY,
    differences,
    run,
    run_process,
    start,
    words,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llm_pipeline as lp

COMMANDS = words("train finetune eval sample prepare export bench")
ONE = [*TINY, "--max_steps", "1"]


def snapshot(folder) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


# --- help ---


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_flag_with_its_default(command):
    result = run(command, "--help").ok()
    text = " ".join(result.out.split())
    for field in fields(lp.COMMANDS[command][0]):
        assert f"--{field.name}" in text
        if field.default not in ("", None):
            assert str(field.default) in text


def test_help_lists_every_command():
    result = run("--help").ok()
    assert all(command in result.out for command in COMMANDS)


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
        ("finetune --lora_r 0", "lora_r"),
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
    assert a.pop("out_dir") != b.pop("out_dir")
    assert a == b
    assert a["bias"] is False


def test_precedence(corpus, tmp_path):
    """defaults < preset < recipe < config file < flags, with lr at every level."""
    (tmp_path / "c.json").write_text('{"lr": 0.04, "patience": 3, "recipe": "fast"}')
    base = ["train", *corpus, *CPU, *SHAPE, *words("--max_steps 1 --batch_size 2 --grad_accum 1")]
    layers = {
        "default": ("", 3e-4),
        "preset": ("--preset small-16g", 2e-4),
        "recipe": ("--preset small-16g --recipe fast", lp.RECIPES["fast"]["lr"]),
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


@pytest.mark.parametrize("preset", lp.PRESETS)
def test_presets_are_as_documented(preset, corpus, tmp_path):
    table = {
        "tiny-8g": (256, 6, 8, 512, 32, 1, 3e-4, 5),
        "compact-8g": (384, 6, 8, 512, 24, 2, 3e-4, 6),
        "small-16g": (512, 8, 8, 640, 32, 1, 2e-4, 6),
        "cpu-debug": (128, 2, 4, 256, 8, 1, 5e-4, 1),
    }
    if preset not in table:
        pytest.skip("not one of the four that are fixed")
    names = words("block_size n_layer n_head n_embd batch_size grad_accum lr epochs")
    assert tuple(lp.PRESETS[preset][name] for name in names) == table[preset]


@pytest.mark.parametrize("ending", ["json", "toml", "yaml", "yml"])
def test_config_files(ending, corpus, tmp_path):
    if ending == "toml" and sys.version_info < (3, 11):
        pytest.skip("TOML needs Python 3.11")
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
    assert a.pop("out_dir") != b.pop("out_dir")
    assert a == b


def test_a_snapshot_holds_nothing_of_its_session(corpus, tmp_path):
    """Else its --overwrite would destroy the run that it is the snapshot of."""
    command = ["train", *corpus, *TINY, "--max_steps", 2, "--out_dir", tmp_path / "a"]
    run(*command).ok()
    run(*command, "--overwrite").ok()
    run("train", "--config", tmp_path / "a/config.json").fails(1, "--overwrite")


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


# --- output ---


def test_a_reader_that_goes_away_is_no_traceback(tiny_checkpoint):
    flags = words("--prompt x --max_new_tokens 3000 --temperature 100 --device cpu")
    process = start("sample", *flags, "--ckpt", tiny_checkpoint)
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 1
    assert "Traceback" not in err
    assert "Exception ignored" not in err


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
    "--n_embd=", "--=", "--no-lr", "cuda:99", "mps", ".", "..", "/dev/null", "@x",
]  # fmt: skip
# What would fetch from a network, compile, or fill a disk is left out.
LEFT_OUT = {"download", "mirror", "compile", "hf_dataset", "wandb", "tokenizer", "check_model",
            "init_from", "ckpt", "threads", "debug", "max_new_tokens", "num_samples"}  # fmt: skip


@st.composite
def mutated(draw) -> list[str]:
    """A good command line with a few words changed, dropped, doubled, swapped or put in."""
    command = draw(st.sampled_from(["train", "finetune", "eval", "sample", "prepare"]))
    argv = [command, *BASES[command]]
    flags = [f"--{f.name}" for f in fields(lp.COMMANDS[command][0]) if f.name not in LEFT_OUT]
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


def check_mutant(argv: list[str], folder) -> str:
    """What is wrong with the way the program took this command line; "" if nothing."""
    try:
        result = run(*argv, cwd=folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if result.code not in (0, 1, 2):
        return f"exit {result.code}"
    if "Traceback" in result.err:
        return result.err
    if result.code and not result.errors:
        return f"exit {result.code} without a line that says why: {result.err}"
    return ""


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(argv=mutated())
def test_mutated_command_lines(playground, argv):
    assert check_mutant(argv, playground) == "", argv


def test_the_program_can_be_called_from_anywhere(tmp_path):
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "sample", "--ckpt", "none.pth"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
