"""The method in small: a rendered world, a tiny CLIP, and the paper's ablation on both.

    python examples/demo.py                       # no data, no weights, five minutes
    python examples/demo.py --seed 21 22 23       # mean and deviation of three worlds
    python examples/demo.py --render world        # only the frames, laid out for train.py

Coloured shapes move, grow or fade, and each action has a twin that is the same played backwards. A
tiny CLIP learns from stills how actions end; then it is adapted to the actions. A mean over frames
cannot tell twins apart: without temporal prompts one half is the most to expect.
"""

import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import train
from ezclip import EZCLIP, Config
import protocols
from plots import figure, save_figure
from prepare import write_frames

COLOURS = {"red": (225, 45, 45), "green": (40, 190, 60), "blue": (55, 80, 235),
           "yellow": (235, 215, 40), "purple": (165, 50, 200), "white": (245, 245, 245)}
# Pairs of actions, by the words for how they end; one is the other backwards.
TWINS = (("left", "right"), ("top", "bottom"), ("large", "small"), ("clear", "faint"))

# The recipe, as flags of train.py. It suits this world, not CLIP.
PRETRAINING = dict(tune="all", num_frames=1, prompts="none", no_adapters=True, motion_weight=0.0,
                   epochs=5, batch_size=128, lr=1e-3, weight_decay=0.02)
LEAST = 90  # per cent of the stills, else there is nothing to adapt
ADAPTATION = dict(num_frames=4, epochs=33, batch_size=32, lr=8e-3, prompt_lr=0.3)


# ---- the world ----

def class_name(colour, word, still=False):
    """The class name of an action, or of the stills that show how the action ends."""
    if word in TWINS[0] + TWINS[1]:
        how = "at the" if still else "moving to the"
    else:
        how = "that is" if still else "getting"
    return f"a {colour} shape {how} {word}"


def outline(shape, dx, dy, r):
    """Signed distances to the outline of a shape of radius r, negative inside; dx is positive."""
    distance = np.hypot(dx, dy)
    if shape == 0:  # a circle
        return distance - r
    if shape == 1:  # a square
        return np.maximum(dx, abs(dy)) - 0.9 * r
    if shape == 2:  # a triangle
        return np.maximum(dy, 0.87 * dx - dy / 2) - 0.65 * r
    if shape == 3:  # a cross
        wide = np.maximum(dx, 3 * abs(dy))
        tall = np.maximum(3 * dx, abs(dy))
        return np.minimum(wide, tall) - r
    return abs(distance - 0.7 * r) - 0.3 * r  # a ring


def render_clip(colour, pair, t, rng, shape=None):
    """Frames (len(t), 36, 36, 3) of a shape on grey that moves, grows or fades as t says.

    t runs from 1 to -1 for the first of twins and back for the second: nothing but the order of the
    frames tells them apart. The world is 32 x 32; the rim is what evaluation crops away.
    """
    t = t.reshape(-1, 1, 1)  # what changes is (T, 1, 1), beside rows and columns of pixels
    # All is drawn for every clip and always in this order: a seed's world stays what it is.
    drawn = rng.integers(5)
    grey = rng.uniform(10, 110)
    x, y = 17.5 + rng.uniform(-2, 2, 2)
    radius = rng.uniform(4.5, 6.5)
    opacity = rng.uniform(0.55, 0.7)
    travel = rng.uniform(15, 21) / 2
    growth = rng.uniform(0.6, 0.8) / 2
    if pair == 0:
        x = x + travel * t
    elif pair == 1:
        y = y + travel * t
    elif pair == 2:
        radius = radius * np.exp(-growth * t)
    else:
        opacity = np.minimum(1, opacity * (1 - 0.6 * t))

    pixels = np.arange(36)
    edge = outline(drawn if shape is None else shape, abs(pixels - x), pixels[:, None] - y, radius)
    mask = opacity * np.clip(0.5 - edge, 0, 1)  # (T, 36, 36)
    frames = grey + mask[..., None] * (np.array(COLOURS[colour]) - grey)
    noise = rng.normal(0, 6, frames.shape)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


