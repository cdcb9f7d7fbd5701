"""Tests: offline, small random models. Slower ones run with EZCLIP_SLOW=1, those that compare with
other packages where `clip-anytorch` (OpenAI's code) and `transformers` are installed."""

import contextlib
import csv
import hashlib
import importlib.util
import io
import json
import math
import os
import pickle
import random
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

import clip_tokenizer
import data
import ezclip
import train
from ezclip import EZCLIP, Config, class_probabilities, contrastive_loss, motion_loss

HERE = Path(__file__).parent
SMALL = dict(embed_dim=32, image_size=32, patch_size=8, vision_width=128, vision_layers=3,
             context_length=16, vocab_size=100, text_width=64, text_layers=2)
slow = pytest.mark.skipif(os.environ.get("EZCLIP_SLOW") != "1", reason="set EZCLIP_SLOW=1")


def peer(name):
    """OpenAI's `model` or `simple_tokenizer`, loaded as a file: its package does not import."""
    spec = importlib.util.find_spec("clip")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("clip-anytorch is not installed")
    path = Path(spec.submodule_search_locations[0]) / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"openai_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def near(a, b, tolerance=1e-5):
    a, b = (torch.as_tensor(x, dtype=torch.float32) for x in (a, b))
    assert a.shape == b.shape and (a - b).abs().max() <= tolerance, (a - b).abs().max()


# ---- equal to the official code ----

GOLDEN = {  # what the official code computes for the weights of `official_state`, with labels 0 1 0
    "deep": dict(
        num_frames=4, vision_layers=3, prompts="deep", temporal_adapter=False, trainable=30848,
        logits=[[-0.22211963, -0.066169381, 2.3303149], [-1.0319574, -0.60340685, 2.3297606],
                [-1.0103726, -0.79162985, 2.0138543]],
        frames=[[1.1500313, 0.45431387, -1.7114942], [1.1355302, 0.14332947, -1.7301233],
                [0.58403343, 0.3820172, -1.3743132]],
        kl=(1.5591706, 0.69128489), motion=0.75155944, adamw=[1.8767872, 1.406703, 1.3419107],
        gradients={"visual.transformer.temporal_prompts": 0.081223071,
                   "visual.transformer.resblocks.0.adapter.fc1.weight": 2.0930386,
                   "transformer.resblocks.0.adapter.fc1.weight": 2.5979745}),
    "shallow": dict(
        num_frames=8, vision_layers=2, prompts="shallow", temporal_adapter=False, trainable=21984,
        logits=[[0.50285494, 0.028942347, 2.1537738], [-0.096601009, -0.56655496, 1.8871311],
                [0.28456664, 0.12154901, 2.1961598]],
        frames=[[1.9044369, 1.6573672, -1.661504], [1.2966094, 1.3072786, -1.1979185],
                [1.1255158, 1.7059793, -0.8341617]],
        kl=(1.1871938, 0.71938288), motion=0.76310509, adamw=[1.7163935, 1.4647655, 1.4604343],
        gradients={"visual.transformer.temporal_prompts": 0.074075818,
                   "visual.transformer.resblocks.0.adapter.fc1.weight": 2.0708897,
                   "transformer.resblocks.0.adapter.fc1.weight": 2.3949673}),
    "no_prompts": dict(
        num_frames=4, vision_layers=3, prompts="none", temporal_adapter=False, trainable=29312,
        logits=[[-0.33395055, -0.045354679, 2.4126327], [-1.0448312, -0.54493672, 2.3624659],
                [-1.110914, -0.71627998, 2.0659275]],
        frames=[[1.1059914, 0.43935481, -1.6018614], [1.0301777, 0.25776422, -1.5667386],
                [0.52227217, 0.34845197, -1.3254588]],
        kl=(1.6011722, 0.69001609), motion=0.74505448, adamw=[1.8906486, 1.4141095, 1.341691],
        gradients={"visual.transformer.resblocks.0.adapter.fc1.weight": 2.0688183,
                   "transformer.resblocks.0.adapter.fc1.weight": 2.6706679}),
    "temporal_adapter": dict(
        num_frames=4, vision_layers=3, prompts="none", temporal_adapter=True, trainable=54368,
        logits=[[-2.2227631, -0.22618061, 0.16822168], [-2.2497141, 0.31690243, 0.64118052],
                [-2.5180032, 0.38675117, 0.88018358]],
        frames=[[1.3940834, -0.96934175, -0.84976763], [0.99198455, -1.4649835, -0.60307449],
                [1.1561804, -1.3435769, -0.6822468]],
        kl=(1.1575174, 0.63825876), motion=0.79732829, adamw=[1.6952164, 1.4565101, 1.3566487],
        gradients={"visual.transformer.resblocks.0.adapter.fc1.weight": 1.806715,
                   "visual.transformer.resblocks.1.temporal_adapter.fc2.bias": 0.26457962,
                   "transformer.resblocks.0.adapter.fc1.weight": 1.22648}),
}
GOLDEN_TEXT = [[-1.3927568, 0.87939143], [0.16519651, -1.2557135], [-0.46238202, -0.80843037]]


