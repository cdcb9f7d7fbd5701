"""Tests of the reference: offline, small random models. Slower ones run with EZCLIP_SLOW=1, those
that compare with other packages where `clip-anytorch` and `transformers` are installed."""

import collections
import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import unicodedata
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import packaging.version
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms.v2 import functional as tv

import clip_tokenizer
import data
import ezclip
import train
from ezclip import EZCLIP, Config, class_probabilities, contrastive_loss, motion_loss

pytestmark = pytest.mark.filterwarnings("ignore:.*does not say its activation")
torch.set_num_threads(1)  # more are slower for models as small as these
signal.signal(signal.SIGINT, signal.default_int_handler)  # which jobs in the background lack
HERE = Path(__file__).parent
sys.path.append(str(HERE / "benchmarks"))
SMALL = dict(embed_dim=32, image_size=32, patch_size=8, vision_width=128, vision_layers=3,
             context_length=16, vocab_size=100, text_width=64, text_layers=2)
PLAIN = dict(prompts="none", adapters=False)  # CLIP itself
SLOW = os.environ.get("EZCLIP_SLOW") == "1"
slow = pytest.mark.skipif(not SLOW, reason="set EZCLIP_SLOW=1")


def peer(name):
    """A module of OpenAI's package, which imports `packaging` from setuptools of old."""
    sys.modules.setdefault("pkg_resources", SimpleNamespace(packaging=packaging))
    return pytest.importorskip(f"clip.{name}", reason="clip-anytorch is not installed")


def near(a, b, tolerance=1e-5):
    a, b = (torch.as_tensor(x, dtype=torch.float32) for x in (a, b))
    assert a.shape == b.shape and (a - b).abs().max() <= tolerance, (a - b).abs().max()


# ---- equal to the official code ----

GOLDEN = {  # what the official code computes for the weights of `official_state`, with labels 0 1 0
    "deep": dict(
        settings=dict(num_frames=4, vision_layers=3, prompts="deep"), trainable=30848,
        logits=[[-0.22211963, -0.066169381, 2.3303149], [-1.0319574, -0.60340685, 2.3297606],
                [-1.0103726, -0.79162985, 2.0138543]],
        frames=[[1.1500313, 0.45431387, -1.7114942], [1.1355302, 0.14332947, -1.7301233],
                [0.58403343, 0.3820172, -1.3743132]],
        kl=(1.5591706, 0.69128489), motion=0.75155944, adamw=[1.8767872, 1.406703, 1.3419107],
        gradients=(2.0930386, 2.5979745, 0.081223071)),
    "shallow": dict(
        settings=dict(num_frames=8, vision_layers=2, prompts="shallow"), trainable=21984,
        logits=[[0.50285494, 0.028942347, 2.1537738], [-0.096601009, -0.56655496, 1.8871311],
                [0.28456664, 0.12154901, 2.1961598]],
        frames=[[1.9044369, 1.6573672, -1.661504], [1.2966094, 1.3072786, -1.1979185],
                [1.1255158, 1.7059793, -0.8341617]],
        kl=(1.1871938, 0.71938288), motion=0.76310509, adamw=[1.7163935, 1.4647655, 1.4604343],
        gradients=(2.0708897, 2.3949673, 0.074075818)),
    "no_prompts": dict(
        settings=dict(num_frames=4, vision_layers=3, prompts="none"), trainable=29312,
        logits=[[-0.33395055, -0.045354679, 2.4126327], [-1.0448312, -0.54493672, 2.3624659],
                [-1.110914, -0.71627998, 2.0659275]],
        frames=[[1.1059914, 0.43935481, -1.6018614], [1.0301777, 0.25776422, -1.5667386],
                [0.52227217, 0.34845197, -1.3254588]],
        kl=(1.6011722, 0.69001609), motion=0.74505448, adamw=[1.8906486, 1.4141095, 1.341691],
        gradients=(2.0688183, 2.6706679)),
    "temporal_adapter": dict(
        settings=dict(num_frames=4, vision_layers=3, prompts="none", temporal_adapter=True),
        trainable=54368,
        logits=[[-2.2227631, -0.22618061, 0.16822168], [-2.2497141, 0.31690243, 0.64118052],
                [-2.5180032, 0.38675117, 0.88018358]],
        frames=[[1.3940834, -0.96934175, -0.84976763], [0.99198455, -1.4649835, -0.60307449],
                [1.1561804, -1.3435769, -0.6822468]],
        kl=(1.1575174, 0.63825876), motion=0.79732829, adamw=[1.6952164, 1.4565101, 1.3566487],
        gradients=(1.806715, 1.22648, None, 0.26457962)),
}
GRADIENTS = ("visual.transformer.resblocks.0.adapter.fc1.weight",
             "transformer.resblocks.0.adapter.fc1.weight", "visual.transformer.temporal_prompts",
             "visual.transformer.resblocks.1.temporal_adapter.fc2.bias")
GOLDEN_TEXT = [[-1.3927568, 0.87939143], [0.16519651, -1.2557135], [-0.46238202, -0.80843037]]
FACTORS = {"bias": 0.05, "positional_embedding": 0.1, "class_embedding": 0.1,
           "T_prompt": 0.2, "token_embedding": 0.3}


def formula(name, shape):
    """The weights that the golden numbers were computed with, a function of name and shape."""
    if name == "logit_scale":
        return torch.tensor(math.log(1 / 0.07))
    v = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if "ln_" in name and name.endswith("weight"):
        return torch.tensor(1 + 0.1 * v, dtype=torch.float32)
    inputs = shape[:1] if name.endswith(("proj", "projection")) else shape[1:]
    factor = 1 / math.sqrt(math.prod(inputs))
    for part, value in FACTORS.items():
        if part in name:
            factor = value
    return torch.tensor(factor * v, dtype=torch.float32)


def official_state(**settings):
    """A state dict with the names of the official code for a model of these settings."""
    model = EZCLIP(Config(**{**SMALL, **settings}))
    state = {}
    for name, p in model.named_parameters():
        name = name.replace("temporal_adapter.fc", "T_Adapter.D_fc")
        name = name.replace("adapter.fc", "Adapter.D_fc")
        name = name.replace("temporal_prompts", "T_prompt_embeddings")
        state[name] = formula(name, tuple(p.shape))
    frames, width = model.config.num_frames, model.config.vision_width
    state["visual.temporal_embedding"] = torch.zeros(1, frames, width)
    return state


def golden_inputs(batch, frames):
    video = np.random.RandomState(7).standard_normal((batch, frames, 3, 32, 32))
    tokens = torch.zeros(batch, 16, dtype=torch.long)
    for r in range(batch):
        n = 4 + 3 * r % 11
        middle = [1 + (7 * r + 5 * j) % 97 for j in range(1, n)]
        tokens[r, :n + 1] = torch.tensor([98, *middle, 99])
    return torch.tensor(video, dtype=torch.float32), tokens


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_numbers_of_the_official_code(case, tmp_path):
    golden, settings = GOLDEN[case], GOLDEN[case]["settings"]
    state = {f"module.{k}": v for k, v in official_state(**settings).items()}
    torch.save({"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {"state": {}}},
               tmp_path / "official.pt")
    model = EZCLIP.from_pretrained(tmp_path / "official.pt")
    assert model.config == Config(**{**SMALL, **settings}) and not model.training
    assert model.freeze_backbone() == golden["trainable"]
    video, tokens = golden_inputs(3, settings["num_frames"])
    labels = torch.tensor([0, 1, 0])
    with torch.no_grad():
        near(model.encode_frames(video)[:, 0, :3], golden["frames"])
        near(model.encode_text(tokens)[:, :2], GOLDEN_TEXT)
        near(model(video, tokens), golden["logits"])

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3,
                                  betas=(0.9, 0.98), eps=1e-8, weight_decay=0.2)
    for i, expected in enumerate(golden["adamw"]):
        frames = model.encode_frames(video)
        logits = model.similarity(frames.mean(1), model.encode_text(tokens))
        losses = contrastive_loss(logits, labels), motion_loss(frames)
        near(sum(losses).detach(), expected, 1e-5 if i == 0 else 1e-3)
        optimizer.zero_grad()
        sum(losses).backward()
        if i == 0:
            near(losses[0].detach(), sum(golden["kl"]) / 2)
            near(losses[1].detach(), golden["motion"])
            for name, norm in zip(GRADIENTS, golden["gradients"]):
                if norm:
                    found = model.get_parameter(name).grad.norm().item()
                    assert found == pytest.approx(norm, rel=1e-3)
        optimizer.step()


def test_trainable_parameters_of_the_paper():
    with torch.device("meta"):
        b_16, b_32 = (EZCLIP(Config(patch_size=size)) for size in (16, 32))
        l_14 = EZCLIP(Config(patch_size=14, vision_width=1024, vision_layers=24, text_width=768,
                             embed_dim=768))
    assert b_16.freeze_backbone() == b_32.freeze_backbone() == 5_204_736
    assert round(l_14.freeze_backbone() / 1e6, 2) == 16.36
    assert b_16.visual.transformer.temporal_prompts.shape == (12, 8, 768)


# ---- the model ----

NOISE = torch.randint(256, (3, 4, 3, 32, 32), dtype=torch.uint8,
                      generator=torch.Generator().manual_seed(0))


def small(**settings):
    torch.manual_seed(0)
    return EZCLIP(Config(**{**SMALL, "num_frames": 4, **settings})).eval()


def randomised(model, std=0.1):
    """Prompts and adapters that are not near zero."""
    model.freeze_backbone()
    for p in train.trained(model).values():
        nn.init.normal_(p, std=std)
    return model


def loss_and_gradients(model):
    """Of one step on fixed data, with the same random draws whenever it is called."""
    model.freeze_backbone()
    _, tokens = golden_inputs(3, 4)
    torch.manual_seed(1)
    frames = model.encode_frames(NOISE)
    logits = model.similarity(frames.mean(1), model.encode_text(tokens))
    loss = contrastive_loss(logits, torch.tensor([0, 1, 2])) + motion_loss(frames)
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in train.trained(model).items()}


def test_without_prompts_and_with_fresh_adapters_it_is_clip():
    adapted, plain = small(prompts="none"), small(**PLAIN)
    adapted.load_state_dict({**adapted.state_dict(), **plain.state_dict()})
    video, tokens = golden_inputs(2, 5)  # and so takes any number of frames
    near(adapted(video, tokens), plain(video, tokens), 0)
    near(plain.encode_frames(video)[:, 2], plain.encode_frames(video[:, 2:3])[:, 0])
    new = set(adapted.state_dict()) - set(plain.state_dict())
    assert new == set(filter(ezclip.is_new, adapted.state_dict()))
    assert all(map(ezclip.is_new, ("visual.ln_time.weight", "query", "visual.attn.lora_a")))


@pytest.mark.parametrize("seed", range(6))
def test_properties_of_random_models(seed):
    rng = random.Random(seed)
    prompts, frames = ("deep", "shallow", "none")[seed % 3], rng.randint(2, 5)
    model = small(prompts=prompts, temporal_adapter=seed == 5, num_frames=frames,
                  adapters=seed != 1, vision_layers=rng.randint(1, 4),
                  text_layers=rng.randint(1, 3), patch_size=rng.choice([8, 16]))
    randomised(model, std=0.2)
    (video, tokens), order = golden_inputs(5, frames), torch.randperm(5)
    with torch.no_grad():
        logits = model(video, tokens)
        near(model(video[order], tokens[order]), logits[order][:, order])
        for n in (1, 2, 4):  # clips and texts of a batch do not see each other
            near(torch.cat([model(part, tokens) for part in video.split(n)]), logits)
            near(torch.cat([model(video, part) for part in tokens.split(n)], 1), logits)
        for text in tokens:  # what stands behind the end changes nothing
            end = text.argmax()
            alone = model.encode_text(text[None, :end + 1])
            near(model.encode_text(text[None]), alone)
            text[end] = 1  # an end that is not the largest id
            other = model.encode_text(text[None], end[None])
            text[end + 1:] = 2
            near(model.encode_text(text[None], end[None]), other)
        change = model.encode_video(video.roll(1, 1)) - model.encode_video(video)
        assert (change.abs().max() > 1e-4) == (prompts != "none"), change.abs().max()


