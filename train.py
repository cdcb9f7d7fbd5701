"""Train and evaluate EZ-CLIP on folders of frames, and predict what videos show.

    python train.py --data ucf101_frames                       # train, then evaluate
    python train.py --resume --out runs/ucf101_frames          # continue a stopped run
    python train.py --data hmdb51_frames --checkpoint runs/ucf101_frames/last.pt --eval-only
    python train.py --data ucf101_frames --eval-only           # plain CLIP, nothing learnt
    python train.py --data ucf101_frames --base-to-novel --seed 1 2 3
    python train.py --data ucf101_frames --ablate
    python train.py --demo                                     # no data, no weights, five minutes
    python train.py --checkpoint runs/ucf101_frames/last.pt \\
        --predict video.mp4 --class-names "arm wrestling" "flipping a pancake" --picture video.png

A run's folder receives last.pt, log.csv, curves.png, confusion.png and results.json.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import platform
import re
import shlex
import signal
import statistics
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


def text_that(fits, problem):
    def check(text):
        if not fits(text):
            raise argparse.ArgumentTypeError(f"{text!r} {problem}")
        return text
    return check


def parser():
    p = Parser(allow_abbrev=False, description="Train and evaluate EZ-CLIP on folders of frames, "
               "and predict what videos show. Defaults are in parentheses.")
    flag = p.add_argument
    # data
    flag("--data", help="folder of frames: <class>/<clip>/img_00001.jpg")
    flag("--train-list", help="training clips: a list of UCF101, HMDB51, Kinetics, "
         "Something-Something, TSN, mmaction2 or the official code (README)")
    flag("--test-list", help="test clips, likewise")
    flag("--labels", help="class names of the numbers in lists: CSV id,name, classInd.txt, "
         "labels.json")
    flag("--allow-missing", action="store_true", help="leave out listed clips that are not there")
    flag("--eval-data", action="append", metavar="NAME=DIR[,LIST[,LABELS]]",
         type=text_that(re.compile("[^=]+=[^,]+(,[^,]+){0,2}").fullmatch,
                        "is not NAME=DIR[,LIST[,LABELS]]"),
         help="test there too; {} in LIST: splits 1 to 3, without LIST: all clips")
    flag("--base-to-novel", nargs="*", metavar="CLASSES",
         help="train on one half of the classes, test on both: two files of class names "
         "(the half with more training clips, and the rest)")
    flag("--shots", type=at_least(0), help="training clips per class (16 with --base-to-novel, "
         "else all; 0: all)")
    flag("--descriptions", nargs="+", metavar="FILE", help="CSV id,name,text or JSON of texts to "
         "stand for the class names; of several the first that has all classes of a data set")
    flag("--templates", nargs="+", metavar="TEXT",
         type=text_that(lambda text: "{}" in text, "has no {} for the class name"),
         help="with {} for the class name (the 16 of the official code; {} with --descriptions)")
    flag("--no-flip", action="store_true",
         help="no horizontal flips (off anyway where a class name has left or right)")
    flag("--no-augment", action="store_true", help="no random crops, flips and colour jitter")
    # model
    flag("--clip", help="ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px or a file (ViT-B/16)")
    flag("--activation", choices=("quick_gelu", "gelu"), default="quick_gelu",
         help="gelu for open_clip's models not named -quickgelu (%(default)s)")
    flag("--num-frames", type=at_least(1), help="frames per clip (8, or the checkpoint's)")
    flag("--prompts", choices=("deep", "shallow", "none"), help="temporal prompts in all "
         "layers, in the first, or none (deep)")
    flag("--no-adapters", action="store_true", help="leave out the adapters")
    flag("--temporal-adapter", action="store_true",
         help="the official code's ablation: attention over time at every token")
    flag("--tune", choices=("new", "all"), default="new",
         help="train prompts and adapters only, or CLIP too (%(default)s)")
    # optimisation
    flag("--epochs", type=at_least(1), default=50, help="passes over all clips (%(default)s)")
    flag("--batch-size", type=at_least(1), default=70, help="clips per step (%(default)s)")
    flag("--lr", type=at_least(0, float), default=5e-5, help="peak learning rate (%(default)s)")
    flag("--prompt-lr", type=at_least(0, float), help="peak learning rate of the prompts (--lr)")
    flag("--weight-decay", type=at_least(0, float), default=0.2,
         help="weight decay of AdamW (%(default)s)")
    flag("--warmup-epochs", type=at_least(0, float), default=5,
         help="linear warm-up, at most a tenth of all steps (%(default)s)")
    flag("--motion-weight", type=at_least(0, float), default=1.0,
         help="weight of the motion loss (%(default)s)")
    flag("--seed", "--seeds", dest="seeds", type=at_least(0), nargs="+", default=[0],
         metavar="SEED", help="random seed; of several each has its run, and means are given (0)")
    # the run
    flag("--out", help="folder of the run (runs/<data>, with a counter when taken)")
    flag("--resume", action="store_true", help="continue the run in --out")
    flag("--checkpoint", help="weights to start from: a last.pt or one of the official code; "
         "{} in it is the seed, where there are several")
    flag("--eval-only", action="store_true", help="do not train")
    flag("--eval-every", type=at_least(1), help="epochs between evaluations (only at the end)")
    flag("--shuffle-frames", action="store_true",
         help="a control: the frames of each test clip in random order")
    flag("--workers", type=at_least(0), default=min(8, os.cpu_count()),
         help="processes that load clips (%(default)s)")
    flag("--compile", action="store_true", help="let torch.compile speed the model up")
    flag("--recompute", action="store_true",
         help="gradient checkpointing, block by block: less memory, more time")
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    flag("--device", type=usable_device, default="cuda" if cuda else "mps" if mps else "cpu",
         help="cuda, cuda:1, mps or cpu (%(default)s)")
    flag("--predict", nargs="+", metavar="VIDEO",
         help="name the actions in videos, files or folders of frames: --checkpoint or --clip")
    flag("--class-names", nargs="+", metavar="NAME",
         help="the names to choose from, or a file of names (those of the checkpoint's training)")
    flag("--json", action="store_true", help="predictions as JSON; all else goes to stderr")
    flag("--picture", metavar="FILE", help="a PNG of the frames and the class token's attention")
    flag("--ablate", action="store_true", help="CLIP and each part of the method, one by one")
    flag("--demo", action="store_true", help="the method on a rendered world; needs no --data")
    return p


SAVE_SECONDS = 600  # between checkpoints within an epoch

# Flags of the machine, which a checkpoint does not bring along; and those that may differ when a
# run is resumed: its result does not depend on them, or what they name is compared by content.
HERE = ("out", "resume", "workers", "device", "compile", "recompute")
FREE = ("eval_every", "eval_data", "data", "train_list", "test_list", "labels", "allow_missing",
        "base_to_novel", "descriptions", "templates", "clip", "checkpoint")
# Flags that describe the model: a checkpoint of ours brings them along.
MODEL = ("clip", "activation", "num_frames", "prompts", "no_adapters", "temporal_adapter", "tune")
PLAIN = (str, int, float, type(None))
CHECKPOINT = dict(  # types of a value, of what it holds, and of what that holds
    args=[dict, (*PLAIN, list), PLAIN], state_dict=[dict, torch.Tensor], optimizer=[dict],
    step=[int], seconds=[float], rows=[list, dict, (int, float)], sums=[list, float],
    classes=[list, str], data_sha256=[str], backbone_sha256=[str])


def fits(value, types, *inner):
    """Whether a value is of these types, and what it holds, if anything, of the inner ones."""
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, types) and (not inner or all(fits(each, *inner) for each in held))


def parse(argv):
    """-> (flags, checkpoint, its path): the last.pt that is resumed or started from, or None. Its
    flags are the defaults: all of them when it is resumed, else those that describe the model. A
    --checkpoint of another kind is the official code's: CLIP and what was learnt, in one file."""
    p = parser()
    args = p.parse_args(argv)
    if not (args.data or args.resume and args.out or args.eval_only and args.eval_data
            or args.predict):
        raise ValueError("--data is needed, a folder of frames (or --predict, or --demo)")
    out = run_folder(args)
    resumed = args.resume and (out / "last.pt").exists()
    path = out / "last.pt" if resumed else args.checkpoint
    saved = read_weights(path) if path else {}
    if isinstance(saved, dict) and "backbone_sha256" in saved:
        damaged = [key for key, types in CHECKPOINT.items() if not fits(saved.get(key), *types)]
        if damaged:
            raise ValueError(f"{path}: is a damaged checkpoint: {', '.join(damaged)}")
        del saved["state_dict"]  # build_model has it read where it is needed
        old = {k: v for k, v in saved["args"].items() if k not in HERE
               and k in (vars(args) if resumed else MODEL)}
        old["eval_data"] = None if args.eval_data else old.get("eval_data")  # or argparse appends
        p.set_defaults(**old)
        args = p.parse_args(argv)
        changed = [k for k in old if resumed and k not in FREE and getattr(args, k) != old[k]]
        if changed:
            raise ValueError(f"{path}: the run has other flags, which --resume keeps: " + ", ".join(
                f"--{k.replace('_', '-')} {old[k]}, not {getattr(args, k)}" for k in changed))
    elif resumed:
        raise ValueError(f"{path}: is no checkpoint of a run")
    elif args.checkpoint and args.clip:
        raise ValueError(f"{args.checkpoint}: brings its own CLIP, leave --clip out")
    else:
        saved, args.clip = None, args.checkpoint or args.clip or "ViT-B/16"
    if not (args.data or args.eval_only):
        raise ValueError(f"{out}: no run to resume there, and no --data to start one")
    args.out, args.resume, args.seed = str(out), resumed, args.seeds[0]
    return args, saved, path


