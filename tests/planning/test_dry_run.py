"""What the plan says of a machine, on machines that are not here."""

import re
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from dinoforge.builders.lengths import with_batch_cut
from dinoforge.builders.networks import build_state
from dinoforge.commands.replay import _precision_of
from dinoforge.commands.start import Start
from dinoforge.commands.train import train
from dinoforge.data.summary import DataSummary, Depth
from dinoforge.errors import RecipeError
from dinoforge.planning import bench
from dinoforge.planning.dry_run import Plan, make_plan, plan_text
from dinoforge.recipe.load import load_recipe
from dinoforge.system import device as devices
from dinoforge.system import distributed
from tiny import TINY

CPU = torch.device("cpu")
DATA = DataSummary(
    count=1000, sampled=16, widths=(300, 300), heights=(300, 300), modes=(("L", 16),), values=(0, 255), failures=()
)
GIB = 2**30


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(devices.machine, "processors", lambda: 16)


@pytest.fixture
def machine(monkeypatch):
    """``machine(gpus=…, capability=…, free_gib=…, ranks=…)``: what is there."""

    def set_up(
        gpus: int = 1, capability: tuple[int, int] = (8, 0), free_gib: float = 40.0, ranks: int = 1, total_gib: int = 80
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        properties = SimpleNamespace(total_memory=total_gib * GIB)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gib * GIB), total_gib * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
        monkeypatch.setattr(devices.machine, "free_memory", lambda: free_gib * GIB)
        monkeypatch.setattr(distributed, "world_size", lambda: ranks)
        if ranks > 1:
            for name, value in {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "RANK": 0, "LOCAL_RANK": 0}.items():
                monkeypatch.setenv(name, str(value))

    return set_up


def plan_of(recipe: str = "small", **keys: object) -> Plan:
    given = TINY | {"precision": "auto", "train.num_workers": None, "train.threads": None}
    if recipe != "small":
        given = {"train.num_workers": None, "train.batch_size_per_gpu": 64}
    return make_plan(load_recipe(recipe, given | {k.replace("__", "."): v for k, v in keys.items()})[0], DATA)


def lines(plan: Plan) -> list[tuple[str, str]]:
    return [(line[:8].strip(), line[9:]) for line in plan_text(plan, data_path="photos", out="run").splitlines()]


def said(plan: Plan, name: str) -> str:
    return dict(lines(plan))[name]


# Notes


def test_nothing_is_noted_where_nothing_surprises(machine):
    machine(gpus=1)
    assert plan_of().notes == ()
    machine(gpus=0)
    assert plan_of(device="cpu").notes == ()


def test_notes_stand_below_the_memory(machine, monkeypatch):
    machine(gpus=8)
    plan = plan_of(train__num_workers=40)
    assert plan.notes == (
        "1 of 8 GPUs is used: start with --nproc auto to use all, or choose one by device=cuda:N",
        "train.num_workers=40, but there are 16 processors for this rank, and so 16 data workers",
    )
    assert [name for name, _ in lines(plan)][-4:] == ["memory", "note", "note", "out"]
    assert [text for name, text in lines(plan) if name == "note"] == list(plan.notes)


