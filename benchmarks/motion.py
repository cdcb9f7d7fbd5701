"""What the motion loss does in the demo's world, by its weight, over seeds.

    python benchmarks/motion.py --seed 0 1 2 3 4 5 6 7 8 9          # hours on two CPU cores
    python benchmarks/motion.py --seed 0 1 2 --world light --out runs/light

The world `demo` is that of examples/demo.py. In `light` every frame has a background and a light of
its own, and classes are the eight actions: only motion tells them apart. Its clips for testing show
the three colours of the training clips ("base"), or the three others ("novel").

Printed are accuracies for each weight and what they differ from those of the first weight, with 95
% confidence intervals of the mean over seeds, the wrong answers that are the twin of the right one,
and C and V of the features of test clips: the change and the variance of the motion loss 1 / (1 + C
+ V). All is in results.json, also C and V of each epoch and of each pair of twins.
"""

import json
import shlex
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import numpy as np
import torch

import data
import demo
import plots
import protocols
import train
from ezclip import motion_loss

T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # Student's
PAIR = {word: " / ".join(words) for words in demo.TWINS for word in words}


# ---- the world of light ----

def render_light(root, seed):
    """Eight actions below `root`: 96 training clips of three colours, 60 test clips of all six."""
    part = Path(f"{root}.part")
    for pair, words in enumerate(demo.TWINS):
        for twin, word in enumerate(words):
            t = np.linspace(1, -1, 12) * (-1) ** twin
            for i, colour in enumerate(demo.COLOURS):
                for k in range(42 if i < 3 else 10):  # of which ten are for testing
                    rng = np.random.default_rng((seed, i, pair, twin, k))
                    frames = demo.render_clip(colour, pair, t, rng)
                    # a field of light with 3 x 3 knots, drawn anew for every frame
                    light = torch.from_numpy(rng.normal(0, 20, (12, 3, 3, 3)))
                    light = torch.nn.functional.interpolate(light, 36, mode="bicubic")
                    frames = frames + light.permute(0, 2, 3, 1).numpy()
                    name = f"v_{colour.title()}{word.title()}_{demo.take(k, 10)}"
                    folder = part / demo.class_name("", word).replace("  ", " ") / name
                    demo.save_clip(folder, np.clip(frames, 0, 255).astype(np.uint8))
    part.rename(root)


def of_colours(test, colours):
    """The test clips whose shape has one of these colours."""
    names = tuple(f"v_{colour.title()}" for colour in colours)
    return test._replace(clips=[c for c in test.clips if c[0].split("/")[1].startswith(names)])


# ---- runs ----

def record(model):
    """Let the model note of what it pools: C, V, the norms of frame features and of their mean, the
    motion loss."""
    pool, noted = model.pool, []

    def noting(frames):
        f = frames.detach().float()  # (B, T, E)
        variance = f.var(1).mean().item()
        change = 1 / motion_loss(f).item() - 1 - variance
        noted.append([change, variance, f.norm(dim=-1).mean().item(),
                      f.mean(1).norm(dim=-1).mean().item(), motion_loss(f).item()])
        return pool(frames)

    model.pool = noting
    return noted


def averages(noted):
    names = ("C", "V", "norm", "norm of mean", "loss")
    return dict(zip(names, np.mean(noted, 0).round(5).tolist()))


def one_run(args, split, tests):
    """Train, then test pair by pair, and clips that stand still -> {"epochs": [...], test set: {pair:
    results}, "still": {test set: results}}."""
    Path(args.out, "last.pt").unlink(missing_ok=True)  # of a run that was stopped: noted is its part
    model = train.build_model(args)
    noted = record(model)
    train.train(model, split, args)
    per_epoch = len(split.clips) // args.batch_size
    content = {"epochs": [averages(noted[i:i + per_epoch]) for i in range(0, len(noted), per_epoch)]}
    for name, test in tests.items():
        content[name] = {}
        for pair in dict.fromkeys(PAIR.values()):
            clips = [c for c in test.clips if PAIR[test.classes[c[1]].split()[-1]] == pair]
            noted.clear()
            result = train.evaluate(model, test._replace(clips=clips), args)
            twins = 0
            for row in result.pop("predictions"):
                *before, word = row["class"].split()
                *answered, answer = row["class1"].split()
                twins += before == answered and word != answer and PAIR[word] == PAIR[answer]
            twins = round(100 * twins / len(clips), 2)
            content[name][pair] = {"top1": result["top1"], "twins": twins, **averages(noted)}
    content["still"] = {}
    stand_still(model)
    for name, test in tests.items():
        noted.clear()
        train.evaluate(model, test, args)
        content["still"][name] = averages(noted)
    return content


def stand_still(model):
    """Let the model see the second frame of each clip in place of all."""
    encode_frames = model.encode_frames
    model.encode_frames = lambda video: encode_frames(video[:, 1:2].expand_as(video))