@pytest.mark.parametrize("settings", [dict(), dict(prompts="none", temporal_adapter=True)])
def test_recomputing_changes_nothing_and_bf16_little(settings):
    """What is dropped at random in the forward pass is dropped in the backward pass again."""
    settings = dict(drop_path=0.3, attention_dropout=0.3, prompt_dropout=0.3, **settings)
    model, recomputing = (randomised(small(**settings, recompute=r)).train() for r in (False, True))
    (loss, gradients), (again, others) = map(loss_and_gradients, (model, recomputing))
    assert loss == again
    for name, gradient in gradients.items():
        near(gradient, others[name], 0)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = loss_and_gradients(model)[0]
        features = model.encode_video(NOISE)
        assert class_probabilities(features, features[None]).dtype == torch.float32
    assert loss.dtype == rounded.dtype == torch.float32
    assert loss.item() == pytest.approx(rounded.item(), rel=0.02) and loss != rounded


@torch.no_grad()
def test_both_towers_are_one_graph_for_every_batch():
    """For torch.export and torch.compile, which ONNX and others start from."""
    class Tower(nn.Module):
        def __init__(self, model, method):
            super().__init__()
            self.model, self.method = model, method

        def forward(self, x):
            return getattr(self.model, self.method)(x)

    model, batch = small(num_frames=3), torch.export.Dim("batch", max=1024)
    video, tokens = golden_inputs(5, 3)
    bytes_ = (127 + 60 * video).byte()
    for method, whole in ("encode_video", bytes_), ("encode_text", tokens):
        encode = getattr(model, method)
        program = torch.export.export(Tower(model, method), (whole[:2],),
                                      dynamic_shapes=({0: batch},))
        compiled = torch.compile(encode, fullgraph=True, backend="eager")
        for x in (whole, whole[:1], whole[:3]):
            near(program.module()(x), encode(x))
            near(compiled(x), encode(x))


def test_attention_drops_weights_and_blocks_whole_clips():
    attention = ezclip.Attention(64, heads=1, dropout=0.5, causal=False).train()
    nn.init.zeros_(attention.in_proj_weight)  # even attention to values of one
    nn.init.ones_(attention.in_proj_bias)
    nn.init.eye_(attention.out_proj.weight)
    nn.init.zeros_(attention.out_proj.bias)
    torch.manual_seed(0)
    x = torch.zeros(4, 1, 64)
    y = attention(x, torch.zeros(4, 1000, 64))  # sums of 1000 weights, twice as large or dropped
    assert (y - 1).abs().max() < 0.2 and (y != 1).any()
    near(attention.eval()(x, x), torch.ones(4, 1, 64), 1e-6)
    block = small(drop_path=0.5).visual.transformer.resblocks[-1].train()
    kept = block.drop_path(torch.ones(64 * 4, 7, 5), num_clips=64).view(64, -1)
    assert set(kept.unique().tolist()) == {0.0, 2.0} and (kept == kept[:, :1]).all()
    assert 16 < (kept[:, 0] > 0).sum() < 48
    rates = [b.drop_rate for b in small(vision_layers=3).visual.transformer.resblocks]
    assert rates == pytest.approx([0, 0.05, 0.1])
    assert small().transformer.resblocks[1].attn.dropout == pytest.approx(0.1)


def test_losses_by_hand():
    still = torch.ones(2, 8, 4)
    assert motion_loss(still) == 1 and motion_loss(still[:, :1]) == 1
    f = torch.tensor([0.0, 1.0, 3.0]).view(1, 3, 1)  # C = (1 + 3 + 2) / 2 / 3 = 1, V = 7 / 3
    assert motion_loss(f).item() == pytest.approx(1 / (1 + 1 + 7 / 3))
    logits, labels = torch.tensor([[2.0, 0.0], [1.0, 3.0]]), torch.tensor([0, 1])
    target = torch.tensor([[10.0, 0.0], [0.0, 10.0]]).softmax(1)
    by_hand = [(target * (target.log() - x.log_softmax(1))).sum() / 2 for x in (logits, logits.T)]
    near(contrastive_loss(logits, labels), sum(by_hand) / 2, 1e-6)
    same = torch.tensor([5, 5])  # one class only: an even target
    near(contrastive_loss(torch.zeros(2, 2), same), 0.0, 1e-6)
    video, texts = torch.randn(2, 8), torch.randn(3, 5, 8)
    cosine = torch.cosine_similarity(video[:, None, None], texts[None], dim=-1)  # (2, 3, 5)
    near(class_probabilities(video, texts), (100 * cosine).softmax(-1).mean(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_finite_at_their_limits(dtype):
    torch.manual_seed(0)
    for B, T, classes, scale in ((1, 1, 1, 1), (1, 8, 1, 1), (6, 8, 1, 1), (6, 1, 3, 1),
                                 (64, 2, 10_000, 1), (6, 8, 3, 1e4), (6, 8, 3, 0)):
        labels = torch.randint(classes, (B,))
        logits = (scale * torch.randn(B, B)).to(dtype).requires_grad_()
        frames = (scale * torch.randn(B, T, 16)).to(dtype).requires_grad_()
        losses = contrastive_loss(logits, labels), motion_loss(frames)
        sum(losses).backward()
        assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses)
        assert logits.grad.isfinite().all() and frames.grad.isfinite().all()
        assert 0 < losses[1] <= 1 and losses[0] >= -1e-6
        assert B > 1 or losses[0] == 0
        assert (T > 1 and scale > 0) or losses[1] == 1
    texts = torch.randn(1, 10_000, 64)
    probabilities = class_probabilities(texts[0, 7000:7003].to(dtype), texts.to(dtype))
    near(probabilities.sum(1), torch.ones(3), 1e-4)
    assert probabilities.argmax(1).tolist() == [7000, 7001, 7002]


@pytest.mark.parametrize("call, word", [
    (lambda: Config(num_frames=0), "num_frames"), (lambda: Config(prompts="wide"), "prompts"),
    (lambda: Config(drop_path=1.0), "drop_path"), (lambda: Config(image_size=33), "image_size"),
    (lambda: Config(activation="relu"), "activation"),
    (lambda: small().encode_frames(torch.zeros(1, 4, 3, 31, 32)), r"\(B, T, 3, 32, 32\)"),
    (lambda: small().encode_frames(torch.zeros(1, 5, 3, 32, 32)), "4 frames, the video has 5"),
    (lambda: small().encode_text(torch.arange(17)[None]), "context_length 16")])
def test_sizes_that_do_not_fit_are_refused(call, word):
    with pytest.raises(ValueError, match=word):
        call()


# ---- weights files ----

class Evil:
    def __reduce__(self):
        return os.system, (f"touch {Evil.mark}",)


def write_formats(folder, state):
    """The weights in the formats with OpenAI's names; the files' names mean nothing, or mislead.

    Wrappers write their own objects beside the weights, and their names before each of them.
    """
    Evil.mark = folder / "executed"
    extras = {"args": SimpleNamespace(lr=0.1), "best": np.float64(0.3), "path": Path("x"),
              "counts": collections.Counter("ab"), "tree": collections.defaultdict(list, a=[1]),
              "call": functools.partial(print, "x"), "evil": Evil(), "set": {1, 2},
              "dtype": torch.float16, "size": torch.Size([2])}
    for prefix in ("module.", "model._orig_mod.", "_orig_mod.module.model."):
        wrapped = {prefix + name: value for name, value in state.items()}
        wrapped["input_resolution"] = torch.tensor(32)
        torch.save({"epoch": 1, "state_dict": wrapped, **extras}, folder / f"{prefix}bin")
    torch.save(state, folder / "plain.safetensors")
    torch.save(state, folder / "legacy.zip", _use_new_zipfile_serialization=False)
    save_file(state, folder / "open_clip.pt")
    return sorted(folder.iterdir())


def refused(path, match=None, **settings):
    with pytest.raises((ValueError, OSError), match=match) as error:
        EZCLIP.from_pretrained(path, **settings)
    assert str(path) in str(error.value)


def test_formats_are_recognised_by_content(tmp_path):
    model = small(**PLAIN)
    video, tokens = golden_inputs(2, 3)
    for path in write_formats(tmp_path, model.state_dict()):
        loaded = EZCLIP.from_pretrained(path)
        assert loaded.config == Config(**SMALL) and not loaded.weights_adapted, path
        assert loaded.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        plain = EZCLIP.from_pretrained(path, num_frames=3, prompts="none")
        near(plain(video, tokens), model(video, tokens), 0)
    assert not Evil.mark.exists()


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_equal_to_openai(tmp_path):
    torch.manual_seed(0)
    model = peer("model").CLIP(embed_dim=32, image_resolution=32, vision_layers=3, vision_width=128,
                               vision_patch_size=8, context_length=77, vocab_size=49408,
                               transformer_width=64, transformer_heads=1, transformer_layers=2)
    for p in model.eval().parameters():  # norms and biases start too plain to prove anything
        p.data += 0.02 * torch.randn_like(p)
    state, plain, script = model.state_dict(), tmp_path / "plain.pt", tmp_path / "script.pt"
    video, tokens = torch.randn(2, 2, 3, 32, 32), clip_tokenizer.tokenize(["a dog", "juggling"])
    torch.jit.trace(model, (video[:, 0], tokens), check_trace=False).save(str(script))
    torch.save(state, plain)
    for path in (plain, script):
        ours = EZCLIP.from_pretrained(path, prompts="none")
        near(ours.encode_frames(video).flatten(0, 1), model.encode_image(video.flatten(0, 1)))
        near(ours.encode_text(tokens), model.encode_text(tokens))
        near(ours(video[:, :1], tokens), model(video[:, 0], tokens)[0], 1e-4)  # times 14
    torch.save({k: v.half() for k, v in state.items()}, plain)
    loaded = EZCLIP.from_pretrained(plain, **PLAIN).state_dict()
    assert all(v.dtype == torch.float32 and (v == state[k].half()).all() for k, v in loaded.items())
    for block in [*model.visual.transformer.resblocks, *model.transformer.resblocks]:
        block.mlp.gelu = nn.GELU()
    ours = EZCLIP.from_pretrained(script, prompts="none", activation="gelu")
    near(ours.encode_frames(video).flatten(0, 1), model.encode_image(video.flatten(0, 1)))


@torch.no_grad()
def test_equal_to_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=dict(hidden_size=64, intermediate_size=160, num_hidden_layers=2,
                         num_attention_heads=2, hidden_act="gelu", eos_token_id=49407),
        vision_config=dict(hidden_size=128, intermediate_size=400, num_hidden_layers=2,
                           num_attention_heads=4, hidden_act="gelu", image_size=32, patch_size=8),
        projection_dim=32)).eval()
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)
    model.save_pretrained(tmp_path)  # model.safetensors
    state = model.state_dict()
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}  # of older files
    torch.save(state | positions, tmp_path / "pytorch_model.bin")
    video, tokens = torch.randn(2, 2, 3, 32, 32), clip_tokenizer.tokenize(["a dog", "juggling"])
    expected = model(pixel_values=video[:, 0], input_ids=tokens)
    for name in ("model.safetensors", "pytorch_model.bin"):
        ours = EZCLIP.from_pretrained(tmp_path / name, prompts="none")
        near(ours.encode_frames(video)[:, 0],
             model.visual_projection(model.vision_model(video[:, 0])[1]))
        near(ours.encode_text(tokens), model.text_projection(model.text_model(tokens)[1]))
        near(ours(video[:, :1], tokens), expected.logits_per_image, 1e-4)
    (tmp_path / "alone").mkdir()
    for key in ("vision_model.encoder.layers.1.self_attn.k_proj.bias", "visual_projection.weight",
                "text_model.encoder.layers.0.mlp.fc1.weight"):  # named as in the file
        missing = {k: v for k, v in state.items() if k != key}
        for changed in (missing, {**state, key: state[key][:5]}):
            torch.save(changed, tmp_path / "alone/bad.bin")
            refused(tmp_path / "alone/bad.bin", f"(missing|misshapen): .*{key[:-7]}")


