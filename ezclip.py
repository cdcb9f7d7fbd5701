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

Departures from the official code (github.com/Shahzadnit/EZ-CLIP); none changes an evaluation but
that of the temporal adapter:
  - Drop-path drops a branch for a whole clip (or text). The official mask lies along dimension 0,
    which there is the token dimension: it drops token positions for the whole batch.
  - The temporal adapter's result returns to its own video. Officially it comes back in (T, B) order
    into a (B, T) batch: the videos of a batch leak into each other. With one video the two agree.
  - The text tower's dropout rates are its own linspace, not the head of the vision tower's.
  - Weights are fp32. Officially they go through fp16 after every step, without loss scaling.
  - The variance of a single frame counts as 0 in the motion loss, not as NaN.
  - `visual.temporal_embedding`, zero and frozen in every official checkpoint, does not exist.

Letters: B videos, T frames, L tokens (of a frame: 1 class token + patches), D width, H heads, E
embed_dim, N texts. Parameters that CLIP has are named as in OpenAI's state dict, so that its files
load without a table of names.
"""

import hashlib
import io
import math
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, fields
from itertools import zip_longest
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
    adapters the model is CLIP, frame by frame. activation: "quick_gelu", or "gelu" for open_clip's
    models whose names lack -quickgelu (no weight tells). The rates are those of the last layer and
    grow linearly from 0 in the first, but for prompt_dropout. Raises ValueError for a bad value.
    """
    embed_dim: int = 512
    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 768         # heads are width / 64, in both towers
    vision_layers: int = 12
    context_length: int = 77
    vocab_size: int = 49408
    text_width: int = 512
    text_layers: int = 12
    activation: str = "quick_gelu"
    num_frames: int = 8
    prompts: str = "deep"
    adapters: bool = True
    temporal_adapter: bool = False  # the ablation of the official code, meant for prompts="none"
    drop_path: float = 0.1
    attention_dropout: float = 0.1
    prompt_dropout: float = 0.1
    recompute: bool = False         # gradient checkpointing of each block: less memory, more time

    def __post_init__(self):
        allowed = {"activation": ("quick_gelu", "gelu"), "prompts": ("deep", "shallow", "none")}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(f"{field.name} must be at least 1, not {value}")
            if field.type is float and not 0 <= value < 1:
                raise ValueError(f"{field.name} must lie in [0, 1), not {value}")
            if value not in allowed.get(field.name, (value,)):
                raise ValueError(f"{field.name} is one of {allowed[field.name]}, not {value!r}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size "
                             f"{self.patch_size}")


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of OpenAI's weights; x is overwritten.

    As silu(1.702 x) / 1.702 it keeps one tensor of this largest size for the backward pass, not
    two. There the two factors cancel, so autograd need not see them.
    """

    def forward(self, x):
        with torch.no_grad():
            x.mul_(1.702)
        x = F.silu(x, inplace=not torch.is_grad_enabled())
        with torch.no_grad():
            return x.div_(1.702)


class Attention(nn.Module):
    def __init__(self, width, dropout, causal):
        super().__init__()
        self.heads = max(1, width // 64)
        if width % self.heads:
            raise ValueError(f"width {width} is no multiple of its {self.heads} heads")
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.dropout, self.causal = dropout, causal
        self.watch = None  # or a function of queries and keys, see attention_maps

    def forward(self, x, context=None, only=None):
        """(N, L, D) -> (N, L, D): x attends to itself and, where given, to `context` (N, C, D).
        With `only`, a position in each sequence (N, 1, 1), -> (N, 1, D): its token alone asks."""
        _, L, D = x.shape
        weight, bias, dropout = self.in_proj_weight, self.in_proj_bias, self.dropout
        queries = x if only is None else x.take_along_dim(only, 1)  # (N, 1, D)
        q = F.linear(queries, weight[:D], bias[:D])
        x = x if context is None else torch.cat([x, context], 1)
        kv = F.linear(x, weight[D:], bias[D:])  # (N, L+C, 2D)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for y in (q, *kv.chunk(2, -1)))  # (N, H, L, D/H), (N, H, L+C, D/H) twice
        if self.watch:
            self.watch(q, k)
        mask = None
        if self.causal and only is not None:
            mask = torch.arange(L, device=x.device) <= only.unsqueeze(1)  # (N, 1, 1, L)
        if self.training and dropout and x.device.type == "cpu" and not self.causal:
            n = max(1, 2**19 // (self.heads * q.shape[2] * L))  # whose weights fit into a cache
            x = torch.cat([recomputed(_attend, *part, dropout)
                           for part in zip(q.split(n), k.split(n), v.split(n))])
        else:
            x = F.scaled_dot_product_attention(
                q, k, v, mask, dropout if self.training else 0.0,
                is_causal=self.causal and only is None)
        return self.out_proj(x.transpose(1, 2).flatten(2))


def _attend(q, k, v, dropout):
    """Attention with dropout for CPUs, where torch's takes longer and keeps the weights thrice."""
    weights = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)  # (N, H, L, L+C)
    bits = torch.empty(weights.numel() // 4 + 1, dtype=torch.long).random_(-2**63, None)
    bits = bits.view(torch.int16)[:weights.numel()].view_as(weights)  # four draws in one
    kept = bits >= round(2**16 * dropout) - 2**15
    return torch.where(kept, weights, 0) @ (v / (1 - dropout))


def recomputed(function, *args):
    """function(*args), checkpointed: the backward pass computes its inside again."""
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False)


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

    def __init__(self, width, config, causal, depth):  # depth: 0 in the first layer, 1 in the last
        super().__init__()
        self.attn = Attention(width, depth * config.attention_dropout, causal)
        self.ln_1 = nn.LayerNorm(width)
        gelu = QuickGELU() if config.activation == "quick_gelu" else nn.GELU()
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width), gelu=gelu, c_proj=nn.Linear(4 * width, width)))
        self.ln_2 = nn.LayerNorm(width)
        self.adapter = Adapter(width) if config.adapters else None
        self.temporal_adapter = Adapter(width) if config.temporal_adapter and not causal else None
        self.drop_rate = depth * config.drop_path

    def drop_path(self, x, num_clips):
        """Stochastic depth: drop the branch of a whole clip, all of its frames together."""
        if not self.training or self.drop_rate == 0:
            return x
        keep = x.new_empty(num_clips, 1).bernoulli_(1 - self.drop_rate) / (1 - self.drop_rate)
        return (x.reshape(num_clips, -1) * keep).view_as(x)

    def forward(self, x, num_frames, prompt=None, only=None):
        """x: (B*T, L, D), the frames of a video adjacent (texts: T = 1); prompt: (T, D) or None.
        Returns (B*T, L, D), or (B*T, 1, D): the tokens at the positions `only`, (B*T, 1, 1)."""
        (BT, L, D), T = x.shape, num_frames
        B = BT // T
        if self.temporal_adapter is not None:
            y = x.view(B, T, L, D).transpose(1, 2).reshape(B * L, T, D)
            y = self.temporal_adapter(self.attn(self.ln_1(y))).view(B, L, T, D)
            x = x + self.drop_path(y.transpose(1, 2).reshape(BT, L, D), B)
        z = None
        if prompt is not None:  # one more token per frame, which has seen the other frames
            z = prompt + x.mean(1).view(B, T, D)
            z = self.ln_1(self.drop_path(self.attn(self.ln_1(z)), B).view(BT, 1, D))
        y = self.attn(self.ln_1(x), z, only)
        x = x if only is None else x.take_along_dim(only, 1)
        x = x + self.drop_path(y, B)  # (B*T, L, D); L = 1 with `only`
        x, y = recomputed(self.adapt, x)
        return x + self.drop_path(self.mlp(y).view_as(x), B)

    def adapt(self, x):
        """-> x after the adapter, and the MLP's input, whose rows are those of all sequences."""
        x = x if self.adapter is None else x + self.adapter(x)
        return x, self.ln_2(x).flatten(0, 1)


