"""Our AdamW is PyTorch's, and a run does without PyTorch's compiler."""

import copy
import json
import subprocess
import sys

import pytest
import torch

from dinoforge.optim.adamw import AdamW
from tiny import TINY


@pytest.mark.parametrize("fused", [True, False])
def test_it_is_pytorchs(fused):
    torch.manual_seed(0)
    ours = [torch.randn(5, 3, requires_grad=True), torch.randn(7, requires_grad=True)]
    theirs = copy.deepcopy(ours)
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.3, "fused": fused}
    optimizers = [AdamW(ours, **settings), torch.optim.AdamW(theirs, **settings)]
    for step in range(4):
        if step == 2:  # the state of one goes on in the other
            states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
            optimizers = [AdamW(ours, **settings), torch.optim.AdamW(theirs, **settings)]
            for optimizer, state in zip(optimizers, reversed(states), strict=True):
                optimizer.load_state_dict(state)
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            sum((p**2).sin().sum() for p in parameters).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert all(p.grad is None for p in parameters)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_it_calls_hooks():
    parameter = torch.ones(2, requires_grad=True)
    optimizer = AdamW([parameter])
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    parameter.sum().backward()
    optimizer.step()
    assert len(seen) == 1


@pytest.mark.processes
def test_a_run_does_not_import_the_compiler(tmp_path):
    code = (
        "import sys, json, numpy as np, dinoforge\n"
        "out, keys = sys.argv[1], json.loads(sys.argv[2])\n"
        "images = np.random.default_rng(0).integers(0, 255, (16, 32, 32), dtype=np.uint8)\n"
        "dinoforge.train(images, 'small', out, **keys)\n"
        "assert not {'torch._dynamo', 'torch._inductor'} & set(sys.modules), 'imported'\n"
    )
    keys = TINY | {"train.steps": 2}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run"), json.dumps(keys)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
