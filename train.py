"""Train and evaluate EZ-CLIP on folders of frames.

    python train.py --data ucf101_frames                       # train, then evaluate
    python train.py --resume --out runs/ucf101_frames          # continue a stopped run
    python train.py --data hmdb51_frames --checkpoint runs/ucf101_frames/last.pt --eval-only
    python train.py --data ucf101_frames --eval-only           # plain CLIP, nothing learnt
    python train.py --demo                                     # no data, no weights, five minutes

A run's folder receives last.pt, log.csv, curves.png and results.json.
"""

import argparse
import csv
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from tqdm import tqdm

import data
from clip_tokenizer import tokenize
from data import Parser, at_least
from ezclip import EZCLIP, Config, class_probabilities, contrastive_loss, motion_loss, read_weights


def usable_device(name):
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{name}: {str(error).splitlines()[0]}") from None
    return name


def template(text):
    if "{}" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} has no {{}} for the class name")
    return text


def parser():
    p = Parser(allow_abbrev=False, description="Train and evaluate EZ-CLIP on "
               "folders of frames. In parentheses: what holds without a flag.")
    flag = p.add_argument
    # data
    flag("--data", help="folder of frames: <class>/<clip>/img_00001.jpg")
    flag("--train-list", help="training clips, a line each: <clip> [<number of frames>] <label>")
    flag("--test-list", help="test clips, likewise")
    flag("--labels", help="CSV id,name (the sorted class folders)")
    flag("--templates", type=template, nargs="+", metavar="TEXT", default=list(data.TEMPLATES),
         help="texts with {} for the class name (the 16 of the official code)")
    flag("--base-to-novel", action="store_true",
         help="train on the half of the classes with more training clips, test on either half")
    flag("--no-flip", action="store_true", help="never mirror clips (nor where a class has sides)")
    flag("--no-augment", action="store_true", help="no random crops, mirroring and colours")
    # model
    flag("--clip", help="ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px or a file (ViT-B/16)")
    flag("--activation", choices=("quick_gelu", "gelu"), default="quick_gelu",
         help="gelu for CLIPs that open_clip trained; no weight tells (%(default)s)")
    flag("--num-frames", type=at_least(1), help="frames per clip (8, or the checkpoint's)")
    flag("--prompts", choices=("deep", "shallow", "none"), help="temporal prompts: where (deep)")
    flag("--no-adapters", action="store_true", help="leave out the adapters")
    flag("--temporal-adapter", action="store_true", help="add attention over time at every token")
    flag("--tune", choices=("new", "all"), default="new",
         help="train what is new, or CLIP too (%(default)s)")
    # optimisation
    flag("--epochs", type=at_least(1), default=50, help="passes over all clips (%(default)s)")
    flag("--batch-size", type=at_least(1), default=70, help="clips per step (%(default)s)")
    flag("--lr", type=at_least(0, float), default=5e-5, help="highest learning rate (%(default)s)")
    flag("--prompt-lr", type=at_least(0, float), help="highest of the prompts (--lr)")
    flag("--weight-decay", type=at_least(0, float), default=0.2, help="of AdamW (%(default)s)")
    flag("--warmup-epochs", type=at_least(0, float), default=5,
         help="linear from 0, at most a tenth of all steps (%(default)s)")
    flag("--motion-weight", type=at_least(0, float), default=1.0,
         help="of the motion loss (%(default)s)")
    flag("--seed", type=at_least(0), default=0, help="of all that is random (%(default)s)")
    # the run
    flag("--out", help="folder of the run (runs/<data>, with a counter when taken)")
    flag("--resume", action="store_true", help="continue the run in --out")
    flag("--checkpoint", help="weights to start from: a last.pt or one of the official code")
    flag("--eval-only", action="store_true", help="do not train")
    flag("--eval-every", type=at_least(1), help="epochs between evaluations (only at the end)")
    flag("--shuffle-frames", action="store_true", help="a control: test clips in random order")
    flag("--workers", type=at_least(0), default=min(8, os.cpu_count()),
         help="processes that load clips (%(default)s)")
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    flag("--device", type=usable_device, default="cuda" if cuda else "mps" if mps else "cpu",
         help="cuda, cuda:1, mps or cpu (%(default)s)")
    flag("--demo", action="store_true", help="the method on a rendered world; needs no --data")
    return p


