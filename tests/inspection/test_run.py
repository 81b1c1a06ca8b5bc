"""What an inspection measures, how much it reads, and when it fails."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dinoforge
from dinoforge.cli.main import main
from dinoforge.commands.recipe import auto_recipe
from dinoforge.data.decoding_memory import working_bytes
from dinoforge.data.sources import FolderSource, Item
from dinoforge.errors import ImageError
from dinoforge.inspection import passing
from dinoforge.inspection import run as inspections
from dinoforge.inspection.advice import in_words
from dinoforge.recipe.schema import flatten

from . import troubled as made

GREY = ["student.in_chans=1", "data.mean=0.5", "data.std=0.25"]


def write(folder: Path, number: int, values: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{number:03}.tif").write_bytes(made.tiff(values))


def found(inspect, *arguments):
    code, line = inspect(*arguments, "--json")
    assert code == 0
    return json.loads(line)


@pytest.fixture
def twelve_bits(tmp_path):
    """Values 100 to 3,900 in 16 bits."""
    for number in range(40):
        write(tmp_path / "data", number, made.ramp(100, 3900, np.uint16, number))
    return tmp_path / "data"


def test_values_and_what_becomes_0_and_255(twelve_bits, inspect):
    (values,) = found(inspect, twelve_bits)["values"]
    (channel,) = values["channels"]
    assert (values["type"], values["bits"], values["images"]) == ("uint16", 16, 40)
    assert (channel["min"], channel["max"]) == (100, 3900)
    assert (channel["black"], channel["white"]) == (0, 4095)
    assert channel["percentiles"][2] == pytest.approx(2000, rel=0.05)
    assert values["fills"] == pytest.approx(3800 / 65535, rel=0.01)
    assert values["levels"] == pytest.approx(3800 / 4095, rel=0.01)
    assert (channel["below"], channel["above"]) == (0, 0)
    counts = channel["histogram"]["counts"]
    assert len(counts) == 64
    assert min(counts) > 0.5 * max(counts)  # a ramp


def test_the_keys_that_are_given_are_those_that_count(twelve_bits, inspect):
    (values,) = found(inspect, twelve_bits, "data.range=[1050,2000]", *GREY)["values"]
    (channel,) = values["channels"]
    assert (channel["black"], channel["white"]) == (1050, 2000)
    assert channel["below"] == pytest.approx(0.25, abs=0.02)
    assert channel["above"] == pytest.approx(0.5, abs=0.02)
    told = found(inspect, twelve_bits, "data.range=[1050,2000]", *GREY)
    (clipped,) = [one for one in told["troubles"] if one["code"] == "clipped"]
    assert clipped["serious"]
    (channel,) = found(inspect, twelve_bits, "data.sixteen_bit=minmax", *GREY)["values"][0]["channels"]
    assert channel["black"] is None
    assert channel["white"] is None


def test_the_measured_range_is_that_of_training(twelve_bits, inspect):
    told = found(inspect, twelve_bits)
    recipe, _ = auto_recipe(str(twelve_bits))
    assert recipe.data.range == (0, 4095)
    chosen = {key: in_words(value) for key, value in flatten(recipe).items()}
    advised = {one["key"]: one["value"] for one in told["advice"] if one["by"] == "auto"}
    assert {"student.in_chans", "data.mean", "data.std", "augment.vertical_flip", "crops.global_crops_size"} <= set(
        advised
    )
    assert advised == {key: chosen[key] for key in advised}
    (advice,) = [one for one in told["advice"] if one["key"] == "data.range"]
    assert advice["value"] == "[0,4095]"
    (narrow,) = [one for one in told["troubles"] if one["code"] == "narrow_range"]
    assert "data.range=[0,4095], measured, is used instead" in narrow["said"]


def test_mean_and_deviation_are_those_of_the_pixels(twelve_bits, inspect):
    pixels = found(inspect, twelve_bits)["pixels"]
    every = [dinoforge.read_image(path, 1, range=[0, 4095]) / 255 for path in sorted(twelve_bits.iterdir())]
    assert pixels["images"] == 40
    assert pixels["mean"][0] == pytest.approx(np.mean(every), abs=1e-6)
    assert pixels["std"][0] == pytest.approx(np.std(every), abs=1e-3)


@pytest.fixture
def many(tmp_path):
    for number in range(300):
        folder = tmp_path / "many" / f"{number // 30}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)).save(
            folder / f"{number:03}.png"
        )
    return tmp_path / "many"


def test_no_more_than_the_limit_are_decoded(many, inspect, monkeypatch):
    looks, reads = [], []
    look, item = passing.look_at, FolderSource.item
    monkeypatch.setattr(passing, "look_at", lambda *a, **k: looks.append(1) or look(*a, **k))
    monkeypatch.setattr(FolderSource, "item", lambda self, index: reads.append(index) or item(self, index))
    told = found(inspect, many, "--images", "40")
    assert len(looks) == 40
    # Beside them headers alone are read, for the number of channels and the range.
    assert len(set(reads)) < 200
    assert told["sampling"]["images"] == 40
    assert told["sampling"]["of"] == 300
    assert not told["sampling"]["time_was_up"]
    assert "40 of 300 images, evenly spaced and each with its neighbour" in inspect(many, "--images", "40")[1]


def test_time_that_is_up_ends_the_look_and_is_said(many, inspect, monkeypatch):
    look = passing.look_at

    def slowly(*arguments, **keys):
        time.sleep(0.05)
        return look(*arguments, **keys)

    monkeypatch.setattr(passing, "look_at", slowly)
    told = found(inspect, many, "--seconds", "0.6")
    assert 1 <= told["sampling"]["images"] < 40
    assert told["sampling"]["time_was_up"]
    assert "time was up (--seconds 0.6)" in inspect(many, "--seconds", "0.6")[1]


def test_one_image_at_least(many, inspect):
    told = found(inspect, many, "--seconds", "0.000001")
    assert told["sampling"]["images"] == 1
    assert not told["copies"]["files_complete"]
    assert told["bytes"] is None


def test_the_same_data_say_the_same(many, inspect):
    first, second = (found(inspect, many, "--images", "64") for _ in range(2))
    for told in (first, second):
        del told["sampling"]["seconds"], told["cost"]
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere"], "does not exist"),
        (["{empty}"], "no images in"),
        (["{many}", "data.rnge=[0,1]"], "did you mean data.range"),
        (["{many}", "student.in_chans=0"], "student.in_chans"),
    ],
)
def test_only_unusable_data_and_keys_are_errors(many, tmp_path, inspect, capsys, arguments, words):
    (tmp_path / "empty").mkdir()
    code, _ = inspect(*(text.format(many=many, empty=tmp_path / "empty") for text in arguments))
    assert code == 2
    assert words in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_an_error(many, tmp_path, inspect, capsys):
    (tmp_path / "file").touch()
    code, _ = inspect(many, "--images", "20", "--report", tmp_path / "file" / "page.html")
    assert code == 2
    assert "page.html" in capsys.readouterr().err


def test_labels_from_a_table_and_why_not(many, tmp_path, inspect):
    names = sorted(path.relative_to(many).as_posix() for path in many.glob("*/*.png"))
    table = tmp_path / "labels.csv"
    table.write_text("name,label\n" + "".join(f"{name},{'ab'[i % 3 == 0]}\n" for i, name in enumerate(names)))
    labels = found(inspect, many, "--labels", table)["labels"]
    assert labels["classes"] == {"a": 200, "b": 100}
    table.write_text(f"name,label\n{names[0]},a\n")
    told = found(inspect, many, "--labels", table)
    assert "no label for 299 of 300 images" in told["labels"]["said"]
    assert "no_labels" in {one["code"] for one in told["troubles"]}


def test_objects_in_memory(inspect):
    images = [(made.ramp(0, 4000, np.uint16, number)[:, :, np.newaxis], "ab"[number % 2]) for number in range(40)]
    told = dinoforge.inspect(images)
    assert told.data == "list"
    assert told.kinds == {"object in memory": 40}
    assert told.labels.classes == {"a": 20, "b": 20}
    assert told.values[0].channels[0].white == 4095
    assert told.copies.files_compared == 0
    assert told.bytes is None


def test_what_an_object_raises_costs_that_image_alone():
    class Broken:
        def __len__(self):
            return 9

        def __getitem__(self, index):
            if index == 3:
                raise RuntimeError("no such luck")
            return made.picture(index)

    told = dinoforge.inspect(Broken())
    assert told.unreadable == (("item 3", "RuntimeError: no such luck"),)
    assert told.sampling.images == 9


def test_planes_as_images(tmp_path, inspect):
    stack = np.stack([made.ramp(0, 60000, np.uint16, number) for number in range(5)])
    for number in range(4):
        (tmp_path / f"{number}.ome.tif").write_bytes(
            made.tiff(stack, ome=True, photometric="minisblack", metadata={"axes": "ZYX"})
        )
    first = found(inspect, tmp_path)
    assert first["images"] == 4
    assert {"key": "data.plane", "value": "max"}.items() <= first["advice"][-1].items()
    each = found(inspect, tmp_path, "data.plane=each")
    assert each["images"] == 20
    assert each["ends"] == {".tif": 20}
    (planes,) = [one for one in each["troubles"] if one["code"] == "planes"]
    assert "each is an image" in planes["said"]
    assert not [one for one in each["troubles"] if one["code"] == "misnamed"]


def test_large_jpegs_are_advised_to_be_decoded_small(tmp_path, inspect):
    for number in range(6):
        Image.fromarray(made.picture(number)).resize((900, 700)).save(tmp_path / f"{number}.jpg")
    (advice,) = [one for one in found(inspect, tmp_path)["advice"] if one["key"] == "data.reduced_decode"]
    assert advice["value"] == "true"
    assert advice["by"] == "auto"  # its recipe has it, others have not
    assert "JPEG files of 700 pixels for crops of 96" in advice["reason"]
    again = {one["key"] for one in found(inspect, tmp_path, "data.reduced_decode=true")["advice"]}
    assert "data.reduced_decode" not in again


def test_many_unreadable_images_are_advised_to_be_borne_with(tmp_path, inspect):
    for number in range(16):
        content = made.encoded(made.picture(number), "PNG")
        (tmp_path / f"{number:02}.png").write_bytes(content if number % 4 else content[:60])
    told = found(inspect, tmp_path)
    advice = {one["key"]: one["value"] for one in told["advice"]}
    assert advice["data.max_bad_share"] == "0.3"
    assert told["command"] == f"dinoforge train {tmp_path} --recipe auto data.max_bad_share=0.3"


def test_the_advised_command_is_one_that_runs(tmp_path, inspect):
    for number in range(12):
        values = made.ramp(0, 2000, np.int16, number)
        values[:16] = -9999
        write(tmp_path / "data", number, values)
    command = found(inspect, tmp_path / "data")["command"]
    program, *arguments = command.split()
    assert program == "dinoforge"
    assert main([*arguments, "--dry-run"]) == 0


class Slow:
    """A source that tells which of its images it was asked for, and takes its time."""

    def __init__(self, count: int, seconds: float) -> None:
        self.count, self.seconds = count, seconds
        self.asked: list[int] = []

    def __len__(self):
        return self.count

    def item(self, index):
        time.sleep(self.seconds)
        self.asked.append(index)
        return Item(made.ramp(0, 3000, np.uint16, index), self.name(index))

    def name(self, index):
        return f"image {index}"

    def labels(self):
        return None

    def fingerprint(self):
        return "slow"


def test_black_images_are_advised_no_range(tmp_path, inspect):
    for number in range(20):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{number:02d}.png")
    told = found(inspect, tmp_path)
    assert [one["code"] for one in told["troubles"] if one["code"] in ("blank", "narrow_range")] == ["blank"]
    assert "data.range" not in [one["key"] for one in told["advice"]]


def test_signed_bytes_are_advised_a_range_that_takes_all_of_them(tmp_path, inspect):
    ramp = np.linspace(-100, 100, 1600).reshape(40, 40)
    for number in range(20):
        write(tmp_path / "data", number, np.roll(ramp, 40 * number).astype(np.int8))
    told = found(inspect, tmp_path / "data")
    assert {"refused", "outside_range"} <= {one["code"] for one in told["troubles"]}
    assert "clipped" not in {one["code"] for one in told["troubles"]}  # nothing is, since they are refused
    (advice,) = [one for one in told["advice"] if one["key"] == "data.range"]
    assert (advice["value"], advice["by"]) == ("[-100,100]", "inspect")
    assert main([*told["command"].split()[1:-1], "data.range=[-100,100]", "--dry-run"]) == 0
    again = found(inspect, tmp_path / "data", "data.range=[-100,100]")
    assert "refused" not in {one["code"] for one in again["troubles"]}
    (outside,) = [one for one in again["troubles"] if one["code"] == "outside_range"]
    assert "data.range=[-100,100], given, is used instead" in outside["said"]
    assert not outside["serious"]


def test_dark_bytes_are_no_trouble_once_a_range_spreads_them(tmp_path, inspect):
    for number in range(20):
        write(tmp_path / "data", number, made.ramp(0, 19, np.uint8, number))
    (narrow,) = [one for one in found(inspect, tmp_path / "data")["troubles"] if one["code"] == "narrow_range"]
    assert (narrow["way"], narrow["serious"]) == ("data.range=[0,19]", True)
    told = found(inspect, tmp_path / "data", "data.range=[0,19]")
    assert not [one["said"] for one in told["troubles"] if one["code"] == "narrow_range" and one["serious"]]
    for wide in (["data.range=[0,4095]"], []):  # left alone, and said as before
        told = found(inspect, tmp_path / "data", *wide)
        assert [one["serious"] for one in told["troubles"] if one["code"] == "narrow_range"] == [True]


def test_slow_images_are_measured_by_a_few_that_are_spread():
    source = Slow(1000, 0.0)
    few = inspections._Few(source, asked=64, seconds=1.0, each=0.1)
    assert [few.name(index) for index in range(len(few))] == [
        f"image {place}" for place in np.linspace(0, 999, 10).round().astype(int)
    ]
    assert len(inspections._Few(source, asked=64, seconds=1.0, each=0.001)) == 1000
    assert len(inspections._Few(source, asked=64, seconds=1.0, each=99.0)) == 2


def test_time_that_is_up_leaves_two_images():
    few = inspections._Few(Slow(10, 0.05), asked=64, seconds=0.01, each=1e-6)
    few.item(0)
    few.item(1)
    with pytest.raises(ImageError, match="time is up"):
        few.item(2)


def test_slow_images_still_have_a_range():
    source = Slow(500, 0.03)
    told = dinoforge.inspect(source, seconds=0.5)
    assert told.values[0].channels[0].white == 4095
    assert told.sampling.time_was_up
    assert 1 <= told.sampling.images < 30
    assert len(source.asked) < 60


def test_reading_costs_what_decoding_is_estimated_to_take(twelve_bits, inspect):
    cost = found(inspect, twelve_bits)["cost"]
    data = (twelve_bits / "000.tif").read_bytes()
    decoding = {"value_range": (0.0, 4095.0)}
    assert cost["peak_bytes"]["value"] == working_bytes(data, channels=1, decoding=decoding)
    assert cost["median_seconds"] <= cost["slowest"]["value"]
    assert cost["images_per_second"] > 1


def test_no_data_counts_in_no_mean(tmp_path, inspect):
    for number in range(12):
        values = np.full((64, 64), 2000, np.int16)
        values[:, ::2] = 1000
        values[:32] = -9999
        (tmp_path / f"{number:02}.tif").write_bytes(made.tiff(values, extratags=[(42113, 2, 6, "-9999", True)]))
    told = found(inspect, tmp_path, "data.range=[0,2550]", *GREY)
    assert told["no_data"] == 0.5
    assert told["pixels"]["mean"] == [pytest.approx(150 / 255)]
    (channel,) = told["values"][0]["channels"]
    assert (channel["min"], channel["max"]) == (1000, 2000)
