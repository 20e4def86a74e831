"""Plots of runs and token stores.

    python plot_curves.py ckpts                        # a run's folder, or its metrics.csv
    python plot_curves.py runs/* --x minutes --log     # several runs overlaid
    python plot_curves.py ckpts/metrics.csv --out_dir .
    python plot_curves.py data/processed/*             # document lengths of token stores

A run gives curves.png (training and validation together), train_loss.png, val_loss.png and
val_ppl.png, except that preference and reward losses have no perplexity. A store gives
token_lengths.png. The images are written next to the first input, or to --out_dir, and their paths
are printed. Inputs with nothing to draw are skipped with a message.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median

import numpy as np

WORDS = {"train": "training", "val": "validation"}
X_AXES = {"steps": "optimizer steps", "minutes": "minutes of training"}  # --x: label
PICTURES = {  # file name: (splits, what is drawn)
    "curves.png": (("train", "val"), "loss"),
    "train_loss.png": (("train",), "training loss"),
    "val_loss.png": (("val",), "validation loss"),
    "val_ppl.png": (("val",), "validation perplexity"),
}
LEGEND = dict(loc="lower center", bbox_to_anchor=(0.5, 1), fontsize="small")  # hides nothing
STYLE = {"font.size": 13, "savefig.dpi": 120, "axes.grid": True, "grid.alpha": 0.3}


@dataclass
class Curves:
    """A run's losses: {split: (positions on the x axis, losses)}."""

    points: dict[str, tuple[list[float], list[float]]]
    unit: str  # of its losses; only losses of the same unit may share an axis
    weighted: bool  # whether the training loss weights answers; the validation loss never does


def read_curves(path: Path, x: str) -> Curves:
    """Read a metrics.csv and the config.json next to it. Raises ValueError saying what is wrong."""
    rows = []
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if missing := {"step", "split", "loss"} - set(reader.fieldnames or ()):
            raise ValueError(f"not a metrics.csv: no column {', '.join(sorted(missing))}")
        for row in reader:
            try:
                if row["split"] in WORDS:
                    rows.append(row | {"steps": int(row["step"]), "loss": float(row["loss"])})
            except (TypeError, ValueError):
                raise ValueError(f"line {reader.line_num} lacks a step or a loss") from None
    if not rows:
        raise ValueError("no train or val rows yet")
    if x == "minutes":
        for row, minutes in zip(rows, minutes_of(rows), strict=True):
            row["minutes"] = minutes
    points = {}
    for split in WORDS:
        mine = [row for row in rows if row["split"] == split]
        points[split] = [row[x] for row in mine], [row["loss"] for row in mine]
    config_file = path.with_name(path.stem.replace("metrics", "config") + ".json")
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.exists() else {}
    return Curves(points, unit_of(config), (config.get("answer_weight") or 0) > 1)


def unit_of(config: dict) -> str:
    """The unit of a loss: nats per byte and per token of a vocabulary are not comparable."""
    if config.get("objective", "ntp") != "ntp":
        return config["objective"]
    tokens = config.get("vocabulary") or {}
    if tokens.get("kind") == "byte":
        return "nats per byte"
    return f"nats per token of {tokens['size']:,}" if tokens else "nats per token"


def minutes_of(rows: list[dict]) -> list[float]:
    """Minutes since the first row. The pause before a resumed session counts as a typical gap."""
    try:
        stamps = [datetime.fromisoformat(row["timestamp"].replace("Z", "+00:00")) for row in rows]
    except (KeyError, TypeError, ValueError):
        raise ValueError("--x minutes: a row has no timestamp") from None
    gaps = [max(0.0, (after - before).total_seconds()) for before, after in pairwise(stamps)]
    usual = median(gaps or [0.0])
    spent = [usual if gap > 60 + 10 * usual else gap for gap in gaps]
    return [total / 60 for total in accumulate(spent, initial=0.0)]


def smooth(values: list[float]) -> np.ndarray:
    """A running mean over a tenth of all points, and over fewer near the steep beginning."""
    place = np.arange(len(values))
    half = np.minimum(place, len(values) // 20)
    start, end = place - half, np.minimum(place + half + 1, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[end] - sums[start]) / (end - start)


def read(path: Path, x: str) -> dict[Path, Curves | dict[int, int]]:
    """Each file's curves, or {length: documents}. Raises ValueError if a folder has none."""
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("metrics*.csv")) or list(path.glob("meta.json"))
    if not files:
        raise ValueError("holds no metrics.csv and no token store's meta.json")
    if files[0].suffix != ".json":
        return {file: read_curves(file, x) for file in files}
    lengths = json.loads(files[0].read_text(encoding="utf-8")).get("lengths")
    if not lengths:
        raise ValueError("not a token store's meta.json")
    return {files[0]: {int(length): n for length, n in lengths.items()}}


