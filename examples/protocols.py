"""The paper's tables, over several seeds: runs of train.py, with train.py's flags.

    python examples/protocols.py base-to-novel --data ucf101 --seed 1 2 3 --lr 1e-5 --batch-size 60
    python examples/protocols.py few-shot --data ucf101 --shots 2 4 8 16 --epochs 100 --batch-size 4
    python examples/protocols.py zero-shot --checkpoint runs/k400/last.pt \\
        --test 'hmdb51=hmdb51,lists/test{}.txt,lists/labels.csv' --test ucf101=ucf101
    python examples/protocols.py ablation --data ucf101

base-to-novel trains on one half of the classes and tests on both, few-shot trains on K clips per
class, zero-shot tests a checkpoint or plain CLIP on other data, ablation adds the method's parts
one by one. Cells are means over seeds and splits, with the standard deviation (n - 1). {} in --test
stands for splits 1 to 3, in --checkpoint for the seed. The same command goes on with --resume.
"""

import argparse
import re
import shlex
import statistics
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import train
from ezclip import read_weights

# The protocols, and the flags that each of them has no use for.
REFUSED = {
    "base-to-novel": ("test", "base_to_novel"),
    "few-shot": ("test", "base_to_novel", "classes", "eval_only"),
    "zero-shot": ("data", "train_list", "test_list", "shots", "base_to_novel", "classes"),
    "ablation": ("test", "eval_only", "checkpoint", "prompts", "no_adapters", "temporal_adapter",
                 "motion_weight")}

# The ablation: rows of the table, folders of their runs, and the flags by which they differ.
SHUFFLED = "prompts, frames shuffled"  # another test of what the row of prompts has trained
ROWS = (("frozen CLIP", "frozen", {"eval_only": True}),
        ("+ adapters", "adapters", {"prompts": "none", "motion_weight": 0.0}),
        ("+ temporal prompts", "prompts", {"motion_weight": 0.0}),
        ("+ motion loss", "motion", {}),
        (SHUFFLED, "shuffled", {"eval_only": True, "clip": None}))


# ---- which clips ----

def only(split, names):
    """The Split of the classes in `names`, in its own order."""
    classes = [name for name in split.classes if name in names]
    clips = []
    for clip, k in split.clips:
        if split.classes[k] in classes:
            clips.append((clip, classes.index(split.classes[k])))
    return split._replace(classes=classes, clips=clips)


def shots(split, count, seed):
    """`count` random clips of each class, 0: all; a seed's fewer shots are among its more shots."""
    if not count:
        return split
    # by names alone, so that neither lists nor the place of a folder change the draw
    ranked = sorted(split.clips, key=lambda item: (data.name_hash(item[0], f"{seed}/"), item))
    chosen = set()
    for k, name in enumerate(split.classes):
        clips = [item for item in ranked if item[1] == k]
        if len(clips) < count:
            raise ValueError(f"{split.root}: {name} has {len(clips)} training clips, which is less "
                             f"than {count} shots")
        chosen.update(clips[:count])
    return split._replace(clips=[item for item in split.clips if item in chosen],
                          source=f"{count} shots of {split.source}")


def halves(split, files=None):
    """-> names of the base and of the novel classes: those of two files, or the classes with more
    training clips (ties: the smaller label) and the others."""
    if not files:
        counts = Counter(split.classes[k] for _, k in split.clips)
        names = sorted(split.classes, key=lambda name: -counts[name])  # stable
        middle = (len(names) + 1) // 2  # the base classes have the odd one
        return names[:middle], names[middle:]
    base, novel = [], []
    for path, half in zip(files, (base, novel)):
        for name in data.read_labels(path).values():
            found = data.find_name(name, split.classes)
            if found is None:
                raise ValueError(f"{path}: {name} is not in {split.root}")
            if found in base + novel:
                raise ValueError(f"{path}: {name} was there before, or in {files[0]}")
            half.append(found)
    return base, novel


def base_to_novel(split, test, files=None):
    """-> the Split of the base classes to train on, and {"base": Split, "novel": Split} to test."""
    base, novel = halves(split, files)
    return only(split, base), {"base": only(test, base), "novel": only(test, novel)}


# ---- jobs: a row of the table, train.py's flags, a Split to train on, {name: Split to test} ----