def formula(name, shape):
    """The weights that the golden numbers were computed with, a function of name and shape."""
    size = math.prod(shape)
    v = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(size)
    if name.endswith("logit_scale"):
        v = np.full(1, math.log(1 / 0.07))
    elif "ln_" in name and name.endswith("weight"):
        v = 1 + 0.1 * v
    elif name.endswith("bias"):
        v = 0.05 * v
    elif "temporal_embedding" in name:
        v = 0 * v
    elif "positional_embedding" in name or "class_embedding" in name:
        v = 0.1 * v
    elif "T_prompt" in name:
        v = 0.2 * v
    elif "token_embedding" in name:
        v = 0.3 * v
    else:
        projection = name.endswith(("proj", "projection")) and len(shape) == 2
        v = v / math.sqrt(shape[0] if projection else math.prod(shape[1:]))
    return torch.tensor(v.reshape(shape), dtype=torch.float32)


def official_state(**settings):
    """A state dict with the names of the official code for a model of these settings."""
    model = EZCLIP(Config(**{**SMALL, **settings}))
    state = {}
    for name, p in model.named_parameters():
        for ours, theirs in (("temporal_adapter.fc", "T_Adapter.D_fc"),
                             ("adapter.fc", "Adapter.D_fc"),
                             ("temporal_prompts", "T_prompt_embeddings")):
            name = name.replace(ours, theirs)
        state[name] = formula(name, tuple(p.shape))
    frames, width = model.config.num_frames, model.config.vision_width
    state["visual.temporal_embedding"] = torch.zeros(1, frames, width)
    return state


def golden_inputs(batch, frames, size=32, context=16, vocab=100):
    video = np.random.RandomState(7).standard_normal((batch * frames, 3, size, size))
    tokens = torch.zeros(batch, context, dtype=torch.long)
    for r in range(batch):
        n = 4 + (3 * r) % (context - 5)
        middle = [1 + (7 * r + 5 * j) % (vocab - 3) for j in range(1, n)]
        tokens[r, :n + 1] = torch.tensor([vocab - 2, *middle, vocab - 1])
    return torch.tensor(video, dtype=torch.float32).view(batch, frames, 3, size, size), tokens


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_numbers_of_the_official_code(case, tmp_path):
    golden = GOLDEN[case]
    names = ("num_frames", "vision_layers", "prompts", "temporal_adapter")
    settings = {name: golden[name] for name in names}
    state = {f"module.{k}": v for k, v in official_state(**settings).items()}
    torch.save({"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {"state": {}}},
               tmp_path / "official.pt")
    model = EZCLIP.from_pretrained(tmp_path / "official.pt")
    assert model.config == Config(**{**SMALL, **settings}) and not model.training
    assert model.freeze_backbone() == golden["trainable"]

    video, tokens = golden_inputs(3, golden["num_frames"])
    labels = torch.tensor([0, 1, 0])
    with torch.no_grad():
        near(model.encode_frames(video)[:, 0, :3], golden["frames"])
        near(model.encode_video(video), model.encode_frames(video).mean(1), 0)
        near(model.encode_text(tokens)[:, :2], GOLDEN_TEXT)
        logits = model(video, tokens)
        near(logits, golden["logits"])
        near(contrastive_loss(logits, labels), sum(golden["kl"]) / 2)
        near(motion_loss(model.encode_frames(video)), golden["motion"])

    def total():
        frames = model.encode_frames(video)
        logits = model.similarity(frames.mean(1), model.encode_text(tokens))
        return contrastive_loss(logits, labels) + motion_loss(frames)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3,
                                  betas=(0.9, 0.98), eps=1e-8, weight_decay=0.2)
    for i, expected in enumerate(golden["adamw"]):
        loss = total()
        near(loss, expected, 1e-5 if i == 0 else 1e-3)
        optimizer.zero_grad()
        loss.backward()
        if i == 0:
            for name, norm in golden["gradients"].items():
                assert model.get_parameter(name).grad.norm().item() == pytest.approx(norm, rel=1e-3)
        optimizer.step()


