"""A data set of persons in miniature: what the protocols of re-identification measure.

    python benchmarks/persons.py --out runs/persons        # six minutes on two CPU cores

Forty persons, of a shape and a gait each (what its shape does, as in examples/demo.py), walk in
clothes, a colour of six: laid out as CCVID is, twenty of them for training. Searched with the
demo's tiny CLIP alone, and with what `reid.py --train` makes of it.
"""

import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import numpy as np

import data
import demo
import reid
import train

# Sessions, walks, clothes (of a person's three), the list; a person walks each of them four times.
WALKS = (("session1", 1, 0, "query"), ("session1", 2, 0, "gallery"), ("session1", 3, 1, "query"),
         ("session2", 1, 1, "gallery"), ("session2", 2, 0, "query"), ("session3", 1, 2, "gallery"),
         ("session3", 2, 2, "query"), ("session3", 3, 1, "gallery"))


def render_persons(root, seed):
    """Five shapes by eight gaits are the persons; odd ones are for training. Below a new `root`."""
    part = Path(f"{root}.part")
    lists = {"train": "", "query": "", "gallery": ""}
    for person in range(40):
        shape, (pair, twin) = person % 5, divmod(person // 5, 2)
        rng = np.random.default_rng((seed, person))
        clothes = rng.permutation([*demo.COLOURS])[:3]
        train_set = (shape + person // 5) % 2  # all shapes and gaits are in both halves
        for i, (session, walk, k, place) in enumerate(4 * WALKS):
            t = np.linspace(1, -1, rng.integers(10, 44)) * (-1) ** twin
            frames = demo.render_clip(clothes[k], pair, t, rng, shape)
            folder = f"{session}/{person:03}_{walk + 3 * (i // len(WALKS)):02}"
            demo.save_clip(part / folder, frames)
            lists["train" if train_set else place] += f"{folder}\t{person:03}\t{clothes[k]}\n"
    for name, lines in lists.items():
        (part / f"{name}.txt").write_text(lines)
    part.rename(root)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    p = data.Parser(description="A data set of persons in miniature.", allow_abbrev=False)
    p.add_argument("--out", default="runs/persons", help="(%(default)s)")
    p.add_argument("--seed", type=data.at_least(0), default=0, help="(%(default)s)")
    p.add_argument("--epochs", type=data.at_least(1), default=40, help="(%(default)s)")
    p.add_argument("--workers", type=data.at_least(0), default=2, help="(%(default)s)")
    p.add_argument("--device", type=train.usable_device, default="cpu", help="(%(default)s)")
    args = p.parse_args(argv)
    args.resume = True
    out = Path(args.out)
    command = shlex.join(["python", "benchmarks/persons.py", *argv])
    next(iter(demo.prepare(args, out, args.seed, command)))  # its tiny CLIP
    if not (out / "CCVID").exists():
        render_persons(out / "CCVID", args.seed)

    usual = ["--data", out / "CCVID", "--clip", out / "clip/last.pt", "--activation", "quick_gelu",
             "--num-frames", 4, "--device", args.device, "--workers", args.workers]
    recipe = ["--train", "--epochs", args.epochs, "--batch-size", 32, "--lr", 8e-3, "--no-augment",
              "--no-flip", "--seed", args.seed]
    no_prompts = ["--prompts", "none", "--motion-weight", 0]
    rows = {"tiny CLIP": [], "+ adapters": [*recipe, *no_prompts],
            "+ temporal prompts": [*recipe, "--prompt-lr", 0.3, "--motion-weight", 0],
            "+ motion loss": [*recipe, "--prompt-lr", 0.3]}
    table = {}
    for i, (row, flags) in enumerate(rows.items()):
        flags = [*usual, *flags]
        if "--train" in flags:
            flags += ["--out", out / f"run{i}", "--resume"]
        table[row] = reid.main([str(flag) for flag in flags])["results"]
    print("\n| | general: rank-1 | rank-5 | mAP | clothes-changing: rank-1 | rank-5 | mAP |")
    print("|---" * 7 + "|")
    for row, results in table.items():
        cells = [f"{100 * scores[key]:.1f}" for scores in results.values()
                 for key in ("rank1", "rank5", "mAP")]
        print(f"| {row} |", " | ".join(cells), "|")
    return train.write_results(args, command, results=table)


if __name__ == "__main__":
    data.command(main)