def test_the_cpu_in_place_of_a_gpu_is_noted(machine, monkeypatch):
    machine(gpus=0)
    monkeypatch.setattr(devices, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    (note,) = plan_of().notes
    assert note.startswith("computes on the CPU, although there is a GPU: this PyTorch")
    assert plan_of(device="cpu").notes == ()


def test_train_prints_the_notes(machine, monkeypatch, solar_cells, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "has_gpu", lambda: True)
    train(solar_cells, out=tmp_path / "run", dry_run=True, **TINY | {"train.num_workers": 99})
    out = capsys.readouterr().out
    assert "note     computes on the CPU, although there is a GPU: " in out
    assert "note     train.num_workers=99, but there are 16 processors" in out


def test_what_a_device_has_free_stands_beside_the_estimate(machine):
    machine(free_gib=7.5)
    assert re.fullmatch(r"about 0\.\d GiB \(.*\) of 7\.5 GiB that are free", said(plan_of(), "memory"))
    machine(gpus=0, free_gib=3.5)
    plan = plan_of(device="cpu")
    assert re.fullmatch(r"about 1\.\d GiB \(.*\) of 3\.5 GiB that are free", said(plan, "memory"))
    assert said(replace(plan, free=None), "memory").endswith(")")


@pytest.mark.parametrize(
    ("gpus", "ranks", "keys", "named"),
    [
        (1, 1, {}, ["batch_size_per_gpu=32 train.accumulate=2", "crops_in_turn", "activation_checkpointing"]),
        (
            2,
            2,
            {"parallel__mode": "ddp"},
            ["batch_size_per_gpu=32 train.accumulate=2", "crops_in_turn", "activation_checkpointing", "mode=fsdp"],
        ),
        (1, 1, {"parallel__activation_checkpointing": True}, ["batch_size_per_gpu=32", "crops_in_turn"]),
        (2, 2, {"parallel__mode": "fsdp"}, ["batch_size_per_gpu=32", "crops_in_turn", "activation_checkpointing"]),
    ],
)
def test_more_than_is_free_is_noted_with_what_takes_less(machine, gpus, ranks, keys, named):
    machine(gpus=gpus, ranks=ranks, free_gib=1.25)
    plan = plan_of("dinov2", **keys)
    note, of_reading = plan.notes  # as little is free of main memory, and many workers have batches ready
    assert re.match(r"may run out of main memory: (15|7) processes that read images take about ", of_reading)
    needed = sum(plan.memory.values()) / GIB
    where = plan.device
    assert note.startswith(
        f"may run out of memory: by the estimate it takes {needed:.1f} GiB, and 1.2 GiB are free on {where}."
    )
    places = [note.find(name) for name in named]
    assert -1 not in places
    assert places == sorted(places)
    for other in {"crops_in_turn", "activation_checkpointing", "mode=fsdp"}:
        assert (other in note) == any(other in name for name in named)
    assert note.endswith("; smaller crops, or a smaller network")


def test_memory_that_suffices_is_not_noted(machine):
    machine(free_gib=1.25)
    needed = sum(plan_of("dinov2").memory.values()) / GIB
    machine(free_gib=needed * 1.001)
    assert plan_of("dinov2").notes == ()
    machine(free_gib=needed * 0.999)
    assert len(plan_of("dinov2").notes) == 1


def test_main_memory_that_does_not_suffice_is_noted(machine):
    machine(gpus=0, free_gib=2)
    (note,) = plan_of("dinov2", device="cpu").notes
    assert (
        "2.0 GiB of main memory are free. What takes less, in the order to try: checkpoint.asynchronous=false" in note
    )


def test_the_allocator_is_told_on_cuda_alone(machine, monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    machine(gpus=1)
    assert said(plan_of(), "memory").endswith("; allocator expandable_segments:True")
    assert "allocator" not in said(plan_of(device="cpu"), "memory")


def test_tf32_is_told_where_it_means_something(machine):
    machine(gpus=1)
    assert said(plan_of(precision="fp32"), "compute").startswith("cuda, float32, ")
    assert said(plan_of(precision="fp32", allow_tf32=True), "compute").startswith("cuda, float32 with TF32, ")
    assert said(plan_of(precision="fp32", allow_tf32=True, device="cpu"), "compute").startswith("cpu, float32, ")


# Processors


def test_on_a_gpu_processors_are_for_the_workers(machine):
    machine(gpus=1)
    plan = plan_of()
    assert (plan.num_workers, plan.threads) == (15, 1)
    machine(gpus=4, ranks=4)
    plan = plan_of(train__batch_size_per_gpu=2)
    assert (plan.num_workers, plan.threads) == (3, 1)
    assert plan_of(train__batch_size_per_gpu=2, train__threads=2).threads == 2


def test_on_a_cpu_workers_and_step_share_the_processors(machine):
    machine(gpus=0)
    plan = plan_of(device="cpu")
    assert (plan.num_workers, plan.threads) == (8, 16)
    plan = plan_of(device="cpu", train__num_workers=20)
    assert plan.num_workers == 16
    assert plan.notes == ("train.num_workers=20, but there are 16 processors for this rank, and so 16 data workers",)


@pytest.mark.parametrize(
    ("processors", "wanted", "seconds"), [(16, None, 1 / 15), (64, None, 1 / 32), (16, 4, 1 / 4), (2, 10, 1 / 2)]
)
def test_time_is_measured_for_the_workers_that_there_would_be(monkeypatch, processors, wanted, seconds):
    """Each batch takes a second of a processor, each step nearly none."""
    assert measured(monkeypatch, processors, wanted) == pytest.approx(seconds)


def test_without_workers_a_step_waits_for_its_batch(monkeypatch):
    assert measured(monkeypatch, 16, 0) == pytest.approx(1.01)


def measured(monkeypatch, processors: int, wanted: int | None) -> float:
    clock = iter(range(1000))
    cuda = torch.device("cuda:0")
    monkeypatch.setattr(bench, "time", SimpleNamespace(process_time=lambda: next(clock)))
    monkeypatch.setattr(bench, "rank_device", lambda name: cuda)
    monkeypatch.setattr(bench, "usable_processors", lambda: processors)
    monkeypatch.setattr(bench, "resolve_precision", lambda name, device: torch.float32)
    monkeypatch.setattr(bench, "build_data", lambda recipe, source: list(range(10)))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    step = SimpleNamespace(warm_up=lambda: None, run=lambda repeats: [0.01] * repeats)
    monkeypatch.setattr(bench, "StepBench", lambda recipe, device, precision: step)
    recipe, _ = load_recipe("small", {"train.num_workers": wanted})
    return bench.seconds_per_step(recipe, source=None)


# Precision


@pytest.mark.parametrize(
    ("capability", "precision"), [((6, 1), torch.float32), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_the_plan_has_the_precision_of_the_gpu(machine, capability, precision):
    machine(capability=capability)
    assert plan_of().precision is precision
    assert plan_of().notes == ()


@pytest.mark.parametrize("mode", ["fsdp", "hsdp"])
def test_what_is_sharded_computes_in_float32_on_a_gpu_of_float16(machine, mode):
    machine(capability=(7, 5), gpus=4, ranks=4)
    shards = {"parallel__shard_ranks": 2} if mode == "hsdp" else {}
    plan = plan_of(parallel__mode=mode, train__batch_size_per_gpu=2, **shards)
    assert plan.precision is torch.float32
    assert plan.notes == (
        "computes in float32, since float16, in which this GPU is faster, cannot be sharded; parallel.mode=ddp takes "
        "float16, if the weights fit",
    )
    assert plan_of(parallel__mode="ddp", train__batch_size_per_gpu=2).precision is torch.float16


def test_float16_that_was_given_is_not_sharded(machine):
    machine(capability=(7, 5), gpus=2, ranks=2, total_gib=1)
    with pytest.raises(RecipeError, match="fp16 cannot be sharded"):  # by auto, since weights would not fit
        plan_of("dinov2", precision="fp16")
    with pytest.raises(RecipeError, match="fp16 cannot be sharded"):
        plan_of(parallel__mode="fsdp", precision="fp16")


def test_kernels_for_cpus_are_refused_on_a_gpu(machine):
    machine()
    with pytest.raises(RecipeError, match=r"kernels=fast is for CPUs, and this run computes on cuda: set .*=auto"):
        plan_of(parallel__kernels="fast")
    assert plan_of(parallel__kernels="fast", device="cpu").device.type == "cpu"


def test_the_state_has_a_scaler_where_the_plan_computes_in_float16(machine):
    """Whatever the recipe alone would mean here."""
    machine(gpus=0)
    plan = plan_of(device="cpu")
    for precision, scaled in ((torch.float16, True), (torch.bfloat16, False), (torch.float32, False)):
        state = Start(replace(plan, precision=precision), print).state(images=1000)
        assert (state.scaler is not None) is scaled
        measured = bench.StepBench(plan.recipe, CPU, precision)
        assert (measured._state.scaler is not None) is scaled
    recipe = load_recipe("small", TINY | {"precision": "fp16"})[0]
    assert build_state(recipe, CPU, images=8).scaler is not None
    assert build_state(recipe, CPU, images=8, precision=torch.float32).scaler is None


@pytest.mark.parametrize(
    ("key", "step", "precision"),
    [
        ("auto", 0, torch.float16),
        ("auto", 99, torch.float16),
        ("auto", 100, torch.bfloat16),
        ("bf16", 0, torch.bfloat16),
        ("fp32", 200, torch.float32),
    ],
)
def test_a_batch_is_replayed_in_the_precision_that_it_had(monkeypatch, key, step, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # of which auto makes float32 here
    starts = [{"step": 0, "precision": "float16"}, {"step": 100, "precision": "bfloat16"}]
    run = SimpleNamespace(info=lambda: {"starts": starts})
    recipe = load_recipe("small", {"precision": key})[0]
    assert _precision_of(run, recipe, step, CPU) is precision


# What the look at some images found


def plan_on(data: DataSummary, **keys: object) -> Plan:
    given = TINY | {"precision": "auto"} | {k.replace("__", "."): v for k, v in keys.items()}
    return make_plan(load_recipe("small", given)[0], data)


PLAIN = replace(DATA, depths={"uint8": Depth(16, 0, 255, 255)})


def test_nothing_is_said_of_plain_images(machine):
    machine(gpus=0)
    assert [name for name, _ in lines(plan_on(PLAIN, device="cpu"))] == [
        *("data", "crops", "model", "losses", "run", "compute", "memory", "out"),
    ]


def test_the_first_bad_image_is_named_with_its_reason(machine):
    machine(gpus=0)
    bad = ((3, "a/b.tif", "truncated: 1 of 2 strips"), (9, "c.tif", "empty file"))
    assert said(plan_on(replace(PLAIN, failures=bad[:1])), "bad") == (
        "1 of 16 images looked at cannot be read: a/b.tif: truncated: 1 of 2 strips"
    )
    assert said(plan_on(replace(PLAIN, failures=bad)), "bad") == (
        "2 of 16 images looked at cannot be read, such as a/b.tif: truncated: 1 of 2 strips"
    )


@pytest.mark.parametrize(
    ("plane", "taken"),
    [
        (None, "the first of 12 to 40 is taken; data.plane=each, max or a number from 0 takes others"),
        ("max", "the brightest value of all 12 to 40 is taken"),
        ("3", "number 3 of 12 to 40 is taken"),
    ],
)
def test_planes_are_said_and_which_is_taken(machine, plane, taken):
    machine(gpus=0)
    data = replace(PLAIN, planes=((12, "z"), (40, "z, t")))
    assert said(plan_on(data, data__plane=plane), "planes") == (
        f"2 of 16 files looked at have several planes (z, z, t): {taken}"
    )
    apart = replace(data, apart="each is an image: 52 in 2 files")
    assert said(plan_on(apart, data__plane="each"), "planes") == "each is an image: 52 in 2 files"


def test_blank_images_are_said(machine):
    machine(gpus=0)
    assert said(plan_on(replace(PLAIN, blank=1)), "blank").startswith(
        "1 of 16 images looked at is of one single colour"
    )
    assert said(plan_on(replace(PLAIN, blank=16)), "blank").startswith("16 of 16 images looked at are of one single")


def test_dark_images_of_8_bits_are_said(machine):
    machine(gpus=0)
    (note,) = plan_on(replace(PLAIN, depths={"uint8": Depth(16, 0, 19, 255)}), device="cpu").notes
    assert note.startswith("uint8 values of 16 images looked at end at 19 of 255")
    assert "data.range=[0,19] spreads them over all" in note
    for depth in (Depth(16, 0, 64, 255), Depth(16, 0, 0, 255)):
        assert not plan_on(replace(PLAIN, depths={"uint8": depth}), device="cpu").notes


def test_kinds_of_several_words_are_told_apart(machine):
    machine(gpus=0)
    one = replace(PLAIN, count=1, modes=(("RGB", 1), ("uint16 x5, TIFF", 1)))
    text = said(plan_on(one, train__batch_size_per_gpu=1), "data")
    assert text.startswith("1 image in ")
    assert text.endswith("300×300 pixels, RGB; uint16 x5, TIFF")


def test_transparency_profiles_and_rotation_are_said(machine):
    machine(gpus=0)
    plan = plan_on(replace(PLAIN, transparent=2, profiles={"Adobe RGB (1998)": 3, "Display P3": 1}, turned=5))
    assert said(plan, "alpha") == "2 of 16 images looked at have transparency, which is laid over white"
    assert said(plan, "colours") == (
        "4 of 16 images looked at have a colour profile that is not applied: Adobe RGB (1998) (3), Display P3 (1)"
    )
    assert said(plan, "turned") == "5 of 16 images looked at are turned as their EXIF orientation says"


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ({"data__range": [0, 4095]}, "8-bit values stay as they are, others get data.range=[0,4095]"),
        ({"data__range": [0, 200]}, "data.range=[0,200] is applied to all"),
        ({"data__sixteen_bit": "minmax"}, "8-bit values stay as they are, others get each image's own range"),
        ({}, "8-bit values stay as they are, others get the range of their type"),
    ],
)
def test_mixed_depths_are_said_with_the_rule_of_each(machine, keys, rule):
    machine(gpus=0)
    mixed = replace(PLAIN, depths={"uint8": Depth(4, 0, 255, 255), "uint16": Depth(12, 0, 65000, 65535)})
    assert said(plan_on(mixed, **keys), "depths").startswith(f"images looked at are 12 uint16, 4 uint8: {rule}")


@pytest.mark.parametrize(
    ("depth", "keys", "warned"),
    [
        (Depth(16, 0, 3900, 65535), {}, "3,900 of 65,535, and become levels up to 15 of 255: data.range=[0,3900]"),
        (Depth(16, 10, 500, 4095), {}, "500 of 4,095, and become levels up to 31 of 255: data.range=[10,500]"),
        (Depth(16, 0, 3900, 65535), {"data__range": [0, 4095]}, None),
        (Depth(16, 0, 3900, 65535), {"data__sixteen_bit": "minmax"}, None),
        (Depth(16, 0, 20_000, 65535), {}, None),
    ],
)
def test_values_that_become_a_few_dark_levels_are_warned_of(machine, depth, keys, warned):
    machine(gpus=0)
    notes = plan_on(replace(PLAIN, depths={"uint16": depth}), device="cpu", **keys).notes
    assert (warned is None and notes == ()) or (warned is not None and warned in notes[0])


def test_reading_counts_for_each_worker_where_it_takes_main_memory(machine):
    machine(gpus=0)
    large = replace(PLAIN, working_bytes=GIB)
    memory = {n: plan_on(large, device="cpu", train__num_workers=n).memory for n in (0, 1, 4)}
    assert memory[0]["reading"] == GIB
    assert memory[4]["reading"] == 4 * memory[1]["reading"] > 4 * GIB
    assert "reading 4." in said(plan_on(large, device="cpu", train__num_workers=4), "memory")
    machine(gpus=0, free_gib=3)
    (note,) = plan_on(large, device="cpu", train__num_workers=4).notes
    assert re.search(r"in the order to try: train\.num_workers=1: about 1\.\d GiB", note)
    machine(gpus=1, free_gib=3)
    plan = plan_on(large, train__num_workers=4)
    assert "reading" not in plan.memory
    (note,) = plan.notes
    assert re.match(r"may run out of main memory: 4 processes that read images take about 4\.\d GiB, and 3\.0", note)


def test_the_plan_of_a_folder_with_every_trouble(tmp_path, machine, capsys):
    machine(gpus=0)
    for index in range(12):
        Image.fromarray(np.full((40, 40), 20 * index, np.uint8)).save(tmp_path / f"{index:02d}.png")
    Image.new("RGBA", (40, 40), (9, 9, 9, 100)).save(tmp_path / "see.png")
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (40, 40)).save(tmp_path / "turned.jpg", exif=exif)
    tifffile.imwrite(tmp_path / "z.ome.tif", np.full((7, 40, 40), 300, np.uint16), ome=True, metadata={"axes": "ZYX"})
    (tmp_path / "zero.png").write_bytes(b"")
    train(tmp_path, out=tmp_path / "run", dry_run=True, **TINY | {"data.range": [0, 4095]})
    out = capsys.readouterr().out
    assert "bad      1 of 16 images looked at cannot be read: zero.png: empty file" in out
    assert "planes   1 of 16 files looked at has several planes (z): the first of 7 is taken; data.plane=each" in out
    assert "alpha    1 of 16 images looked at have transparency, which is laid over white" in out
    assert "turned   1 of 16" in out
    assert (
        "depths   images looked at are 14 uint8, 1 uint16: 8-bit values stay as they are, others get data.range" in out
    )
    train(tmp_path, out=tmp_path / "run", dry_run=True, **TINY | {"data.range": [0, 4095], "data.plane": "each"})
    out = capsys.readouterr().out
    assert "data     22 images in " in out
    assert "planes   each is an image: 22 in 16 files, up to 7 in one; 1 file with several (z in 1)" in out


# One image at a time


ONE = {"device": "cpu", "train__batch_size_per_gpu": 1}


def test_what_compares_images_and_has_one_is_said(machine):
    machine(gpus=0)
    (note,) = plan_of(**ONE, train__centering="sinkhorn_knopp").notes
    assert note.startswith("one image is a step: KoLeo stays 0, because it needs two images at a time;")
    assert "Sinkhorn-Knopp (dino, ibot) balances targets within one image" in note
    assert "dinoforge doctor cannot tell whether features collapse" in note
    assert note.endswith("A larger train.batch_size_per_gpu mends that")
    (note,) = plan_of(**ONE, train__centering="centering", dino__koleo_loss_weight=0.0).notes
    assert "KoLeo" not in note
    assert "Sinkhorn-Knopp" not in note
    assert "effective rank" in note


def test_with_accumulation_only_what_is_of_a_micro_batch_is_said(machine):
    machine(gpus=0)
    cut = {**ONE, "train__accumulate": 4, "train__centering": "sinkhorn_knopp"}
    (note,) = plan_of(**cut).notes
    assert note.startswith("one image is computed at a time: KoLeo stays 0")
    assert "dino.koleo_scope=global seeks neighbours among the images of a step" in note
    assert "Sinkhorn-Knopp" not in note  # it is over all images of the step
    for scope in ({"dino__koleo_scope": "global"}, {"dino__koleo_scope": "groups", "dino__koleo_group_size": 2}):
        (note,) = plan_of(**cut, **scope).notes
        assert "KoLeo" not in note
    of_step = {key: value for key, value in cut.items() if key != "train__batch_size_per_gpu"}
    resolved = with_batch_cut(
        load_recipe("small", TINY | {k.replace("__", "."): v for k, v in of_step.items()} | {"train.batch_size": 4})[0],
        world_size=1,
    )
    (note,) = make_plan(resolved, DATA).notes
    assert note.endswith("A larger train.batch_size or a smaller train.accumulate mends that")


def test_two_images_at_a_time_are_enough(machine):
    machine(gpus=0)
    assert plan_of(device="cpu", train__batch_size_per_gpu=2).notes == ()
