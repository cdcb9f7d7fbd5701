"""Frames on disk -> uint8 clips for a model; also videos -> frames, and a world of moving shapes.

    python data.py extract VIDEOS FRAMES     # videos, in class folders or not, to folders of JPEGs
    python data.py demo DIR                  # the demo world, in the same layout

Frames lie as <root>/<Class>/<clip>/img_00001.jpg, or as <root>/<clip>/img_00001.jpg with lists that
name the class of each clip. A clip leaves here as uint8 (T, 3, S, S); no model is known here.
"""

import argparse
import csv
import hashlib
import io
import math
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


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line instead of the usage of all flags
        raise ValueError(message)


def at_least(minimum, kind=int):
    def parse(text):
        value = kind(text)
        if not minimum <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, not {text}")
        return value
    parse.__name__ = kind.__name__  # for argparse's messages
    return parse


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

    Prints what it found. Returns (classes, train, test): names, and lists of (folder below root,
    position of its class). Raises OSError or ValueError that names the folder, or list and line.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    folders = _folders(root)
    full = (root / f for f in folders if any(os.scandir(root / f)))
    flat = next((bool(frame_names(f, needed=False)) and not _folders(f) for f in full), False)
    clips = folders if flat else [f"{f}/{clip}" for f in folders for clip in _folders(root / f)]
    if not clips:
        hint = ", but videos: run python data.py extract first" if _videos(root) else ""
        raise ValueError(f"{root}: holds no folders <class>/<clip>/ with frames{hint}")
    names = _read_labels(labels) if labels else dict(enumerate(() if flat else folders))
    if not names or flat and not (train_list or test_list):
        raise ValueError(f"{root}: clips without class folders need lists and --labels")
    classes = list(names.values())
    by_id, by_folder = ({key: i for i, key in enumerate(keys)} for keys in (names, classes))

    def class_of(clip, id=None, where=root):  # by the id where there is one, else by the folder
        folder = None if flat else clip.split("/")[0]
        if id is None and folder not in by_folder:
            raise ValueError(f"{where}: {clip} has no label, and no class has its folder's name")
        if id is not None and id not in names:
            raise ValueError(f"{where}: label {id} has no name in {labels or root}")
        if id is not None and folder in by_folder and names[id] != folder:
            raise ValueError(f"{where}: label {id} is {names[id]}, but the clip lies in {folder}"
                             + ("" if labels else "; labels of another order need --labels"))
        return by_folder[folder] if id is None else by_id[id]

    if train_list or test_list:
        rule, lists = "by list", (train_list, test_list)
        splits = [_read_split(file, clips, class_of, root) if file else [] for file in lists]
    else:
        rule, splits = _split([(clip, class_of(clip)) for clip in clips])
    print(f"{root}: {len(classes)} classes, {len(splits[0])} training and {len(splits[1])} test "
          f"clips ({rule})")
    shared = len(set(splits[0]) & set(splits[1]))
    if shared:
        print(f"warning: {shared} test clips are training clips too", file=sys.stderr)
    for split in splits:  # broken data is to show now, not after hours
        for clip in {label: clip for clip, label in reversed(split)}.values():
            read_frame(root / clip / frame_names(root / clip)[0])
    return classes, *splits


def _split(items):
    """-> the rule, [train, test], where no list says so."""
    names = {clip: clip.split("/")[1] for clip, _ in items}
    groups = {clip: re.fullmatch(r"v_.+_g(\d+)_c\d+(\.avi)?", name) for clip, name in names.items()}
    if all(groups.values()):
        rule, test = "split 1 of UCF101", {clip for clip, g in groups.items() if int(g[1]) <= 7}
    else:
        rule, test, by_label = "a fifth of each class by the hash of clip names", set(), {}
        for clip, label in items:
            rank = hashlib.sha256(names[clip].encode()).hexdigest()
            by_label.setdefault(label, []).append((rank, clip))
        for ranked in by_label.values():
            count = max(1, len(ranked) // 5) if len(ranked) > 1 else 0
            test |= {clip for _, clip in sorted(ranked)[:count]}
    return rule, [[i for i in items if i[0] not in test], [i for i in items if i[0] in test]]


def _folders(path):
    with os.scandir(path) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _videos(root):
    """The videos of a folder and of its class folders."""
    return [path for path in sorted([*root.glob("*"), *root.glob("*/*")]) if path.is_file()
            and path.suffix.lower() in VIDEOS and not path.name.startswith(".")]


def _stem(name):
    return name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in VIDEOS else name


def _read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error.reason})") from None


