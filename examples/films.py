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
import predict
import prepare
import train
from ezclip import class_probabilities

COLUMNS, MOST_FRAMES, MOST_CLASSES = 8, 48, 15  # of a picture
NONE = "none of these"


def parser():
    p = data.Parser(allow_abbrev=False, description="Name what happens along a film.")
    flag = p.add_argument
    flag("film", metavar="FILM", help="a video, or - for one that is piped")
    flag("--every", type=data.at_least(0.01, float), default=1.0,
         help="seconds from a window to the next (%(default)s)")
    flag("--window", type=data.at_least(0.01, float), default=2.0,
         help="seconds of a window (%(default)s)")
    flag("--none", type=data.at_least(0, float), default=0.0, metavar="P",
         help="leave stretches unnamed in which no answer has this probability (name all)")
    flag("--json", action="store_true", help="windows and stretches as JSON; all else on stderr")
    flag("--picture", metavar="FILE", help="a PNG of the classes over time")
    predict.add_flags(p)
    return p


# ---- from a film to windows ----

class Windows:
    """Iterate over the windows of a film: (start in seconds, T images). `seconds` is how much of it
    has been read.

    An image is what the film shows in the middle of one of T equal parts of the window. Windows
    that the film's end cuts are left out, unless it is the first.
    """

    def __init__(self, frames, every, window, num_frames):
        self.frames = frames
        self.every, self.window = every, window
        self.moments = (np.arange(num_frames) + 0.5) * window / num_frames
        self.seconds = 0.0

    def __iter__(self):
        begun = deque()  # windows that are not complete: (start, images)
        number = 0  # of windows that have begun
        shown = None  # the frame before
        offset = step = 0.0  # step: how long that was shown
        for frame in self.frames:
            time = frame.info["seconds"]
            if math.isnan(time):
                raise ValueError("its frames have no times")
            if shown is None:
                offset = time
            elif time - offset < self.seconds:  # times begin anew, as in files that were joined
                offset = time - (self.seconds + step)
            now = time - offset
            step, self.seconds = now - self.seconds, now
            yield from self.completed(begun, shown, now)
            while number * self.every <= now:  # one after another: times may jump
                begun.append((number * self.every, []))
                number += 1
                yield from self.completed(begun, shown, now)
            shown = frame

        # the last frame is shown as long as the one before it
        self.seconds += step
        for start, images in begun:
            if start == 0 or start + self.window <= self.seconds + step / 2:
                images += [shown] * (len(self.moments) - len(images))
                yield start, images

    def completed(self, begun, shown, now):
        """Yield the windows that are over, where up to `now` the film has shown this frame."""
        for start, images in begun:
            while len(images) < len(self.moments) and start + self.moments[len(images)] < now:
                images.append(shown)
        while begun and begun[0][0] + self.window <= now:
            yield begun.popleft()


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
        self.unnamed = None  # the one before it, which goes on if this stays unnamed too

    def add(self, start, probabilities, image):
        best = int(probabilities.argmax())
        p = probabilities[best].item()
        if self.now is None or self.now["class"] != self.classes[best]:
            begin = start + (self.film.window - self.film.every) / 2 if self.now else 0.0
            self.close(begin)
            self.now = {"start": begin, "class": self.classes[best], "sum": 0.0, "windows": 0,
                        "best": -1.0}
        if p > self.now["best"]:
            self.now.update(best=p, frame=image)  # the clearest
        self.now["sum"] += p
        self.now["windows"] += 1
        if p >= self.none:
            self.show_unnamed()

    def close(self, end):
        """End the stretch and show it; one without a name may still go on."""
        ended, self.now = self.now, None
        if ended is None:
            return
        ended["end"] = end
        if ended["best"] >= self.none:
            return self.show(ended)
        if self.unnamed:
            ended["start"] = self.unnamed["start"]
        self.unnamed = {**ended, "class": None}

    def show_unnamed(self):
        if self.unnamed:
            self.show(self.unnamed)
        self.unnamed = None

    def show(self, stretch):
        p = stretch["sum"] / stretch["windows"]
        answer = f"{stretch['class']}  {100 * p:.0f} %"
        if stretch["class"] is None:
            p, answer = None, NONE
        self.found.append({"start": stretch["start"], "end": stretch["end"],
                           "class": stretch["class"], "probability": p, "frame": stretch["frame"]})
        tenths = self.film.every < 1
        times = [clock(stretch[moment], tenths) for moment in ("start", "end")]
        print(f"{'-'.join(times)}  {answer}", flush=True)