@torch.no_grad()
def test_another_vocabulary(tmp_path):
    """Its end of text is not the largest id: encode_text is told where it is, train.py refuses."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    tower = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1)
    model = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=dict(**tower, vocab_size=100, eos_token_id=3, max_position_embeddings=16),
        vision_config=dict(**tower, image_size=32, patch_size=8), projection_dim=32)).eval()
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[2, 60, 26, 53, 3, 0, 0], [2, 32, 24, 15, 4, 34, 3]])
    end = (ids == 3).int().argmax(-1)
    features = EZCLIP.from_pretrained(tmp_path).encode_text(ids, end)
    near(features, model.text_projection(model.text_model(ids)[1]))
    with pytest.raises(ValueError, match="its vocabulary of 100 is not .*: from Python, give enc"):
        train.build_model(train.parser().parse_args(["--clip", str(tmp_path)]))


@pytest.mark.parametrize("head_width, ratio, quick", [(80, 4.9231, True), (64, 4.3637, False)])
@torch.no_grad()
def test_equal_to_open_clip(head_width, ratio, quick, tmp_path):
    """Heads, widths of MLPs, activation and pixels as open_clip_config.json says."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    torch.manual_seed(0)
    vision = dict(width=320, layers=2, head_width=head_width, mlp_ratio=ratio, patch_size=8,
                  image_size=32)
    text = dict(width=96, layers=2, heads=3, mlp_ratio=ratio)
    model = open_clip.CLIP(32, vision, text, quick_gelu=quick).eval()
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)
    config = tmp_path / "open_clip_config.json"
    config.write_text(json.dumps({
        "model_cfg": dict(embed_dim=32, vision_cfg=vision, text_cfg=text, quick_gelu=quick),
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.25]}}))
    weights = tmp_path / "open_clip_model.safetensors"
    save_file(model.state_dict(), weights)
    video = torch.randint(256, (2, 2, 3, 32, 32), dtype=torch.uint8)
    pixels = (video / 255 - 0.5) / torch.tensor([0.5, 0.5, 0.25]).view(3, 1, 1)
    tokens = clip_tokenizer.tokenize(["a dog", "juggling"])
    activation = "quick_gelu" if quick else "gelu"
    for path, given in ((tmp_path, {}), (weights, {}), (shutil.copy(weights, tmp_path / "x"), dict(
            vision_heads=320 // head_width, text_heads=3, mean=(0.5,) * 3, std=(0.5, 0.5, 0.25),
            activation=activation))):
        if given:
            config.unlink()
        ours = EZCLIP.from_pretrained(path, prompts="none", **given)
        assert ours.config.vision_mlp_width == int(320 * ratio)
        near(ours.encode_frames(video).flatten(0, 1), model.encode_image(pixels.flatten(0, 1)))
        near(ours.encode_text(tokens), model.encode_text(tokens))


def test_what_no_weight_tells_is_said_or_asked_for(tmp_path):
    state = small(**PLAIN).state_dict()
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    save_file(state, path)
    with pytest.warns(UserWarning, match="model.safetensors: does not say its activation"):
        assert EZCLIP.from_pretrained(tmp_path).config.activation is None
    vision = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 8,
              "intermediate_size": 512, "image_size": 32, "hidden_act": "gelu"}
    text = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 256, "vocab_size": 100,
            "max_position_embeddings": 16, "hidden_act": "gelu"}
    said = {"vision_config": vision, "text_config": text, "projection_dim": 32}

    def write(**changes):
        config.write_text(json.dumps({**said, **changes}))

    write()
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0, 0.25, 0.5]}')
    loaded = EZCLIP.from_pretrained(tmp_path).config
    assert loaded.activation == "gelu" and loaded.vision_heads == 4 and loaded.text_heads == 8
    assert loaded.mean == (0, 0.25, 0.5) and loaded.std == ezclip.CLIP_STD
    assert EZCLIP.from_pretrained(path, vision_heads=2).config.vision_heads == 2
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"image_std": [1, 1, 1]}}')
    write(vision_config_dict={**vision, "num_attention_heads": 8})
    loaded = EZCLIP.from_pretrained(tmp_path).config
    assert loaded.vision_heads == 8 and loaded.std == (1, 1, 1)
    for changes, word in (
            (dict(vision_config={**vision, "hidden_size": 64}), "has vision_width 128, not 64 as"),
            (dict(text_config={**text, "intermediate_size": 300}), "text_mlp_width 256, not 300"),
            (dict(projection_dim=8), "has embed_dim 32, not 8 as"),
            (dict(text_config={}), "activations"),
            (dict(vision_config={**vision, "layer_norm_eps": 1e-6}), "layer_norm_eps 1e-06"),
            (dict(vision_config={**vision, "num_attention_heads": "4"}), "vision_heads"),
            (dict(vision_config={**vision, "num_attention_heads": 3}), "no multiple of its 3"),
            (dict(vision_config=[1]), "is no config of a CLIP")):
        write(**changes)
        refused(tmp_path if "multiple" not in word else path, word)
    config.write_text("{")
    refused(tmp_path, "config.json: is no config")
    config.write_text('{"model_type": "resnet"}')  # somebody else's
    assert EZCLIP.from_pretrained(path).config.vision_heads is None
    wide = small(vision_width=1088, vision_layers=1, **PLAIN).state_dict()
    save_file(wide, path)
    refused(path, "vision width of 1088 .*--vision-heads")
    assert EZCLIP.from_pretrained(path, vision_heads=17).config.vision_width == 1088


def test_files_that_do_not_fit_say_why(tmp_path):
    state, resnet = small(**PLAIN).state_dict(), {"visual.layer1.0.conv1.weight": torch.ones(1)}
    key = "visual.transformer.resblocks.2.mlp.c_fc.weight"
    others = {k: v for k, v in state.items() if k != key}
    no_patches = {k: v for k, v in state.items() if k != "visual.conv1.weight"}
    clip, part = tmp_path / "clip.pt", tmp_path / "model-00001-of-00002.safetensors"
    for path, content, word in (
            (clip, others, f"missing: .*{key}"), (clip, b"PK\5\6" + bytes(18), "none of PyTorch's"),
            (clip, {**state, "extra.weight": torch.zeros(1)}, "unexpected: extra.weight"),
            (clip, {**state, key: torch.zeros(3, 3)}, f"misshapen: .*{key}"),
            (clip, {**state, key: state[key].long()}, "tensors? of weights"),
            (clip, {**state, "note": "text"}, "note"), (clip, {}, "visual.conv1"),
            (clip, [1, 2], "dict"), (clip, resnet | state, "ResNet"),
            (clip, {**resnet, "visual.bn1.num_batches_tracked": torch.tensor(1)}, "ResNet"),
            (clip, {"visual.trunk.stem.0.weight": torch.ones(1)}, "ConvNeXt"), (part, no_patches, "shard|several files|part"),
            (clip, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "lfs"),
            (clip, b"<!DOCTYPE html><html>", "web page"), (clip, b"", "cannot be read"),
            (clip, b"\xef\xbb\xbf\n <HTML>", "web page"),
            (clip, b'{\n  "metadata": {}, "weight_map": {}}', "JSON|index")):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        refused(path, word)
    refused(tmp_path, "folder .*several files")


def test_official_checkpoints_settle_what_they_hold(tmp_path):
    path, state = tmp_path / "official.pt", official_state(num_frames=4)
    torch.save(state, path)
    for override in (dict(prompts="none"), dict(adapters=False), dict(vision_width=64),
                     dict(temporal_adapter=True)):
        refused(path, *override, **override)
    assert EZCLIP.from_pretrained(path, prompts="deep", drop_path=0.2).config.drop_path == 0.2
    ramp = torch.arange(4.0).view(1, 4, 1).expand(3, 4, 128).clone()
    torch.save({**state, "visual.transformer.T_prompt_embeddings": ramp}, path)
    for frames, expected in ((4, [0, 1, 2, 3]), (2, [0.5, 2.5]), (1, [1.5]),
                             (8, [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])):
        model = EZCLIP.from_pretrained(path, num_frames=frames)  # interpolated over time
        near(model.visual.transformer.temporal_prompts[2, :, 5], expected, 1e-6)
        assert model.config.num_frames == frames
    torch.save({**state, "visual.temporal_embedding": torch.ones(1, 4, 128)}, path)
    refused(path, "temporal_embedding is not zero")
    without = "visual.transformer.resblocks.1.Adapter.D_fc1.bias"
    torch.save({key: value for key, value in state.items() if key != without}, path)
    refused(path, f"missing: {without}")