def run_folder(args):
    """--out, or runs/<data> with a counter: the last that holds a last.pt for --resume, else the
    next. That of several seeds or an ablation holds them in folders."""
    source = args.data or ("demo" if args.demo else "zero-shot")
    first = Path(args.out or Path("runs", Path(source).resolve().name))
    folders = [first]
    while folders[-1].exists() and not args.out:
        folders.append(first.with_name(f"{first.name}-{len(folders) + 1}"))
    if args.resume:
        return next((out for out in folders[::-1] if any(out.rglob("last.pt"))), folders[-1])
    if any((folders[-1] / name).exists() for name in ("last.pt", "log.csv", "results.json")):
        raise ValueError(f"{first}: holds a run; --resume continues it, another --out starts one")
    return folders[-1]


def find_clips(args, saved):
    """-> the Split to train on (None without --data) and {name: Split} to test on."""
    train, tests, shots = None, {}, args.shots
    if args.data:
        train, test = data.index_frames(args.data, args.train_list, args.test_list, args.labels,
                                        args.allow_missing)
        tests = {Path(args.data).resolve().name: test}
    if args.data and args.base_to_novel is not None:
        base, novel = halves(train, args.base_to_novel)
        train, tests = train.only(base), {"base": test.only(base), "novel": test.only(novel)}
        shots = 16 if shots is None else shots
    if shots and not args.eval_only:
        train = train.shots(shots, args.seed)
    if train:  # a class without clips is not learnt
        train = train.only({data.class_key(train.classes[k]) for _, k in train.clips})
    learnt = train.classes if not args.eval_only else saved["classes"] if saved else []
    for text in args.eval_data or ():
        name, _, paths = text.partition("=")
        if {name, f"{name} split 1"} & {*tests, "harmonic_mean"}:
            raise ValueError(f"--eval-data {text}: {name} is another test set already")
        for number in "123" if "{}" in paths else [""]:
            key = f"{name} split {number}" if number else name
            root, *lists = paths.replace("{}", number).split(",")
            _, test = data.index_frames(root, None, *lists, allow_missing=args.allow_missing,
                                        whole=True)
            shared = len(test.only(set(map(data.class_key, learnt))).classes)
            if learnt:
                print(f"{key}: {shared} of its {len(test.classes)} classes occur in training too")
            tests[key] = test
    for name, test in tests.items():
        if not test.clips:
            print(f"warning: {name}: there are no test clips", file=sys.stderr)
    return train, {name: test for name, test in tests.items() if test.clips}


