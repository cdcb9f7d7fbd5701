"""Search clips by clips: how often does a clip find one of its own class or person?

    python examples/reid.py --data frames --clip ViT-B/16                    # plain CLIP
    python examples/reid.py --data frames --checkpoint runs/frames/last.pt   # what was trained

Of the test clips in class folders, where a class may be a person, every other one is a query that
searches the rest. Printed are rank-1, rank-5 and mAP, with --json as one document.
"""

import contextlib
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import train


def parser():
    p = data.Parser(allow_abbrev=False, description="Search clips by clips. Defaults are in "
                    "parentheses.")
    flag = p.add_argument
    flag("--data", required=True, help="folder of frames: <class>/<clip>/img_00001.jpg")
    flag("--json", action="store_true", help="the scores as JSON; all else goes to stderr")
    train.add_model_flags(p)
    flag("--batch-size", type=data.at_least(1), help="clips at a time (70)")
    flag("--workers", type=data.at_least(0), help="processes that load clips (up to 8)")
    return p


def retrieval_scores(queries, query_labels, gallery, gallery_labels):
    """Rank a gallery of clips for each query clip by the cosine of their features.

    queries: (Q, E), gallery: (G, E), normalised here; their labels, (Q,) and (G,), are indices of
    classes or identities. Returns {"rank1", "rank5", "mAP"} in [0, 1]: the share of queries with a
    match among the first 1 and 5 (CMC, R@1 and R@5), and the mean average precision. A query
    without a match in the gallery is a ValueError.
    """
    cosine = F.normalize(queries.float(), dim=-1) @ F.normalize(gallery.float(), dim=-1).mT
    order = cosine.argsort(dim=1, descending=True, stable=True)  # (Q, G)
    hits = (gallery_labels[order] == query_labels[:, None]).float()  # (Q, G)
    unmatched = ~hits.any(1)
    if unmatched.any():
        raise ValueError(f"no clip of the gallery has label {query_labels[unmatched][0].item()}")
    ranks = torch.arange(1, len(gallery) + 1, device=hits.device)
    precision = hits.cumsum(1) / ranks  # at each rank
    average = (precision * hits).sum(1) / hits.sum(1)  # over the ranks with a match, (Q,)
    return {
        "rank1": hits[:, :1].any(1).float().mean().item(),
        "rank5": hits[:, :5].any(1).float().mean().item(),
        "mAP": average.mean().item()}


@torch.inference_mode()
def encode(model, split, args):
    """Features of every clip of a Split, (n, E), on the CPU."""
    model.eval()
    clips = data.Clips(split, model.config.num_frames, model.config.image_size)
    batches = []
    for part in torch.arange(len(clips)).split(args.batch_size):
        batches.append([(0, i) for i in part.tolist()])  # keys: (epoch, clip)
    stream = data.loader(clips, batches, args.workers)
    features = []
    for videos, _, _ in tqdm(stream, "clips", len(batches), leave=False, disable=None):
        features.append(train.encode_clips(videos, args, model).cpu())
    features = torch.cat(features)
    if not features.isfinite().all():
        raise ValueError("the model's features are not finite: its weights are broken")
    return features


def search(args):
    """Print the scores; returns what --json prints."""
    _, test = data.index_frames(args.data)
    labels = torch.tensor([label for _, label in test.clips])
    found = torch.isin(labels[::2], labels[1::2])  # the other queries have nothing to find
    if not found.any():
        raise ValueError(f"{args.data}: no class has two test clips, one to search for the other")
    model = train.build_model(args)
    features = encode(model, test, args)
    scores = retrieval_scores(
        features[::2][found], labels[::2][found],
        features[1::2], labels[1::2])

    n = int(found.sum())
    left_out = len(found) - n
    if left_out:
        print(f"{left_out} queries without a match in the gallery are left out")
    print(*(f"{name} {100 * score:.1f} %" for name, score in scores.items()), f"n = {n}", sep=", ")
    return {
        "clip": model.weights_path,
        "checkpoint": args.checkpoint,
        "num_frames": model.config.num_frames,
        "prompts": model.config.prompts,
        **scores,
        "n": n,
        "left_out": left_out,
        "gallery": len(labels) - len(found)}


def main(argv=None):
    args = train.parser().parse_args([])  # what the flags of this program leave open
    args.eval_only = True
    args = parser().parse_args(argv, args)
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        content = search(args)
    if args.json:
        print(json.dumps(content, indent=1))


if __name__ == "__main__":
    data.command(main)
