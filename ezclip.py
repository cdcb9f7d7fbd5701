"""EZ-CLIP in one file: CLIP's ViT adapted to zero-shot video action recognition.

Paper: "EZ-CLIP: Efficient Zeroshot Video Action Recognition", arXiv 2312.08010 (T2L, its successor,
is the same method). CLIP stays frozen; temporal prompts, adapters and a motion loss are new.

    import torch, clip_tokenizer
    from ezclip import EZCLIP, contrastive_loss, motion_loss
    model = EZCLIP.from_pretrained("ViT-B/16", num_frames=8)      # or a weights file on disk
    model.freeze_backbone()                                       # 5204736 trainable parameters
    video = torch.randint(256, (2, 8, 3, 224, 224)).byte()        # (B, T, 3, H, W), RGB
    tokens = clip_tokenizer.tokenize(["archery", "juggling balls"])              # (N, 77)
    frames, texts = model.encode_frames(video), model.encode_text(tokens)        # (B, T, E), (N, E)
    logits = model.similarity(model.pool(frames), texts)          # (B, N), = model(video, tokens)
    loss = contrastive_loss(logits, torch.tensor([0, 1])) + motion_loss(frames)

Departures from the official code (github.com/Shahzadnit/EZ-CLIP), of which only the second changes
an evaluation:
  - Drop-path drops a branch for a whole clip or text, not token positions for the whole batch.
  - The temporal adapter's result returns to its own video; officially videos of a batch are mixed.
  - The text tower's dropout rates are its own linspace, not the head of the vision tower's.
  - Weights are fp32. Officially they go through fp16 after every step, without loss scaling.
  - The variance of a single frame counts as 0 in the motion loss, not as NaN.
  - `visual.temporal_embedding`, zero and frozen in every official checkpoint, does not exist.

Letters: B videos, T frames, L tokens (of a frame: 1 class token + patches), D width, H heads, E
embed_dim, N texts. Parameters that CLIP has are named as in OpenAI's state dict, so that its files
load without a table of names.
"""

import functools
import hashlib
import io
import json
import math
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Config:
    """Sizes and switches of a model; the defaults are ViT-B/16 with the paper's settings.

    prompts: "deep" (in every layer), "shallow" (in layer 0) or "none"; with "none" and fresh
    adapters the model is CLIP, frame by frame. The rates are those of the last layer and grow
    linearly from 0 in the first, but for prompt_dropout. Raises ValueError for a bad value.
    """
    embed_dim: int = 512
    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = None        # width / 64, as in all of OpenAI's models
    vision_mlp_width: int = None    # 4 * width
    context_length: int = 77
    vocab_size: int = 49408
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = None
    text_mlp_width: int = None
    activation: str = None          # "quick_gelu", OpenAI's, also for None; or "gelu"
    mean: tuple = CLIP_MEAN         # of RGB in [0, 1]
    std: tuple = CLIP_STD
    num_frames: int = 8
    prompts: str = "deep"
    adapters: bool = True
    temporal_adapter: bool = False  # the ablation of the official code, meant for prompts="none"
    drop_path: float = 0.1
    attention_dropout: float = 0.1
    prompt_dropout: float = 0.1
    recompute: bool = False         # gradient checkpointing of each block: less memory, more time

    def __post_init__(self):
        choices = {"activation": ("quick_gelu", "gelu"), "prompts": ("deep", "shallow", "none")}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if field.type is int and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{field.name} must be an integer from 1 on, not {value!r}")
            if field.type is float and not 0 <= value < 1:
                raise ValueError(f"{field.name} must lie in [0, 1), not {value}")
            if field.type is str and value not in choices[field.name]:
                raise ValueError(f"{field.name} is one of {choices[field.name]}, not {value!r}")
            if field.type is tuple and not (len(value) == 3 and all(0 <= x <= 1 for x in value)):
                raise ValueError(f"{field.name} has three numbers in [0, 1], not {value}")
        if 0 in self.std:
            raise ValueError("std must not be 0")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size")


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of OpenAI's weights."""

    def forward(self, x):
        # as a SiLU it keeps one tensor of this largest size for the backward pass, not three
        return F.silu(1.702 * x) / 1.702