def test_trainable_parameters_of_the_paper():
    with torch.device("meta"):
        sizes = {name: EZCLIP(Config(**c)) for name, c in {
            "B/16": {}, "B/32": dict(patch_size=32), "L/14": dict(
                patch_size=14, vision_width=1024, vision_layers=24, text_width=768, embed_dim=768),
        }.items()}
    assert sizes["B/16"].freeze_backbone() == sizes["B/32"].freeze_backbone() == 5_204_736
    assert round(sizes["L/14"].freeze_backbone() / 1e6, 2) == 16.36
    assert sizes["B/16"].visual.transformer.temporal_prompts.shape == (12, 8, 768)


# ---- the model ----

def small(**settings):
    torch.manual_seed(0)
    return EZCLIP(Config(**{**SMALL, "num_frames": 4, **settings})).eval()


def test_without_prompts_and_with_fresh_adapters_it_is_clip():
    adapted, plain = small(prompts="none"), small(prompts="none", adapters=False)
    adapted.load_state_dict({**adapted.state_dict(), **plain.state_dict()})
    video, tokens = golden_inputs(2, 5)  # and so takes any number of frames
    near(adapted(video, tokens), plain(video, tokens), 0)
    near(plain.encode_frames(video)[:, 2], plain.encode_frames(video[:, 2:3])[:, 0])
    assert {n for n in adapted.state_dict() if n not in plain.state_dict()} == {
        n for n in adapted.state_dict() if ezclip.is_new(n)}


def test_prompts_see_the_order_of_frames_and_the_mean_does_not():
    video, _ = golden_inputs(2, 4)
    for prompts, sees in (("deep", True), ("shallow", True), ("none", False)):
        model = small(prompts=prompts)
        if sees:
            nn.init.normal_(model.visual.transformer.temporal_prompts)
        change = (model.encode_video(video) - model.encode_video(video.flip(1))).abs().max()
        assert (change > 1e-4) == sees, (prompts, change)


@pytest.mark.parametrize("settings", [dict(), dict(prompts="none", temporal_adapter=True)])
def test_videos_of_a_batch_do_not_see_each_other(settings):
    model = small(**settings)
    for name, p in model.named_parameters():
        if ezclip.is_new(name):
            nn.init.normal_(p, std=0.2)
    video, tokens = golden_inputs(3, 4)
    near(model(video, tokens), torch.cat([model(v[None], tokens) for v in video]))
    near(model.encode_text(tokens), torch.cat([model.encode_text(t[None]) for t in tokens]))


def test_uint8_is_normalised_by_the_model():
    video = torch.randint(256, (1, 4, 3, 32, 32), dtype=torch.uint8)
    normalised = v2.functional.normalize(video / 255, list(ezclip.CLIP_MEAN), list(ezclip.CLIP_STD))
    near(small().encode_frames(video), small().encode_frames(normalised))


def test_drop_path_drops_whole_clips():
    block = small(drop_path=0.5).visual.transformer.resblocks[-1].train()
    torch.manual_seed(0)
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


def test_class_probabilities_average_over_templates():
    video, texts = torch.randn(2, 8), torch.randn(3, 5, 8)
    cosine = torch.cosine_similarity(video[:, None, None], texts[None], dim=-1)  # (2, 3, 5)
    near(class_probabilities(video, texts), (100 * cosine).softmax(-1).mean(1), 1e-5)


