"""What loading costs: data.py beside bare JPEG decoding of the same frames, in one process.

    python benchmarks/loader.py [--sizes 340x256 1920x1080] [--clips 40] [--json FILE]

Frames are rendered, JPEGs of quality 90, and lie in the system's cache after the first pass. Runs
are interleaved, and CPU seconds of this process are counted; the ratios are medians. "train" crops,
colours and mirrors.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

import data


def render(root, clips, width, height, frames=8):
    """Clips of drifting smooth noise, which compresses like a photograph."""
    rng = np.random.default_rng(0)
    for k in range(clips):
        folder = root / f"class/clip{k}"
        folder.mkdir(parents=True)
        small = rng.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(picture, np.int16) + rng.normal(0, 4, (height, width, 3))
        for t in range(1, frames + 1):
            moved = np.roll(pixels, 3 * t, axis=1).clip(0, 255).astype(np.uint8)
            Image.fromarray(moved).save(folder / f"img_{t:05d}.jpg", quality=90)


def decode(root, clip):
    for path in sorted((root / clip).iterdir()):
        with Image.open(path) as image:
            image.load()


def measure(root, repeats):
    split, _ = data.index_frames(root)
    clips = [clip for clip, _ in split.clips]
    evaluation = data.Clips(split, 8, 224)
    training = data.Clips(split, 8, 224, train=True, augment=True, flip=True)
    works = {"bare decoding": lambda i: decode(root, clips[i]),
             "eval": lambda i: evaluation[0, i], "train": lambda i: training[0, i]}
    seconds = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            wall, began = time.perf_counter(), time.process_time()
            for i in range(len(clips)):
                work(i)
            if repeat:
                seconds[name].append(((time.process_time() - began) / len(clips),
                                      (time.perf_counter() - wall) / len(clips)))
    bare = [cpu for cpu, _ in seconds["bare decoding"]]
    return [{"by": name, "ms": 1000 * statistics.median(cpu for cpu, _ in values),
             "clips_s": 1 / statistics.median(wall for _, wall in values),
             "ratio": statistics.median(cpu / b for (cpu, _), b in zip(values, bare))}
            for name, values in seconds.items()]


def main():
    p = argparse.ArgumentParser(description="The cost of loading clips of eight frames.")
    p.add_argument("--sizes", nargs="+", default=["340x256", "1920x1080"], help="(%(default)s)")
    p.add_argument("--clips", type=int, default=40, help="of each size (%(default)s)")
    p.add_argument("--repeats", type=int, default=5, help="passes over them (%(default)s)")
    p.add_argument("--json", metavar="FILE", help="also write the rows there")
    args = p.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            render(Path(folder), args.clips, *map(int, size.split("x")))
            rows += [{"frames": size, **row} for row in measure(Path(folder), args.repeats)]
    print("| frames | | ms of CPU per clip | clips/s | to bare decoding |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['frames']} | {row['by']} | {row['ms']:.1f} | {row['clips_s']:.1f} | "
              f"{row['ratio']:.2f} |")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