def render(root, seed=0, stills=False):
    """Render the world's 48 actions, or stills under 48 captions, below a new folder `root`.

    In two of the four pairs a colour has no training clips: 24 base classes, 24 novel ones. Names
    are like UCF101's, so that groups 1-7 are the test split: 20 clips per class (stills: 8).
    """
    root, part = Path(root), Path(f"{root}.part")
    if root.exists():
        raise ValueError(f"{root}: exists already")
    shutil.rmtree(part, ignore_errors=True)  # of a rendering that was stopped
    for i, colour in enumerate(tqdm(COLOURS, f"rendering {root.name}")):
        for pair, words in enumerate(TWINS):
            novel = pair in (i % 4, (i + 1) % 4)
            for twin, word in enumerate(words):
                t = np.linspace(1, -1, 12) * (-1) ** twin
                test, train_clips = 20, 0 if novel else 32
                if stills:
                    t, test, train_clips = t[-1:], 8, 208
                folder = part / class_name(colour, word, stills)
                for k in range(test + train_clips):
                    clip = f"v_{colour.title()}{word.title()}_{take(k, test)}"
                    rng = np.random.default_rng((seed, stills, i, pair, twin, k))
                    save_clip(folder / clip, render_clip(colour, pair, t, rng))
    part.rename(root)


def take(k, test):
    """The end of the k-th clip's name: the first `test` are in groups 1-7, the others in 8-25."""
    if k < test:
        number, group = divmod(k, 7)
    else:
        number, group = divmod(k - test, 18)
        group += 7
    return f"g{group + 1:02d}_c{number + 1:02d}"


def save_clip(folder, frames):
    folder.mkdir(parents=True)
    write_frames(map(Image.fromarray, frames), folder)


# ---- the lesson ----

def tiny_clip(seed):
    """A random CLIP for the world: 32 x 32 pixels, patches of 8."""
    torch.manual_seed(seed)
    model = EZCLIP(Config(embed_dim=64, image_size=32, patch_size=8, vision_width=64,
                          vision_layers=3, text_width=64, text_layers=2, prompts="none",
                          adapters=False))
    torch.nn.init.normal_(model.visual.positional_embedding, std=0.7)  # else places are not learnt
    return model


def settings(args, out, seed, clip, recipe):
    """train.py's flags for a part of the demo."""
    flags = train.parser().parse_args([])
    vars(flags).update(recipe, out=str(out), seed=seed, clip=str(clip), templates=["{}"],
                       activation="quick_gelu", no_augment=True, device=args.device,
                       workers=args.workers, resume=args.resume)
    return flags


