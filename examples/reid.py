"""Re-identify persons, or search clips by clips: how often does a clip find one of its own class?

    python examples/reid.py --data CCVID --train --out runs/ccvid            # with train.py's flags
    python examples/reid.py --data CCVID --checkpoint runs/ccvid/last.pt
    python examples/reid.py --data frames --clip ViT-B/16                    # plain CLIP

A folder with train.txt, query.txt and gallery.txt is a data set of persons as CCVID is, with lines
`session1/001_01<tab>001<tab>u0_l0_s0_c0_a0`: folder of frames, person, clothes. Persons are classes
for --train; each tracklet of query.txt searches gallery.txt, by the mean feature of its clips:

    general           without the gallery's tracklets of the same person and camera
    clothes-changing  without those of the same person and (the same camera or the same clothes)

The camera is the walk, the number behind the person in a folder's name, and another one in session
3. In other folders the classes are what is searched for: of the test clips in class folders, which
a class may have several of, every other one is a query for the rest. Printed are rank-1, rank-5
and mAP, with --json as one document.
"""

import argparse
import contextlib
import json
import re
import shlex
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import train

STRIDE = 4  # frames from one to the next of a clip


def parser():
    p = data.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    parents=[train.parser()], conflict_handler="resolve", allow_abbrev=False)
    flag = p.add_argument
    flag("--train", action="store_true", help="train on the persons of train.txt, then search")
    flag("--json", action="store_true", help="the scores as JSON; all else goes to stderr")
    return p


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
    kept = torch.ones_like(hits)
    if exclude is not None:
        kept = ~exclude.gather(1, order)
    hits = hits & kept
    counts = hits.any(1)  # (Q,)
    if not counts.any():
        raise ValueError("no query has a match in the gallery")
    hits, kept = hits[counts].float(), kept[counts]
    ranks = kept.cumsum(1)  # from 1 on, among what is not excluded
    precision = hits.cumsum(1) / ranks.clamp(min=1)  # at each rank
    average = (precision * hits).sum(1) / hits.sum(1)  # over the ranks with a match, (n,)
    scores = {"mAP": average.mean().item(), "n": len(hits), "left_out": len(counts) - len(hits)}
    for k in (1, 5):
        found = (hits * (ranks <= k)).any(1)
        scores[f"rank{k}"] = found.float().mean().item()
    return {name: scores[name] for name in ("rank1", "rank5", "mAP", "n", "left_out")}


# ---- persons ----

def read_tracklets(root, name):
    """The lines of a list of CCVID's as dicts: folder, frames, person, clothes (person, label),
    camera. ValueError names a line, or a folder without frames."""
    tracklets, folders = [], set()
    for where, line in data.read_lines(root / name):
        cells = re.split(r"\t+", line)
        walk = re.fullmatch(r"(?:.*/)?session(\d+)/[^/]+_(\d+)/?", cells[0])
        if len(cells) != 3 or not walk:
            raise ValueError(f"{where}: expected session1/<person>_<walk>, person and clothes with "
                             f"tabs between them, not {line!r}")
        folder, person, clothes = cells
        if folder in folders:
            raise ValueError(f"{where}: {folder} is there for the second time")
        folders.add(folder)
        try:
            frames = data.frame_names(root / folder)
        except OSError as error:
            raise ValueError(f"{where}: {root / folder}: {error.strerror}") from None
        camera = int(walk[2]) + (12 if int(walk[1]) == 3 else 0)
        tracklets.append({"folder": folder, "frames": frames, "person": person,
                          "clothes": (person, clothes), "camera": camera})
    if not tracklets:
        raise ValueError(f"{root / name}: holds no tracklets")
    return tracklets


def persons_split(root):
    """train.txt as a Split whose classes are the persons."""
    tracklets = read_tracklets(root, "train.txt")
    persons = sorted({tracklet["person"] for tracklet in tracklets})
    clips = [(tracklet["folder"], persons.index(tracklet["person"])) for tracklet in tracklets]
    return data.Split(root, persons, clips, "train.txt")


def cut(count, num_frames):
    """The positions of frames of the clips that `count` frames are cut into, each `num_frames`.

    Stretches of num_frames * STRIDE frames give STRIDE clips each, one frame after the other in
    turn; what is left gives clips likewise, at the largest stride that still fills one; and the
    frames that are left then are repeated from their first on until they fill a clip.
    """
    clips, start = [], 0
    while start < count:
        stride = min(STRIDE, (count - start) // num_frames)
        if not stride:
            rest = np.arange(start, count)
            return [*clips, np.resize(rest, num_frames)]
        stop = start + stride * num_frames
        clips += [np.arange(start + first, stop, stride) for first in range(stride)]
        start = stop
    return clips


class TrackletClips(Dataset):
    """All clips of tracklets, as those of data.Clips; the label is the tracklet's position."""

    def __init__(self, root, tracklets, num_frames, image_size):
        self.image_size = image_size
        self.clips = []
        for k, tracklet in enumerate(tracklets):
            folder, frames = root / tracklet["folder"], tracklet["frames"]
            for positions in cut(len(frames), num_frames):
                self.clips.append((k, [folder / frames[i] for i in positions]))

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, key):
        _, index = key
        k, frames = self.clips[index]
        return torch.stack([data.read_frame(path, self.image_size) for path in frames]), k, index


# ---- features ----

