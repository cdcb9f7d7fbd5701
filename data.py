"""Frames on disk -> uint8 clips for a model; also videos -> frames, and a world of moving shapes.

    python data.py extract VIDEOS FRAMES     # videos, in class folders or not, to folders of JPEGs
    python data.py demo DIR                  # the demo world, in the same layout

Frames lie as <root>/<Class>/<clip>/img_00001.jpg, or as <root>/<clip>/img_00001.jpg with lists that
name the class of each clip. A clip leaves here as uint8 (T, 3, S, S); no model is known here.
"""

import argparse
import csv
import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2
from tqdm import tqdm

IMAGES = (".jpg", ".jpeg", ".png")
VIDEOS = (".avi", ".mp4", ".webm", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg")
TEMPLATES = (  # of the official code
    "a photo of action {}", "a picture of action {}", "Human action of {}", "{}, an action",
    "{} this is an action", "{}, a video of action", "Playing action of {}", "{}",
    "Playing a kind of action, {}", "Doing a kind of action, {}", "Look, the human is {}",
    "Can you recognize the action of {}?", "Video classification of {}", "A video of {}",
    "The man is {}", "The woman is {}")


def class_text(name):
    """A class name in words: ApplyEyeMakeup -> apply eye makeup, brush_hair -> brush hair."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name.replace("_", " ")).lower()


# ---- which clips there are ----

def index_frames(root, train_list=None, test_list=None, labels=None):
    """Find the clips below `root` and their classes; no clip's own folder is listed for that.

    train_list, test_list: files of lines `<clip> [<number of frames>] [<label>]` (official, TSN,
    mmaction2), where the longest tail of <clip> that exists below root counts. labels: a CSV
    `id,name`; without it the classes are the sorted class folders and ids their positions. Without
    lists UCF101's names give its split 1, all others a stable split: of each class the
    max(1, n // 5) clips with the smallest name hash are for testing, the only clip never.

    Returns (classes, train, test): names, and lists of (folder below root, position of its class).
    Raises OSError or ValueError that names the folder, or the list and its line.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    folders = _folders(root)
    flat = bool(folders and frame_names(root / folders[0], needed=False))
    clips = folders if flat else [f"{f}/{clip}" for f in folders for clip in _folders(root / f)]
    if not clips:
        videos = any(path.suffix.lower() in VIDEOS for path in [*root.glob("*"), *root.glob("*/*")])
        raise ValueError(f"{root}: holds no folders <class>/<clip>/ with frames" + (
            ", but videos: run python data.py extract first" if videos else ""))
    names = _read_labels(labels) if labels else dict(enumerate(() if flat else folders))
    if not names or flat and not (train_list or test_list):
        raise ValueError(f"{root}: clips without class folders need lists and --labels")
    classes, position = list(names.values()), {id: i for i, id in enumerate(names)}

    def class_of(clip, id=None, where=root):  # by the id where there is one, else by the folder
        folder = None if flat else clip.split("/")[0]
        if id is None and folder not in classes:
            raise ValueError(f"{where}: {clip} has no label, and no class has its folder's name")
        if id is not None and id not in names:
            raise ValueError(f"{where}: label {id} has no name in {labels or root}")
        if not labels and id is not None and names[id] != folder:
            raise ValueError(f"{where}: label {id} is {names[id]} among the sorted class folders, "
                             f"but the clip lies in {folder}: give --labels")
        return classes.index(folder) if id is None else position[id]

    if not (train_list or test_list):
        return classes, *_checked(root, _split([(clip, class_of(clip)) for clip in clips]))
    by_name = {}
    for clip in clips:
        for key in {clip.split("/")[-1], _stem(clip.split("/")[-1])}:
            by_name.setdefault(key, []).append(clip)
    splits = []
    for file in (train_list, test_list):
        split = {}
        for where, meanings in _read_list(file) if file else ():
            clip, id = _match(where, meanings, by_name, root)
            label = class_of(clip, id, where)
            if split.setdefault(clip, label) != label:
                raise ValueError(f"{where}: {clip} had another label before")
        splits.append(list(split.items()))
    return classes, *_checked(root, splits)


def _checked(root, splits):
    """Open each class's first frame in each split: broken data is to show now, not after hours."""
    for split in splits:
        for clip in {label: clip for clip, label in reversed(split)}.values():
            read_frame(root / clip / frame_names(root / clip)[0])
    return splits


def _split(items):
    """-> train, test, where no list says so."""
    groups = [re.fullmatch(r"v_.+_g(\d+)_c\d+(\.avi)?", clip.split("/")[1]) for clip, _ in items]
    if all(groups):  # UCF101: groups 1-7 are its test split 1
        held_out = {clip for (clip, _), group in zip(items, groups) if int(group[1]) <= 7}
    else:
        held_out, by_label = set(), {}
        for clip, label in items:
            rank = hashlib.sha256(clip.split("/")[1].encode()).hexdigest()
            by_label.setdefault(label, []).append((rank, clip))
        for ranked in by_label.values():
            count = max(1, len(ranked) // 5) if len(ranked) > 1 else 0
            held_out |= {clip for _, clip in sorted(ranked)[:count]}
    return [i for i in items if i[0] not in held_out], [i for i in items if i[0] in held_out]


def _folders(path):
    with os.scandir(path) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _stem(name):
    return name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in VIDEOS else name


def _read_labels(path):
    """{id: class name} of a CSV `id,name`, whose header is optional, or of UCF101's `id name`."""
    names = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.reader(file), 1):
            row = row if len(row) != 1 else row[0].split(maxsplit=1)
            if not row or (number == 1 and not row[0].strip().isdigit()):
                continue
            if len(row) < 2 or not row[0].strip().isdigit() or not row[1].strip():
                raise ValueError(f"{path}:{number}: expected id,name and not {','.join(row)!r}")
            if names.setdefault(int(row[0]), row[1].strip()) != row[1].strip():
                raise ValueError(f"{path}:{number}: id {row[0]} has a name already")
    return dict(sorted(names.items()))


def _read_list(path):
    """Yield (where, [(clip, label), ...]) per line: all it can mean, since names hold blanks."""
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            meanings = []
            for n in (2, 1):  # <number of frames> <label>, or <label>
                clip, *words = line.strip().rsplit(maxsplit=n) or [""]
                if len(words) == n and all(word.isdigit() for word in words):
                    meanings.append((clip, int(words[-1])))
            if line.strip():
                yield f"{path}:{number}", [*meanings, (line.strip(), None)]


def _match(where, meanings, by_name, root):
    """-> (folder below root, label) for the first meaning whose clip is there."""
    for clip, label in meanings:
        *_, parent, name = "", *re.split(r"[/\\]+", clip.rstrip("/\\"))
        found = by_name.get(name) or by_name.get(_stem(name)) or []
        if len(found) > 1:  # clips of one name in several classes
            found = [folder for folder in found if folder.split("/")[0] == parent]
        if len(found) == 1:
            return found[0], label
    line = meanings[-1][0]
    known = any(_stem(word) in by_name for word in re.split(r"[/\\\s]+", line))
    problem = "bad label in, or several folders for," if known else f"no folder below {root} for"
    raise ValueError(f"{where}: {problem} {line!r}")


# ---- from a clip's folder to pixels ----

def frame_names(folder, needed=True):
    """The RGB frames of a folder in the order of their numbers; optical flow is left out.

    Raises ValueError if there are none, unless they are not needed.
    """
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.name.lower().endswith(IMAGES)
                 and not re.match(r"(flow_)?[xy]_|\.", e.name)]
    if needed and not names:
        raise ValueError(f"{folder}: holds no frames")
    return sorted(names, key=lambda n: (int((re.findall(r"\d+", n) or [0])[-1]), n))


def read_frame(path):
    """An RGB image; one that cannot be decoded is a ValueError that names it."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: unreadable frame ({error})") from None


def sample_frames(count, num_frames, rng=None):
    """Which `num_frames` of `count` frames, as positions from 0 in ascending order.

    With a numpy Generator (training): a random frame of each of equal segments; a shorter clip
    gives all of its frames and random repeats. Without: the official code's centres of segments.
    """
    i = np.arange(num_frames)
    if rng is not None and count >= num_frames:
        edges = np.arange(num_frames + 1) * count // num_frames
        return rng.integers(edges[:-1], edges[1:])
    if rng is not None:
        repeats = rng.integers(count, size=num_frames - count)
        return np.sort(np.concatenate([np.arange(count), repeats]))
    if count < num_frames:
        return i * count // num_frames
    if num_frames == 1:
        return np.array([count // 2])
    return np.floor(i * count / num_frames + (count / num_frames - 1) / 2).astype(int)


def random_crop(rng):
    """A draw of TSN's multi-scale crop: (width, height) as scales of the shorter side, place."""
    scales = (1, 0.875, 0.75, 0.66)
    pairs = [(w, h) for i, w in enumerate(scales) for j, h in enumerate(scales) if abs(i - j) <= 1]
    places = [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0),
              (1, 1), (3, 1), (1, 3), (3, 3)]
    return pairs[rng.integers(len(pairs))], places[rng.integers(len(places))]