def name_of(file: Path) -> str:
    """runs/a for runs/a/metrics.csv, runs/a_finetune for runs/a/metrics_finetune.csv."""
    path = re.sub(r"[/\\](metrics|meta)(?=\w*$)", "", str(file.with_suffix("")))
    return "/".join(Path(path).parts[-2:])


@contextlib.contextmanager
def picture(path: Path, panels: int = 1) -> Iterator[list]:
    """Axes to draw on, side by side; afterwards, writes the file and prints its path."""
    import matplotlib

    matplotlib.use("Agg")  # needs no display
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        size = (max(8, 5.5 * panels), 5)
        figure, axes = plt.subplots(1, panels, figsize=size, layout="constrained", squeeze=False)
        yield list(axes[0])
        figure.savefig(path)
        plt.close(figure)
    print(path)


def draw_curves(out_dir: Path, runs: dict[Path, Curves], args: argparse.Namespace) -> None:
    """Draw PICTURES with the runs overlaid, and a panel for each unit of loss."""
    for file, (splits, what) in PICTURES.items():
        units = sorted({run.unit for run in runs.values()})
        if "perplexity" in what:  # only losses in nats have one
            units = [unit for unit in units if unit.startswith("nats")]
        if not units:
            continue
        with picture(out_dir / file, len(units)) as panels:
            for unit, axes in zip(units, panels, strict=True):
                scale, label = "log" if args.log else "linear", f"{what} ({unit})"
                axes.set(xlabel=X_AXES[args.x], ylabel=label, xscale=scale, yscale=scale)
                for number, (path, run) in enumerate(runs.items()):
                    if run.unit == unit:
                        name, colour = name_of(path), f"C{number}"
                        draw_run(axes, run, splits, colour, name, "perplexity" in what)
                if axes.lines:
                    axes.legend(**LEGEND)


def draw_run(axes, run: Curves, splits, colour: str, name: str, perplexity: bool) -> None:
    """Training: all rows faint, their running mean bold. Validation: its best point marked.

    A training loss that weights answers is not drawn next to a validation loss.
    """
    for split in splits:
        x, y = run.points[split]
        label = f"{name}: {WORDS[split]}"
        if perplexity:
            y = [math.exp(min(20.0, loss)) for loss in y]
        if split == "train":
            if run.weighted and len(splits) > 1:
                continue
            label += ", answers weighted more" if run.weighted else ""
            axes.plot(x, y, color=colour, alpha=0.3, lw=1)
            axes.plot(x, smooth(y), color=colour, lw=2.4, label=label)
        elif y:
            best = int(np.argmin(y))
            label += f", best {y[best]:.5g}"
            axes.plot(x, y, "--", marker="o" if len(y) < 30 else "", color=colour, ms=5)
            axes.plot(x[best], y[best], "--*", color=colour, ms=17, mec="white", label=label)


def draw_lengths(out_dir: Path, stores: dict[Path, dict], args: argparse.Namespace) -> None:
    """token_lengths.png: a histogram of tokens per document."""
    with picture(out_dir / "token_lengths.png") as (axes,):
        for path, lengths in stores.items():
            words = f"{name_of(path)}: {sum(lengths.values()):,} documents"
            axes.hist(lengths.keys(), 50, weights=list(lengths.values()), alpha=0.6, label=words)
        axes.set(xlabel="tokens in a document", ylabel="documents")
        axes.legend(**LEGEND)


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("path", nargs="+", type=Path, help="a run's or store's folder, csv or json")
    parser.add_argument("--x", choices=X_AXES, default="steps", help="(default: steps)")
    parser.add_argument("--log", action="store_true", help="logarithmic axes for curves")
    parser.add_argument("--out_dir", "--out-dir", type=Path, help="(default: next to the first)")
    args = parser.parse_args(argv)
    found, problems = {}, []
    for path in args.path:
        try:
            found |= read(path, args.x)
        except (OSError, ValueError, csv.Error) as error:
            problems.append(f"{path}: {getattr(error, 'strerror', None) or error}")
    for problem in problems:
        print("skipped" if found else "error", problem, sep=": ", file=sys.stderr)
    if not found:
        return 1
    out_dir = args.out_dir or next(iter(found)).parent
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for kind, draw in {Curves: draw_curves, dict: draw_lengths}.items():
            mine = {file: content for file, content in found.items() if isinstance(content, kind)}
            if mine:
                draw(out_dir, mine, args)
    except ImportError:
        print("error: plotting needs matplotlib: pip install matplotlib", file=sys.stderr)
    except OSError as error:
        print(f"error: {out_dir}: {error.strerror or error}", file=sys.stderr)
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