def halves(split, files):
    """-> keys of the base and the novel classes: those of two files, or the classes with more
    training clips (ties: the smaller label), and the others."""
    if len(files) not in (0, 2) or not (files or split.clips):
        raise ValueError("--base-to-novel needs training clips, or two files of class names")
    counts = np.bincount([k for _, k in split.clips], minlength=len(split.classes))
    order = [data.class_key(split.classes[k]) for k in np.argsort(-counts, kind="stable")]
    half = (len(order) + 1) // 2
    parts = [{data.class_key(name): name for _, name, _ in data.read_classes(path)}
             for path in files] or [order[:half], order[half:]]
    for path, part, other in zip(files, parts, parts[::-1]):
        for key in part:
            if key not in order or key in other:
                raise ValueError(f"{path}: {part[key]} is "
                                 + ("in both files" if key in other else f"not in {split.root}"))
    return parts


def build_model(args, saved, path):
    """The model of the flags on its device, with the tensors of the checkpoint, if there is one."""
    if args.eval_only and not args.checkpoint and not args.prompts:
        print("no --checkpoint: this is plain CLIP, without prompts and adapters")
        args.prompts, args.no_adapters = "none", True
    given = {"activation": args.activation, "recompute": args.recompute}
    given |= {"prompts": args.prompts} if args.prompts else {}  # what no flag says, a file may
    given |= {"adapters": False} if args.no_adapters else {}
    given |= {"temporal_adapter": True} if args.temporal_adapter else {}
    torch.manual_seed(args.seed)  # of the new modules
    files = (path, args.num_frames, args.clip) if saved else (args.clip, args.num_frames)
    model = EZCLIP.from_pretrained(*files, **given)
    if path and not saved and not model.weights_adapted:
        raise ValueError(f"{args.clip}: is plain CLIP, to be given as --clip")
    if model.config.vocab_size != 49408:
        raise ValueError(f"{args.clip}: has {model.config.vocab_size} token ids, not CLIP's 49408")
    if args.tune == "new":
        model.freeze_backbone()
    for tower in (model.visual, model.transformer) if args.compile else ():
        tower.compile()
    args.num_frames, args.prompts = model.config.num_frames, model.config.prompts
    return model.to(args.device)


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def tokens_of(classes, args, model):
    """Token ids of every template and class, (templates, classes, L)."""
    words, templates, tokens = [data.class_text(name) for name in classes], data.TEMPLATES, []
    for path in args.descriptions or ():
        texts = {data.class_key(name): text for _, name, text in data.read_classes(path)}
        words, templates = [texts.get(data.class_key(name)) for name in classes], ["{}"]
        if all(words):
            break
    for name, word in zip(classes, words):
        if not word:
            raise ValueError(f"{path}: has no description of {name}"
                             + ", and no other file all of them" * (len(args.descriptions) > 1))
        try:
            texts = [text.replace("{}", word) for text in args.templates or templates]
            tokens.append(tokenize(texts, model.config.context_length))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return torch.stack(tokens, 1)


def autocast(args):
    return torch.autocast("cuda", torch.bfloat16, enabled=args.device.startswith("cuda"))


def encode_classes(classes, args, model):
    """Features of every template and class, (templates, classes, E)."""
    tokens = tokens_of(classes, args, model)
    with autocast(args):
        texts = [model.encode_text(t.to(args.device)) for t in tokens.flatten(0, 1).split(512)]
    return torch.cat(texts).view(*tokens.shape[:2], -1)


def classify(features, texts):
    """Probabilities of the classes, (B, classes), and the at most five best of them, (B, 5)."""
    probabilities = class_probabilities(features, texts).cpu()
    if not probabilities.isfinite().all():
        raise ValueError("the model's features are not finite: its weights are broken")
    return probabilities, probabilities.topk(min(5, probabilities.shape[1])).indices