@pytest.mark.parametrize("bad, word", [
    (dict(num_frames=0), "num_frames"), (dict(prompts="wide"), "prompts"),
    (dict(drop_path=1.0), "drop_path"), (dict(image_size=33), "image_size"),
    (dict(activation="relu"), "activation")])
def test_config_refuses(bad, word):
    with pytest.raises(ValueError, match=word):
        Config(**bad)


def test_inputs_of_another_shape_are_refused():
    model = small()
    with pytest.raises(ValueError, match=r"\(B, T, 3, 32, 32\)"):
        model.encode_frames(torch.zeros(1, 4, 3, 31, 32))
    with pytest.raises(ValueError, match="4 frames, the video has 5"):
        model.encode_frames(torch.zeros(1, 5, 3, 32, 32))
    with pytest.raises(ValueError, match="context_length 16"):
        model.encode_text(torch.arange(17)[None])


# ---- weights files ----

def hugging_face(state):
    """OpenAI's names -> Hugging Face's."""
    result = {}
    for name, value in state.items():
        vision = name.startswith("visual.")
        tower, name = ("vision_model." if vision else "text_model."), name.removeprefix("visual.")
        if name in ("proj", "text_projection"):
            result["visual_projection.weight" if vision else "text_projection.weight"] = value.T
        elif name == "logit_scale":
            result[name] = value
        elif "in_proj" in name:
            for part, piece in zip("qkv", value.chunk(3)):
                layer, kind = name.split(".")[2], name.rsplit("_")[-1]
                result[f"{tower}encoder.layers.{layer}.self_attn.{part}_proj.{kind}"] = piece
        else:
            for ours, theirs in (
                    ("transformer.resblocks", "encoder.layers"), ("attn.out", "self_attn.out"),
                    ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("c_fc", "fc1"),
                    ("c_proj", "fc2"), ("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm"),
                    ("ln_final", "final_layer_norm"), ("conv1", "embeddings.patch_embedding"),
                    ("positional_embedding", "embeddings.position_embedding.weight"),
                    ("class_embedding", "embeddings.class_embedding"),
                    ("token_embedding", "embeddings.token_embedding")):
                name = name.replace(ours, theirs)
            result[tower + name] = value
    return {k: v.contiguous() for k, v in result.items()}


def write_formats(folder, state):
    """The weights in every file format; names tell the format, but say nothing to the reader."""
    from safetensors.torch import save_file
    state = {k: v.clone() for k, v in state.items()}
    ids = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    torch.save(state, folder / "plain.safetensors")
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}},
               folder / "open_clip.bin")
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(state, folder / "open_clip.pt")
    save_file(hugging_face(state), folder / "hugging_face.pt")
    torch.save(hugging_face(state) | ids, folder / "hugging_face.safetensors")
    return sorted(folder.iterdir())


def test_formats_are_recognised_by_content(tmp_path):
    model = small(prompts="none", adapters=False)
    video, tokens = golden_inputs(2, 3)
    for path in write_formats(tmp_path, model.state_dict()):
        loaded = EZCLIP.from_pretrained(path)
        assert loaded.config == Config(**SMALL) and not loaded.weights_adapted, path
        assert loaded.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        plain = EZCLIP.from_pretrained(path, num_frames=3, prompts="none")
        near(plain(video, tokens), model(video, tokens), 0)


def openai_model(seed=0, **settings):
    c = {**SMALL, "context_length": 77, "vocab_size": 49408, **settings}
    torch.manual_seed(seed)
    model = peer("model").CLIP(
        c["embed_dim"], c["image_size"], c["vision_layers"], c["vision_width"], c["patch_size"],
        c["context_length"], c["vocab_size"], c["text_width"], 1, c["text_layers"])
    for p in model.parameters():  # norms and biases start too plain to prove anything
        p.data += 0.02 * torch.randn_like(p)
    return model.eval()


def torchscript(path, model):
    example = (torch.zeros(1, 3, 32, 32), torch.zeros(1, 77, dtype=torch.long))
    torch.jit.trace(model, example).save(str(path))