def crop_frame(image, size, crop=None):
    """An image as (size, size, 3) uint8: a drawn crop, or the centre of the resized whole.

    Evaluation: shorter side to size * 256 // 224, bicubic, centre crop, in a single resize of the
    region that is left.
    """
    w, h = image.size
    if crop is None:
        short = size * 256 // 224
        new_w, new_h = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
        x, y = round((new_w - size) / 2), round((new_h - size) / 2)
        box = (x * w / new_w, y * h / new_h, (x + size) * w / new_w, (y + size) * h / new_h)
    else:
        (scale_w, scale_h), (place_x, place_y) = crop
        crop_w, crop_h = max(1, int(min(w, h) * scale_w)), max(1, int(min(w, h) * scale_h))
        x, y = (w - crop_w) // 4 * place_x, (h - crop_h) // 4 * place_y
        box = (x, y, x + crop_w, y + crop_h)
    method = Image.Resampling.BICUBIC if crop is None else Image.Resampling.BILINEAR
    return np.asarray(image.resize((size, size), method, box=box))


class Clips(Dataset):
    """Clips of (folder, label) pairs below a root as (uint8 (T, 3, S, S), label, index).

    A key is (epoch, index): all that is random is a function of (seed, epoch, index). `train`
    samples frames at random, `augment` also crops and, with `flip`, mirrors. What goes wrong in a
    worker process is returned rather than raised, so that it arrives as one line.
    """

    def __init__(self, root, items, num_frames, image_size, train=False, augment=False, flip=False,
                 seed=0):
        self.root, self.items = root, items
        self.num_frames, self.image_size = num_frames, image_size
        self.train, self.augment, self.flip, self.seed = train, augment, flip, seed

    def __len__(self):
        return len(self.items)

    def load(self, epoch, index):
        rng = np.random.default_rng((self.seed, epoch, index)) if self.train else None
        folder = Path(self.root, self.items[index][0])
        names = frame_names(folder)
        chosen = sample_frames(len(names), self.num_frames, rng)
        crop = random_crop(rng) if self.augment else None
        flip = self.augment and self.flip and rng.random() < 0.5
        clip = np.stack([crop_frame(read_frame(folder / names[i]), self.image_size, crop)
                         for i in chosen])  # (T, S, S, 3)
        clip = clip[:, :, ::-1] if flip else clip
        return torch.from_numpy(np.ascontiguousarray(clip.transpose(0, 3, 1, 2)))

    def __getitem__(self, key):
        try:
            return self.load(*key), self.items[key[1]][1], key[1]
        except (OSError, ValueError) as error:
            return error