@torch.inference_mode()
def encode(model, clips, args):
    """Features of every clip of a Dataset, (n, E), and their labels, on the CPU."""
    model.eval()
    batches = []
    for part in torch.arange(len(clips)).split(args.batch_size):
        batches.append([(0, i) for i in part.tolist()])  # keys: (epoch, clip)
    stream = data.loader(clips, batches, args.workers)
    features, labels = [], []
    for videos, label, _ in tqdm(stream, "clips", len(batches), leave=False, disable=None):
        features.append(train.encode_clips(videos, args, model).cpu())
        labels.append(label)
    return torch.cat(features), torch.cat(labels)


def search_persons(root, queries, gallery, model, args):
    """-> {protocol: scores} of the tracklets of query.txt and gallery.txt."""
    tracklets = queries + gallery
    config = model.config
    clips = TrackletClips(root, tracklets, config.num_frames, config.image_size)
    features, of = encode(model, clips, args)  # (clips, E), (clips,)
    sums = torch.zeros(len(tracklets), config.embed_dim).index_add(0, of, features)
    means = sums / of.bincount()[:, None]  # (tracklets, E)

    Q = len(queries)
    same = {}  # (Q, G), whether two tracklets have the same person, clothes, camera
    for key in ("person", "clothes", "camera"):
        values = numbered(tracklet[key] for tracklet in tracklets)
        same[key] = values[:Q, None] == values[Q:]
    excluded = {
        "general": same["person"] & same["camera"],
        "clothes-changing": same["person"] & (same["camera"] | same["clothes"])}
    persons = numbered(tracklet["person"] for tracklet in tracklets)
    scores = {}
    for protocol, exclude in excluded.items():
        scores[protocol] = retrieval_scores(means[:Q], persons[:Q], means[Q:], persons[Q:], exclude)
    return scores


def numbered(values):
    """Equal numbers for equal values, (n,)."""
    numbers = {}
    values = list(values)
    for value in values:
        numbers.setdefault(value, len(numbers))
    return torch.tensor([numbers[value] for value in values])


def search_classes(test, is_query, model, args):
    """-> {"every other clip": scores} of the test clips of classes."""
    clips = data.Clips(test, model.config.num_frames, model.config.image_size)
    features, labels = encode(model, clips, args)
    scores = retrieval_scores(features[is_query], labels[is_query],
                              features[~is_query], labels[~is_query])
    return {"every other clip": scores}


# ---- a data set, a run ----

def read_data(args):
    """-> the Split to train on, and a function (model, args) that searches the rest."""
    root = Path(args.data)
    lists = args.train_list, args.test_list, args.labels
    if (root / "query.txt").is_file() or (root / "gallery.txt").is_file():  # train.txt others have
        if any(lists):
            raise ValueError(f"{root}: has lists of its own, leave --train-list, --test-list and "
                             "--labels out")
        if not args.descriptions:
            args.templates = args.templates or ["a video of person {}"]
        queries, gallery = (read_tracklets(root, name) for name in ("query.txt", "gallery.txt"))
        split = persons_split(root) if args.train else None
        return split, partial(search_persons, root, queries, gallery)

    split, test = data.index_frames(root, *lists, args.allow_missing)
    before = Counter()
    is_query = []
    for _, label in test.clips:  # of each class every other clip
        is_query.append(before[label] % 2 == 0)
        before[label] += 1
    if max(before.values(), default=0) < 2:
        raise ValueError(f"{root}: no class has two test clips, one to search for the other")
    return split, partial(search_classes, test, torch.tensor(is_query))


def train_first(args, split, command):
    """Train on a Split -> the flags of the model that came of it, and what results.json has."""
    flags = argparse.Namespace(**vars(args))
    del flags.train, flags.json  # a run is the same without them
    flags.out = args.out or f"runs/{Path(args.data).resolve().name}"
    content = train.run(flags, split, {}, command)
    train.add_up(torch.tensor(0))  # of several processes one has written last.pt
    last = str(Path(flags.out, "last.pt"))
    flags.clip, flags.checkpoint, flags.num_frames = None, last, None
    if flags.prompts == "none" and flags.no_adapters and not flags.temporal_adapter:
        flags.clip, flags.checkpoint = last, None  # with --tune all a CLIP was trained
    return flags, content


def evaluate(args, command):
    """Train if asked, and print the scores; returns what --json prints."""
    split, search = read_data(args)
    content = {}
    if args.train:
        args, content = train_first(args, split, command)
    if train.rank():
        return {}  # one process searches
    args.eval_only = True
    model = train.build_model(args)
    scores = search(model, args)
    for name, row in scores.items():
        shown = [f"{key} {100 * row[key]:.1f} %" for key in ("rank1", "rank5", "mAP")]
        print(f"{name}: {', '.join(shown)}, n = {row['n']}")
        if row["left_out"]:
            print(f"{row['left_out']} queries without a match in the gallery are left out")
    if content:
        train.write_results(args, command, trainable=content["trainable"],
                            seconds=content["seconds"], results=scores)
    return {
        "clip": model.weights_path,
        "checkpoint": args.checkpoint,
        "num_frames": model.config.num_frames,
        "prompts": model.config.prompts,
        "results": scores}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    train.join_processes()
    args = parser().parse_args(argv)
    if not args.data:
        raise ValueError("--data is needed, a folder of CCVID or of class folders")
    if args.train and args.eval_only:
        raise ValueError("--train and --eval-only do not go together")
    if not args.train and (args.out or args.resume):
        raise ValueError("--out and --resume go with --train")
    command = shlex.join(["python", "examples/reid.py", *argv])
    aside = args.json and not train.rank()
    with contextlib.redirect_stdout(sys.stderr if aside else sys.stdout):
        content = evaluate(args, command)
    if args.json:
        print(json.dumps(content, indent=1))
    train.leave_processes()
    return content


if __name__ == "__main__":
    data.command(main)
