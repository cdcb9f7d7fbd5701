"""Re-identify persons, or search clips by clips: how often does a clip find one of its own class?

    python examples/reid.py --data CCVID --train --out runs/ccvid            # with train.py's flags
    python examples/reid.py --data CCVID --checkpoint runs/ccvid/last.pt
    python examples/reid.py --data frames --clip ViT-B/16                    # plain CLIP

A folder with train.txt, query.txt and gallery.txt is a data set of persons as CCVID is, with lines
`session1/001_01<tab>001<tab>u0_l0_s0_c0_a0`: folder of frames, person, clothes. Persons are classes
for --train; each tracklet of query.txt searches gallery.txt, by the mean feature of its clips. In
other folders the classes are what is searched for: of the test clips of each class every other one
is a query for the rest. Printed are rank-1, rank-5 and mAP, with --json as one document.
"""

import argparse
import re
import shlex
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import BatchSampler, Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import predict
import train

STRIDE = 4  # frames from one to the next of a clip


def retrieval_scores(queries, query_labels, gallery, gallery_labels, exclude=None):
    """Rank a gallery of clips for each query clip by the cosine of their features.

    queries: (Q, E), gallery: (G, E), normalised here; their labels, (Q,) and (G,), are indices of
    classes or identities. exclude: bool (Q, G), what leaves the ranking of which query. Returns
    {"rank1", "rank5", "mAP"} in [0, 1]: the share of queries with a match among the first 1 and 5
    (CMC, R@1 and R@5), and the mean average precision; with {"n", "left_out"}, the numbers of
    queries that count and of those without a match, which do not. A ValueError if none counts.
    """
    cosine = F.normalize(queries.float(), dim=-1) @ F.normalize(gallery.float(), dim=-1).mT
    order = cosine.argsort(dim=1, descending=True, stable=True)  # (Q, G)
    hits = gallery_labels[order] == query_labels[:, None]  # (Q, G)
    kept = torch.ones_like(hits) if exclude is None else ~exclude.gather(1, order)
    hits = hits & kept
    counts = hits.any(1)  # (Q,)
    if not counts.any():
        raise ValueError("no query has a match in the gallery")
    hits, kept = hits[counts], kept[counts]
    ranks = kept.cumsum(1)  # from 1 on, among what is not excluded
    first = ranks.masked_fill(~hits, 2**31).amin(1)  # rank of the first match, (n,)
    precision = hits.cumsum(1) / ranks.clamp(min=1)  # at each rank
    average = (precision * hits).sum(1) / hits.sum(1)  # over the ranks with a match, (n,)
    return {
        "rank1": (first <= 1).float().mean().item(),
        "rank5": (first <= 5).float().mean().item(),
        "mAP": average.mean().item(),
        "n": len(hits),
        "left_out": len(counts) - len(hits)}


# ---- data: what is trained on, and what `search` takes ----

def read_tracklets(root, name):
    """The lines of a list of CCVID's: (folder, frames, person, clothes, camera). ValueError names a
    line, or a folder without frames."""
    tracklets = {}
    for where, line in data.read_lines(root / name):
        cells = re.split(r"\t+", line)
        walk = re.fullmatch(r"(?:.*/)?session(\d+)/[^/]+_(\d+)/?", cells[0])
        if len(cells) != 3 or not walk:
            raise ValueError(f"{where}: expected session1/<person>_<walk>, person and clothes with "
                             f"tabs between them, not {line!r}")
        folder, person, clothes = cells
        if folder in tracklets:
            raise ValueError(f"{where}: {folder} is there for the second time")
        if not (root / folder).is_dir():
            raise ValueError(f"{where}: {root / folder}: no such folder")
        frames = [root / folder / frame for frame in data.frame_names(root / folder)]
        # there are no cameras: the walk stands for one, and in session 3 for another
        camera = int(walk[2]) + (12 if int(walk[1]) == 3 else 0)
        tracklets[folder] = folder, frames, person, clothes, camera
    if not tracklets:
        raise ValueError(f"{root / name}: holds no tracklets")
    return list(tracklets.values())


def read_persons(args):
    """-> the persons of train.txt as a Split, and the tracklets of query.txt and gallery.txt."""
    root = Path(args.data)
    if args.train_list or args.test_list or args.labels:
        raise ValueError(f"{root}: has lists of its own, leave --train-list, --test-list and "
                         "--labels out")
    if not args.descriptions:
        args.templates = args.templates or ["a video of person {}"]
    queries = read_tracklets(root, "query.txt")
    gallery = read_tracklets(root, "gallery.txt")
    Q = len(queries)
    _, frames, persons, clothes, cameras = zip(*queries, *gallery)

    def same(values):  # (Q, G)
        values = np.array(values)
        return torch.from_numpy(values[:Q, None] == values[Q:])

    excluded = {
        "general": same(persons) & same(cameras),
        "clothes-changing": same(persons) & (same(cameras) | same(clothes))}
    _, labels = np.unique(persons, return_inverse=True)  # equal numbers for equal names
    found = partial(TrackletClips, frames), torch.from_numpy(labels), Q, excluded
    if not args.train:
        return None, found
    folders, _, persons, *_ = zip(*read_tracklets(root, "train.txt"))
    classes = sorted(set(persons))
    clips = [(folder, classes.index(person)) for folder, person in zip(folders, persons)]
    return data.Split(root, classes, clips, "train.txt"), found


