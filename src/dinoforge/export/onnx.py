"""ONNX: a graph from normalised images to cls and patch tokens, for any batch."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dinoforge.export.content import Content, Format, Outputs, Rule, library
from dinoforge.models.vit import VisionTransformer

_MAX_BYTES = 2**31 - 2**24  # the most weights that fit in an ONNX file; larger weights go into a file beside it


class _Outputs(nn.Module):
    """The network with the outputs of the graph."""

    def __init__(self, network: VisionTransformer) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Outputs:
        tokens = self.network(images)
        return tokens.cls, tokens.patches


def _write(content: Content, path: Path) -> list[str]:
    onnx = library("onnx")
    library("onnxscript")  # torch.onnx needs it
    network = content.backbone.network
    side = network.patch_size
    shape = {0: torch.export.Dim("batch")}
    height, width = content.size
    if not content.fixed:
        shape |= {2: side * torch.export.Dim("rows"), 3: side * torch.export.Dim("columns")}
        # The sides differ from each other and from the grid of position embeddings, so export finds no constant.
        height, width = height + side, width + 2 * side
    example = torch.zeros(2, network.in_chans, height, width)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about itself
        program = torch.onnx.export(
            _Outputs(network).eval(),
            (example,),
            input_names=["images"],
            output_names=["cls", "patches"],
            dynamic_shapes=(shape,),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    image = content.backbone.image
    program.model.metadata_props.update(
        {"mean": json.dumps(image.mean), "std": json.dumps(image.std), "size": json.dumps(content.size)}
    )
    large = sum(t.nbytes for t in content.tensors.values()) > _MAX_BYTES
    program.save(str(path), external_data=large)
    onnx.checker.check_model(str(path))
    sizes = f"{content.size[0]} × {content.size[1]} pixels" if content.fixed else "any size"
    return [
        f"onnxruntime.InferenceSession({path.name!r}).run(['cls', 'patches'], {{'images': images}})",
        f"images: float32 [batch, {network.in_chans}, height, width] of {sizes}, normalised by mean={image.mean}, "
        f"std={image.std}",
    ]


def _open(content: Content, path: Path) -> Callable[[Tensor], Outputs]:
    runtime = library("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Outputs:
        cls, patches = session.run(["cls", "patches"], {"images": images.numpy()})
        return torch.from_numpy(cls), torch.from_numpy(patches)

    return run


def _rule(content: Content) -> Rule | None:
    """Return the network's rule; None for a rule with an offset, whose scale cannot depend on the size in a graph."""
    return content.rule if content.rule[1] == 0 else None


ONNX = Format("onnxruntime", (".onnx",), False, _rule, _write, _open)