def archived(path, content, method=zipfile.ZIP_STORED):
    """An archive of torch.save with this pickle and a storage of 16 bytes."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("x/data.pkl", content)
        archive.writestr("x/data/0", bytes(16))


def test_hostile_files_execute_nothing_and_end(tmp_path):
    Evil.mark, bad = tmp_path / "executed", tmp_path / "bad.pt"
    os_system, command = b"cposix\nsystem\n", f"touch {Evil.mark}".encode()
    pickles = [pickle.dumps({"a": Evil()}, protocol) for protocol in range(5)]
    pickles += [b"(S'" + command + b"'\niposix\nsystem\n.",  # INST, OBJ, NEWOBJ, BUILD, PERSID
                b"(" + os_system + b"S'" + command + b"'\no.", os_system + b"S''\n\x85\x81.",
                b"c__torch__\nA\n)\x81}(X\x09\0\0\0__class__" + os_system + b"ub.", b"Pposix\n."]
    magic = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
    for content in pickles:
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            archived(bad, content, method)
            refused(bad)
        for legacy in (content, magic + b"K\1.}." + content + b"]."):
            bad.write_bytes(legacy)
            refused(bad)
    # tensors that claim more than there is: by storages, by strides, beyond their storage
    tensor = (b"\x80\x02}X\1\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storage"
              b"ctorch\n%bStorage\nX\1\0\0\0%bX\3\0\0\0cpuJ%btQJ%b%b%b\x89}tRs.")
    four, more, negative = ((n).to_bytes(4, "little", signed=True) for n in (4, 2**30, -1))
    good = dict(dtype=b"Float", key=b"0", numel=four, offset=bytes(4), size=b"K\4\x85",
                stride=b"K\1\x85")
    for change, word in (
            (dict(numel=more), "storage 0"), (dict(numel=negative), "storage 0"),
            (dict(key=b"1"), "no item named"), (dict(dtype=b"Weird"), "cannot be read"),
            (dict(dtype=b"Double"), "storage 0"), (dict(offset=four), "out of bounds"),
            (dict(stride=b"J" + more + b"\x85"), "out of bounds"),
            (dict(size=b"J" + more + b"\x85"), "out of bounds"),
            (dict(size=b"J" + negative + b"\x85"), "cannot be read"),
            (dict(size=b"X\1\0\0\0a\x85"), "cannot be read"), ({}, "w")):
        archived(bad, tensor % tuple({**good, **change}.values()))
        refused(bad, word)
    near(ezclip.read_weights(bad)["w"], torch.zeros(4), 0)
    assert not Evil.mark.exists()


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_damaged_files_are_errors_or_correct(tmp_path):
    """EZCLIP_SLOW=1: thousands. Zip archives have checksums; in the other formats a changed number
    is a number, so that there only names and shapes can be compared."""
    model = small(prompts="none", adapters=False, vision_width=64, vision_layers=1, text_layers=1)
    traced = torch.jit.trace(model, golden_inputs(1, 1), check_trace=False)
    traced.save(str(tmp_path / "script.pt"))
    expected = model.state_dict()
    paths = write_formats(tmp_path, expected)
    rng, bad, loaded = random.Random(0), tmp_path / "bad.pt", 0
    began, attempts = time.monotonic(), 6000 if SLOW else 250
    for i in range(attempts):
        content = paths[i % len(paths)].read_bytes()
        where = rng.choice([rng.randrange(len(content)), rng.randrange(4000),  # the structure
                            len(content) - rng.randrange(1, 4000)])
        damaged, changed = bytearray(content), rng.randbytes(rng.choice([1, 1, 8, 999]))
        if i % 4 == 0:  # cut short, shifted or changed
            del damaged[where:]
        elif i % 4 == 1:
            damaged[where:where] = changed
        else:
            damaged[where:where + len(changed)] = rng.choice([changed, bytes(len(changed))])
        bad.write_bytes(damaged)
        try:
            found = EZCLIP.from_pretrained(bad, **PLAIN).state_dict()
        except ValueError as error:
            assert str(bad) in str(error)
            continue
        loaded += 1
        assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
        if content.startswith(b"PK"):
            assert all(torch.equal(v, expected[k]) for k, v in found.items()), i
    assert 0 < loaded < attempts
    assert time.monotonic() - began < 0.1 * attempts


def test_releases_are_found_downloaded_and_checked(tmp_path, monkeypatch):
    torch.save(small(**PLAIN).state_dict(), tmp_path / "clip.pt")
    content = (tmp_path / "clip.pt").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    served, cached = tmp_path / sha256 / "ViT-B-16.pt", tmp_path / ".cache/clip/ViT-B-16.pt"
    served.parent.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ezclip, "_URL", tmp_path.as_uri())
    monkeypatch.setitem(ezclip._RELEASES, "ViT-B/16", sha256)
    served.write_bytes(content + b"!")  # a transfer gone wrong leaves nothing behind
    refused("ViT-B/16", str(cached))
    assert not list(cached.parent.iterdir())
    served.write_bytes(content)
    assert EZCLIP.from_pretrained("ViT-B/16").weights_sha256 == sha256
    served.unlink()
    assert EZCLIP.from_pretrained("ViT-B/16", num_frames=2).config.num_frames == 2
    cached.write_bytes(b"something else")
    refused("ViT-B/16", "SHA-256")
    cached.unlink()
    refused("ViT-B/16", "put it at")
    refused("ViT-B/99")
    torch.save(small(**PLAIN).state_dict(), tmp_path / "clip.pt")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # neither HOME nor a passwd entry
    with pytest.raises(OSError, match="cannot get ViT-B/16: Could not determine home"):
        EZCLIP.from_pretrained("ViT-B/16")
    assert EZCLIP.from_pretrained(tmp_path / "clip.pt").config == Config(**SMALL)
    assert not Path("~").exists()


def test_the_readme_keeps_its_word(capsys):
    """Its first Python runs and prints what it says."""
    text = (HERE / "README.md").read_text()
    code, printed = text.split("```python\n")[1].split("```\n\n```\n")
    torch.set_num_threads(2)  # it is a ViT-B/16
    exec(code, {})
    torch.set_num_threads(1)
    assert capsys.readouterr().out == printed.split("```")[0]


def test_ezclip_works_alone(tmp_path):
    shutil.copy(HERE / "ezclip.py", tmp_path)
    code = ("import ezclip, torch; m = ezclip.EZCLIP(ezclip.Config(vision_layers=1));"
            "m(torch.zeros(1, 8, 3, 224, 224), torch.ones(2, 5).long())")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True,
                   env={**os.environ, "PYTHONPATH": ""})


# ---- the tokenizer ----

def test_tokens_of_known_texts():
    digest = hashlib.sha256(clip_tokenizer.VOCABULARY.read_bytes()).hexdigest()  # OpenAI's
    assert digest == "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
    tokens = clip_tokenizer.tokenize(["a photo of a cat", ""])
    assert tokens.shape == (2, 77) and tokens.dtype == torch.long
    assert tokens[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    assert tokens[1, :3].tolist() == [49406, 49407, 0]
    assert clip_tokenizer.encode("Hello&amp;amp; WORLD's  12") == [3306, 261, 1002, 568, 272, 273]
    text = "naïve café 日本 "
    assert clip_tokenizer.decode(clip_tokenizer.encode(text)) == text
    with pytest.raises(ValueError, match="82 tokens.*77 fit"):
        clip_tokenizer.tokenize("word " * 80)
    cut = clip_tokenizer.tokenize("word " * 80, truncate=True)
    assert cut.shape == (1, 77) and cut[0, -1] == 49407 and cut[0, -2] == cut[0, 1]
    assert clip_tokenizer.tokenize("word " * 75)[0, -1] == 49407


def test_tokens_equal_openais():
    openai, rng = peer("simple_tokenizer").SimpleTokenizer(), random.Random(0)
    alphabets = [range(32, 127), range(0x250), range(0x370, 0x600), range(0x3000, 0x9FFF),
                 range(0x1F300, 0x1FAFF), range(0xD800), [ord(c) for c in " '&;<>|stdmlre\n\u0130"]]
    texts = ["it's THEY'LL we'd", "&amp;lt;b&gt;", "<|endoftext|>a<|StartOfText|>", "1½² Ⅷ\x85"]
    texts += ["".join(chr(rng.choice(rng.choice(alphabets))) for _ in range(rng.randrange(40)))
              for _ in range(1500)]
    for text in texts:
        ids = openai.encode(text)
        assert clip_tokenizer.encode(text) == ids
        assert clip_tokenizer.decode(ids) == openai.decode(ids)


# ---- frames on disk ----

def save_frames(folder, count=5, size=(48, 40), value=None, name="img_{:05d}.jpg", first=1):
    folder.mkdir(parents=True)
    for i in range(count):
        colour = (40 * (i % 6), value or 0, 90)
        Image.new("RGB", size, colour).save(folder / name.format(i + first))
    return folder


def frames_folder(root, names=("Archery", "BabyCrawling"), clips=6, count=5):
    for i, name in enumerate(names):
        for k in range(clips):
            save_frames(root / name / f"clip{k}", count, value=100 * i + 1)
    return root


def test_class_names_in_all_spellings():
    for name, words in (("ApplyEyeMakeup", "apply eye makeup"), ("brush_hair", "brush hair"),
                        ("YoYo", "yo yo"), ("moving to the left", "moving to the left")):
        assert data.class_text(name) == words
    names = ["BrushHair", "can't", "cant", "A", "a b", "a_b"]
    for name, found in (("brush_hair", "BrushHair"), ("x", None), ("cant", "cant"), ("a", "A")):
        assert data.find_name(name, names) == found
    with pytest.raises(ValueError, match="A B may stand for a b or for a_b"):
        data.find_name("A B", names)


def test_evaluation_takes_the_official_frames_and_training_one_of_each_segment():
    for count, frames in ((8, 8), (12, 4), (164, 8), (300, 16), (5, 8), (1, 8), (7, 1), (6, 1),
                          (20_000, 8)):
        late = (count / frames - 1) / 2 if count >= frames else 0
        official = [math.floor(i * count / frames + late) + 1 for i in range(frames)]
        if frames == 1:
            official = [count // 2 + 1]
        assert (data.sample_frames(count, frames) + 1).tolist() == official
    assert data.sample_frames(12, 4).tolist() == [1, 4, 7, 10]  # symmetric, as the demo needs
    rng = np.random.default_rng(0)
    drawn = np.array([data.sample_frames(20, 8, rng) for _ in range(400)])
    for i, column in enumerate(drawn.T):
        assert set(column) == set(range(20 * i // 8, 20 * (i + 1) // 8))
    for count in (1, 3, 8):
        short = data.sample_frames(count, 8, rng)
        assert len(short) == 8 and set(short) == set(range(count)) and (np.diff(short) >= 0).all()


def test_crops(tmp_path):
    def cropped(image, size, crop=None):
        image.save(tmp_path / "a.png")
        return data.read_frame(tmp_path / "a.png", size, crop)

    rng = np.random.default_rng(0)
    for width, height in ((320, 240), (240, 320), (341, 256), (77, 50), (64, 64)):
        image = Image.fromarray(rng.integers(256, size=(height, width, 3), dtype=np.uint8))
        short = tv.resize(image, 56 * 256 // 224, Image.BICUBIC)
        near(cropped(image, 56), tv.pil_to_tensor(tv.center_crop(short, 56)), 0)
    draws = {data.random_crop(rng) for _ in range(4000)}
    assert len(draws) == 10 * 13
    assert all(cropped(image, 32, draw).shape == (3, 32, 32) for draw in draws)
    ramp = Image.fromarray(np.tile(np.arange(100, dtype=np.uint8), (80, 1))).convert("RGB")
    left, right = (cropped(ramp, 32, ((0.66, 0.66), (x, 2))) for x in (0, 4))
    assert left.min() <= 1 and left.max() <= 53 and right.min() >= 46 and right.max() >= 97
    # cut out and then resized, as in the official code: no pixel around the region has a share
    image = Image.fromarray(rng.integers(256, size=(80, 100, 3), dtype=np.uint8))
    region = image.crop((10, 21, 70, 73)).resize((32, 32), Image.BILINEAR)
    near(cropped(image, 32, ((0.75, 0.66), (1, 3))), tv.pil_to_tensor(region), 0)


def test_pixels_of_all_kinds_of_images(tmp_path):
    path, rng = tmp_path / "a.png", np.random.default_rng(0)

    def read(image, **options):
        image.save(path, **options)
        return np.asarray(data.read_frame(path)).astype(int)

    ramp = np.linspace(0, 1, 20 * 30).reshape(20, 30)
    for image, options in ((Image.fromarray((65535 * ramp).astype(np.uint16)), {}),
                           (Image.fromarray((65535 * ramp).astype(np.uint16)), {"format": "TIFF"}),
                           (Image.fromarray(((2**31 - 1) * ramp).astype(np.int32)), {"format": "TIFF"}),
                           (Image.fromarray((255 * ramp).astype(np.uint8)), {})):
        assert abs(read(image, **options) - 255 * ramp[..., None]).max() <= 1
    with pytest.raises(ValueError, match="a.png: .*floats"):
        read(Image.fromarray(ramp.astype(np.float32)), format="TIFF")
    values = (65535 * ramp).astype(np.uint16)
    values[:9] = 40_000
    assert (read(Image.fromarray(values), transparency=40_000)[:9] == 0).all()
    pixels = rng.integers(256, size=(20, 30, 3), dtype=np.uint8)
    turned = {1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1],
              5: pixels.swapaxes(0, 1), 6: np.rot90(pixels, -1),
              7: np.rot90(pixels, 2).swapaxes(0, 1), 8: np.rot90(pixels)}
    for orientation, expected in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert (read(Image.fromarray(pixels), exif=exif) == expected).all()
        found = data.read_frame(path, 16)
        Image.fromarray(np.ascontiguousarray(expected)).save(path)
        assert torch.equal(found, data.read_frame(path, 16))
    few = Image.fromarray(pixels // 128 * 255).quantize(8)
    assert (read(few) == pixels // 128 * 255).all()
    corner = few.getpixel((0, 0))
    black = np.where(np.asarray(few)[..., None] == corner, 0, pixels // 128 * 255)
    assert (read(few, transparency=corner) == black).all()
    alpha = rng.integers(256, size=(20, 30, 1), dtype=np.uint8)
    image = Image.fromarray(np.concatenate([pixels, alpha], 2))
    expected = pixels * (alpha / 255)
    assert abs(read(image) - expected).max() <= 1
    grey = Image.fromarray(np.concatenate([pixels[..., :1], alpha], 2), "LA")
    assert abs(read(grey) - expected[..., :1]).max() <= 1


def test_folders_that_nobody_made_are_left_out(tmp_path, capsys):
    root = frames_folder(tmp_path / "frames", clips=2)
    for name in ("@eaDir", "__MACOSX/Archery", "$RECYCLE.BIN", "lost+found", ".ipynb_checkpoints",
                 "Empty", "Archery/@eaDir/clip0"):
        (root / name).mkdir(parents=True)
    (root / "lost+found").chmod(0)
    (root / ".#lock").symlink_to("an editor's")
    split, _ = data.index_frames(root)
    assert split.classes == ["Archery", "BabyCrawling"] and len(split.clips) == 2
    assert "7 folders are empty or another program's" in capsys.readouterr().out
    (root / "lost+found").chmod(0o700)
    (root / "Gone").symlink_to("nowhere")
    with pytest.raises(ValueError, match="Gone: is a link to nothing"):
        data.index_frames(root)
    (root / "Gone").unlink()
    if os.geteuid():  # who may read everything
        (root / "Archery").chmod(0)
        with pytest.raises(PermissionError, match="Archery"):
            data.index_frames(root)
        (root / "Archery").chmod(0o700)


def test_classes_are_what_their_names_are(tmp_path):
    root, nfd = tmp_path / "frames", unicodedata.normalize("NFD", "Übung é")
    names = ["A", "a", "can't", "cant", "1_11", "11_1", nfd]
    for name in names:
        save_frames(root / name / "one")
    split = data.index_frames(root, whole=True)[1]
    nfc = [unicodedata.normalize("NFC", name) for name in names]
    assert split.classes == sorted(nfc) and len(split.clips) == 7
    assert data.find_name(unicodedata.normalize("NFD", "Été"), ["Été", "été"]) == "Été"
    for k, name in enumerate(("Été", unicodedata.normalize("NFD", "Été"))):
        save_frames(tmp_path / "two" / ("train", "val")[k] / name / "one")
    for split in data.index_frames(tmp_path / "two"):
        assert split.classes == ["Été"] and len(split.clips) == 1
    labels = "".join(f"{k},{unicodedata.normalize('NFC', name)}\n" for k, name in enumerate(names))
    lines = "".join(f"x/{unicodedata.normalize('NFC', name)}/one.avi 5 {k}\n"
                    for k, name in enumerate(names))
    assert listed(root, lines, labels).clips == [(f"{name}/one", k) for k, name in enumerate(names)]
    for line, word in (("a/one 0", "a/one is A by its label, but lies in a"),
                       ("can't/one 3", "is cant by its label"), ("11_1/one 4", "is 1_11 by")):
        with pytest.raises(ValueError, match=f"list.txt:1: .*{word}"):
            listed(root, line, labels)


def test_clips_are_a_function_of_seed_epoch_and_index(tmp_path):
    root = frames_folder(tmp_path / "frames")
    for i, path in enumerate(sorted(root.glob("*/*/*"))):  # frames that differ from side to side
        noise = np.random.default_rng(i).integers(256, size=(40, 48, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    split, _ = data.index_frames(root)

    def clip(seed=0, epoch=0, index=0, **options):
        options = {"train": True, "augment": True, "flip": True, **options}
        return data.Clips(split, 4, 32, seed=seed, **options)[epoch, index][0]

    first = clip()
    assert first.shape == (4, 3, 32, 32) and first.dtype == torch.uint8
    assert torch.equal(first, clip())
    for other in (clip(seed=1), clip(epoch=1), clip(index=1)):
        assert not torch.equal(first, other)
    flips = [torch.equal(clip(epoch=e).flip(-1), clip(epoch=e, flip=False)) for e in range(40)]
    same = [torch.equal(clip(epoch=e), clip(epoch=e, flip=False)) for e in range(40)]
    assert 8 < sum(flips) < 32 and sum(flips) + sum(same) == 40
    assert torch.equal(clip(train=False, augment=False), clip(5, 6, train=False, augment=False))


def test_colours_are_drawn_once_per_clip(tmp_path):
    folder = save_frames(tmp_path / "still", 1, value=50)
    for k in range(2, 5):
        shutil.copy(folder / "img_00001.jpg", folder / f"img_{k:05d}.jpg")
    clips = [data.load_clip(folder, 4, 16, np.random.default_rng(seed), augment=True)
             for seed in range(120)]
    assert all(torch.equal(clip[0], clip[3]) for clip in clips)
    grey = [(clip[0, 0] == clip[0, 1]).all().item() for clip in clips]
    assert 10 < sum(grey) < 40  # a fifth
    plain = data.load_clip(folder, 4, 16)[0].float().mean((1, 2))  # one colour, however cropped
    same = [abs(clip[0].float().mean((1, 2)) - plain).max() < 1.5 for clip in clips]
    assert 6 < sum(same) < 36  # 0.2 * 0.8
    with pytest.raises(ValueError, match="rng"):
        data.load_clip(folder, 4, 16, augment=True)


def test_folders_and_frames_as_users_have_them(tmp_path):
    root, real = tmp_path / "frames", save_frames(tmp_path / "elsewhere", 2)
    save_frames(root / "Brush hair #(1)" / "a clip.avi", 12, first=0)
    save_frames(root / "Brush hair #(1)" / "b.mp4", 1, name="{}.png")
    gaps = save_frames(root / "Übung" / "c", 3, name="frame{:d}.jpeg", first=9)
    for name in ("flow_x_00001.jpg", "flow_y_00001.jpg", "x_00001.jpg", "y_00002.jpg", "notes.txt"):
        (gaps / name).write_bytes(b"no frame")
    (root / ".hidden").mkdir()
    (root / "readme.txt").write_text("hello")
    (root / "Übung" / "linked").symlink_to(real)
    long = save_frames(root / "Übung" / "long", 1)
    for i in range(2, 20_001):
        (long / f"img_{i}.jpg").symlink_to("img_00001.jpg")
    for mode, size in (("L", (31, 17)), ("CMYK", (20, 90)), ("RGB", (1, 1))):
        Image.new(mode, size).save(real / "img_00003.jpg")
        assert data.read_frame(real / "img_00003.jpg", 32).shape == (3, 32, 32)
    splits = data.index_frames(root)
    assert all(split.classes == ["Brush hair #(1)", "Übung"] for split in splits)
    assert sum(len(split.clips) for split in splits) == 5
    for split, training in itertools.product(splits, (True, False)):
        loaded = data.Clips(split, 8, 32, train=training)
        assert all(loaded[0, i][0].shape == (8, 3, 32, 32) for i in range(len(loaded)))
    # frames come in natural order
    assert data.frame_names(gaps) == ["frame9.jpeg", "frame10.jpeg", "frame11.jpeg"]
    for text in ("frame_00_delay-0.04s.png, frame_01_delay-0.03s.png, frame_10_delay-0.02s.png",
                 "1305031102.175304.png, 1305031102.211214.png, 1305031103.011.png",
                 "shot.jpg, shot (2).jpg, shot (10).jpg", "3_of_12.png, 11_of_12.png"):
        (tmp_path / text).mkdir()
        for name in text.split(", "):
            (tmp_path / text / name).touch()
        assert data.frame_names(tmp_path / text) == text.split(", ")


def test_splits_without_lists(tmp_path):
    root = frames_folder(tmp_path / "frames", clips=11)
    save_frames(root / "Zumba" / "only")
    train_split, test_split = data.index_frames(root)
    assert train_split.classes == test_split.classes == ["Archery", "BabyCrawling", "Zumba"]
    hashes = {hashlib.sha256(f"clip{k}".encode()).hexdigest(): k for k in range(11)}
    smallest = {f"clip{hashes[h]}" for h in sorted(hashes)[:2]}
    assert set(test_split.clips) == {(f"{name}/{clip}", label) for clip in smallest
                                     for label, name in enumerate(test_split.classes[:2])}
    assert len(train_split.clips) == 19
    ucf = tmp_path / "ucf"
    for group in (1, 7, 8, 25):
        save_frames(ucf / "HandstandPushups" / f"v_HandStandPushups_g{group:02d}_c01")
        save_frames(ucf / "Archery" / f"v_Archery_g{group:02d}_c03.avi")
    for split, groups in zip(data.index_frames(ucf), ("08 25 08 25", "01 07 01 07")):
        assert re.findall(r"_g(\d+)", str(split.clips)) == groups.split()
    split = data.index_frames(ucf, whole=True)[1]
    assert len(split.clips) == 8 and split.source == "all clips"
    root, parts = tmp_path / "parts", ("rawframes_train", "rawframes_val")
    for part in parts:
        frames_folder(root / part, clips=2)
    for split, part in zip(data.index_frames(root), parts):
        assert split.classes == ["Archery", "BabyCrawling"]
        assert [clip for clip, label in split.clips if label == 1] == [
            f"{part}/BabyCrawling/clip0", f"{part}/BabyCrawling/clip1"]
    with pytest.raises(ValueError, match="list.txt:2: Archery/clip1 fits all of rawframes_train/A"):
        listed(root, "rawframes_val/Archery/clip0 5 0\nArchery/clip1 5 0\n")


def listed(root, lines, labels="0,Archery\n1,BabyCrawling\n", **options):
    """The training Split of a list with these lines."""
    path, names = root.with_name("list.txt"), root.with_name("labels.csv")
    path.write_text(lines, "utf-8", "surrogateescape")
    names.write_text(labels)
    return data.index_frames(root, path, labels=names, **options)[0]


@pytest.mark.parametrize("layout", ["classes", "flat"])
@pytest.mark.parametrize("text", [
    "/home/me/ucf/v_Archery_g01_c01 164 0\n/home/me/ucf/v_PullUps_g08_c01 90 1\n",  # official
    "Archery/v_Archery_g01_c01\t164   0\r\n\r\nPullUps\\v_PullUps_g08_c01 90 1",  # mmaction
    "\ufeffv_Archery_g01_c01.avi 0\nv_PullUps_g08_c01.mp4 1\n"])
def test_lists_of_others(tmp_path, layout, text):
    root, clips = tmp_path / "frames", [
        "Archery/v_Archery_g01_c01", "HandstandPushups/v_HandStandPushups_g01_c01",
        "PullUps/v_PullUps_g08_c01.avi"]
    if layout == "flat":
        clips = [clip.split("/")[1] for clip in clips]
    for clip in clips:
        save_frames(root / clip, 1)
    for labels in ("id,name\n0,Archery\n2,HandstandPushups\n1,PullUps\n",
                   "Archery\nPullUps\nHandstandPushups\n"):
        split = listed(root, text, labels)
        assert split.classes == ["Archery", "PullUps", "HandstandPushups"]
        assert split.clips == [(clips[0], 0), (clips[2], 1)]
    empty, test = data.index_frames(root, None, tmp_path / "list.txt", tmp_path / "labels.csv")
    assert empty.clips == [] and test.clips == split.clips
    listed_path = "x/HandstandPushups/v_HandstandPushups_g01_c01.avi"
    assert data.clip_finder(clips, [listed_path])(listed_path) == [clips[1]]  # two ways of UCF101


def test_lists_of_clips_with_odd_names(tmp_path):
    root = tmp_path / "flat"
    for name in ("v 0.avi", "v 1.avi", "v 2.avi", "v 2"):
        save_frames(root / name)
    split = listed(root, "D:\\x\\v 1.avi 31 7\nv 2 3\n/a/b/v 0.mp4 3\n",
                   '7,Baby Crawling\n3,"Archery, aiming"\n')
    assert split.classes == ["Archery, aiming", "Baby Crawling"]
    assert split.clips == [("v 1.avi", 1), ("v 2", 0), ("v 0.avi", 0)]  # an exact name wins
    root = frames_folder(tmp_path / "frames", clips=2)
    split = listed(root, "Archery/clip0 5 0\nArchery/clip0 0\nbaby crawling/clip1 3\n",
                   "3,Baby Crawling\n0,Archery\n")
    assert split.clips == [("Archery/clip0", 0), ("BabyCrawling/clip1", 1)]  # twice is once
    assert split.classes == ["Archery", "Baby Crawling"]


@pytest.mark.parametrize("line, word", [
    ("Archery/clip9 5 0", ": 1 of 2 clips have no folder: Archery/clip9; --a"),
    ("Zumba/clip2 5 1", ": 1 of 2 clips have no folder"), ("clip2 0", ":2: clip2 fits all of"),
    ("Archery/clip1 5 x", ":2: expected <clip>"), ("clip1", ":2: expected <clip>"),
    ("Archery/clip1 5 -1", ":2: expected <clip>"), ("\udcff", ": is not UTF-8"),
    ("clip1 5 0", ":2: clip1 fits all of Archery/clip1, Baby"),
    ("Archery/clip1 5 2", ":2: label 2 has no name"),
    ("Archery/clip0 5 1", ":2: Archery/clip0 is Baby"),
    ("archery/clip0.avi 5 0", ":2: Archery/clip0 would be archery/clip0.avi of Archery, and was Archery/clip0 of Archery"),
    ("\nBabyCrawling/clip1 5 0", ":3: BabyCrawling/clip1 is Archery by its label, but lies")])
def test_bad_list_lines_are_named(tmp_path, line, word):
    root = frames_folder(tmp_path / "frames", clips=3)
    with pytest.raises(ValueError, match=f"^{tmp_path}/list.txt{word}"):
        listed(root, f"Archery/clip0 5 0\n{line}\n")


def test_missing_clips_are_counted_and_named(tmp_path, capsys):
    root = frames_folder(tmp_path / "frames", clips=1)
    gone = [f"Archery/gone{i}" for i in range(12)]
    text = "".join(f"{clip} 5 0\n" for clip in gone)
    named = f"list.txt: 12 of 13 clips have no folder: {', '.join(gone[:10])}, ..."
    with pytest.raises(ValueError, match=re.escape(named)):
        listed(root, text + "Archery/clip0 0")
    split = listed(root, text + "Archery/clip0 0", allow_missing=True)
    assert split.clips == [("Archery/clip0", 0)] and named in capsys.readouterr().err
    for lines, word in ((text, "12 of 12"), ("\n", "names no clips")):
        with pytest.raises(ValueError, match=word):
            listed(root, lines, allow_missing=True)


@pytest.mark.parametrize("text, expected", [
    ("id,name\n1,Clap\n0,Archery\n", {0: "Archery", 1: "Clap"}),
    ("0,Holding a, b\n1,\"Quoted, c\"\n", {0: "Holding a, b", 1: "Quoted, c"}),
    ("1 ApplyEyeMakeup\r\n2 Archery\r\n", {1: "ApplyEyeMakeup", 2: "Archery"}),  # UCF101
    ("\ufeffturn, then jump\n360 flip\n\nrun\n", {0: "turn, then jump", 1: "360 flip", 2: "run"}),
    ("jump\n360 flip\n", {0: "jump", 1: "360 flip"}), ("class x\nrun", {0: "class x", 1: "run"}),
    ("100 m, sprint\n200 m, sprint\n", {0: "100 m, sprint", 1: "200 m, sprint"}),
    ("Turn,then\n3 point, shot\n", {0: "Turn,then", 1: "3 point, shot"}),
    ('"Turn, then"\nrun\n', {0: "Turn, then", 1: "run"}),
    ("A\na\n1_11\n11_1\n", {0: "A", 1: "a", 2: "1_11", 3: "11_1"}),
    ("0,Archery\n0,Clap\n", ":2: '0,Clap' has a number or a name for the second time"),
    ("0,Clap\n1,Clap\n", ":2: '1,Clap' has a number or a name for the second time"),
    ("0,Archery\nClap,1\n", ":2: expected id,name and not 'Clap,1'"),
    ("001 run\n002 hop\n", {1: "run", 2: "hop"}), ("1 A\n3 C\n", {1: "A", 3: "C"}),
    ("walk\n1 leg jump\nrun\n", {0: "walk", 1: "1 leg jump", 2: "run"}),
    ("run\n10,000 m\nhop\n", {0: "run", 1: "10,000 m", 2: "hop"}),
    ("1 A\n2 B\nC\n", ":3: expected id,name and not 'C'"),
    ("walk, fast\n1 leg jump\n", ":1: expected id,name"),
    ("0,Archery\n1,\n", ":2: expected id,name"), ("", ": holds no lines")])
def test_files_of_class_names(tmp_path, text, expected):
    path = tmp_path / "labels"
    path.write_text(text)
    if isinstance(expected, dict):
        assert data.read_labels(path) == expected
        return
    with pytest.raises(ValueError, match=f"^{path}{expected}"):
        data.read_labels(path)


def test_files_of_descriptions(tmp_path):
    said = "A person draws a bow \u2013 with \u201ccare\u201d,\nand shoots."
    text = ('SNo,Class Name,GPT3 discription\r\n0,Archery,"\n\n' + said
            + '"\r\n0,BabyCrawling,"\n\nA baby moves."\r\n')  # K600's numbers are all 0
    path = tmp_path / "gpt.csv"
    path.write_text(text, "utf-8", newline="")
    assert data.read_descriptions(path) == {"Archery": said, "BabyCrawling": "A baby moves."}
    path.write_text('{"0": "Brush hair: A person is.", "1": "Cartwheel: A: b"}')
    assert data.read_descriptions(path) == {"Brush hair": "Brush hair: A person is.",
                                            "Cartwheel": "Cartwheel: A: b"}
    for broken in ('{"Archery": ', '{"0": 3}', 'a,b\nc,"d', "a,b,c\n0,Archery\n"):
        path.write_text(broken)
        with pytest.raises(ValueError, match="gpt.csv: no descriptions"):
            data.read_descriptions(path)


# ---- training and evaluation ----

@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """`frames` on disk, a small `clip`, an `other` of its sizes, an `official` checkpoint; flags
    `common` to runs of a second, `bare` without a model; folder and content of one with `flags`."""
    folder = tmp_path_factory.mktemp("world")
    frames = str(frames_folder(folder / "frames", ("Archery", "BabyCrawling", "Clap")))
    sizes = dict(vision_width=64, vision_layers=2, vocab_size=49408, context_length=77)
    model = small(**sizes, **PLAIN)
    clip, other, official = (str(folder / f"{x}.pt") for x in ("clip", "other", "official"))
    torch.save(model.state_dict(), clip)
    torch.save({**model.state_dict(), "logit_scale": torch.tensor(1.0)}, other)
    torch.save({"model_state_dict": official_state(**sizes, num_frames=5), "epoch": 1}, official)
    bare = ["--data", frames, "--workers", "0", "--device", "cpu", "--batch-size", "4"]
    common = [*bare, "--clip", clip, "--num-frames", "4", "--epochs", "3", "--lr", "1e-3"]
    flags = [*common, "--prompt-lr", "0.01", "--seed", "3", "--eval-every", "2"]
    content = train.main([*flags, "--out", str(folder / "whole")])
    return SimpleNamespace(frames=frames, clip=clip, other=other, official=official, bare=bare,
                           common=common, flags=flags, whole=folder / "whole", content=content)


def fails(argv, word, status=2):
    """A command that cannot be done ends with a line that says why. Returns all that is printed."""
    output = io.StringIO()
    with contextlib.redirect_stderr(output), pytest.raises(SystemExit) as stop:
        data.command(lambda: train.main([*map(str, argv)]))
    errors = output.getvalue()
    line = errors.strip().splitlines()[-1]
    assert stop.value.code == status and re.search(f"^error: .*{word}", line), errors
    assert "Traceback" not in errors
    return errors


def learnt(out):
    """The step, the weights and the log of a last.pt, to compare runs."""
    saved = torch.load(out / "last.pt", weights_only=True)
    rows = [{k: x for k, x in row.items() if k not in ("seconds", "clips/s")}
            for row in saved["rows"]]
    return saved["step"], rows, {key: x.tolist() for key, x in saved["state_dict"].items()}


def test_a_run_and_what_it_leaves(world):
    out, content = world.whole, world.content
    assert json.loads((out / "results.json").read_text()) == content
    assert content["command"].startswith("python train.py --data ") and content["seed"] == 3
    assert content["versions"]["torch"] == torch.__version__ and content["device"] == "cpu"
    result = content["results"]["frames"]
    assert result["n"] == 3 and result["classes"] == 3 and result["top5"] == 100.0
    lines = list(csv.reader((out / "predictions.csv").open()))
    assert lines[0] == ["clip", "class", "class1", "p1", "class2", "p2", "class3", "p3"]
    assert len(lines) == 4
    assert result["top1"] == round(100 * sum(line[1] == line[2] for line in lines[1:]) / 3, 2)
    rows = list(csv.DictReader((out / "log.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["frames top1"] != "" for row in rows] == [False, True, True]
    assert float(rows[2]["frames top1"]) == pytest.approx(result["top1"], abs=0.01)
    for row in rows:
        total = float(row["contrastive"]) + float(row["motion"])
        assert float(row["loss"]) == pytest.approx(total, rel=1e-4)
    saved = ezclip.read_weights(out / "last.pt")
    sizes = sum(v.numel() for v in saved["state_dict"].values())
    assert content["trainable"] == sizes and all(map(ezclip.is_new, saved["state_dict"]))
    assert saved["step"] == 9 and saved["classes"] == ["Archery", "BabyCrawling", "Clap"]
    others, prompts = saved["optimizer"]["param_groups"]
    assert prompts["lr"] == pytest.approx(10 * others["lr"])
    digest = hashlib.sha256(Path(world.clip).read_bytes()).hexdigest()
    assert saved["clip_sha256"] == digest and not list(out.glob("*.tmp"))


def test_training_moves_what_is_trainable_and_nothing_else(world, tmp_path, monkeypatch):
    original, encode_text, texts = train.train, EZCLIP.encode_text, set()

    def spy(model, *rest):
        spy.after = model.state_dict()  # has the memory of the model
        spy.before = {name: value.clone() for name, value in spy.after.items()}
        return original(model, *rest)

    def listen(model, tokens):
        if model.training:
            texts.update(map(str, tokens.tolist()))
        return encode_text(model, tokens)

    monkeypatch.setattr(train, "train", spy)
    monkeypatch.setattr(EZCLIP, "encode_text", listen)
    for flags in ((), ("--tune", "all"), ("--prompts", "none", "--temporal-adapter")):
        train.main([*world.common, *flags, "--out", str(tmp_path / "-".join(("run", *flags)))])
        for name, value in spy.after.items():
            moved = not torch.equal(value, spy.before[name])
            assert moved == (ezclip.is_new(name) or "--tune" in flags), (name, flags)
    assert len(texts) > 20  # a template is drawn for each clip, of 16 for 3 classes
    flags = ["--activation", "gelu", "--no-adapters", "--prompts", "shallow", "--temporal-adapter"]
    config = train.build_model(train.parser().parse_args([*world.common, *flags])).config
    assert (config.activation, config.adapters, config.prompts) == ("gelu", False, "shallow")
    assert config.temporal_adapter and config.num_frames == 4


def make_trouble(kind, frames):
    if isinstance(kind, signal.Signals):
        os.kill(os.getpid(), kind)
    if kind == "power cut":
        raise ValueError(kind)
    if kind == "torn frames":
        for path in frames.glob("*/*/*"):
            path.write_bytes(path.read_bytes()[:200])
    if kind == "killed worker":
        worker, = multiprocessing.active_children()
        worker.kill()
        time.sleep(0.5)  # in which the news arrives
    if kind == "full disk":
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, hard))


SIGNALLED = "stopped; step {} of 9 is saved: the same command with --resume goes on"


@pytest.mark.parametrize("where, call, step, kind, error", [
    ("contrastive_loss", 4, 4, signal.SIGINT, SIGNALLED),
    ("contrastive_loss", 4, 4, signal.SIGTERM, SIGNALLED),
    ("class_probabilities", 1, 6, signal.SIGINT, SIGNALLED),
    ("write_csv", 2, 6, signal.SIGTERM, SIGNALLED),
    ("contrastive_loss", 5, 3, "power cut", "power cut"),
    ("contrastive_loss", 8, 6, "power cut", "power cut"),
    ("contrastive_loss", 5, 3, "torn frames", r"\S+/frames/\S+\.jpg: unreadable .*"),
    ("contrastive_loss", 4, 3, "killed worker", "DataLoader worker .*"),
    ("contrastive_loss", 5, 3, "full disk", r"\S+/out/(last\.pt|log\.csv): cannot be written "
     r"\(File too large\); nothing was changed")])
def test_a_stopped_run_goes_on_and_equals_one_that_never_stopped(
        where, call, step, kind, error, world, tmp_path, monkeypatch):
    """Trouble in a step, in an evaluation, between them: from the last save on all is the same."""
    out, frames, calls = tmp_path / "out", tmp_path / "frames", itertools.count(1)
    shutil.copytree(world.frames, frames)
    original, limits = getattr(train, where), resource.getrlimit(resource.RLIMIT_FSIZE)
    flags = [*world.flags, "--data", str(frames), "--out", str(out)]
    status = 130 if isinstance(kind, signal.Signals) else 2

    def troubled(*args):
        if next(calls) == call:
            make_trouble(kind, frames)
        return original(*args)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(train, where, troubled)
            fails([*flags, "--workers", int(kind == "killed worker")],
                  error.replace("{}", str(step)) + "$", status)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    shutil.copytree(world.frames, frames, dirs_exist_ok=True)
    assert learnt(out)[0] == step and not list(out.glob("*.tmp"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    (out / "last.pt.tmp").write_bytes(b"what a process that is killed may leave")
    for workers in ("2", "0"):  # the second has nothing left to do but to evaluate
        again = train.main([*flags, "--resume", "--workers", workers])
        assert again["results"] == world.content["results"]
        assert learnt(out) == learnt(world.whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group(number, world, tmp_path):
    """It reaches the processes that load clips too, and is nothing to them."""
    out = tmp_path / "run"
    flags = [*world.common, "--epochs", "3000", "--workers", "2", "--out", str(out)]
    with subprocess.Popen([sys.executable, HERE / "train.py", *flags], text=True,
                          stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                          start_new_session=True) as process:
        while not (out / "log.csv").exists() and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, number)
        errors = process.communicate(timeout=60)[1]
    step, line = learnt(out)[0], errors.splitlines()[-1]
    assert step >= 3 and "Traceback" not in errors, errors
    assert line.startswith(f"error: stopped; step {step} of 9000 is saved"), errors
    assert process.returncode == 130


@pytest.mark.parametrize("error, word", [
    (KeyError("a bug"), "'a bug'$"),
    (RuntimeError("unable to write to file </torch_1>: No space left"), "--workers 0 does without$")])
def test_what_a_loading_process_raises_is_one_line(error, word, world, tmp_path, monkeypatch):
    def load(*_, **__):
        raise error

    monkeypatch.setattr(data, "sample_frames", load)
    errors = fails([*world.common, "--workers", "1", "--out", tmp_path], word)
    assert errors.count("error") == 1
    clips = [(torch.zeros(2, 3, 4, 4), k, k) for k in range(2)]
    assert data._collate(clips)[1:] == ((0, 1), (0, 1))  # no tensors: see there


# ---- pieces and processes ----

def in_processes(world_size, work, *arguments):
    """Call work(*arguments) in processes that are what torchrun makes; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def process(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
                          LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
        # what is forked cannot use a GPU, and needs none
        torch.cuda.is_available, torch.cuda.device_count = (lambda: False), (lambda: 0)
        work(*arguments)

    fork = multiprocessing.get_context("fork")
    running = [fork.Process(target=process, args=(rank,)) for rank in range(world_size)]
    for p in running:
        p.start()
    for p in running:
        p.join(60)
    return [p.exitcode for p in running]


@pytest.mark.parametrize("settings", [
    dict(), dict(prompts="none"), dict(adapters=False), dict(recompute=True), PLAIN])
def test_a_step_in_pieces_is_the_step(settings):
    """In every gradient, also of what lies behind the features or has none."""
    settings = dict(vocab_size=49408, context_length=77, drop_path=0.0, attention_dropout=0.0,
                    prompt_dropout=0.0, **settings)
    args = train.parser().parse_args(["--device", "cpu"])
    found = []
    for chunk in (5, 2, 1):
        model = randomised(small(**settings)).train()
        model.logit_scale.requires_grad_()
        videos = torch.cat([NOISE, NOISE.flip(1)[:2]])
        tokens = clip_tokenizer.tokenize(["a", "b", "c d", "e", "f"])
        losses = train.take_step(model, videos, tokens, torch.tensor([0, 1, 2, 0, 3]), chunk,
                                 args, 0)
        found.append((losses, {k: p.grad for k, p in train.trained(model).items()}))
    plain = model.similarity(model.encode_video(videos), model.encode_text(tokens))
    expected = contrastive_loss(plain, torch.tensor([0, 1, 2, 0, 3])).item()
    assert found[0][0]["contrastive"] == pytest.approx(expected)
    for losses, gradients in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-5)
        for name, gradient in gradients.items():
            near(gradient, found[0][1][name], 1e-5)
            assert gradient.abs().max() > 0