@torch.inference_mode()
def evaluate(model, split, args):
    """Zero-shot classification of every clip of a Split: accuracies in per cent, what is confused,
    and the matrix of true and predicted classes under "confusion"."""
    model.eval()
    classes, n = split.classes, len(split.clips)
    dataset = data.Clips(split, args.num_frames, model.config.image_size)
    keys = [[(0, i) for i in part.tolist()] for part in torch.arange(n).split(args.batch_size)]
    confusion, hits = np.zeros((len(classes), len(classes)), int), 0
    torch.manual_seed(args.seed)  # of --shuffle-frames
    texts = encode_classes(classes, args, model)
    stream = data.loader(dataset, keys, args.workers)
    for videos, labels, _ in tqdm(stream, "test", len(keys), leave=False, disable=None):
        if args.shuffle_frames:
            videos = torch.stack([video[torch.randperm(len(video))] for video in videos])
        with autocast(args):
            features = model.encode_video(videos.to(args.device))
        _, best = classify(features, texts)
        hits += (best == labels[:, None]).sum().item()
        np.add.at(confusion, (labels, best[:, 0]), 1)
    counts, right = confusion.sum(1).tolist(), confusion.diagonal().tolist()
    wrong = confusion - np.diag(right)
    pairs = [divmod(k, len(classes)) for k in np.argsort(-wrong, axis=None, kind="stable")[:10]]
    return {"top1": round(100 * sum(right) / n, 2), "top5": round(100 * hits / n, 2), "n": n,
            "classes": len(classes), "split": split.source, "confusion": confusion,
            "per_class": {name: {"top1": round(100 * hit / count, 2), "n": count}
                          for name, hit, count in zip(classes, right, counts) if count},
            "confused": [{"class": classes[i], "taken_for": classes[k], "clips": wrong[i, k].item()}
                         for i, k in pairs if wrong[i, k]]}


def evaluate_all(model, tests, args, row):
    """-> {test set: result}, which is also printed and noted in a row of the log."""
    results = {name: evaluate(model, test, args) for name, test in tests.items()}
    for text in args.eval_data or ():
        name = text.partition("=")[0]
        if f"{name} split 3" in results:
            results[name] = average([results[f"{name} split {i}"] for i in (1, 2, 3)])
    if args.base_to_novel is not None and {"base", "novel"} <= results.keys():
        base, novel = results["base"], results["novel"]
        mean = 2 * base["top1"] * novel["top1"] / max(base["top1"] + novel["top1"], 1e-9)
        results["harmonic_mean"] = {"top1": round(mean, 2), "n": base["n"] + novel["n"]}
    for name, r in results.items():
        more = f", top-5 {r['top5']:.1f} %, {r['classes']} classes" if "classes" in r else ""
        print(f"{name}: top-1 {percent(r)} %, n = {r['n']}{more}", flush=True)
        row.update({f"{name} {key}": r[key] for key in ("top1", "top5") if key in r})
    return results


def average(results):
    """Of alike results, nested alike, the mean and the standard deviation (n - 1) of each."""
    if "top1" not in results[0]:
        return {key: average([r[key] for r in results]) for key in results[0]}
    n = [r["n"] for r in results]
    mean = {"n": n[0] if n.count(n[0]) == len(n) else n, "runs": len(n)}
    for key in [key for key in ("top1", "top5") if key in results[0]]:
        values = [r[key] for r in results]
        mean |= {key: round(statistics.mean(values), 2),
                 f"{key}_std": round(statistics.stdev(values), 2)}
    return mean


def percent(result):
    deviation = f" ± {result['top1_std']:.1f}" if "top1_std" in result else ""
    return f"{result['top1']:.1f}{deviation}"


def print_table(rows):
    """{row: {test set: result}} in Markdown."""
    sets = {name: result["n"] for results in rows.values() for name, result in results.items()}
    print("\n| top-1 (%) | " + " | ".join(f"{name}, n = {n}" for name, n in sets.items()) + " |")
    print("|---" * (len(sets) + 1) + "|")
    for name, results in rows.items():
        print(f"| {name} | " + " | ".join(percent(results[key]) for key in sets) + " |")


