"""Frames on disk -> uint8 clips for a model.

    train, test = index_frames("ucf101_frames")             # which clips there are, their classes
    clip = load_clip("ucf101_frames/Archery/v_1", 8, 224)   # uint8 (T, 3, S, S), RGB

Frames lie as <root>/<Class>/<clip>/img_00001.jpg, as <root>/train/<Class>/<clip>/ beside val/, or
as <root>/<clip>/ with lists that name the class of each clip. No model is known here.
"""

import argparse
import csv
import functools
import gc
import hashlib
import io
import itertools
import json
import os
import re
import signal
import sys
import unicodedata
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

VIDEOS = (".avi", ".mp4", ".webm", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts",
          ".mts", ".m2ts", ".3gp", ".3g2", ".ogv", ".asf", ".vob", ".f4v", ".rm", ".rmvb", ".divx")
NO_CLIPS = (".", "@eaDir", "__MACOSX", "$RECYCLE.BIN", "lost+found", "System Volume Information")
# neither optical flow nor ._img_00001.jpg, which macOS makes
FRAME = re.compile(r"(?is)(?!flow_[xy]_|[xy]_|\.).+\.(jpg|jpeg|png)")
COLOURS = v2.Compose([v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                      v2.RandomGrayscale(p=0.2)])
TEMPLATES = (  # of the official code
    "a photo of action {}", "a picture of action {}", "Human action of {}", "{}, an action",
    "{} this is an action", "{}, a video of action", "Playing action of {}", "{}",
    "Playing a kind of action, {}", "Doing a kind of action, {}", "Look, the human is {}",
    "Can you recognize the action of {}?", "Video classification of {}", "A video of {}",
    "The man is {}", "The woman is {}")


# ---- names of classes ----

nfc = functools.partial(unicodedata.normalize, "NFC")  # macOS' letters and accents lie apart


@functools.cache  # 240,000 clips ask for few classes: lists are read in 6 s instead of 13
def class_text(name):
    """A class name in words: ApplyEyeMakeup -> apply eye makeup, brush_hair -> brush hair."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name.replace("_", " ")).lower()


def find_name(name, names):
    """The one of `names` that is spelled like `name`; or else the only one that differs from it in
    case, blanks, underscores or camel case; or else None. ValueError where several do."""
    name = nfc(name)
    if name in names:
        return name
    words = class_text(name).split()
    alike = [other for other in names if class_text(other).split() == words]
    if len(alike) > 1:
        raise ValueError(f"{name} may stand for {' or for '.join(alike)}")
    return alike[0] if alike else None


def read_text(path):
    """A text file in UTF-8, in NFC, all line ends as newlines. ValueError for another encoding."""
    try:
        return nfc(Path(path).read_text("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error.reason})") from None


def read_lines(path):
    """The lines of a text file that are not blank, as pairs ("<path>:<number>", line)."""
    lines = enumerate(read_text(path).split("\n"), 1)
    return [(f"{path}:{i}", line.strip()) for i, line in lines if line.strip()]


def read_labels(path):
    """{number: class name}, by number, of lines `id,name`, perhaps below a header, or `id name`; or
    of a name per line, which count from 0. ValueError names what does not fit."""
    lines = read_lines(path)
    numbers, commas = [], False
    for _, line in lines:
        entry = re.match(r"(\d+)\s*(,|\s)", line)
        if entry:
            numbers.append(int(entry[1]))
            commas = commas or entry[2] == ","
    # names may begin with numbers too (360 flip): few of them, and none with that of a first class
    counted = bool(numbers) and min(numbers) < 2
    numbered = (commas or counted) and 2 * len(numbers) >= len(lines)

    names = {}
    for i, (where, line) in enumerate(lines):
        number, name = i, line
        if numbered:
            entry = re.fullmatch(r"(\d+)(?:\s*,\s*|\s+)(.+)", line)
            if not entry and commas and i == 0:
                continue  # a header
            if not entry:
                raise ValueError(f"{where}: expected id,name and not {line!r}")
            number, name = int(entry[1]), entry[2]
        name = ",".join(next(csv.reader([name])))  # commas may stand without quotes
        if number in names or name in names.values():
            raise ValueError(f"{where}: {line!r} has a number or a name for the second time")
        names[number] = name
    if not names:
        raise ValueError(f"{path}: holds no lines id,name")
    return dict(sorted(names.items()))


def read_descriptions(path):
    """{class name: a text about it}: the official code's CSV `number,name,text` with its header, or
    the JSON {number: "name: text"} of TC-CLIP and FROSTER, where the text includes the name."""
    text, texts = read_text(path), {}
    try:
        if text.lstrip().startswith("{"):
            rows = [("", said.partition(":")[0], said) for said in json.loads(text).values()]
        else:  # cells hold line ends
            rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))[1:]
        for _, name, said, *more in filter(None, rows):
            texts[name.strip()] = ",".join([said, *more]).strip()  # commas without quotes
    except (csv.Error, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: no descriptions `number,name,text` ({error})") from None
    return texts


# ---- which clips there are ----

class Split(NamedTuple):
    """Clips of a data set: pairs of a folder below `root` and its class's index in `classes`."""
    root: Path
    classes: list
    clips: list
    source: str  # the list or the rule that chose them


