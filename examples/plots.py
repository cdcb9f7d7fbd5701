"""Draw what runs of train.py have left, in the one style of all pictures of this project.

    python examples/plots.py runs/ucf101_frames       # one run, or several

A run's folder receives curves.png, from its log.csv, and confusion.png, from its predictions.csv.
The accuracy of each class and the pairs that are confused most are printed.
"""

import csv
import logging
import sys
import warnings
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.text import Text
from matplotlib.figure import Figure  # not pyplot, which keeps every figure and wants a screen

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import train

COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"]  # Okabe and Ito's
MOST_NAMED = 60  # classes whose names still fit beside a matrix


# ---- the style, for the other examples too ----

def figure(width, height, mosaic, **options):
    """-> figure, {name: axis}, of width x height inches and laid out as `subplot_mosaic` does."""
    matplotlib.rcParams.update({
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
        "legend.frameon": False,
        "text.parse_math": False})  # names may hold a $
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # a weight is no matter
    fig = Figure((width, height), layout="constrained")
    return fig, fig.subplot_mosaic(mosaic, **options)


def printable(name):
    """A name without the bytes that are not UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def fonts_for(text):
    """Families of installed fonts that together have the letters of a text, matplotlib's own first.
    Prints the letters that none of them has."""
    families = []
    missing = {letter for letter in text if letter.isprintable() and letter != " "}
    for path in [font_manager.findfont("DejaVu Sans"), *sorted(font_manager.findSystemFonts())]:
        if not missing:
            break
        try:
            font = font_manager.get_font(path)
        except (OSError, RuntimeError):  # no font, or one of pictures
            continue
        known = {chr(code) for code in font.get_charmap()}
        if missing & known:
            font_manager.fontManager.addfont(path)  # it may be newer than matplotlib's list
            families.append(font.family_name)
            missing -= known
    if missing:
        print(f"no font here has the letters {''.join(sorted(missing)[:20])}; one of Noto's would")
    return families


def check_target(path):
    """ValueError, before the work is done, for a picture that could not be written. None is none."""
    if path and (Path(path).is_dir() or not Path(path).parent.is_dir()):
        raise ValueError(f"{path}: no such folder to write to, or one itself")


def save_figure(fig, path):
    """Write a PNG, as a whole or not at all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of each letter that a font lacks
        fig.draw_without_rendering()  # else texts at ticks are not there yet
        texts = fig.findobj(Text)
        families = fonts_for("".join(text.get_text() for text in texts))
        for text in texts:
            text.set_family(families)
        train.write(Path(path), lambda file: fig.savefig(file, dpi=120, format="png"))


# ---- a run's files ----

def read_table(path, columns):
    """The rows of a CSV as dicts. A ValueError where there are none, or one lacks a column."""
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path}: holds no rows")
    for number, row in enumerate(rows, 1):
        for column in columns:
            if not row.get(column):
                raise ValueError(f"{path}: row {number} has no {column}")
    return rows


def read_log(path):
    """{column: [(epoch, value), ...]} of a log.csv."""
    curves = {}
    for number, row in enumerate(read_table(path, ["epoch", "loss"]), 1):
        for name, value in row.items():
            if not value:
                continue  # an accuracy that was not measured in this epoch
            try:
                point = float(row["epoch"]), float(value)
            except (TypeError, ValueError):
                raise ValueError(f"{path}: row {number}: {value!r} is no number") from None
            curves.setdefault(name, []).append(point)
    return curves


def read_predictions(path):
    """-> classes, and a matrix of how many clips of each (row) were taken for which (column)."""
    pairs = Counter()
    for row in read_table(path, ["class", "class1"]):
        pairs[row["class"], row["class1"]] += 1
    classes = sorted({name for pair in pairs for name in pair})
    matrix = np.zeros((len(classes), len(classes)), int)
    for (true, predicted), count in pairs.items():
        matrix[classes.index(true), classes.index(predicted)] = count
    return classes, matrix


# ---- pictures ----