def clock(seconds, tenths=False):
    """12 -> 00:12 or 00:12.0, 3723 -> 1:02:03"""
    parts = 10 if tenths else 1
    minutes, rest = divmod(int(seconds * parts + 0.5), 60 * parts)
    hours, minutes = divmod(minutes, 60)
    seconds = f"{rest / 10:04.1f}" if tenths else f"{rest:02}"
    return f"{hours}:{minutes:02}:{seconds}" if hours else f"{minutes:02}:{seconds}"


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
    axis.set_yticks(range(len(named)), [plots.printable(name)[:40] for name in named])
    axis.set(xlim=(0, film.seconds or 1))
    axis.xaxis.set_major_formatter(lambda seconds, _: clock(seconds))
    axis.xaxis.get_major_locator().set_params(integer=True)
    fig.colorbar(image, ax=axis, label="probability (%)")
    for axis in axes.values():
        axis.axis("off")
    for axis, stretch in zip(axes.values(), chosen):
        axis.imshow(np.asarray(stretch["frame"]))
        name = textwrap.wrap(plots.printable(stretch["class"] or NONE), 14)
        axis.set_title("\n".join([clock(stretch["start"]), *name[:3]]), fontsize=7)
    plots.save_figure(fig, path)


# ---- a film ----

def check(args):
    """Find errors before a model is loaded, and the classes."""
    if args.film != "-" and not os.path.isfile(args.film):
        raise ValueError(f"{args.film}: no such film")
    if args.none > 1:
        raise ValueError(f"--none {args.none} is no probability, which is 1 at most")
    plots.check_target(args.picture)
    args.class_names = predict.classes_of(args)


def answers(film, texts, model, args):
    """Yield (start, images, probabilities of the classes) of a film's windows."""
    before, probabilities = None, None
    for start, images in film:
        if images != before:  # else the picture stands still
            size = model.config.image_size
            clip = torch.stack([data.to_square(image, size) for image in images])
            features = train.encode_clips(clip[None], args, model)  # (1, E)
            probabilities = class_probabilities(features, texts)[0].cpu()  # (classes,)
        yield start, images, probabilities
        before = images


@torch.inference_mode()
def name_film(args):
    """Print the stretches of a film; returns what --json prints, and whether it was stopped."""
    check(args)
    model = train.build_model(args).eval()
    texts = train.encode_classes(args.class_names, args, model)
    complaints, kept, stopped = [], [], False
    film = Windows(prepare.video_frames(args.film, complaints), args.every, args.window,
                   model.config.num_frames)
    stretches = Stretches(film, args.class_names, args.none)
    try:
        for start, images, probabilities in answers(film, texts, model, args):
            frame = None
            if args.picture:
                frame = images[len(images) // 2].copy()
                frame.thumbnail((160, 160))
            stretches.add(start, probabilities, frame)
            if args.json or args.picture:
                kept.append((start, probabilities.numpy()))
    except KeyboardInterrupt:  # which is how most cameras end
        stopped = True
    except ValueError as error:
        raise ValueError(f"{args.film}: {error}") from None
    if not stretches.now and not stopped:
        said = complaints[0] if complaints else "no frames"
        name = "what is piped, in a format that needs no seeking" if args.film == "-" else args.film
        raise ValueError(f"{name}: is no readable video ({said})")
    stretches.close(film.seconds)
    stretches.show_unnamed()
    if complaints:
        data.warn(f"damaged {args.film}: {complaints[-1]}")
    if args.picture and kept:
        plot_film(args.picture, film, args.class_names, kept, stretches.found)
    return report(args, model, film, kept, stretches.found), stopped


def report(args, model, film, kept, stretches):
    """What --json prints."""
    windows = []
    for start, probabilities in kept:
        best = []
        for k in (-probabilities).argsort(kind="stable")[:5]:
            p = round(float(probabilities[k]), 6)
            best.append({"class": args.class_names[k], "probability": p})
        windows.append({"start": round(start, 3), "end": round(start + args.window, 3),
                        "classes": best})
    found = []
    for stretch in stretches:
        p = stretch["probability"]
        found.append({"start": round(stretch["start"], 3), "end": round(stretch["end"], 3),
                      "class": stretch["class"], "probability": p and round(p, 6)})
    return {"film": args.film, "clip": model.weights_path, "checkpoint": args.checkpoint,
            "num_frames": model.config.num_frames, "seconds": round(film.seconds, 3),
            "every": args.every, "window": args.window, "stretches": found, "windows": windows}


def main(argv=None):
    args = train.parser().parse_args([])  # what the flags of this program leave open
    args.eval_only = True
    args = parser().parse_args(argv, args)
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        content, stopped = name_film(args)
    if args.json:  # and nothing but JSON on stdout
        print(json.dumps(content, indent=1))
    if stopped:
        sys.exit(130)


if __name__ == "__main__":
    data.command(main)
