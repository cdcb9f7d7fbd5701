"""Name the actions in videos, with CLIP or with what was trained.

    python examples/predict.py video.mp4 --clip ViT-B/16 \\
        --class-names "arm wrestling" "flipping a pancake"
    python examples/predict.py video.mp4 frames/Archery/clip1 \\
        --checkpoint runs/ucf101_frames/last.pt --picture seen.png

Names may come from a file, a name per line, and are by default those of the checkpoint's training;
the five best are printed, with --json as one document. --picture shows the frames of each video
and what their class tokens attend to.
"""

import contextlib
import json
import math
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import ezclip
import plots
import prepare
import train


# ---- for the other examples too: names to choose from, and one document ----

def add_flags(p):
    """The flags of a program in which a model chooses from names. What they leave open is as in a
    run of train.py that does not train."""
    p.set_defaults(**vars(train.parser().parse_args(["--eval-only"])))
    p.add_argument("--class-names", nargs="+", default=[], metavar="NAME",
                   help="the names to choose from, or a file of names (those of the checkpoint's "
                   "training)")
    train.add_model_flags(p)


def classes_of(args):
    """The names of --class-names, of the file that stands there, or of the checkpoint's training.
    ValueError for two given that are the same in words: CLIP sees no difference between them."""
    names = args.class_names
    if not names and args.checkpoint:
        saved = ezclip.read_weights(args.checkpoint).get("classes")
        if isinstance(saved, list) and saved:
            return [*map(str, saved)]
    if len(names) == 1 and (names[0].endswith((".txt", ".csv")) or os.path.isfile(names[0])):
        names = data.read_labels(names[0]).values()
    known = {}
    for name in names:
        words = data.class_text(name)
        if words in known:
            raise ValueError(f"--class-names has {words} twice, in {known[words]} and in {name}")
        known[words] = name
    if not known:
        where = f"{args.checkpoint}: names no classes, " if args.checkpoint else ""
        raise ValueError(f"{where}--class-names is needed, the names to choose from or their file")
    return [*known.values()]


def best(classes, probabilities):
    """The at most five best classes, as --json has them."""
    order = probabilities.argsort(descending=True, stable=True)[:5].tolist()
    return [{"class": classes[k], "probability": round(probabilities[k].item(), 6)} for k in order]


def report(program, args):
    """Call program(args); with --json what it returns is all that comes to lie on stdout."""
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        content = program(args)
    if args.json:
        print(json.dumps(content, indent=1))
    return content


# ---- what the model sees and attends to ----

def load_video(path, num_frames, image_size):
    """A folder of frames, or a video file, as a clip: see `data.load_clip`."""
    if os.path.isdir(path):
        return data.load_clip(path, num_frames, image_size)
    # of a film, however long, only the frames that are needed are kept
    chosen = np.unique(data.sample_frames(prepare.count_frames(path), num_frames))
    complaints = []
    with tempfile.TemporaryDirectory() as folder:
        prepare.write_frames(prepare.video_frames(path, complaints, chosen), folder)
        if complaints:
            data.warn(f"damaged {path}: {complaints[-1]}")
        return data.load_clip(folder, num_frames, image_size)


def attention_maps(model, video):
    """The attention of each frame's class token in every layer, from one ordinary pass.

    Returns the frame features of `encode_frames`, (B, T, E), and the weights of the softmax,
    (B, T, layers, H, L+1), without gradient: for the class token itself, for the patches row by
    row, and last for the temporal prompt token, which is 0 in layers without one.
    """
    blocks = model.visual.transformer.resblocks
    inputs = {}

    def keep(attention, args):  # of a block's last call, the one over the tokens of each frame
        inputs[attention] = args

    with contextlib.ExitStack() as hooks:  # leaves the model without them, whatever happens
        for block in blocks:
            hooks.enter_context(block.attn.register_forward_pre_hook(keep))
        features = model.encode_frames(video)
    L = len(model.visual.positional_embedding)
    maps = []
    for block in blocks:
        weights = class_token_attention(block.attn, *inputs[block.attn])  # (B*T, H, L or L+1)
        maps.append(F.pad(weights, (0, L + 1 - weights.shape[-1])))
    return features, torch.stack(maps, 1).unflatten(0, video.shape[:2])


@torch.no_grad()
def class_token_attention(attention, queries, tokens):
    """What the class token, the first query, reads: (N, Q, D), (N, L, D) -> (N, H, L)"""
    def split_heads(x):  # (N, L, D) -> (N, H, L, D/H)
        return x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)

    weight_q, weight_k, _ = attention.in_proj_weight.chunk(3)
    bias_q, bias_k, _ = attention.in_proj_bias.chunk(3)
    q = split_heads(F.linear(queries[:, :1], weight_q, bias_q))
    k = split_heads(F.linear(tokens, weight_k, bias_k))
    logits = q @ k.mT / math.sqrt(q.shape[-1])  # (N, H, 1, L)
    return logits.softmax(-1).squeeze(2)


# ---- the picture ----