SAVE_SECONDS = 600  # between checkpoints within an epoch

# Flags of the machine, which a checkpoint does not bring along; and those that may differ when a
# run is resumed: its result does not depend on them, or what they name is compared by content.
HERE = ("out", "resume", "workers", "device")
FREE = ("eval_every", "data", "train_list", "test_list", "labels", "clip", "checkpoint")
# Flags that describe the model: a checkpoint of ours brings them along.
MODEL = ("clip", "activation", "num_frames", "prompts", "no_adapters", "temporal_adapter", "tune")
CHECKPOINT = dict(args=dict, state_dict=dict, optimizer=dict, step=int, seconds=float, rows=list,
                  sums=list, classes=list, clips_sha256=str, backbone_sha256=str)


def parse(argv):
    """-> (flags, checkpoint, its path): the last.pt that is resumed or started from, or None. Its
    flags are the defaults: all of them when it is resumed, else those that describe the model. A
    --checkpoint of another kind is the official code's: CLIP and what was learnt, in one file."""
    p = parser()
    args = p.parse_args(argv)
    if not (args.data or args.resume and args.out):
        raise ValueError("--data is needed, a folder of frames (or --demo)")
    out = run_folder(args)
    resumed = args.resume and (out / "last.pt").exists()
    path = out / "last.pt" if resumed else args.checkpoint
    saved = read_weights(path) if path else {}
    if isinstance(saved, dict) and "backbone_sha256" in saved:
        if any(not isinstance(saved.get(key), kind) for key, kind in CHECKPOINT.items()):
            raise ValueError(f"{path}: is a damaged checkpoint")
        old = {k: v for k, v in saved["args"].items() if k not in HERE
               and k in (vars(args) if resumed else MODEL)}
        p.set_defaults(**old)
        args = p.parse_args(argv)
        changed = [k for k in old if resumed and k not in FREE and getattr(args, k) != old[k]]
        if changed:
            raise ValueError(f"{path}: the run was started with other flags: " + ", ".join(
                f"--{k.replace('_', '-')} {old[k]}" for k in changed))
    elif resumed:
        raise ValueError(f"{path}: is no checkpoint of a run")
    elif args.checkpoint and args.clip:
        raise ValueError(f"{args.checkpoint}: brings its own CLIP, leave --clip out")
    else:
        saved, args.clip = None, args.checkpoint or args.clip or "ViT-B/16"
    if not args.data:
        raise ValueError(f"{out}: no run to resume there, and no --data to start one")
    args.out, args.resume = str(out), resumed
    return args, saved, path


def run_folder(args):
    """--out, or runs/<data> with a counter: the last with a last.pt for --resume, else the next."""
    first = Path(args.out or Path("runs", Path(args.data or "demo").resolve().name))
    folders = [first]
    while folders[-1].exists() and not args.out:
        folders.append(first.with_name(f"{first.name}-{len(folders) + 1}"))
    if args.resume:
        return next((out for out in reversed(folders) if (out / "last.pt").exists()), folders[-1])
    if any((folders[-1] / name).exists() for name in ("last.pt", "log.csv", "results.json")):
        raise ValueError(f"{first}: holds a run; --resume continues it, another --out starts one")
    return folders[-1]