@pytest.mark.filterwarnings("ignore")
def test_equal_to_openai(tmp_path):
    model = openai_model()
    video, tokens = torch.randn(2, 2, 3, 32, 32), clip_tokenizer.tokenize(["a dog", "juggling"])
    torchscript(tmp_path / "script.pt", model)
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    with torch.no_grad():
        for path in tmp_path.iterdir():
            ours = EZCLIP.from_pretrained(path, prompts="none")
            near(ours.encode_frames(video).flatten(0, 1), model.encode_image(video.flatten(0, 1)))
            near(ours.encode_text(tokens), model.encode_text(tokens))
            near(ours(video[:, :1], tokens), model(video[:, 0], tokens)[0], 1e-4)  # times 14
        half = {k: v.half() for k, v in model.state_dict().items()}
        torch.save(half, tmp_path / "plain.pt")
        loaded = EZCLIP.from_pretrained(tmp_path / "plain.pt").state_dict()
        assert all(v.dtype == torch.float32 and (v == half[k]).all() for k, v in loaded.items()
                   if k in half)
        for block in [*model.visual.transformer.resblocks, *model.transformer.resblocks]:
            block.mlp.gelu = nn.GELU()
        ours = EZCLIP.from_pretrained(tmp_path / "script.pt", prompts="none", activation="gelu")
        near(ours.encode_frames(video).flatten(0, 1), model.encode_image(video.flatten(0, 1)))


def test_equal_to_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2,
                         num_attention_heads=1, vocab_size=49408, eos_token_id=49407),
        vision_config=dict(hidden_size=128, intermediate_size=512, num_hidden_layers=2,
                           num_attention_heads=2, image_size=32, patch_size=8),
        projection_dim=32)).eval()
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    video, tokens = torch.randn(2, 2, 3, 32, 32), clip_tokenizer.tokenize(["a dog", "juggling"])
    with torch.no_grad():
        expected = model(pixel_values=video[:, 0], input_ids=tokens)
        for name in ("model.safetensors", "pytorch_model.bin"):
            ours = EZCLIP.from_pretrained(tmp_path / name, prompts="none")
            near(ours.encode_frames(video)[:, 0],
                 model.visual_projection(model.vision_model(video[:, 0])[1]))
            near(ours.encode_text(tokens), model.text_projection(model.text_model(tokens)[1]))
            near(ours(video[:, :1], tokens), expected.logits_per_image, 1e-4)


@pytest.mark.parametrize("style", [dict, hugging_face])
def test_loading_is_strict(tmp_path, style):
    state = style(small(prompts="none", adapters=False).state_dict())
    key = next(k for k in state if k.endswith((".c_fc.weight", "fc1.weight")))
    path, extra = tmp_path / "clip.pt", {"extra.weight": torch.zeros(1)}
    others = {k: v for k, v in state.items() if k != key}
    for change, word in ((others, "missing"), ({**state, **extra}, "unexpected: extra.weight"),
                         ({**state, key: torch.zeros(3, 3)}, "misshapen"),
                         ({**state, key: state[key].long()}, "misshapen"),
                         ({**state, "note": "text"}, "no dict of names and tensors"),
                         ({}, "conv1|patch_embedding"), ([1, 2], "no dict")):
        torch.save(change, path)
        with pytest.raises(ValueError, match=word) as error:
            EZCLIP.from_pretrained(path)
        assert str(path) in str(error.value)
        assert key in str(error.value) or word not in ("missing", "misshapen")


def test_official_checkpoints_settle_what_they_hold(tmp_path):
    path = tmp_path / "official.pt"
    state = official_state(num_frames=4)
    torch.save(state, path)
    for override in (dict(prompts="none"), dict(adapters=False), dict(vision_width=64),
                     dict(temporal_adapter=True)):
        with pytest.raises(ValueError, match=next(iter(override))):
            EZCLIP.from_pretrained(path, **override)
    assert EZCLIP.from_pretrained(path, prompts="deep", drop_path=0.2).config.drop_path == 0.2
    without = "visual.transformer.resblocks.1.Adapter.D_fc1.bias"
    for changed in ({**state, "visual.temporal_embedding": torch.ones(1, 4, 128)},
                    {key: value for key, value in state.items() if key != without}):
        torch.save(changed, path)
        with pytest.raises(ValueError, match=f"temporal_embedding is not zero|missing: {without}"):
            EZCLIP.from_pretrained(path)