def jobs(args, out, seed, command):
    """-> the flags of the ablation's last row, the Split to train on, and those to test."""
    *_, (_, flags, split, tests), _ = demo.prepare(args, out, seed, command)
    if args.world == "light":
        if not (out / "light").exists():
            render_light(out / "light", seed)
        split, test = data.index_frames(out / "light")
        colours = [*demo.COLOURS]
        tests = {"base": of_colours(test, colours[:3]), "novel": of_colours(test, colours[3:])}
    return flags, split, tests


# ---- what is printed and drawn ----

def interval(values):
    """Half of the 95 % confidence interval of the mean of up to ten values."""
    if len(values) < 2:
        return 0.0
    return T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5


def summary(runs, first):
    """[{content of a seed's run}] -> {test set: {quantity: (mean, half of its interval)}}; `gain` is
    of the accuracy, seed by seed, over the runs of the first weight."""
    rows = {}
    for name in ("base", "novel"):
        rows[name] = {}
        for key in ("top1", "twins", "C", "V", "norm", "norm of mean", "loss", "gain"):
            values = []
            for run, other in zip(runs, first):
                quantity = "top1" if key == "gain" else key
                value = np.mean([pair[quantity] for pair in run[name].values()])
                if key == "gain":
                    value -= np.mean([pair["top1"] for pair in other[name].values()])
                values.append(value)
            rows[name][key] = float(np.mean(values)), float(interval(values))
        still = [run["still"][name]["loss"] for run in runs]
        rows[name]["loss, still"] = float(np.mean(still)), float(interval(still))
    return rows


def print_summary(rows):
    print("\n| weight | base | novel | gain, base | gain, novel | twins, novel | C | V | norm | of mean "
          "| loss | of still clips |")
    print("|---" * 12 + "|")
    for weight, row in rows.items():
        base, novel = row["base"], row["novel"]
        cells = [f"{mean:.1f} ± {half:.1f}" for mean, half in (
            base["top1"], novel["top1"], base["gain"], novel["gain"], novel["twins"])]
        cells += [f"{base[key][0]:.2f}" for key in ("C", "V", "norm", "norm of mean", "loss",
                                                    "loss, still")]
        print(f"| {weight:g} |", " | ".join(cells), "|")


def plot(path, rows):
    fig, axes = plots.figure(8, 3, [["accuracy", "change"]])
    places = range(len(rows))
    for name in ("base", "novel"):
        mean, half = zip(*(row[name]["top1"] for row in rows.values()))
        axes["accuracy"].errorbar(places, mean, half, marker="o", capsize=3, label=name)
    for key in ("C", "V"):
        mean, half = zip(*(row["base"][key] for row in rows.values()))
        axes["change"].errorbar(places, mean, half, marker="o", capsize=3, label=f"{key}, base")
    axes["accuracy"].set(ylabel="top-1 accuracy (%)", ylim=(0, 102))
    axes["change"].set(ylim=(0, None))
    for axis in axes.values():
        axis.set_xticks(places, [f"{weight:g}" for weight in rows])
        axis.set(xlabel="weight of the motion loss")
        axis.legend()
    plots.save_figure(fig, path)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    p = data.Parser(description="The motion loss by its weight.", allow_abbrev=False)
    p.add_argument("--out", default="runs/motion", help="folder of all runs (%(default)s)")
    p.add_argument("--seed", type=data.at_least(0), nargs="+", default=[0], help="at most ten (0)")
    p.add_argument("--weights", type=data.at_least(0, float), nargs="+",
                   default=[0, 0.03, 0.1, 0.3, 1], help="(0 0.03 0.1 0.3 1)")
    p.add_argument("--world", choices=("demo", "light"), default="demo", help="(%(default)s)")
    p.add_argument("--epochs", type=data.at_least(1), help="of each run (33)")
    p.add_argument("--workers", type=data.at_least(0), default=2, help="(%(default)s)")
    p.add_argument("--device", type=train.usable_device, default="cpu", help="(%(default)s)")
    args = p.parse_args(argv)
    if len(set(args.seed)) < len(args.seed) or len(args.seed) > 10:
        raise ValueError("--seed takes at most ten, each once")
    args.resume = True  # what is there is not done again
    out, command = Path(args.out), shlex.join(["python", "benchmarks/motion.py", *argv])
    runs = {weight: [] for weight in args.weights}
    for seed in args.seed:
        flags, split, tests = jobs(args, out / f"seed{seed}", seed, command)
        flags.epochs = args.epochs or flags.epochs
        for weight in args.weights:
            run = protocols.changed(flags, f"weight{weight:g}", motion_weight=weight)
            done = Path(run.out, "motion.json")
            if not done.exists():
                content = one_run(run, split, tests)
                train.write(done, lambda file: file.write(json.dumps(content).encode()))
            runs[weight].append(json.loads(done.read_text()))
    first = runs[args.weights[0]]
    rows = {weight: summary(content, first) for weight, content in runs.items()}
    print_summary(rows)
    plot(out / "motion.png", rows)
    args.seed = args.seed[0]
    train.write_results(args, command, results={f"{w:g}": row for w, row in rows.items()}, runs=runs)


if __name__ == "__main__":
    data.command(main)
