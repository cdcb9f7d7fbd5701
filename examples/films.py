"""Name what happens along a film, with CLIP or with what was trained.

    python examples/films.py film.mp4 --checkpoint runs/ucf101_frames/last.pt
    python examples/films.py film.mp4 --clip ViT-B/16 --class-names "riding a bike" "mixing batter" \\
        --every 0.5 --window 3 --none 0.3 --picture film.png
    ffmpeg -i rtsp://camera -c copy -f matroska - | python examples/films.py - --checkpoint last.pt

Windows of --window seconds begin every --every seconds, each is shown to the model as a clip, and a
line tells of each stretch of equal answers: from when to when, the class, and its mean probability.
A film is decoded once, in memory that does not grow with its length; of one that is piped, a
stretch is told as soon as it is over. --none P leaves stretches unnamed in which no answer reaches
the probability P. --json has all windows; --picture draws them, with a frame of each stretch.
"""

import contextlib
import io
import json
import math
import os
import sys
import textwrap
from collections import deque
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import plots
import prepare
import train
from ezclip import class_probabilities

COLUMNS, MOST_FRAMES, MOST_CLASSES = 8, 48, 15  # of a picture
NONE = "none of these"


def parser():
    p = data.Parser(allow_abbrev=False, description="Name what happens along a film.")
    flag = p.add_argument
    flag("film", metavar="FILM", help="a video, or - for one that is piped")
    flag("--class-names", nargs="+", default=[], metavar="NAME",
         help="the names to choose from, or a file of names (those of the checkpoint's training)")
    flag("--every", type=data.at_least(0.01, float), default=1.0,
         help="seconds from a window to the next (%(default)s)")
    flag("--window", type=data.at_least(0.01, float), default=2.0,
         help="seconds of a window (%(default)s)")
    flag("--none", type=data.at_least(0, float), default=0.0, metavar="P",
         help="leave stretches unnamed in which no answer has this probability (name all)")
    flag("--json", action="store_true", help="windows and stretches as JSON; all else on stderr")
    flag("--picture", metavar="FILE", help="a PNG of the classes over time")
    train.add_model_flags(p)
    train.add_text_flags(p)
    return p


# ---- from a film to windows ----

class Windows:
    """Iterate over the windows of a film: (start in seconds, T images). `seconds` is how much of it
    has been read, `over` whether all windows have been given.

    An image is what the film shows in the middle of one of T equal parts of the window. Windows
    that the film's end cuts are left out, unless it is the first.
    """

    def __init__(self, frames, every, window, num_frames):
        self.frames = frames
        self.every, self.window = every, window
        self.moments = (np.arange(num_frames) + 0.5) * window / num_frames
        self.seconds = 0.0
        self.over = False

    def __iter__(self):
        begun, shown, first, begins = deque(), None, None, 0.0
        step = 0.0  # the time that the last frame is shown
        number = 0
        for frame in self.frames:
            if first is None:
                first = frame.info["seconds"]
            now = frame.info["seconds"] - first
            if not now >= 0:
                raise ValueError("the film's frames have no times")
            step, self.seconds = max(0.0, now - begins), now
            while number * self.every <= now:
                begun.append((number * self.every, []))
                number += 1
            self.fill(begun, shown, now)
            while begun and begun[0][0] + self.window <= now:
                yield begun.popleft()
            shown, begins = frame, now

        # the last frame is shown as long as the one before it
        self.seconds += step
        self.fill(begun, shown, np.inf)
        for start, images in begun:
            if start == 0 or start + self.window <= self.seconds + step / 2:
                yield start, images
        self.over = True

    def fill(self, begun, shown, now):
        """Up to `now` the film has shown this frame."""
        for start, images in begun:
            while len(images) < len(self.moments) and start + self.moments[len(images)] < now:
                images.append(shown)


def square(image, size):
    """An image as the uint8 (3, size, size) that evaluation makes of a frame."""
    file = io.BytesIO()
    image.save(file, "PPM")
    return data.read_frame(file, size)


# ---- from windows to stretches ----

class Stretches:
    """Joins windows of equal answers, and shows each stretch as soon as it is over.

    A stretch that begins reaches back half of --every from the middle of its window, and so far
    its predecessor goes.
    """

    def __init__(self, film, classes, none):
        self.film, self.classes, self.none = film, classes, none
        self.found = []
        self.now = None  # the stretch that goes on
        self.unnamed = None  # one before it that may go on if this stays unnamed too

    def add(self, start, probabilities, image):
        best = int(probabilities.argmax())
        p = probabilities[best].item()
        if self.now is None or self.now["class"] != self.classes[best]:
            begin = start + (self.film.window - self.film.every) / 2 if self.now else 0.0
            self.close(begin)
            self.now = {"start": begin, "class": self.classes[best], "answers": [], "frame": image}
        if p >= max(self.now["answers"], default=0):
            self.now["frame"] = image  # the clearest
        self.now["answers"].append(p)

    def close(self, end):
        """End the stretch, and show it and what is before it, but one that may still go on."""
        ended, self.now = self.now, None
        if ended is None:
            return
        ended["end"] = end
        if max(ended["answers"]) < self.none:
            ended["class"] = None
            if self.unnamed:
                ended["start"] = self.unnamed["start"]
                ended["answers"] = self.unnamed["answers"] + ended["answers"]
            self.unnamed = ended
        else:
            self.show_unnamed()
            self.show(ended)

    def show_unnamed(self):
        if self.unnamed:
            self.show(self.unnamed)
        self.unnamed = None

    def show(self, stretch):
        p = float(np.mean(stretch.pop("answers")))
        answer = f"{stretch['class']}  {100 * p:.0f} %"
        if stretch["class"] is None:
            p, answer = None, NONE
        self.found.append({**stretch, "probability": p})
        print(f"{clock(stretch['start'])}-{clock(stretch['end'])}  {answer}", flush=True)


