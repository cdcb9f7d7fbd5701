"""Tests of the examples: offline, small random models, frames and videos made here."""

import contextlib
import csv
import errno
import io
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

EXAMPLES = Path(__file__).resolve().parent
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES.parent)]
import clip_tokenizer
import data
import demo
import export
import ezclip
import films
import lists
import plots
import predict
import prepare
import protocols
import reid
import train
from ezclip import EZCLIP, Config, class_probabilities
from test_ezclip import (frames_folder, golden_inputs, in_processes, near, randomised,
                         save_frames, slow, small, world)

pytestmark = pytest.mark.filterwarnings("ignore:.*does not say its activation")


def fails(program, argv, word):
    """A command that cannot be done ends with a line that says why. Returns all that is printed."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as stop:
        data.command(lambda: program.main([*map(str, argv)]))
    errors = errors.getvalue()
    line = errors.strip().splitlines()[-1]
    assert stop.value.code == 2 and line.startswith("error: ") and word in line, errors
    assert "Traceback" not in errors
    return errors


def ffmpeg_program():
    return pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()


def make_video(path, frames=12, size="64x48", codec="mpeg4"):
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([ffmpeg_program(), "-loglevel", "error", "-f", "lavfi", "-i",
                    f"testsrc=size={size}:rate=10", "-frames:v", str(frames), "-c:v", codec, path],
                   check=True)


def test_examples_run_from_anywhere(tmp_path):
    """One as a process, whose imports take seconds; of the others only their help."""
    result = subprocess.run([sys.executable, str(EXAMPLES / "demo.py"), "--help"], cwd=tmp_path,
                            capture_output=True, text=True)
    assert result.stdout.startswith("usage: demo.py") and not result.stderr, result.stderr


@pytest.mark.parametrize("program", [demo, export, films, lists, plots, predict, prepare,
                                     protocols, reid])
def test_examples_have_help(program, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(["--help"])
    assert stop.value.code == 0 and "usage: " in capsys.readouterr().out
    assert f"examples/{program.__name__}.py" in program.__doc__


# ---- prepare.py ----

def test_extraction(tmp_path, capsys):
    videos, frames = tmp_path / "videos", tmp_path / "frames"
    make_video(videos / "Wave hand" / "a.b #1 50%d.avi")
    make_video(videos / "Wave hand" / "tall.MP4", 7, size="48x96")
    make_video(videos / "Clap" / "c.mkv", 5)
    (videos / "Clap" / "broken.mp4").write_bytes(b"no video")
    (videos / "Clap" / "notes.txt").write_text("ignored")
    (videos / "Clap" / "._c.mkv").write_text("ignored too")
    assert prepare.extract(videos, frames) == 3
    said = capsys.readouterr()
    assert f"skipped {videos / 'Clap' / 'broken.mp4'}: is no readable video" in said.err
    assert "3 of 4" in said.out and "._c" not in said.err
    found = {str(p.relative_to(frames)): len(data.frame_names(p)) for p in frames.glob("*/*")}
    assert found == {"Wave hand/a.b #1 50%d": 12, "Wave hand/tall": 7, "Clap/c": 5}
    assert data.frame_names(frames / "Clap/c")[0] == "img_00001.jpg"
    assert Image.open(frames / "Clap/c/img_00005.jpg").size == (341, 256)
    assert Image.open(frames / "Wave hand/tall/img_00001.jpg").size == (256, 512)

    kept = frames / "Clap/c/img_00001.jpg"
    before = kept.stat().st_mtime_ns  # what is complete is not made again, what is missing is
    half = frames / f"Wave hand/.{data.name_hash('tall')[:16]}.part"
    (frames / "Wave hand/tall").rename(half)
    (half / "img_00009.jpg").write_bytes(b"left by a run that was killed")
    assert data.index_frames(frames)[0].classes == ["Clap", "Wave hand"]
    prepare.main(["frames", str(videos), str(frames), "--workers", "2"])
    assert kept.stat().st_mtime_ns == before
    assert len(data.frame_names(frames / "Wave hand/tall")) == 7 and not half.exists()

    make_video(tmp_path / "flat" / "a.mov", 3)
    assert prepare.extract(tmp_path / "flat", tmp_path / "flat frames") == 1
    assert len(data.frame_names(tmp_path / "flat frames/a")) == 3


def damaged_video(path):
    make_video(path, 40)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle:middle + 300] = bytes(300)
    path.write_bytes(content)


def test_a_damaged_video_is_kept_and_named(tmp_path, capsys):
    video, frames = tmp_path / "videos/Clap/a.avi", tmp_path / "frames"
    damaged_video(video)
    assert prepare.extract(video.parents[1], frames) == 1
    said = capsys.readouterr()
    count = len(data.frame_names(frames / "Clap/a"))
    assert f"damaged {video}, its {count} readable frames are kept: " in said.err and count > 20
    video.write_bytes(video.read_bytes()[:len(video.read_bytes()) * 2 // 3])  # torn, whatever is said
    assert prepare.extract(video.parents[1], tmp_path / "torn") == 1
    assert 10 < len(data.frame_names(tmp_path / "torn/Clap/a")) < 30


def test_a_decoder_that_crashes_is_named(tmp_path, capsys, monkeypatch):
    make_video(tmp_path / "videos/Clap/a.avi", 40)
    program = tmp_path / "ffmpeg"
    program.write_text(f'#!/bin/sh\n{ffmpeg_program()} "$@"\nkill -SEGV $$\n')
    program.chmod(0o755)
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: str(program))
    assert prepare.extract(tmp_path / "videos", tmp_path / "frames") == 1
    said = capsys.readouterr().err
    assert "its 40 readable frames are kept: ffmpeg has crashed, by signal 11" in said


def test_videos_of_all_kinds(tmp_path, capsys):
    """Sizes that change, covers of sound, deep folders, long names and what cannot be written."""
    videos, frames, parts = tmp_path / "videos", tmp_path / "frames", []
    for k, size in enumerate(("64x36", "40x80", "64x36")):
        make_video(tmp_path / f"{k}.ts", 5, size, codec="mpeg2video")
        parts.append((tmp_path / f"{k}.ts").read_bytes())
    (videos / "train/Clap").mkdir(parents=True)
    (videos / "train/Clap/changing.ts").write_bytes(b"".join(parts))
    make_video(videos / "train/Clap" / ("x" * 250 + ".wmv"), 3, codec="wmv2")
    make_video(videos / "train/Clap/a.flv", 3, codec="flv")
    save_frames(tmp_path / "cover", 1)
    subprocess.run([ffmpeg_program(), "-loglevel", "error", "-f", "lavfi", "-i", "sine=d=1", "-i",
                    tmp_path / "cover/img_00001.jpg", "-map", "0", "-map", "1", "-c:v", "mjpeg",
                    "-disposition:v:0", "attached_pic", videos / "train/Clap/sound.m4v"], check=True)
    (videos / "train/Clap/notes.txt").write_text("no video")
    (frames / "train/Clap").mkdir(parents=True)
    (frames / "train/Clap/late").write_text("a file where the frames' folder would be")
    make_video(videos / "train/Clap/late.avi", 3)
    (videos / "train/Clap/link.avi").symlink_to("nowhere")
    (videos / "train/Clap/deeper").mkdir()
    os.mkfifo(videos / "train/Clap/pipe.mp4")  # which would be waited for
    assert prepare.extract(videos, frames) == 3
    said = capsys.readouterr()
    assert f"skipped {videos}/train/Clap/sound.m4v: " in said.err and "1 .txt" in said.out
    assert "1 folder in a folder of videos" in said.out and "1 .mp4" in said.out
    assert f"skipped {videos}/train/Clap/late.avi: " in said.err and "3 of 6" in said.out
    assert f"skipped {videos}/train/Clap/link.avi: " in said.err
    clip = frames / "train/Clap/changing"
    sizes = [Image.open(clip / name).size for name in data.frame_names(clip)]
    assert set(sizes) == {(455, 256), (256, 512)} and len(sizes) >= 12, sizes
    assert sizes == sorted(sizes[:7], reverse=True) + sorted(sizes[7:])


def test_a_full_disk_ends_an_extraction(tmp_path, monkeypatch):
    for k in range(4):
        make_video(tmp_path / f"videos/Clap/{k}.avi", 3)

    def full(self, path, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Image.Image, "save", full)
    fails(prepare, ["frames", tmp_path / "videos", tmp_path / "frames"], "No space left on device")
    assert not any((tmp_path / "frames/Clap").iterdir())


def test_videos_that_cannot_be_extracted_are_refused(tmp_path):
    make_video(tmp_path / "videos/Clap/c.mkv", 3)
    make_video(tmp_path / "videos/Clap/c.webm", 3, codec="libvpx")
    make_video(tmp_path / "flat/a.mov", 3)
    make_video(tmp_path / "flat/a/b.mov", 3)
    (tmp_path / "broken/Clap").mkdir(parents=True)
    (tmp_path / "broken/Clap/c.mp4").write_bytes(b"no video")
    (tmp_path / "empty/Clap").mkdir(parents=True)
    none = tmp_path / "none"
    for folder, word in (("videos", "c.mkv and"), ("flat", "a.mov and"), ("gone", "no such folder"),
                         ("flat/a/b.mov", "no such folder"), ("empty", "no videos (.avi .mp4")):
        fails(prepare, ["frames", tmp_path / folder, none], word)
        assert not none.exists()
    fails(prepare, ["frames", tmp_path / "broken", none], "none of its videos could be read")
    fails(prepare, ["frames", tmp_path / "flat/a", none, "--workers", "0"], "--workers: must be at")


def test_check_names_all_that_is_broken(tmp_path, capsys):
    root = frames_folder(tmp_path / "frames", clips=3)
    prepare.main(["check", str(root)])
    assert "every frame of 6 clips can be read" in capsys.readouterr().out
    torn, void = root / "Archery/clip1/img_00003.jpg", root / "BabyCrawling/clip0/img_00005.jpg"
    torn.write_bytes(torn.read_bytes()[:400])
    void.write_bytes(b"")
    (root / "BabyCrawling/bare").mkdir()
    (root / "Empty").mkdir()
    fails(prepare, ["check", root, "--workers", "3"], f"{root}: 4 problems in 7 clips")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 5 and all(str(path) in "".join(said[1:]) for path in (
        torn, void, root / "BabyCrawling/bare", root / "Empty"))
    fails(prepare, ["check", tmp_path / "gone"], "gone: no such folder")


# ---- plots.py ----

def table(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))


def test_plots_of_a_run(world, capsys):
    pictures = [world.whole / "curves.png", world.whole / "confusion.png"]
    plots.main([str(world.whole)])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{world.whole}:" and {str(path) for path in pictures} <= {*said}
    for path in pictures:
        assert Image.open(path).size[0] > 800 and path.stat().st_size > 10000
    classes, matrix = plots.read_predictions(world.whole / "predictions.csv")
    result, = json.loads((world.whole / "results.json").read_text())["results"].values()
    assert matrix.sum() == result["n"]
    assert 100 * matrix.trace() / matrix.sum() == pytest.approx(result["top1"], abs=0.01)
    for i, name in enumerate(classes):
        share = f"{100 * matrix[i, i] / matrix[i].sum():.1f} % of {matrix[i].sum()} clips"
        assert sum(line.split(name)[1].strip() == share for line in said if f"  {name} " in line
                   and "taken for" not in line) == 1
    curves = plots.read_log(world.whole / "log.csv")
    assert [epoch for epoch, _ in curves["loss"]] == [1, 2, 3]
    assert [epoch for epoch, _ in curves["frames top1"]] == [2, 3]


def test_classes_and_confusions_by_hand(tmp_path, capsys):
    """Names with commas and a $ too, a class that is only predicted, and a second run."""
    pairs = [("b, $x_{$", "a"), ("a", "c"), ("b, $x_{$", "b, $x_{$"), ("a", "a"), ("b, $x_{$", "a")]
    rows = [(f"clip{i}", f'"{true}"', f'"{best}"', 0.9) for i, (true, best) in enumerate(pairs)]
    table(tmp_path / "run/predictions.csv", ("clip", "class", "class1", "p1"), *rows)
    classes, matrix = plots.read_predictions(tmp_path / "run/predictions.csv")
    assert classes == ["a", "b, $x_{$", "c"]
    assert matrix.tolist() == [[1, 0, 1], [2, 1, 0], [0, 0, 0]]
    table(tmp_path / "only log/log.csv", ("epoch", "lr", "loss"), (1, 0.1, 3), (2, 0.1, 2.5))
    plots.main([str(tmp_path / "run"), str(tmp_path / "only log")])
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/run:",
        "  b, $x_{$   33.3 % of 3 clips",
        "  a          50.0 % of 2 clips",
        "  2 of 3 clips of b, $x_{$ taken for a",
        "  1 of 2 clips of a taken for c",
        f"{tmp_path}/run/confusion.png",
        f"{tmp_path}/only log/curves.png"]
    assert sorted(p.name for p in tmp_path.rglob("*.png")) == ["confusion.png", "curves.png"]

    many = [(i, i, (i + 1) % 99) for i in range(99)]  # too many to be named; ten pairs are printed
    table(tmp_path / "many/predictions.csv", ("clip", "class", "class1"), *many)
    plots.main([str(tmp_path / "many")])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 + 99 + 10 + 1 and said[100] == "  1 of 1 clips of 0 taken for 1"
    assert (tmp_path / "many/confusion.png").exists()


@pytest.mark.parametrize("name, rows, word", [
    ("log.csv", [("epoch", "loss")], "log.csv: holds no rows"),
    ("log.csv", [("epoch", "lr"), (1, 2)], "log.csv: row 1 has no loss"),
    ("log.csv", [("epoch", "loss"), (1, 2), (2, "much")], "log.csv: row 2: 'much' is no number"),
    ("predictions.csv", [("clip", "class"), ("a", "b")], "predictions.csv: row 1 has no class1"),
    ("notes.txt", [], "run: holds no run, neither log.csv nor predictions.csv")])
def test_runs_that_cannot_be_drawn_are_named(tmp_path, name, rows, word):
    table(tmp_path / "run" / name, *rows)
    fails(plots, [tmp_path / "run"], word)
    assert not [*tmp_path.rglob("*.png")]


def test_names_in_all_letters_and_none(world, tmp_path, monkeypatch, capsys):
    """Names that matplotlib's font lacks, that a console cannot print, or that are not UTF-8."""
    names = ["跳舞", "नाच", "رقص", "$x^2", os.fsdecode(b"caf\xe9"), os.fsdecode(b"caf\xe8")]
    frames_folder(tmp_path / "frames", names, clips=2, count=2)
    flags = ["--data", str(tmp_path / "frames"), "--workers", "0", "--out", str(tmp_path / "run")]
    run = ["--clip", world.clip, "--eval-only", *flags]
    monkeypatch.setattr(plots.font_manager, "findSystemFonts", list)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert data.command(lambda: train.main(run))["results"]["frames"]["n"] == 6
    data.command(lambda: plots.main([str(tmp_path / "run")]))
    classes, matrix = plots.read_predictions(tmp_path / "run/predictions.csv")
    assert classes == sorted(names) and matrix.sum() == 6  # none of them merged
    assert Image.open(tmp_path / "run/confusion.png").size[0] > 400
    data.command(lambda: predict.main([
        str(tmp_path / "frames" / name / "clip0") for name in names] + ["--clip", world.clip,
        "--class-names", *names[:4], "--picture", str(tmp_path / "a.png"), "--num-frames", "2"]))
    sys.stdout.flush()
    said = sys.stdout.buffer.getvalue().decode()
    assert r"\u8df3\u821e" in said and r"caf\udce9" in said
    assert said.count("no font here has the letters") == 2  # pictures
    assert (tmp_path / "a.png").exists()