@pytest.mark.parametrize("change", ["", "recompute", pytest.param("compile", marks=slow)])
def test_a_piece_draws_the_same_masks_twice(change, monkeypatch):
    rates = dict(drop_path=0.3, attention_dropout=0.3, prompt_dropout=0.3)
    sizes = dict(vocab_size=49408, context_length=77, recompute=change == "recompute")
    model = randomised(small(**rates, **sizes)).train()
    if change == "compile":
        model.visual.compile()
        model.transformer.compile()
    encoded = []
    for name in ("encode_frames", "encode_text"):
        def encode(x, encode=getattr(model, name)):
            encoded.append(encode(x))
            return encoded[-1]
        monkeypatch.setattr(model, name, encode)
    args = train.parser().parse_args(["--device", "cpu"])
    tokens = clip_tokenizer.tokenize(["a", "b", "c d"])
    train.take_step(model, NOISE, tokens, torch.arange(3), 1, args, 0)
    assert len(encoded) == 10  # pieces 0 1 2, and again 1 0
    for first, again in ((2, 6), (3, 7), (0, 8), (1, 9)):
        near(encoded[first].detach(), encoded[again].detach(), 0)
    assert not torch.equal(encoded[0], encoded[2])


@pytest.mark.parametrize("more, sizes", [
    ([], (2, 3, 4)), (["--tune", "all"], [2]), (["--no-adapters"], [2])])
