"""Export a model to ONNX: classify clips where there is no PyTorch.

    python examples/export.py --checkpoint runs/ucf101_frames/last.pt --out exported
    python examples/export.py --clip ViT-B/16 --class-names "riding a bike" archery --out exported

Needs `pip install onnx onnxscript onnxruntime`. The folder --out receives

    video.onnx    video, uint8 RGB (B, T, 3, S, S) -> features, fp32 (B, E), of encode_video
    text.onnx     tokens, int64 (N, --text-length) -> features, fp32 (N, E), of encode_text
    classes.json  names, their text features (templates, classes, E) of norm 1, the logit scale,
                  sizes, templates, SHA-256 of the files and of what they were made from

B and N are free. ONNX Runtime runs both files, and is compared with PyTorch, before --out appears.
Class names are by default those of the checkpoint's training. Weights of more than 2 GB, the most
that a file of this format holds, come to lie beside it, as in video.onnx.data.
"""

import hashlib
import importlib.util
import json
import logging
import shutil
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import predict
import train

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MOST = 2**31 - 2**24  # bytes of weights in one file, with room for the graph
TOLERANCE = 1e-4


def parser():
    p = data.Parser(allow_abbrev=False, description="Export a model to ONNX.")
    flag = p.add_argument
    flag("--out", required=True, help="the folder to write, which must not exist")
    flag("--text-length", type=data.at_least(1), help="tokens of a text (the model's context, 77)")
    predict.add_flags(p)
    p.set_defaults(device="cpu")
    return p


class Encoder(nn.Module):
    """One of a model's methods as a module, which is what can be exported."""

    def __init__(self, model, method):
        super().__init__()
        self.model = model
        self.method = method

    def forward(self, x):
        return getattr(self.model, self.method)(x)


def export(encoder, example, path, input_name):
    """Write a module as ONNX whose batch size, that of example and result, is free."""
    weights = sum(p.nbytes for p in encoder.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        torch.onnx.export(
            encoder, (example,), str(path), dynamo=True, verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch", max=2**20)},),
            input_names=[input_name], output_names=["features"], external_data=weights > MOST)


def largest_difference(encoder, path, inputs):
    """Between PyTorch and ONNX Runtime, as a share of the largest feature."""
    import onnxruntime
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    worst = 0.0
    for batch in inputs:
        expected = encoder(batch)
        result, = session.run(None, {name: batch.numpy()})
        difference = (torch.from_numpy(result) - expected).abs().max() / expected.abs().max()
        worst = max(worst, difference.item())
    return worst


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def example_inputs(config, length, counts):
    """Random videos and texts for a model, a batch of each of these sizes."""
    videos, texts = [], []
    shape = config.num_frames, 3, config.image_size, config.image_size
    last = config.vocab_size - 1  # the end of a text is its largest id
    for count in counts:
        videos.append(torch.randint(256, (count, *shape), dtype=torch.uint8))
        tokens = torch.randint(1, last, (count, length))
        texts.append(tokens.scatter(1, torch.randint(length, (count, 1)), last))
    return videos, texts


@torch.inference_mode()
def describe(model, args):
    """What classes.json says of the model and its classes, before the files are there."""
    config = model.config
    features, templates = [], []
    if args.class_names:
        templates = train.templates_of(args)
        features = train.encode_classes(args.class_names, args, model, args.text_length)
        features = F.normalize(features, dim=-1).double().round(decimals=7).tolist()
    return {
        "classes": args.class_names,
        "templates": list(templates),
        "descriptions": args.descriptions,
        "logit_scale": 100.0,  # of class_probabilities
        "num_frames": config.num_frames,
        "image_size": config.image_size,
        "embed_dim": config.embed_dim,
        "text_length": args.text_length,
        "clip": model.weights_path,
        "checkpoint": args.checkpoint,
        "text_features": features}


def check(args):
    """Find errors before a model is loaded, and the classes, if there are any."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} are needed: pip install {' '.join(PACKAGES)}")
    if args.precision == "bf16" or args.device != "cpu":
        raise ValueError("what is exported is fp32, by the CPU: leave --precision and --device out")
    if args.class_names or args.checkpoint:
        args.class_names = predict.classes_of(args)
    elif args.templates or args.descriptions:
        raise ValueError("--templates and --descriptions go with --class-names")


def main(argv=None):
    args = parser().parse_args(argv)
    out = Path(args.out)
    part = out.with_name(f"{out.name}.part")  # becomes --out when all is in it
    for folder in (out, part):
        if folder.exists():
            raise ValueError(f"{folder}: exists already")
    check(args)
    model = train.build_model(args).eval().requires_grad_(False)
    context = model.config.context_length
    args.text_length = args.text_length or context
    if args.text_length > context:
        raise ValueError(f"--text-length {args.text_length} is more than the model's context, "
                         f"{context}")
    content = describe(model, args)

    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    counts = (2, 1, 5)  # the export sees the first
    videos, texts = example_inputs(model.config, args.text_length, counts)
    part.mkdir(parents=True)
    try:
        for name, method, input_name, inputs in (("video", "encode_video", "video", videos),
                                                 ("text", "encode_text", "tokens", texts)):
            encoder = Encoder(model, method)
            path = part / f"{name}.onnx"
            export(encoder, inputs[0], path, input_name)
            difference = largest_difference(encoder, path, inputs)
            print(f"{name}.onnx: ONNX Runtime differs from PyTorch by {difference:.1e} of the "
                  f"largest feature, in batches of {', '.join(map(str, counts))}")
            if not difference < TOLERANCE:
                raise ValueError(f"{name}.onnx: that is more than {TOLERANCE}, nothing is kept")
        # what a user has to trust, and to tell one export from another by
        files = sorted(part.iterdir())
        content["sha256"] = {file.name: sha256(file) for file in files}
        content["sha256"]["clip"] = model.weights_sha256
        if args.checkpoint:
            content["sha256"]["checkpoint"] = sha256(args.checkpoint)
        (part / "classes.json").write_text(json.dumps(content) + "\n")
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{out}: {', '.join(file.name for file in files)}, classes.json with "
          f"{len(args.class_names)} classes")
    return content


if __name__ == "__main__":
    data.command(main)