def plot_predictions(path, videos):
    """For each of (title, clip, attention maps): its frames, and under each of them the attention
    of its class token to the patches and, layer by layer, to the temporal prompt token."""
    _, _, maps = videos[0]
    T, layers = maps.shape[:2]
    side = min(max(1, 4 / T), 7.6 / T)  # of a frame, in inches
    heights = {"frames": side, "patches": max(side, 1)}  # of rows
    if maps[..., -1].any():  # else the model has no prompts
        heights["prompt"] = max(0.08 * layers, 1)
    mosaic = []
    for i in range(len(videos)):
        for row in heights:
            mosaic.append([f"{row} {i}", f"{row} bar {i}"])
    fig, axes = plots.figure(
        side * T + 1.5, (sum(heights.values()) + 0.9) * len(videos), mosaic,
        height_ratios=[*heights.values()] * len(videos), width_ratios=[side * T, 0.1])
    for i, (title, clip, maps) in enumerate(videos):
        own = {row: (axes[f"{row} {i}"], axes[f"{row} bar {i}"]) for row in heights}
        draw_video(fig, own, title, clip, 100 * maps.mean(2).numpy())  # of the heads, in per cent
    plots.save_figure(fig, path)


def draw_video(fig, rows, title, clip, maps):
    """One video in its rows, each an axis and that of its colour bar. maps: (T, layers, L+1)"""
    T, layers, tokens = maps.shape
    grid = math.isqrt(tokens - 2)  # without the class token and the prompt
    patches = maps[:, -1, 1:-1].reshape(T, grid, grid)
    style = dict(cmap="cividis", vmin=0, aspect="auto", interpolation="nearest")
    top = np.quantile(patches, 0.995)  # a single bright patch would darken all others
    for axis, _ in rows.values():
        axis.set(xlim=(0.5, T + 0.5), xticks=[], yticks=[])
        axis.spines[:].set_visible(False)

    frames, beside_frames = rows["frames"]
    frames.set_title(plots.printable(title), fontsize=10, wrap=True)
    beside_frames.axis("off")
    patch_axis, patch_bar = rows["patches"]
    patch_axis.set_ylabel("last\nlayer")
    for t in range(T):
        box = (t + 0.52, t + 1.48, 0, 1)
        frames.imshow(clip[t].permute(1, 2, 0).numpy(), extent=box, aspect="auto")
        image = patch_axis.imshow(patches[t], extent=box, vmax=top, **style)
    fig.colorbar(image, patch_bar, label="attention to\npatch (%)", extend="max")

    lowest = patch_axis
    if "prompt" in rows:
        lowest, prompt_bar = rows["prompt"]
        box = (0.5, T + 0.5, layers + 0.5, 0.5)
        image = lowest.imshow(maps[..., -1].T, extent=box, **style)
        lowest.set(ylabel="layer", yticks=range(1, layers + 1, 1 + layers // 8))
        fig.colorbar(image, prompt_bar, label="attention to\nprompt (%)")
    lowest.set(xlabel="frame", xticks=range(1, T + 1))


# ---- predictions ----

@torch.inference_mode()
def predict(args):
    """Print the at most five best classes of each video; returns what --json prints."""
    for video in args.videos:  # errors are to show before a model is loaded
        if not os.path.exists(video):
            raise ValueError(f"{video}: no such video, nor folder of frames")
    plots.check_target(args.picture)
    classes = classes_of(args)
    model = train.build_model(args)
    config = model.config
    texts = train.encode_classes(classes, args, model)
    width = max(map(len, classes))
    videos, pictures = [], []
    for video in args.videos:
        clip = load_video(video, config.num_frames, config.image_size)
        with train.autocast(args):
            frames, maps = attention_maps(model, clip[None].to(args.device))
        features = train.finite(model.pool(frames.float()))  # (1, E)
        probabilities = ezclip.class_probabilities(features, texts)[0].cpu()

        print(video)
        answers = best(classes, probabilities)
        for answer in answers:
            print(f"  {answer['class']:<{width}}  {100 * answer['probability']:5.1f} %", flush=True)
        videos.append({"video": video, "classes": answers})
        if args.picture:
            title = f"{Path(video).name}: {answers[0]['class']}, {100 * probabilities.max():.1f} %"
            pictures.append((title, clip, maps[0].float().cpu()))
    if args.picture:
        plot_predictions(args.picture, pictures)
    return {"clip": model.weights_path, "checkpoint": args.checkpoint,
            "num_frames": config.num_frames, "prompts": config.prompts, "videos": videos}


def main(argv=None):
    p = data.Parser(allow_abbrev=False, description="Name the actions in videos.")
    flag = p.add_argument
    flag("videos", nargs="+", metavar="VIDEO", help="a video, or a folder of frames")
    flag("--json", action="store_true", help="predictions as JSON; all else goes to stderr")
    flag("--picture", metavar="FILE", help="a PNG of the frames and the class token's attention")
    add_flags(p)
    report(predict, p.parse_args(argv))


if __name__ == "__main__":
    data.command(main)