@contextlib.contextmanager
def uninterrupted():
    """Signals wait for the end of the block: Ctrl-C, SIGTERM, and the death of a process that loads
    clips, which PyTorch turns into an error. For the main thread only."""
    waiting, numbers = [], {signal.SIGINT, signal.SIGTERM}
    numbers |= {signal.SIGCHLD} if hasattr(signal, "SIGCHLD") else set()  # Windows has none
    before = {n: signal.signal(n, lambda *args: waiting.append(args)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number, frame in waiting:
        handler = signal.getsignal(number)
        if callable(handler):
            handler(number, frame)


def write(path, save):
    """Write a file as a whole or not at all: save(temporary file), flush to the disk, rename."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with uninterrupted():  # an exception amid torch.save's C++ can abort Python
            with open(temporary, "wb") as file:
                save(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{path}: cannot be written ({reason}); nothing was changed") from None
    finally:
        temporary.unlink(missing_ok=True)


def batches(n, size, start, stop, seed):
    """Keys (epoch, clip) of the steps from start to stop, in a new order every epoch. An incomplete
    last batch is dropped unless it is the only one."""
    per_epoch = max(1, n // size)
    for step in range(start, stop):
        epoch, k = divmod(step, per_epoch)
        if k == 0 or step == start:
            order = np.random.default_rng((seed, epoch)).permutation(n).tolist()
        yield [(epoch, i) for i in order[k * size:(k + 1) * size]]


def learning_rate(step, warmup, total):
    """As a fraction of the peak: linear from 0 for `warmup` steps, then a cosine to 0."""
    if step + 1 < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def losses(model, videos, labels, tokens, args):
    """-> loss, contrastive and motion loss of a batch. `tokens`: (templates, classes, L), of which
    each clip draws a template of its class."""
    videos = videos.to(args.device, non_blocking=True)
    if not args.no_augment:
        videos = data.jitter_colour(videos)
    texts = tokens[torch.randint(len(tokens), labels.shape), labels].to(args.device)
    with autocast(args):
        frames, texts = model.encode_frames(videos), model.encode_text(texts)
    logits = model.similarity(model.pool(frames.float()), texts)
    contrastive, motion = contrastive_loss(logits, labels.to(args.device)), motion_loss(frames)
    return contrastive + args.motion_weight * motion, contrastive, motion


def train(model, split, tests, args, saved):
    """Train from the first step, or from where `saved` stood; returns the results and the seconds.

    No random state has to be kept: a step's is a function of (seed, step), a clip's of (seed,
    epoch, clip). So a resumed run takes the very steps of one that was never stopped.
    """
    out, classes, clips, new = Path(args.out), split.classes, split.clips, trained(model)
    names = "\n".join(map(data.class_text, classes))
    flip = not (args.no_augment or args.no_flip
                or re.search(r"(?<![a-z])(left|right)(?![a-z])", names))
    print(f"training {sum(p.numel() for p in new.values()):,} parameters on {args.device}, "
          f"{len(clips)} clips of {len(classes)} classes, with{'' if flip else 'out'} flips")
    dataset = data.Clips(split, args.num_frames, model.config.image_size, train=True,
                         augment=not args.no_augment, flip=flip, seed=args.seed)
    tokens = tokens_of(classes, args, model)
    per_epoch = max(1, len(clips) // args.batch_size)
    total = args.epochs * per_epoch
    warmup = min(args.warmup_epochs * per_epoch, total / 10)
    lrs = {False: args.lr, True: args.lr if args.prompt_lr is None else args.prompt_lr}
    optimizer = torch.optim.AdamW(
        [{"params": [p for name, p in new.items() if ("prompts" in name) == prompts]}
         for prompts in lrs], betas=(0.9, 0.98), eps=1e-8, weight_decay=args.weight_decay)
    step, seconds, rows, sums = 0, 0.0, [], [0.0, 0.0, 0.0]
    data_sha256 = hashlib.sha256(repr(clips).encode() + tokens.numpy().tobytes()).hexdigest()
    if saved:
        if saved["data_sha256"] != data_sha256:
            raise ValueError(f"{out}: the run had other training clips or texts than these")
        try:
            optimizer.load_state_dict(saved["optimizer"])
        except (KeyError, TypeError, AttributeError, ValueError):
            raise ValueError(f"{out / 'last.pt'}: is a damaged checkpoint: optimizer") from None
        step, seconds, rows, sums = (saved[key] for key in ("step", "seconds", "rows", "sums"))
        print(f"resumed at step {step} of {total}")

    def save(file):
        if not all(p.isfinite().all() for p in new.values()):
            raise ArithmeticError(f"step {step}: the weights are no longer finite, and not saved; "
                                  "a lower --lr may help")
        torch.save({"state_dict": {name: p.detach() for name, p in new.items()},
                    "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds,
                    "rows": rows, "sums": sums, "args": vars(args), "classes": classes,
                    "data_sha256": data_sha256, "backbone_sha256": model.weights_sha256}, file)

    def learn(videos, labels, indices):
        """A step of the optimizer -> [loss, contrastive, motion]."""
        model.train()
        torch.manual_seed(np.random.SeedSequence((args.seed, step)).generate_state(1).item())
        for group, lr in zip(optimizer.param_groups, lrs.values()):
            group["lr"] = lr * learning_rate(step, warmup, total)
        loss, *parts = losses(model, videos, labels, tokens, args)
        values = torch.stack([loss, *parts]).tolist()
        if not math.isfinite(values[0]):
            raise ArithmeticError(f"step {step}: the loss is {values[0]}, a lower --lr may help; "
                                  "clips: " + ", ".join(clips[i][0] for i in indices))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return values

    def end_epoch():
        nonlocal rows, sums
        spent = seconds - sum(row["seconds"] for row in rows)
        row = {"epoch": step // per_epoch, "lr": optimizer.param_groups[0]["lr"], "seconds": spent,
               "clips/s": per_epoch * min(args.batch_size, len(clips)) / spent}
        row |= dict(zip(("loss", "contrastive", "motion"), (x / per_epoch for x in sums)))
        if args.eval_every and row["epoch"] % args.eval_every == 0 and step < total:
            evaluate_all(model, tests, args, row)
        with uninterrupted():
            rows, sums = [*rows, row], [0.0, 0.0, 0.0]
        write_log(out / "log.csv", rows)

    steps = batches(len(clips), args.batch_size, step, total, args.seed)
    stream = data.loader(dataset, steps, args.workers, args.device.startswith("cuda"))
    bar = tqdm(stream, "train", total, initial=step, unit="step", disable=None)
    began = clock = saved_at = drawn_at = time.monotonic()
    waited, kept = 0.0, step
    stops = (KeyboardInterrupt, OSError, ValueError, torch.OutOfMemoryError, RuntimeError)
    try:
        if len(rows) < step // per_epoch:  # the run was stopped while it evaluated
            end_epoch()
        for batch in bar:
            waited += time.monotonic() - clock
            with uninterrupted():
                values = learn(*batch)
                step, sums = step + 1, [a + b for a, b in zip(sums, values)]
                now = time.monotonic()
                seconds, clock = seconds + now - clock, now
            bar.set_postfix_str(f"loss {values[0]:.3f}, "
                                f"lr {optimizer.param_groups[0]['lr']:.1e}, "
                                f"{len(batch[1]) * (bar.format_dict['rate'] or 0):.1f} clips/s, "
                                f"{100 * waited / (now - began):.0f} % waiting for clips", False)
            if step % per_epoch == 0:
                end_epoch()
                if now - drawn_at > 60:
                    plot_curves(out / "curves.png", rows)
                    drawn_at = now
            if step % per_epoch == 0 or now - saved_at > SAVE_SECONDS:
                write(out / "last.pt", save)
                saved_at, kept = now, step
            clock = time.monotonic()
        results = evaluate_all(model, tests, args, rows[-1])
    except stops as error:
        if step > kept:
            write(out / "last.pt", save)
        kind = next(kind for kind in stops if isinstance(error, kind))
        then = "" if kind is KeyboardInterrupt else "when that is mended, "
        hint = f"; step {step} of {total} is saved: {then}the same command with --resume goes on"
        raise kind((str(error) or "stopped") + hint * (step > 0)) from error
    write_log(out / "log.csv", rows)
    plot_curves(out / "curves.png", rows)
    return results, seconds


def write_log(path, rows):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, dict.fromkeys(key for row in rows for key in row))
    writer.writeheader()
    writer.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in rows)
    write(path, lambda file: file.write(text.getvalue().encode()))


def figure(width, height, mosaic, **options):
    """-> figure, {name: axis}, in the one style of all pictures; colours of Okabe and Ito."""
    import matplotlib
    from matplotlib.figure import Figure
    colours = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"]
    matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False,
                                "axes.prop_cycle": matplotlib.cycler(color=colours),
                                "legend.frameon": False,
                                "text.parse_math": False})  # names may hold a $
    fig = Figure((width, height), layout="constrained")
    return fig, fig.subplot_mosaic(mosaic, **options)


def save_figure(fig, path):
    write(path, lambda file: fig.savefig(file, dpi=120, format="png"))


def plot_curves(path, rows):
    """Losses per epoch, and accuracy where it was measured."""
    fig, axes = figure(8, 3, [["left", "right"]])
    curves = {"left": ("loss", "contrastive", "motion"),
              "right": [key for key in rows[-1] if key.endswith("top1")]}
    for side, names in curves.items():
        for name in names:
            points = [(row["epoch"], row[name]) for row in rows if name in row]
            label = name.replace(" top1", "").replace("_", " ")
            axes[side].plot(*zip(*points), label=label, linewidth=4 if name == "loss" else 1.5,
                            marker="o" if len(points) < 20 else "", zorder=name != "loss")
            axes[side].legend()
        axes[side].set(xlabel="epoch", xlim=(0, rows[-1]["epoch"] * 1.03))
    axes["left"].set(ylabel="mean loss of the epoch", ylim=(0, None))
    axes["right"].set(ylabel="top-1 accuracy (%)", ylim=(0, 102))
    save_figure(fig, path)


def plot_confusion(path, tests, results):
    """For each test set: which share of the clips of a class (row) is taken for which (column)."""
    fig, axes = figure(7, 5 * len(tests), [[name] for name in tests])
    for name, test in tests.items():
        matrix, axis, result = results[name].pop("confusion"), axes[name], results[name]
        image = axis.imshow(100 * matrix / matrix.sum(1, keepdims=True).clip(1), cmap="cividis",
                            vmin=0, vmax=100, aspect="auto")
        axis.set_title(f"{name}: {result['top1']} % of {result['n']} clips", fontsize=10)
        axis.set(xlabel="predicted class", ylabel="true class")
        if len(matrix) <= 30:
            labels = [f"{name[-40:]}  {i}" for i, name in enumerate(test.classes)]
            axis.set_yticks(range(len(matrix)), labels, fontsize=7)
        fig.colorbar(image, ax=axis, shrink=0.6, label="clips of the true class (%)")
    save_figure(fig, path)


def plot_demo(path, frames, results):
    """A strip of frames for each of eight actions, and below them the ablation as bars."""
    fig, axes = figure(8, 7, [*data.TWINS, ("bars", "bars")], height_ratios=[1, 1, 1, 1, 4])
    for colour, word in zip(np.repeat([*data.COLOURS], 2), np.ravel(data.TWINS)):
        name = data.demo_class(colour, word)
        clip = next((frames / name).iterdir())
        strip = [np.asarray(data.read_frame(clip / n)) for n in data.frame_names(clip)[::2]]
        strip = [np.pad(frame, ((0, 0), (0, 1), (0, 0)), constant_values=255) for frame in strip]
        axes[word].imshow(np.concatenate(strip, 1), aspect="auto")
        axes[word].set_title(name, fontsize=9, pad=3)
        axes[word].axis("off")
    for i, key in enumerate(("base", "novel", "harmonic_mean")):
        values = [row[key]["top1"] for row in results.values()]
        bars = axes["bars"].bar(np.arange(len(results)) + (i - 1) * 0.28, values, 0.26,
                                label=key.replace("_", " "))
        axes["bars"].bar_label(bars, fmt="%.0f", fontsize=8, padding=2,
                               bbox=dict(fc="white", ec="none", pad=0))
    axes["bars"].axhline(50, color="0.5", linestyle=":", zorder=0,
                         label="most to expect without order")
    axes["bars"].set_xticks(range(len(results)), [row.replace(", ", ",\n") for row in results])
    axes["bars"].set(ylabel="top-1 accuracy (%)", ylim=(0, 105))
    axes["bars"].legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    save_figure(fig, path)


def plot_predictions(path, videos):
    """For each of (title, clip, attention maps): its frames, and under each of them the attention
    of its class token to the patches and, layer by layer, to the temporal prompt token."""
    T, layers = videos[0][2].shape[:2]
    prompts = any(maps[..., -1].any() for _, _, maps in videos)
    side = min(max(1, 4 / T), 7.6 / T)
    rows = {"frames": side, "patches": max(side, 1)}
    rows |= {"prompt": max(0.08 * layers, 1)} if prompts else {}
    mosaic = [[f"{row} {i}", f"{row} bar {i}"] for i in range(len(videos)) for row in rows]
    fig, axes = figure(side * T + 1.5, (sum(rows.values()) + 0.9) * len(videos), mosaic,
                       height_ratios=[*rows.values()] * len(videos), width_ratios=[side * T, 0.1])
    style = dict(cmap="cividis", vmin=0, aspect="auto", interpolation="nearest")
    for i, (title, clip, maps) in enumerate(videos):
        maps = 100 * maps.mean(2).numpy()  # of the heads, (T, layers, L+1), in per cent
        grid = math.isqrt(maps.shape[2] - 2)
        patches = maps[:, -1, 1:-1].reshape(T, grid, grid)
        top = np.quantile(patches, 0.995)
        for row in rows:
            axes[f"{row} {i}"].set(xlim=(0.5, T + 0.5), xticks=[], yticks=[])
            axes[f"{row} {i}"].spines[:].set_visible(False)
        for t in range(T):
            box = (t + 0.52, t + 1.48, 0, 1)
            axes[f"frames {i}"].imshow(clip[t].permute(1, 2, 0).numpy(), extent=box, aspect="auto")
            image = axes[f"patches {i}"].imshow(patches[t], extent=box, vmax=top, **style)
        fig.colorbar(image, axes[f"patches bar {i}"], label="attention to\npatch (%)", extend="max")
        if prompts:
            image = axes[f"prompt {i}"].imshow(
                maps[..., -1].T, extent=(0.5, T + 0.5, layers + 0.5, 0.5), **style)
            fig.colorbar(image, axes[f"prompt bar {i}"], label="attention to\nprompt (%)")
            axes[f"prompt {i}"].set(ylabel="layer", yticks=range(1, layers + 1, 1 + layers // 8))
        axes[f"patches {i}"].set_ylabel("last\nlayer")
        axes[f"{[*rows][-1]} {i}"].set(xlabel="frame", xticks=range(1, T + 1))
        axes[f"frames {i}"].set_title(title, fontsize=10, wrap=True)
        axes[f"frames bar {i}"].axis("off")
    save_figure(fig, path)


def recorded(job):
    """A job of a command line whose result also goes to results.json in its folder."""
    def wrapper(argv, *rest):
        began = time.monotonic()
        args, content = job(argv, *rest)
        versions = {"python": platform.python_version(), "torch": torch.__version__,
                    "torchvision": torchvision.__version__, "numpy": np.__version__}
        content = {"command": shlex.join(["python", "train.py", *argv]), "seeds": args.seeds,
                   "versions": versions, "device": args.device,
                   "seconds": round(time.monotonic() - began, 1), **content}
        write(Path(args.out) / "results.json",
              lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))
        return content
    return wrapper


@recorded
def run(argv):
    """Train and evaluate as the flags say."""
    args, saved, path = parse(argv)
    out = Path(args.out)
    split, tests = find_clips(args, saved)
    model = build_model(args, saved, path)
    content = {"trainable": sum(p.numel() for p in trained(model).values())}
    if not args.eval_only and not (split.clips and content["trainable"]):
        raise ValueError("nothing to train: no prompts, no adapters, no --tune all"
                         if split.clips else f"{args.data}: no training clips")
    for part in tests.values() if args.eval_only else (split, *tests.values()):
        tokens_of(part.classes, args, model)  # a bad text is to show before anything is written
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()  # an error now, if the folder cannot be written to
    if args.eval_only:
        results = evaluate_all(model, tests, args, {})
    else:
        results, seconds = train(model, split, tests, args, saved if args.resume else None)
        content |= {"seconds": round(seconds, 1), "training": {
            "clips": len(split.clips), "classes": len(split.classes), "split": split.source}}
    if tests:
        plot_confusion(out / "confusion.png", tests, results)
    return args, {**content, "results": results}


def refuse(args, flags, problem):
    usual = vars(parser().parse_args([]))
    for flag in flags:
        if getattr(args, flag) != usual[flag]:
            raise ValueError(f"--{flag.replace('_', '-')} {problem}")


def without(argv, *flags):
    """A command line less some of its flags and their values."""
    kept, drop = [], False
    for arg in argv:
        drop = arg.partition("=")[0] in flags if arg.startswith("--") else drop
        kept += [] if drop else [arg]
    return kept


ROWS = (  # of the ablation: name, folder, flags
    ("frozen CLIP", "frozen", "--eval-only"),
    ("+ adapters", "adapters", "--prompts none --motion-weight 0"),
    ("+ temporal prompts", "prompts", "--motion-weight 0"),
    ("+ motion loss", "motion", ""),
    ("prompts, frames shuffled", "shuffled", "--eval-only --shuffle-frames --checkpoint {}"))


@recorded
def ablate(argv):
    """CLIP, then the method part by part, on the same data: a run for each of ROWS, and a table."""
    args, results, trainable = parser().parse_args(argv), {}, 0
    refuse(args, ("checkpoint", "eval_only", "shuffle_frames", "prompts", "no_adapters",
                  "temporal_adapter", "motion_weight"), "cannot be combined with --ablate")
    args.out = run_folder(args)
    for name, folder, flags in ROWS:
        flags = [flag.replace("{}", str(args.out / "prompts/last.pt")) for flag in flags.split()]
        row = [*without(argv, "--ablate", "--out"), *flags, "--out", str(args.out / folder)]
        print(f"\n{name}: {shlex.join(['python', 'train.py', *row])}", flush=True)
        content = run(row)
        results[name], trainable = content["results"], max(trainable, content["trainable"])
    print_table(results)
    return args, {"trainable": trainable, "results": results}


@recorded
def repeat(argv, job):
    """A job once for each of several seeds, and their means and standard deviations."""
    args, runs = parser().parse_args(argv), {}
    if len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seed has {statistics.mode(args.seeds)} twice")
    args.out = run_folder(args)
    for seed in args.seeds:
        flags = ["--seed", str(seed), "--out", str(args.out / f"seed{seed}")]
        if args.checkpoint:
            flags += ["--checkpoint", args.checkpoint.replace("{}", str(seed))]
        others = without(argv, "--seed", "--seeds", "--out", "--checkpoint")
        runs[f"seed {seed}"] = job([*others, *flags])
    results = average([content["results"] for content in runs.values()])
    rows = {name: content["results"] for name, content in runs.items()} | {"mean": results}
    print_table(results if job is not run else rows)
    return args, {"results": results, "runs": runs}


PREDICTING = ("predict", "class_names", "json", "picture")
FILES_OF_NAMES = (".txt", ".csv", ".json")


def predict(argv):
    """Print the at most five best classes of each video, with their probabilities."""
    args = parser().parse_args(argv)
    refuse(args, [flag for flag in vars(args) if flag not in (
        *PREDICTING, *MODEL, "checkpoint", "templates", "descriptions", "device")],
        "cannot be combined with --predict")
    for path in args.predict:
        if not os.path.exists(path):
            raise ValueError(f"{path}: no such video, nor folder of frames")
    if args.picture and len(args.predict) > 50:
        raise ValueError(f"--picture shows at most 50 videos, not {len(args.predict)}")
    if args.picture and not Path(args.picture).parent.is_dir():
        raise ValueError(f"{args.picture}: no such folder to write to")
    names, videos, pictures = args.class_names or [], [], []
    if len(names) == 1 and (names[0].endswith(FILES_OF_NAMES) or os.path.isfile(names[0])):
        names = [name for _, name, _ in data.read_classes(names[0])]
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        args, saved, path = parse([*argv, "--eval-only"])
        classes = names or (saved["classes"] if saved else [])
        words = [data.class_text(name) for name in classes]
        if not classes:
            raise ValueError("--class-names is needed, the names to choose from, or a file of them")
        if len(set(words)) < len(words):
            raise ValueError(f"--class-names has {statistics.mode(words)} twice")
        model = build_model(args, saved, path).eval()
        width = max(map(len, classes))
        with torch.inference_mode():
            texts = encode_classes(classes, args, model)
        for video in tqdm(args.predict, "videos", leave=False, disable=None if args.json else True):
            clip = data.load_clip(video, args.num_frames, model.config.image_size)
            with torch.inference_mode(), autocast(args):
                frames, maps = model.attention_maps(clip[None].to(args.device))
                (p,), (best,) = classify(model.pool(frames.float()), texts)
            best = [(classes[k], p[k].item()) for k in best]
            print(video, *(f"  {name:<{width}}  {100 * p:5.1f} %" for name, p in best), sep="\n",
                  flush=True)
            videos.append({"video": video, "classes": [
                {"class": name, "probability": round(p, 6)} for name, p in best]})
            if args.picture:
                (name, p), *_ = best
                title = f"{Path(video).name}: {name}, {100 * p:.1f} %"
                pictures.append((title, clip, maps[0].float().cpu()))
        if args.picture:
            plot_predictions(Path(args.picture), pictures)
    content = {"clip": args.clip, "checkpoint": args.checkpoint, "num_frames": args.num_frames,
               "prompts": args.prompts, "videos": videos}
    if args.json:
        print(json.dumps(content, indent=1))
    return content


PRETRAINING = ("--tune all --num-frames 1 --prompts none --no-adapters --motion-weight 0 "
               "--epochs 5 --batch-size 128 --lr 1e-3 --weight-decay 0.02")
ADAPTATION = "--shots 32 --num-frames 4 --epochs 33 --batch-size 32 --lr 8e-3 --prompt-lr 0.3"


@recorded
def demo(argv):
    """The method in small: a tiny CLIP learns a rendered world from stills, then is adapted to its
    actions. These come in pairs that are each other backwards: a mean over frames has to guess."""
    args = parser().parse_args(argv)
    refuse(args, [flag for flag in vars(args) if flag not in (*HERE, "seeds", "demo")],
           "cannot be combined with --demo")
    out = args.out = run_folder(args)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("stills", "frames"):
        if not (out / name).exists():
            data.demo(out / name, args.seeds[0], stills=name == "stills")
    torch.manual_seed(args.seeds[0])
    model = EZCLIP(Config(embed_dim=64, image_size=32, patch_size=8, vision_width=64,
                          vision_layers=3, text_width=64, text_layers=2, prompts="none",
                          adapters=False))
    torch.nn.init.normal_(model.visual.positional_embedding, std=0.7)  # else places are not learnt
    write(out / "random.pt", lambda file: torch.save(model.state_dict(), file))

    common = ["--templates", "{}", "--no-augment", "--seed", str(args.seeds[0]),
              "--device", args.device, "--workers", str(args.workers), *["--resume"] * args.resume]
    stills = run([*common, "--data", str(out / "stills"), "--clip", str(out / "random.pt"),
                  *PRETRAINING.split(), "--out", str(out / "clip")])["results"]["stills"]
    if stills["top1"] < 90:
        raise ValueError(f"the tiny CLIP names only {stills['top1']} % of the stills: stopped")
    content = ablate([*common, "--data", str(out / "frames"), "--clip", str(out / "clip/last.pt"),
                      "--base-to-novel", *ADAPTATION.split(), "--out", str(out / "ablation")])
    plot_demo(out / "demo.png", out / "frames", content["results"])
    print(f"{out}/results.json, {out}/demo.png")
    return args, {key: content[key] for key in ("trainable", "results")}


def main(argv):
    args = parser().parse_args(argv)
    if args.predict:
        return predict(argv)
    refuse(args, PREDICTING, "goes with --predict only")
    job = demo if args.demo else ablate if args.ablate else run
    return repeat(argv, job) if len(args.seeds) > 1 else job(argv)


if __name__ == "__main__":
    data.command(lambda: main(sys.argv[1:]))
