"""Prepare folders of frames for train.py, and look for what is broken in them.

    python examples/prepare.py frames VIDEOS FRAMES   # each video to a folder of JPEGs
    python examples/prepare.py check FRAMES           # decode every frame, list what is broken

VIDEOS holds videos, as VIDEOS/clip.avi, VIDEOS/Class/clip.avi or VIDEOS/train/Class/clip.avi. Their
frames come to lie likewise, as FRAMES/Class/clip/img_00001.jpg, and their shorter side is 256. What
has been stopped goes on when its command is repeated.
"""

import errno
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


# ---- the frames of a video ----

def ffmpeg(video, *options):
    """Start ffmpeg on the film of a video, not the picture of a cover, or of "-", what is piped to
    this program; a process with pipes."""
    import imageio_ffmpeg
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-nostats",
        "-loglevel", "level+info",
        # a playlist that calls itself a video fetches nothing
        "-protocol_whitelist", "pipe" if video == "-" else "file",
        "-threads", "1",  # one video per core is faster than all cores on one video
        "-reinit_filter", "0",  # where sizes change within a video, `scale` goes along
        "-i", "pipe:0" if video == "-" else str(Path(video).absolute()),
        "-map", "0:V:0",
        "-fps_mode", "passthrough"]  # every frame of the file, none of them twice
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def video_frames(video, complaints, chosen=None):
    """Yield the frames of a video, or those at the positions `chosen`, as RGB images whose shorter
    side is 256 and whose `info` has their "seconds". What ffmpeg complains of is added to
    `complaints`, a list; a ValueError names a video without frames."""
    filters = ("scale=w='if(gt(iw,ih),-1,256)':h='if(gt(iw,ih),256,-1)':eval=frame,format=rgb24,"
               "showinfo=checksum=0")
    if chosen is not None:
        filters = f"select='{'+'.join(f'eq(n,{i})' for i in chosen)}',{filters}"
    process = ffmpeg(video, "-noautoscale", "-vf", filters, "-f", "rawvideo", "-")
    shown = queue.SimpleQueue()  # times and sizes, which differ where the video's do

    def listen():
        for line in process.stderr:
            line = line.decode(errors="replace").strip()
            frame = re.search(r"showinfo.* pts_time:(\S+) .* s:(\d+)x(\d+)", line)
            if frame:
                seconds = float(frame[1].replace("NOPTS", "nan"))
                shown.put((seconds, int(frame[2]), int(frame[3])))
            elif "[error]" in line or "[fatal]" in line:
                complaints.append(line)
        shown.put(None)

    threading.Thread(target=listen, daemon=True).start()
    image = None
    try:
        while frame := shown.get():
            seconds, width, height = frame
            pixels = process.stdout.read(3 * width * height)
            if len(pixels) == 3 * width * height:
                image = Image.frombytes("RGB", (width, height), pixels)
                image.info["seconds"] = seconds
                yield image
        if process.wait() < 0:
            complaints.append(f"ffmpeg has crashed, by signal {-process.returncode}")
        if not image:
            said = complaints[0] if complaints else "no frames"
            if video == "-":
                said += "; what is piped needs a format that can be read without seeking"
            raise ValueError(f"{video}: is no readable video ({said})")
    finally:
        process.kill()
        process.wait()


def count_frames(video):
    """How many frames of a video can be read."""
    progress, _ = ffmpeg(video, "-progress", "-", "-f", "null", os.devnull).communicate()
    return int(re.findall(rb"frame=(\d+)", b"frame=0\n" + progress)[-1])


def write_frames(frames, folder):
    """Write images as img_00001.jpg and so on; returns their number."""
    count = 0
    for count, frame in enumerate(frames, 1):
        frame.save(Path(folder, f"img_{count:05d}.jpg"), quality=90)  # PSNR of 40 dB or more
    return count


# ---- the frames of many videos ----

def walk(folder, levels):
    """Yield what lies in a folder and some levels of folders in it: files first."""
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path)):
        if path.name.startswith(data.NO_CLIPS):
            continue
        if path.is_dir() and levels:
            yield from walk(path, levels - 1)
        else:
            yield path