def plot_curves(path, curves):
    """Losses per epoch, and beside them accuracies, if any were measured."""
    panels = {"losses": [], "accuracies": []}
    for name in curves:
        if name.endswith(" top1"):
            panels["accuracies"].append(name)
        elif name not in ("epoch", "lr", "seconds", "clips/s") and not name.endswith(" top5"):
            panels["losses"].append(name)
    if not panels["accuracies"]:
        del panels["accuracies"]

    fig, axes = figure(4 * len(panels), 3, [list(panels)])
    last_epoch, _ = curves["epoch"][-1]
    for panel, names in panels.items():
        for name in names:
            epochs, values = zip(*curves[name])
            marker = "o" if len(epochs) < 20 else ""
            label = printable(name).removesuffix(" top1").replace("_", " ")
            line, = axes[panel].plot(epochs, values, marker=marker, label=label)
            if name == "loss":  # thick and behind its parts, as it may equal one of them
                line.set(linewidth=4, zorder=1)
        axes[panel].set(xlabel="epoch", xlim=(0, 1.03 * last_epoch))
        axes[panel].xaxis.get_major_locator().set_params(integer=True)
        axes[panel].legend()
    axes["losses"].set(ylabel="mean loss of the epoch", ylim=(0, None))
    if "accuracies" in axes:
        axes["accuracies"].set(ylabel="top-1 accuracy (%)", ylim=(0, 102))
    save_figure(fig, path)


def plot_confusion(path, classes, matrix):
    """Which share of the clips of a class (row) is taken for which (column)."""
    clips = matrix.sum(1, keepdims=True)
    named = len(classes) <= MOST_NAMED
    height = max(4, 0.15 * len(classes)) if named else 6
    fig, axes = figure(7, height, [["matrix"]])
    axis = axes["matrix"]
    shares = 100 * matrix / clips.clip(1)  # a class that is only predicted has no clips
    image = axis.imshow(shares, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    axis.set_title(f"{100 * matrix.trace() / clips.sum():.1f} % of {clips.sum()} clips are right")
    axis.set(xlabel="predicted class", ylabel="true class")
    if named:
        labels = [f"{printable(name)[-40:]}  {i}" for i, name in enumerate(classes)]
        axis.set_yticks(range(len(classes)), labels, fontsize=7)
    axis.xaxis.get_major_locator().set_params(integer=True)
    fig.colorbar(image, ax=axis, shrink=0.6, label="clips of the true class (%)")
    save_figure(fig, path)


# ---- what is printed ----

def print_classes(classes, matrix):
    """The accuracy of each class, the lowest first, and the ten pairs that are confused most."""
    clips = matrix.sum(1)
    accuracy = 100 * matrix.diagonal() / clips.clip(1)
    width = max(map(len, classes))
    for i in np.argsort(accuracy, kind="stable"):
        if clips[i]:
            print(f"  {classes[i]:<{width}}  {accuracy[i]:5.1f} % of {clips[i]} clips")

    wrong = matrix - np.diag(matrix.diagonal())
    for pair in np.argsort(-wrong, axis=None, kind="stable")[:10]:
        i, k = divmod(pair, len(classes))
        if wrong[i, k]:
            print(f"  {wrong[i, k]} of {clips[i]} clips of {classes[i]} taken for {classes[k]}")


def draw(run):
    """Draw and print all that a run's folder has the files for."""
    log = run / "log.csv"
    predictions = run / "predictions.csv"
    if not log.is_file() and not predictions.is_file():
        raise ValueError(f"{run}: holds no run, neither log.csv nor predictions.csv")
    if predictions.is_file():
        classes, matrix = read_predictions(predictions)
        print(f"{run}:")
        print_classes(classes, matrix)
        plot_confusion(run / "confusion.png", classes, matrix)
        print(run / "confusion.png")
    if log.is_file():
        plot_curves(run / "curves.png", read_log(log))
        print(run / "curves.png")


def main(argv=None):
    parser = data.Parser(description="Draw what runs of train.py have left.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run (its --out)")
    args = parser.parse_args(argv)
    for run in args.runs:
        draw(Path(run))


if __name__ == "__main__":
    data.command(main)
