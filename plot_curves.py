"""Curves of one run or several: metrics.csv -> train_loss.png, val_loss.png, val_ppl.png.

    python plot_curves.py ckpts/metrics.csv
    python plot_curves.py a/metrics.csv b/metrics.csv --out_dir plots

The images land beside the first CSV, or in --out_dir; their paths are printed.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from pathlib import Path

# file name: (split, label of the y axis, from loss to the value drawn)
CURVES = {
    "train_loss.png": ("train", "training loss (nats per token)", float),
    "val_loss.png": ("val", "validation loss (nats per token)", float),
    "val_ppl.png": ("val", "validation perplexity", lambda loss: math.exp(min(20.0, loss))),
}


def read_losses(path: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, loss) points of a metrics.csv, by split. Raises ValueError saying what is wrong."""
    points: dict[str, list[tuple[int, float]]] = {"train": [], "val": []}
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if missing := {"step", "split", "loss"} - set(rows.fieldnames or ()):
            raise ValueError(f"not a metrics.csv: no column {', '.join(sorted(missing))}")
        for row in rows:
            try:
                if row["split"] in points:
                    points[row["split"]].append((int(row["step"]), float(row["loss"])))
            except (TypeError, ValueError):
                raise ValueError(f"line {rows.line_num} lacks a step or a loss") from None
    if not any(points.values()):
        raise ValueError("no train or val rows yet")
    return points


def draw(runs: dict[str, dict], out_dir: Path) -> list[Path]:
    """One image for each of CURVES, the runs laid over one another. Returns the paths."""
    import matplotlib

    matplotlib.use("Agg")  # needs no display
    from matplotlib import pyplot as plt

    out_dir.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (split, label, value) in CURVES.items():
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        for run, points in runs.items():
            steps = [step for step, _ in points[split]]
            marker = "o" if len(steps) < 30 else None
            axes.plot(steps, [value(y) for _, y in points[split]], marker=marker, ms=3, label=run)
        axes.set(xlabel="optimizer step", ylabel=label)
        axes.grid(alpha=0.3)
        if len(runs) > 1:
            axes.legend()
        figure.savefig(out_dir / name, dpi=120)
        plt.close(figure)
        written.append(out_dir / name)
    return written


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("csv", nargs="+", type=Path, help="metrics.csv of a run")
    parser.add_argument("--out_dir", "--out-dir", type=Path, help="(default: beside the first CSV)")
    args = parser.parse_args(argv)
    runs, out_dir = {}, args.out_dir or args.csv[0].parent
    try:
        for path in args.csv:
            runs[str(path)] = read_losses(path)
        path = out_dir
        print(*draw(runs, out_dir), sep="\n")
    except ImportError:
        print("error: plotting needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 1
    except (OSError, ValueError, csv.Error) as error:
        print(f"error: {path}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