def find_videos(root, frames):
    """{folder of frames: its video}, for all videos of `root` and of folders in it."""
    jobs, others = {}, Counter()
    for path in walk(root, levels=2):  # as in train/<class>
        if path.is_dir():
            others["folder in a folder of videos"] += 1
        elif path.suffix.lower() not in data.VIDEOS or path.is_fifo():
            others[path.suffix or path.name] += 1
        else:
            target = frames / path.relative_to(root).with_suffix("")
            # the same name with another suffix, or a video that is named like a class
            other = jobs.get(target) or jobs.get(target.parent)
            if other:
                raise ValueError(f"{other} and {path} would share a folder of {frames}")
            jobs[target] = path
    if others:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(8))
        print(f"{root}: left out what is no video by its suffix, or lies too deep: {counts}")
    return jobs


def convert(video, folder):
    """Write a video's frames, unless they are there; returns what went wrong, or ""."""
    if folder.is_dir():
        return ""  # by an extraction that was stopped later
    complaints = []
    # renamed only when it is complete, so that a folder that stands there is never half a clip
    part = folder.with_name(f".{data.name_hash(folder.name)[:16]}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        count = write_frames(video_frames(video, complaints), part)
        part.rename(folder)
    except ValueError as error:
        return f"skipped {error}"
    except OSError as error:
        if error.errno in FULL_DISK:
            raise OSError(f"{folder}: {error.strerror}") from None
        return f"skipped {video}: {error}"
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if complaints:
        return f"damaged {video}, its {count} readable frames are kept: {complaints[-1]}"
    return ""


def in_threads(function, jobs, workers, what):
    """The results of a function of each of the jobs. Threads do, as the work is done by ffmpeg and
    Pillow, which leave Python to the others; after an error no more jobs begin."""
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return list(tqdm(pool.map(function, jobs), what, len(jobs)))


def extract(videos, frames, workers=None):
    """Turn a folder of videos into the layout that train.py reads; returns the number of clips.
    Broken videos are named at the end. A ValueError, before anything is written, where two videos
    would share a folder; an OSError for a full disk."""
    root = Path(videos)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    jobs = find_videos(root, Path(frames))
    if not jobs:
        raise ValueError(f"{root}: no videos ({' '.join(data.VIDEOS)}) in it or its class folders")
    problems = in_threads(lambda folder: convert(jobs[folder], folder), jobs, workers, "videos")
    for problem in problems:
        if problem:
            print(problem, file=sys.stderr)
    done = sum(folder.is_dir() for folder in jobs)
    print(f"{done} of {len(jobs)} videos are frames in {frames}")
    if not done:
        raise ValueError(f"{root}: none of its videos could be read")
    return done


# ---- what is broken ----

def broken_frames(folder):
    """What is wrong with a clip, a line for each of its frames that cannot be decoded."""
    problems = []
    try:
        names = data.frame_names(folder)
    except (OSError, ValueError) as error:
        return [str(error)]
    for name in names:
        try:
            data.read_frame(folder / name)
        except ValueError as error:
            problems.append(str(error))
    return problems


def check(frames, workers=None):
    """Decode every frame and print what is broken, empty or unreadable; a ValueError if any is."""
    root = Path(frames)
    clips = data.clip_folders(root)
    problems = []
    # a class without clips is no clip, and would go unseen
    names = {folder.name for folder in root.iterdir() if folder.is_dir()}
    for name in sorted(names - {clip.split("/")[0] for clip in clips}):
        if not name.startswith(data.NO_CLIPS):
            problems.append(f"{root / name}: holds no clips")
    for found in in_threads(broken_frames, [root / clip for clip in clips], workers, "clips"):
        problems += found
    if problems:
        print(*problems, sep="\n")
        raise ValueError(f"{root}: {len(problems)} problems in {len(clips)} clips")
    print(f"{root}: every frame of {len(clips)} clips can be read")


def main(argv=None):
    parser = data.Parser(description="Prepare folders of frames for train.py.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{frames,check}")
    frames = commands.add_parser("frames", help="turn videos into folders of frames")
    frames.add_argument("videos", help="class folders of videos, or a folder of videos")
    frames.add_argument("frames", help="the folder to write to; continued if it exists")
    frames.add_argument("--workers", type=data.at_least(1), help="videos at a time (all cores)")
    checking = commands.add_parser("check", help="decode every frame and list what is broken")
    checking.add_argument("frames", help="a folder of frames, as train.py takes it")
    checking.add_argument("--workers", type=data.at_least(1), help="clips at a time (all cores)")
    args = parser.parse_args(argv)
    if args.command == "frames":
        extract(args.videos, args.frames, args.workers)
    else:
        check(args.frames, args.workers)


if __name__ == "__main__":
    data.command(main)
