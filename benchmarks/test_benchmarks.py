"""Tests of the benchmarks: what they compare with computes the same, what they count is there."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import speed
from naive import Naive
from test_ezclip import NOISE, golden_inputs, loss_and_gradients, near, randomised, small


def test_savings_are_exact():
    """EZCLIP equals the naive model, in the outputs and in every gradient."""
    model = small(drop_path=0.0, attention_dropout=0.0, prompt_dropout=0.0)
    naive = Naive(randomised(model))
    _, tokens = golden_inputs(3, 4)
    near(model.encode_frames(NOISE), naive.encode_frames(NOISE))
    near(model.encode_text(tokens), naive.encode_text(tokens))
    (loss, ours), (expected, theirs) = map(loss_and_gradients, (model.train(), naive.train()))
    near(loss, expected)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        near(gradient, theirs[name], 1e-4 * theirs[name].abs().max())


@pytest.mark.parametrize("what", ["encode_video", "encode_text", "step"])
def test_counted_flops_are_those_of_the_model(what, monkeypatch):
    monkeypatch.setattr(speed, "TEXTS", 3)
    model, (_, tokens), video = small(), golden_inputs(3, 4), NOISE
    tokens = speed.train.without_padding(tokens)
    model.freeze_backbone() if what == "step" else model.requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        frames = model.encode_frames(video) if what != "encode_text" else torch.zeros(3, 4, 32)
        texts = model.encode_text(tokens) if what != "encode_video" else torch.zeros(3, 32)
        if what == "step":
            (frames.sum() + texts.sum()).backward()
    shapes = speed.products(what, model.config, 3, 4, length=tokens.shape[1])
    assert counter.get_total_flops() == speed.flops(shapes, what == "step")
