"""Frames on disk -> uint8 clips for a model; also videos -> frames, and a world of moving shapes.

    python data.py extract VIDEOS FRAMES     # videos, in class folders or not, to folders of JPEGs
    python data.py check FRAMES              # decode every frame, list what is broken
    python data.py demo DIR                  # the demo world, in the same layout

Frames lie as <root>/<Class>/<clip>/img_00001.jpg, or as <root>/<clip>/img_00001.jpg with lists that
name the class of each clip. A clip leaves here as uint8 (T, 3, S, S); no model is known here.
"""

import argparse
import csv
import functools
import gc
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

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
            raise argparse.ArgumentTypeError(f"must be at least {minimum} and finite, not {text}")
        return value
    parse.__name__ = kind.__name__  # for argparse's messages
    return parse


def class_text(name):
    """A class name in words: ApplyEyeMakeup -> apply eye makeup, brush_hair -> brush hair."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name.replace("_", " ")).lower()


@functools.cache
def class_key(name):
    """What the spellings of a class share: BrushHair, brush_hair, Brush hair -> brushhair."""
    return re.sub(r"[\s()',-]", "", class_text(name))


# ---- which clips there are ----

class Split(NamedTuple):
    """Clips of a data set: pairs of a folder below `root` and its class's index in `classes`."""
    root: Path
    classes: list
    clips: list
    source: str  # the list or the rule that chose them

    def only(self, keys):
        """The Split of those classes whose `class_key` is in `keys`."""
        kept = [k for k, name in enumerate(self.classes) if class_key(name) in keys]
        position = {k: i for i, k in enumerate(kept)}
        return self._replace(classes=[self.classes[k] for k in kept], clips=[
            (clip, position[k]) for clip, k in self.clips if k in position])

    def shots(self, count, seed):
        """`count` random clips of each class; a seed's fewer shots are among its more shots."""
        ranked = _ranked(self.clips, f"{seed}/")
        for k, name in enumerate(self.classes):
            if len(ranked[k]) < count:
                raise ValueError(f"{self.root}: {name} has {len(ranked[k])} training clips, which "
                                 f"is less than {count} shots")
        chosen = {clip for clips in ranked.values() for clip in clips[:count]}
        return self._replace(clips=[item for item in self.clips if item[0] in chosen],
                             source=f"{count} shots of {self.source}")


def index_frames(root, train_list=None, test_list=None, labels=None, allow_missing=False,
                 whole=False):
    """Find the clips below `root` and their classes, without listing the frames of every clip.

    Lists (see `_read_list`) name clips by paths, matched by the longest tail that exists below
    root, and classes by name, by numbers of `labels` (see `read_classes`), or not at all: then
    class folders do, and numbers have to agree with them. Classes are those of `labels`, else of
    the lists, else the folders. Without lists UCF101's names give its split 1, a folder train
    beside others that split, and all else a stable one: of each class the max(1, n // 5) clips with
    the smallest name hash are for testing, but never a class's only clip. `whole`: all clips are.

    Prints what it found; returns a training and a test Split. Raises OSError or ValueError that
    names the folder, or list and line, and for clips without a folder unless `allow_missing`.
    """
    root, lists = Path(root), (train_list, test_list)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    names = {number: name for number, name, _ in read_classes(labels)} if labels else {}
    folders, given = _clip_folders(root), {class_key(name): name for name in names.values()}
    flat, splits, found, numbers = "/" not in folders[0], ({}, {}), {}, {}
    if flat and not any(lists):
        raise ValueError(f"{root}: clips without class folders need --train-list or --test-list, "
                         "and --labels")
    entries = [(i, *entry) for i, path in enumerate(lists) if path
               for entry in _match(path, i, folders, root, allow_missing)]
    entries = entries or [(1, root, clip, clip.split("/")[-2], None) for clip in folders]
    for i, where, clip, folder, label in entries:
        if names and isinstance(label, int) and label not in names:
            raise ValueError(f"{where}: label {label} has no name in {labels}")
        name = label if isinstance(label, str) else names.get(label, folder)
        key, there = class_key(name or ""), class_key(folder or "")
        if not name or given and key not in given:
            raise ValueError(f"{where}: the class of {clip} " + (
                f"is not in {labels}" if labels else "has no name; --labels names numbers"))
        if there != key and (there in given or not (flat or given)):
            raise ValueError(f"{where}: {clip} is {name} by its label, but lies in {folder}")
        if isinstance(label, int) and not given and (
                numbers.setdefault(label, key) != key or numbers.setdefault(key, label) != label):
            raise ValueError(f"{where}: label {label} is not {name} in all lines; see --labels")
        if splits[i].setdefault(clip, key) != key:
            raise ValueError(f"{where}: {clip} had another class before")
        found[key] = name

    sources = [Path(path).name if path else "all clips" for path in lists]
    if not (any(lists) or whole):
        sources, splits = _split(splits[1])
    classes = given or {key: found[key] for key in sorted(
        found, key=lambda key: (numbers.get(key, 0), found[key]))}
    position = {key: k for k, key in enumerate(classes)}
    train, test = (Split(root, list(classes.values()), [(c, position[key]) for c, key in s.items()],
                         source) for s, source in zip(splits, sources))
    source = ", ".join(dict.fromkeys(split.source for split in (train, test) if split.clips))
    print(f"{root}: {len(classes)} classes, {len(train.clips)} training and {len(test.clips)} test "
          f"clips ({source})")
    shared = len(splits[0].keys() & splits[1].keys())
    if shared:
        print(f"warning: {shared} test clips are training clips too", file=sys.stderr)
    for split in (train, test):  # broken data is to show now, not after hours
        for clip in {label: clip for clip, label in reversed(split.clips)}.values():
            read_frame(root / clip / frame_names(root / clip)[0])
    return train, test