def index_frames(root, train_list=None, test_list=None, labels=None, allow_missing=False,
                 whole=False):
    """Find the clips below `root`: a training and a test Split. `whole`: all clips are for testing.

    Lists have lines `<clip> [<number of frames>] <label>`, as EZ-CLIP, TSN, ActionCLIP and
    mmaction2 have them, and `labels` names their numbers, see `clip_finder` and `read_labels`.
    Without lists class folders are the classes, and `choose_test` splits. Raises OSError or
    ValueError that names the folder, or list and line.
    """
    root = Path(root)
    folders = clip_folders(root)
    listed = train_list or test_list
    if bool(listed) != bool(labels):
        raise ValueError(f"{listed or labels}: lists go with --labels, and --labels with lists")
    if listed:
        names = read_labels(labels)
        classes = list(names.values())
        train = read_list(train_list, folders, names, allow_missing)
        test = read_list(test_list, folders, names, allow_missing)
        sources = [Path(path or "no list").name for path in (train_list, test_list)]
    elif "/" not in folders[0]:
        raise ValueError(f"{root}: clips without class folders, as {folders[0]}, need --train-list "
                         "or --test-list, and --labels")
    else:
        chosen, source = choose_test(folders, whole)
        sources = [source, source]
        train, test = {}, {}
        for folder in folders:
            part = test if folder in chosen else train
            part[folder] = class_folder(folder)
        classes = sorted({*train.values(), *test.values()})

    position = {name: k for k, name in enumerate(classes)}
    splits = []
    for part, source in zip((train, test), sources):
        clips = [(clip, position[name]) for clip, name in part.items()]
        splits.append(Split(root, classes, clips, source))
        a_clip_of = {name: clip for clip, name in part.items()}
        for clip in a_clip_of.values():  # broken data is to show now, not after hours
            read_frame(root / clip / frame_names(root / clip)[0])
    print(f"{root}: {len(classes)} classes, {len(train)} training and {len(test)} test clips "
          f"({', '.join(dict.fromkeys(sources))})")
    if train.keys() & test.keys():
        warn(f"{len(train.keys() & test.keys())} test clips are training clips too")
    return splits


def clip_folders(root):
    """The folders of clips below root: <clip>, <class>/<clip> or train/<class>/<clip>, as the first
    one lies. ValueError if there are none, OSError for a folder that cannot be read."""
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    left_out = []

    def below(path):
        folders = []
        for entry in os.scandir(root / path):
            nobodys = entry.name.startswith(NO_CLIPS)
            if entry.is_dir():
                part = left_out if nobodys else folders
                part.append(os.path.join(path, entry.name))
            elif entry.is_symlink() and not nobodys and not os.path.exists(entry.path):
                raise ValueError(f"{entry.path}: is a link to nothing")
        if not folders:
            left_out.append(path)
        return sorted(folders)

    clips = below("")
    # a level of classes, two below train, unless the first folder with something in it has frames:
    # a class may be called training dog
    for _ in range(2 if "train" in " ".join(clips).lower() else 1):
        names = next(filter(None, (os.listdir(root / clip) for clip in clips)), [])
        if any(map(FRAME.fullmatch, names)):
            break
        clips = list(itertools.chain(*map(below, clips)))
    if not clips:
        raise ValueError(f"{root}: holds no folders <class>/<clip>/ with frames")
    if left_out:
        print(f"{root}: {len(left_out)} folders are empty or another program's, and left out: "
              f"{', '.join(left_out[:5])}")
    return clips