def test_processes_with_pieces_equal_one_process(more, sizes, world, tmp_path):
    """Also with weights behind the features, and where the texts have none to train."""
    flags = [*world.common, "--batch-size", "5", "--epochs", "4", "--chunk", "2", *more, "--out"]
    train.main([*flags, str(tmp_path / "1")])
    _, rows, expected = learnt(tmp_path / "1")
    for size in sizes:
        out = tmp_path / str(size)
        assert in_processes(size, train.main, [*flags, str(out)]) == [0] * size
        _, others, weights = learnt(out)
        for row, other in zip(rows, others, strict=True):
            assert row == pytest.approx(other, rel=1e-3)
        for name, values in weights.items():
            near(values, expected[name], 1e-3)


def test_processes_test_every_clip_once(world, tmp_path):
    """And write the very files of one process, also where there are more of them than batches."""
    test = ["--test-list", str(tmp_path / "list"), "--labels", str(tmp_path / "labels")]
    clips = [f"{name}/clip{k} {i}" for i, name in enumerate(("Archery", "Clap")) for k in range(6)]
    (tmp_path / "list").write_text("\n".join(clips))
    (tmp_path / "labels").write_text("0,Archery\n1,Clap\n")
    evaluate = [*world.bare, *test, "--checkpoint", str(world.whole / "last.pt"), "--eval-only",
                "--batch-size", "5", "--out"]
    for size in (1, 2, 4):
        assert in_processes(size, train.main, [*evaluate, str(tmp_path / f"e{size}")]) == [0] * size
        for name in ("predictions.csv", "results.json"):
            one, many = ((tmp_path / f"e{k}" / name).read_text() for k in (1, size))
            assert many.replace(f"/e{size}", "/e1") == one


