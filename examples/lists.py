"""Turn a data set's own lists, once, into the plain ones that train.py reads.

    python examples/lists.py ucf101 ucfTrainTestlist --frames ucf101_frames --out lists/ucf101
    python examples/lists.py kinetics kinetics400 --frames k400 --out lists/k400 --allow-missing
    python examples/lists.py ssv2 labels --frames 20bn-something-something-v2 --out lists/ssv2
    python examples/lists.py csv train.csv val.csv --labels names.csv --frames mine --out lists/mine

and so for hmdb51, diving48 and jester. Rows of csv are `path,label`, `path;label`, or
`path [[first frame] number of frames] label`.
The folder --out receives train.txt and test.txt (train1.txt, test1.txt ... where there are
splits), lines `<clip> <label>`, and labels.csv, `id,name`; or nothing, where anything is wrong.
"""

import csv
import json
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import train


# ---- files as data sets have them; a row is (file:line, clip, number or name of its class) ----

def read_json(path):
    try:
        return json.loads(data.read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: {error.msg}") from None


def ucf101(path, split):
    for where, line in data.read_lines(path):
        row = re.fullmatch(r"(([^/]+)/\S+)(?:\s+(\d+))?", line)
        if not row:
            raise ValueError(f"{where}: expected <class>/<clip> [<label>], not {line!r}")
        yield where, row[1], row[3] or row[2]  # test lists have no labels


def hmdb51(path, split):
    name = path.name.rpartition("_test_split")[0]
    wanted = {"train": "1", "test": "2"}[split]  # 0 is for clips that are not used
    for where, line in data.read_lines(path):
        row = re.fullmatch(r"(.+?)\s+([012])", line)
        if not row:
            raise ValueError(f"{where}: expected <clip> and 0, 1 or 2, not {line!r}")
        if row[2] == wanted:
            yield where, f"{name}/{row[1]}", name


def kinetics(path, split):
    rows = csv.DictReader(data.read_text(path).splitlines())
    for row in rows:
        where = f"{path}:{rows.line_num}"
        try:
            start, end = int(float(row["time_start"])), int(float(row["time_end"]))
            yield where, f"{row['youtube_id']}_{start:06d}_{end:06d}", row["label"].strip()
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
            raise ValueError(f"{where}: expected label,youtube_id,time_start,time_end") from None


def json_list(path, split):
    """Of Something-Something, {"id", "template"}, or of Diving48, {"vid_name", "label"}."""
    for number, entry in enumerate(read_json(path), 1):
        where = f"{path}:{number}"  # an entry counts as a line
        try:
            if "template" in entry:  # its [something] stands for the words of the entry's label
                yield where, str(entry["id"]), re.sub(r"[\[\]]", "", entry["template"])
            else:
                yield where, entry["vid_name"], str(entry["label"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where}: is no entry of a list ({error!r})") from None


def path_label(path, split):
    for where, line in data.read_lines(path):
        found = (re.search(";", line) or re.search(r"(,\s*|\s)(?=\d+$)", line)
                 or re.search(",", line))
        separator = found[0].strip() if found else ""
        if separator:
            *clip, label = next(csv.reader([line], delimiter=separator))
            cells = [*clip, label]
            if label.strip().isdecimal():  # then a path may hold commas
                cells = [separator.join(clip), label]
        else:  # `path [[first frame] number of frames] label`, as of mmaction2
            row = re.fullmatch(r"(.*?\S)(?:(?:\s+(\d+))?\s+\d+)?\s+(\S+)", line)
            cells = [row[1], row[3]] if row else []
            if row and int(row[2] or 0):
                raise ValueError(f"{where}: {row[1]} begins at frame {row[2]}: parts of clips need "
                                 "folders of their own")
        if len(cells) != 2 or not all(cells):
            raise ValueError(f"{where}: expected path{separator or ' '}label, not {line!r}")
        clip, label = cells
        if label.lower() not in ("label", "class"):  # else it is a header
            yield where, clip, label.strip()


def read_names(path):
    """{number: name}, as `data.read_labels` reads it, or of the JSON of a data set."""
    if path.suffix.lower() != ".json":
        return data.read_labels(path)
    content = read_json(path)
    names = {}
    try:
        if isinstance(content, list):  # Diving48: ["Back", "15som", "05Twis", "FREE"], ...
            for number, words in enumerate(content):
                names[number] = words if isinstance(words, str) else " ".join(words)
        else:  # Something-Something: {name: number}
            for name, number in content.items():
                names[int(number)] = name.strip('"')  # of PySlowFast's names for Kinetics
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"{path}: holds no names and numbers of classes") from None
    return names


# What reads a list; and the names of training lists, test lists and the file of class names. {} is
# 1, 2 and 3 where there are splits. Of several patterns the first counts that fits a file.
DATASETS = {
    "ucf101": (ucf101, "trainlist0{}.txt", "testlist0{}.txt", "classInd.txt"),
    "hmdb51": (hmdb51, "?*_test_split{}.txt", "?*_test_split{}.txt", None),  # a file per class
    # the validation set is what is reported, as the test set had no labels at first
    "kinetics": (kinetics, "train.csv *train.csv", "*val*.csv *test.csv", None),
    "ssv2": (json_list, "*train.json", "*validation.json", "*labels.json"),
    "diving48": (json_list, "*V2_train.json", "*V2_test.json", "*vocab.json"),  # V1 has errors
    "jester": (path_label, "*train.csv", "*validation.csv", "*labels.csv"),
    "csv": (path_label, "*train*", "*test* *val*", None)}


# ---- the conversion ----

def find_files(paths, patterns, needed=True):
    """What the first of the patterns fits that fits any file in `paths`, which may be folders."""
    files = []
    for path in paths:
        files += sorted(path.iterdir()) if path.is_dir() else [path]
    for pattern in patterns.split():
        found = [file for file in files if file.match(pattern)]
        if found:
            return found
    if needed:
        raise ValueError(f"{paths[0]}: holds no {patterns.replace(' ', ' or ')}")
    return []


def read_dataset(dataset, paths, labels):
    """-> {number: class name} and {split: (the first of its files, rows)}."""
    read, train_lists, test_lists, name_file = DATASETS[dataset]
    splits, names = {}, set()
    for number in "123" if "{}" in train_lists else [""]:
        for split, patterns in (("train", train_lists), ("test", test_lists)):
            needed = dataset != "csv" and number in ("", "1")  # split 1 alone will do
            files = find_files(paths, patterns.format(number), needed)
            if len(files) > 1 and dataset != "hmdb51":
                raise ValueError(f"{files[1]}: is a {split} list, and so is {files[0]}; name one")
            rows = []
            for file in files:
                rows += read(file, split)
            if files:
                splits[split + number] = files[0], rows
            names.update(label for *_, label in rows if not label.isdecimal())
    if dataset == "csv" and len(splits) < len(paths):
        raise ValueError(f"{paths[-1]}: the name of a list has train in it, or else test or val")
    if name_file and not labels:
        labels = find_files(paths, name_file)[0]
    if labels:
        return read_names(labels), splits
    return dict(enumerate(sorted(names))), splits


def kinetics_finder(folders, listed):
    """As `data.clip_finder`, by names <id>_<start>_<end>, padded or not, with ids in their own case;
    else by the id alone, among clips whose times no name in the list has."""
    def key(name):
        times = re.fullmatch(r"(.+)_(\d+)_(\d+)", name)
        return (times[1], int(times[2]), int(times[3])) if times else (name,)

    known, wanted = {}, set(map(key, listed))
    for folder in folders:
        clip = key(Path(folder).stem)  # of a folder that is called like a video
        if clip not in wanted:
            clip = clip[:1]
        known.setdefault(clip, []).append(folder)
    return lambda clip: known.get(key(clip)) or known.get(key(clip)[:1], [])


def name_labels(rows, names):
    """Rows (<file>:<line>, clip, label) with class names for labels, which are names or numbers."""
    named = []
    for where, clip, label in rows:
        try:
            name = data.find_name(label, names.values())
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if name is None and label.isdecimal():
            name = names.get(int(label))
        if name is None:
            raise ValueError(f"{where}: label {label} has no name; see --labels")
        named.append((where, clip, name))
    return named


def main(argv=None):
    parser = data.Parser(description="Turn a data set's own lists into those of train.py.")
    parser.add_argument("dataset", choices=DATASETS, help="whose lists they are")
    parser.add_argument("annotations", nargs="+", type=Path,
                        help="the folder of its lists as it is downloaded, or the files")
    parser.add_argument("--frames", required=True, help="folder of frames, as train.py takes it")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write to")
    parser.add_argument("--labels", type=Path, help="names of the labels, if not in ANNOTATIONS")
    parser.add_argument("--allow-missing", action="store_true", help="leave out missing clips")
    args = parser.parse_args(argv)
    names, splits = read_dataset(args.dataset, args.annotations, args.labels)
    folders = data.clip_folders(args.frames)
    finder = kinetics_finder if args.dataset == "kinetics" else data.clip_finder
    lists = {}
    for split, (source, rows) in splits.items():
        find = finder(folders, [clip for _, clip, _ in rows])
        rows = name_labels(rows, names)
        lists[split] = data.match_clips(source, rows, names.values(), find, args.allow_missing)

    args.out.mkdir(parents=True, exist_ok=True)
    numbers = {name: number for number, name in names.items()}
    table = [{"id": number, "name": name} for name, number in numbers.items()]
    train.write_csv(args.out / "labels.csv", table)
    command = ["python", "train.py", "--data", args.frames]
    for split, clips in lists.items():
        text = "".join(f"{folder} {numbers[name]}\n" for folder, name in clips.items())
        path = args.out / f"{split}.txt"
        train.write(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))
        print(f"{path}: {len(clips)} clips of {len(set(clips.values()))} classes")
        if split[-1] not in "23":
            command += [f"--{split.rstrip('1')}-list", str(path)]
    print(shlex.join([*command, "--labels", str(args.out / "labels.csv")]))


if __name__ == "__main__":
    data.command(main)
