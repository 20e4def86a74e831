"""plot_curves.py: the images it writes, what they show, what it skips."""

import json
import math
import sys

import pytest
from conftest import CPU, TINY, needs, run, words

import llm_pipeline as lp
import plot_curves

NAMES = ["curves.png", "train_loss.png", "val_loss.png", "val_ppl.png"]
HEADER = "step,epoch,split,loss,timestamp,lr\n"
ROWS = (
    "1,0,train,5.5,t,1e-3\n2,0,train,4.5,t,1e-3\n2,0,val,4.0,t,\n4,1,train,4.1,t,\n4,1,val,30,t,\n"
)


def a_run(folder, rows=ROWS, **config):
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(HEADER + rows, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder / "metrics.csv"


@pytest.fixture
def metrics(tmp_path):
    return a_run(tmp_path / "run")


@pytest.fixture
def figures(monkeypatch):
    """The panels of every closed figure, keyed by the beginning of the first one's y label."""
    pyplot = needs("matplotlib.pyplot")
    found, close = {}, pyplot.close

    def keep(figure):
        found[figure.axes[0].get_ylabel().split(" (")[0]] = figure.axes
        close(figure)

    monkeypatch.setattr(pyplot, "close", keep)
    return found


def plot(*argv):
    return plot_curves.main([str(a) for a in argv])


def points(line):
    return list(zip(*(list(map(float, d)) for d in line.get_data()), strict=True))


def assert_images(folder):
    assert sorted(p.name for p in folder.glob("*.png")) == NAMES
    for name in NAMES:
        data = (folder / name).read_bytes()
        assert data.startswith(b"\x89PNG\r\n") and data.endswith(b"IEND\xaeB`\x82")


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_images_beside_the_csv(metrics, figures, capsys):
    assert plot(metrics) == 0
    assert capsys.readouterr().out.split("\n") == [*(str(metrics.parent / n) for n in NAMES), ""]
    assert_images(metrics.parent)
    training = [(1, 5.5), (2, 4.5), (4, 4.1)]
    assert points(figures["training loss"][0].lines[0]) == training
    validation, best = figures["validation loss"][0].lines
    assert points(validation) == [(2, 4.0), (4, 30.0)] and points(best) == [(2, 4.0)]
    ppl = [(2, math.exp(4)), (4, math.exp(20))]  # capped as in `eval`
    assert points(figures["validation perplexity"][0].lines[0]) == ppl
    (both,) = figures["loss"]
    raw, _, validation, best = both.lines
    assert points(raw) == training and points(best) == [(2, 4.0)]
    name = f"{metrics.parents[1].name}/run"
    assert labels(both) == [f"{name}: training", f"{name}: validation, best 4"]


def test_several_runs_have_names_of_their_own(metrics, figures, tmp_path):
    other = a_run(tmp_path / "deep" / "run", "7,0,train,2.5,t,\n")
    out = tmp_path / "plots"
    assert plot(metrics, other.parent, "--out_dir", out, "--log") == 0
    assert_images(out)
    assert not list(metrics.parent.glob("*.png"))
    (axes,) = figures["training loss"]
    assert points(axes.lines[2]) == [(7, 2.5)]
    assert labels(axes) == [f"{name}/run: training" for name in (tmp_path.name, "deep")]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    (metrics.parent / "metrics_finetune.csv").write_text(HEADER + ROWS, encoding="utf-8")
    assert plot(metrics.parent) == 0
    names = [text.removesuffix(": training") for text in labels(figures["training loss"][0])]
    assert names == [f"{tmp_path.name}/run", f"{tmp_path.name}/run_finetune"]


def test_what_holds_no_curve_is_passed_over(metrics, tmp_path, capsys):
    needs("matplotlib")
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / ".lock").write_text("")
    a_run(tmp_path / "begun", "")
    assert plot(tmp_path / "failed", tmp_path / "begun", metrics.parent) == 0
    out, err = capsys.readouterr()
    assert out.count(".png\n") == 4 and str(metrics.parent) in out
    first, second = err.splitlines()
    assert "skipped" in first and "failed: holds no metrics.csv" in first
    assert "skipped" in second and "no train or val rows" in second


def test_losses_of_different_units_have_panels_of_their_own(tmp_path, figures):
    runs = [
        a_run(tmp_path / "bytes", vocabulary={"kind": "byte", "size": 260}),
        a_run(tmp_path / "other", vocabulary={"kind": "byte", "size": 260}),
    ]
    runs += [a_run(tmp_path / "bpe", vocabulary={"kind": "bpe", "size": 2000})]
    assert plot(*runs) == 0
    for name in ("loss", "training loss", "validation perplexity"):
        one, two = figures[name]
        assert one.get_ylabel().endswith("(nats per byte)") and len(one.get_lines()) >= 4
        assert two.get_ylabel().endswith("(nats per token of 2,000)")
        assert all("/bpe: " in label for label in labels(two))