def find_clips(args):
    """-> (class names, clips) to train on and {name: (class names, clips)} to test on."""
    lists = args.train_list, args.test_list, args.labels
    classes, train, test = data.index_frames(args.data, *lists)
    order, half = range(len(classes)), len(classes)
    if args.base_to_novel:
        counts = np.bincount([label for _, label in train], minlength=len(classes))
        order, half = np.argsort(-counts, kind="stable").tolist(), (len(classes) + 1) // 2

    def part(clips, keep):
        position = {label: i for i, label in enumerate(sorted(keep))}
        return [classes[k] for k in position], [(c, position[k]) for c, k in clips if k in position]

    tests = {"base" if half < len(classes) else Path(args.data).resolve().name: order[:half],
             "novel": order[half:]}
    tests = {name: part(test, keep) for name, keep in tests.items() if len(keep)}
    for name, (_, clips) in tests.items():
        if not clips:
            print(f"warning: {name}: there are no test clips", file=sys.stderr)
    return part(train, order[:half]), {name: t for name, t in tests.items() if t[1]}


def build_model(args, saved, path):
    """The model of the flags on its device, with the tensors of the checkpoint, if there is one."""
    if args.eval_only and not args.checkpoint and not args.prompts:
        print("no --checkpoint: this evaluates plain CLIP, without prompts and adapters")
        args.prompts, args.no_adapters = "none", True
    given = {"activation": args.activation}  # what no flag says, the file may
    given |= {"prompts": args.prompts} if args.prompts else {}
    given |= {"adapters": False} if args.no_adapters else {}
    given |= {"temporal_adapter": True} if args.temporal_adapter else {}
    torch.manual_seed(args.seed)  # of the new modules
    model = EZCLIP.from_pretrained(args.clip, args.num_frames, **given)
    if path and not saved and not model.weights_adapted:
        raise ValueError(f"{args.clip}: is plain CLIP, to be given as --clip")
    if model.config.vocab_size != 49408:
        raise ValueError(f"{args.clip}: has another vocabulary than CLIP")
    if args.tune == "new":
        model.freeze_backbone()
    if saved:
        if saved["backbone_sha256"] != model.weights_sha256:
            raise ValueError(f"{path}: was trained on another CLIP than {args.clip}")
        old, new = saved["state_dict"], trained(model)
        wrong = [name for name in {**old, **new} if name not in old or name not in new
                 or getattr(old[name], "shape", None) != new[name].shape]
        if wrong:
            raise ValueError(f"{path}: does not fit a model of these flags: {wrong[0]}")
        model.load_state_dict({**model.state_dict(), **saved["state_dict"]})
    args.num_frames, args.prompts = model.config.num_frames, model.config.prompts
    return model.to(args.device)


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def tokens_of(classes, args, model):
    """Token ids of every template and class, (templates, classes, L)."""
    words, length = [data.class_text(name) for name in classes], model.config.context_length
    return torch.stack([tokenize([template.replace("{}", word) for word in words], length)
                        for template in args.templates])


def autocast(args):
    return torch.autocast("cuda", torch.bfloat16, enabled=args.device.startswith("cuda"))


@torch.inference_mode()
def evaluate(model, classes, clips, args):
    """Zero-shot classification of every clip: {"top1", "top5" (per cent), "n", "classes"}."""
    model.eval()
    dataset = data.Clips(args.data, clips, args.num_frames, model.config.image_size)
    keys = [(0, i) for i in range(len(clips))]
    batches = [keys[i:i + args.batch_size] for i in range(0, len(keys), args.batch_size)]
    tokens, hits = tokens_of(classes, args, model), torch.zeros(2)
    torch.manual_seed(args.seed)  # of --shuffle-frames
    with autocast(args):
        texts = [model.encode_text(t.to(args.device)) for t in tokens.flatten(0, 1).split(512)]
    texts = torch.cat(texts).view(*tokens.shape[:2], -1)  # (templates, classes, E)
    stream = data.loader(dataset, batches, args.workers)
    for videos, labels, _ in tqdm(stream, "test", len(batches), leave=False, disable=None):
        if args.shuffle_frames:
            videos = torch.stack([video[torch.randperm(len(video))] for video in videos])
        with autocast(args):
            features = model.encode_video(videos.to(args.device))
        probabilities = class_probabilities(features, texts)
        if not probabilities.isfinite().all():
            raise ValueError("the model's features are not finite: its weights are broken")
        best = probabilities.topk(min(5, len(classes))).indices.cpu() == labels[:, None]
        hits += torch.stack([best[:, 0].sum(), best.sum()])
    top1, top5 = (100 * hits / len(clips)).tolist()
    return {"top1": round(top1, 2), "top5": round(top5, 2), "n": len(clips),
            "classes": len(classes)}