def _collate(samples):
    errors = [sample for sample in samples if isinstance(sample, Exception)]
    return errors[0] if errors else default_collate(samples)


def loader(clips, batches, workers, pin_memory=False):
    """Yield (videos, labels, indices) for `batches` of keys; a bad frame is a ValueError."""
    for batch in DataLoader(clips, batch_sampler=batches, num_workers=workers, collate_fn=_collate,
                            pin_memory=pin_memory):
        if isinstance(batch, Exception):
            raise ValueError(str(batch))
        yield batch


_COLOUR = v2.Compose([v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                      v2.RandomGrayscale(p=0.2)])


def jitter_colour(videos):
    """Colour augmentation of uint8 (B, T, 3, S, S), drawn once per clip from torch's generator."""
    return torch.stack([_COLOUR(video) for video in videos])


# ---- videos to frames ----

def extract(videos, frames, workers=None):
    """Turn a folder of videos (of class folders, or flat) into the layout of `index_frames`.

    The shorter side becomes 256, every frame of the file one JPEG. A clip's folder is renamed into
    place when it is complete, so a stopped extraction continues. Broken videos are skipped and
    reported at the end. Returns the number of clips there are. Raises ValueError, before anything
    is written, where two videos of a class would share a folder.
    """
    import imageio_ffmpeg
    ffmpeg, root, jobs = imageio_ffmpeg.get_ffmpeg_exe(), Path(videos), {}
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    for video in sorted([*root.glob("*"), *root.glob("*/*")]):
        if video.suffix.lower() in VIDEOS and video.is_file():
            target = Path(frames) / video.relative_to(root).with_suffix("")
            if target in jobs:
                raise ValueError(f"{jobs[target]} and {video} would share the folder {target}")
            jobs[target] = video
    if not jobs:
        raise ValueError(f"{root}: no videos ({' '.join(VIDEOS)}) in it or its class folders")

    def convert(job):
        target, video = job
        if target.is_dir():
            return None
        part = target.with_name(f".{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        result = subprocess.run(
            [ffmpeg, "-nostdin", "-loglevel", "error", "-threads", "1", "-i", video,
             "-fps_mode", "passthrough", "-q:v", "2",
             "-vf", "scale='if(gt(iw,ih),-1,256)':'if(gt(iw,ih),256,-1)'", part / "img_%05d.jpg"],
            capture_output=True, text=True, errors="replace")
        said = (result.stderr.strip().splitlines() or ["no frames"])[-1]
        if result.returncode or not any(part.iterdir()):
            shutil.rmtree(part)
            return f"skipped {video}: {said}"
        part.rename(target)
        return f"damaged {video}, its readable frames are kept: {said}" if result.stderr else None

    problems = []
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for problem in tqdm(pool.map(convert, jobs.items()), "videos", len(jobs)):
            problems += [problem] if problem else []
    print(*problems, sep="\n", end="\n" * bool(problems), file=sys.stderr)
    done = sum(target.is_dir() for target in jobs)
    print(f"{done} of {len(jobs)} videos are frames in {frames}")
    if not done:
        raise ValueError(f"{root}: none of its videos could be read")
    return done


