"""plot_curves.py: the images it writes, what they show, how it refuses."""

import math
import subprocess
import sys

import pytest
from conftest import ROOT, finish

import plot_curves

NAMES = ["train_loss.png", "val_loss.png", "val_ppl.png"]
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
    pyplot = pytest.importorskip("matplotlib.pyplot")
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


def test_images_beside_the_csv(metrics, figures, capsys):
    assert plot_curves.main([str(metrics)]) == 0
    assert capsys.readouterr().out.split("\n") == [*(str(metrics.parent / n) for n in NAMES), ""]
    assert_images(metrics.parent)
    assert points(figures["training loss"].lines[0]) == [(1, 5.5), (2, 4.5), (4, 4.1)]
    assert points(figures["validation loss"].lines[0]) == [(2, 4.0), (4, 30.0)]
    ppl = [(2, math.exp(4)), (4, math.exp(20))]  # capped as in `eval`
    assert points(figures["validation perplexity"].lines[0]) == ppl
    assert all(axes.get_legend() is None for axes in figures.values())


def test_several_runs_are_laid_over_one_another(metrics, figures, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text(HEADER + "7,0,train,2.5,t,\n", encoding="utf-8")
    out = tmp_path / "deep" / "plots"
    assert plot_curves.main([str(metrics), str(other), "--out_dir", str(out)]) == 0
    assert_images(out)
    assert not list(metrics.parent.glob("*.png"))
    axes = figures["training loss"]
    assert [points(line) for line in axes.lines][1] == [(7, 2.5)]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == [str(metrics), str(other)]


def test_a_real_run(tiny_checkpoint, tmp_path, figures):
    csv = tiny_checkpoint.parent / "metrics.csv"
    assert plot_curves.main([str(csv), "--out_dir", str(tmp_path)]) == 0
    assert_images(tmp_path)
    assert len(points(figures["validation loss"].lines[0])) >= 1


@pytest.mark.parametrize(
    ("content", "words"),
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
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, content, words):
    path = tmp_path / "metrics.csv"
    if content is not None:
        path.write_bytes(content)
    assert plot_curves.main([str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"error: {path}: ")
    assert words in err
    assert not list(tmp_path.glob("*.png"))


def test_a_folder_that_cannot_be_made(metrics, tmp_path, capsys):
    pytest.importorskip("matplotlib")
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
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(ROOT / "plot_curves.py"), str(metrics)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert finish(subprocess.Popen(command, **pipes)).ok().out.count(".png\n") == 3
    assert finish(subprocess.Popen(command[:2], **pipes)).code == 2
