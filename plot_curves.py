"""Pictures of runs, token stores and evaluations.

    python plot_curves.py ckpts                        # a run's folder, or its metrics.csv
    python plot_curves.py runs/* --x minutes --log     # several runs laid over one another
    python plot_curves.py data/processed/corpus        # lengths of a token store's documents
    python plot_curves.py eval.json                    # confusion tables of eval --json eval.json

A run gives curves.png (training and validation together) and, each by itself, train_loss.png,
val_loss.png and val_ppl.png; a store token_lengths.png; an evaluation confusion.png. The images
land beside the first input, or in --out_dir; their paths are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import math
import sys
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median

WORDS = {"train": "training", "val": "validation"}
# file name: (splits, label of the y axis, from loss to the value drawn)
CURVES = {
    "curves.png": (("train", "val"), "loss (nats per token)", float),
    "train_loss.png": (("train",), "training loss (nats per token)", float),
    "val_loss.png": (("val",), "validation loss (nats per token)", float),
    "val_ppl.png": (("val",), "validation perplexity", lambda loss: math.exp(min(20.0, loss))),
}
# Legible at half size; opaque, so that a dark page leaves the letters readable.
STYLE = {
    "font.size": 13, "legend.fontsize": 12, "axes.titlesize": 13, "savefig.dpi": 120,
    "figure.facecolor": "white", "savefig.transparent": False, "axes.grid": True,
    "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def read(path: Path) -> tuple[str, list | dict]:
    """("run", rows), ("store", {length: documents}) or ("eval", sources), told by content."""
    text = path.read_text(encoding="utf-8")
    if not text.startswith("{"):
        return "run", read_metrics(text)
    content = json.loads(text)
    if lengths := content.get("lengths"):
        return "store", {int(length): documents for length, documents in lengths.items()}
    tables = {k: v for k, v in content.get("sources", {}).items() if "confusion" in v}
    if not tables:
        raise ValueError("neither a token store nor an evaluation with a confusion table")
    return "eval", tables


def read_metrics(text: str) -> list[dict]:
    """Rows of a metrics.csv, step and loss as numbers. Raises ValueError saying what is wrong."""
    rows, found = csv.DictReader(text.splitlines()), []
    if missing := {"step", "split", "loss"} - set(rows.fieldnames or ()):
        raise ValueError(f"not a metrics.csv: no column {', '.join(sorted(missing))}")
    for row in rows:
        try:
            if row["split"] in WORDS:
                found.append(row | {"step": int(row["step"]), "loss": float(row["loss"])})
        except (TypeError, ValueError):
            raise ValueError(f"line {rows.line_num} lacks a step or a loss") from None
    if not found:
        raise ValueError("no train or val rows yet")
    return found


def steps(path: Path, rows: list[dict]) -> list[float]:
    return [row["step"] for row in rows]


def tokens(path: Path, rows: list[dict]) -> list[float]:
    """By the batch size and block size in the config.json beside the CSV."""
    config = path.with_name(path.stem.replace("metrics", "config") + ".json")
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        size = settings["batch_size"] * settings["block_size"]
    except (OSError, KeyError):
        raise ValueError(f"--x tokens: no batch_size and block_size in {config.name}") from None
    return [row["step"] * size for row in rows]


def minutes(path: Path, rows: list[dict]) -> list[float]:
    """Since the first row. The pause before a resumed session counts as a usual gap does."""
    try:
        times = [float(row["timestamp"]) for row in rows]
    except (KeyError, TypeError, ValueError):
        raise ValueError("--x minutes: a row has no timestamp") from None
    pairs = zip(rows[1:], pairwise(times), strict=True)
    gaps = [(row["split"], max(0.0, after - before)) for row, (before, after) in pairs]
    usual = {split: median([gap for s, gap in gaps if s == split] or [0.0]) for split in WORDS}
    spent = (usual[s] if gap > 10 + 10 * usual[s] else gap for s, gap in gaps)
    return [seconds / 60 for seconds in accumulate(spent, initial=0.0)]


# --x: label of the axis, places of a run's rows on it
UNITS = {
    "steps": ("optimizer steps", steps),
    "tokens": ("training tokens", tokens),
    "minutes": ("minutes of training", minutes),
}


def smooth(values: list[float]) -> list[float]:
    """The mean of the tenth of all points around each; of fewer near the steep beginning."""
    n, sums = len(values), [0.0, *accumulate(values)]
    spans = [(i - h, min(n, i + h + 1)) for i in range(n) for h in [min(i, n // 20)]]
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


def short_names(files: list[Path]) -> list[str]:
    """Names of the folders, with as many parents as tell them apart; of files if folders repeat."""
    names = [file.resolve().with_suffix("").parts for file in files]
    if len({parts[:-1] for parts in names}) == len(names):
        names = [parts[:-1] for parts in names]
    lengths = range(1, max(map(len, names), default=1))
    n = next((n for n in lengths if len({parts[-n:] for parts in names}) == len(names)), 0)
    return ["/".join(parts[-n:]) for parts in names]


@contextlib.contextmanager
def picture(path: Path, panels: int = 1) -> Iterator[list]:
    """Axes to draw on, side by side; at the end the file is written and its path printed."""
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


def draw_curves(out_dir: Path, runs: dict[str, list], args) -> None:
    """CURVES, the runs laid over one another. runs: by name, [(row, place on the x axis)]."""
    scale = "log" if args.log else "linear"
    for file, (splits, label, value) in CURVES.items():
        with picture(out_dir / file) as (axes,):
            for number, (name, rows) in enumerate(runs.items()):
                for split in splits:
                    x = [place for row, place in rows if row["split"] == split]
                    y = [value(row["loss"]) for row, _ in rows if row["split"] == split]
                    colour, words = f"C{number}", f"{name}: {WORDS[split]}"
                    if len(runs) == 1:
                        colour, words = f"C{list(WORDS).index(split)}", WORDS[split]
                    draw_line(axes, split, x, y, colour, words)
            axes.set(xlabel=UNITS[args.x][0], ylabel=label, xscale=scale, yscale=scale)
            finish(axes)


def draw_line(axes, split: str, x: list, y: list, colour: str, label: str) -> None:
    """Training: every row light, their running mean strong. Validation: its best point marked."""
    if split == "train":
        axes.plot(x, y, color=colour, alpha=0.3, lw=1)
        axes.plot(x, smooth(y), color=colour, lw=2.4, label=label)
    elif y:
        best = min(range(len(y)), key=y.__getitem__)
        label = f"{label}, best {y[best]:.5g}"
        axes.plot(x, y, "--", marker="o" if len(y) < 30 else "", color=colour, lw=1.8, ms=5)
        axes.plot(x[best], y[best], "--*", color=colour, lw=1.8, ms=17, mec="white", label=label)


def finish(axes) -> None:
    """A legend above, where it hides nothing; plain numbers: 20 M rather than 2e7."""
    from matplotlib.ticker import EngFormatter

    def plain(value: float, place: int) -> str:
        return EngFormatter()(value) if value >= 1000 else f"{value:g}"

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(plain)
        if axis.get_scale() == "log":
            axis.set_minor_formatter(lambda v, place: f"{v:g}" if f"{v:e}"[0] in "25" else "")
    handles = axes.get_legend_handles_labels()[0]
    loc = dict(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=1 + (len(handles) > 1))
    axes.legend(frameon=False, **loc)


def draw_lengths(out_dir: Path, stores: dict[str, dict], args) -> None:
    """token_lengths.png: documents by their length, with the length that 95% stay within."""
    import numpy as np

    every = sorted({length for lengths in stores.values() for length in lengths})
    wide = every[-1] > 20 * every[0]
    edges = (np.geomspace if wide else np.linspace)(every[0], every[-1] + 1, 50)
    with picture(out_dir / "token_lengths.png") as (axes,):
        for number, (name, lengths) in enumerate(stores.items()):
            sizes, counts = np.array(sorted(lengths.items())).T
            most = sizes[np.searchsorted(counts.cumsum(), 0.95 * counts.sum())]
            words = f"{name}: {counts.sum():,} documents, 95% within {most:,} tokens"
            axes.hist(sizes, np.unique(edges.round()), weights=counts, alpha=0.6, label=words)
            axes.axvline(most, color=f"C{number}", linestyle="--")
        axes.set(xlabel="tokens in a document", ylabel="documents", ymargin=0.2)
        axes.set_xscale("log" if wide else "linear")
        finish(axes)


def draw_tables(out_dir: Path, evals: dict[str, dict], args) -> None:
    """confusion.png: the counts of each source, coloured by their share of the true class."""
    tables = [(f"{name}, " * (len(evals) > 1) + source, row)
              for name, sources in evals.items() for source, row in sources.items()]  # fmt: skip
    with picture(out_dir / "confusion.png", len(tables)) as panels:
        for axes, (name, row) in zip(panels, tables, strict=True):
            labels = [label[:12] for label in row["confusion"]["labels"]]
            for i, counts in enumerate(row["confusion"]["true_by_predicted"]):
                shares = [n / max(sum(counts), 1) for n in counts]
                axes.imshow([shares], cmap="Blues", vmin=0, vmax=1,
                            extent=(-0.5, len(labels) - 0.5, i + 0.5, i - 0.5))  # fmt: skip
                for j, n in enumerate(counts):
                    colour = "white" if shares[j] > 0.5 else "black"
                    axes.text(j, i, f"{n:,}", ha="center", va="center", color=colour)
            places, edges = range(len(labels)), (-0.5, len(labels) - 0.5)
            axes.set_xticks(places, labels, rotation=45 * (len(labels) > 4))
            axes.set_yticks(places, labels)
            axes.set(xlabel="predicted", ylabel="true", xlim=edges, ylim=edges[::-1])
            axes.set_title(f"{name}: accuracy {row['accuracy']:.4f}")
            axes.grid(False)


PICTURES = {"run": draw_curves, "store": draw_lengths, "eval": draw_tables}


def files_of(path: Path) -> list[Path]:
    """A folder's curves, or its token store; any other path stands for itself."""
    if not path.is_dir():
        return [path]
    if found := sorted(path.glob("metrics*.csv")) or list(path.glob("meta.json")):
        return found
    raise ValueError("holds no metrics.csv, and no meta.json of a token store")


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("path", nargs="+", type=Path, help="folder of a run or store, csv or json")
    parser.add_argument("--x", choices=UNITS, default="steps", help="(default: steps)")
    parser.add_argument("--log", action="store_true", help="curves on logarithmic scales")
    parser.add_argument("--out_dir", "--out-dir", type=Path, help="(default: beside the first)")
    args = parser.parse_args(argv)
    found: dict[str, dict[Path, list | dict]] = {kind: {} for kind in PICTURES}
    try:
        for path in args.path:
            for file in files_of(path):
                kind, content = read(file)
                if kind == "run":
                    content = list(zip(content, UNITS[args.x][1](file, content), strict=True))
                found[kind][file] = content
        path = args.out_dir or files_of(args.path[0])[0].parent
        path.mkdir(parents=True, exist_ok=True)
        for kind, inputs in found.items():
            if inputs:
                names = dict(zip(short_names(list(inputs)), inputs.values(), strict=True))
                PICTURES[kind](path, names, args)
    except ImportError:
        print("error: plotting needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 1
    except (OSError, ValueError, csv.Error) as error:
        print(f"error: {path}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
