"""The same model as ezclip.py written in the obvious way: the yardstick of speed.py.

nn.MultiheadAttention, tokens first, the prompt token asks like any other, every token goes through
the whole last block, and every text has 77 tokens. `Naive(model)` computes what `model` does and
has its parameters under the same names; test_ezclip.py compares the two.
"""

import torch
from torch import nn

from ezclip import CLIP_MEAN, CLIP_STD, EZCLIP, Adapter


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width, config, depth):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, max(1, width // 64), depth * config.attention_dropout)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.c_fc, self.mlp.gelu = nn.Linear(width, 4 * width), QuickGELU()
        self.mlp.c_proj = nn.Linear(4 * width, width)
        self.adapter, self.drop_rate = Adapter(width), depth * config.drop_path

    def attention(self, x, mask=None):
        x = self.ln_1(x)
        return self.attn(x, x, x, need_weights=False, attn_mask=mask)[0]

    def drop_path(self, x, T):
        if not self.training or self.drop_rate == 0:
            return x
        keep = x.new_empty(1, x.shape[1] // T, 1, 1).bernoulli_(1 - self.drop_rate)
        return (x.unflatten(1, (-1, T)) / (1 - self.drop_rate) * keep).flatten(1, 2)

    def forward(self, x, T, prompt=None, mask=None):
        """x: (L, B*T, D)"""
        tokens = x
        if prompt is not None:
            z = (x.mean(0).view(-1, T, x.shape[-1]) + prompt).transpose(0, 1)  # (T, B, D)
            z = self.attention(z).transpose(0, 1).flatten(0, 1)
            tokens = torch.cat([x, self.drop_path(z[None], T)])
        x = x + self.drop_path(self.attention(tokens, mask), T)[: len(x)]
        x = x + self.adapter(x)
        return x + self.drop_path(self.mlp(self.ln_2(x)), T)


class Transformer(nn.Module):
    def __init__(self, width, layers, config, frames=0):
        super().__init__()
        self.resblocks = nn.ModuleList(
            Block(width, config, i / max(1, layers - 1)) for i in range(layers))
        self.prompt_dropout = config.prompt_dropout
        if frames:
            self.temporal_prompts = nn.Parameter(torch.empty(layers, frames, width))

    def forward(self, x, T=1, mask=None):
        for i, block in enumerate(self.resblocks):
            prompts = getattr(self, "temporal_prompts", None)
            prompt = None if prompts is None else nn.functional.dropout(
                prompts[i], self.prompt_dropout, self.training)
            x = block(x, T, prompt, mask)
        return x


class Naive(EZCLIP):
    def __init__(self, model):
        super().__init__(model.config)
        c = self.config
        self.visual.transformer = Transformer(c.vision_width, c.vision_layers, c, c.num_frames)
        self.transformer = Transformer(c.text_width, c.text_layers, c)
        self.load_state_dict(model.state_dict())
        self.train(model.training).freeze_backbone()

    def encode_frames(self, video):
        (B, T), v = video.shape[:2], self.visual
        mean, std = (torch.tensor(x, device=video.device).view(3, 1, 1)
                     for x in (CLIP_MEAN, CLIP_STD))
        x = v.conv1(((video / 255 - mean) / std).flatten(0, 1)).flatten(2).permute(0, 2, 1)
        x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = v.ln_pre(x + v.positional_embedding).permute(1, 0, 2)  # (L, B*T, D)
        x = v.transformer(x, T).permute(1, 0, 2)
        return (v.ln_post(x)[:, 0] @ v.proj).view(B, T, -1)

    def encode_text(self, tokens):
        L = tokens.shape[1]
        mask = torch.full((L, L), float("-inf"), device=tokens.device).triu(1)
        x = (self.token_embedding(tokens) + self.positional_embedding).permute(1, 0, 2)
        x = self.ln_final(self.transformer(x, mask=mask).permute(1, 0, 2))
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection
