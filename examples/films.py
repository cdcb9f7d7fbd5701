"""Name what happens along a film, with CLIP or with what was trained.

    python examples/films.py film.mp4 --checkpoint runs/ucf101_frames/last.pt
    python examples/films.py film.mp4 --clip ViT-B/16 --class-names "riding a bike" archery \\
        --every 0.5 --window 3 --none 0.3 --picture film.png
    ffmpeg -i rtsp://camera -c copy -f matroska - | python examples/films.py - --checkpoint last.pt

Windows of --window seconds begin every --every seconds, each is shown to the model as a clip, and a
line tells of each stretch of equal answers: from when to when, the class, and its mean probability.
A film is decoded once, in memory that does not grow with it; a stretch is told as soon as it is
over, and with --none P left unnamed if no answer reaches the probability P. --json has all windows;
--picture draws them, with a frame of each stretch.
"""

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

    def shown(self):
        """Yield each image, and until when the film shows it."""
        image = None
        offset = step = 0.0  # step: how long the image before was shown
        for frame in self.frames:
            time = frame.info["seconds"]
            if np.isnan(time):
                raise ValueError("the film's frames have no times")
            if image is None:
                offset = time
            elif time - offset < self.seconds:  # times begin anew, as in files that were joined
                offset = time - (self.seconds + step)
            step, self.seconds = time - offset - self.seconds, time - offset
            if image:
                yield image, self.seconds
            image = frame
        if image:  # the last one, as long as the one before it
            self.seconds += step
            yield image, self.seconds + min(step / 2, 0.05)  # for times that were rounded

    def __iter__(self):
        begun = deque()  # windows that are not over: (start, images)
        number = 0  # of windows that have begun
        for image, end in self.shown():
            while True:
                for start, images in begun:
                    passed = np.count_nonzero(start + self.moments < end)
                    images += [image] * (passed - len(images))
                while begun and begun[0][0] + self.window <= end:
                    yield begun.popleft()
                if number and number * self.every >= self.seconds:
                    break
                begun.append((number * self.every, []))  # one after another: times may jump
                number += 1
        if begun and begun[0][0] == 0:
            start, images = begun[0]
            yield start, images + [image] * (len(self.moments) - len(images))


# ---- from windows to stretches ----

class Stretches:
    """Joins windows of equal answers, and tells of each stretch as soon as it is over: in `found`,
    with a frame in `frames`, and on the console.

    A stretch reaches back half of --every from the middle of its first window, to where the one
    before it ends.
    """

    def __init__(self, film, classes, none):
        self.film, self.classes, self.none = film, classes, none
        self.found, self.frames = [], []
        self.now = None  # the class of the stretch that goes on
        self.unnamed = None  # (end, frame) of what has no name, and goes on if this has none either

    def add(self, start, probabilities, frame):
        p, best = probabilities.max().item(), self.classes[probabilities.argmax()]
        if best != self.now:
            self.close(start + (self.film.window - self.film.every) / 2)
            self.now = best
            self.sum, self.windows, self.top = 0.0, 0, -1.0
        self.sum += p
        self.windows += 1
        if p > self.top:
            self.top, self.frame = p, frame  # the clearest
        if p >= self.none:
            self.tell_unnamed()

    def close(self, end):
        """End the stretch that goes on."""
        if self.now and self.top >= self.none:
            self.tell(end, self.frame, self.now, self.sum / self.windows)
        elif self.now:
            self.unnamed = end, self.frame

    def tell_unnamed(self):
        if self.unnamed:
            self.tell(*self.unnamed)
        self.unnamed = None

    def tell(self, end, frame, name=None, p=None):
        start = self.found[-1]["end"] if self.found else 0.0
        self.found.append({"start": start, "end": round(end, 3), "class": name,
                           "probability": p and round(p, 6)})
        self.frames.append(frame)
        tenths = self.film.every < 1
        answer = f"{name}  {100 * p:.0f} %" if name else NONE
        print(f"{clock(start, tenths)}-{clock(end, tenths)}  {answer}", flush=True)


def clock(seconds, tenths=False):
    """12 -> 00:12 or 00:12.0, 3723 -> 1:02:03"""
    seconds = round(seconds + 1e-6, 1 if tenths else 0)  # halves go up
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    seconds = f"{seconds:04.1f}" if tenths else f"{seconds:02.0f}"
    return f"{hours}:{minutes:02}:{seconds}" if hours else f"{minutes:02}:{seconds}"


# ---- the picture ----

def plot_film(path, film, classes, answers, stretches):
    """Probabilities of the classes over time, and below them a frame of each stretch, of many those
    of the longest. answers: (windows, classes)"""
    lengths = [stretch["end"] - stretch["start"] for stretch in stretches.found]
    longest = np.argsort(lengths, kind="stable")[::-1][:MOST_FRAMES]
    cells = sorted(longest) + ["."] * (-len(longest) % COLUMNS)  # a dot is no picture
    rows = [cells[i:i + COLUMNS] for i in range(0, len(cells), COLUMNS)]
    # the classes that are the answer anywhere, in the order of their first time
    order = list(dict.fromkeys(answers.argmax(1)))[:MOST_CLASSES]
    height = 0.8 + 0.25 * len(order)
    fig, axes = plots.figure(10, height + 1.5 * len(rows), [["time"] * COLUMNS, *rows],
                             height_ratios=[height] + [1.5] * len(rows))
    axis = axes.pop("time")
    middle = (film.window - film.every) / 2
    box = (middle, middle + len(answers) * film.every, len(order) - 0.5, -0.5)
    image = axis.imshow(100 * answers[:, order].T, cmap="cividis", vmin=0, vmax=100,
                        aspect="auto", interpolation="nearest", extent=box)
    axis.set_yticks(range(len(order)), [plots.printable(classes[k])[:40] for k in order])
    axis.set(xlim=(0, film.seconds or 1))
    axis.xaxis.set_major_formatter(lambda seconds, _: clock(seconds))
    axis.xaxis.get_major_locator().set_params(integer=True)
    fig.colorbar(image, ax=axis, label="probability (%)")
    for i, axis in axes.items():
        stretch = stretches.found[i]
        name = textwrap.fill(plots.printable(stretch["class"] or NONE), 14, max_lines=3)
        axis.imshow(stretches.frames[i])
        axis.set_title(f"{clock(stretch['start'])}\n{name}", fontsize=7)
        axis.axis("off")
    plots.save_figure(fig, path)


# ---- a film ----

@torch.inference_mode()
def name_film(args):
    """Print the stretches of a film; returns what --json prints."""
    if args.film != "-" and not os.path.isfile(args.film):  # before a model is loaded
        raise ValueError(f"{args.film}: no such film")
    if args.none > 1:
        raise ValueError(f"--none {args.none} is no probability, which is 1 at most")
    plots.check_target(args.picture)
    classes = predict.classes_of(args)
    model = train.build_model(args).eval()
    size = model.config.image_size
    texts = train.encode_classes(classes, args, model)
    complaints, windows, answers = [], [], []
    frames = prepare.video_frames(args.film, complaints)
    film = Windows(frames, args.every, args.window, model.config.num_frames)
    stretches = Stretches(film, classes, args.none)
    stopped = False
    try:
        for start, images in film:
            clip = torch.stack([data.to_square(image, size) for image in images])
            features = train.encode_clips(clip[None], args, model)  # (1, E)
            probabilities = class_probabilities(features, texts)[0].cpu()  # (classes,)
            frame = images[len(images) // 2].reduce(2) if args.picture else None
            stretches.add(start, probabilities, frame)
            if args.json or args.picture:
                answers.append(probabilities.numpy())
                windows.append({"start": round(start, 3), "end": round(start + args.window, 3),
                                "classes": predict.best(classes, probabilities)})
    except KeyboardInterrupt:  # which is how most cameras end
        stopped = True
    stretches.close(film.seconds)
    stretches.tell_unnamed()
    if complaints:
        data.warn(f"damaged {args.film}: {complaints[-1]}")
    if args.picture and answers:
        plot_film(args.picture, film, classes, np.stack(answers), stretches)
    return {"film": args.film, "clip": model.weights_path, "checkpoint": args.checkpoint,
            "num_frames": model.config.num_frames, "seconds": round(film.seconds, 3),
            "every": args.every, "window": args.window, "stopped": stopped,
            "stretches": stretches.found, "windows": windows}


def main(argv=None):
    p = data.Parser(allow_abbrev=False, description="Name what happens along a film.")
    flag, seconds = p.add_argument, data.at_least(0.01, float)
    flag("film", metavar="FILM", help="a video, or - for one that is piped")
    flag("--every", type=seconds, default=1.0, help="seconds from window to window (%(default)s)")
    flag("--window", type=seconds, default=2.0, help="seconds of a window (%(default)s)")
    flag("--none", type=data.at_least(0, float), default=0.0, metavar="P",
         help="leave stretches unnamed in which no answer has this probability (name all)")
    flag("--json", action="store_true", help="windows and stretches as JSON; all else on stderr")
    flag("--picture", metavar="FILE", help="a PNG of the classes over time")
    predict.add_flags(p)
    if predict.report(name_film, p.parse_args(argv))["stopped"]:
        sys.exit(130)


if __name__ == "__main__":
    data.command(main)