def read_classes(args):
    """-> a training Split, and the clips of the test Split, each a tracklet of its own."""
    split, test = data.index_frames(args.data, args.train_list, args.test_list, args.labels,
                                    args.allow_missing)
    seen = Counter()
    queries, gallery = [], []
    for clip, label in test.clips:  # of each class every other one
        half = gallery if seen[label] % 2 else queries
        half.append((clip, label))
        seen[label] += 1
    if not gallery:
        raise ValueError(f"{test.root}: no class has two test clips, one to search for the other")
    test = test._replace(clips=queries + gallery)
    labels = torch.tensor([label for _, label in test.clips])
    return split, (partial(data.Clips, test), labels, len(queries), {"every other clip": None})


# ---- clips and their features ----

def cut(count, num_frames):
    """The positions of frames of the clips that `count` frames are cut into, each `num_frames`.

    Stretches of num_frames * STRIDE frames give STRIDE clips each, one frame after the other in
    turn; what is left gives clips likewise, at the largest stride that still fills one; and the
    frames that are left then are repeated from their first on until they fill a clip.
    """
    clips, start = [], 0
    while count - start >= num_frames:
        stride = min(STRIDE, (count - start) // num_frames)
        stop = start + stride * num_frames
        clips += [np.arange(start + first, stop, stride) for first in range(stride)]
        start = stop
    if start < count:
        clips.append(np.resize(np.arange(start, count), num_frames))
    return clips


class TrackletClips(Dataset):
    """All clips of tracklets, lists of frames: as data.Clips, but numbered by tracklets."""

    def __init__(self, tracklets, num_frames, image_size):
        self.image_size = image_size
        self.clips = []
        for k, frames in enumerate(tracklets):
            for positions in cut(len(frames), num_frames):
                self.clips.append((k, [frames[i] for i in positions]))

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, key):
        _, index = key
        k, frames = self.clips[index]
        return torch.stack([data.read_frame(path, self.image_size) for path in frames]), k, k


@torch.inference_mode()
def encode(model, clips, args):
    """Features of every clip of a Dataset, (n, E), and its numbers of them, on the CPU."""
    model.eval()
    keys = [(0, i) for i in range(len(clips))]  # (epoch, clip)
    batches = [*BatchSampler(keys, args.batch_size, drop_last=False)]
    stream = data.loader(clips, batches, args.workers)
    features, numbers = [], []
    for videos, _, indices in tqdm(stream, "clips", len(batches), leave=False, disable=None):
        features.append(train.encode_clips(videos, args, model).cpu())
        numbers.append(indices)
    return torch.cat(features), torch.cat(numbers)


def search(model, args, clips, labels, Q, excluded):
    """-> {protocol: scores} of tracklets, by the mean features of their clips.

    clips: from sizes to a Dataset that numbers clips by tracklets, of which the first Q search the
    others; labels: of each tracklet; excluded: {protocol: what leaves the ranking of which query}.
    """
    clips = clips(model.config.num_frames, model.config.image_size)
    features, tracklet = encode(model, clips, args)  # (clips, E), (clips,)
    sums = torch.zeros(len(labels), model.config.embed_dim).index_add(0, tracklet, features)
    means = sums / tracklet.bincount()[:, None]  # (tracklets, E)
    scores = {}
    for protocol, exclude in excluded.items():
        scores[protocol] = retrieval_scores(means[:Q], labels[:Q], means[Q:], labels[Q:], exclude)
    return scores


# ---- a run ----

def train_first(args, split, command):
    """Train on a Split; then the flags name what came of it. Returns what results.json has."""
    run = argparse.Namespace(**vars(args))
    del run.train, run.json  # a run is the same without them
    content = train.run(run, split, {}, command)
    train.add_up(torch.tensor(0))  # of several processes one has written last.pt
    args.clip, args.checkpoint = None, str(Path(args.out, "last.pt"))
    if args.prompts == "none" and args.no_adapters and not args.temporal_adapter:
        args.clip, args.checkpoint = args.checkpoint, None  # with --tune all a CLIP was trained
    return content


def evaluate(args, command):
    """Train if asked, and print the scores; returns what --json prints."""
    persons = Path(args.data, "query.txt").is_file() or Path(args.data, "gallery.txt").is_file()
    split, found = read_persons(args) if persons else read_classes(args)
    content = train_first(args, split, command) if args.train else None
    if train.rank():
        return {}  # one process searches
    args.eval_only = True
    model = train.build_model(args)
    scores = search(model, args, *found)
    for name, row in scores.items():
        shown = [f"{key} {100 * row[key]:.1f} %" for key in ("rank1", "rank5", "mAP")]
        print(f"{name}: {', '.join(shown)}, n = {row['n']}")
        if row["left_out"]:
            print(f"{row['left_out']} queries without a match in the gallery are left out")
    if content:
        train.write_results(args, command, trainable=content["trainable"],
                            seconds=content["seconds"], results=scores)
    return {"clip": model.weights_path, "checkpoint": args.checkpoint,
            "num_frames": model.config.num_frames, "prompts": model.config.prompts,
            "results": scores}


@train.torchrun()
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    p = data.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    parents=[train.parser()], conflict_handler="resolve", allow_abbrev=False)
    p.add_argument("--train", action="store_true", help="train on the persons of train.txt first")
    p.add_argument("--json", action="store_true", help="scores as JSON; all else goes to stderr")
    args = p.parse_args(argv)
    if not args.data:
        raise ValueError("--data is needed, a folder of CCVID or of class folders")
    if args.train and args.eval_only:
        raise ValueError("--train and --eval-only do not go together")
    if not args.train and (args.out or args.resume):
        raise ValueError("--out and --resume go with --train")
    args.out = args.out or f"runs/{Path(args.data).resolve().name}"
    args.json = args.json and not train.rank()
    command = shlex.join(["python", "examples/reid.py", *argv])
    return predict.report(partial(evaluate, command=command), args)


if __name__ == "__main__":
    data.command(main)