def test_processes_stop_together_and_go_on(world, tmp_path, monkeypatch):
    flags = [*world.common, "--batch-size", "5", "--out"]
    assert in_processes(2, train.main, [*flags, str(tmp_path / "whole")]) == [0, 0]

    def stopped(change):
        train.contrastive_loss = change
        data.command(lambda: train.main([*flags, str(tmp_path / "out"), "--resume"]))

    def terminate(*arguments, calls=[]):
        calls.append(None)
        if len(calls) == 4 and train.rank():
            os.kill(os.getpid(), signal.SIGTERM)
        return contrastive_loss(*arguments)

    def fail(*arguments, calls=[]):
        calls.append(None)
        if len(calls) == 2 and train.rank():
            raise ValueError("a process has died")
        return contrastive_loss(*arguments)

    assert in_processes(2, stopped, terminate) == [130, 130]
    assert learnt(tmp_path / "out")[0] == 4
    assert in_processes(2, stopped, fail) == [2, 2]
    assert in_processes(2, stopped, contrastive_loss) == [0, 0]
    assert learnt(tmp_path / "out") == learnt(tmp_path / "whole")


def test_a_second_ctrl_c_ends_at_once():
    with train.stop_signals() as stopped, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


START = ("import sys, torch, data, train; train.SAVE_SECONDS = 0;"
         "torch.set_num_threads(1);"  # as here: other numbers of threads round otherwise
         "data.command(lambda: train.main(sys.argv[1:]))")


@slow
def test_a_run_that_is_killed_at_fifty_moments(world, tmp_path):
    rng, kills, steps = random.Random(0), 0, set()
    flags = [*world.common, "--epochs", "400", "--out"]
    train.main([*flags, str(tmp_path / "whole")])
    run = [sys.executable, "-u", "-c", START, *flags, str(tmp_path / "out"), "--resume"]
    while True:
        with subprocess.Popen(run, cwd=HERE, stderr=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, text=True) as process:
            if kills < 50:  # from when the run has begun, or sometimes before
                while rng.random() > 0.02 and "flips" not in process.stdout.readline():
                    pass
                time.sleep(rng.uniform(0, 0.6))
                process.kill()
                kills += 1
            process.communicate(timeout=120)
        if process.returncode == 0:
            break
        if (tmp_path / "out/last.pt").exists():
            steps.add(learnt(tmp_path / "out")[0])
    assert kills == 50 and len(steps) > 15, sorted(steps)  # they fell at many different steps
    assert learnt(tmp_path / "out") == learnt(tmp_path / "whole")


def test_a_run_stops_when_its_numbers_are_not_finite(world, tmp_path, monkeypatch):
    state = torch.load(world.clip, weights_only=True)
    torch.save({**state, "logit_scale": torch.tensor(1e9)}, tmp_path / "clip.pt")
    flags = [*world.common, "--out", tmp_path / "run"]
    assert "/clip" in fails([*flags, "--clip", tmp_path / "clip.pt"], "step 0: the loss is")
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    monkeypatch.setattr(train, "learning_rate", lambda step, *_: math.nan if step == 4 else 1.0)
    fails(flags, "step 5: the weights are no longer finite")
    assert learnt(tmp_path / "run")[0] == 4