def changed(args, folder, **flags):
    """The flags of one of several runs, in a folder of its own."""
    return argparse.Namespace(**{**vars(args), **flags, "out": str(Path(args.out, folder))})


def jobs_of(rows, args, split, tests):
    """Yield the jobs of rows, which are as ROWS, those of the ablation."""
    for row, folder, flags in rows:
        yield row, changed(args, folder, **flags), split, tests


def shuffled(model, seed):
    """The model, but it is shown the frames of each clip in a random order, the clip's own."""
    encode_frames = model.encode_frames

    def encode_shuffled(video):
        clips = []
        for clip in video:
            generator = torch.Generator().manual_seed(seed + clip.sum().item())
            clips.append(clip[torch.randperm(len(clip), generator=generator)])
        return encode_frames(torch.stack(clips))

    model.encode_frames = encode_shuffled  # which encode_video and train.evaluate call
    return model


def run(jobs, command):
    """Do the jobs -> {row: {test set: mean of its results}}."""
    cells = {}  # (row, test set): results of its runs
    for row, args, split, tests in jobs:
        print(f"\n{row}: {args.out}", flush=True)
        if row == SHUFFLED:
            args.checkpoint = str(Path(args.out).with_name("prompts") / "last.pt")
            model = shuffled(train.build_model(args), args.seed)
            results = {name: train.evaluate(model, test, args) for name, test in tests.items()}
        else:
            results = train.run(args, split, tests, command)["results"]
        if {"base", "novel"} <= tests.keys():
            base, novel = results["base"], results["novel"]
            mean = {"n": base["n"] + novel["n"]}
            for key in ("top1", "top5"):  # of each run, as its mean over runs is what is reported
                mean[key] = round(statistics.harmonic_mean([base[key], novel[key]]), 2)
            results["harmonic_mean"] = mean
        for name, result in results.items():
            cells.setdefault((row, name), []).append(result)
    rows = {}
    for (row, name), results in cells.items():
        rows.setdefault(row, {})[name] = average(results)
    return rows


def average(results):
    """The mean of results {"top1", "top5", "n"} and, of several, their deviation (n - 1)."""
    counts = [result["n"] for result in results]  # of clips, in which splits may differ
    mean = {"n": counts[0] if len(set(counts)) == 1 else counts, "runs": len(results)}
    for key in ("top1", "top5"):
        values = [result[key] for result in results]
        mean[key] = round(statistics.mean(values), 2)
        if len(values) > 1:
            mean[f"{key}_std"] = round(statistics.stdev(values), 2)
    return mean


def print_table(rows):
    """{row: {test set: result}} in Markdown."""
    first = next(iter(rows.values()))
    print("\n| top-1 (%) |", *[f"{name}, n = {result['n']} |" for name, result in first.items()])
    print("|---" * (len(first) + 1) + "|")
    for row, results in rows.items():
        line = f"| {row} |"
        for result in results.values():
            deviation = f" ± {result['top1_std']:.1f}" if "top1_std" in result else ""
            line += f" {result['top1']:.1f}{deviation} |"
        print(line)


# ---- the protocols ----

def jobs_on_data(args, runs):
    """Yield the jobs on --data for the flags of each seed's run."""
    split, test = data.index_frames(args.data, args.train_list, args.test_list, args.labels,
                                    args.allow_missing)
    texts = describing(args, split.classes)
    tests = {Path(args.data).resolve().name: test}
    if args.protocol == "base-to-novel" or args.base_to_novel:
        split, tests = base_to_novel(split, test, args.classes)
    for name, part in {"training": split, **tests}.items():
        if not part.clips:
            raise ValueError(f"{args.data}: holds no clips for {name}")
    for flags in runs:
        for count in args.shots:
            rows = [(args.protocol, "", {})]
            if args.protocol == "ablation":
                rows = ROWS
            if args.protocol == "few-shot":
                rows = [(f"{count} shots", f"shots{count}", {})]
            part = changed(flags, "", shots=count, descriptions=texts)
            yield from jobs_of(rows, part, shots(split, count, flags.seed), tests)


