"""Train EZ-CLIP on folders of frames, and evaluate it.

    python train.py --data ucf101_frames                       # train, then evaluate
    python train.py --data ucf101_frames --resume              # the same command goes on
    python train.py --data hmdb51_frames --checkpoint runs/ucf101_frames/last.pt --eval-only
    python train.py --data ucf101_frames --eval-only --out runs/plain   # CLIP, nothing learnt
    torchrun --nproc-per-node 4 train.py --data ucf101_frames  # on four GPUs

A run's folder, runs/<data> or --out, receives last.pt, log.csv, results.json and predictions.csv.
Another program makes `args = parser().parse_args(["--out", folder, ...])`, takes Splits of clips
from data.index_frames and calls `run(args, split, {"name": test})`, or its parts:
build_model(args), train(model, split, args) and evaluate(model, test, args).
"""

import argparse
import contextlib
import csv
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

import data
from clip_tokenizer import tokenize
from data import at_least
from ezclip import EZCLIP, class_probabilities, contrastive_loss, motion_loss, read_weights

SAVE_SECONDS = 600  # between checkpoints within an epoch

# Flags that a resumed run may change: they touch its result by rounding at most, or what they name
# is compared: clips, by their names, and texts (data_sha256), CLIP (clip_sha256).
FREE = {"out", "resume", "workers", "device", "compile", "recompute", "eval_every", "eval_only",
        "data", "train_list", "test_list", "labels", "allow_missing", "descriptions", "templates",
        "clip", "checkpoint"}


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


# ---- one process or several ----