def _clip_folders(root):
    """Folders below root, <clip>, <class>/<clip> or train/<class>/<clip>: as the first one lies."""
    clips = _folders(root)
    for _ in range(1 + any("train" in name.lower() for name in clips)):
        first = next((root / clip for clip in clips if os.listdir(root / clip)), None)
        if first and frame_names(first, needed=False) and not _folders(first):
            break
        clips = [f"{folder}/{name}" for folder in clips for name in _folders(root / folder)]
    if not clips:
        hint = ", but videos: run python data.py extract first" if _videos(root) else ""
        raise ValueError(f"{root}: holds no folders <class>/<clip>/ with frames{hint}")
    return clips


def _ranked(clips, salt=""):
    """{class: its clips in the order of the hashes of their names}."""
    ranked = defaultdict(list)
    for clip in sorted(clips, key=lambda clip: (hashlib.sha256(
            (salt + clip[0].split("/")[-1]).encode()).hexdigest(), clip)):
        ranked[clip[1]].append(clip[0])
    return ranked


def _split(classes):
    """{clip: class} -> the sources and the clips of training and test, where no list says so."""
    groups = {clip: re.fullmatch(r"v_.+_g(\d+)_c\d+(\.avi)?", clip.split("/")[-1])
              for clip in classes}
    if any(clip.count("/") == 2 for clip in classes):
        source = "by the folder train"
        test = {clip for clip in classes if "train" not in clip.split("/")[0].lower()}
    elif all(groups.values()):
        source, test = "split 1 of UCF101", {clip for clip, g in groups.items() if int(g[1]) <= 7}
    else:
        source = "a fifth of each class by the hash of clip names"
        test = {clip for clips in _ranked(classes.items()).values()
                for clip in clips[:max(1, len(clips) // 5) if len(clips) > 1 else 0]}
    return [source] * 2, [{clip: key for clip, key in classes.items() if (clip in test) == wanted}
                          for wanted in (False, True)]


def _folders(path):
    with os.scandir(path) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _videos(root):
    """The videos of a folder and of its class folders."""
    return [path for path in sorted([*root.glob("*"), *root.glob("*/*")]) if path.is_file()
            and path.suffix.lower() in VIDEOS and not path.name.startswith(".")]


def _stem(name):
    stem, _, suffix = name.rpartition(".")
    return stem if f".{suffix.lower()}" in VIDEOS else name


def _match(path, which, folders, root, allow_missing):
    """Yield (where, clip, its class folder or else that of the list's path, label) per entry."""
    by_stem, missing = defaultdict(list), []
    for folder in folders:  # in lower case, as UCF101 writes HandstandPushups in two ways
        *above, name = folder.split("/")
        by_stem[_stem(name).lower()].append((above[::-1], name, folder))
    classes = {class_key(folder.split("/")[-2]) for folder in folders if "/" in folder}
    entries = [(where, [(re.split(r"[/\\]+", listed.rstrip("/\\"))[::-1], label)
                        for listed, label in readings])
               for where, readings in _read_list(Path(path), which)]
    in_classes = any(class_key(parts[1]) in classes for _, readings in entries
                     for parts, _ in readings if len(parts) > 1)

    def find(name, *above):
        there = by_stem.get(_stem(name).lower(), [])
        if above and in_classes:  # one of this name in another class is another clip
            there = [clip for clip in there if class_key(clip[0][0]) == class_key(above[0])]
        fits = [(len(os.path.commonprefix([parents, [*above]])), own == name,
                 _stem(own) == _stem(name)) for parents, own, _ in there]
        return {folder: next(iter(parents or above), None)
                for (parents, _, folder), fit in zip(there, fits) if fit == max(fits)}

    for where, readings in entries:
        found = {clip: (folder, label) for parts, label in readings
                 for clip, folder in find(*parts).items()}
        listed = "/".join(readings[0][0][::-1])
        if len(found) > 1:
            raise ValueError(f"{where}: {listed} fits all of {', '.join(found)}")
        missing += [] if found else [listed]
        for clip, (folder, label) in found.items():
            yield where, clip, folder, label
    if not entries:
        raise ValueError(f"{path}: names no clips")
    if missing:
        problem = (f"{path}: {len(missing)} of {len(entries)} clips have no folder below {root}: "
                   + ", ".join(missing[:10] + ["..."] * (len(missing) > 10)))
        if len(missing) == len(entries):
            raise ValueError(f"{problem}; is that the right folder?")
        if not allow_missing:
            raise ValueError(f"{problem}; --allow-missing leaves them out")
        print(f"warning: {problem}; of classes that are left without clips only those in --labels "
              "count", file=sys.stderr)


# ---- lists and classes as users have them ----

def _read_list(path, which):
    """Yield (where, [(path of a clip, label), ...]) of a training (0) or test (1) list.

    A label is a number, a name or None. As names hold blanks, a line can be read in several ways.
    HMDB51's lists are a folder (of which split 1 counts) or a pattern like *_test_split2.txt.
    """
    pattern = "*_test_split1.txt" if path.is_dir() else path.name if "*" in path.name else ""
    files = sorted((path if path.is_dir() else path.parent).glob(pattern)) if pattern else [path]
    if not files:
        raise ValueError(f"{path}: holds no lists {pattern}")
    for file in files:
        text, number = _read_text(file), 0
        lines = [line.strip() for line in text.split("\n")]
        ends = {line.split()[-1] for line in lines if line}
        hmdb51 = ends <= {"0", "1", "2"} and re.fullmatch(r"(.+)_test_split\d\.txt", file.name)
        rows = (_something_something(text) if re.match(r"\s*\[\s*\{", text) else
                _kinetics(text) if "youtube_id" in text.partition("\n")[0] else
                _hmdb51(lines, hmdb51[1], which) if hmdb51 else _lines(lines))
        try:
            for number, readings in enumerate(rows, 1):
                if readings:
                    yield f"{file}:{number}", readings
        except (LookupError, TypeError, ValueError, OverflowError, csv.Error) as error:
            raise ValueError(f"{file}:{number + 1}: is no entry ({error!r})") from None


def _something_something(text):
    for row in json.loads(text):
        template = row.get("template")
        yield [(str(row["id"]), template and re.sub(r"[\[\]]", "", template))]


def _kinetics(text):
    yield []  # the header
    for row in csv.DictReader(io.StringIO(text, newline="")):
        start, end = (int(float(row[key])) for key in ("time_start", "time_end"))
        yield [(f"{row['youtube_id']}_{start:06d}_{end:06d}", row.get("label") or None)]


def _hmdb51(lines, name, which):
    for line in lines:
        yield [(f"{name}/{line[:-1].strip()}", None)] if line.endswith("12"[which]) else []


def _lines(lines):
    """`<clip> [<number of frames>] [<label>]`: official, TSN, mmaction2, UCF101, ViFi-CLIP."""
    for line in lines:
        ways = [(n, line.rsplit(maxsplit=n)) for n in (2, 1, 0)]
        yield [(way[0], int(way[-1]) if n else None) for n, way in ways
               if len(way) == n + 1 and all(map(str.isdecimal, way[1:]))]


def read_classes(path):
    """[(number, name, description)] of a file of classes; the description may be "".

    CSV `id,name[,description]` with or without a header (the official code's labels and
    descriptions), UCF101's `id name`, a name per line, numbered from 0 (mmaction2),
    Something-Something's JSON {name: id}, or {id: "name: description"} (TC-CLIP, FROSTER).
    """
    text, ids, classes = _read_text(path), {}, {}
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        if text.lstrip().startswith("{"):
            rows = [(n, [key, value.partition(":")[0], value] if key.isdecimal()
                     else [str(value), key])
                    for n, (key, value) in enumerate(json.loads(text).items(), 1)]
        else:
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except (csv.Error, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}:{reader.line_num or 1}: {error}") from None
    rows = [(line, row) for line, row in rows if any(row)]
    if all(len(row) == 1 and not row[0][0].isdecimal() for _, row in rows):
        rows = [(line, [str(i), name]) for i, (line, (name,)) in enumerate(rows)]
    for i, (line, row) in enumerate(rows):
        cells = row if len(row) > 1 else row[0].split(maxsplit=1)
        if i == 0 and len(cells) > 1 and not cells[0].isdecimal():
            continue  # the header
        if len(cells) < 2 or not cells[0].isdecimal() or not cells[1]:
            raise ValueError(f"{path}:{line}: expected id,name and not {','.join(row)!r}")
        entry = int(cells[0]), cells[1], "".join(cells[2:3])
        if ids.setdefault(entry[0], entry) != entry and not entry[2]:  # K600's texts are all 0
            raise ValueError(f"{path}:{line}: id {entry[0]} has another name already")
        if classes.setdefault(class_key(entry[1]), entry) != entry:
            raise ValueError(f"{path}:{line}: {entry[1]} has another id or text already")
    if not classes:
        raise ValueError(f"{path}: holds no lines id,name")
    return sorted(classes.values())


def _read_text(path):
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error.reason})") from None


# ---- from a clip's folder to pixels ----

def frame_names(folder, needed=True):
    """The RGB frames of a folder in the order of their numbers; optical flow is left out.

    Raises ValueError if there are none, unless they are not needed.
    """
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.name.lower().endswith(IMAGES)
                 and not re.match(r"(flow_)?[xy]_|\.", e.name)]
    if needed and not names:
        hint = ", but videos" if _videos(Path(folder)) else ""
        raise ValueError(f"{folder}: holds no frames{hint}")
    return sorted(names, key=lambda n: (int((re.findall(r"\d+", n) or [0])[-1]), n))


