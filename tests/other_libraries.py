"""Backbones that other libraries made, for the tests of several rooms."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinoforge.weights.backbone import load_backbone

HEADS = {"num_heads": 2}
SIZE = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 14, "image_size": 56}
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


def randomised(network):
    """Fill a network with large random weights, so that every part of it shows in outputs."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3)
    return network.eval()


def assert_same_tensors(path, network):
    """Load a file, hold its tensors against a network's, and return the backbone."""
    back = load_backbone(path, HEADS)
    ours = back.network.state_dict()
    assert set(ours) == set(network.state_dict())
    assert all(torch.equal(tensor, ours[name]) for name, tensor in network.state_dict().items())
    return back


def assert_outputs_equal(model, back, size=(56, 56)):
    """Hold a backbone's tokens against those of transformers' model."""
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        theirs, ours = model(images).last_hidden_state, back.network(images)
    both = torch.cat([ours.cls[:, None], ours.registers, ours.patches], dim=1)
    torch.testing.assert_close(both, theirs, rtol=0, atol=1e-4)


def write_folder(folder, *, change=None, tensors=None, registers=0, **config):
    """A folder that transformers wrote, its config.json and tensors changed; returns the model."""
    transformers = pytest.importorskip("transformers")
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14, "image_size": 56}
    extra = {"num_register_tokens": registers} if registers else {}
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes | config, **extra))
    randomised(model).save_pretrained(folder)
    if change is not None:
        path = folder / "config.json"
        said = json.loads(path.read_text()) | change
        path.write_text(json.dumps({key: value for key, value in said.items() if value is not ...}))
    if tensors is not None:
        path = folder / "model.safetensors"
        save_file(tensors(load_file(path)), path, metadata={"format": "pt"})
    return model


def with_prefix(prefix, state):
    """Put a prefix before the names of a state dict."""
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}