class Attention(nn.Module):
    """Multi-head attention. Its parameters are those of nn.MultiheadAttention, as CLIP has them."""

    def __init__(self, width, heads, dropout, causal):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of its {heads} heads")
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.heads = heads
        self.dropout = dropout
        self.causal = causal

    def forward(self, queries, tokens):
        """The queries (N, Q, D) look at the tokens (N, L, D): -> (N, Q, D). causal needs Q = L."""
        D = queries.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        q = F.linear(queries, weight[:D], bias[:D])
        kv = F.linear(tokens, weight[D:], bias[D:])  # (N, L, 2D)
        k, v = kv.chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        x = F.scaled_dot_product_attention(  # (N, H, Q, D/H)
            q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=self.causal)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class Adapter(nn.Module):
    """D -> D/4 -> D, without a skip connection; fc2 starts at zero and so does the result."""

    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, width // 4)
        self.fc2 = nn.Linear(width // 4, width)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """CLIP's block with the temporal prompt before its attention and the adapter after it."""

    def __init__(self, width, heads, mlp_width, config, causal, depth):
        super().__init__()  # depth: 0 in the first layer, 1 in the last
        self.attn = Attention(width, heads, depth * config.attention_dropout, causal)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, mlp_width),
            gelu=nn.GELU() if config.activation == "gelu" else QuickGELU(),
            c_proj=nn.Linear(mlp_width, width)))
        self.ln_2 = nn.LayerNorm(width)
        self.adapter = Adapter(width) if config.adapters else None
        self.temporal_adapter = Adapter(width) if config.temporal_adapter and not causal else None
        self.drop_rate = depth * config.drop_path

    def forward(self, x, num_frames, prompt=None, keep=None):
        """x: (B*T, L, D), the frames of a video adjacent (texts: T = 1); prompt: (T, D) or None.

        -> (B*T, L, D), or with `keep` (B*T, keep, D): only the first tokens go on (None: all).
        """
        BT, L, D = x.shape
        T = num_frames
        B = BT // T

        if self.temporal_adapter is not None:
            x = x + self.drop_path(self.across_frames(x, T), B)

        # z = MHA(LN_1(P + mean(x))) over the frames: what the other frames show, for each frame
        tokens = self.ln_1(x)
        queries = tokens[:, :keep]
        if prompt is not None:
            z = self.ln_1(prompt + x.mean(1).view(B, T, D))
            z = self.drop_path(self.attn(z, z), B)  # (B, T, D), no skip connection
            tokens = torch.cat([tokens, self.ln_1(z).view(BT, 1, D)], dim=1)  # (B*T, L+1, D)

        # x <- x + MHA(LN_1([x; z])), with queries of x only: z is one more key and value
        x = x[:, :keep] + self.drop_path(self.attn(queries, tokens), B)

        # x <- x + adapter(x), then CLIP's MLP
        if self.adapter is not None:
            x = x + self.adapter(x)
        return x + self.drop_path(self.mlp(self.ln_2(x)), B)

    def across_frames(self, x, T):
        """The ablation's temporal adapter, on attention over the frames at each token's place."""
        BT, L, D = x.shape
        B = BT // T
        y = self.ln_1(x).view(B, T, L, D).transpose(1, 2).reshape(B * L, T, D)
        y = self.temporal_adapter(self.attn(y, y))
        return y.view(B, L, T, D).transpose(1, 2).reshape(BT, L, D)

    def drop_path(self, branch, num_clips):
        """Stochastic depth: drop the branch of a whole clip, all of its frames together."""
        if not self.training or self.drop_rate == 0:
            return branch
        survival = 1 - self.drop_rate
        mask = branch.new_empty(num_clips, 1).bernoulli_(survival) / survival
        return (branch.reshape(num_clips, -1) * mask).view_as(branch)


class Transformer(nn.Module):
    """The blocks of a tower and its temporal prompts: (layers, T, D), (1, T, D) or None."""

    def __init__(self, width, layers, heads, mlp_width, config, causal, prompts="none"):
        super().__init__()
        heads = heads or max(1, width // 64)
        mlp_width = mlp_width or 4 * width
        self.resblocks = nn.ModuleList()
        for i in range(layers):
            depth = i / max(1, layers - 1)
            self.resblocks.append(Block(width, heads, mlp_width, config, causal, depth))
        self.temporal_prompts = None
        if prompts != "none":
            bound = math.sqrt(6 / (3 * 16 * 16 + width))  # the official code's, for any patch size
            rows = layers if prompts == "deep" else 1
            values = torch.empty(rows, config.num_frames, width).uniform_(-bound, bound)
            self.temporal_prompts = nn.Parameter(values)
        self.prompt_dropout = config.prompt_dropout
        self.recompute = config.recompute

    def forward(self, x, num_frames=1, keep=None):
        """(B*T, L, D) -> (B*T, L, D), or with `keep` (B*T, keep, D), the first tokens."""
        prompts = []
        if self.temporal_prompts is not None:
            prompts = F.dropout(self.temporal_prompts, self.prompt_dropout, self.training)
        for i, block in enumerate(self.resblocks):
            prompt = prompts[i] if i < len(prompts) else None  # (T, D)
            # tokens that nobody reads are not computed: 9 % of a step, 7 % of an evaluation
            kept = keep if i == len(self.resblocks) - 1 else None
            args = (x, num_frames, prompt, kept)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, *args, use_reentrant=False)
            else:
                x = block(*args)
        return x