class Transformer(nn.Module):
    """The blocks of a tower and its temporal prompts: (layers, T, D), (1, T, D) or None."""

    def __init__(self, width, layers, config, causal, prompts="none"):
        super().__init__()
        self.resblocks = nn.ModuleList(
            Block(width, config, causal, depth=i / max(1, layers - 1)) for i in range(layers))
        rows = {"deep": layers, "shallow": 1, "none": 0}[prompts]
        v = math.sqrt(6 / (3 * 16 * 16 + width))
        temporal_prompts = torch.empty(rows, config.num_frames, width).uniform_(-v, v)
        self.temporal_prompts = nn.Parameter(temporal_prompts) if rows else None
        self.prompt_dropout, self.recompute = config.prompt_dropout, config.recompute

    def forward(self, x, only, num_frames=1):
        """(B*T, L, D) -> (B*T, D): the tokens at the positions `only`, (B*T, 1, 1), which are all
        that the last block computes after its attention."""
        prompts = ()
        if self.temporal_prompts is not None:
            prompts = F.dropout(self.temporal_prompts, self.prompt_dropout, self.training)
        last = self.resblocks[-1]
        for block, prompt in zip_longest(self.resblocks, prompts):
            args = x, num_frames, prompt, only if block is last else None
            x = recomputed(block, *args) if self.recompute else block(*args)
        return x[:, 0]


class VisionTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        c, D = config, config.vision_width
        num_patches = (c.image_size // c.patch_size) ** 2
        self.conv1 = nn.Conv2d(3, D, c.patch_size, stride=c.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(D))
        self.positional_embedding = nn.Parameter(torch.empty(num_patches + 1, D))
        self.ln_pre = nn.LayerNorm(D)
        self.transformer = Transformer(D, c.vision_layers, c, causal=False, prompts=c.prompts)
        self.ln_post = nn.LayerNorm(D)
        self.proj = nn.Parameter(torch.empty(D, c.embed_dim))

    def forward(self, frames, num_frames):
        """(B*T, 3, S, S) -> (B*T, E)"""
        x = self.conv1(frames).flatten(2).transpose(1, 2)  # (B*T, L-1, D)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = self.ln_pre(x + self.positional_embedding)  # (B*T, L, D)
        x = self.transformer(x, x.new_zeros(len(x), 1, 1, dtype=torch.long), num_frames)
        return self.ln_post(x) @ self.proj


class EZCLIP(nn.Module):
    """CLIP with temporal prompts and adapters. A new model is random; `from_pretrained` loads one.

    `encode_*` return features as they are; `similarity` and `forward` normalise them.
    """

    def __init__(self, config=Config()):
        super().__init__()
        self.config = c = config
        self.visual = VisionTransformer(c)
        self.transformer = Transformer(c.text_width, c.text_layers, c, causal=True)
        self.token_embedding = nn.Embedding(c.vocab_size, c.text_width)
        self.positional_embedding = nn.Parameter(torch.empty(c.context_length, c.text_width))
        self.ln_final = nn.LayerNorm(c.text_width)
        self.text_projection = nn.Parameter(torch.empty(c.text_width, c.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if not self.logit_scale.is_meta:  # where only shapes are wanted
            self._initialise()

    def _initialise(self):
        """CLIP's initialisation; the new modules have initialised themselves."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=self.config.text_width**-0.5)
        for parameter in (self.visual.class_embedding, self.visual.positional_embedding,
                          self.visual.proj):
            nn.init.normal_(parameter, std=self.config.vision_width**-0.5)
        for blocks in (self.visual.transformer.resblocks, self.transformer.resblocks):
            for block in blocks:
                width = block.attn.out_proj.in_features
                nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
                nn.init.normal_(block.attn.out_proj.weight, std=(2 * width * len(blocks)) ** -0.5)
                nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
                nn.init.normal_(block.mlp.c_proj.weight, std=(2 * width * len(blocks)) ** -0.5)

    def encode_frames(self, video):
        """Features of every frame, not normalised: (B, T, 3, S, S) -> (B, T, E).

        video: uint8 RGB, or floats already normalised with CLIP_MEAN and CLIP_STD. T is
        config.num_frames where the model has prompts, else any. Another shape is a ValueError.
        """
        S, T = self.config.image_size, self.config.num_frames
        if video.ndim != 5 or video.shape[2:] != (3, S, S):
            raise ValueError(f"a video is (B, T, 3, {S}, {S}), not {tuple(video.shape)}")
        if self.config.prompts != "none" and video.shape[1] != T:
            raise ValueError(f"the model has prompts for {T} frames, the video has "
                             f"{video.shape[1]}: load the model with that num_frames")
        if video.dtype == torch.uint8:
            mean = torch.tensor(CLIP_MEAN, device=video.device).view(3, 1, 1)
            std = torch.tensor(CLIP_STD, device=video.device).view(3, 1, 1)
            video = (video / 255 - mean) / std
        features = self.visual(video.flatten(0, 1), video.shape[1])  # (B*T, E)
        return features.view(*video.shape[:2], -1)

    def pool(self, frame_features):
        """Frames to a video, the mean: (B, T, E) -> (B, E)."""
        return frame_features.mean(1)

    def encode_video(self, video):
        """Features of videos, not normalised: (B, T, 3, S, S) -> (B, E)."""
        return self.pool(self.encode_frames(video))

    def attention_maps(self, video):
        """The attention of each frame's class token in every layer, from one ordinary pass.

        Returns the frame features of `encode_frames`, (B, T, E), and the weights of the softmax,
        (B, T, layers, H, L+1), without gradient: for the class token itself, for the patches row by
        row, and last for the temporal prompt token, which is 0 in layers without one.
        """
        blocks, maps = self.visual.transformer.resblocks, {}
        for i, block in enumerate(blocks):
            @torch.no_grad()
            def watch(q, k, i=i):  # a block's last call is the one over the tokens of a frame
                maps[i] = (q[:, :, :1] * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)  # (B*T, H, 1, L+1)
            block.attn.watch = watch
        try:
            features = self.encode_frames(video)
        finally:
            for block in blocks:
                block.attn.watch = None
        L = len(self.visual.positional_embedding)
        maps = [F.pad(x.flatten(2), (0, L + 1 - x.shape[-1])) for x in maps.values()]
        return features, torch.stack(maps, 1).unflatten(0, video.shape[:2])

    def encode_text(self, tokens):
        """Features at the end-of-text token (the largest id): (N, L) integers -> (N, E).

        Texts of more than context_length tokens are a ValueError.
        """
        end = tokens.argmax(-1)
        tokens = tokens[:, : end.max() + 1]  # exact: in a causal tower padding changes nothing
        if tokens.shape[1] > self.config.context_length:
            raise ValueError(f"a text of {tokens.shape[1]} tokens is longer than "
                             f"context_length {self.config.context_length}")
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        return self.ln_final(self.transformer(x, end.view(-1, 1, 1))) @ self.text_projection

    def similarity(self, video_features, text_features):
        """Logits exp(logit_scale) * cosine, always in fp32: (B, E), (N, E) -> (B, N)."""
        return self.logit_scale.exp() * _cosine(video_features, text_features)

    def forward(self, video, tokens):
        """Logits of every video for every text: (B, T, 3, S, S), (N, L) -> (B, N)."""
        return self.similarity(self.encode_video(video), self.encode_text(tokens))

    def freeze_backbone(self):
        """Leave only prompts and adapters trainable; returns their number, 5204736 for Config()."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_new(name))
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @classmethod
    def from_pretrained(cls, name_or_path, num_frames=None, clip=None, **config_overrides):
        """A model in fp32 and eval mode with the weights of a file, which says itself what it is.

        name_or_path: ViT-B/32, ViT-B/16, ViT-L/14 or ViT-L/14@336px, looked up in ~/.cache/clip,
            else downloaded there; or a file: OpenAI's TorchScript archive, a state dict of OpenAI
            or open_clip, model.safetensors or pytorch_model.bin of Hugging Face, a checkpoint of
            the official EZ-CLIP / T2L code, or train.py's last.pt, which names its CLIP.
        num_frames: None for that of the prompts in the file, else 8. Prompts for another number are
            interpolated linearly over time, a frame standing at the centre of its segment.
        clip: where the CLIP of a last.pt is now, if not where it was in training.
        config_overrides: fields of Config that the file leaves open. The weights settle all sizes,
            a checkpoint also prompts, adapters and temporal_adapter.

        `weights_sha256` of the model is that of the file with CLIP's weights, `weights_adapted`
        tells whether there were prompts or adapters. Raises OSError (no file, no download), or
        ValueError naming file and keys: what is missing must be exactly the new modules, nothing
        may be left over or contradicted.
        """
        path, sha256 = _locate(name_or_path)
        files = [_WeightsFile(path)]
        if files[0].partial or clip:
            if not files[0].backbone_sha256:
                raise ValueError(f"{path}: holds its own CLIP, leave `clip` out")
            clip = clip or files[0].args["clip"]
            try:
                backbone, sha256 = _locate(clip)
            except FileNotFoundError:
                raise FileNotFoundError(f"{path}: its CLIP {clip} is not there: `clip` (--clip) "
                                        "says where it is now") from None
            if sha256 != files[0].backbone_sha256:
                raise ValueError(f"{path}: was trained on another CLIP than {clip}")
            files = [_WeightsFile(backbone), *files]
        settled = {name: value for file in files for name, value in file.settled().items()}
        frames = settled.pop("num_frames", Config.num_frames)
        for name, value in config_overrides.items():
            if settled.get(name, value) != value:
                raise ValueError(f"{path}: has {name} {settled[name]!r}, not {value!r}")
        try:
            config = Config(**{**config_overrides, **settled,
                               "num_frames": frames if num_frames is None else num_frames})
            with torch.device("meta"):  # sizes that a file claims take no memory before the check
                blank = cls(config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        parameters = {name: x for file in files for name, x in file.tensors(blank).items()}
        model = cls(config)
        model.load_state_dict({**model.state_dict(), **parameters})
        model.weights_sha256 = sha256
        model.weights_adapted = any(file.adapted for file in files)
        return model.eval()


_CLIP_NAMES = re.compile(
    r"(visual\.)?(transformer\.resblocks\.\d+\.)?("
    r"(attn\.(in_proj_|out_proj\.)|mlp\.c_(fc|proj)\.|ln_(1|2|pre|post|final)\.)(weight|bias)|"
    r"(class|positional|token)_embedding(\.weight)?|conv1\.weight|"
    r"proj|text_projection|logit_scale)")


def is_new(name):
    """Whether a parameter is none of CLIP's: it is trained and saved, and CLIP's files lack it."""
    return not _CLIP_NAMES.fullmatch(name)


def contrastive_loss(logits, labels):
    """(KL_v + KL_t) / 2, where several texts of a batch may belong to a video (ActionCLIP's loss).

    logits: (B, B), a video per row, its text in the same column; labels: (B,), the classes. The
    target of row i is softmax(10 * [label_i == label_j]). Returns a scalar, in nats.
    """
    target = (10.0 * (labels[:, None] == labels).float()).softmax(1)  # symmetric
    kl_video = F.kl_div(logits.float().log_softmax(1), target, reduction="batchmean")
    kl_text = F.kl_div(logits.float().T.log_softmax(1), target, reduction="batchmean")
    return (kl_video + kl_text) / 2


def motion_loss(frame_features):
    """1 / (1 + C + V), the paper's motion loss: small where frames differ, 1 for a still clip.

    frame_features: (B, T, E), not normalised. C: mean of |f[t+1] - f[t-1]| / 2, ends replicated; V:
    mean of the unbiased variance over time, 0 for a single frame. Returns a scalar in (0, 1].
    """
    f = frame_features.float()
    change = torch.cat([f[:, 1:], f[:, -1:]], 1) - torch.cat([f[:, :1], f[:, :-1]], 1)
    variance = f.var(1).mean() if f.shape[1] > 1 else 0.0
    return 1 / (1 + change.abs().mean() / 2 + variance)


def class_probabilities(video_features, text_features, logit_scale=100.0):
    """Zero-shot classification: softmax over classes, then the mean over templates.

    video_features: (B, E), text_features: (templates, classes, E), normalised here. Returns
    (B, classes). The scale is that of the official evaluation. (CLIP averages features instead.)
    """
    return (logit_scale * _cosine(video_features, text_features)).softmax(-1).mean(0)


def retrieval_scores(queries, query_labels, gallery, gallery_labels):
    """Rank a gallery of clips for each query clip by the cosine of their features.

    queries: (Q, E), gallery: (G, E), normalised here; their labels, (Q,) and (G,), are indices of
    classes or identities. Returns {"rank1", "rank5", "mAP"} in [0, 1]: the share of queries with a
    match among the first 1 and 5 (CMC, R@1 and R@5), and the mean average precision. A query
    without a match in the gallery is a ValueError.
    """
    order = _cosine(queries, gallery).argsort(dim=1, descending=True, stable=True)
    hits = (gallery_labels[order] == query_labels[:, None]).float()  # (Q, G)
    if not hits.any(1).all():
        raise ValueError(f"no clip of the gallery has label {query_labels[~hits.any(1)][0].item()}")
    precision = hits.cumsum(1) / torch.arange(1, len(gallery) + 1, device=hits.device)
    scores = {f"rank{k}": hits[:, :k].any(1).float().mean().item() for k in (1, 5)}
    return {**scores, "mAP": ((precision * hits).sum(1) / hits.sum(1)).mean().item()}


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

# From our parameter names to a file's, substituted in this order: so errors name the file's keys.
_OFFICIAL = (("temporal_adapter.fc", "T_Adapter.D_fc"), ("adapter.fc", "Adapter.D_fc"),
             ("temporal_prompts", "T_prompt_embeddings"))
_HUGGING_FACE = (
    (r"^visual\.proj$", "visual_projection.weight"), (r"^(text_projection)$", r"\1.weight"),
    (r"^visual\.", "vision_model."), (r"^(?=transf|token_|posit|ln_final)", "text_model."),
    (r"transformer\.resblocks", "encoder.layers"), (r"\.attn\.", ".self_attn."),
    (r"\.ln_([12])", r".layer_norm\1"), (r"\.c_fc", ".fc1"), (r"\.c_proj", ".fc2"),
    ("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm"), ("ln_final", "final_layer_norm"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    (r"(class|token)_embedding", r"embeddings.\1_embedding"),
    ("conv1", "embeddings.patch_embedding"))
_NO_WEIGHTS = r"(input_resolution|context_length|vocab_size|(.*\.)?(position_ids|attn_mask))"


def _locate(name_or_path):
    """-> path of the file and its SHA-256, after a download where that is needed."""
    path, expected = Path(name_or_path).expanduser(), _RELEASES.get(str(name_or_path))
    if expected:
        file = re.sub("[/@]", "-", str(name_or_path)) + ".pt"
        path, url = Path.home() / ".cache/clip" / file, f"{_URL}/{expected}/{file}"
        if not path.exists():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(path), hash_prefix=expected)
            except (OSError, RuntimeError) as error:
                raise OSError(f"cannot download {name_or_path} ({error}): "
                              f"fetch {url} elsewhere and put it at {path}") from None
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, and none of {', '.join(_RELEASES)}")
    sha256 = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            sha256.update(block)
    if expected not in (None, sha256.hexdigest()):
        raise ValueError(f"{path}: SHA-256 is not that of {name_or_path}: delete the file")
    return path, sha256.hexdigest()


class _WeightsFile:
    """The tensors of a file in any of the known formats, looked up by our parameter names."""

    def __init__(self, path):
        self.path = path
        run = state = read_weights(path)  # what train.py saved, or the state alone
        for key in ("model_state_dict", "state_dict"):
            if isinstance(state, dict) and isinstance(state.get(key), dict):
                state = state[key]
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise ValueError(f"{path}: not weights, for it is no dict of names and tensors")
        self.backbone_sha256, self.args = run.get("backbone_sha256"), run.get("args")
        prefix = "module." if all(key.startswith("module.") for key in state) else ""
        self.state = {key[len(prefix):]: value for key, value in state.items()
                      if not re.fullmatch(_NO_WEIGHTS, key[len(prefix):])}
        _refuse(path, "not tensors of weights", [
            key for key, value in self.state.items() if not isinstance(value, torch.Tensor) or
            value.layout != torch.strided or value.device.type != "cpu" or value.numel() == 0
            or value.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64)])
        if sum(v.numel() * v.element_size() for v in self.state.values()) > os.path.getsize(path):
            raise ValueError(f"{path}: its tensors claim more bytes than the file has")
        added = re.compile(r".*(resblocks\.\d+\.(T_|temporal_)?[Aa]dapter\.|T_prompt|temporal_)")
        self.partial = bool(self.backbone_sha256) and "visual.conv1.weight" not in self.state
        self.adapted = self.partial or any(map(added.match, self.state))
        kinds = dict(clip=str, activation=str, num_frames=int, prompts=str, no_adapters=bool,
                     temporal_adapter=bool)
        if self.backbone_sha256 and (type(self.args) is not dict or any(
                type(self.args.get(name)) is not kind for name, kind in kinds.items())):
            raise ValueError(f"{path}: is a damaged checkpoint: args")
        self.hugging_face = "vision_model.embeddings.class_embedding" in self.state
        official = any("Adapter." in key or "T_prompt" in key for key in self.state)
        self.names = _HUGGING_FACE if self.hugging_face else _OFFICIAL if official else ()
        self.temporal_embedding = self.state.pop("visual.temporal_embedding", torch.zeros(0))
        if self.temporal_embedding.any():
            raise ValueError(f"{path}: visual.temporal_embedding is not zero, as it should be")

    def keys(self, name):
        """The file's keys of one of our parameters: Hugging Face keeps q, k and v apart."""
        for ours, theirs in self.names:
            name = re.sub(ours, theirs, name)
        split = self.hugging_face and "in_proj_" in name
        return [name.replace("in_proj_", f"{x}_proj.") for x in "qkv"] if split else [name]

    def settled(self):
        """The fields of Config that the weights settle."""
        def shape(name, ndim):
            key, = self.keys(name)
            if key not in self.state or self.state[key].ndim != ndim:
                raise ValueError(f"{self.path}: not a CLIP ViT, missing or misshapen: {key}")
            return self.state[key].shape

        def layers(prefix):
            prefix, = self.keys(prefix)
            rest = (key[len(prefix):] for key in self.state if key.startswith(prefix))
            return len({key.split(".")[0] for key in rest})

        prompts, rows = "visual.transformer.temporal_prompts", 0
        if self.keys(prompts)[0] in self.state:
            rows, num_frames, _ = shape(prompts, 3)
            if self.backbone_sha256 and self.args["num_frames"] != num_frames:
                raise ValueError(f"{self.path}: is a damaged checkpoint: num_frames")
        if self.partial:
            settled = {name: self.args[name] for name in (
                "activation", "num_frames", "prompts", "temporal_adapter")}
            return {**settled, "adapters": not self.args["no_adapters"]}
        width, _, patch, _ = shape("visual.conv1.weight", 4)
        grid = math.isqrt(max(0, shape("visual.positional_embedding", 2)[0] - 1))
        context_length, text_width = shape("positional_embedding", 2)
        settled = dict(
            embed_dim=shape("text_projection", 2)[0 if self.hugging_face else 1],
            image_size=grid * patch, patch_size=patch, vision_width=width,
            vision_layers=layers("visual.transformer.resblocks."),
            context_length=context_length, vocab_size=shape("token_embedding.weight", 2)[0],
            text_width=text_width, text_layers=layers("transformer.resblocks."))
        if self.backbone_sha256:
            settled["activation"] = self.args["activation"]
        if 12 * (settled["vision_layers"] + settled["text_layers"]) > len(self.state) + 100:
            raise ValueError(f"{self.path}: not a CLIP ViT, its layers are incomplete")
        if self.adapted:
            if rows:
                settled["num_frames"] = num_frames
            elif self.temporal_embedding.ndim == 3:
                settled["num_frames"] = self.temporal_embedding.shape[1]
            settled["prompts"] = {0: "none", settled["vision_layers"]: "deep"}.get(rows, "shallow")
            settled["temporal_adapter"] = any(re.search("T_A|temporal_a", k) for k in self.state)
            settled["adapters"] = any(re.search(r"\.[Aa]dapter", key) for key in self.state)
        return settled

    def tensors(self, model):
        """{our name: tensor} for `model`; ValueError lists what is missing, left or misshapen."""
        left, found, missing, misshapen = dict(self.state), {}, [], []
        for name, parameter in model.named_parameters():
            keys = self.keys(name)
            if any(key not in left for key in keys):
                if self.adapted if is_new(name) else not self.partial:
                    missing += [key for key in keys if key not in left]
                continue
            parts, shape = [left.pop(key) for key in keys], tuple(parameter.shape)
            if len(keys) > 1:
                shape = (shape[0] // len(keys), *shape[1:])
            elif self.hugging_face and name in ("visual.proj", "text_projection"):
                parts = [part.T if part.ndim == 2 else part for part in parts]
            elif "temporal_prompts" in name and parts[0].ndim == 3:
                prompts = parts[0].float().mT  # (layers, D, T)
                parts = [F.interpolate(prompts, shape[1], mode="linear").mT]
            wrong = [f"{key} ({tuple(part.shape)}, expected {shape})"
                     for key, part in zip(keys, parts) if part.shape != shape]
            misshapen += wrong
            if not wrong:
                found[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
        _refuse(self.path, "does not fit a CLIP ViT, missing", missing)
        _refuse(self.path, "does not fit a CLIP ViT, unexpected", [*left])
        _refuse(self.path, "does not fit a CLIP ViT, misshapen", misshapen)
        return found


def _refuse(path, problem, keys):
    if keys:
        more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
        raise ValueError(f"{path}: {problem}: {', '.join(keys[:8])}{more}")


def read_weights(path):
    """What a file of weights holds, a dict with tensors in it, without executing any of it.

    TorchScript archives, safetensors and what torch.save writes, now or before PyTorch 1.6, are
    told apart by their content. One that cannot be read is a ValueError that names it.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            header = file.read(9)
            if header[8:] == b"{" and int.from_bytes(header[:8], "little") < size:
                from safetensors.torch import load_file
                return load_file(path)
            file.seek(0)
            return (_read_archive if header.startswith(b"PK") else _read_legacy)(file, size)
    except FileNotFoundError:
        raise
    except Exception as error:  # there is no bound to what a hostile file makes a reader raise
        reason = ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split())[:160])))
        raise ValueError(f"{path}: cannot be read as weights: {reason}") from None


def _read_archive(file, size):
    """What torch.save or torch.jit.save wrote: a pickle, and an entry for each storage."""
    archive = zipfile.ZipFile(file)
    entries = [e for e in archive.infolist() if e.filename.split("/")[1:2] != ["code"]]
    if any(e.compress_type for e in entries) or sum(e.file_size for e in entries) > size:
        raise ValueError("its entries are compressed or overlap, which those of weights never do")
    names = archive.namelist()  # the code of TorchScript may be compressed, and is never read
    root, = (name[:-8] for name in names if re.fullmatch("[^/]+/data.pkl", name))
    if root + "byteorder" in names and archive.read(root + "byteorder") != b"little":
        raise ValueError("its numbers are not little-endian")
    unpickler = _Unpickler(archive.open(root + "data.pkl"), size)
    content = unpickler.load()
    for key, storage in unpickler.storages.items():
        _fill(storage, archive.open(f"{root}data/{key}"))
    return _state(content) if isinstance(content, _Unpickler.shell) else content


def _read_legacy(file, size):
    """What torch.save wrote before PyTorch 1.6: five pickles, and then the storages."""
    unpickler = _Unpickler(file, size)
    magic, _, _, content, keys = (unpickler.load() for _ in range(5))
    if magic != 0x1950A86A20F9469CFC6C:
        raise ValueError("it was not written by torch.save")
    file.seek(unpickler.stream.tell())
    if any(type(key) is not str for key in keys) or {*keys} != unpickler.storages.keys():
        raise ValueError("its storages are not those of its tensors")
    for key in keys:
        if int.from_bytes(file.read(8), "little") != len(unpickler.storages[key]):
            raise ValueError(f"storage {key} has another size than its tensors say")
        _fill(unpickler.storages[key], file)
    return content


def _fill(storage, stream):
    if stream.readinto(storage.view(torch.uint8).numpy()) != storage.nbytes:
        raise ValueError("it ends within its numbers")


def _rebuild(storage, offset, size, stride, *_):
    tensor = storage.as_strided(size, stride, offset)  # which checks its bounds
    if tensor.numel() > len(storage):
        raise ValueError("a tensor has more numbers than its storage")
    return tensor


class _Opcodes(dict):
    def __missing__(self, code):
        raise ValueError(f"the opcode {chr(code)!r} of pickle has no place among weights")


class _Unpickler(pickle._Unpickler):  # Python's own: no index in a file can inflate its memo
    """Reads containers, numbers, texts, tensors and TorchScript's modules, with the opcodes that
    PyTorch writes for these and no others.

    Modules become empty shells. Tuples become lists and keys are texts or small numbers, as others
    can keep hash() busy for ever. Tensors lie in `storages`, to be filled later.
    """
    dispatch = _Opcodes((code, pickle._Unpickler.dispatch[code]) for code in
                        b"\x80.(lN\x88\x89KMJ\x8aGX])}aeQcR\x81qrhj")
    dispatch[pickle.TUPLE[0]] = dispatch[pickle.LIST[0]]
    for n in (1, 2, 3):  # the opcodes TUPLE1, TUPLE2 and TUPLE3
        dispatch[0x84 + n] = lambda self, n=n: self.stack.append(
            [self.stack.pop() for _ in range(n)][::-1])
    shell = type("Shell", (), {})
    dtypes = dict(Half=torch.half, BFloat16=torch.bfloat16, Float=torch.float, Double=torch.double,
                  Long=torch.long, Int=torch.int, Short=torch.short, Char=torch.int8,
                  Byte=torch.uint8, Bool=torch.bool)
    known = {("torch", f"{name}Storage"): dtype for name, dtype in dtypes.items()}
    known["collections", "OrderedDict"] = lambda: {}
    known["torch._utils", "_rebuild_parameter"] = lambda tensor, *_: tensor
    known["torch._utils", "_rebuild_tensor_v2"] = _rebuild

    def __init__(self, file, size):
        self.stream = io.BytesIO(file.read(4 << 20))  # many times what weights need
        super().__init__(self.stream)
        self.size, self.storages = size, {}

    def find_class(self, module, name):
        if module.split(".")[0] == "__torch__":
            return self.shell
        if module == "torch.jit._pickle":  # build_intlist, restore_type_tag: the first is the value
            return lambda value, *_: value
        module = module.replace("torch.cuda", "torch")  # of storages
        if (module, name) not in self.known:
            raise ValueError(f"{module}.{name} has no place among weights")
        return self.known[module, name]

    def persistent_load(self, pid):
        _, dtype, key, _, numel, *view = pid
        if type(key) is not str or any(view):
            raise ValueError("its storages are not named as by torch.save")
        if key not in self.storages:
            self.size -= numel * dtype.itemsize
            if self.size < 0:
                raise ValueError("its tensors claim more bytes than the file has")
            self.storages[key] = torch.empty(numel, dtype=dtype)
        return self.storages[key]

    def set_items(self, items):
        for key, value in zip(items[::2], items[1::2]):
            if type(self.stack[-1]) is not dict or not (
                    type(key) is str or type(key) is int and abs(key) < 2**31):
                raise ValueError(f"{type(key).__name__} has no place among keys")
            self.stack[-1][key] = value

    def build(self):
        state = self.stack.pop()
        if isinstance(self.stack[-1], self.shell):  # and not the metadata of a state dict
            vars(self.stack[-1]).update(state)

    dispatch[pickle.SETITEM[0]] = lambda self: self.set_items(
        [self.stack.pop() for _ in range(2)][::-1])
    dispatch[pickle.SETITEMS[0]] = lambda self: self.set_items(self.pop_mark())
    dispatch[pickle.BUILD[0]] = build


def _state(module):
    """The state dict of TorchScript's modules. torch.jit is deprecated, and runs a file's code."""
    state, seen, modules = {}, set(), [("", module)]
    while modules:
        prefix, module = modules.pop()
        if id(module) in seen or len(prefix) > 200:
            raise ValueError("its modules are no tree")
        seen.add(id(module))
        for name, value in vars(module).items():
            if isinstance(value, _Unpickler.shell):
                modules.append((f"{prefix}{name}.", value))
            elif isinstance(value, torch.Tensor):
                state[prefix + name] = value
    return state