def class_folder(clip):
    """The name of the folder that a clip lies in, "" if there is none."""
    return nfc(Path(clip).parent.name)


def choose_test(folders, whole):
    """-> the clips to test where no list tells, and the rule: a folder train beside others; names
    of UCF101; or of each class the max(1, n // 5) with the smallest hash, never its only clip."""
    if whole:
        return {*folders}, "all clips"
    if folders[0].count("/") == 2:
        others = {f for f in folders if "train" not in f.split("/")[0].lower()}
        return others, f"the folders {', '.join(sorted({f.split('/')[0] for f in others}))}"
    ucf101 = [re.fullmatch(r".+/v_[^/]+_g(\d+)_c\d+(\.avi)?", folder) for folder in folders]
    if all(ucf101):
        return {clip[0] for clip in ucf101 if int(clip[1]) <= 7}, "split 1 of UCF101"
    test, ranked = set(), {}
    for folder in sorted(folders, key=name_hash):
        ranked.setdefault(class_folder(folder), []).append(folder)
    for clips in ranked.values():
        if len(clips) > 1:
            test.update(clips[:max(1, len(clips) // 5)])
    return test, "a fifth of each class by the hash of clip names"


def name_hash(clip, salt=""):
    """What clips are ordered by where an order has to be random and stable."""
    name = salt + clip.split("/")[-1]
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()


def clip_finder(folders, listed):
    """-> a function from one of the listed paths to the folders that it may mean: [], one, several.

    Lists hold somebody else's paths. The name counts, in any case and without a video's suffix,
    and the class folder before it if lists have class folders; where that leaves several, those
    that are spelled as in the list, on their whole way below the root.
    """
    def key(path):
        parts = ["", *nfc(path).replace("\\", "/").strip("/").split("/")]
        parent, name = parts[-2:]
        stem, suffix = os.path.splitext(name.lower())
        if suffix not in VIDEOS:
            stem += suffix
        return class_text(parent), stem

    known = {}
    for folder in folders:
        parent, name = key(folder)
        for counted in {parent, ""}:  # with its class folder, and by name alone
            known.setdefault((counted, name), []).append(folder)
    classes = {parent for parent, _ in known} - {""}
    has_classes = not classes.isdisjoint(key(path)[0] for path in listed)

    def find(path):
        parent, name = key(path)
        if not has_classes:
            parent = ""
        found = known.get((parent, name), [])
        path = "/" + nfc(path.replace("\\", "/"))
        suffix = os.path.splitext(path)[1]
        spelled = [f for f in found if path.endswith((nfc(f"/{f}"), nfc(f"/{f}{suffix}")))]
        return spelled or found
    return find


def match_clips(source, rows, names, find, allow_missing):
    """-> {folder: class name} for a list's rows (<file>:<line>, clip, class name), of all `names`;
    `find` gives the folders of a clip. ValueError names a clip with several, one in another class,
    and, unless `allow_missing`, those with none."""
    if not rows:
        raise ValueError(f"{source}: names no clips")
    entries, missing = {}, []  # {folder: (clip of the list, class)}
    class_of = functools.cache(lambda folder: find_name(folder, names))
    for where, listed, name in rows:
        found = find(listed)
        if not found:
            missing.append(listed)
            continue
        folder = found[0]
        if len(found) > 1:
            raise ValueError(f"{where}: {listed} fits all of {', '.join(found)}")
        parent = class_folder(folder)
        if class_of(parent) not in (name, None):
            raise ValueError(f"{where}: {folder} is {name} by its label, but lies in {parent}")
        first = entries.setdefault(folder, (listed, name))
        if first != (listed, name):
            raise ValueError(f"{where}: {folder} would be {listed} of {name}, and was "
                             f"{' of '.join(first)}")

    if missing:
        named = ", ".join(missing[:10] + ["..."] * (len(missing) > 10))
        problem = f"{source}: {len(missing)} of {len(rows)} clips have no folder: {named}"
        if not (allow_missing and entries):
            raise ValueError(f"{problem}; --allow-missing leaves out some, never all")
        warn(problem)
    return {folder: name for folder, (_, name) in entries.items()}


def read_list(path, folders, names, allow_missing):
    """-> {folder: class name} of the clips in a list, by the `names` of labels; {} without one."""
    if not path:
        return {}
    rows = []
    for where, line in read_lines(path):
        entry = re.fullmatch(r"(.*\S)\s+(\d+)", line)
        if not entry:
            raise ValueError(f"{where}: expected <clip> [<number of frames>] <label>, not {line!r}")
        if int(entry[2]) not in names:
            raise ValueError(f"{where}: label {entry[2]} has no name in --labels")
        rows.append((where, entry[1], names[int(entry[2])]))
    find = clip_finder(folders, [clip for _, clip, _ in rows])
    for i, (where, clip, name) in enumerate(rows):
        if not find(clip):  # names may end with a number too: only now it is one of frames
            rows[i] = where, re.sub(r"\s+\d+$", "", clip), name
    return match_clips(path, rows, names.values(), find, allow_missing)


# ---- from a clip's folder to pixels ----

def frame_names(folder):
    """The RGB frames of a folder in natural order, as a file manager shows them: every number in a
    name counts as one. Optical flow is left out. ValueError if there are none."""
    def natural(name):  # with zeros in front numbers are in order as text
        stem = os.path.splitext(name)[0]
        return re.sub(r"\d+", lambda number: number[0].zfill(30), stem), name

    names = sorted(filter(FRAME.fullmatch, os.listdir(folder)), key=natural)
    if not names:
        raise ValueError(f"{folder}: holds no frames")
    return names


def read_frame(path, size=None, crop=None):
    """An RGB image, or with a size what `to_square` makes of it. One that cannot be decoded is a
    ValueError that names it."""
    try:
        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)
            image = to_rgb(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: unreadable frame ({error})") from None
    return to_square(image, size, crop) if size else image


def to_rgb(image):
    """An image of any kind as 8-bit RGB: deeper grey is scaled by the range of its type, what is
    transparent lies on black. ValueError for floats, which have no range."""
    if image.mode == "F":
        raise ValueError("floats have no range to be scaled by")
    if image.mode.startswith("I"):  # 16 bits, or 32; PNG and PGM have 16, whatever the mode
        top = 2**31 - 1 if image.mode == "I" and image.format not in ("PNG", "PPM") else 2**16 - 1
        values = np.array(image)
        values[values == image.info.get("transparency")] = 0
        image = Image.fromarray((values * (255 / top)).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, "black")
        image = Image.alpha_composite(black, image)
    return image.convert("RGB")


def to_square(image, size, crop=None):
    """An RGB image as uint8 (3, size, size): the region of a `random_crop`; or else, as in
    evaluation, the middle of the image whose shorter side is resized to size * 256 // 224."""
    if crop:
        (scale_x, scale_y), (x, y) = crop
        short = min(image.size)
        w, h = max(1, int(short * scale_x)), max(1, int(short * scale_y))
        left, top = (image.width - w) // 4 * x, (image.height - h) // 4 * y
        image = v2.functional.resized_crop(image, top, left, h, w, [size, size])  # bilinear
    else:
        image = v2.functional.resize(image, size * 256 // 224, v2.InterpolationMode.BICUBIC)
        image = v2.functional.center_crop(image, size)
    return v2.functional.pil_to_tensor(image)


def random_crop(rng):
    """A draw of TSN's multi-scale crop: (width, height) as scales of the shorter side, and (x, y)
    in quarters of the room that is left."""
    scales = (1, 0.875, 0.75, 0.66)  # of which width and height are at most one step apart
    pairs = [(w, h) for i, w in enumerate(scales) for h in scales[max(0, i - 1):i + 2]]
    # corners, middle and middles of edges; and the middles of quadrants
    places = [(x, y) for x in range(5) for y in range(5) if x % 2 == y % 2]
    return pairs[rng.integers(len(pairs))], places[rng.integers(len(places))]


def sample_frames(count, num_frames, rng=None):
    """Which `num_frames` of `count` frames, as positions from 0 in ascending order.

    With a numpy Generator (training): a random frame of each of equal segments; a shorter clip
    gives all of its frames and random repeats. Without: the official code's centres of segments.
    """
    if rng is None and num_frames == 1:
        return np.array([count // 2])  # where what follows can give the frame before
    if rng is None:
        to_centre = max(0, count / num_frames - 1) / 2
        return np.floor(np.arange(num_frames) * count / num_frames + to_centre).astype(int)
    if count >= num_frames:
        starts = np.arange(num_frames) * count // num_frames
        return rng.integers(starts, [*starts[1:], count])
    repeats = rng.integers(count, size=num_frames - count)
    return np.sort(np.concatenate([np.arange(count), repeats]))


def load_clip(path, num_frames, image_size, rng=None, augment=False, flip=False):
    """A folder of frames as uint8 RGB (num_frames, 3, image_size, image_size).

    With a numpy Generator frames are drawn as in training, and with `augment` crop, colours and,
    where `flip`, mirroring, once for the whole clip; else all is as in evaluation. Raises OSError
    or ValueError that names what cannot be read.
    """
    if augment and rng is None:
        raise ValueError("augment needs a generator, rng")
    names = frame_names(path)
    chosen = sample_frames(len(names), num_frames, rng)
    crop = random_crop(rng) if augment else None
    clip = torch.stack([read_frame(Path(path, names[i]), image_size, crop) for i in chosen])
    if augment:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.integers(2**62).item())  # of COLOURS' draws
            clip = COLOURS(clip)  # (T, 3, S, S)
        if flip and rng.random() < 0.5:
            clip = clip.flip(-1)
    return clip


class Clips(Dataset):
    """The clips of a Split as (uint8 (T, 3, S, S), label, index).

    A key is (epoch, index): all that is random is a function of (seed, epoch, index). `train`
    samples frames at random, `augment` also crops, colours and, with `flip`, mirrors.
    """

    def __init__(self, split, num_frames, image_size, train=False, augment=False, flip=False,
                 seed=0):
        self.split, self.train, self.seed = split, train, seed
        self.load = functools.partial(load_clip, num_frames=num_frames, image_size=image_size,
                                      augment=augment, flip=flip)

    def __len__(self):
        return len(self.split.clips)

    def __getitem__(self, key):
        epoch, index = key
        clip, label = self.split.clips[index]
        rng = np.random.default_rng((self.seed, epoch, index)) if self.train else None
        return self.load(self.split.root / clip, rng=rng), label, index


def loader(clips, batches, workers, pin_memory=False):
    """Yield videos (B, T, 3, S, S) uint8, labels (B,) and indices (B,) for each of `batches`, lists
    of keys of a Clips."""
    stream = DataLoader(clips, batch_sampler=batches, num_workers=workers, collate_fn=_collate,
                        pin_memory=pin_memory, worker_init_fn=_start_worker)
    try:
        stream = iter(stream)
    except OSError as error:  # shared memory is full, for example
        raise OSError(f"no loading process can start: {error}; --workers 0 does without") from None
    for videos, labels, indices in stream:
        yield videos, torch.tensor(labels), torch.tensor(indices)


def _collate(samples):
    # Only videos are tensors: what finds no room in shared memory after this makes PyTorch hang.
    clips, labels, indices = zip(*samples)
    return default_collate(clips), labels, indices


def _start_worker(_):
    gc.freeze()  # else a collection copies 80 MiB that a worker shares with the main process
    # Ctrl-C reaches all processes, and so does torchrun's SIGTERM: the main one decides, and has
    # time to save before workers end on their own
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(120))


# ---- command lines ----

class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line instead of the usage of all flags
        raise ValueError(message)


def at_least(minimum, kind=int):
    """A type for argparse: a finite number that is not smaller."""
    def number(text):  # its name is in argparse's message
        value = kind(text)
        if not minimum <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be at least {minimum} and finite, not {text}")
        return value
    return number


def warn(text):
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes one says it
        print("warning:", text, file=sys.stderr)


def command(main):
    """Run a program's main(); what is wrong with its input is one line and exit status 2."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that it cannot print loses no result
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return main()
    except KeyboardInterrupt as error:
        status, text = 130, str(error) or "stopped"
    except Exception as error:
        status, text = 2, str(error)
        if "DataLoader worker" in text:  # what it raised, behind its traceback, or what ended it
            text = re.sub(r"^\w+: ", "", text.strip().split("\n")[-1])
            if isinstance(error, RuntimeError):  # of PyTorch itself
                text += "; where shared memory is small, as in Docker, --workers 0 does without"
        elif not isinstance(error, (OSError, ValueError, ArithmeticError, torch.OutOfMemoryError)):
            raise  # somebody's bug
        error.__traceback__ = None  # in which loading processes live on, for five seconds
    print("error:", " ".join(text.split()), file=sys.stderr)
    sys.exit(status)