def evaluate_all(model, tests, args, row):
    """-> {test set: result}, which is also printed and noted in a row of the log."""
    results = {name: evaluate(model, *test, args) for name, test in tests.items()}
    for name, r in results.items():
        print(f"{name}: top-1 {r['top1']:.2f} %, top-5 {r['top5']:.2f} %, n = {r['n']} clips of "
              f"{r['classes']} classes", flush=True)
        row.update({f"{name} top1": r["top1"], f"{name} top5": r["top5"]})
    return results


def write(path, save):
    """Write a file as a whole or not at all: save(temporary path), flush to the disk, rename."""
    temporary = path.with_name(path.name + ".tmp")
    save(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def batches(n, size, start, stop, seed):
    """Keys (epoch, clip) of the steps from start to stop, in a new order every epoch. An incomplete
    last batch is dropped unless it is the only one."""
    per_epoch = max(1, n // size)
    for step in range(start, stop):
        epoch, k = divmod(step, per_epoch)
        if k == 0 or step == start:
            order = np.random.default_rng((seed, epoch)).permutation(n).tolist()
        yield [(epoch, i) for i in order[k * size:(k + 1) * size]]


def train(model, classes, clips, tests, args, saved):
    """Train from the first step, or from where `saved` stood; returns the results and the seconds.

    No random state has to be kept: a step's is a function of (seed, step), a clip's of (seed,
    epoch, clip). So a resumed run takes the very steps of one that was never stopped.
    """
    out, device = Path(args.out), torch.device(args.device)
    names = "\n".join(map(data.class_text, classes))
    flip = not (args.no_augment or args.no_flip
                or re.search(r"(?<![a-z])(left|right)(?![a-z])", names))
    size = sum(p.numel() for p in trained(model).values())
    print(f"training {size:,} parameters on {args.device}, {len(clips)} clips of "
          f"{len(classes)} classes, {'' if flip else 'not '}mirrored")
    dataset = data.Clips(args.data, clips, args.num_frames, model.config.image_size, train=True,
                         augment=not args.no_augment, flip=flip, seed=args.seed)
    tokens = tokens_of(classes, args, model)
    per_epoch = max(1, len(clips) // args.batch_size)
    total = args.epochs * per_epoch
    warmup = min(args.warmup_epochs * per_epoch, total / 10)
    lrs = {False: args.lr, True: args.lr if args.prompt_lr is None else args.prompt_lr}
    optimizer = torch.optim.AdamW(
        [{"params": [p for name, p in trained(model).items() if ("prompts" in name) == prompts]}
         for prompts in lrs], betas=(0.9, 0.98), eps=1e-8, weight_decay=args.weight_decay)
    step, seconds, rows, sums = 0, 0.0, [], [0.0, 0.0, 0.0]
    clips_sha256 = hashlib.sha256(repr((classes, clips)).encode()).hexdigest()
    if saved:
        if saved["clips_sha256"] != clips_sha256:
            raise ValueError(f"{out}: the run had other training clips or classes than these")
        try:
            optimizer.load_state_dict(saved["optimizer"])
        except (KeyError, TypeError, AttributeError, ValueError):
            raise ValueError(f"{out / 'last.pt'}: is a damaged checkpoint") from None
        step, seconds, rows, sums = (saved[key] for key in ("step", "seconds", "rows", "sums"))
        print(f"resumed at step {step} of {total}")

    def save(path):
        torch.save({"state_dict": {name: p.detach() for name, p in trained(model).items()},
                    "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds,
                    "rows": rows, "sums": sums, "args": vars(args), "classes": classes,
                    "clips_sha256": clips_sha256, "backbone_sha256": model.weights_sha256}, path)

    steps = batches(len(clips), args.batch_size, step, total, args.seed)
    stream = data.loader(dataset, steps, args.workers, pin_memory=device.type == "cuda")
    bar = tqdm(stream, "train", total, initial=step, unit="step", disable=None)
    clock = saved_at = drawn_at = time.monotonic()
    for videos, labels, indices in bar:
        model.train()
        torch.manual_seed(np.random.SeedSequence((args.seed, step)).generate_state(1).item())
        rate = ((step + 1) / warmup if step + 1 < warmup else
                (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2)
        for group, lr in zip(optimizer.param_groups, lrs.values()):
            group["lr"] = lr * rate
        videos = videos.to(device, non_blocking=True)
        if not args.no_augment:
            videos = data.jitter_colour(videos)
        texts = tokens[torch.randint(len(tokens), labels.shape), labels].to(device)
        with autocast(args):
            frames, texts = model.encode_frames(videos), model.encode_text(texts)
        logits = model.similarity(frames.float().mean(1), texts)
        contrastive, motion = contrastive_loss(logits, labels.to(device)), motion_loss(frames)
        loss = contrastive + args.motion_weight * motion
        losses = torch.stack([loss, contrastive, motion]).tolist()
        if not math.isfinite(losses[0]):
            raise ValueError(f"step {step}: the loss is {losses[0]} for the clips "
                             + ", ".join(clips[i][0] for i in indices))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        step += 1
        sums = [a + b for a, b in zip(sums, losses)]
        now = time.monotonic()
        seconds, clock = seconds + now - clock, now
        bar.set_postfix_str(f"loss {losses[0]:.3f}, lr {args.lr * rate:.1e}, "
                            f"{len(labels) * (bar.format_dict['rate'] or 0):.1f} clips/s", False)
        if step % per_epoch == 0:
            spent = seconds - sum(row["seconds"] for row in rows)
            row = {"epoch": step // per_epoch, "lr": args.lr * rate, "seconds": spent,
                   "clips/s": per_epoch * len(labels) / spent}
            row |= dict(zip(("loss", "contrastive", "motion"), (x / per_epoch for x in sums)))
            if args.eval_every and row["epoch"] % args.eval_every == 0 and step < total:
                evaluate_all(model, tests, args, row)
                clock = time.monotonic()
            rows, sums = [*rows, row], [0.0, 0.0, 0.0]
            write_log(out / "log.csv", rows)
            if now - drawn_at > 60:
                plot_curves(out / "curves.png", rows)
                drawn_at = now
        if step % per_epoch == 0 or now - saved_at > SAVE_SECONDS:
            write(out / "last.pt", save)
            saved_at = now
    results = evaluate_all(model, tests, args, rows[-1])
    write_log(out / "log.csv", rows)
    plot_curves(out / "curves.png", rows)
    return results, seconds


def write_log(path, rows):
    def save(temporary):
        with open(temporary, "w", newline="") as file:
            keys = dict.fromkeys(key for row in rows for key in row)
            writer = csv.DictWriter(file, keys)
            writer.writeheader()
            writer.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in rows)
    write(path, save)


def figure(width, height, mosaic, **options):
    """-> figure, {name: axis}, in the one style of all pictures; colours of Okabe and Ito."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    colours = plt.cycler(color=["#0072B2", "#E69F00", "#009E73"])
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False,
                         "legend.frameon": False, "axes.prop_cycle": colours})
    return plt.subplot_mosaic(mosaic, figsize=(width, height), layout="constrained", **options)


def save_figure(fig, path):
    import matplotlib.pyplot as plt
    write(path, lambda temporary: fig.savefig(temporary, dpi=120, format="png"))
    plt.close(fig)


def plot_curves(path, rows):
    """Losses per epoch, and accuracy where it was measured."""
    fig, axes = figure(8, 3, [["left", "right"]])
    curves = {"left": ("loss", "contrastive", "motion"),
              "right": [key for key in rows[-1] if key.endswith("top1")]}
    for side, names in curves.items():
        for name in names:
            points = [(row["epoch"], row[name]) for row in rows if name in row]
            axes[side].plot(*zip(*points), label=name, linewidth=4 if name == "loss" else 1.5,
                            marker="o" if len(points) < 20 else "", zorder=name != "loss")
            axes[side].legend()
        axes[side].set(xlabel="epoch", xlim=(0, rows[-1]["epoch"] * 1.03))
    axes["left"].set(ylabel="mean of the epoch's losses", ylim=(0, None))
    axes["right"].set(ylabel="accuracy on test clips (%)", ylim=(0, 102))
    save_figure(fig, path)


def plot_demo(path, frames, table):
    """A strip of frames for each of eight actions, and below them the table as bars."""
    words = [word for twins in data.TWINS for word in twins]
    mosaic = [*zip(words[::2], words[1::2]), ("bars", "bars")]
    fig, axes = figure(8, 7, mosaic, height_ratios=[1, 1, 1, 1, 4])
    for colour, word in zip(itertools.cycle(data.COLOURS), words):
        name = data.demo_class(colour, word)
        clip = next((frames / name).iterdir())
        strip = [np.asarray(data.read_frame(clip / n)) for n in data.frame_names(clip)[::2]]
        strip = [np.pad(frame, ((0, 0), (0, 1), (0, 0)), constant_values=255) for frame in strip]
        axes[word].imshow(np.concatenate(strip, 1), aspect="auto")
        axes[word].set_title(name, fontsize=9, pad=3)
        axes[word].axis("off")
    for i, key in enumerate(("base", "novel", "harmonic_mean")):
        values = [row[key] for row in table]
        bars = axes["bars"].bar(np.arange(len(table)) + (i - 1) * 0.28, values, 0.26,
                                label=key.replace("_", " "))
        axes["bars"].bar_label(bars, fmt="%.0f", fontsize=8)
    axes["bars"].axhline(50, color="0.5", linestyle=":", zorder=0, label="best without order")
    axes["bars"].set_xticks(range(len(table)), [row["row"].replace(", ", ",\n") for row in table])
    axes["bars"].set(ylabel="top-1 accuracy (%)", ylim=(0, 105))
    axes["bars"].legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    save_figure(fig, path)


def write_results(out, argv, args, trainable, seconds, results):
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "torchvision": torchvision.__version__, "numpy": np.__version__}
    content = {"command": shlex.join(["python", "train.py", *argv]), "seed": args.seed,
               "versions": versions, "device": args.device, "trainable": trainable,
               "seconds": round(seconds, 1), "results": results}
    write(out / "results.json", lambda path: path.write_text(json.dumps(content, indent=1) + "\n"))
    return content


def run(argv):
    """Train and evaluate as the flags say; returns the content of results.json."""
    began = time.monotonic()
    args, saved, path = parse(argv)
    out = Path(args.out)
    (classes, clips), tests = find_clips(args)
    model = build_model(args, saved, path)
    trainable = sum(p.numel() for p in trained(model).values())
    if not args.eval_only and not (clips and trainable):
        raise ValueError(f"{args.data}: no training clips" if trainable else "nothing to train: "
                         "no prompts, no adapters, no --tune all")
    for names, _ in ((classes, clips), *tests.values()):
        tokens_of(names, args, model)  # a text too long is to show before anything is written
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()  # an error now, if the folder cannot be written to
    if args.eval_only:
        results, seconds = evaluate_all(model, tests, args, {}), time.monotonic() - began
    else:
        results, seconds = train(model, classes, clips, tests, args, saved if args.resume else None)
    return write_results(out, argv, args, trainable, seconds, results)


def ablate(out, common, rows):
    """Run a command per row (name, flags, folder) and print the table of their results; returns it
    and the largest number of trainable parameters."""
    table, count = [], 0
    for name, flags, folder in rows:
        argv = [*common, *flags, "--out", str(out / folder)]
        print(f"\n{name}: {shlex.join(['python', 'train.py', *argv])}", flush=True)
        content = run(argv)
        results, count = content["results"], max(count, content["trainable"])
        base, novel = results["base"]["top1"], results["novel"]["top1"]
        mean = 2 * base * novel / max(base + novel, 1e-9)
        table.append({"row": name, "base": base, "novel": novel, "harmonic_mean": round(mean, 2),
                      "n": results["base"]["n"] + results["novel"]["n"]})
    print("\n| row | base | novel | harmonic mean | n |\n|---|---|---|---|---|")
    for row in table:
        print("| {row} | {base:.1f} | {novel:.1f} | {harmonic_mean:.1f} | {n} |".format(**row))
    return table, count


PRETRAINING = ("--tune all --num-frames 1 --prompts none --no-adapters --motion-weight 0 "
               "--epochs 5 --batch-size 128 --lr 1e-3 --weight-decay 0.02")
ADAPTATION = "--num-frames 4 --epochs 33 --batch-size 32 --lr 8e-3 --prompt-lr 0.3"


def demo(argv):
    """The method in small: a tiny CLIP learns a rendered world from stills, then is adapted to its
    actions. These come in pairs that are each other backwards: who averages frames, guesses."""
    began, args = time.monotonic(), parser().parse_args(argv)
    usual = vars(parser().parse_args(["--demo"]))
    own = ("seed", "out", "resume", "workers", "device")
    foreign = [key for key, value in vars(args).items() if key not in own and value != usual[key]]
    if foreign:
        raise ValueError(f"--demo has its own --{foreign[0].replace('_', '-')}; it takes "
                         + " ".join(f"--{key}" for key in own))
    out = run_folder(args)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("stills", "frames"):
        if not (out / name).exists():
            data.demo(out / name, args.seed, stills=name == "stills")
    torch.manual_seed(args.seed)
    model = EZCLIP(Config(embed_dim=64, image_size=32, patch_size=8, vision_width=64,
                          vision_layers=3, text_width=64, text_layers=2, prompts="none",
                          adapters=False))
    torch.nn.init.normal_(model.visual.positional_embedding, std=0.7)  # else places are not learnt
    write(out / "random.pt", lambda path: torch.save(model.state_dict(), path))

    common = ["--templates", "{}", "--no-augment", "--seed", str(args.seed),
              "--device", args.device, "--workers", str(args.workers), *["--resume"] * args.resume]
    stills = run([*common, "--data", str(out / "stills"), "--clip", str(out / "random.pt"),
                  *PRETRAINING.split(), "--out", str(out / "clip")])["results"]["stills"]
    if stills["top1"] < 90:
        raise ValueError(f"the tiny CLIP names only {stills['top1']} % of the stills: stopped")
    clip = str(out / "clip/last.pt")
    common += ["--data", str(out / "frames"), "--base-to-novel", *ADAPTATION.split()]
    table, trainable = ablate(out, common, [
        ("frozen CLIP", ["--clip", clip, "--eval-only"], "frozen"),
        ("+ adapters", ["--clip", clip, "--prompts", "none", "--motion-weight", "0"], "adapters"),
        ("+ temporal prompts", ["--clip", clip, "--motion-weight", "0"], "prompts"),
        ("+ motion loss", ["--clip", clip], "motion"),
        ("prompts, frames shuffled", ["--checkpoint", str(out / "prompts/last.pt"),
                                      "--eval-only", "--shuffle-frames"], "shuffled")])
    plot_demo(out / "demo.png", out / "frames", table)
    write_results(out, argv, args, trainable, time.monotonic() - began, {"demo": table})
    print(f"{time.monotonic() - began:.0f} s; {out}/results.json, {out}/demo.png")


if __name__ == "__main__":
    data.command(lambda: (demo if "--demo" in sys.argv else run)(sys.argv[1:]))