def clock(seconds):
    """12 -> 00:12, 3723 -> 1:02:03"""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"


# ---- the picture ----

def plot_film(path, film, classes, windows, stretches):
    """Probabilities of the classes over time, and below them a frame of each stretch, of many those
    of the longest."""
    longest = sorted(stretches, key=lambda stretch: stretch["start"] - stretch["end"])[:MOST_FRAMES]
    chosen = sorted(longest, key=lambda stretch: stretch["start"])
    probabilities = np.stack([p for _, p in windows])  # (windows, classes)
    # the classes that are the answer anywhere, in the order of their first time
    answers = [classes[k] for k in probabilities.argmax(1)]
    named = list(dict.fromkeys(stretch["class"] for stretch in chosen if stretch["class"]))
    named = (named or list(dict.fromkeys(answers)))[:MOST_CLASSES]
    rows = math.ceil(len(chosen) / COLUMNS)
    mosaic = [["time"] * COLUMNS]
    for row in range(rows):
        mosaic.append([f"frame {row * COLUMNS + i}" for i in range(COLUMNS)])
    height = 0.8 + 0.25 * len(named)
    fig, axes = plots.figure(10, height + 1.5 * rows, mosaic, height_ratios=[height, *[1.5] * rows])
    axis = axes.pop("time")
    order = [classes.index(name) for name in named]
    first, last = windows[0][0], windows[-1][0]
    middle = (film.window - film.every) / 2
    box = (first + middle, last + middle + film.every, len(named) - 0.5, -0.5)
    image = axis.imshow(100 * probabilities[:, order].T, cmap="cividis", vmin=0, vmax=100,
                        aspect="auto", interpolation="nearest", extent=box)
    axis.set_yticks(range(len(named)), [plots.printable(name) for name in named])
    axis.set(xlim=(0, film.seconds))
    axis.xaxis.set_major_formatter(lambda seconds, _: clock(seconds))
    axis.xaxis.get_major_locator().set_params(integer=True)
    fig.colorbar(image, ax=axis, label="probability (%)")
    for axis in axes.values():
        axis.axis("off")
    for axis, stretch in zip(axes.values(), chosen):
        axis.imshow(np.asarray(stretch["frame"]))
        name = textwrap.wrap(plots.printable(stretch["class"] or NONE), 15)
        axis.set_title("\n".join([clock(stretch["start"]), *name[:3]]), fontsize=7)
    plots.save_figure(fig, path)


# ---- a film ----

def check(args):
    """Find errors before a model is loaded, and the classes."""
    if args.film != "-" and not os.path.isfile(args.film):
        raise ValueError(f"{args.film}: no such film")
    if args.picture and not Path(args.picture).parent.is_dir():
        raise ValueError(f"{args.picture}: no such folder to write to")
    args.class_names = train.classes_of(args)


@torch.inference_mode()
def name_film(args):
    """Print the stretches of a film; returns what --json prints."""
    check(args)
    model = train.build_model(args).eval()
    config, classes = model.config, args.class_names
    texts = train.encode_classes(classes, args, model)
    complaints, kept = [], []
    frames = prepare.video_frames(args.film, complaints)
    film = Windows(frames, args.every, args.window, config.num_frames)
    stretches = Stretches(film, classes, args.none)
    for start, images in film:
        clip = torch.stack([square(image, config.image_size) for image in images])
        features = train.encode_clips(clip[None], args, model)  # (1, E)
        probabilities = class_probabilities(features, texts)[0].cpu()  # (classes,)
        if not probabilities.isfinite().all():
            raise ValueError("the model's features are not finite: its weights are broken")
        small = None
        if args.picture:
            small = images[len(images) // 2].copy()
            small.thumbnail((160, 160))
        stretches.add(start, probabilities, small)
        if args.json or args.picture:
            kept.append((start, probabilities.numpy()))
    if not film.seconds and not stretches.now:
        said = complaints[0] if complaints else "no frames"
        raise ValueError(f"{args.film}: is no readable video ({said})")
    stretches.close(film.seconds)
    stretches.show_unnamed()
    if complaints:
        data.warn(f"damaged {args.film}: {complaints[-1]}")
    if args.picture:
        plot_film(args.picture, film, classes, kept, stretches.found)

    windows = []
    for start, probabilities in kept:
        best = []
        for k in (-probabilities).argsort(kind="stable")[:5]:
            best.append({"class": classes[k], "probability": round(float(probabilities[k]), 6)})
        windows.append({"start": start, "end": start + args.window, "classes": best})
    found = [{key: value for key, value in stretch.items() if key != "frame"}
             for stretch in stretches.found]
    return {"film": args.film, "clip": model.weights_path, "checkpoint": args.checkpoint,
            "num_frames": config.num_frames, "seconds": film.seconds, "every": args.every,
            "window": args.window, "stretches": found, "windows": windows}


def main(argv=None):
    args = train.parser().parse_args([])  # what the flags of this program leave open
    args.eval_only = True
    args = parser().parse_args(argv, args)
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        content = name_film(args)
    if args.json:  # and nothing but JSON on stdout
        print(json.dumps(content, indent=1))


if __name__ == "__main__":
    data.command(main)
