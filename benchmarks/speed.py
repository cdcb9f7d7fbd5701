"""Speed and memory of the model, beside a naive one, OpenAI's CLIP and Hugging Face's.

    python benchmarks/speed.py                                    # ViT-B/16, 8 frames
    python benchmarks/speed.py --models ViT-B/32 ViT-L/14 --num-frames 8 16 32 --json speed.json
    python benchmarks/speed.py --grid docs/speed.png              # clips/s against T and batch

Weights are random, which changes no time. Runs of all that is compared are interleaved; times are
medians. "products" is the time of the matrix products that the work consists of, alone, in the same
shapes; TFLOP/s count these products, and "of peak" compares them with one large product. Memory is
what a child process needs beyond its weights and inputs: CUDA's allocator tells, or the resident
set, for which malloc has to return to the system what is freed.
"""

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import torch
from naive import Naive

import train
from ezclip import EZCLIP, Config, contrastive_loss, motion_loss

SIZES = {  # of Config
    "ViT-B/32": dict(patch_size=32),
    "ViT-B/16": dict(),
    "ViT-L/14": dict(patch_size=14, vision_width=1024, vision_layers=24, embed_dim=768,
                     text_width=768)}
TEXTS, LONGEST = 512, 16  # what evaluation encodes at once; tokens of the longest of them


# ---- what is run ----

def tokens(count):
    """Texts (count, 77) that end after 8 to LONGEST tokens, like class names in templates."""
    ids = torch.randint(1, 40000, (count, 77))
    end = torch.randint(7, LONGEST, (count, 1))
    end[0] = LONGEST - 1
    return ids.masked_fill_(torch.arange(77) > end, 0).scatter_(1, end, 49407)