def read_frame(path, size=None, crop=None):
    """An RGB image, or what `crop_frame` makes of it; one that cannot be decoded is a ValueError
    that names it."""
    try:
        with Image.open(path) as image:
            return crop_frame(image, size, crop) if size else image.convert("RGB")
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
    """A draw of TSN's multi-scale crop: (width, height) as scales of the shorter side, and (x, y)
    in quarters of the room that is left."""
    scales = (1, 0.875, 0.75, 0.66)
    pairs = [(w, h) for i, w in enumerate(scales) for j, h in enumerate(scales) if abs(i - j) <= 1]
    places = [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0),
              (1, 1), (3, 1), (1, 3), (3, 3)]
    return pairs[rng.integers(len(pairs))], places[rng.integers(len(places))]


def crop_frame(image, size, crop=None):
    """An image as uint8 (3, size, size): a drawn crop, or the centre of the resized whole.

    Evaluation: shorter side to size * 256 // 224, bicubic, centre crop, in a single resize of the
    region that is left. Drawn crops are resized bilinearly, by PyTorch, which takes half of the
    time. A JPEG that is still to be read is decoded at 1/2, 1/4 or 1/8 of its size where the region
    keeps at least `size`.
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
    image.draft("RGB", [math.ceil(side * size / (b - a))
                        for side, a, b in zip((w, h), box, box[2:])])
    scale, image = round(w / image.width), image.convert("RGB")
    if crop is None:
        image = image.resize((size, size), Image.Resampling.BICUBIC, [x / scale for x in box])
    else:
        image = image.crop([x // scale for x in box])
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels if crop is None else torch.nn.functional.interpolate(
        pixels[None], (size, size), mode="bilinear", antialias=True)[0]


def load_clip(path, num_frames, image_size, rng=None, augment=False, flip=False):
    """A folder of frames, or a video file, as uint8 RGB (num_frames, 3, image_size, image_size).

    With a numpy Generator frames are drawn as in training, and with `augment` cropped and, where
    `flip`, flipped likewise; else all is as in evaluation. Raises OSError or ValueError that names
    what cannot be read.
    """
    folder = Path(path)
    if augment and rng is None:
        raise ValueError("augment needs a generator, rng")
    if folder.is_file():
        with tempfile.TemporaryDirectory() as frames:
            said = decode_video(folder, frames)
            if said:
                print(f"warning: damaged {path}: {said}", file=sys.stderr)
            return load_clip(frames, num_frames, image_size, rng, augment, flip)
    names = frame_names(folder)
    chosen = sample_frames(len(names), num_frames, rng)
    crop = random_crop(rng) if augment else None
    flip = augment and flip and rng.random() < 0.5
    clip = torch.stack([read_frame(folder / names[i], image_size, crop) for i in chosen])
    return clip.flip(-1) if flip else clip.contiguous()


class Clips(Dataset):
    """The clips of a Split as (uint8 (T, 3, S, S), label, index).

    A key is (epoch, index): all that is random is a function of (seed, epoch, index). `train`
    samples frames at random, `augment` also crops and, with `flip`, flips. What goes wrong in a
    worker process is returned rather than raised, so that it arrives as one line.
    """

    def __init__(self, split, num_frames, image_size, train=False, augment=False, flip=False,
                 seed=0):
        # arrays, as the processes that load would come to copy all objects of a Python list
        self.root, self.clips = split.root, np.array([os.fsencode(clip) for clip, _ in split.clips])
        self.labels = np.array([label for _, label in split.clips])
        self.num_frames, self.image_size = num_frames, image_size
        self.train, self.augment, self.flip, self.seed = train, augment, flip, seed

    def __len__(self):
        return len(self.clips)

    def load(self, epoch, index):
        rng = np.random.default_rng((self.seed, epoch, index)) if self.train else None
        return load_clip(Path(self.root, os.fsdecode(self.clips[index])), self.num_frames,
                         self.image_size, rng, self.augment, self.flip)

    def __getitem__(self, key):
        try:
            return self.load(*key), self.labels[key[1]], key[1]
        except (OSError, ValueError) as error:
            return error


def _collate(samples):
    errors = [sample for sample in samples if isinstance(sample, Exception)]
    return errors[0] if errors else default_collate(samples)


def _start_worker(_):
    gc.freeze()  # else its first collection copies all that it shares with the parent process
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent process decides, and ends it
        signal.signal(number, signal.SIG_IGN)


def loader(clips, batches, workers, pin_memory=False):
    """Yield videos (B, T, 3, S, S) uint8, labels (B,) and indices (B,) for each of `batches`, lists
    of keys; a bad frame is a ValueError."""
    for batch in DataLoader(clips, batch_sampler=batches, num_workers=workers, collate_fn=_collate,
                            pin_memory=pin_memory, worker_init_fn=_start_worker):
        if isinstance(batch, Exception):
            raise ValueError(str(batch))
        yield batch


_COLOUR = v2.Compose([v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                      v2.RandomGrayscale(p=0.2)])


def jitter_colour(videos):
    """Colour augmentation of uint8 (B, T, 3, S, S), drawn once per clip from torch's generator."""
    return torch.stack([_COLOUR(video) for video in videos])