def test_a_run_from_a_base_has_its_unit(tiny_checkpoint, corpus, tmp_path, figures):
    needs("tokenizers")
    base = tmp_path / "base"
    run("train", *corpus, *TINY, *words("--tokenizer bpe --vocab_size 400"), "--out_dir", base).ok()
    runs = [tiny_checkpoint.parent, base]
    for number, start in enumerate((tiny_checkpoint, base / "best.pth")):
        tuned, more = tmp_path / f"tuned{number}", tmp_path / f"more{number}"
        short = [*corpus, *CPU, *words("--max_steps 2 --batch_size 4"), "--out_dir"]
        run("finetune", *short, tuned, "--ckpt", start, "--report_samples", 0).ok()
        run("train", *short, more, "--init_from", start).ok()
        runs += [tuned, more]
    assert plot(*runs, "--out_dir", tmp_path) == 0
    units = [axes.get_ylabel().split("(")[1][:-1] for axes in figures["validation loss"]]
    size = lp.load_checkpoint(base / "best.pth")["model_config"]["vocab_size"]
    assert units == ["nats per byte", f"nats per token of {size}"] and size < 400
    counts = [len(axes.get_legend().get_texts()) for axes in figures["validation loss"]]
    assert counts == [3, 3]


def test_preferences_and_reward_have_no_perplexity(metrics, tmp_path, figures):
    tuned = a_run(tmp_path / "dpo", objective="dpo")
    assert plot(tuned) == 0
    assert sorted(p.name for p in tuned.parent.glob("*.png")) == NAMES[:3]
    assert plot(tuned, metrics, "--out_dir", tmp_path) == 0
    (axes,) = figures["validation perplexity"]
    assert labels(axes)[0].startswith(f"{tmp_path.name}/run: validation")


def test_a_weighted_training_loss_stands_beside_no_validation_loss(tmp_path, figures):
    assert plot(a_run(tmp_path / "run", answer_weight=30)) == 0
    assert labels(figures["loss"][0]) == [f"{tmp_path.name}/run: validation, best 4"]
    weighted = f"{tmp_path.name}/run: training, answers weighted more"
    assert labels(figures["training loss"][0]) == [weighted]


def test_minutes_leave_out_the_pause_between_sessions(tmp_path, figures, capsys):
    times = [0, 30, 60, 90, 5000, 5030]  # resumed at 5000
    stamps = [f"2026-11-30T{10 + t // 3600}:{t // 60 % 60:02}:{t % 60:02}.250000" for t in times]
    rows = [f"{i},0,train,2.0,{stamp},\n" for i, stamp in enumerate(stamps)]
    assert plot(a_run(tmp_path / "run", "".join(rows)), "--x", "minutes") == 0
    (axes,) = figures["training loss"]
    assert [round(60 * x) for x, _ in points(axes.lines[0])] == [0, 30, 60, 90, 120, 150]
    assert axes.get_xlabel() == "minutes of training"
    assert plot(a_run(tmp_path / "no times"), "--x", "minutes") == 1
    assert "--x minutes" in capsys.readouterr().err


def test_the_csv_of_the_program_and_the_plain_five_columns(tiny_checkpoint, tmp_path, figures):
    plain = tmp_path / "plain.csv"
    plain.write_text("step,epoch,split,loss,timestamp\n1,0,train,2.5,2025-01-01T10:00:00.123456\n")
    for path in (tiny_checkpoint.parent, plain):
        assert plot(path, "--x", "minutes", "--out_dir", tmp_path) == 0
    assert_images(tmp_path)


def test_lengths_of_a_store(tmp_path, figures):
    rows = [f"{'ham' if i % 3 else 'spam'}\t{'word ' * (i % 9 + 1)}{i}\n" for i in range(90)]
    (tmp_path / "sms").mkdir()
    (tmp_path / "sms" / "SMSSpamCollection").write_text("".join(rows), encoding="utf-8")
    run("prepare", "--data_dir", tmp_path / "sms", "--out_dir", tmp_path / "store").ok()
    assert plot(tmp_path / "store", "--out_dir", tmp_path / "plots") == 0
    assert [p.name for p in (tmp_path / "plots").iterdir()] == ["token_lengths.png"]
    (axes,) = figures["documents"]
    assert sum(bar.get_height() for bar in axes.patches) == 90
    assert labels(axes)[0].endswith("store: 90 documents")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"a,b\n1,2\n", "no column loss, split, step"),
        (HEADER.encode(), "no train or val rows"),
        (HEADER.encode() + b"1,0,train,3.0,t,\none,0,val,3.0,t,\n", "line 3"),
        (b"\x89PNG\xff\xfe" * 9, ""),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "metrics.csv"
    if content is not None:
        path.write_bytes(content)
    assert plot(path) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"error: {path}: ")
    assert message in err and not list(tmp_path.glob("*.png"))


def test_without_matplotlib(metrics, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot(metrics) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pip install matplotlib" in err