def openai(config):
    """OpenAI's code from its package, which cannot be imported where pkg_resources is gone."""
    found = importlib.util.find_spec("clip")
    path = Path(next(iter(found.submodule_search_locations)), "model.py") if found else None
    if not path or not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location("openai_clip", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = config
    return module.CLIP(c.embed_dim, c.image_size, c.vision_layers, c.vision_width, c.patch_size,
                       77, c.vocab_size, c.text_width, c.text_width // 64, c.text_layers).float()


def hugging_face(config):
    if not importlib.util.find_spec("transformers"):
        return None
    from transformers import CLIPConfig, CLIPModel
    c, common = config, dict(projection_dim=config.embed_dim)
    vision = dict(hidden_size=c.vision_width, intermediate_size=4 * c.vision_width,
                  num_hidden_layers=c.vision_layers, num_attention_heads=c.vision_width // 64,
                  image_size=c.image_size, patch_size=c.patch_size)
    text = dict(hidden_size=c.text_width, intermediate_size=4 * c.text_width,
                num_hidden_layers=c.text_layers, num_attention_heads=c.text_width // 64)
    return CLIPModel(CLIPConfig(text_config=text | common, vision_config=vision | common, **common))


def prepared(who, what, name, T, args, batch=None):
    """A function that does a piece of work once, or None where its code is not installed."""
    config = Config(**SIZES[name], num_frames=T, recompute=who == "recompute")
    build = {"openai": openai, "transformers": hugging_face}.get(who, EZCLIP)
    if what != "encode_video" and build is not EZCLIP or what != "step" and "chunk" in who:
        return None
    torch.manual_seed(0)
    model, B = build(config), batch or args.batch_size
    if model is None:
        return None
    model = Naive(model) if who == "naive" else model
    device = torch.device(args.device)
    precision = "bf16" if device.type == "cuda" or "bf16" in who else "fp32"
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=precision == "bf16")
    model.to(device).train(what == "step")
    if args.compile and who != "naive" and build is EZCLIP:
        model.visual.compile()
        model.transformer.compile()
    video = torch.randint(256, (B, T, 3, 224, 224), dtype=torch.uint8, device=device)
    texts = tokens(B if what == "step" else TEXTS).to(device)
    if what == "encode_text":
        ours = build is EZCLIP and who != "naive"

        def work():  # as train.py encodes texts, or as others do
            model.encode_text(train.without_padding(texts) if ours else texts)
    elif what == "encode_video" and build is not EZCLIP:
        frames = torch.randn(B * T, 3, 224, 224, device=device)  # no prompts, no uint8 to convert
        work = partial(model.encode_image, frames) if who == "openai" else partial(
            model.get_image_features, frames)
    elif what == "encode_video":
        work = partial(model.encode_video, video)
    else:
        model.freeze_backbone()
        labels = torch.arange(B, device=device)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        flags = train.parser().parse_args(["--device", args.device, "--precision", precision])
        chunk = args.chunk if "chunk" in who else B

        def work():
            optimizer.zero_grad()
            if who == "naive":
                with autocast():
                    frames, encoded = model.encode_frames(video), model.encode_text(texts)
                logits = model.similarity(frames.float().mean(1), encoded)
                (contrastive_loss(logits, labels) + motion_loss(frames)).backward()
            else:
                train.take_step(model, video, texts, labels, chunk, flags, 0)
            optimizer.step()
        return work

    @torch.inference_mode()
    def forward():
        with autocast():
            work()
    return forward


# ---- what it costs ----

def tower(D, layers, N, L, T, end):
    """Matrix products (count, m, k, n, how often in the backward pass) of a tower's forward pass.

    N sequences of L tokens, T frames each video (0: no prompts); D -> `end` at last. A product with
    frozen weights is done once more backwards, of two activations or with trainable weights twice
    more, but for what has nothing behind it that learns.
    """
    H = D // 64
    for i in range(layers):
        A = 1 if T and i == layers - 1 else L  # tokens that go on
        learns = i > 0 or T > 0
        if T:  # the prompt tokens: attention over frames
            yield from [(1, N, D, 3 * D, 1), (N // T * H, T, 64, T, 2), (N // T * H, T, T, 64, 2),
                        (1, N, D, D, 1)]
        yield from [(1, N * A, D, D, i > 0), (1, N * (L + bool(T)), D, 2 * D, learns),
                    (N * H, A, 64, L + bool(T), learns + (i > 0)),
                    (N * H, A, L + bool(T), 64, 2 * learns), (1, N * A, D, D, learns),
                    (1, N * A, D, D // 4, 1 + learns), (1, N * A, D // 4, D, 2),
                    (1, N * A, D, 4 * D, 1), (1, N * A, 4 * D, D, 1)]
    yield 1, N, D, end, 1


def products(what, c, B, T, length=LONGEST):
    """The products of a piece of work; their FLOPs are sum(2 * count * m * k * n * (1 + back))."""
    patches = (c.image_size // c.patch_size) ** 2
    texts = B if what == "step" else TEXTS
    if what != "encode_text":
        yield 1, B * T * patches, 3 * c.patch_size**2, c.vision_width, 0
        yield from tower(c.vision_width, c.vision_layers, B * T, patches + 1, T, c.embed_dim)
    if what != "encode_video":
        yield from tower(c.text_width, c.text_layers, texts, length, 0, c.embed_dim)


def flops(shapes, training):
    return sum(2 * count * m * k * n * (1 + training * back) for count, m, k, n, back in shapes)


def timed(works, repeats, device):
    """{name: seconds}: medians of interleaved runs, after one that does not count."""
    seconds = {name: [] for name in works}
    for i in range(repeats + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def multiply(shapes, device):
    """A function that does products of these shapes, in bf16 on CUDA."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32

    def factors(count, m, k, n):  # as layers have them: the weight's rows are outputs
        a, b = (torch.randn(count, *size, device=device, dtype=dtype) for size in ((m, k), (n, k)))
        return (a[0], b[0].T) if count == 1 else (a, b.mT)
    pairs = {shape[:4]: factors(*shape[:4]) for shape in shapes}

    def work():
        for shape in shapes:
            torch.matmul(*pairs[shape[:4]])
    return work


def memory(who, what, name, T, args):
    """GiB beyond weights and inputs, of a child process."""
    child = [sys.executable, __file__, "--child", who, "--only", what, "--models", name,
             "--num-frames", str(T), "--batch-size", str(args.batch_size), "--device", args.device,
             "--chunk", str(args.chunk),
             "--threads", str(args.threads), *["--compile"] * args.compile]
    result = subprocess.run(child, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
                            capture_output=True, text=True)
    return float(result.stdout) if not result.returncode else None


def measure_memory(args):
    work = prepared(args.child, args.only[0], args.models[0], args.num_frames[0], args)
    if args.device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work(), work()
        return print((torch.cuda.max_memory_allocated() - before) / 2**30)

    def resident(key):
        return int(re.search(key + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    work(), work()
    print((resident("VmHWM") - before) / 2**20)


# ---- the tables ----

def compare(what, name, T, args, peak):
    config, training = Config(**SIZES[name], num_frames=T), what == "step"
    shapes = [*products(what, config, args.batch_size, T)]
    works = {who: prepared(who, what, name, T, args) for who in args.who}
    works = {who: work for who, work in works.items() if work}
    forward = multiply(shapes, args.device) if not training else None
    seconds = timed({**works, **({"products": forward} if forward else {})}, args.repeats,
                    args.device)
    count = TEXTS if what == "encode_text" else args.batch_size
    rows = []
    for who, s in seconds.items():
        ours = who in ("ours", "bf16", "recompute", "products")  # others take other products
        rate = flops(shapes, training) / s / 1e12 if ours else None
        rows.append({"what": what, "model": name, "T": T, "who": who, "seconds": s, "per_s":
                     count / s, "gflop": flops(shapes, training) / count / 1e9 if ours else None,
                     "tflop_s": rate, "of_peak": rate and rate / peak,
                     "gib": None if who == "products" or args.no_memory
                     else memory(who, what, name, T, args)})
    return rows


def table(rows):
    keys = ["what", "model", "T", "who", "seconds", "per_s", "gflop", "tflop_s", "of_peak", "gib"]
    heads = ["", "model", "T", "by", "s", "clips or texts/s", "GFLOP each", "TFLOP/s", "of peak",
             "GiB"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(keys) + "|")
    for row in rows:
        cells = [row[key] for key in keys]
        cells = ["" if x is None else f"{x:.3g}" if isinstance(x, float) else x for x in cells]
        print("| " + " | ".join(map(str, cells)) + " |")


def grid(path, args):
    """clips/s of encode_video for T = 8..64 and batches up to `--most-frames` frames: a plot."""
    from plots import figure, save_figure
    rows = []
    fig, axes = figure(8, 3.5, [args.models])
    for name in args.models:
        for T in (8, 16, 32, 64):
            sizes = [B for B in (1, 2, 4, 8, 16, 32, 64, 128) if B * T <= args.most_frames]
            for B in sizes:
                work = {"ours": prepared("ours", "encode_video", name, T, args, B)}
                s = timed(work, args.repeats, args.device)["ours"]
                rows.append({"model": name, "T": T, "batch": B, "clips_s": B / s})
                print(f"{name}, T = {T}, batch {B}: {B / s:.3g} clips/s", flush=True)
            speeds = [row["clips_s"] for row in rows if (row["model"], row["T"]) == (name, T)]
            axes[name].plot(sizes, speeds, marker="o", label=f"{T} frames")
        axes[name].set(xscale="log", xlabel="clips in a batch", ylabel="clips per second",
                       ylim=(0, None), title=name)
        ticks = sorted({row["batch"] for row in rows})
        axes[name].set_xticks(ticks, ticks)
        axes[name].minorticks_off()
    fig.legend(*axes[name].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    save_figure(fig, Path(path))
    return rows


def main():
    p = argparse.ArgumentParser(description="Speed and memory of EZ-CLIP.")
    flag = p.add_argument
    flag("--models", nargs="+", choices=SIZES, default=["ViT-B/16"], help="(%(default)s)")
    flag("--num-frames", nargs="+", type=int, default=[8], help="(%(default)s)")
    flag("--batch-size", type=int, default=2, help="clips (%(default)s)")
    flag("--only", nargs="+", default=["encode_video", "encode_text", "step"], help="what to run",
         choices=["encode_video", "encode_text", "step"])
    kinds = ["ours", "bf16", "chunk", "bf16-chunk", "recompute", "naive", "openai", "transformers"]
    flag("--who", nargs="+", default=kinds, choices=kinds, help="what to compare")
    flag("--chunk", type=int, default=1, help="clips in a piece, for `chunk` (%(default)s)")
    flag("--repeats", type=int, default=5, help="runs of each (%(default)s)")
    flag("--threads", type=int, default=torch.get_num_threads(), help="of the CPU (%(default)s)")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    flag("--compile", action="store_true", help="our towers through torch.compile")
    flag("--no-memory", action="store_true", help="measure times only")
    flag("--grid", metavar="PNG", help="plot clips/s against batch and T instead")
    flag("--most-frames", type=int, default=8192, help="of a batch of --grid (%(default)s)")
    flag("--json", metavar="FILE", help="also write the rows there")
    flag("--child", help=argparse.SUPPRESS)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        return measure_memory(args)
    if args.grid:
        rows = grid(args.grid, args)
    else:
        n = 8192 if args.device.startswith("cuda") else 2048
        big = [(1, n, n, n, 0)]
        peak = flops(big, 0) / timed({"": multiply(big, args.device)}, 5, args.device)[""] / 1e12
        print(f"{args.device}, {args.threads} threads, PyTorch {torch.__version__}, batch "
              f"{args.batch_size}; peak {peak:.3g} TFLOP/s, a product of {n} x {n}", flush=True)
        rows = [row for name in args.models for T in args.num_frames for what in args.only
                for row in compare(what, name, T, args, peak)]
        table(rows)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
