"""Prepare folders of frames for train.py, and look for what is broken in them.

    python examples/prepare.py frames VIDEOS FRAMES   # each video to a folder of JPEGs
    python examples/prepare.py check FRAMES           # decode every frame, list what is broken

VIDEOS holds class folders of videos, VIDEOS/Class/clip.avi, or just videos: VIDEOS/clip.avi. Frames
come to lie as FRAMES/Class/clip/img_00001.jpg or FRAMES/clip/img_00001.jpg, their shorter side is
256. What has been stopped goes on when its command is repeated.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data


def video_frames(video, folder):
    """Write each frame of a video to an empty folder as a JPEG whose shorter side is 256.

    Returns what ffmpeg complained of, or "". A ValueError names a video that cannot be read.
    """
    import imageio_ffmpeg
    options = [
        "-nostdin", "-loglevel", "error",
        "-threads", "1",  # one video per core is faster than all cores on one video
        "-protocol_whitelist", "file",  # a playlist that calls itself a video fetches nothing
        "-i", str(Path(video).absolute()),
        "-fps_mode", "passthrough",  # every frame of the file, none of them twice
        "-q:v", "2",  # nearly the best that JPEG has
        "-vf", "scale='if(gt(iw,ih),-1,256)':'if(gt(iw,ih),256,-1)'"]
    result = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), *options, "img_%05d.jpg"],
        cwd=folder,  # not in front of img_%05d.jpg, as a folder's name may hold a % too
        capture_output=True, text=True, errors="replace")
    complaints = result.stderr.strip().splitlines()
    said = complaints[-1] if complaints else ""
    if result.returncode or not os.listdir(folder):
        raise ValueError(f"{video}: is no readable video ({said or 'no frames'})")
    return said


def find_videos(root, frames):
    """{folder of frames: its video}, for all videos of `root` and of its class folders."""
    jobs = {}
    for video in sorted(root.glob("*")) + sorted(root.glob("*/*")):
        hidden = video.name.startswith(".")
        if hidden or video.suffix.lower() not in data.VIDEOS or not video.is_file():
            continue
        folder = frames / video.relative_to(root).with_suffix("")
        # the same name with another suffix, or a video that is named like a class
        other = jobs.get(folder) or jobs.get(folder.parent)
        if other:
            raise ValueError(f"{other} and {video} would share a folder of {frames}")
        jobs[folder] = video
    return jobs


def convert(video, folder):
    """Write a video's frames, unless they are there; returns what went wrong, or ""."""
    if folder.is_dir():
        return ""  # by an extraction that was stopped later
    # renamed only when it is complete, so that a folder that stands there is never half a clip
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        said = video_frames(video, part)
    except ValueError as error:
        shutil.rmtree(part)
        return f"skipped {error}"
    part.rename(folder)
    return f"damaged {video}, its readable frames are kept: {said}" if said else ""


def extract(videos, frames, workers=None):
    """Turn a folder of videos into the layout that train.py reads; returns the number of clips.

    Broken videos are skipped, and named at the end. Raises ValueError, before anything is written,
    where two videos would share a folder.
    """
    root = Path(videos)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    jobs = find_videos(root, Path(frames))
    if not jobs:
        raise ValueError(f"{root}: no videos ({' '.join(data.VIDEOS)}) in it or its class folders")

    # threads do, as the work is done by ffmpeg
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        results = pool.map(convert, jobs.values(), jobs)
        problems = list(tqdm(results, "videos", len(jobs)))
    for problem in problems:
        if problem:
            print(problem, file=sys.stderr)
    done = sum(folder.is_dir() for folder in jobs)
    print(f"{done} of {len(jobs)} videos are frames in {frames}")
    if not done:
        raise ValueError(f"{root}: none of its videos could be read")
    return done


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
    parents = {clip.split("/")[0] for clip in clips}
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and not folder.name.startswith(".") and folder.name not in parents:
            problems.append(f"{folder}: holds no clips")
    # threads do here too: decoding a JPEG leaves Python to the others
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        results = pool.map(broken_frames, [root / clip for clip in clips])
        for found in tqdm(results, "clips", len(clips)):
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
