"""What steps and features ask of a device, beside what PyTorch says that MPS can do."""

from pathlib import Path

import pytest
import torch
import torchgen
import yaml
from rich.console import Console

from dinoforge.commands.embed import embed
from dinoforge.commands.report import report
from dinoforge.commands.train import train
from dinoforge.selfcheck.fake import fake_accelerator
from tiny import TINY
from variants import VARIANTS, bench

ANYWHERE = {"CompositeExplicitAutograd", "CompositeImplicitAutograd", "CompositeExplicitAutogradNonFunctional"}


@pytest.fixture(scope="module")
def kernels() -> dict[str, set[str]]:
    """The backends of each operation, from the table that PyTorch is built from."""
    table = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    functions = {f"aten::{f['func'].partition('(')[0]}": f for f in yaml.safe_load(table.read_text())}

    def backends(name: str) -> set[str]:
        function = functions[name]
        if "structured_delegate" in function:
            return backends(f"aten::{function['structured_delegate']}")
        named = {key.strip() for keys in function.get("dispatch", {}) for key in keys.split(",")}
        return named or {"CompositeImplicitAutograd"}

    return {name: backends(name) for name in functions}


def missing(operations: set[str], kernels: dict[str, set[str]]) -> set[str]:
    return {name for name in operations if not kernels[name] & (ANYWHERE | {"MPS"})}


def test_the_table_tells_them_apart(kernels):
    assert missing({"aten::add.Tensor", "aten::view"}, kernels) == set()
    assert missing({"aten::linalg_eig"}, kernels) == {"aten::linalg_eig"}


def test_every_operation_exists_on_mps(kernels, classes, tmp_path):
    operations: set[str] = set()
    for keys in VARIANTS.values():
        with fake_accelerator(float64=False) as counts:
            ours = bench(torch.device("lazy:0"), **keys)
            ours.step(ours.batch())
            operations |= counts.operations
    settings = TINY | {"train.steps": 2, "optim.warmup_length": "50%", "augment.device": "train"}
    with fake_accelerator(float64=False, found=True) as counts:
        run = tmp_path / "run"
        train(classes, out=run, console=Console(quiet=True), **settings, **{"probe.every_steps": 2})
        embed(run, classes)
        report(run, data=classes)
        operations |= counts.operations
    assert len(operations) > 100
    assert missing(operations, kernels) == set()