def test_runs_start_from_checkpoints_resume_and_are_evaluated(world, tmp_path):
    """What an official checkpoint, or a run of ours, has learnt is kept."""
    state = torch.load(world.official, weights_only=True)["model_state_dict"]
    start = world.official
    for out in (tmp_path / "first", tmp_path / "second"):
        flags = [*world.bare, "--epochs", "1", "--lr", "0", "--checkpoint", str(start), "--out"]
        content = train.main([*flags, str(out)])
        saved = ezclip.read_weights(out / "last.pt")["state_dict"]
        assert torch.equal(saved["visual.transformer.temporal_prompts"],
                           state["visual.transformer.T_prompt_embeddings"])
        assert train.main([*flags, str(out), "--resume"])["results"] == content["results"]
        again = train.main([*flags, f"{out}-again", "--eval-only"])
        assert again["results"] == content["results"] and again["trainable"] == content["trainable"]
        start = out / "last.pt"
    evaluate = [*world.bare, "--eval-only", "--resume", "--out"]
    plain = train.main([*evaluate, str(tmp_path / "plain"), "--clip", world.clip])
    assert plain["results"]["frames"]["n"] == 3 and plain["trainable"] == 0
    said = ["--checkpoint", str(out / "last.pt"), "--mean", *map(str, ezclip.CLIP_MEAN)]
    again = train.main([*evaluate, str(tmp_path / "again"), *said])  # what it has may be said
    assert again["results"] == content["results"]
    fails([*evaluate, out], "which --eval-only would write over")
    single = frames_folder(tmp_path / "single", clips=1)
    fails([*evaluate, tmp_path / "no", "--data", single], "single: no test clips")
    fails([*evaluate, tmp_path / "no", "--checkpoint", world.clip], "is plain CLIP")
    assert not (tmp_path / "no").exists()


def test_resume_starts_where_nothing_is_and_refuses_another_run(world, tmp_path):
    out = tmp_path / "run"
    assert train.main([*world.common, "--out", str(out), "--resume"])["results"]
    before = {path: path.read_bytes() for path in out.iterdir()}
    more = frames_folder(tmp_path / "more", ("Archery", "BabyCrawling", "Clap"), clips=7)
    saved = ezclip.read_weights(out / "last.pt")
    for name, change in (("damaged", {"optimizer": {"state": {}}}), ("bomb", {"args": [1]})):
        (tmp_path / name).mkdir()
        torch.save({**saved, **change}, tmp_path / name / "last.pt")
    flags = [*world.common, "--out", out]
    assert fails(flags, "holds a run; --resume").count("\n") == 1
    for change, word in (
            (("--lr", "0.5"), "the run has --lr 0.001, not 0.5"),
            (("--num-frames", "2"), "--num-frames 4, not 2"), (("--seed", "1"), "--seed 0, not 1"),
            (("--data", more), "other training clips"),
            (("--out", tmp_path / "damaged"), "a damaged one"),
            (("--out", tmp_path / "bomb"), "a damaged one"),
            (("--clip", world.other), "another CLIP")):
        assert fails([*flags, "--resume", *change], word).count("\n") == 1
    assert before == {path: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("name, flips", [
    ("Clap", True), ("turn left", False), ("SwipeRight", False), ("swipe-left (2)", False),
    ("Copyright", True), ("leftover", True)])
def test_clips_are_not_flipped_where_sides_matter(name, flips, world, tmp_path, capsys):
    """And there is no need of more than a frame in a clip, and a clip in a class."""
    root, out = frames_folder(tmp_path / "frames", ("Archery", name), clips=1, count=1), tmp_path
    flags = ["--data", str(root), "--num-frames", "1", "--epochs", "1", "--out", str(out)]
    assert train.main([*world.common, *flags])["results"] == {} and (out / "last.pt").exists()
    assert ("with flips" in capsys.readouterr().out) == flips


def test_a_checkpoint_is_loaded_like_any_weights_file(world, tmp_path):
    """By one call, with the CLIP that it names, or that moved; prompts go to other frame counts."""
    saved, clip = map(ezclip.read_weights, (world.whole / "last.pt", world.clip))
    path, moved = tmp_path / "last.pt", shutil.copy(world.clip, tmp_path / "moved.pt")
    torch.save(saved, path)
    for options in ({}, {"clip": moved}):
        model = EZCLIP.from_pretrained(path, **options)
        assert model.config.num_frames == 4 and model.weights_adapted and not model.training
        for name, p in model.named_parameters():
            assert torch.equal(p, (saved["state_dict"] if ezclip.is_new(name) else clip)[name])
    assert EZCLIP.from_pretrained(path, num_frames=2).config.num_frames == 2
    shutil.copy(world.other, moved)
    refused(moved, "holds its own CLIP", clip=world.clip)
    config = {**saved["config"], "activation": "gelu"}
    tuned = {"state_dict": clip, "config": config}  # --tune all
    torch.save({**saved, **tuned}, path)
    assert EZCLIP.from_pretrained(path).config.activation == "gelu"
    former = {name: saved[name] for name in saved if name != "config"}
    torch.save({**former, "activation": "gelu", "num_frames": 4}, path)
    assert EZCLIP.from_pretrained(path).config.activation == "gelu"
    for change, settings, word in (
            ({}, dict(clip=moved), "last.pt: was trained on another CLIP than .*moved.pt"),
            ({}, dict(prompts="none"), "has prompts 'deep', not 'none'"),
            ({"config": {"activation": "relu"}}, {}, "activation"), ({"clip": [1]}, {}, "last.pt"),
            ({"clip": "gone.pt"}, {}, "gone.pt: no such file.*--clip"),
            ({"state_dict": {}}, {}, "missing: .*adapter.fc1"),
            ({"state_dict": saved["state_dict"] | {"a": torch.ones(1)}}, {}, "unexpected: a$")):
        torch.save({**saved, **change}, path)
        refused(path, word, **settings)


def test_precision_is_a_flag(world):
    args = [train.parser().parse_args([*world.bare, "--precision", precision])
            for precision in ("fp32", "bf16")]
    model = EZCLIP.from_pretrained(world.whole / "last.pt")
    split, _ = data.index_frames(world.frames)
    (fp32, bf16) = [train.evaluate(model, split, a)["predictions"] for a in args]
    assert fp32 != bf16
    for row, rounded in zip(fp32, bf16):
        assert row["p1"] == pytest.approx(rounded["p1"], abs=0.05)


def test_accuracy_counts_every_clip(world):
    """Against a loop over clips and templates; the batches do not divide the number of clips."""
    templates = ["{}", "a video of {}, an action"]
    args = train.parser().parse_args([*world.common, "--templates", *templates])
    split, _ = data.index_frames(world.frames)
    model = EZCLIP.from_pretrained(world.clip, num_frames=4)
    texts = [[template.replace("{}", data.class_text(name)) for name in split.classes]
             for template in templates]
    texts = [model.encode_text(clip_tokenizer.tokenize(text)).detach() for text in texts]
    expected = []
    for folder, label in split.clips:
        paths = sorted(Path(world.frames, folder).iterdir())
        video = [data.read_frame(paths[i], 32) for i in data.sample_frames(len(paths), 4)]
        features = model.encode_video(torch.stack(video)[None]).detach()
        cosines = torch.stack([torch.cosine_similarity(features, text) for text in texts])
        probabilities = (100 * cosines).softmax(-1).mean(0)
        row = {"clip": folder, "class": split.classes[label]}
        for place, k in enumerate(probabilities.argsort(descending=True), 1):
            row[f"class{place}"] = split.classes[k]
            row[f"p{place}"] = pytest.approx(probabilities[k].item(), abs=1e-4)
        expected.append(row)
    result = train.evaluate(model, split, args)
    assert result.pop("predictions") == expected
    right = sum(row["class"] == row["class1"] for row in expected)
    assert result == {"top1": round(100 * right / 15, 2), "top5": 100.0, "n": 15, "classes": 3,
                      "split": split.source}


def test_batches_are_a_function_of_the_step():
    whole = list(train.batches(10, 4, 0, 6, seed=1))
    assert list(train.batches(10, 4, 3, 6, seed=1)) == whole[3:]
    for epoch in range(3):
        keys = whole[2 * epoch] + whole[2 * epoch + 1]
        assert len({i for _, i in keys}) == 8 and {e for e, _ in keys} == {epoch}
    assert whole != list(train.batches(10, 4, 0, 6, seed=2))
    assert [len(batch) for batch in train.batches(3, 4, 0, 2, seed=1)] == [3, 3]


def test_descriptions_stand_for_class_names(world, tmp_path):
    path, flags = tmp_path / "texts.json", ["--descriptions", str(tmp_path / "texts.json")]
    path.write_text('{"0": "archery: He shoots.", "1": "Baby Crawling: A baby.", "2": "clap: Up."}')

    def said(classes, *more):
        args = train.parser().parse_args([*flags, *more])
        return [[clip_tokenizer.decode(t[1:t.argmax()]).strip() for t in row]
                for row in train.tokens_of(classes, args)]

    assert said(["Clap", "Archery"]) == [["clap : up .", "archery : he shoots ."]]
    assert said(["Clap"], "--templates", "{}", "now {}")[1] == ["now clap : up ."]
    assert train.main([*world.common, *flags, "--out", str(tmp_path / "run")])["results"]
    path.write_text(json.dumps({"2": "clap: " + "very " * 80}))
    for classes, word in ((["Clap"], "Clap: a text has 84 tokens"),
                          (["Waving", "Clap"], "texts.json: has no description of Waving")):
        with pytest.raises(ValueError, match=word):
            said(classes)


@pytest.mark.parametrize("flags, word", [
    ("--data nowhere", "nowhere: no such folder"),
    ("--data empty", "empty/Archery/clip: holds no frames"),
    ("--data first", "img_00001.jpg: unreadable frame"),
    ("--data torn --num-frames 5 --workers 1", "img_00003.jpg: unreadable frame"),
    ("--data videos", "holds no folders <class>/<clip>/ with frames"),
    ("--data frames/Archery", "need --train-list or --test-list"),
    ("--train-list gone.txt --labels labels.csv", "gone.txt: 1 of 2 clips have no folder: Arche"),
    ("--train-list none.txt --labels labels.csv", "none.txt"),
    ("--test-list gone.txt", "gone.txt: lists go with --labels"),
    ("--clip none.pt", "none.pt"), ("--clip foreign.pt", "foreign.pt: "),
    ("--clip file", "file: cannot be read as weights"), ("--checkpoint foreign.pt", "foreign.pt"),
    ("--checkpoint none.pt", "none.pt"), ("--checkpoint clip.pt", "leave `clip`"),
    ("--num-frames 0", "--num-frames: must be at least 1"),
    ("--batch-size 0", "--batch-size: must be at least 1"),
    ("--lr nan", "--lr: must be at least 0"), ("--device warp", "--device"),
    ("--templates action", "'action' has no {} for the class name"),
    ("--templates " + "{}" * 60, "tokens with start and end, 77 fit"),
    ("--out file/run", "file/run"), ("--prompts none --no-adapters", "nothing to train"),
    ("--lerning-rate 1", "--lerning-rate"), ("--descriptions labels.csv", "labels.csv")])
def test_bad_input_is_one_line_and_status_2(flags, word, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("frames", "torn", "first"):
        frames_folder(Path(name), clips=4)
    for path in Path("torn").glob("*/*/img_00003.jpg"):
        path.write_bytes(path.read_bytes()[:300])
    for path in Path("first").glob("Archery/*/img_00001.jpg"):
        path.write_bytes(b"no jpeg")
    for name in ("empty/Archery/clip", "videos/Archery"):
        Path(name).mkdir(parents=True)
    for name, text in (("file", ""), ("videos/Archery/a.avi", "x"),
                       ("labels.csv", "0,Archery\n1,Baby\n"),
                       ("gone.txt", "Archery/clip1 0\nArchery/clip77 0\n")):
        Path(name).write_text(text)
    torch.save(nn.Linear(2, 2).state_dict(), "foreign.pt")
    shutil.copy(world.clip, "clip.pt")
    files = sorted(tmp_path.rglob("*"))
    flags = [*world.common, "--data", "frames", "--out", "out", *flags.split()]
    errors = fails(flags, word)
    assert not Path("out/last.pt").exists()
    if "torn" not in flags:  # a run that has begun may leave a folder, and a progress bar
        assert errors.count("\n") == 1 and files == sorted(tmp_path.rglob("*"))