class VisionTransformer(nn.Module):
    """CLIP's vision tower: patches and a class token, the blocks, the class token's projection."""

    def __init__(self, config):
        super().__init__()
        D = config.vision_width
        patch = config.patch_size
        num_patches = (config.image_size // patch) ** 2
        self.conv1 = nn.Conv2d(3, D, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(D))
        self.positional_embedding = nn.Parameter(torch.empty(num_patches + 1, D))
        self.ln_pre = nn.LayerNorm(D)
        self.transformer = Transformer(D, config.vision_layers, config.vision_heads,
                                       config.vision_mlp_width, config, causal=False,
                                       prompts=config.prompts)
        self.ln_post = nn.LayerNorm(D)
        self.proj = nn.Parameter(torch.empty(D, config.embed_dim))

    def forward(self, frames, num_frames):
        """(B*T, 3, S, S) -> (B*T, E)"""
        x = self.conv1(frames).flatten(2).transpose(1, 2)  # (B*T, L-1, D)
        class_token = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([class_token, x], dim=1)  # (B*T, L, D)
        x = self.ln_pre(x + self.positional_embedding)
        x = self.transformer(x, num_frames, keep=1)  # (B*T, 1, D): the class token
        return self.ln_post(x[:, 0]) @ self.proj


class EZCLIP(nn.Module):
    """CLIP with temporal prompts and adapters. A new model is random; `from_pretrained` loads one.

    `encode_*` return features as they are; `similarity` and `forward` normalise them.
    """

    def __init__(self, config=Config()):
        super().__init__()
        self.config = config
        width = config.text_width
        self.visual = VisionTransformer(config)
        self.transformer = Transformer(width, config.text_layers, config.text_heads,
                                       config.text_mlp_width, config, causal=True)
        self.token_embedding = nn.Embedding.from_pretrained(  # without 25 million draws
            torch.empty(config.vocab_size, width), freeze=False)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.initialise()

    def initialise(self):
        """CLIP's scales, in both towers. Biases and new modules have initialised themselves."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=self.config.text_width**-0.5)
        visual = self.visual
        for parameter in (visual.class_embedding, visual.positional_embedding, visual.proj):
            nn.init.normal_(parameter, std=self.config.vision_width**-0.5)
        for tower in (visual.transformer, self.transformer):
            for block in tower.resblocks:
                width = block.ln_1.weight.numel()
                branches = 2 * len(tower.resblocks)
                nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
                nn.init.normal_(block.attn.out_proj.weight, std=(width * branches) ** -0.5)
                nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
                nn.init.normal_(block.mlp.c_proj.weight, std=(width * branches) ** -0.5)

    def encode_frames(self, video):
        """Features of every frame, not normalised: (B, T, 3, S, S) -> (B, T, E).

        video: uint8 RGB, or floats already normalised with config.mean and std. T is
        config.num_frames where the model has prompts, else any. Another shape is a ValueError.
        """
        S = self.config.image_size
        if video.ndim != 5 or video.shape[2:] != (3, S, S):
            raise ValueError(f"a video is (B, T, 3, {S}, {S}), not {tuple(video.shape)}")
        T = video.shape[1]
        if self.config.prompts != "none" and T != self.config.num_frames:
            raise ValueError(f"the model has prompts for {self.config.num_frames} frames, the "
                             f"video has {T}: load the model with that num_frames")
        if video.dtype == torch.uint8:
            mean = torch.tensor(self.config.mean, device=video.device).view(3, 1, 1)
            std = torch.tensor(self.config.std, device=video.device).view(3, 1, 1)
            video = (video.float() / 255 - mean) / std
        features = self.visual(video.flatten(0, 1), T)  # (B*T, E)
        return features.unflatten(0, (-1, T))

    def pool(self, frame_features):
        """Frames to a video, the mean: (B, T, E) -> (B, E)."""
        return frame_features.mean(1)

    def encode_video(self, video):
        """Features of videos, not normalised: (B, T, 3, S, S) -> (B, E)."""
        return self.pool(self.encode_frames(video))

    def encode_text(self, tokens, end=None):
        """Features at the end-of-text token: (N, L) integers -> (N, E).

        end: (N,), the positions of the end-of-text tokens; by default those of the largest ids, as
        CLIP has it. Padding behind them changes nothing, so that L may be that of the longest text;
        L > context_length is a ValueError.
        """
        N, L = tokens.shape
        if end is None:
            end = tokens.argmax(-1)  # (N,)
        if end.shape != (N,):
            raise ValueError(f"end is ({N},), a position for each text, not {tuple(end.shape)}")
        if L > self.config.context_length:
            raise ValueError(f"a text of {L} tokens is longer than context_length "
                             f"{self.config.context_length}")
        x = self.token_embedding(tokens) + self.positional_embedding[:L]  # (N, L, D)
        x = self.transformer(x)
        x = x[torch.arange(N, device=x.device), end]  # (N, D)
        return self.ln_final(x) @ self.text_projection

    def similarity(self, video_features, text_features):
        """Logits exp(logit_scale) * cosine, always in fp32: (B, E), (N, E) -> (B, N)."""
        return self.logit_scale.exp() * _cosine(video_features, text_features)

    def forward(self, video, tokens):
        """Logits of every video for every text: (B, T, 3, S, S), (N, L) -> (B, N)."""
        return self.similarity(self.encode_video(video), self.encode_text(tokens))

    def freeze_backbone(self):
        """Leave only prompts and adapters trainable; returns their number, 5204736 for Config()."""
        count = 0
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_new(name))
            if parameter.requires_grad:
                count += parameter.numel()
        return count

    @classmethod
    def from_pretrained(cls, name_or_path, num_frames=None, clip=None, **config_overrides):
        """A model in fp32 and eval mode with the weights of a file, which says itself what it is.

        name_or_path: ViT-B/32, ViT-B/16, ViT-L/14 or ViT-L/14@336px, looked up in ~/.cache/clip,
            else downloaded there; or a file of OpenAI, open_clip or Hugging Face, a checkpoint of
            the official EZ-CLIP / T2L code, or train.py's last.pt, which names its CLIP.
        num_frames: None for that of the prompts in the file, else 8. Prompts for another number are
            interpolated linearly over time, a frame standing at the centre of its segment.
        clip: where the CLIP of a last.pt is now, if not where it was in training.
        config_overrides: fields of Config that the file leaves open. The weights settle all sizes,
            a checkpoint also prompts, adapters and temporal_adapter.

        `weights_path` and `weights_sha256` of the model are those of CLIP, `weights_adapted` tells
        whether the file held prompts or adapters. Raises OSError (no file, no download), or
        ValueError naming file and keys: only the new modules may be missing, nothing left over.
        """
        name = str(name_or_path)
        path = _find(name)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        if name in _RELEASES and sha256 != _RELEASES[name]:
            raise ValueError(f"{path}: SHA-256 is not that of {name}: delete the file")
        content = read_weights(path)
        state = _tensors(path, content)
        all_keys = "\n".join(state)  # to be searched
        # train.py saves what it has trained, and names the rest
        partial = "clip_sha256" in content and "visual.conv1." not in all_keys
        try:
            said = _config_beside(path, "vision_model." in all_keys) | config_overrides
            settled = _settle(said, content, state, all_keys, partial)
            adapted = partial or "prompts" in settled
            settings = said | settled
            if num_frames is not None:
                settings["num_frames"] = num_frames
            if partial:
                clip = clip or content.get("clip")
                try:
                    model = cls.from_pretrained(clip, **settings)
                except (OSError, ValueError) as error:
                    raise ValueError(f"its CLIP cannot be loaded: {error}; `clip` (--clip) says "
                                     "where it is now") from None
                if model.weights_sha256 != content["clip_sha256"]:
                    raise ValueError(f"was trained on another CLIP than {clip}")
            elif clip:
                raise ValueError("holds its own CLIP, leave `clip` out")
            else:
                model = cls(Config(**settings))
                model.weights_path, model.weights_sha256 = name, sha256
                known = adapted or sha256 in _RELEASES.values()
                if model.config.activation is None and not known:
                    warnings.warn(f"{path}: does not say its activation, QuickGELU is taken; "
                                  'activation="gelu" (--activation gelu) is that of open_clip\'s '
                                  "models not named -quickgelu")
            model.weights_adapted = adapted
            _copy(state, all_keys, model, partial)
        except (ValueError, TypeError, RuntimeError) as error:  # the last: beyond the memory
            raise ValueError(f"{path}: {error}{_hint(all_keys, path)}") from None
        return model.eval()


# What the names of CLIP's parameters consist of, beside the numbers of layers. A parameter of no
# other words counts as CLIP's: it is frozen, and not saved.
_CLIP_WORDS = set("""
    visual transformer resblocks attn in_proj_weight in_proj_bias out_proj mlp c_fc c_proj
    ln_1 ln_2 ln_pre ln_post ln_final conv1 class_embedding token_embedding positional_embedding
    proj text_projection logit_scale weight bias""".split())


def is_new(name):
    """Whether a parameter is none of CLIP's: it is trained and saved, and CLIP's files lack it."""
    return any(word not in _CLIP_WORDS and not word.isdigit() for word in name.split("."))


def contrastive_loss(logits, labels):
    """(KL_v + KL_t) / 2, where several texts of a batch may belong to a video (ActionCLIP's loss).

    logits: (B, B), a video per row, its text in the same column; labels: (B,), the classes. The
    target of row i is softmax(10 * [label_i == label_j]). Returns a scalar, in nats.
    """
    logits = logits.float()
    same = (labels[:, None] == labels).float()
    target = (10.0 * same).softmax(1)  # (B, B), symmetric
    kl_video = F.kl_div(logits.log_softmax(1), target, reduction="batchmean")
    kl_text = F.kl_div(logits.T.log_softmax(1), target, reduction="batchmean")
    return (kl_video + kl_text) / 2


def motion_loss(frame_features):
    """1 / (1 + C + V), the paper's motion loss: small where frames differ, 1 for a still clip.

    frame_features: (B, T, E), not normalised. C: mean of |f[t+1] - f[t-1]| / 2, ends replicated; V:
    mean of the unbiased variance over time, 0 for a single frame. Returns a scalar in (0, 1].
    """
    f = frame_features.float()
    following = torch.cat([f[:, 1:], f[:, -1:]], dim=1)
    previous = torch.cat([f[:, :1], f[:, :-1]], dim=1)
    change = (following - previous).abs().mean() / 2
    variance = f.var(1).mean() if f.shape[1] > 1 else 0.0
    return 1 / (1 + change + variance)


def class_probabilities(video_features, text_features, logit_scale=100.0):
    """Zero-shot classification: softmax over classes, then the mean over templates.

    video_features: (B, E), text_features: (templates, classes, E), normalised here. Returns
    (B, classes). The scale is that of the official evaluation. (CLIP averages features instead.)
    """
    logits = logit_scale * _cosine(video_features, text_features)  # (templates, B, classes)
    return logits.softmax(-1).mean(0)


def _cosine(a, b):
    with torch.autocast(a.device.type, enabled=False):  # what is scaled by 100 is not for bf16
        return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).mT


# Weights files. A file is hostile until it has been read; nothing in it is ever executed.

_URL = "https://openaipublic.azureedge.net/clip/models"
_RELEASES = {  # name: SHA-256
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}
_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors",
          "pytorch_model.bin")  # of a folder, the first that is there
# What a file that is refused may be, by its first letters, or its keys and its name.
_KINDS = {r"\Aversion https": "a git-lfs pointer, not the file itself",
          r"\A\s*<": "a web page",
          r"\A\s*{": "JSON, like the index of a model in several files",
          r"\bvisual\.layer1\.": "a ResNet CLIP, not a ViT",
          r"\bvisual\.trunk\.": "a CLIP with a vision tower of timm, as ConvNeXt",
          r"-of-\d+\.\w+\Z": "one of the several files of a model"}
_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids",
               "num_batches_tracked")
# Our words in names of parameters, and those of the official code and of Hugging Face. They are
# replaced in this order where a file has them: so errors name a file's own keys.
_OTHER_NAMES = {
    "temporal_adapter.fc": "T_Adapter.D_fc",
    "adapter.fc": "Adapter.D_fc",
    "temporal_prompts": "T_prompt_embeddings",
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "transformer.resblocks": "text_model.encoder.layers",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding": "text_model.embeddings.token_embedding",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
    "ln_": "layer_norm",
    "attn.in_proj_": "self_attn.{}_proj.",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
# What JSON calls the fields of a tower: Hugging Face's words, open_clip's, and those of both.
_JSON = {"hidden_size": "{}_width", "num_hidden_layers": "{}_layers",
         "num_attention_heads": "{}_heads", "intermediate_size": "{}_mlp_width",
         "max_position_embeddings": "context_length",
         "width": "{}_width", "layers": "{}_layers", "heads": "{}_heads",
         "context_length": "context_length", "vocab_size": "vocab_size",
         "patch_size": "patch_size", "image_size": "image_size"}
_DEFAULTS = dict(  # what Hugging Face leaves out
    vision_width=768, vision_layers=12, vision_heads=12, vision_mlp_width=3072, patch_size=32,
    image_size=224, text_width=512, text_layers=12, text_heads=8, text_mlp_width=2048,
    context_length=77, vocab_size=49408)
# What no weight tells either, and the values, beside none, that there is code for.
_SUPPORTED = {"layer_norm_eps": [1e-5], "pool_type": ["tok", "argmax"], "no_causal_mask": [],
              "act_kwargs": [], "norm_kwargs": []}


def _find(name):
    """-> the path of a weights file: of the name, of the file in a folder, or of a release of
    OpenAI's in the cache, where it is put unless it is there."""
    if name not in _RELEASES:
        path = Path(os.path.expanduser(name))  # which leaves ~ where there is no home
        for file in (path, *map(path.joinpath, _FILES)):
            if file.is_file():
                return file
        raise FileNotFoundError(
            f"{path}: no such file, nor a folder with one of {', '.join(_FILES)} (a model in "
            f"several files is not read), nor one of {', '.join(_RELEASES)}")
    file = re.sub("[/@]", "-", name) + ".pt"
    path, url = Path("~/.cache/clip", file), f"{_URL}/{_RELEASES[name]}/{file}"
    try:
        path = path.expanduser()
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=_RELEASES[name])
    except (OSError, RuntimeError) as error:  # the second: no home, or a bad transfer
        raise OSError(f"cannot get {name}: {error}; download {url}, put it at {path} or name the "
                      "file itself") from None
    return path


def _hint(start, path):
    """The end of an error: what a file probably is, by its first letters or its keys."""
    for pattern, kind in _KINDS.items():
        if re.search(pattern, f"{start}\n{path}"):
            return f"; it is probably {kind}"
    return ""


def _tensors(path, content):
    """{key: tensor} of what a file holds, the keys without the prefixes of wrappers, as module."""
    for key in ("model_state_dict", "state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
    tensors = {}
    for key, tensor in content.items():
        if str(key).split(".")[-1] not in _NO_WEIGHTS:
            tensors[str(key)] = tensor
    common = os.path.commonprefix([*tensors])
    prefix = re.match(r"((module|model|_orig_mod)\.)*", common)[0]  # they may be stacked
    state = {}
    for key, tensor in tensors.items():
        key = key.removeprefix(prefix)
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{path}: {key} is no tensor of weights")
        if key.endswith("_projection.weight"):  # Hugging Face has them transposed
            tensor = tensor.transpose(0, -1)
        state[key] = tensor
    return state


def _file_keys(name, all_keys):
    """The keys of one of our parameters in a file: of Hugging Face's, q, k and v lie apart."""
    for ours, theirs in _OTHER_NAMES.items():
        if theirs in all_keys or "vision_model." in all_keys:
            name = name.replace(ours, theirs)
    return [name.format(x) for x in "qkv"] if "{}" in name else [name]


def _settle(said, content, state, all_keys, partial):
    """The fields of Config that a file settles: sizes, and what was trained in which way. Takes an
    empty temporal_embedding out of `state`.

    ValueError where something else is `said`, by the caller or the JSON beside the file.
    """
    def shape(name, ndim):
        key, = _file_keys(name, all_keys)
        if key not in state or state[key].ndim != ndim:
            raise ValueError(f"does not fit a CLIP ViT, missing or misshapen: {key}")
        return state[key].shape

    settled = {}
    config = content.get("config", content)
    if "clip_sha256" in content and isinstance(config, dict):  # train.py's
        fields = ["num_frames", "activation", "vision_heads", "text_heads", "mean", "std"]
        if partial:  # what else it trains, some switch of a fork's, belongs here
            fields += ["prompts", "adapters", "temporal_adapter"]
        for field in fields:
            if field in config:
                settled[field] = config[field]
    if not partial:
        settled["vision_width"], _, _, settled["patch_size"] = shape("visual.conv1.weight", 4)
        grid = math.isqrt(shape("visual.positional_embedding", 2)[0])  # 1 + its square
        settled["image_size"] = grid * settled["patch_size"]
        settled["context_length"], settled["text_width"] = shape("positional_embedding", 2)
        settled["vocab_size"], _ = shape("token_embedding.weight", 2)
        _, settled["embed_dim"] = shape("text_projection", 2)
        for tower, prefix in ("vision", "visual."), ("text", ""):
            blocks, = _file_keys(f"{prefix}transformer.resblocks.", all_keys)
            settled[f"{tower}_layers"] = len(set(re.findall(rf"(?m)^{blocks}(\d+)", all_keys)))
            settled[f"{tower}_mlp_width"], _ = shape(
                f"{prefix}transformer.resblocks.0.mlp.c_fc.weight", 2)
    if re.search("(?i)adapter|prompt", all_keys):
        settled["prompts"] = "none"
        settled["adapters"] = ".adapter." in all_keys.lower()
        settled["temporal_adapter"] = "_adapter." in all_keys.lower()
    if "visual.temporal_embedding" in state:  # it is zero in every official checkpoint
        _, settled["num_frames"], _ = shape("visual.temporal_embedding", 3)
        if state.pop("visual.temporal_embedding").any():
            raise ValueError("visual.temporal_embedding is not zero, as it should be")
    if re.search("T_prompt|temporal_prompts", all_keys):
        rows, settled["num_frames"], _ = shape("visual.transformer.temporal_prompts", 3)
        settled["prompts"] = "shallow" if rows == 1 else "deep"

    for field, value in said.items():
        if settled.get(field, value) != value:
            raise ValueError(f"has {field} {settled[field]!r}, not {value!r} as asked for or as "
                             "the JSON beside it says")
    for tower in ("vision", "text"):
        if settled.get(f"{tower}_mlp_width") == 4 * settled.get(f"{tower}_width", 0):
            settled[f"{tower}_mlp_width"] = None  # as usual
    width = settled.get("vision_width", 0)
    if width > 1024 and not (said | settled).get("vision_heads"):
        raise ValueError(f"no weight tells how many heads a vision width of {width} has: give "
                         "vision_heads (--vision-heads), or put its config.json beside it")
    return settled


@torch.no_grad()
def _copy(state, all_keys, model, partial):
    """Move the tensors into `model`; ValueError lists what is missing, misshapen or left over."""
    problems = []
    for name, parameter in model.named_parameters():
        found = _file_keys(name, all_keys)
        wanted = not partial
        if is_new(name):
            wanted = model.weights_adapted or name in state
        if not wanted:  # CLIP's files lack what is new, and train.py's what is CLIP's
            continue
        parts = parameter.chunk(3) if len(found) == 3 else [parameter]
        for key, part in zip(found, parts):
            if key not in state:
                problems.append(f"missing: {key}")
                continue
            tensor = state.pop(key)
            if "prompt" in key and tensor.ndim == 3:
                over_time = tensor.float().mT  # (layers, D, T)
                tensor = F.interpolate(over_time, part.shape[1], mode="linear").mT
            if tensor.shape == part.shape:
                part.copy_(tensor)
            else:
                problems.append(f"misshapen: {key} {[*tensor.shape]}, not {[*part.shape]}")
    problems += [f"unexpected: {key}" for key in state]
    if problems:
        first = ", ".join(problems[:8])
        raise ValueError(f"does not fit a CLIP ViT in {len(problems)} keys: {first}")


def _config_beside(path, hugging_face):
    """What Hugging Face's or open_clip's JSON beside a weights file says of its model, as fields of
    Config; {} without one."""
    def read(*names):
        for file in map(path.with_name, names):
            if file.is_file():
                try:
                    return json.loads(file.read_text("utf-8"))
                except ValueError as error:
                    raise ValueError(f"{file.name}: {error}") from None
        return {}

    try:
        content = read(*["open_clip_config.json", "config.json"][hugging_face:])
        open_clip = "model_cfg" in content
        model = content.get("model_cfg", content)
        if not open_clip and "vision_config" not in model and model.get("model_type") != "clip":
            return {}  # none, or somebody else's
        said = {"text_heads": 8} if open_clip else dict(_DEFAULTS)  # if left out
        said["embed_dim"] = model.get("embed_dim", model.get("projection_dim", 512))
        # Hugging Face's towers have QuickGELU unless they say otherwise, open_clip's the other way
        activation = "quick_gelu" if model.get("quick_gelu", not open_clip) else "gelu"
        activations = set()
        for tower in ("vision", "text"):
            part = model.get(f"{tower}_cfg", model.get(f"{tower}_config", {}))
            part = model.get(f"{tower}_config_dict") or part  # of older files, which changes it
            activations.add(part.get("hidden_act", activation))
            for key, value in part.items():
                if isinstance(value, list) and len({*value}) == 1:  # both sides of a square
                    value = value[0]
                if key in _JSON:
                    said[_JSON[key].format(tower)] = value
                if key in _SUPPORTED and value and value not in _SUPPORTED[key]:
                    raise ValueError(f"the {tower} tower has {key} {value!r}, which no code is for")
            if open_clip:  # which has ratios of widths
                width = part.get("width", {"vision": 768, "text": 512}[tower])
                said[f"{tower}_mlp_width"] = int(width * part.get("mlp_ratio", 4))
                said.setdefault(f"{tower}_heads", width // part.get("head_width", 64))
        if len(activations) > 1:
            raise ValueError("its towers have different activations")
        said["activation"] = activations.pop()
        pixels = read("preprocessor_config.json", "processor_config.json")
        pixels = content.get("preprocess_cfg", pixels.get("image_processor", pixels))
        for field, value in (("mean", CLIP_MEAN), ("std", CLIP_STD)):
            said[field] = tuple(pixels.get(field, pixels.get(f"image_{field}", value)))
    except (ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError) as error:
        raise ValueError("open_clip_config.json or config.json: is no config of a CLIP that can be "
                         f"read: {error}") from None
    return said


def read_weights(path):
    """What a file holds, a dict with tensors in it, read without executing any of it.

    safetensors, TorchScript archives and what torch.save writes, now or before PyTorch 1.6, are
    told apart by their content. A file that cannot be read is a ValueError that names it.
    """
    with open(path, "rb") as file:
        head = file.peek(16)
    try:
        if head[8:9] == b"{":
            from safetensors.torch import load_file
            content = load_file(path)
        elif head.startswith(b"PK"):
            content = _read_zip(path)
        else:  # before PyTorch 1.6
            content = torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # there is no bound to what a hostile file makes a reader raise
        reason = f"{type(error).__name__} {error}".split(". ")[0].split("\n")[0]
        kind = _hint(head.decode("utf-8-sig", "replace"), path)
        raise ValueError(f"{path}: cannot be read as weights: {reason}{kind}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is no dict of names and tensors")
    return content


def _read_zip(path):
    """What torch.save or torch.jit.save wrote: a pickle, and a file for each storage of tensors."""
    with zipfile.ZipFile(path) as archive:  # whose read() compares checksums
        found = [name for name in archive.namelist() if re.fullmatch("[^/]+/data.pkl", name)]
        if len(found) != 1:
            raise ValueError("it is a zip, but none of PyTorch's")
        folder = found[0].split("/")[0]
        unpickler = _Unpickler(io.BytesIO(archive.read(f"{folder}/data.pkl")))
        unpickler.read = functools.cache(lambda key: bytearray(archive.read(f"{folder}/{key}")))
        return unpickler.load()


class _Unpickler(pickle.Unpickler):
    """Of the names in a pickle only those of tensors and containers are what they say."""

    names = {
        "OrderedDict": OrderedDict, "_rebuild_parameter": lambda tensor, *_: tensor,
        "_rebuild_tensor_v2": lambda x, start, size, stride, *_: x.as_strided(size, stride, start),
        "HalfStorage": torch.half, "FloatStorage": torch.float, "DoubleStorage": torch.double,
        "BFloat16Storage": torch.bfloat16, "LongStorage": torch.long, "IntStorage": torch.int,
        "ShortStorage": torch.short, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
        "BoolStorage": torch.bool}

    def find_class(self, module, name):
        return self.names.get(name, _Shell)

    def persistent_load(self, pid):
        _, dtype, key, _, numel = pid[:5]
        stored = self.read(f"data/{key}")  # once, for all the tensors that share it
        if len(stored) != numel * dtype.itemsize:
            raise ValueError(f"storage {key} has another size than its tensors say")
        return torch.frombuffer(stored, dtype=dtype) if stored else torch.tensor([], dtype=dtype)


class _Shell(dict):
    """Stands for all else that a pickle names, and does nothing but this: what was a module of
    TorchScript comes to hold the parameters below it."""

    __hash__ = object.__hash__  # it may be a key, or in a set

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return self

    append = extend = __call__  # or be filled like a list

    def __setstate__(self, state):
        if isinstance(state, dict):
            for name, value in state.items():
                if isinstance(value, _Shell):
                    self.update((f"{name}.{key}", tensor) for key, tensor in value.items())
                elif isinstance(value, torch.Tensor):
                    self[name] = value