# ---- predict.py ----

@pytest.mark.parametrize("settings", [dict(), dict(prompts="shallow"), dict(
    prompts="none", temporal_adapter=True)])
def test_attention_maps_are_those_of_the_pass(settings):
    model, (video, _) = small(**settings), golden_inputs(2, 4)
    randomised(model)
    blocks, inputs = model.visual.transformer.resblocks, {}
    hooks = [block.attn.register_forward_pre_hook(lambda attn, args: inputs.update({attn: args}))
             for block in blocks]
    with torch.no_grad():
        features, maps = predict.attention_maps(model, video)
        assert maps.shape == (2, 4, 3, 2, 18)  # 1 + 16 + 1 tokens
        for i, attn in enumerate(block.attn for block in blocks):
            queries, tokens = inputs[attn]  # of the last call in the block, that over tokens
            peer = nn.MultiheadAttention(128, 2, batch_first=True)
            peer.load_state_dict(attn.state_dict())
            weights = peer(queries[:, :1], tokens, tokens, average_attn_weights=False)[1]
            L = tokens.shape[1]
            near(maps[:, :, i, :, :L].flatten(0, 1), weights[:, :, 0], 1e-6)  # (B*T, H, L)
            prompted = settings.get("prompts", "deep") == "deep" or (
                settings["prompts"] == "shallow" and i == 0)
            assert L == 17 + prompted
            assert maps[..., i, :, -1].all() if prompted else not maps[..., i, :, -1].any()
        near(maps.sum(-1), torch.ones(2, 4, 3, 2), 1e-6)
        near(features, model.encode_frames(video), 0)
    for hook in hooks:
        hook.remove()
    assert not any(block.attn._forward_pre_hooks for block in blocks)
    with pytest.raises(ValueError):
        predict.attention_maps(model, video[0])
    assert not any(block.attn._forward_pre_hooks for block in blocks)
    model = small(**settings, recompute=True)
    features, maps = predict.attention_maps(model, video)
    features.sum().backward()  # these have their gradient
    assert not maps.requires_grad and model.visual.conv1.weight.grad.any()


def test_predictions(world, tmp_path, capsys, monkeypatch):
    video, folder = tmp_path / "wave.avi", f"{world.frames}/Clap/clip1"
    checkpoint = str(world.whole / "last.pt")
    make_video(video)
    names = ["ride a bike", "clap", "wave", "jump", "archery", "run fast"]
    (tmp_path / "names.txt").write_text("\n".join(names))
    flags = [str(video), folder, "--checkpoint", checkpoint, "--device", "cpu"]
    monkeypatch.chdir(tmp_path)
    predict.main([*flags, "--class-names", *names, "--picture", "seen.png"])
    lines, files = capsys.readouterr().out.splitlines(), sorted(tmp_path.rglob("*"))
    assert lines[0] == str(video) and lines[6] == folder and len(lines) == 12
    assert len({len(line) for line in lines[1:6] + lines[7:]}) == 1
    assert Image.open("seen.png").size[0] > 400
    predict.main([*flags, "--class-names", "names.txt", "--json"])
    content = json.loads(capsys.readouterr().out)
    said = content.pop("videos")
    assert content == {"clip": world.clip, "checkpoint": checkpoint, "num_frames": 4,
                       "prompts": "deep"}
    assert [v["video"] for v in said] == [str(video), folder]

    model = EZCLIP.from_pretrained(checkpoint)
    (tmp_path / "frames").mkdir()
    prepare.write_frames(prepare.video_frames(video, []), tmp_path / "frames")
    clips = torch.stack([data.load_clip(path, 4, 32) for path in (tmp_path / "frames", folder)])
    tokens = torch.stack([clip_tokenizer.tokenize([t.replace("{}", name) for name in names])
                          for t in data.TEMPLATES])
    with torch.no_grad():
        texts = model.encode_text(tokens.flatten(0, 1)).unflatten(0, (16, 6))
        expected = class_probabilities(model.encode_video(clips), texts)
    for v, p, printed in zip(said, expected, (lines[1:6], lines[7:])):
        best = p.argsort(descending=True)[:5]
        assert [c["class"] for c in v["classes"]] == [names[i] for i in best]
        assert [c["probability"] for c in v["classes"]] == pytest.approx(p[best].tolist(), abs=1e-5)
        assert [line.split()[:-2] for line in printed] == [names[i].split() for i in best]

    predict.main(flags)  # the classes of the checkpoint
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in lines[1:4]) == ["Archery", "BabyCrawling", "Clap"]
    predict.main([*flags[:2], "--clip", world.clip, "--class-names", "clap", "--json",
                  "--picture", "seen.png", "--num-frames", "3"])
    said = capsys.readouterr()
    assert "plain CLIP, without prompts" in said.err and str(video) in said.err
    content = json.loads(said.out)
    assert content["prompts"] == "none" and content["num_frames"] == 3
    assert content["videos"][1]["classes"] == [{"class": "clap", "probability": 1.0}]


@pytest.mark.parametrize("flags, word", [
    ("none.mp4 --checkpoint last.pt", "none.mp4: no such video"),
    ("names.txt --checkpoint last.pt", "names.txt: is no readable video"),
    ("frames/Clap --checkpoint last.pt", "Clap: holds no frames"),
    ("frames/Clap/clip1 --checkpoint last.pt --class-names gone.txt", "gone.txt"),
    ("frames/Clap/clip1 --checkpoint last.pt --class-names void.txt", "void.txt"),
    ("frames/Clap/clip1 --checkpoint last.pt --class-names a_b A_b", "has a b twice"),
    ("frames/Clap/clip1 --clip clip.pt", "--class-names is needed"),
    ("frames/Clap/clip1 --checkpoint clip.pt", "clip.pt"),
    ("frames/Clap/clip1 --checkpoint gone.pt", "gone.pt"),
    ("frames/Clap/clip1 --checkpoint last.pt --data frames", "--data"),
    ("frames/Clap/clip1 --checkpoint last.pt --templates action", "has no {} for the class"),
    ("frames/Clap/clip1 --checkpoint last.pt --device warp", "--device"),
    ("frames/Clap/clip1 --checkpoint last.pt --picture gone/a.png", "gone/a.png: no such folder"),
    ("--class-names a b", "VIDEO")])
def test_predictions_that_cannot_be_made(flags, word, world, tmp_path, monkeypatch):
    (tmp_path / "frames").symlink_to(world.frames)
    (tmp_path / "clip.pt").symlink_to(world.clip)
    (tmp_path / "last.pt").symlink_to(world.whole / "last.pt")
    (tmp_path / "names.txt").write_text("clap\nwave\n")
    (tmp_path / "void.txt").write_text("\n")
    monkeypatch.chdir(tmp_path)
    files = sorted(tmp_path.rglob("*"))
    fails(predict, [*flags.split()], word)
    assert sorted(tmp_path.rglob("*")) == files


@pytest.mark.parametrize("classes, found", [
    (["A", "a", 3], ["A", "a", "3"]),  # what was trained is not asked
    (None, None), (5, None), ([], None), (torch.ones(2), None)])
def test_the_classes_of_a_checkpoint(classes, found, tmp_path):
    torch.save({"classes": classes}, tmp_path / "last.pt")
    args = SimpleNamespace(class_names=[], checkpoint=str(tmp_path / "last.pt"))
    if found:
        assert predict.classes_of(args) == found
        return
    with pytest.raises(ValueError, match="last.pt: names no classes, --class-names is needed"):
        predict.classes_of(args)


def test_a_damaged_video_is_predicted_with_a_warning(world, tmp_path, capsys):
    video = tmp_path / "a.avi"
    damaged_video(video)
    predict.main([str(video), "--checkpoint", str(world.whole / "last.pt"), "--device", "cpu"])
    said = capsys.readouterr()
    assert f"warning: damaged {video}: " in said.err and len(said.out.splitlines()) == 4


# ---- films.py ----

def shown_at(*moments):
    """Frames that a film shows from these seconds on, told apart by their grey."""
    for k, seconds in enumerate(moments):
        image = Image.new("RGB", (8, 8), (k, k, k))
        image.info["seconds"] = seconds
        yield image