def check(root, workers=None):
    """Decode every frame below `root` and print what is broken, empty or unreadable; a ValueError
    if anything is."""
    root = Path(root)
    clips = _clip_folders(root)
    empty = set(_folders(root)) - {clip.split("/")[0] for clip in clips}

    def problems(clip):
        found = []
        try:
            for name in frame_names(root / clip):
                try:
                    read_frame(root / clip / name)
                except ValueError as error:
                    found.append(str(error))
        except (OSError, ValueError) as error:
            found.append(str(error))
        return found

    found = [f"{root / name}: holds no clips" for name in sorted(empty)]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for more in tqdm(pool.map(problems, clips), "clips", len(clips)):
            found += more
    if found:
        print(*found, sep="\n")
        raise ValueError(f"{root}: {len(found)} problems in {len(clips)} clips")
    print(f"{root}: every frame of {len(clips)} clips can be read")


# ---- videos to frames ----

def decode_video(video, folder):
    """Write each frame of a video to an empty folder as a JPEG whose shorter side is 256.

    Returns what ffmpeg complained of, or "". A ValueError names a video that cannot be read.
    """
    import imageio_ffmpeg
    result = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error", "-threads", "1",
         "-protocol_whitelist", "file", "-i", Path(video).absolute(), "-fps_mode", "passthrough",
         "-q:v", "2", "-vf", "scale='if(gt(iw,ih),-1,256)':'if(gt(iw,ih),256,-1)'", "img_%05d.jpg"],
        cwd=folder, capture_output=True, text=True, errors="replace")  # a path may hold a %
    said = (result.stderr.strip().splitlines() or [""])[-1]
    if result.returncode or not os.listdir(folder):
        raise ValueError(f"{video}: is no readable video ({said or 'no frames'})")
    return said


