"""plot_curves.py: the images it writes, what they show, how it refuses."""

import json
import math
import subprocess
import sys

import pytest
from conftest import ROOT, finish, needs, run, words

import plot_curves

NAMES = ["curves.png", "train_loss.png", "val_loss.png", "val_ppl.png"]
HEADER = "step,epoch,split,loss,timestamp,lr\n"
ROWS = (
    "1,0,train,5.5,t,1e-3\n2,0,train,4.5,t,1e-3\n2,0,val,4.0,t,\n4,1,train,4.1,t,\n4,1,val,30,t,\n"
)


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "run" / "metrics.csv"
    path.parent.mkdir()
    path.write_text(HEADER + ROWS, encoding="utf-8")
    return path


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is closed, by the label of its y axis, before it is closed."""
    pyplot = needs("matplotlib.pyplot")
    found, close = {}, pyplot.close

    def keep(figure):
        axes = figure.axes[0]
        found[axes.get_ylabel().split(" (")[0]] = axes
        close(figure)

    monkeypatch.setattr(pyplot, "close", keep)
    return found


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
    assert plot_curves.main([str(metrics)]) == 0
    assert capsys.readouterr().out.split("\n") == [*(str(metrics.parent / n) for n in NAMES), ""]
    assert_images(metrics.parent)
    training = [(1, 5.5), (2, 4.5), (4, 4.1)]
    assert points(figures["training loss"].lines[0]) == training
    validation, best = figures["validation loss"].lines
    assert points(validation) == [(2, 4.0), (4, 30.0)] and points(best) == [(2, 4.0)]
    ppl = [(2, math.exp(4)), (4, math.exp(20))]  # capped as in `eval`
    assert points(figures["validation perplexity"].lines[0]) == ppl
    raw, _, validation, best = figures["loss"].lines
    assert points(raw) == training and points(best) == [(2, 4.0)]
    assert labels(figures["loss"]) == ["training", "validation, best 4"]


def test_several_runs_have_short_names_of_their_own(metrics, figures, tmp_path):
    other = tmp_path / "deep" / "run" / "metrics.csv"
    other.parent.mkdir(parents=True)
    other.write_text(HEADER + "7,0,train,2.5,t,\n", encoding="utf-8")
    out = tmp_path / "plots"
    runs = [str(metrics), str(other.parent), "--out_dir", str(out), "--log"]
    assert plot_curves.main(runs) == 0
    assert_images(out)
    assert not list(metrics.parent.glob("*.png"))
    axes = figures["training loss"]
    assert points(axes.lines[2]) == [(7, 2.5)]
    names = [f"{tmp_path.name}/run", "deep/run"]
    assert labels(axes) == [f"{name}: training" for name in names]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    files = [metrics, metrics.with_name("metrics_finetune.csv")]
    assert plot_curves.short_names(files) == ["metrics", "metrics_finetune"]
    assert plot_curves.short_names([metrics]) == ["run"]


def test_smoothing_keeps_the_mean_and_the_steep_beginning():
    assert plot_curves.smooth([3.0, 1.0, 2.0]) == [3.0, 1.0, 2.0]
    noisy = [5.0] + [1.0 + (-1) ** i * 0.5 for i in range(199)]
    smooth = plot_curves.smooth(noisy)
    assert smooth[0] == 5.0 and len(smooth) == len(noisy)
    assert max(abs(value - 1.0) for value in smooth[30:]) < 0.06


def test_minutes_leave_out_the_pause_between_sessions(metrics, figures):
    times = [0, 30, 31, 60, 5000, 5001, 5030]  # resumed at 5000
    kinds = ["train", "train", "val", "train", "train", "val", "train"]
    rows = [
        f"{i},0,{kind},2.0,{t},\n" for i, (t, kind) in enumerate(zip(times, kinds, strict=True))
    ]
    metrics.write_text(HEADER + "".join(rows), encoding="utf-8")
    assert plot_curves.main([str(metrics), "--x", "minutes"]) == 0
    places = [round(60 * x) for x, _ in points(figures["training loss"].lines[0])]
    usual = 29.5  # the median gap before a training row
    assert places == [0, 30, 60, round(60 + usual), round(60 + usual + 30)]


def test_a_real_run_by_tokens(tiny_checkpoint, tmp_path, figures):
    folder = tiny_checkpoint.parent
    assert plot_curves.main([str(folder), "--x", "tokens", "--out_dir", str(tmp_path)]) == 0
    assert_images(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    last, _ = points(figures["loss"].lines[0])[-1]
    assert last == 12 * config["batch_size"] * config["block_size"]


@pytest.mark.parametrize("unit", ["tokens", "minutes"])
def test_a_unit_that_the_run_cannot_give(metrics, capsys, unit):
    assert plot_curves.main([str(metrics), "--x", unit]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"--x {unit}" in err


def test_a_store_and_an_evaluation(corpus, tiny_checkpoint, tmp_path, figures):
    store, table = tmp_path / "store", tmp_path / "eval.json"
    rows = [f"{'ham' if i % 3 else 'spam'}\t{'word ' * (i % 9 + 1)}{i}\n" for i in range(90)]
    (tmp_path / "sms").mkdir()
    (tmp_path / "sms" / "SMSSpamCollection").write_text("".join(rows), encoding="utf-8")
    data = ["--data_dir", tmp_path / "sms", "--processed_dir", tmp_path / "processed"]
    run("prepare", *data, "--out_dir", store).ok()
    run("eval", "--ckpt", tiny_checkpoint, *data, *words("--device cpu --json"), table).ok()
    out = tmp_path / "plots"
    assert plot_curves.main([str(store), str(table), "--out_dir", str(out)]) == 0
    assert {p.name for p in out.glob("*.png")} == {"token_lengths.png", "confusion.png"}
    bars = figures["documents"].patches
    assert sum(bar.get_height() for bar in bars) == 90
    assert labels(figures["documents"])[0].startswith("store: 90 documents")
    confusion = json.loads(table.read_text())["sources"]["sms"]["confusion"]
    counts = [n for row in confusion["true_by_predicted"] for n in row]
    assert [text.get_text() for text in figures["true"].texts] == [str(n) for n in counts]
    assert [t.get_text() for t in figures["true"].get_xticklabels()] == confusion["labels"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "no column"),
        (b"a,b\n1,2\n", "no column loss, split, step"),
        (HEADER.encode(), "no train or val rows"),
        (HEADER.encode() + b"1,0,train,high,t,\n", "line 2"),
        (HEADER.encode() + b"1,0,train,3.0,t,\none,0,val,3.0,t,\n", "line 3"),
        (HEADER.encode() + b"1,0,train\n", "line 2"),
        (b"\x89PNG\xff\xfe" * 9, ""),
        (b"step,split,loss\n1,train,\0\n", ""),
        (b'{"loss": 1.0', ""),
        (b'{"loss": 1.0, "sources": {"a": {}}}', "confusion"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "metrics.csv"
    if content is not None:
        path.write_bytes(content)
    assert plot_curves.main([str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"error: {path}: ")
    assert message in err
    assert not list(tmp_path.glob("*.png"))


def test_a_folder_of_something_else(tmp_path, capsys):
    assert plot_curves.main([str(tmp_path)]) == 1
    assert f"error: {tmp_path}: holds no metrics.csv" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(metrics, tmp_path, capsys):
    needs("matplotlib")
    file = tmp_path / "file"
    file.write_text("")
    assert plot_curves.main([str(metrics), "--out_dir", str(file)]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(file) in err


def test_without_matplotlib(metrics, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot_curves.main([str(metrics)]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pip install matplotlib" in err


def test_the_command(metrics):
    needs("matplotlib")
    command = [sys.executable, str(ROOT / "plot_curves.py"), str(metrics)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert finish(subprocess.Popen(command, **pipes)).ok().out.count(".png\n") == 4
    assert finish(subprocess.Popen(command[:2], **pipes)).code == 2