# ---- the demo world ----

COLOURS = dict(red=(225, 45, 45), green=(40, 190, 60), blue=(55, 80, 235), yellow=(235, 215, 40),
               purple=(165, 50, 200), white=(245, 245, 245))
TWINS = (("left", "right"), ("top", "bottom"), ("large", "small"), ("clear", "faint"))


def demo_class(colour, word, still=False):
    """The class name of an action, or of the stills that show how the action ends."""
    place = word in TWINS[0] + TWINS[1]
    if still:
        return f"a {colour} shape {'at the' if place else 'that is'} {word}"
    return f"a {colour} shape {'moving to the' if place else 'getting'} {word}"


def demo_frames(colour, pair, t, rng, size=36):
    """Frames (len(t), size, size, 3) of a shape on grey that moves, grows or fades as t says.

    t runs from 1 to -1 for the first of twins and back for the second: nothing but the order of the
    frames tells them apart. The world is 32 x 32; the rim is what evaluation crops away.
    """
    shape, grey = rng.integers(5), rng.uniform(10, 110)
    x, y = size / 2 - 0.5 + rng.uniform(-2, 2, (2, 1))
    radius, opacity = rng.uniform(4.5, 6.5), rng.uniform(0.55, 0.7)
    travel, growth = rng.uniform(15, 21) / 2, rng.uniform(0.6, 0.8) / 2
    x, y = x + travel * t * (pair == 0), y + travel * t * (pair == 1)
    r = (radius * np.exp(-growth * t * (pair == 2)))[:, None, None]
    opacity = np.minimum(1, opacity * (1 - 0.6 * t * (pair == 3)))[:, None, None]
    dx = np.abs(np.arange(size) - x[:, None])[:, None, :]
    dy = (np.arange(size) - y[:, None])[:, :, None]
    distance = np.hypot(dx, dy)
    edge = (distance - r,  # circle, square, triangle, cross, ring
            np.maximum(dx, abs(dy)) - 0.9 * r,
            np.maximum(dy, 0.87 * dx - dy / 2) - 0.65 * r,
            np.minimum(np.maximum(dx, 3 * abs(dy)), np.maximum(3 * dx, abs(dy))) - r,
            abs(distance - 0.7 * r) - 0.3 * r)[shape]
    mask = (opacity * np.clip(0.5 - edge, 0, 1))[..., None]  # (T, size, size, 1)
    frames = grey + mask * (np.array(COLOURS[colour]) - grey)
    return np.clip(frames + rng.normal(0, 6, frames.shape), 0, 255).astype(np.uint8)