@pytest.mark.parametrize("start", [0.0, 1.4, -0.5])
def test_windows_show_what_the_film_shows(start):
    moments = [0, 0.5, 1, 1.1, 1.2, 2.9, 3, 3.5, 4, 4.5]  # it ends at 5
    film = films.Windows(shown_at(*[start + t for t in moments]), 1.0, 2.0, 4)
    found = [(begin, [image.getpixel((0, 0))[0] for image in images]) for begin, images in film]
    # windows of 2 seconds look at 0.25, 0.75, 1.25 and 1.75 seconds after their beginning
    assert found == [(0, [0, 1, 4, 4]), (1, [4, 4, 4, 4]), (2, [4, 4, 6, 7]), (3, [6, 7, 8, 9])]
    assert film.seconds == pytest.approx(5)


def test_times_that_begin_anew_or_jump():
    joined = [5000, 5001, 5002, 5003, 0, 1, 2, 3]  # two files of four seconds
    film = films.Windows(shown_at(*joined), 1.0, 2.0, 2)
    assert [images[0].getpixel((0, 0))[0] for _, images in film] == [0, 1, 2, 3, 4, 5, 6]
    assert film.seconds == 8
    film = iter(films.Windows(shown_at(0, 1, 1e9), 1.0, 2.0, 2))
    for _ in range(1000):  # none is kept that nobody has asked for
        _, images = next(film)
    assert [image.getpixel((0, 0))[0] for image in images] == [1, 1]


@pytest.mark.parametrize("moments, found", [
    ([0], [(0, [0, 0, 0, 0])]),  # a film that is shorter than a window
    ([0, 0.2, 0.4], [(0, [1, 2, 2, 2])]),
    ([0, 1, 2], [(0, [0, 0, 1, 1]), (1, [1, 1, 2, 2])]),
    ([0, 1, 2, 2.6], [(0, [0, 0, 1, 1]), (1, [1, 1, 2, 3])])])
def test_the_end_of_a_film(moments, found):
    film = films.Windows(shown_at(*moments), 1.0, 2.0, 4)
    assert [(begin, [image.getpixel((0, 0))[0] for image in images])
            for begin, images in film] == found


def test_no_more_of_a_film_is_kept_than_its_windows_need():
    for frames in (200, 2000):
        alive, most = [], 0

        def watched():
            for frame in shown_at(*np.arange(frames) / 25):
                alive.append(weakref.ref(frame))
                yield frame

        for start, _ in films.Windows(watched(), 1.0, 2.0, 4):
            most = max(most, sum(frame() is not None for frame in alive))
        assert start == frames // 25 - 2 and 4 < most < 12


def test_stretches_of_equal_answers(capsys):
    film = SimpleNamespace(every=1.0, window=2.0)
    answers = [(0, 0.9), (0, 0.7), (1, 0.6), (0, 0.2), (1, 0.25), (1, 0.21), (2, 0.5), (2, 0.1),
               (0, 0.1)]  # of a class, from second to second
    for none, lines in (
            (0.0, ["00:00-00:03  a  80 %", "00:03-00:04  b  60 %", "00:04-00:05  a  20 %",
                   "00:05-00:07  b  23 %", "00:07-00:09  c  30 %", "00:09-00:11  a  10 %"]),
            (0.3, ["00:00-00:03  a  80 %", "00:03-00:04  b  60 %", "00:04-00:07  none of these",
                   "00:07-00:09  c  30 %", "00:09-00:11  none of these"])):
        stretches = films.Stretches(film, ["a", "b", "c"], none)
        for start, (k, p) in enumerate(answers):
            others = torch.full((3,), -1.0)
            others[k] = p
            stretches.add(start, others, f"frame {start}")
            said = capsys.readouterr().out.splitlines()
            assert said == lines[:len(said)]
            lines = lines[len(said):]
            if start == 6:  # all that is before it is told, also what has no name
                assert lines[0].startswith("00:07")
        stretches.close(11.0)
        stretches.tell_unnamed()
        assert capsys.readouterr().out.splitlines() == lines
    assert stretches.frames == ["frame 0", "frame 2", "frame 4", "frame 6", "frame 8"]
    assert [films.clock(t) for t in (11.6, 3723, 59.5)] == ["00:12", "1:02:03", "01:00"]
    assert [films.clock(t, True) for t in (9.75, 59.96)] == ["00:09.8", "01:00.0"]


def test_a_film_is_named(world, tmp_path, capsys, monkeypatch):
    make_video(tmp_path / "film.avi", 60)  # of six seconds
    monkeypatch.chdir(tmp_path)
    flags = ["--checkpoint", str(world.whole / "last.pt"), "--device", "cpu"]
    films.main(["film.avi", *flags, "--json", "--picture", "film.png"])
    said = capsys.readouterr()
    content = json.loads(said.out)
    assert [window["start"] for window in content["windows"]] == [0, 1, 2, 3, 4]
    assert len(said.err.splitlines()) == len(content["stretches"])
    assert re.fullmatch(r"00:0\d-00:0\d  \w+  \d+ %", said.err.splitlines()[0])
    assert content["stretches"][-1]["end"] == content["seconds"] == pytest.approx(6)
    assert Image.open("film.png").size[0] > 900

    # the third window, by hand: frames 22, 27, 32, 37 of ten a second
    frames = list(prepare.video_frames("film.avi", []))
    (tmp_path / "frames").mkdir()
    for k in (22, 27, 32, 37):
        frames[k].save(tmp_path / f"frames/{k}.png")
    clip = data.load_clip(tmp_path / "frames", 4, 32)[None]
    model = EZCLIP.from_pretrained(world.whole / "last.pt")
    args = train.parser().parse_args([*flags, "--eval-only"])
    with torch.no_grad():
        texts = train.encode_classes(["Archery", "BabyCrawling", "Clap"], args, model)
        expected, order = class_probabilities(model.encode_video(clip), texts)[0].sort(
            descending=True)
    answers = content["windows"][2]["classes"]
    assert [answer["probability"] for answer in answers] == pytest.approx(expected.tolist(),
                                                                          abs=1e-5)
    assert [answer["class"] for answer in answers] == [
        ["Archery", "BabyCrawling", "Clap"][k] for k in order]

    films.main(["film.avi", *flags, "--none", "1", "--class-names", "wave", "clap"])
    assert capsys.readouterr().out == "00:00-00:06  none of these\n"
    with open("film.avi", "rb") as file:  # what ffmpeg inherits as standard input
        piped = subprocess.run([sys.executable, EXAMPLES / "films.py", "-", *flags], stdin=file,
                               capture_output=True, text=True)
    assert piped.stdout == said.err, piped.stderr


def test_a_camera_ends_by_ctrl_c(world, monkeypatch, capsys):
    def camera(*_):
        yield from shown_at(*np.arange(0, 5, 0.1))
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "video_frames", camera)
    with pytest.raises(SystemExit) as stop:
        films.main(["-", "--checkpoint", str(world.whole / "last.pt"), "--json", "--device", "cpu"])
    content = json.loads(capsys.readouterr().out)
    assert stop.value.code == 130
    assert len(content["windows"]) == 3 and content["stretches"][-1]["end"] == 4.9


@pytest.mark.parametrize("flags, word", [
    ("gone.mp4", "gone.mp4: no such film"), ("names.txt", "names.txt: is no readable video"),
    (". --every 1", ".: no such film"), ("names.txt --every 0", "--every"),
    ("names.txt --window nan", "--window"), ("names.txt --picture gone/a.png", "no such folder"),
    ("names.txt --none 30", "--none 30.0 is no probability"), ("names.txt --picture .", ".: no such"),
    ("names.txt --class-names a_b A_b", "has a b twice")])
def test_films_that_cannot_be_named(flags, word, world, tmp_path, monkeypatch):
    (tmp_path / "names.txt").write_text("clap\nwave\n")
    monkeypatch.chdir(tmp_path)
    fails(films, [*flags.split(), "--checkpoint", world.whole / "last.pt"], word)


# ---- export.py ----