def prepare(args, out, seed, command):
    """The world of a seed and a CLIP for it -> the jobs of the ablation."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "random.pt").exists():
        weights = tiny_clip(seed).state_dict()
        train.write(out / "random.pt", lambda file: torch.save(weights, file))
    for name in ("stills", "frames"):
        if not (out / name).exists():
            render(out / name, seed, stills=name == "stills")

    stills, test = data.index_frames(out / "stills")
    flags = settings(args, out / "clip", seed, out / "random.pt", PRETRAINING)
    results = train.run(flags, stills, {"stills": test}, command)["results"]
    top1 = results["stills"]["top1"]
    if top1 < LEAST:
        raise ValueError(f"the tiny CLIP names only {top1} % of the stills: stopped")

    split, tests = protocols.base_to_novel(*data.index_frames(out / "frames"))
    flags = settings(args, out / "ablation", seed, out / "clip/last.pt", ADAPTATION)
    return protocols.jobs_of(protocols.ROWS, flags, split, tests)


def plot(path, frames, rows):
    """A strip of frames for each of eight actions, and below them the ablation as bars."""
    fig, axes = figure(8, 7.5, [*TWINS, ("bars", "bars")], height_ratios=[1, 1, 1, 1, 4])
    fig.suptitle("Each action has a twin, the same played backwards: only the order of frames "
                 "tells", fontsize=11)
    colours = np.repeat([*COLOURS], 2)  # twins have one colour
    for colour, word in zip(colours, np.ravel(TWINS)):
        name = class_name(colour, word)
        clip = min((frames / name).iterdir())
        strip = np.stack([data.read_frame(clip / frame) for frame in data.frame_names(clip)[::2]])
        strip = np.pad(strip, [(0, 0), (0, 0), (0, 1), (0, 0)], constant_values=255)  # white lines
        axes[word].imshow(np.hstack(strip), aspect="auto")
        axes[word].set_title(name, fontsize=9, pad=3)
        axes[word].axis("off")

    bars = axes["bars"]
    behind = dict(fc="white", ec="none", pad=0)  # else the dotted line crosses numbers
    for i, name in enumerate(("base", "novel", "harmonic_mean")):
        values = [results[name]["top1"] for results in rows.values()]
        places = np.arange(len(rows)) + (i - 1) * 0.28
        drawn = bars.bar(places, values, 0.26, label=name.replace("_", " "))
        bars.bar_label(drawn, fmt="%.0f", fontsize=8, padding=2, bbox=behind)
    bars.axhline(50, color="0.5", linestyle=":", zorder=0, label="most to expect without order")
    bars.set_xticks(range(len(rows)), [row.replace(", ", ",\n") for row in rows])
    bars.set(ylabel="top-1 accuracy (%)", ylim=(0, 105),
             xlabel="Part by part: temporal prompts let a frame see the others, and know its place")
    bars.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    save_figure(fig, path)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    p = data.Parser(description="EZ-CLIP on a rendered world.", allow_abbrev=False)
    p.set_defaults(**vars(train.parser().parse_args([])))
    p.add_argument("--out", default="runs/demo", help="folder of the demo (%(default)s)")
    p.add_argument("--seed", type=data.at_least(0), nargs="+", default=[0], help="worlds (0)")
    p.add_argument("--resume", action="store_true", help="go on with the demo in --out")
    p.add_argument("--render", metavar="DIR", help="only render the world's frames into DIR")
    p.add_argument("--workers", type=data.at_least(0), help="loading processes (%(default)s)")
    p.add_argument("--device", type=train.usable_device, help="(%(default)s)")
    args = p.parse_args(argv)
    if len(set(args.seed)) < len(args.seed) or args.render and len(args.seed) > 1:
        raise ValueError("--seed has one twice, or several with --render")
    if args.render:
        return render(args.render, args.seed[0])
    out = Path(args.out)
    folders = [out] if len(args.seed) == 1 else [out / f"seed{seed}" for seed in args.seed]
    if not args.resume and [*out.glob("random.pt"), *out.glob("seed*/random.pt")]:
        raise ValueError(f"{out}: holds a demo; --resume goes on, another --out starts anew")
    command = shlex.join(["python", "examples/demo.py", *argv])
    jobs = []
    for folder, seed in zip(folders, args.seed):
        jobs += prepare(args, folder, seed, command)
    rows = protocols.run(jobs, command)
    protocols.print_table(rows)
    plot(out / "demo.png", folders[0] / "frames", rows)
    demo = []
    for row, results in rows.items():
        entry = {"row": row, "n": results["harmonic_mean"]["n"]}
        for name, result in results.items():
            entry[name] = result["top1"]
            if "top1_std" in result:
                entry[f"{name}_std"] = result["top1_std"]
        demo.append(entry)
    print(f"{out}/demo.png, {out}/results.json")
    return train.write_results(args, command, results={"demo": demo})


if __name__ == "__main__":
    data.command(main)