def jobs_on_sets(args, runs):
    """Yield the jobs on the data sets of --test for the flags of each seed's run."""
    learnt = set()  # the words of class names; an official checkpoint does not tell
    for flags in runs:
        if flags.checkpoint:
            saved = read_weights(flags.checkpoint)
            learnt.update(map(data.class_text, saved.get("classes", [])))
    for text in args.test:
        name, _, paths = text.partition("=")
        for number in "123" if "{}" in paths else [""]:  # of the split
            root, *lists = paths.replace("{}", number).split(",")
            _, test = data.index_frames(root, None, *lists, whole=True,
                                        allow_missing=args.allow_missing)
            shared = learnt.intersection(map(data.class_text, test.classes))
            if learnt:
                print(f"{name}: {len(shared)} of its {len(test.classes)} classes occur in training")
            texts = describing(args, test.classes)
            for flags in runs:
                part = changed(flags, f"{name}/{number}", eval_only=True, descriptions=texts)
                train.tokens_of(test.classes, part)  # a text that is too long is to show now
                yield "zero-shot", part, None, {name: test}


def describing(args, classes):
    """The first file of --descriptions that has all of the classes; None without a file."""
    for path in args.descriptions or []:
        texts = data.read_descriptions(path)
        if all(data.find_name(name, texts) for name in classes):
            return path
    if args.descriptions:
        raise ValueError(f"{', '.join(args.descriptions)}: none has all of {', '.join(classes)}")


@train.torchrun()
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    p = data.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    parents=[train.parser()], conflict_handler="resolve", allow_abbrev=False)
    flag = p.add_argument
    flag("protocol", choices=REFUSED)
    flag("--out", help="folder of the runs (runs/<protocol>/<data>)")
    flag("--seed", type=data.at_least(0), nargs="+", default=[0], help="random seeds (0)")
    flag("--shots", type=data.at_least(0), nargs="+", metavar="K",
         help="training clips per class, 0: all (16; with an ablation of all classes 0)")
    flag("--base-to-novel", action="store_true", help="an ablation with base and novel classes")
    flag("--classes", nargs=2, metavar="FILE", help="base and novel names (by training clips)")
    flag("--test", action="append", default=[], metavar="NAME=DIR[,LIST,LABELS]",
         help="a data set for zero-shot; {}: splits 1 to 3")
    flag("--descriptions", nargs="+", metavar="FILE", help="the first that has all classes is used")
    args = p.parse_args(argv)

    for name in REFUSED[args.protocol]:
        if getattr(args, name) != p.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} does not go with {args.protocol}")
    if not args.data and not args.test:  # of which each protocol refuses one
        raise ValueError("--data is needed, a folder of frames; for zero-shot --test")
    for text in args.test:
        if not re.fullmatch(r"\w[^=/\\]*=[^,]+(,[^,]+,[^,]+)?", text):
            raise ValueError(f"--test {text} is not NAME=DIR or NAME=DIR,LIST,LABELS")
    names = [text.partition("=")[0] for text in args.test]
    if not args.shots:
        args.shots = [0] if args.protocol == "ablation" and not args.base_to_novel else [16]
    for name, values in (("seed", args.seed), ("shots", args.shots), ("test", names)):
        if len(set(values)) < len(values):
            raise ValueError(f"--{name} has {statistics.mode(values)} twice")
    args.out = args.out or str(Path("runs", args.protocol, Path(args.data or "").name))
    if len(args.shots) > 1 and args.protocol != "few-shot":
        raise ValueError(f"--shots takes one number for {args.protocol}")
    if args.test and len(args.seed) > 1 and "{}" not in (args.checkpoint or ""):
        raise ValueError("--seed has several, which zero-shot needs {} in --checkpoint for")
    if Path(args.out, "results.json").exists() and not args.resume:
        raise ValueError(f"{args.out}: holds results; --resume goes on, another --out starts anew")

    runs = []
    for seed in args.seed:
        flags = changed(args, f"seed{seed}", seed=seed)
        flags.checkpoint = args.checkpoint and args.checkpoint.replace("{}", str(seed))
        runs.append(flags)
    # a list: what is wrong with the last job is to show before the first is done
    jobs = list(jobs_on_data(args, runs) if args.data else jobs_on_sets(args, runs))
    command = shlex.join(["python", "examples/protocols.py", *argv])
    rows = run(jobs, command)
    print_table(rows)
    return train.write_results(args, command, results=rows)


if __name__ == "__main__":
    data.command(main)