def demo(root, seed=0, stills=False):
    """Render the demo world's 48 actions, or stills under 48 captions, below a new folder `root`.

    In two of the four pairs a colour has no training clips: 24 base classes, 24 novel ones. Names
    are like UCF101's, so that groups 1-7 are the test split: 20 clips per class (stills: 8).
    """
    root, part = Path(root), Path(f"{root}.part")
    if root.exists():
        raise ValueError(f"{root}: exists already")
    shutil.rmtree(part, ignore_errors=True)
    classes = [(i, colour, pair, twin) for i, colour in enumerate(COLOURS)
               for pair in range(4) for twin in range(2)]
    for i, colour, pair, twin in tqdm(classes, f"rendering {root.name}"):
        word = TWINS[pair][twin]
        test, train = (8, 208) if stills else (20, 0 if pair in (i % 4, (i + 1) % 4) else 32)
        t = np.linspace(1, -1, 12)[-1 if stills else 0:] * (-1) ** twin
        for k in range(test + train):
            take, group = divmod(k, 7) if k < test else divmod(k - test, 18)
            group += 1 if k < test else 8
            clip = f"v_{colour.title()}{word.title()}_g{group:02d}_c{take + 1:02d}"
            folder = part / demo_class(colour, word, stills) / clip
            folder.mkdir(parents=True)
            rng = np.random.default_rng((seed, stills, i, pair, twin, k))
            for n, frame in enumerate(demo_frames(colour, pair, t, rng), 1):
                Image.fromarray(frame).save(folder / f"img_{n:05d}.jpg", quality=90)
    part.rename(root)


def main():
    parser = argparse.ArgumentParser(description="Frames for train.py.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("extract", help="turn a folder of videos into folders of frames")
    command.add_argument("videos", help="class folders of videos, or a folder of videos")
    command.add_argument("frames", help="the folder to write to; continued if it exists")
    command.add_argument("--workers", type=int, help="videos at a time (default: all cores)")
    command = commands.add_parser("demo", help="render the demo world")
    command.add_argument("dir", help="the folder to create")
    command.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        if args.command == "extract":
            extract(args.videos, args.frames, args.workers)
        else:
            demo(args.dir, args.seed)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