def test_exported_towers_equal_the_model(world, tmp_path, capsys, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    defaults = train.parser().parse_args([])  # on a machine with a GPU
    defaults.device = "cuda"
    monkeypatch.setattr(train, "parser", lambda: SimpleNamespace(parse_args=lambda _: defaults))
    checkpoint, out = str(world.whole / "last.pt"), tmp_path / "exported"
    flags = ["--checkpoint", checkpoint, "--out", str(out), "--class-names", "Ride a bike", "clap"]
    export.main([*flags, "--text-length", "20", "--templates", "a {}", "{}"])
    assert capsys.readouterr().out.count("ONNX Runtime differs from PyTorch by") == 2
    assert sorted(file.name for file in out.iterdir()) == ["classes.json", "text.onnx", "video.onnx"]
    content = json.loads((out / "classes.json").read_text())
    model = EZCLIP.from_pretrained(checkpoint)
    run = {}
    for name in ("video", "text"):
        session = onnxruntime.InferenceSession(out / f"{name}.onnx")
        run[name] = lambda x, session=session: torch.from_numpy(
            session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    video = torch.randint(256, (3, 4, 3, 32, 32), dtype=torch.uint8)
    names = ["ride a bike", "clap"]
    texts = [t.replace("{}", name) for t in ("a {}", "{}") for name in names]
    with torch.no_grad():
        expected = model.encode_video(video)
        near(run["video"](video), expected)
        near(run["video"](video[:1]), expected[:1])
        encoded = model.encode_text(clip_tokenizer.tokenize(texts))
        near(run["text"](clip_tokenizer.tokenize(texts, 20)), encoded)
        near(run["text"](clip_tokenizer.tokenize(texts[:1], 20)), encoded[:1])
    ready = torch.tensor(content["text_features"])  # (templates, classes, E)
    near(ready, nn.functional.normalize(encoded, dim=-1).unflatten(0, (2, 2)))
    logits = content["logit_scale"] * nn.functional.normalize(expected, dim=-1) @ ready.mT
    near(logits.softmax(-1).mean(0), class_probabilities(expected, encoded.unflatten(0, (2, 2))))
    assert (content["classes"], content["templates"]) == (["Ride a bike", "clap"], ["a {}", "{}"])
    sizes = [content[key] for key in ("num_frames", "image_size", "embed_dim", "text_length")]
    assert sizes == [4, 32, model.config.embed_dim, 20]
    digests = {name: export.sha256(path) for name, path in (
        ("video.onnx", out / "video.onnx"), ("text.onnx", out / "text.onnx"),
        ("clip", world.clip), ("checkpoint", checkpoint))}
    assert content["sha256"] == digests
    fails(export, flags, "exported: exists already")
    (tmp_path / "mine.part").mkdir()
    fails(export, [*flags[:2], "--out", f"{tmp_path}/mine/"], "mine.part: exists already")


@pytest.mark.parametrize("flags, word", [
    ("--clip clip.pt --text-length 78", "--text-length 78 is more than"),
    ("--clip clip.pt --precision bf16", "leave --precision"),
    ("--clip clip.pt --templates {}", "--templates and --descriptions go with"),
    ("--checkpoint last.pt --text-length 3", "7 tokens with start and end, 3 fit"),
    ("--checkpoint gone.pt", "gone.pt"),
    ("--checkpoint last.pt --class-names a A", "has a twice"),
    ("--checkpoint last.pt", "onnxruntime are needed: pip install onnx onnxscript onnxruntime")])
def test_models_that_cannot_be_exported(flags, word, world, tmp_path, monkeypatch):
    missing = "onnxruntime" if "needed" in word else ""
    monkeypatch.setattr(export.importlib.util, "find_spec",
                        lambda name: None if name == missing else "is installed, it is said")
    (tmp_path / "clip.pt").symlink_to(world.clip)
    (tmp_path / "last.pt").symlink_to(world.whole / "last.pt")
    monkeypatch.chdir(tmp_path)
    fails(export, [*flags.split(), "--out", "exported"], word)
    assert not list(tmp_path.glob("exported*"))


def test_weights_that_one_file_cannot_hold_lie_beside_it(tmp_path, monkeypatch):
    for name in export.PACKAGES:
        pytest.importorskip(name)
    monkeypatch.setattr(export, "MOST", 1000)
    encoder = export.Encoder(small(text_layers=1).eval().requires_grad_(False), "encode_text")
    _, (tokens, alone) = export.example_inputs(encoder.model.config, 9, (2, 1))
    export.export(encoder, tokens, tmp_path / "text.onnx", "tokens")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["text.onnx", "text.onnx.data"]
    assert export.largest_difference(encoder, tmp_path / "text.onnx", [tokens, alone]) < 1e-5


# ---- lists.py ----

TEMPLATES = ["Holding [something] next to [something]", "Moving [something] up",
             "Trying to pour [something] into [something], but missing"]
SSV2 = [{"id": str(id), "label": "a pen", "template": TEMPLATES[k], "placeholders": ["pen"]}
        for id, k in ((78687, 0), (42, 2), (7, 1))]
NUMBERS = {re.sub(r"[\[\]]", "", template): str(k) for k, template in enumerate(TEMPLATES)}
FILES = {  # as the downloads have them
    "ucf/classInd.txt": "1 Archery\r\n2 HandstandPushups\r\n3 PullUps\r\n",
    "ucf/trainlist01.txt": "Archery/v_Archery_g08_c01.avi 1\r\nPullUps/v_PullUps_g08_c01.avi 3\r\n",
    "ucf/testlist01.txt": "Archery/v_Archery_g01_c01.avi\r\n"
                          "HandstandPushups/v_HandStandPushups_g01_c01.avi\r\n",
    "ucf/trainlist02.txt": "Archery/v_Archery_g01_c01.avi 1\n",
    "ucf/testlist02.txt": "Archery/v_Archery_g08_c01.avi\nPullUps/v_PullUps_g08_c01.avi\n",
    "h/brush_hair_test_split1.txt": "#1 Brush_(a).avi 1 \nb.avi 2 \nc.avi 0 \n",
    "h/brush_hair_test_split2.txt": "#1 Brush_(a).avi 2 \nb.avi 1 \nc.avi 1\n",
    "h/wave_test_split1.txt": "d.avi 2\n", "h/wave_test_split2.txt": "d.avi 2\n",
    "k400/train.csv": "label,youtube_id,time_start,time_end,split\n"
                      "air drumming,-3CAKEaaaaa,4,14,train\n"
                      '"petting animal (not cat)",a_Baaaaaaaa,100,110,train\n',
    "k400/validate.csv": "label,youtube_id,time_start,time_end,split,is_cc\n"
                         "air drumming,-3cakeaaaaa,4.0,14.0,validate,0\n",
    "k400/test.csv": "youtube_id,time_start,time_end\nx,1,2\n",  # it has no labels: not read
    "ssv2/train.json": json.dumps(SSV2[:2]), "ssv2/validation.json": json.dumps(SSV2[2:]),
    "ssv2/labels.json": json.dumps(NUMBERS), "ssv2/test.json": '[{"id": "1"}]',
    "ssv2_2018/something-something-v2-train.json": json.dumps(SSV2[:2]),
    "ssv2_2018/something-something-v2-validation.json": json.dumps(SSV2[2:]),
    "ssv2_2018/something-something-v2-labels.json": json.dumps(NUMBERS),
    "diving/Diving48_V2_train.json": json.dumps(
        [{"vid_name": "W_00003", "label": 1, "start_frame": 0, "end_frame": 158}]),
    "diving/Diving48_V2_test.json": json.dumps(
        [{"vid_name": "_8V_00000", "label": 0, "start_frame": 0, "end_frame": 80}]),
    "diving/Diving48_train.json": "[]",
    "diving/Diving48_vocab.json": json.dumps(
        [["Back", "15som", "05Twis", "FREE"], ["Forward", "NoTwis", "PIKE"]]),
    "jester/jester-v1-train.csv": "34870;Drumming Fingers\n56557;Sliding Two Fingers Right\n",
    "jester/jester-v1-validation.csv": "9;Drumming Fingers\n",
    "jester/jester-v1-test.csv": "1\n2\n",
    "jester/jester-v1-labels.csv": "Sliding Two Fingers Right\nNo gesture\nDrumming Fingers\n",
    "c/train.csv": "path,label\n/x/Archery/a 1.mp4,7\n/x/b,3\n", "c/val.csv": "c.mp4,3\n",
    "c/names.csv": 'id,name\n7,"Archery, aiming"\n3,Clap\n',
    "c/train_names.csv": 'a 1,"Archery, aiming"\nb,Clap\n', "c/test_names.csv": "c.mp4;Clap\n",
    "c/train.txt": "/x/y/a_1.mp4 7\nb.mp4 3\n", "c/test.txt": "c.mp4 3\n",
    "c/train5.txt": "Turn, then/a_1 0\nClap, twice/b;Clap, twice\n",
    "c/test5.txt": "y, z/c.mp4, 1\n", "c/names.json": '["AirDrum", "Clap, twice"]',
    "c/train4.txt": "y/a 1 0 120 7\ny/b 90 3\n", "c/test4.txt": "y/c 0 300 3\n"}

UCF_CLIPS = ["Archery/v_Archery_g01_c01", "Archery/v_Archery_g08_c01.avi",
             "HandstandPushups/v_HandstandPushups_g01_c01", "PullUps/v_PullUps_g08_c01"]
HMDB_CLIPS = ["brush_hair/#1 Brush_(a)", "brush_hair/b", "brush_hair/c", "wave/d"]
K400_CLIPS = ["air_drumming/-3CAKEaaaaa_000004_000014.mp4",
              "air_drumming/-3cakeaaaaa_000004_000014",
              "petting_animal_not_cat/a_Baaaaaaaa_000100_000110"]
SSV2_CLIPS = ["x/78687", "x/42.webm", "x/7"]
SSV2_NAMES = {0: "Holding something next to something", 1: "Moving something up",
              2: "Trying to pour something into something, but missing"}
SSV2_SPLITS = {"train": {0: 0, 1: 2}, "test": {2: 1}}
CSV_NAMES, CSV_SPLITS = {3: "Clap", 7: "Archery, aiming"}, {"train": {0: 7, 1: 3}, "test": {2: 3}}
CASES = {  # arguments, clips below FRAMES, names, {split: {position of a clip: number}}
    "ucf101": ("ucf", UCF_CLIPS, {1: "Archery", 2: "HandstandPushups", 3: "PullUps"},
               {"train1": {1: 1, 3: 3}, "test1": {0: 1, 2: 2}, "train2": {0: 1},
                "test2": {1: 1, 3: 3}}),
    "hmdb51": ("h", HMDB_CLIPS, {0: "brush_hair", 1: "wave"},
               {"train1": {0: 0}, "test1": {1: 0, 3: 1}, "train2": {1: 0, 2: 0},
                "test2": {0: 0, 3: 1}}),
    "kinetics": ("k400", K400_CLIPS, {0: "air drumming", 1: "petting animal (not cat)"},
                 {"train": {0: 0, 2: 1}, "test": {1: 0}}),
    "ssv2": ("ssv2", SSV2_CLIPS, SSV2_NAMES, SSV2_SPLITS),
    "ssv2 2018": ("ssv2_2018", SSV2_CLIPS, SSV2_NAMES, SSV2_SPLITS),
    "diving48": ("diving", ["x/W_00003.mp4", "x/_8V_00000"],
                 {0: "Back 15som 05Twis FREE", 1: "Forward NoTwis PIKE"},
                 {"train": {0: 1}, "test": {1: 0}}),
    "jester": ("jester", ["x/34870", "x/56557", "x/9"],
               {0: "Sliding Two Fingers Right", 1: "No gesture", 2: "Drumming Fingers"},
               {"train": {0: 2, 1: 0}, "test": {2: 2}}),
    "csv": ("c/train.csv c/val.csv --labels c/names.csv", ["x/a 1", "x/b", "x/c"], CSV_NAMES,
            CSV_SPLITS),
    "csv blanks": ("c/train.txt c/test.txt --labels c/names.csv", ["x/a_1", "x/b", "x/c"],
                   CSV_NAMES, CSV_SPLITS),
    "csv of four columns": ("c/train4.txt c/test4.txt --labels c/names.csv",
                            ["x/a 1", "x/b", "x/c"], CSV_NAMES, CSV_SPLITS),
    "csv commas in paths": ("c/train5.txt c/test5.txt --labels c/names.json",
                            ["x/a_1", "x/b", "x/c"], {0: "AirDrum", 1: "Clap, twice"},
                            {"train": {0: 0, 1: 1}, "test": {2: 1}}),
    "csv names": ("c/train_names.csv c/test_names.csv", ["x/a 1", "x/b", "x/c"],
                  {0: "Archery, aiming", 1: "Clap"}, {"train": {0: 0, 1: 1}, "test": {2: 1}}),
    "csv names and labels": ("c/train_names.csv --labels c/names.csv", ["x/a 1", "x/b", "x/c"],
                             CSV_NAMES, {"train": {0: 7, 1: 3}})}


def write_files(folder, files=FILES):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\ufeff" + text, encoding="utf-8", newline="")


def read_labels_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["id", "name"]
    return {int(number): name for number, name in rows}


@pytest.mark.parametrize("layout", ["classes", "flat", "train and val"])
@pytest.mark.parametrize("case", CASES)
def test_lists_of_every_data_set(tmp_path, monkeypatch, capsys, layout, case):
    arguments, clips, names, splits = CASES[case]
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    if layout == "flat" or clips[0].startswith("x/"):
        clips = [clip.split("/")[1] for clip in clips]
    if layout == "train and val":
        clips = [f"{'val' if i % 2 else 'train'}/{clip}" for i, clip in enumerate(clips)]
    for clip in clips:
        save_frames(tmp_path / "my frames" / clip, 1)
    lists.main([case.split()[0], *arguments.split(), "--frames", "my frames", "--out", "out/lists"])
    out = tmp_path / "out/lists"
    assert {path.name for path in out.iterdir()} == {"labels.csv", *(f"{s}.txt" for s in splits)}
    assert read_labels_csv(out / "labels.csv") == names
    for split, expected in splits.items():
        lines = (out / f"{split}.txt").read_text().splitlines()
        assert lines == [f"{clips[i]} {number}" for i, number in expected.items()]

    # the command that is printed, and the lists of every other split, are what train.py reads
    *counts, command = capsys.readouterr().out.splitlines()
    assert len(counts) == len(splits)
    for line, (split, expected) in zip(counts, splits.items()):
        assert line == (f"out/lists/{split}.txt: {len(expected)} clips of "
                        f"{len(set(expected.values()))} classes")
    python, program, *flags = shlex.split(command)
    args = train.parser().parse_args(flags)
    assert (python, program, args.data) == ("python", "train.py", "my frames")
    assert {Path(path or "").stem.rstrip("1") for path in (args.train_list, args.test_list)} <= {
        "train", "test", ""}
    paths = [path and str(path) for path in (args.train_list, args.test_list, args.labels)]
    read = data.index_frames(args.data, *paths)
    for split, path in zip(read, paths):
        expected = splits[Path(path).stem] if path else {}
        assert [split.classes[k] for _, k in split.clips] == [names[n] for n in expected.values()]
        assert [clip for clip, _ in split.clips] == [clips[i] for i in expected]
    for split, expected in splits.items():
        again, _ = data.index_frames(args.data, f"out/lists/{split}.txt", None, paths[2])
        assert [clip for clip, _ in again.clips] == [clips[i] for i in expected]


def test_kinetics_clips_under_other_names(tmp_path):
    ids = {"onlybyitsid": "onlybyitsid", "unpaddedtim": "unpaddedtim_4_14.mp4", "twounpadded":
           "twounpadded_4_14", "othertimes_": "othertimes__000005_000015", "Case_Aaaaaa": "Case_Aaaaaa_000004_000014",
           "twoclips_aa": "twoclips_aa_000004_000014"}
    rows = [f"x,{id},4,14\n" for id in ids]
    header = "label,youtube_id,time_start,time_end\n"
    write_files(tmp_path, {"train.csv": header + "".join(rows), "val.csv": header + rows[0]})
    for name in (*ids.values(), "twoclips_aa_000020_000030", "twounpadded_20_30", "case_aaaaaa_000004_000014"):
        save_frames(tmp_path / "frames" / name, 1)
    command = ["kinetics", str(tmp_path), "--frames", str(tmp_path / "frames"), "--out",
               str(tmp_path / "out")]
    lists.main(command)
    lines = (tmp_path / "out/train.txt").read_text().splitlines()
    assert lines == [f"{name} 0" for name in ids.values()]
    save_frames(tmp_path / "frames/othertimes__000006_000016", 1)
    with pytest.raises(ValueError, match="train.csv:5: othertimes__000004_000014 fits all of "
                       "othertimes__000005_000015, othertimes__000006_000016"):
        lists.main(command)


JESTER = {"t-train.csv": "1;Clap\n", "t-validation.csv": "2;Clap\n", "t-labels.csv": "Clap\n"}
HEADER = "label,youtube_id,time_start,time_end\n"
SSV2_FILES = {"train.json": '[{"id": "1", "template": "Clap"}]',
              "validation.json": '[{"id": "2", "template": "Clap"}]',
              "labels.json": '{"Clap": "0"}'}


@pytest.mark.parametrize("dataset, files, word", [
    ("ucf101", {"trainlist01.txt": "1 2\n"}, "{at}/trainlist01.txt:1: expected <class>/<clip>"),
    ("ucf101", {}, "{at}: holds no trainlist01.txt"),
    ("ucf101", {"trainlist01.txt": "x/1 1\n"}, "{at}: holds no testlist01.txt"),
    ("ucf101", {"trainlist01.txt": "x/1 1\n", "testlist01.txt": "x/2\n"}, "holds no classInd.txt"),
    ("ucf101", {"trainlist01.txt": "x/1 2\n", "testlist01.txt": "x/2\n", "classInd.txt": "1 x\n"},
     "{at}/trainlist01.txt:1: label 2 has no name"),
    ("hmdb51", {}, r"{at}: holds no \?\*_test_split1.txt"),
    ("hmdb51", {"x_test_split1.txt": "1.avi 1\n\n2.avi 3\n"}, "{at}/x_test_split1.txt:3: expected"),
    ("hmdb51", {"x_test_split1.txt": "1.avi 1\n"}, "x_test_split1.txt: names no clips"),
    ("kinetics", {}, r"{at}: holds no train.csv or \*train.csv"),
    ("kinetics", {"train.csv": HEADER + "x,1,2\n"}, "{at}/train.csv:2: expected label,youtube"),
    ("kinetics", {"train.csv": HEADER + "x,1,2,3\nx,y,z,3\n"}, "{at}/train.csv:3: expected label"),
    ("kinetics", {"train.csv": "youtube_id,time_start,time_end\nx,1,2\n"}, "train.csv:2: expected"),
    ("kinetics", {"k_train.csv": HEADER, "k2_train.csv": HEADER}, "k_train.csv: is a train list, "
     "and so is {at}/k2_train.csv"),
    ("ssv2", {"train.json": '[{"id": 1,\n "tem'}, "{at}/train.json:2: Unterminated"),
    ("ssv2", {"train.json": '[{"id": 1, "template": "x"}, {"id": 2}]'}, "{at}/train.json:2: is no"),
    ("ssv2", {**SSV2_FILES, "train.json": '[{"id": "1", "template": "Wave"}]'},
     "{at}/train.json:1: label Wave has no name"),
    ("ssv2", {**SSV2_FILES, "labels.json": '{"Clap": "x"}'}, "{at}/labels.json: holds no names"),
    ("diving48", {"Diving48_train.json": "[]"}, r"{at}: holds no \*V2_train.json"),
    ("diving48", {"Diving48_V2_train.json": '{"a": 1}'}, "Diving48_V2_train.json:1: is no entry"),
    ("jester", {**JESTER, "t-train.csv": "1;Clap\n2\n"}, "{at}/t-train.csv:2: expected path label"),
    ("jester", {**JESTER, "t-train.csv": "1;Clap\n2;\n"}, "t-train.csv:2: expected path;label"),
    ("jester", {**JESTER, "t-train.csv": "1;Wave\n"}, "{at}/t-train.csv:1: label Wave has no name"),
    ("jester", {**JESTER, "t-train.csv": "1;Clap\n3;Clap\n"}, "{at}/t-train.csv: 1 of 2 clips have "
     "no folder: 3; --allow-missing"),
    ("jester", {**JESTER, "t-train.csv": "x/1;Clap\ny/1;Clap\n"}, "{at}/t-train.csv:2: 1 would be "
     "y/1 of Clap, and was x/1 of Clap"),
    ("jester", {**JESTER, "t-labels.csv": "Clap\nClap\n"}, "{at}/t-labels.csv:2: .*second time"),
    ("jester", {**JESTER, "t-labels.csv": "Clap\nWave\n", "t-train.csv": "1;Clap\n1;Wave\n"},
     "{at}/t-train.csv:2: 1 would be 1 of Wave, and was 1 of Clap"),
    ("jester", {**JESTER, "t-train.csv": "1;\u00e9".encode("latin-1")}, "csv: is not UTF-8"),
    ("csv", {"mine.csv": "1,Clap\n"}, "{at}/mine.csv: the name of a list has train in it"),
    ("csv", {"train.csv": "1,0\n"}, "{at}/train.csv:1: label 0 has no name"),
    ("csv", {"train.csv": "1,clap\n", "names.csv": "0,Clap\n1,CLAP\n"},
     "{at}/train.csv:1: clap may stand for Clap or for CLAP"),
    ("csv", {"train.txt": "1 0 9 0\n2 5 9 0\n"}, "train.txt:2: 2 begins at frame 5: parts"),
    ("csv", {"train.csv": "1,Clap,x\n"}, "{at}/train.csv:1: expected path,label, not '1,Clap,x'")])
def test_broken_lists_are_named(tmp_path, capsys, dataset, files, word):
    at = tmp_path / "lists"
    at.mkdir()
    for name, text in files.items():
        (at / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    for clip in "12":
        save_frames(tmp_path / "frames" / clip)
    given = [str(at)]
    if dataset == "csv":
        given = [str(at / name) for name in files if name != "names.csv"]
    if "names.csv" in files:
        given += ["--labels", str(at / "names.csv")]
    with pytest.raises(SystemExit) as error:
        data.command(lambda: lists.main([dataset, *given, "--frames", str(tmp_path / "frames"),
                                         "--out", str(tmp_path / "out")]))
    said = capsys.readouterr().err
    assert error.value.code == 2 and said.count("\n") == 1 and not (tmp_path / "out").exists()
    assert re.search(word.format(at=re.escape(str(at))), said), said


def test_clips_that_fit_several_folders_or_are_missing(tmp_path, capsys):
    at = tmp_path / "train.csv"
    at.write_text("".join(f"gone{i}.mp4,Clap\n" for i in range(12)) + "a.mp4,Wave\n")
    save_frames(tmp_path / "frames/Clap/b")
    save_frames(tmp_path / "frames/Wave/a")
    command = ["csv", str(at), "--frames", str(tmp_path / "frames"), "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=f"{at}: 12 of 13 clips .*gone9.mp4, [.]{{3}}; --allow"):
        lists.main(command)
    assert not (tmp_path / "out").exists()
    lists.main([*command, "--allow-missing"])
    said = capsys.readouterr()
    assert (tmp_path / "out/train.txt").read_text() == "Wave/a 1\n" and "12 of 13" in said.err
    assert read_labels_csv(tmp_path / "out/labels.csv") == {0: "Clap", 1: "Wave"}
    save_frames(tmp_path / "frames/Clap/a")
    with pytest.raises(ValueError, match=f"{at}:13: a.mp4 fits all of Clap/a, Wave/a"):
        lists.main([*command, "--allow-missing"])
    with pytest.raises(ValueError, match="no such folder"):
        lists.main([*command[:3], str(tmp_path / "none"), *command[4:]])


# ---- reid.py ----

def test_retrieval_by_hand():
    gallery = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.5, 0.5], [0.0, 1.0], [-1.0, 0.0]])
    labels = torch.tensor([7, 3, 7, 3, 7])  # found at ranks 1, 3, 5, and by the other at 1, 3
    scores = reid.retrieval_scores(torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([7, 3]),
                                   gallery, labels)
    precision = (1 + 2 / 3 + 3 / 5) / 3, (1 + 2 / 3) / 2
    assert scores == pytest.approx(dict(rank1=1.0, rank5=1.0, mAP=sum(precision) / 2, n=2,
                                        left_out=0))
    expected = pytest.approx(dict(rank1=0.0, rank5=1.0, mAP=(1 / 2 + 2 / 4) / 2, n=1, left_out=1))
    assert reid.retrieval_scores(gallery[:2], torch.tensor([3, 9]), gallery, labels) == expected
    exclude = torch.tensor([[True, True, False, False, False]])  # what is left: 7 3 7
    scores = reid.retrieval_scores(gallery[:1], torch.tensor([3]), gallery, labels, exclude)
    assert scores == pytest.approx(dict(rank1=0.0, rank5=1.0, mAP=1 / 2, n=1, left_out=0))
    with pytest.raises(ValueError, match="no query has a match"):
        reid.retrieval_scores(gallery[:1], torch.tensor([9]), gallery, labels)


@pytest.mark.parametrize("seed", range(20))
def test_retrieval_equals_the_evaluation_of_ccvid(seed):
    """The published evaluation, query by query, with ties and with queries left out."""
    rng = np.random.default_rng(seed)
    Q, G = rng.integers(1, 12), rng.integers(1, 30)
    directions = rng.normal(size=(4, 6))  # so few that features are equal again and again
    person, camera, clothes = rng.integers(0, (3, 3, 2), (Q + G, 3)).T
    features = directions[rng.integers(0, 4, Q + G)]
    cosine = features / np.linalg.norm(features, axis=1, keepdims=True)
    ranks1, ranks5, precisions = [], [], []
    same = person[:Q, None] == person[Q:]
    away = camera[:Q, None] == camera[Q:]
    if seed % 2:
        away |= clothes[:Q, None] == clothes[Q:]
    for q in range(Q):
        junk = {g for g in range(G) if same[q, g] and away[q, g]}
        good = {g for g in range(G) if same[q, g]} - junk
        if not good:
            continue
        similar = torch.tensor(cosine[q], dtype=torch.float32) @ torch.tensor(
            cosine[Q:], dtype=torch.float32).T
        order = sorted(range(G), key=lambda g: -round(similar[g].item(), 5))  # stable
        order = [g for g in order if g not in junk]
        places = [place for place, g in enumerate(order, 1) if g in good]
        ranks1.append(places[0] <= 1)
        ranks5.append(places[0] <= 5)
        precisions.append(sum(i / place for i, place in enumerate(places, 1)) / len(places))
    arguments = (torch.tensor(features[:Q]), torch.tensor(person[:Q]), torch.tensor(features[Q:]),
                 torch.tensor(person[Q:]), torch.tensor(same & away))
    if not ranks1:
        with pytest.raises(ValueError, match="no query has a match"):
            reid.retrieval_scores(*arguments)
        return
    assert reid.retrieval_scores(*arguments) == pytest.approx(dict(
        rank1=np.mean(ranks1), rank5=np.mean(ranks5), mAP=np.mean(precisions), n=len(ranks1),
        left_out=Q - len(ranks1)))


@pytest.mark.parametrize("count", [1, 7, 8, 9, 31, 32, 33, 75, 108])
def test_tracklets_are_cut_into_clips(count):
    clips = [clip.tolist() for clip in reid.cut(count, 8)]
    expected, start = [], 0
    for _ in range(count // 32):  # a clip at each of four phases of 32 frames
        expected += [list(range(start + k, start + 32, 4)) for k in range(4)]
        start += 32
    stride = count % 32 // 8
    expected += [[start + k + i * stride for i in range(8)] for k in range(stride)]
    rest = list(range(count // 8 * 8, count))
    if rest:
        expected.append((8 * rest)[:8])
    assert clips == expected
    assert {i for clip in clips for i in clip} == set(range(count))


def save_clip(path):
    """A small CLIP with random weights, as OpenAI's state dicts are."""
    torch.manual_seed(0)
    config = Config(embed_dim=32, image_size=32, patch_size=8, vision_width=128, vision_layers=2,
                    context_length=77, vocab_size=49408, text_width=64, text_layers=2,
                    prompts="none", adapters=False, num_frames=2)
    torch.save(EZCLIP(config).state_dict(), path)


def test_retrieval_over_class_folders(tmp_path, capsys):
    root = tmp_path / "frames"  # 10 clips of each class: 2 for testing, a query and the gallery
    for value, name in enumerate(("p01", "p02", "p03")):
        for k in range(10):
            save_frames(root / name / f"clip{k}", 3, value=120 * value + 5)
    save_clip(tmp_path / "clip.pt")
    command = ["--data", str(root), "--clip", str(tmp_path / "clip.pt"), "--num-frames", "2",
               "--workers", "0", "--device", "cpu", "--batch-size", "4"]
    reid.main(command)
    said = capsys.readouterr().out
    assert "plain CLIP" in said and "rank1 100.0 %, rank5 100.0 %, mAP 100.0 %, n = 3\n" in said
    reid.main([*command, "--json"])
    content = json.loads(capsys.readouterr().out)
    scores, = content["results"].values()
    assert scores == dict(rank1=1, rank5=1, mAP=1, n=3, left_out=0) and content["prompts"] == "none"

    # the features are those of encode_video, whatever the batches are
    args = train.parser().parse_args([*command, "--eval-only"])
    model = train.build_model(args)
    _, test = data.index_frames(root)
    with torch.no_grad():
        clips = torch.stack([data.load_clip(root / clip, 2, 32) for clip, _ in test.clips])
        expected = model.encode_video(clips)
    features, numbers = reid.encode(model, data.Clips(test, 2, 32), args)
    near(features, expected)
    assert numbers.tolist() == list(range(len(test.clips)))


def test_retrieval_leaves_out_what_has_no_match(tmp_path, capsys):
    save_clip(tmp_path / "clip.pt")
    for clip in ("a/1", "a/2", "a/3", "b/1", "b/2"):  # in test a1 (query), b1 (gallery)
        save_frames(tmp_path / "few" / clip, 2)
    command = ["--clip", str(tmp_path / "clip.pt"), "--num-frames", "2", "--workers", "0"]
    with pytest.raises(ValueError, match="few: no class has two test clips"):
        reid.main(["--data", str(tmp_path / "few"), *command])
    for clip in ("train/a/1", "val/a/1", "val/a/2", "val/b/1"):
        save_frames(tmp_path / "more" / clip, 2)
    (tmp_path / "more/train.txt").write_text("train/a/1 0\n")  # a plain list beside the folders
    reid.main(["--data", str(tmp_path / "more"), *command])
    said = capsys.readouterr().out
    assert "1 queries without a match in the gallery are left out" in said and "n = 1\n" in said


CCVID = {  # folder, person, clothes: cameras are 1 and 2, and 13 in session 3
    "train.txt": ["session1/001_01 001 u1_l0", "session3/001_01 001 u2_l0",
                  "session1/002_01 002 u1_l0", "session2/002_03 002 u1_l0"],
    "query.txt": ["session1/003_01 003 u0_l0", "session1/004_02 004 u0_l0"],
    "gallery.txt": ["session2/003_01 003 u7_l0", "session1/003_02 003 u0_l0",
                    "session3/003_01 003 u1_l0", "session2/004_01 004 u0_l0"]}


def make_ccvid(root, lists=CCVID):
    """Frames of as many kinds of grey as there are tracklets, 2 to 41 of them."""
    for k, line in enumerate(sum(CCVID.values(), [])):
        save_frames(root / line.split()[0], 2 + 39 * k // 9, value=25 * k, name="{:05d}.jpg")
    for name, lines in lists.items():
        (root / name).write_text("".join(line.replace(" ", "\t") + "\r\n" for line in lines))
    save_clip(root / "clip.pt")
    return ["--data", root, "--workers", "0", "--device", "cpu", "--batch-size", "2"]


def test_persons_are_trained_and_searched(tmp_path, capsys):
    root, out = tmp_path / "CCVID", tmp_path / "run"
    command = [*map(str, make_ccvid(root))]
    reid.main([*command, "--clip", str(root / "clip.pt"), "--num-frames", "2", "--train", "--out",
               str(out), "--epochs", "2"])
    said = capsys.readouterr().out
    assert "4 clips of 2 classes" in said and (out / "last.pt").exists()
    assert re.search(r"\ngeneral: rank1 .* n = 2\nclothes-changing: .* n = 1\n1 queries", said)
    saved = ezclip.read_weights(out / "last.pt")
    assert saved["classes"] == ["001", "002"] and saved["args"]["templates"] == [
        "a video of person {}"]
    results = json.loads((out / "results.json").read_text())
    reid.main([*command, "--checkpoint", str(out / "last.pt"), "--json"])
    content = json.loads(capsys.readouterr().out)
    assert content["results"] == results["results"] and results["trainable"] > 0

    # by hand: mean features of clips, and what leaves the ranking of the first query, of person 3
    model, means = EZCLIP.from_pretrained(out / "last.pt"), []
    for line in CCVID["query.txt"] + CCVID["gallery.txt"]:
        folder = root / line.split()[0]
        names = data.frame_names(folder)
        frames = torch.stack([data.read_frame(folder / name, 32) for name in names])
        with torch.no_grad():
            clips = [model.encode_video(frames[cut][None]) for cut in reid.cut(len(names), 2)]
        means.append(torch.cat(clips).mean(0))
    similar = torch.cosine_similarity(means[0], torch.stack(means[2:]), -1)
    general, changing = content["results"].values()
    # general: its own camera 1 leaves the gallery, so 1 and 2 of [1, 2, 3] are right
    ranks = similar[1:].argsort(descending=True).argsort()[:2].sort().values + 1
    first = (1 / ranks[0] + 2 / ranks[1]) / 2
    rank = (torch.cosine_similarity(means[1], torch.stack(means[2:]), -1)
            .argsort(descending=True).argsort()[3] + 1)
    assert general["mAP"] == pytest.approx(((first + 1 / rank) / 2).item())
    # clothes-changing: the tracklet in the same clothes leaves it too
    rank = similar[2:].argsort(descending=True).argsort()[0] + 1
    assert changing["mAP"] == pytest.approx((1 / rank).item())
    assert (general["n"], general["left_out"], changing["n"], changing["left_out"]) == (2, 0, 1, 1)


def test_persons_are_trained_in_all_ways(tmp_path, capsys):
    root = tmp_path / "CCVID"
    command = [*map(str, make_ccvid(root)), "--clip", str(root / "clip.pt"), "--num-frames", "2",
               "--train", "--epochs", "1"]
    for flags in ([], ["--tune", "all"], ["--tune", "all", "--prompts", "none", "--no-adapters"],
                  ["--prompts", "none", "--temporal-adapter"]):
        out = tmp_path / "-".join(["run", *flags])
        reid.main([*command, *flags, "--out", str(out)])
        assert json.loads((out / "results.json").read_text())["results"]["general"]["n"] == 2
    capsys.readouterr()
    reid.main([*command, "--out", str(tmp_path / "run"), "--resume", "--json"])
    assert json.loads(capsys.readouterr().out)["results"]["general"]["n"] == 2
    two = [*command, "--out", str(tmp_path / "two")]
    assert in_processes(2, reid.main, two) == [0, 0]
    assert json.loads((tmp_path / "two/results.json").read_text())["results"]["general"]["n"] == 2
    (root / "query.txt").unlink()
    with pytest.raises(FileNotFoundError, match="query.txt"):
        reid.main(command[:2])


@pytest.mark.parametrize("name, line, word", [
    ("query.txt", "session1/003_01 003", "query.txt:1: expected session1/<person>_<walk>"),
    ("query.txt", "session1/003 003 u", "query.txt:1: expected"),
    ("gallery.txt", "session1/009_01 009 u", "gallery.txt:1: "),
    ("gallery.txt", "session1/005_01 005 u", "session1/005_01: holds no frames"),
    ("gallery.txt", "", "gallery.txt: holds no tracklets"),
    ("gallery.txt", "session1/001_01 001 u", "no query has a match"),
    ("query.txt", "session1/003_01 003 u\nsession1/003_01 003 v", "query.txt:2: session1/003_01 is"),
    ("train.txt", "001_01 001 u", "train.txt:1: expected")])
def test_persons_that_cannot_be_searched(name, line, word, tmp_path):
    command = make_ccvid(tmp_path, {**CCVID, name: [line]})
    if name == "train.txt":
        command += ["--train", "--out", tmp_path / "run"]
    (tmp_path / "session1/005_01").mkdir()
    fails(reid, [*command, "--clip", tmp_path / "clip.pt", "--num-frames", "2"], word)
    assert not (tmp_path / "run").exists()
    fails(reid, [*command[:2], "--labels", "a.csv"], "has lists of its own")
    fails(reid, [*command[:2], "--train", "--eval-only"], "do not go together")
    fails(reid, [*command[:2], "--resume"], "go with --train")


# ---- protocols.py ----

@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """`frames` on disk, a small `clip`, and the flags `common` to a run of a second."""
    folder = tmp_path_factory.mktemp("seeds")
    frames = str(frames_folder(folder / "frames", ("Archery", "BabyCrawling", "Clap"), clips=10))
    torch.manual_seed(0)
    model = EZCLIP(Config(embed_dim=32, image_size=32, patch_size=8, vision_width=64,
                          vision_layers=2, text_width=64, text_layers=2, prompts="none",
                          adapters=False))
    clip = str(folder / "clip.pt")
    torch.save(model.state_dict(), clip)
    start = ["--clip", clip, "--num-frames", "4", "--templates", "{}", "doing {}", "--epochs", "1",
             "--batch-size", "8", "--lr", "1e-3", "--no-augment", "--workers", "0",
             "--device", "cpu"]
    return SimpleNamespace(frames=frames, clip=clip, common=["--data", frames, *start], start=start)


def saved(out, *folders):
    return json.loads(Path(out, *folders, "results.json").read_text())


def test_shots_are_balanced_seeded_and_nested(tmp_path):
    root = frames_folder(tmp_path / "frames", clips=25, count=1)
    split, _ = data.index_frames(root)
    chosen = {}
    for seed in (0, 1):
        for count in (2, 4, 16):
            part = protocols.shots(split, count, seed)
            labels = [k for _, k in part.clips]
            assert labels.count(0) == labels.count(1) == count and part.classes == split.classes
            assert part.source == f"{count} shots of {split.source}"
            backwards = split._replace(clips=split.clips[::-1])
            assert protocols.shots(backwards, count, seed).clips == part.clips[::-1]
            chosen[count, seed] = {clip for clip, _ in part.clips}
        assert chosen[2, seed] < chosen[4, seed] < chosen[16, seed] < {c for c, _ in split.clips}
    assert chosen[4, 0] != chosen[4, 1]
    # the draw of a seed is part of what a paper reports: it stays what it is
    assert chosen[2, 0] == {f"{name}/clip{k}" for name in split.classes for k in (16, 17)}
    assert protocols.shots(split, 20, 0).clips == protocols.shots(split, 0, 0).clips == split.clips
    with pytest.raises(ValueError, match="Archery has 20 training clips.* 21 shots"):
        protocols.shots(split, 21, 0)


def test_the_base_classes_are_the_frequent_half(tmp_path):
    counts = {"A": 1, "B": 9, "C": 3, "D": 2, "E": 9}
    clips = [(f"{name}/{i}", k) for k, name in enumerate(counts) for i in range(counts[name])]
    split = data.Split(Path("frames"), [*counts], clips, "all")
    assert [set(half) for half in protocols.halves(split)] == [set("BCE"), set("AD")]
    ties = split._replace(clips=[("x", 1), ("y", 3), ("z", 4), ("w", 0)])
    assert [set(half) for half in protocols.halves(ties)] == [set("ABD"), set("CE")]
    part = protocols.only(split, ["D", "A"])
    assert part.classes == ["A", "D"] and part.clips == [("A/0", 0), ("D/0", 1), ("D/1", 1)]
    base, novel = tmp_path / "base", tmp_path / "novel"
    base.write_text("e\nD\n")
    novel.write_text("0,c\n1,B\n")
    assert protocols.halves(split, [base, novel]) == (["E", "D"], ["C", "B"])
    for names, word in (("D\nZ\n", "base: Z is not in frames"), ("d\nC\n", "novel: c was there")):
        base.write_text(names)
        with pytest.raises(ValueError, match=word):
            protocols.halves(split, [base, novel])


def test_base_to_novel_over_seeds(seeds, tmp_path, capsys):
    out = tmp_path / "runs"
    flags = ["base-to-novel", *seeds.common, "--shots", "3", "--seed", "4", "7", "--out", str(out)]
    content = protocols.main(flags)
    assert saved(out) == content and content["seed"] == [4, 7]
    said = capsys.readouterr().out
    assert "training " in said and "6 clips of 2 classes" in said
    row = content["results"]["base-to-novel"]
    runs = [saved(out, f"seed{seed}")["results"] for seed in (4, 7)]
    for run in runs:
        assert [run[name]["n"] for name in run] == [4, 2] and run["base"]["classes"] == 2
        base, novel = run["base"]["top1"], run["novel"]["top1"]
        run["harmonic_mean"] = {"top1": round(2 * base * novel / (base + novel or 1), 2), "n": 6}
    cells = []
    for name in ("base", "novel", "harmonic_mean"):
        top1 = [run[name]["top1"] for run in runs]
        assert row[name]["top1"] == round(statistics.mean(top1), 2) and row[name]["runs"] == 2
        assert row[name]["top1_std"] == round(statistics.stdev(top1), 2)
        assert row[name]["n"] == runs[0][name]["n"]
        cells.append(f"{row[name]['top1']:.1f} ± {row[name]['top1_std']:.1f}")
    assert "\n| top-1 (%) | base, n = 4 | novel, n = 2 | harmonic_mean, n = 6 |\n|---|---" in said
    assert f"| base-to-novel | {' | '.join(cells)} |" in said

    # of finished runs none is trained again, one that is missing is, and then all is as before
    weights = {seed: (out / f"seed{seed}/last.pt") for seed in (4, 7)}
    learnt = {seed: ezclip.read_weights(path)["state_dict"] for seed, path in weights.items()}
    before = weights[4].stat().st_mtime_ns
    shutil.rmtree(out / "seed7")
    (out / "results.json").unlink()
    assert protocols.main([*flags, "--resume"])["results"] == content["results"]
    assert weights[4].stat().st_mtime_ns == before
    again = ezclip.read_weights(weights[7])["state_dict"]
    assert all(torch.equal(value, again[name]) for name, value in learnt[7].items())
    assert any(not torch.equal(value, learnt[4][name]) for name, value in learnt[7].items())

    # each seed is evaluated with its own checkpoint, on classes that two files name
    (tmp_path / "base").write_text("clap\n")
    (tmp_path / "novel").write_text("Baby crawling\n")
    evaluate = ["base-to-novel", *seeds.common, "--eval-only", "--seed", "4", "7", "--shots", "0",
                "--classes", str(tmp_path / "base"), str(tmp_path / "novel"),
                "--checkpoint", str(out / "seed{}/last.pt"), "--out", str(tmp_path / "eval")]
    row = protocols.main(evaluate)["results"]["base-to-novel"]
    assert row["base"]["n"] == row["novel"]["n"] == 2 and row["base"]["top1"] == 100
    assert not list((tmp_path / "eval").rglob("last.pt"))


def test_few_shot(seeds, tmp_path, capsys):
    """On the lists that lists.py writes, with more shots when it goes on."""
    frames, out = Path(seeds.frames), tmp_path / "runs"
    for name, numbers in (("train", range(6)), ("test", range(6, 10))):
        rows = [f"{label}/clip{k},{label}" for label in ("Archery", "Clap") for k in numbers]
        (tmp_path / f"{name}.csv").write_text("\n".join(rows))
    lists.main(["csv", str(tmp_path / "train.csv"), str(tmp_path / "test.csv"), "--frames",
                str(frames), "--out", str(tmp_path / "lists")])
    flags = ["few-shot", *seeds.common, "--out", str(out)]
    for flag, name in (("train-list", "train.txt"), ("test-list", "test.txt"),
                       ("labels", "labels.csv")):
        flags += [f"--{flag}", str(tmp_path / "lists" / name)]
    content = protocols.main([*flags, "--shots", "2"])
    assert list(content["results"]) == ["2 shots"]
    result = content["results"]["2 shots"]["frames"]
    assert result["n"] == 8 and result["runs"] == 1 and "top1_std" not in result
    assert result["top1"] == saved(out, "seed0/shots2")["results"]["frames"]["top1"]
    more = protocols.main([*flags, "--shots", "2", "4", "--resume"])["results"]
    assert list(more) == ["2 shots", "4 shots"] and more["2 shots"] == content["results"]["2 shots"]
    said = capsys.readouterr().out
    assert "4 clips of 2 classes" in said and "8 clips of 2 classes" in said
    assert f"| 4 shots | {more['4 shots']['frames']['top1']:.1f} |" in said
    fails(protocols, [*flags, "--shots", "7", "--out", tmp_path / "no"], "7 shots")


def test_protocols_in_processes(seeds, tmp_path):
    flags = ["base-to-novel", *seeds.common, "--shots", "2", "--seed", "1", "2", "--out"]
    assert in_processes(2, protocols.main, [*flags, str(tmp_path / "two")]) == [0, 0]
    content = saved(tmp_path / "two")["results"]["base-to-novel"]
    assert content["novel"]["n"] > 0 and content["novel"]["runs"] == 2
    assert saved(tmp_path / "two", "seed2")["seed"] == 2


def test_zero_shot(seeds, tmp_path, monkeypatch, capsys):
    """`{}` is for splits 1 to 3 and their mean; plain CLIP; a checkpoint per seed; descriptions."""
    monkeypatch.chdir(tmp_path)
    frames_folder(tmp_path / "other", ("clap", "Zumba"), clips=4)
    Path("labels.csv").write_text("id,name\n0,Zumba\n1,clap\n")
    for i in (1, 2, 3):
        lines = [f"clap/clip{i} 1", *(f"Zumba/clip{k} 0" for k in range(i + 1))]
        Path(f"list{i}.txt").write_text("\n".join(lines))
    sets = ["--test", "all=other", "--test", "three=other,list{}.txt,labels.csv"]
    plain = protocols.main(["zero-shot", *seeds.start, *sets])["results"]["zero-shot"]
    runs = Path("runs/zero-shot")
    assert plain == saved(runs)["results"]["zero-shot"] and not list(runs.rglob("last.pt"))
    splits = [saved(runs, f"seed0/three/{i}")["results"]["three"] for i in (1, 2, 3)]
    assert [split["split"] for split in splits] == [f"list{i}.txt" for i in (1, 2, 3)]
    assert plain["all"]["n"] == 8 and plain["all"]["runs"] == 1
    assert saved(runs, "seed0/all")["results"]["all"]["split"] == "all clips"
    top1 = [split["top1"] for split in splits]
    assert plain["three"]["top1"] == round(statistics.mean(top1), 2)
    assert plain["three"]["top1_std"] == round(statistics.stdev(top1), 2)
    assert plain["three"]["n"] == [3, 4, 5] and plain["three"]["runs"] == 3
    model = EZCLIP.from_pretrained(seeds.clip, num_frames=4)
    args = train.parser().parse_args(seeds.start)
    _, test = data.index_frames("other", whole=True)
    assert train.evaluate(model, test, args)["top1"] == plain["all"]["top1"]
    said = capsys.readouterr().out
    assert "occur in training" not in said
    assert "| top-1 (%) | all, n = 8 | three, n = [3, 4, 5] |" in said

    for seed in (1, 2):
        train.main([*seeds.common, "--seed", str(seed), "--lr", "0.1", "--out", f"run{seed}"])
    texts = {"0": "archery: Someone draws a bow.", "1": "Clap: Hands meet.",
             "2": "Zumba: People dance."}
    for path, keys in (("part.json", "01"), ("whole.json", "012")):
        Path(path).write_text(json.dumps({key: texts[key] for key in keys}))
    flags = ["zero-shot", *seeds.start[:4], *seeds.start[-4:], "--seed", "1", "2", *sets[:2]]
    flags = [*flags[:1], *flags[3:], "--checkpoint", "run{}/last.pt"]
    content = protocols.main([*flags, "--descriptions", "part.json", "whole.json", "--out", "two"])
    assert content["results"]["zero-shot"]["all"]["runs"] == 2
    assert "all: 1 of its 2 classes occur in training" in capsys.readouterr().out
    for seed in (1, 2):
        given = ["--checkpoint", f"run{seed}/last.pt", "--descriptions", "whole.json"]
        args = train.parser().parse_args([*given, "--eval-only", "--workers", "0"])
        result = train.evaluate(train.build_model(args), test, args)
        del result["predictions"]
        assert saved("two", f"seed{seed}/all")["results"]["all"] == result
    fails(protocols, [*flags, "--descriptions", "part.json", "--out", "no"], "Zumba")
    fails(protocols, [*flags, "--seed", "1", "3", "--out", "no"], "run3/last.pt")
    assert not Path("no").exists()


@pytest.mark.parametrize("halves", [False, True])
def test_ablation(halves, seeds, tmp_path, capsys):
    out = tmp_path / "ablation"
    flags = ["ablation", *seeds.common, "--out", str(out)]
    flags += ["--base-to-novel", "--shots", "2"] if halves else ["--seed", "0", "1"]
    content = protocols.main(flags)
    rows = [row for row, *_ in protocols.ROWS]
    assert list(content["results"]) == rows
    said = capsys.readouterr().out
    for row, folder, _ in protocols.ROWS[:-1]:
        runs = [saved(out, f"seed{i}", folder) for i in content["seed"]]
        for name in runs[0]["results"]:
            result = content["results"][row][name]
            top1 = [run["results"][name]["top1"] for run in runs]
            assert result["top1"] == round(statistics.mean(top1), 2)
    for row in rows:
        sets = content["results"][row]
        assert list(sets) == (["base", "novel", "harmonic_mean"] if halves else ["frames"])
        first = next(iter(sets.values()))
        deviation = "" if halves else f" ± {first['top1_std']:.1f}"
        assert f"\n| {row} | {first['top1']:.1f}{deviation} |" in said
    assert ("4 clips of 2 classes" in said) == halves and ("24 clips of 3" in said) != halves
    trained = {}
    for folder in ("adapters", "prompts", "motion"):
        trained[folder] = set(ezclip.read_weights(out / "seed0" / folder / "last.pt")["state_dict"])
    prompts = trained["prompts"] - trained["adapters"]
    assert len(prompts) == 1 and "temporal_prompts" in prompts.pop()
    assert trained["motion"] == trained["prompts"]
    assert not (out / "seed0/frozen/last.pt").exists()
    if halves:
        assert protocols.main([*flags, "--resume"])["results"] == content["results"]


def test_frames_are_shuffled_within_clips(world):
    """Each clip's in an order of its own; no frame is lost; a seed's orders are its own."""
    def orders(seed):
        model = SimpleNamespace(encode_frames=lambda video: video)
        video = torch.arange(6 * 8).view(6, 8, 1, 1, 1)
        return protocols.shuffled(model, seed).encode_frames(video)[..., 0, 0, 0] - 8 * torch.arange(
            6)[:, None]
    first = orders(0)
    assert torch.equal(first.sort(1).values, torch.arange(8).expand(6, 8))
    assert len({tuple(row) for row in first.tolist()}) == 6
    assert torch.equal(first, orders(0)) and not torch.equal(first, orders(1))
    # an evaluation sees them, whatever its batches
    split, _ = data.index_frames(world.frames)
    seen = []
    for size, shuffle in (("4", False), ("4", True), ("5", True)):
        torch.manual_seed(0)
        model = randomised(EZCLIP.from_pretrained(world.whole / "last.pt"))
        args = train.parser().parse_args([*world.bare, "--batch-size", size])
        if shuffle:
            protocols.shuffled(model, 0)
        predictions = train.evaluate(model, split, args)["predictions"]
        seen.append(torch.tensor([row["p1"] for row in predictions]))
    assert (seen[0] - seen[1]).abs().max() > 1e-4
    near(seen[1], seen[2], 1e-4)


@pytest.mark.parametrize("flags, word", [
    ("", "required: protocol"),
    ("one-shot", "invalid choice: 'one-shot'"),
    ("few-shot", "--data is needed"),
    ("zero-shot --clip CLIP", "--test"),
    ("few-shot --data nowhere", "nowhere: no such folder"),
    ("few-shot --data FRAMES --shots 9", "Archery has 8 training clips"),
    ("few-shot --data FRAMES --shots 2 4 2", "--shots has 2 twice"),
    ("few-shot --data FRAMES --eval-only", "--eval-only does not go with few-shot"),
    ("few-shot --data FRAMES --base-to-novel", "--base-to-novel does not go with few-shot"),
    ("base-to-novel --data FRAMES --shots 2 4", "--shots takes one number"),
    ("base-to-novel --data FRAMES", "has 8 training clips, which is less than 16 shots"),
    ("base-to-novel --data FRAMES --seed 1 2 1", "--seed has 1 twice"),
    ("base-to-novel --data FRAMES --classes base gone", "gone"),
    ("base-to-novel --data FRAMES --classes base base", "base: Archery was there before"),
    ("base-to-novel --data FRAMES --classes base", "--classes"),
    ("base-to-novel --data FRAMES --test x=y", "--test does not go with base-to-novel"),
    ("base-to-novel --data FRAMES --seed -1", "--seed: must be at least 0"),
    ("base-to-novel --data FRAMES --shots 2 --clip none.pt", "none.pt"),
    ("base-to-novel --data FRAMES --shots 2 --out file/x", "file/x"),
    ("base-to-novel --data FRAMES --shots 2 --out done", "done: holds results; --resume"),
    ("ablation --data FRAMES --prompts none", "--prompts does not go with ablation"),
    ("ablation --data FRAMES --motion-weight 0", "--motion-weight does not go with ablation"),
    ("ablation --data FRAMES --checkpoint CLIP", "--checkpoint does not go with ablation"),
    ("ablation --data FRAMES --test-list one.txt --labels labels.csv", "no clips for training"),
    ("ablation --data FRAMES --train-list one.txt --labels labels.csv", "no clips for frames"),
    ("zero-shot --test x=FRAMES --data FRAMES", "--data does not go with zero-shot"),
    ("zero-shot --test x=FRAMES --shots 2", "--shots does not go with zero-shot"),
    ("zero-shot --test x", "--test x is not NAME=DIR"),
    ("zero-shot --test x=FRAMES,", "is not NAME=DIR"),
    ("zero-shot --test x=FRAMES,one.txt", "is not NAME=DIR or NAME=DIR,LIST,LABELS"),
    ("zero-shot --test ../x=FRAMES", "is not NAME=DIR"),
    ("zero-shot --test ..=FRAMES", "is not NAME=DIR"),
    ("zero-shot --test x=FRAMES --test x=nowhere", "--test has x twice"),
    ("zero-shot --test x=FRAMES --test y=nowhere", "nowhere: no such folder"),
    ("zero-shot --test x=FRAMES --test y=FRAMES,one{}.txt,labels.csv", "one1.txt"),
    ("zero-shot --test x=FRAMES --templates " + "{}" * 60, "tokens with start and end, 77 fit"),
    ("zero-shot --test x=FRAMES --descriptions labels.csv", "labels.csv"),
    ("zero-shot --test x=FRAMES --seed 1 2 --checkpoint run{}.pt", "run1.pt"),
    ("zero-shot --test x=FRAMES --seed 1 2", "--seed has several"),
    ("few-shot --data FRAMES --lerning-rate 1", "--lerning-rate")])
def test_bad_input_to_protocols(flags, word, seeds, tmp_path, monkeypatch):
    """One line, status 2, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    for name, text in (("base", "Archery\n"), ("file", ""), ("one.txt", "Clap/clip1 0\n"),
                       ("labels.csv", "0,Clap\n"), ("done/results.json", "{}")):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    files = sorted(tmp_path.rglob("*"))
    flags = flags.replace("FRAMES", seeds.frames).replace("CLIP", seeds.clip)
    if "--clip" not in flags:
        flags += f" --clip {seeds.clip} --workers 0" if flags else ""
    assert fails(protocols, flags.split(), word).count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == files


# ---- demo.py ----

def test_demo_world():
    t = np.linspace(1, -1, 12)
    for pair in range(4):  # twins are each other backwards, but for the noise
        for shape_seed in range(6):
            clips = []
            for way in (1, -1):
                rng = np.random.default_rng(shape_seed)
                clips.append(demo.render_clip("red", pair, way * t, rng).astype(int))
            there, back = clips
            assert there.shape == (12, 36, 36, 3) and abs(there - back[::-1]).max() < 60
            assert abs(there[0] - there[-1]).max() > 60
    names = {("red", "left", False): "a red shape moving to the left",
             ("red", "left", True): "a red shape at the left",
             ("white", "large", False): "a white shape getting large",
             ("white", "faint", True): "a white shape that is faint"}
    for arguments, name in names.items():
        assert demo.class_name(*arguments) == name


def test_a_seed_has_its_world():
    """Pixels of seed 21 as they were first: else a table would be of another seeds."""
    sums = []
    for pair in range(4):
        rng = np.random.default_rng((21, False, 1, pair, 0, 3))
        frames = demo.render_clip("green", pair, np.linspace(1, -1, 12), rng)
        sums.append(int(frames.astype(int).sum()))
    assert sums == [1728974, 4193429, 660720, 943024]


@pytest.fixture
def small_demo(tmp_path, monkeypatch):
    """A demo of one colour, that has base and novel classes, and of hardly any training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "COLOURS", {"red": demo.COLOURS["red"]})
    monkeypatch.setattr(demo, "LEAST", 0)
    for recipe in (demo.PRETRAINING, demo.ADAPTATION):
        monkeypatch.setitem(recipe, "epochs", 1)
    monkeypatch.setitem(demo.ADAPTATION, "num_frames", 2)
    return ["--workers", "0", "--device", "cpu"]


def test_the_world_is_rendered(small_demo, monkeypatch):
    demo.main(["--render", "world", "--seed", "21"])
    split, test = data.index_frames("world")
    names = {demo.class_name("red", word) for twins in demo.TWINS for word in twins}
    assert set(split.classes) == names and split.source == "split 1 of UCF101"
    labels = [k for _, k in test.clips]
    assert [labels.count(k) for k in range(8)] == [20] * 8
    base, novel = protocols.halves(split)
    assert len(split.clips) == 4 * 32 and set(novel) == {
        demo.class_name("red", word) for twins in demo.TWINS[:2] for word in twins}
    assert len(data.frame_names(Path("world", *test.clips[0][:1]))) == 12
    fails(demo, ["--render", "world"], "world: exists already")
    fails(demo, ["--render", "other", "--seed", "1", "2"], "--seed")
    fails(demo, ["--seed", "1", "1"], "--seed")
    assert os.listdir() == ["world"]


def test_the_demo_in_small(small_demo, monkeypatch, capsys):
    save_clip = demo.save_clip  # a few clips of each class will do

    def save_few(folder, frames):
        if folder.name.endswith(("1_c01", "2_c01")):
            save_clip(folder, frames)

    monkeypatch.setattr(demo, "save_clip", save_few)
    content = demo.main([*small_demo, "--seed", "3", "5"])
    assert json.loads(Path("runs/demo/results.json").read_text()) == content
    assert content["seed"] == [3, 5] and content["command"].startswith("python examples/demo.py ")
    rows = content["results"]["demo"]
    assert [row["row"] for row in rows] == [row for row, *_ in protocols.ROWS]
    said = capsys.readouterr().out
    for row in rows:
        cells = []
        for key in ("base", "novel", "harmonic_mean"):
            cells.append(f"{row[key]:.1f} ± {row[f'{key}_std']:.1f}")
        assert f"| {row['row']} | {' | '.join(cells)} |" in said and row["n"] == 16
    folders = [folder for _, folder, _ in protocols.ROWS[:-1]]
    bases = [saved("runs/demo", f"seed{seed}/ablation", folders[2])["results"]["base"]["top1"]
             for seed in (3, 5)]
    assert rows[2]["base"] == round(statistics.mean(bases), 2)
    assert rows[2]["base_std"] == round(statistics.stdev(bases), 2)
    with Image.open("runs/demo/demo.png") as picture:
        assert picture.size == (960, 900)
        pixels = np.asarray(picture.convert("RGB"))
    for colour in ((0, 0x72, 0xB2), (0xE6, 0x9F, 0), (0, 0x9E, 0x73)):  # bars
        assert (pixels == colour).all(2).sum() > 100
    red = pixels[:420, :, 0].astype(int) - pixels[:420, :, 1]
    assert (red > 50).sum() > 1000  # shapes
    fails(demo, small_demo, "runs/demo: holds a demo; --resume")
    again = demo.main([*small_demo, "--seed", "3", "5", "--resume"])
    assert again["results"] == content["results"]
    monkeypatch.setattr(demo, "LEAST", 101)
    fails(demo, [*small_demo, "--seed", "3", "--out", "bad"], "names only")


@slow
def test_the_demo(tmp_path, monkeypatch):
    """It teaches its lesson."""
    monkeypatch.chdir(tmp_path)
    demo.main(["--seed", "11"])
    rows = json.loads(Path("runs/demo/results.json").read_text())["results"]["demo"]
    assert [row["n"] for row in rows] == [960] * 5
    base = {row["row"]: row["base"] for row in rows}
    assert base["frozen CLIP"] <= 60 and base["+ adapters"] <= 60  # capped near 50
    assert base["+ temporal prompts"] >= 80 and base[protocols.SHUFFLED] <= 60
    assert Path("runs/demo/demo.png").exists()
    run_the_pages(tmp_path)


def run_the_pages(folder):
    """Every command and all Python of the pages that starts from the demo runs here as it is written,
    and prints as many lines as stand below it. (What they say depends on seed and machine.)"""
    pytest.importorskip("onnxruntime")
    for name in ("examples", "docs", "benchmarks", "data.py", "ezclip.py", "train.py",
                 "clip_tokenizer.py", "bpe_simple_vocab_16e6.txt.gz"):
        (folder / name).symlink_to(EXAMPLES.parent / name)
    (folder / "bin").mkdir()
    (folder / "bin/ffmpeg").symlink_to(ffmpeg_program())
    (folder / "bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "bin/python").chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    done = 0
    for page in [EXAMPLES.parent / "README.md", *sorted((EXAMPLES.parent / "docs").glob("*.md"))]:
        fenced = r"```(python)?\n([^`]*)```\n(?:\n?```\n([^`]*)```)?"
        for language, command, printed in re.findall(fenced, page.read_text()):
            if "runs/demo" not in command and "runs/exported" not in command or "--epochs" in command:
                continue
            if language:
                command = f"python - <<'END'\n{command}END\n"
            command = command.replace("pip install", "true")
            result = subprocess.run(["bash", "-ec", command], cwd=folder, env=environment,
                                    capture_output=True, text=True)
            assert result.returncode == 0, (page, command, result.stderr)
            if language or "predict.py" in command:
                assert len(result.stdout.splitlines()) == len(printed.splitlines()), command
            done += 1
    assert done == 6