@contextlib.contextmanager
def torchrun():
    """For a program's main, as @torchrun(): join the other processes, if torchrun has started this
    one, each on a GPU if there are enough. Only the first one prints and writes."""
    if "RANK" not in os.environ or dist.is_initialized():
        yield
        return
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
    enough = gpus >= int(os.environ["LOCAL_WORLD_SIZE"])
    dist.init_process_group("cpu:gloo,cuda:nccl" if enough else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")
        warnings.simplefilter("ignore")
    yield
    if enough:  # else nccl complains; but gloo, of PyTorch 2.5, can hang in it, as after a failure
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def my_pieces(things, size):
    """Those pieces of a list, `size` long but for the last one, that this process works on."""
    pieces = [things[k:k + size] for k in range(0, len(things), size)]
    first = rank() * len(pieces) // processes()
    stop = (rank() + 1) * len(pieces) // processes()
    return pieces[first:stop]


def add_up(tensor):
    """Make a tensor the sum of those of all processes. OSError where one of them has ended."""
    if dist.is_initialized():
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            if "DataLoader" in str(error):  # it is a loading process of our own
                raise
            if rank() > 1:  # one or two may say so
                sys.exit(2)
            raise OSError(f"another process has ended: {error}") from None


def check_alike(what, *things):
    """ValueError, which says `what`, unless all processes have the same things."""
    here = torch.tensor([*hashlib.sha256(repr(things).encode()).digest()])
    everywhere = here.clone()
    add_up(everywhere)
    if not torch.equal(everywhere, here * processes()):
        raise ValueError(f"{what} are not the same on all machines")


def add_model_flags(p):
    """The flags that other programs share: of the model, and of the texts of classes."""
    flag, count = p.add_argument, at_least(1)
    flag("--clip", help="ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px or a file (ViT-B/16)")
    flag("--checkpoint", help="weights to start from: a last.pt or one of the official code")
    flag("--activation", choices=("quick_gelu", "gelu"),
         help="gelu for open_clip's models not named -quickgelu (the file's, or quick_gelu)")
    flag("--vision-heads", type=count, help="heads of the vision tower (the file's, or width / 64)")
    flag("--text-heads", type=count, help="heads of the text tower (the file's, or width / 64)")
    flag("--mean", type=float, nargs=3, help="mean of the pixels' RGB (the file's, or CLIP's)")
    flag("--std", type=float, nargs=3, help="their standard deviation (the file's, or CLIP's)")
    flag("--num-frames", type=count, help="frames per clip (8, or the checkpoint's)")
    flag("--prompts", choices=("deep", "shallow", "none"),
         help="temporal prompts in all layers, in the first, or none (deep, or the checkpoint's)")
    flag("--no-adapters", action="store_true", help="leave out the adapters")
    flag("--temporal-adapter", action="store_true",
         help="the official code's ablation: attention over time at every token")
    flag("--descriptions", metavar="FILE", help="texts of classes: CSV number,name,text or JSON")
    flag("--templates", nargs="+", metavar="TEXT", type=template,
         help="texts with {} for the name (the 16 of the official code; {} with --descriptions)")
    device = "cpu"
    if torch.backends.mps.is_available() and not dist.is_initialized():
        device = "mps"
    if torch.cuda.is_available():
        device = "cuda"
    flag("--device", type=usable_device, default=device,
         help="cuda, cuda:1, mps or cpu (%(default)s)")
    flag("--precision", choices=("fp32", "bf16"), help="of the model (bf16 on cuda, else fp32)")


def parser():
    """The flags of a run; what is in parentheses in their help is the default."""
    p = data.Parser(allow_abbrev=False, description="Train EZ-CLIP. Defaults are in parentheses.")
    flag, count, rate = p.add_argument, at_least(1), at_least(0, float)
    # data
    flag("--data", help="folder of frames: <class>/<clip>/img_00001.jpg")
    flag("--train-list", help="training clips: lines <clip> [<number of frames>] <label>")
    flag("--test-list", help="test clips, likewise")
    flag("--labels", help="names of the labels in lists: CSV id,name")
    flag("--allow-missing", action="store_true", help="leave out listed clips that are not there")
    flag("--no-flip", action="store_true",
         help="no horizontal flips (off anyway where a class name has left or right)")
    flag("--no-augment", action="store_true", help="no random crops, flips and colours")
    # model
    add_model_flags(p)
    flag("--tune", choices=("new", "all"), default="new",
         help="train prompts and adapters only, or CLIP too (%(default)s)")
    # optimisation
    flag("--epochs", type=count, default=50, help="passes over all clips (%(default)s)")
    flag("--batch-size", type=count, default=70, help="clips per step (%(default)s)")
    flag("--lr", type=rate, default=5e-5, help="peak learning rate (%(default)s)")
    flag("--prompt-lr", type=rate, help="peak learning rate of the prompts (--lr)")
    flag("--weight-decay", type=rate, default=0.2, help="weight decay of AdamW (%(default)s)")
    flag("--warmup-epochs", type=rate, default=5,
         help="linear warm-up, at most a tenth of all steps (%(default)s)")
    flag("--motion-weight", type=rate, default=1.0, help="weight of the motion loss (%(default)s)")
    flag("--seed", type=at_least(0), default=0, help="random seed (%(default)s)")
    # the run
    flag("--out", help="folder of the run (runs/<data>)")
    flag("--resume", action="store_true", help="go on with the run in --out, if there is one")
    flag("--eval-only", action="store_true", help="do not train")
    flag("--eval-every", type=count, help="epochs between evaluations (only at the end)")
    flag("--workers", type=at_least(0), default=min(8, os.cpu_count()),
         help="processes that load clips (%(default)s)")
    flag("--compile", action="store_true", help="let torch.compile speed the model up")
    flag("--chunk", type=count, metavar="N", help="encode N clips at a time, each twice: a "
         "batch takes the memory of N clips (the batch, or each process's share)")
    flag("--recompute", action="store_true", help="gradient checkpointing: less memory, more time")
    return p


def build_model(args):
    """The model of the flags on its device, as --clip or --checkpoint has it."""
    given = {"recompute": args.recompute}
    # what no flag says is said by the checkpoint, or else by Config
    for name in ("activation", "vision_heads", "text_heads", "mean", "std", "prompts",
                 "temporal_adapter"):
        value = getattr(args, name)
        if value:
            given[name] = tuple(value) if isinstance(value, list) else value
    if args.no_adapters:
        given["adapters"] = False
    if args.eval_only and not args.checkpoint and not args.prompts:
        print("no --checkpoint: this is plain CLIP, without prompts and adapters")
        given.update(prompts="none", adapters=False)

    torch.manual_seed(args.seed)  # of the new modules
    if args.checkpoint:
        given["clip"] = args.clip  # where the one that it names is now
    start = args.checkpoint or args.clip or "ViT-B/16"
    model = EZCLIP.from_pretrained(start, args.num_frames, **given)
    if args.checkpoint and not model.weights_adapted:
        raise ValueError(f"{start}: is plain CLIP, to be given as --clip")
    if args.eval_only and not model.weights_adapted and model.config.prompts != "none":
        data.warn("the temporal prompts are random: no file holds any")
    if model.config.vocab_size != 49408:
        raise ValueError(f"{model.weights_path}: its vocabulary of {model.config.vocab_size} is "
                         "not clip_tokenizer's: from Python, give encode_text ids (docs/deploy.md)")
    if args.tune == "new":
        model.freeze_backbone()
    if args.compile:
        model.visual.compile()
        model.transformer.compile()
    return model.to(args.device)


def trained(model):
    """{name: parameter} of what is trained."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def templates_of(args):
    """The texts with {} for a class: given, or those that go with names or with descriptions."""
    return args.templates or (["{}"] if args.descriptions else data.TEMPLATES)


def tokens_of(classes, args, context_length=77):
    """Token ids of every template and class, (templates, classes, L)."""
    templates, descriptions = templates_of(args), {}
    if args.descriptions:
        descriptions = data.read_descriptions(args.descriptions)
    tokens = []
    for name in classes:
        text = data.class_text(name)
        if args.descriptions:
            text = descriptions.get(data.find_name(name, descriptions))
        if text is None:
            raise ValueError(f"{args.descriptions}: has no description of {name}")
        try:
            filled = [template.replace("{}", text) for template in templates]
            tokens.append(tokenize(filled, context_length))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return torch.stack(tokens, 1)


def without_padding(tokens):
    """Token ids cut to the longest text: of OpenAI's 77 most are padding, which in a causal tower
    changes nothing and takes its time."""
    return tokens[..., :tokens.argmax(-1).max() + 1]


def autocast(args):
    """The precision of the model: bf16, by default on CUDA, or fp32."""
    device = args.device.split(":")[0]
    precision = args.precision or ("bf16" if device == "cuda" else "fp32")
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def finite(features):
    """The features, unless they are not finite, which is a ValueError."""
    if not features.isfinite().all():
        raise ValueError("the model's features are not finite: its weights are broken")
    return features


def encode_classes(classes, args, model, context_length=None):
    """Features of every template and class, (templates, classes, E)."""
    tokens = tokens_of(classes, args, context_length or model.config.context_length)
    with autocast(args):
        parts = []
        for part in tokens.flatten(0, 1).split(512):
            parts.append(model.encode_text(without_padding(part).to(args.device)))
    return finite(torch.cat(parts)).unflatten(0, tokens.shape[:2])


def encode_clips(videos, args, model):
    """Features of videos (B, T, 3, S, S), pooled in fp32: (B, E)."""
    with autocast(args):
        frames = model.encode_frames(videos.to(args.device))
    return finite(model.pool(frames.float()))


@torch.inference_mode()
def evaluate(model, split, args):
    """Zero-shot classification of every clip of a Split.

    Returns {"top1", "top5"} in per cent, {"n", "classes", "split"}, and {"predictions"}, a dict for
    each clip: clip, class, and the at most five best classes with their probabilities, class1, p1
    and so on.
    """
    model.eval()
    dataset = data.Clips(split, model.config.num_frames, model.config.image_size)
    n = len(dataset)
    batches = my_pieces([(0, i) for i in range(n)], args.batch_size)  # keys (epoch, clip)
    texts = encode_classes(split.classes, args, model)

    probabilities = torch.zeros(n, len(split.classes))  # other processes' are added in the end
    bar = tqdm(data.loader(dataset, batches, args.workers), "test", len(batches), leave=False,
               disable=rank() > 0 or None)  # None: unless this is a terminal
    for videos, _, indices in bar:
        features = encode_clips(videos, args, model)
        probabilities[indices] = class_probabilities(features, texts).cpu()
    add_up(probabilities)

    p, best = probabilities.topk(min(5, len(split.classes)))  # (n, 5)
    predictions, top1, top5 = [], 0, 0
    for i, (clip, label) in enumerate(split.clips):
        top1 += label == best[i, 0].item()
        top5 += label in best[i]
        row = {"clip": clip, "class": split.classes[label]}
        for k in range(best.shape[1]):
            row[f"class{k + 1}"] = split.classes[best[i, k]]
            row[f"p{k + 1}"] = p[i, k].item()
        predictions.append(row)
    return {"top1": round(100 * top1 / n, 2), "top5": round(100 * top5 / n, 2), "n": n,
            "classes": len(split.classes), "split": split.source, "predictions": predictions}


def write(path, save):
    """Write a file as a whole or not at all: save(temporary file), flush to the disk, rename."""
    if rank():
        return
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # the second is torch.save's for a full disk
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{path}: cannot be written ({reason}); nothing was changed") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path, rows):
    """A table of dicts; what a row lacks stays empty."""
    header = {}  # in the order in which columns appear
    for row in rows:
        header.update(row)
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(header)
    for row in rows:
        cells = [row.get(key, "") for key in header]
        table.writerow(f"{cell:.6g}" if isinstance(cell, float) else cell for cell in cells)
    write(path, lambda file: file.write(text.getvalue().encode("utf-8", "surrogateescape")))


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
    """A fraction of the peak: (step + 1) / warmup at first, then, from a step before it ends, a
    cosine whose peak is in step `warmup`, to 0."""
    if step + 1 < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def make_optimizer(weights, args):
    """AdamW, with CLIP's settings; prompts may have a learning rate of their own."""
    prompt_lr = args.lr if args.prompt_lr is None else args.prompt_lr
    others = {"params": [], "peak": args.lr}
    prompts = {"params": [], "peak": prompt_lr}
    for name, parameter in weights.items():
        group = prompts if "prompts" in name else others
        group["params"].append(parameter)
    return torch.optim.AdamW([others, prompts], betas=(0.9, 0.98), eps=1e-8,
                             weight_decay=args.weight_decay)


@contextlib.contextmanager
def stop_signals():
    """Within it Ctrl-C and SIGTERM only fill a list; a second Ctrl-C ends at once."""
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def load_run(path, identity, weights, optimizer):
    """Load weights and optimizer of the last.pt of a run that goes on.

    Returns its step, the rows of its log and the sums of its epoch. ValueError names what differs
    from `identity`: flags that change the result, clips and texts, CLIP.
    """
    saved = read_weights(path)
    try:
        for flag in sorted(saved["args"].keys() | identity["args"].keys()):
            before, now = saved["args"].get(flag), identity["args"].get(flag)
            if flag not in FREE and now != before:
                flag = flag.replace("_", "-")
                raise ValueError(f"{path}: the run has --{flag} {before}, not {now}; "
                                 "--resume keeps it")
        if saved["data_sha256"] != identity["data_sha256"]:
            raise ValueError(f"{path}: the run had other training clips or texts than these")
        if saved["clip_sha256"] != identity["clip_sha256"]:
            raise ValueError(f"{path}: the run had another CLIP than {identity['clip']}")
        with torch.no_grad():
            for name, parameter in weights.items():
                parameter.copy_(saved["state_dict"][name])
        optimizer.load_state_dict(saved["optimizer"])
        return saved["step"], saved["rows"], dict(saved["sums"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: is no checkpoint of a run, or a damaged one ({error})") from None


def save_run(path, content, weights, optimizer):
    """Write what `load_run` reads. ArithmeticError for weights that are no longer finite, which the
    last update may have made so although its loss was."""
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise ArithmeticError(f"step {content['step']}: the weights are no longer finite, and not "
                              "saved; a lower --lr may help")
    state = {name: weight.detach() for name, weight in weights.items()}
    content = content | {"state_dict": state, "optimizer": optimizer.state_dict()}
    write(path, lambda file: torch.save(content, file))


def seed_draws(*numbers):
    torch.manual_seed(np.random.SeedSequence(numbers).generate_state(1).item())


def take_step(model, videos, tokens, labels, chunk, args, step):
    """Leave the gradients of a step in the weights; returns the losses of its batch by names, of
    which "loss" is the total.

    tokens: (B, L), labels: (B,). The batch is encoded in pieces of `chunk` clips; videos are those
    of this process's pieces, (b, T, 3, S, S).

    The loss compares all clips with each other, but only by their features. So the step is split
    there: each piece is encoded, the loss gives the gradient of the features, and each piece is
    encoded once more, with the same draws, to lead its part on to the weights. No more memory is
    needed than for one piece (Gao et al. 2021). The last piece is not encoded again.
    """
    pieces, videos = my_pieces(range(len(labels)), chunk), videos.split(chunk)

    def encode(piece, video):
        seed_draws(args.seed, step, 1 + piece.start // chunk)  # from 1 on: 0 is (seed, step)
        text = without_padding(tokens[piece.start:piece.stop])
        with autocast(args):
            frames = model.encode_frames(video.to(args.device, non_blocking=True))
            texts = model.encode_text(text.to(args.device))
        return torch.cat([frames, texts[:, None]], 1).float()  # (b, T + 1, E), for one exchange

    # features; those of other processes are zeros until they are added up
    features = torch.zeros(len(labels), model.config.num_frames + 1, model.config.embed_dim,
                           device=args.device)
    for piece, video in zip(pieces, videos):
        # with a graph, though it is thrown away: what torch.compile makes of no_grad draws otherwise
        encoded = None  # frees the graph of the piece before
        encoded = encode(piece, video)
        features[piece.start:piece.stop] = encoded.detach()
    add_up(features)

    # the loss, and back to the features
    features.requires_grad_()
    frames = features[:, :-1]
    seed_draws(args.seed, step)  # alike in all processes, should somebody's pool draw
    logits = model.similarity(model.pool(frames), features[:, -1])
    contrastive = contrastive_loss(logits, labels.to(args.device))
    motion = motion_loss(frames)
    loss = contrastive + args.motion_weight * motion
    loss.backward()
    if rank():  # what lies behind the features has its gradient in every process: it counts once
        model.zero_grad()

    # back to the weights
    for piece, video in reversed([*zip(pieces, videos)]):
        if encoded is None:
            encoded = encode(piece, video)
        if encoded.requires_grad:  # else nothing before the features is trained
            encoded.backward(features.grad[piece.start:piece.stop])
        encoded = None
    weights = trained(model).values()
    for weight in weights:
        if weight.grad is None:  # this process had no clip
            weight.grad = torch.zeros_like(weight)
    if processes() > 1:
        gradients = [weight.grad for weight in weights]
        flat = parameters_to_vector(gradients)  # for a single exchange
        add_up(flat)
        vector_to_parameters(flat, gradients)
    return {"loss": loss.item(), "contrastive": contrastive.item(), "motion": motion.item()}


def train(model, split, args, tests=None):
    """Train on the clips of a Split, or with --resume go on where last.pt in --out stands.

    Writes last.pt and log.csv there, with accuracies on `tests`, {name: Split}, where --eval-every
    asks for them. Returns the rows of log.csv, one per epoch. No random state has to be kept: a
    step's is a function of (seed, step), a clip's of (seed, epoch, clip). So a resumed run takes
    the very steps of one that was never stopped.
    """
    out, clips, weights = Path(args.out), split.clips, trained(model)
    out.mkdir(parents=True, exist_ok=True)
    tokens = tokens_of(split.classes, args, model.config.context_length)  # (templates, classes, L)
    words = " ".join(map(data.class_text, split.classes))
    flip = not args.no_flip and not re.search(r"(?<![a-z])(left|right)(?![a-z])", words)
    dataset = data.Clips(split, model.config.num_frames, model.config.image_size, train=True,
                         augment=not args.no_augment, flip=flip, seed=args.seed)
    print(f"training {sum(p.numel() for p in weights.values()):,} parameters on {args.device}, "
          f"{len(clips)} clips of {len(split.classes)} classes, with{'' if flip else 'out'} flips")

    per_epoch = max(1, len(clips) // args.batch_size)
    total = args.epochs * per_epoch
    warmup = min(args.warmup_epochs * per_epoch, total / 10)
    chunk = args.chunk or math.ceil(args.batch_size / processes())
    optimizer = make_optimizer(weights, args)

    # what last.pt holds beside weights and optimizer
    digest = hashlib.sha256(repr(clips).encode() + tokens.numpy().tobytes()).hexdigest()
    identity = {"args": {**vars(args), "chunk": chunk}, "classes": split.classes,
                "data_sha256": digest, "clip": model.weights_path,
                "clip_sha256": model.weights_sha256, "config": asdict(model.config)}
    step, rows, sums = 0, [], {}  # sums of the epoch: losses, seconds, and those of waiting
    if args.resume and (out / "last.pt").exists():
        step, rows, sums = load_run(out / "last.pt", identity, weights, optimizer)
        print(f"resumed at step {step} of {total}")
    check_alike(f"{out}: files there", step)

    # of each batch the clips of this process's pieces are loaded ahead; of none a clip, that is not
    # used, to keep step
    steps, ahead = itertools.tee(batches(len(clips), args.batch_size, step, total, args.seed))
    shares = (list(itertools.chain(*my_pieces(batch, chunk))) or batch[:1] for batch in ahead)
    stream = data.loader(dataset, shares, args.workers, args.device.startswith("cuda"))
    bar = tqdm(stream, "train", total, initial=step, unit="step", disable=rank() > 0 or None)
    clock = saved_at = time.monotonic()
    with stop_signals() as stopped:
        for batch, (videos, _, _) in zip(steps, bar):
            # templates and learning rates
            waiting = time.monotonic() - clock  # for clips
            add_up(torch.tensor(0))  # raises where a process has died, as GPUs' exchanges do not
            labels = torch.tensor([clips[i][1] for _, i in batch])
            seed_draws(args.seed, step)
            drawn = torch.randint(len(tokens), labels.shape)  # a template for each clip
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * learning_rate(step, warmup, total)

            # forward and backward
            model.train()
            optimizer.zero_grad()
            losses = take_step(model, videos, tokens[drawn, labels], labels, chunk, args, step)
            if not math.isfinite(losses["loss"]):
                names = ", ".join(clips[i][0] for _, i in batch)
                raise ArithmeticError(f"step {step}: the loss is {losses['loss']}, a lower --lr "
                                      f"may help; clips: {names}")
            optimizer.step()
            step += 1
            now = time.monotonic()
            for name, value in {**losses, "seconds": now - clock, "waiting": waiting}.items():
                sums[name] = sums.get(name, 0.0) + value
            share = sums["waiting"] / sums["seconds"]
            bar.set_postfix_str(f"loss {losses['loss']:.3f}, {share:.0%} waiting for clips", False)

            # once per epoch: log, and evaluate
            if step % per_epoch == 0:
                row = {"epoch": step // per_epoch, "lr": optimizer.param_groups[0]["lr"],
                       "seconds": sums["seconds"],
                       "clips/s": per_epoch * len(batch) / sums["seconds"]}
                for name in losses:
                    row[name] = sums[name] / per_epoch
                if args.eval_every and row["epoch"] % args.eval_every == 0 and step < total:
                    for name, test in (tests or {}).items():
                        result = evaluate(model, test, args)
                        row[f"{name} top1"] = result["top1"]
                        row[f"{name} top5"] = result["top5"]
                rows.append(row)
                sums = {}
                write_csv(out / "log.csv", rows)

            # once in a while: save
            stop = torch.tensor(len(stopped))
            add_up(stop)  # all processes stop after the same step
            if step % per_epoch == 0 or stop or now - saved_at > SAVE_SECONDS:
                progress = {"step": step, "rows": rows, "sums": sums}
                save_run(out / "last.pt", identity | progress, weights, optimizer)
                saved_at = now
            if stop and rank():
                sys.exit(130)  # the first one says so
            if stop:
                raise KeyboardInterrupt(f"stopped; step {step} of {total} is saved: the same "
                                        "command with --resume goes on")
            clock = time.monotonic()
    return rows


def run(args, split, tests, command=""):
    """One run: train on a Split, unless --eval-only, and evaluate on others, {name: Split}.

    Returns what results.json in --out holds. Predictions lie beside it or, if there are several
    test sets, in a folder each.
    """
    out = Path(args.out)
    if not args.resume and any((out / f).exists() for f in ("last.pt", "log.csv", "results.json")):
        raise ValueError(f"{out}: holds a run; --resume continues it, another --out starts one")
    if args.resume and args.eval_only and (out / "last.pt").exists():
        raise ValueError(f"{out}: holds a training run, which --eval-only would write over")
    if not args.eval_only and not split.clips:
        raise ValueError(f"{split.root}: no training clips")
    if args.eval_only and not tests:
        raise ValueError(f"{split.root}: no test clips")
    model = build_model(args)
    trainable = sum(p.numel() for p in trained(model).values())
    if not (trainable or args.eval_only):
        raise ValueError("nothing to train: no prompts, no adapters, no --tune all")
    for test in tests.values():  # a bad text is to show now, not after hours
        tokens_of(test.classes, args, model.config.context_length)
    check_alike(f"{out}: its clips, classes or CLIP", split, tests, model.weights_sha256)

    rows, results = [], {}
    if not args.eval_only:
        rows = train(model, split, args, tests)
    for name, test in tests.items():
        result = evaluate(model, test, args)
        folder = out if len(tests) == 1 else out / name
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(folder / "predictions.csv", result.pop("predictions"))
        print(f"{name}: top-1 {result['top1']:.1f} %, top-5 {result['top5']:.1f} %, "
              f"n = {result['n']}, {result['classes']} classes", flush=True)
        results[name] = result
        if rows:
            rows[-1][f"{name} top1"] = result["top1"]
            rows[-1][f"{name} top5"] = result["top5"]
            write_csv(out / "log.csv", rows)
    seconds = round(sum(row["seconds"] for row in rows), 1)
    return write_results(args, command, trainable=trainable, seconds=seconds, results=results)


def write_results(args, command, **content):
    """Write results.json into --out and return what it holds."""
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "torchvision": torchvision.__version__, "numpy": np.__version__}
    content = {"command": command, "seed": args.seed, "versions": versions, "device": args.device,
               **content}
    text = json.dumps(content, indent=1) + "\n"
    write(Path(args.out) / "results.json", lambda file: file.write(text.encode()))
    return content


@torchrun()
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    if not args.data:
        raise ValueError("--data is needed, a folder of frames")
    name = Path(args.data).resolve().name
    args.out = args.out or f"runs/{name}"
    train_split, test_split = data.index_frames(args.data, args.train_list, args.test_list,
                                                args.labels, args.allow_missing)
    tests = {name: test_split}
    if not test_split.clips:
        data.warn("there are no test clips")
        tests = {}
    content = run(args, train_split, tests, shlex.join(["python", "train.py", *argv]))
    print(f"pictures of it: python examples/plots.py {shlex.quote(args.out)}")
    return content


if __name__ == "__main__":
    data.command(main)