def _read_labels(path):
    """{id: class name} of a CSV `id,name`, whose header is optional, or of UCF101's `id name`."""
    names, number = {}, 0
    try:
        for number, row in enumerate(csv.reader(io.StringIO(_read_text(path)), strict=True), 1):
            row = [cell.strip() for cell in (row if len(row) != 1 else row[0].split(maxsplit=1))]
            if not row or number == 1 and len(row) > 1 and not row[0].isdecimal():
                continue
            if len(row) < 2 or not row[0].isdecimal() or not row[1]:
                raise ValueError(f"{path}:{number}: expected id,name and not {','.join(row)!r}")
            if names.setdefault(int(row[0]), row[1]) != row[1]:
                raise ValueError(f"{path}:{number}: id {row[0]} has another name already")
    except csv.Error as error:
        raise ValueError(f"{path}:{number + 1}: {error}") from None
    if not names:
        raise ValueError(f"{path}: holds no lines id,name")
    return dict(sorted(names.items()))


def _read_split(path, clips, class_of, root):
    """[(clip, class)] of a list. As names may hold blanks, a line can mean several things."""
    by_name, by_stem, split = {}, {}, {}
    for clip in clips:
        name = clip.split("/")[-1]
        by_name.setdefault(name, []).append(clip)
        by_stem.setdefault(_stem(name), []).append(clip)
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        where, line, found = f"{path}:{number}", line.strip(), {}
        if not line:
            continue
        for n in (2, 1, 0):  # <number of frames> <label>, or <label>, or neither
            clip, *words = line.rsplit(maxsplit=n)
            if len(words) == n and all(word.isdecimal() for word in words):
                *_, parent, name = "", *re.split(r"[/\\]+", clip.rstrip("/\\"))
                there = by_name.get(name) or by_stem.get(_stem(name), [])
                if len(there) > 1:  # clips of one name in several classes
                    there = [c for c in there if c.split("/")[0] == parent] or there
                found.update({c: words[-1] if words else None for c in there})
        if len(found) != 1:
            problem = f"fits all of {', '.join(found)}" if found else f"fits no folder below {root}"
            raise ValueError(f"{where}: {line!r} {problem}; expected <clip> [<frames>] <label>")
        (clip, word), = found.items()
        label = class_of(clip, None if word is None else int(word), where)
        if split.setdefault(clip, label) != label:
            raise ValueError(f"{where}: {clip} had another label before")
    return list(split.items())


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
    for video in sorted(_videos(root), key=lambda path: len(path.parts)):
        target = Path(frames) / video.relative_to(root).with_suffix("")
        other = jobs.get(target) or jobs.get(target.parent)  # a flat video named like a class
        if other:
            raise ValueError(f"{other} and {video} would share a folder of {frames}")
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
            [ffmpeg, "-nostdin", "-loglevel", "error", "-threads", "1", "-i", video.absolute(),
             "-fps_mode", "passthrough", "-q:v", "2",
             "-vf", "scale='if(gt(iw,ih),-1,256)':'if(gt(iw,ih),256,-1)'", "img_%05d.jpg"],
            cwd=part, capture_output=True, text=True, errors="replace")  # a path may hold a %
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


def command(run):
    """Run a command line's function; what is wrong with its input is one line and status 2."""
    try:
        run()
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        line = "".join(c if c.isprintable() else " " for c in str(error))  # names may hold any
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: stopped", file=sys.stderr)
        sys.exit(130)


def main():
    parser = Parser(description="Frames for train.py.")
    commands = parser.add_subparsers(dest="command", required=True)
    extracting = commands.add_parser("extract", help="turn videos into folders of frames")
    extracting.add_argument("videos", help="class folders of videos, or a folder of videos")
    extracting.add_argument("frames", help="the folder to write to; continued if it exists")
    extracting.add_argument("--workers", type=at_least(1), help="videos at a time (all cores)")
    rendering = commands.add_parser("demo", help="render the demo world")
    rendering.add_argument("dir", help="the folder to create")
    rendering.add_argument("--seed", type=at_least(0), default=0)
    args = parser.parse_args()
    if args.command == "extract":
        extract(args.videos, args.frames, args.workers)
    else:
        demo(args.dir, args.seed)


if __name__ == "__main__":
    command(main)