def extract(videos, frames, workers=None):
    """Turn a folder of videos (of class folders, or flat) into the layout of `index_frames`.

    The shorter side becomes 256, every frame of the file one JPEG. A clip's folder is renamed into
    place when it is complete, so a stopped extraction continues. Broken videos are skipped and
    reported at the end. Returns the number of clips there are. Raises ValueError, before anything
    is written, where two videos of a class would share a folder.
    """
    root, jobs = Path(videos), {}
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
        try:
            said = decode_video(video, part)
        except ValueError as error:
            shutil.rmtree(part)
            return f"skipped {error}"
        part.rename(target)
        return said and f"damaged {video}, its readable frames are kept: {said}"

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        problems = [*filter(None, tqdm(pool.map(convert, jobs.items()), "videos", len(jobs)))]
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


def demo_frames(colour, pair, t, rng):
    """Frames (len(t), 36, 36, 3) of a shape on grey that moves, grows or fades as t says.

    t runs from 1 to -1 for the first of twins and back for the second: nothing but the order of the
    frames tells them apart. The world is 32 x 32; the rim is what evaluation crops away.
    """
    shape, grey = rng.integers(5), rng.uniform(10, 110)
    x, y = 17.5 + rng.uniform(-2, 2, (2, 1))
    radius, opacity = rng.uniform(4.5, 6.5), rng.uniform(0.55, 0.7)
    travel, growth = rng.uniform(15, 21) / 2, rng.uniform(0.6, 0.8) / 2
    x, y = x + travel * t * (pair == 0), y + travel * t * (pair == 1)
    r = (radius * np.exp(-growth * t * (pair == 2)))[:, None, None]
    opacity = np.minimum(1, opacity * (1 - 0.6 * t * (pair == 3)))[:, None, None]
    dx = np.abs(np.arange(36) - x[:, None])[:, None, :]
    dy = (np.arange(36) - y[:, None])[:, :, None]
    distance = np.hypot(dx, dy)
    edge = (distance - r,  # circle, square, triangle, cross, ring
            np.maximum(dx, abs(dy)) - 0.9 * r,
            np.maximum(dy, 0.87 * dx - dy / 2) - 0.65 * r,
            np.minimum(np.maximum(dx, 3 * abs(dy)), np.maximum(3 * dx, abs(dy))) - r,
            abs(distance - 0.7 * r) - 0.3 * r)[shape]
    mask = (opacity * np.clip(0.5 - edge, 0, 1))[..., None]  # (T, 36, 36, 1)
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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        return run()
    except (OSError, ValueError, ArithmeticError, torch.OutOfMemoryError) as error:
        status, text = 2, str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
    except KeyboardInterrupt as error:
        status, text = 130, str(error) or "stopped"
    except RuntimeError as error:
        status, text = 2, str(error)
        if not text.startswith("DataLoader worker"):  # that was killed
            raise
    line = "".join(c if c.isprintable() else " " for c in text)  # names may hold any
    print(f"error: {line}", file=sys.stderr)
    sys.exit(status)


def main():
    parser = Parser(description="Frames for train.py.")
    commands = parser.add_subparsers(dest="command", required=True,
                                     metavar="{extract,check,demo}")
    extracting = commands.add_parser("extract", help="turn videos into folders of frames")
    extracting.add_argument("videos", help="class folders of videos, or a folder of videos")
    extracting.add_argument("frames", help="the folder to write to; continued if it exists")
    extracting.add_argument("--workers", type=at_least(1), help="videos at a time (all cores)")
    checking = commands.add_parser("check", help="decode every frame and list what is broken")
    checking.add_argument("root", metavar="frames", help="a folder of frames, as train.py takes it")
    checking.add_argument("--workers", type=at_least(1), help="clips at a time (all cores)")
    rendering = commands.add_parser("demo", help="render the demo world")
    rendering.add_argument("root", metavar="dir", help="the folder to create")
    rendering.add_argument("--seed", type=at_least(0), default=0, help="random seed (%(default)s)")
    args = vars(parser.parse_args())
    dict(extract=extract, check=check, demo=demo)[args.pop("command")](**args)


if __name__ == "__main__":
    command(main)