def test_prompts_are_interpolated_over_time(tmp_path):
    state = official_state(num_frames=4)
    ramp = torch.arange(4.0).view(1, 4, 1).expand(3, 4, 128).clone()
    torch.save({**state, "visual.transformer.T_prompt_embeddings": ramp}, tmp_path / "ramp.pt")
    for frames, expected in ((4, [0, 1, 2, 3]), (2, [0.5, 2.5]), (1, [1.5]),
                             (8, [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])):
        model = EZCLIP.from_pretrained(tmp_path / "ramp.pt", num_frames=frames)
        near(model.visual.transformer.temporal_prompts[2, :, 5], expected, 1e-6)
        assert model.config.num_frames == frames


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {Evil.mark}",)


def test_hostile_files_execute_nothing(tmp_path):
    Evil.mark = tmp_path / "executed"
    bad = tmp_path / "bad.pt"
    archives = {"torchscript": {"x/constants.pkl": b"", "x/data.pkl": pickle.dumps(Evil())},
                "saved": {"x/data.pkl": pickle.dumps({"a": Evil()}, 2), "x/version": b"3"}}
    for entries in archives.values():
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            with zipfile.ZipFile(bad, "w", method) as archive:
                for name, content in entries.items():
                    archive.writestr(name, content)
            with pytest.raises(ValueError, match="bad.pt"):
                EZCLIP.from_pretrained(bad)
    torch.save(official_state(num_frames=4), tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    giant = {**official_state(), "visual.proj": torch.zeros(1).expand(128, 1 << 40)}
    torch.save(giant, tmp_path / "giant.pt")
    for content in (pickle.dumps(Evil()), b"", b"not weights", good[:-100], good[: len(good) // 2],
                    (10**9).to_bytes(8, "little") + b"{", (tmp_path / "giant.pt").read_bytes()):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="bad.pt"):
            EZCLIP.from_pretrained(bad)
    assert not Evil.mark.exists()


def test_releases_are_found_downloaded_and_checked(tmp_path, monkeypatch):
    torch.save(small(prompts="none", adapters=False).state_dict(), tmp_path / "served.pt")
    sha256 = hashlib.sha256((tmp_path / "served.pt").read_bytes()).hexdigest()
    served = tmp_path / sha256 / "tiny.pt"
    served.parent.mkdir()
    (tmp_path / "served.pt").rename(served)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(ezclip, "_URL", tmp_path.as_uri())
    monkeypatch.setitem(ezclip._RELEASES, "ViT-B/16", ("tiny.pt", sha256))
    cached = tmp_path / "home/.cache/clip/tiny.pt"
    served.write_bytes(served.read_bytes() + b"!")  # a transfer gone wrong leaves nothing behind
    with pytest.raises(OSError, match=str(cached)):
        EZCLIP.from_pretrained("ViT-B/16")
    assert not list(cached.parent.iterdir())
    served.write_bytes(served.read_bytes()[:-1])
    assert EZCLIP.from_pretrained("ViT-B/16").weights_sha256 == sha256
    served.unlink()
    assert EZCLIP.from_pretrained("ViT-B/16", num_frames=2).config.num_frames == 2
    cached.write_bytes(b"something else")
    with pytest.raises(ValueError, match="SHA-256"):
        EZCLIP.from_pretrained("ViT-B/16")
    cached.unlink()
    with pytest.raises(OSError, match="put it at"):
        EZCLIP.from_pretrained("ViT-B/16")
    with pytest.raises(FileNotFoundError, match="ViT-B/99"):
        EZCLIP.from_pretrained("ViT-B/99")


def test_ezclip_works_alone(tmp_path):
    (tmp_path / "ezclip.py").write_text((HERE / "ezclip.py").read_text())
    code = ("import ezclip, torch;"
            "m = ezclip.EZCLIP(ezclip.Config(vision_layers=1, text_layers=1));"
            "print(m(torch.zeros(1, 8, 3, 224, 224), torch.ones(2, 5).long()).shape)")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                            text=True, env={**os.environ, "PYTHONPATH": ""})
    assert result.stdout.strip() == "torch.Size([1, 2])", result.stderr
