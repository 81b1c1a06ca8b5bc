"""Test images that are training images as well are counted and said, and change no score."""

import numpy as np
import pytest
import torch
from PIL import Image

import dinoforge
from dinoforge.cli.main import main
from dinoforge.data.duplicates import fingerprint
from dinoforge.data.sources import SequenceSource, open_source
from dinoforge.evaluation import overlap
from dinoforge.evaluation.classifiers import run_classifier
from dinoforge.evaluation.knn import run_knn
from dinoforge.evaluation.overlap import count, duplicates_in_words
from dinoforge.evaluation.probe import Probe
from dinoforge.models.vit import Tokens, VisionTransformer
from tiny import TINY

READING = {"size": 16, "channels": 1, "mean": (0.5,), "std": (0.5,), "sixteen_bit": "full", "max_pixels": 10**6}


class Pixels(torch.nn.Module):
    """Pixels as cls token."""

    def forward(self, images):
        cls = images.flatten(1)
        return Tokens(cls=cls, registers=cls[:, None, :0], patches=cls[:, None, :0])


def picture(seed, side=96):
    """Grey, uint8 [side, side]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (16, 16), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def noisy(pixels):
    return np.clip(pixels + np.random.default_rng(0).normal(0, 2, pixels.shape), 0, 255).astype(np.uint8)


def prints(*images):
    return [fingerprint(image[:, :, None]) for image in images]


def test_one_split():
    a, b, c, d, e = map(picture, range(5))
    images = [a, b, c, d, a, noisy(b), e, noisy(a), e]  # the first four train
    train = (torch.arange(9) < 4)[None]
    found = count(prints(*images), list("abcdABeÄE"), train, ~train)
    assert found == {"exact": 1, "near": 2, "tested": 5, "examples": [["A", "a"], ["B", "b"], ["Ä", "a"]]}
    assert duplicates_in_words(found) == (
        "3 of 5 test images are also among the training images (1 equal, 2 nearly), such as A and a: "
        "they make the score look better than it is"
    )


def test_each_split_counts_what_it_tests():
    a, b, c = map(picture, range(3))
    images = [a, a, b, noisy(b), c]
    train = torch.tensor([[0, 1, 1, 1, 1], [1, 0, 1, 0, 1], [1, 1, 0, 1, 0]], dtype=torch.bool)
    found = count(prints(*images), list("aAbBc"), train, ~train)
    assert (found["exact"], found["near"], found["tested"]) == (2, 2, 5)
    assert found["examples"] == [["a", "A"], ["A", "a"], ["B", "b"], ["b", "B"]]
    assert "are also among the training images of their split (2 equal, 2 nearly)" in duplicates_in_words(
        found, splits=3
    )
    # Both on one side flatter nothing.
    together = torch.tensor([[0, 0, 1, 1, 1]], dtype=torch.bool)
    assert count(prints(*images), list("aAbBc"), together, ~together)["examples"] == []
    # Few shots leave most of the training part out.
    few = torch.tensor([[0, 0, 0, 0, 1]] * 3, dtype=torch.bool)
    assert count(prints(*images), list("aAbBc"), few, ~train)["examples"] == []


def test_an_image_is_no_copy_of_itself():
    a, b = picture(0), picture(1)
    everyone = torch.ones(1, 3, dtype=torch.bool)
    found = count(prints(a, b, a), list("abA"), everyone, everyone)
    assert found == {"exact": 2, "near": 0, "tested": 3, "examples": [["a", "A"], ["A", "a"]]}


def test_nothing_is_said_of_nothing():
    train = torch.tensor([[True, True, False]])
    blank = np.full((20, 20), 3, np.uint8)
    found = count(prints(picture(0), blank, blank), list("abc"), train, ~train)
    assert found == {"exact": 0, "near": 0, "tested": 1, "examples": []}
    assert duplicates_in_words(found) is None


def test_one_image_in_words():
    said = duplicates_in_words({"exact": 0, "near": 1, "tested": 2000, "examples": [["a", "b"]]})
    assert said == (
        "1 of 2,000 test images is also among the training images (0 equal, 1 nearly), such as a and b: "
        "it makes the score look better than it is"
    )


@pytest.fixture
def folders(tmp_path):
    """Two classes of ten to train on; to test on, five of each, of which one is a copy and one was saved as JPEG."""
    for label, base in (("a", 0), ("b", 100)):
        for part, seeds in (("train", range(10)), ("test", range(20, 23))):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for seed in seeds:
                Image.fromarray(picture(base + seed)).save(folder / f"{seed}.png")
    Image.fromarray(picture(3)).save(tmp_path / "test" / "a" / "copy.bmp")
    Image.fromarray(picture(104)).save(tmp_path / "test" / "b" / "again.jpg", quality=70)
    return tmp_path


@pytest.mark.slow
def test_with_a_test_folder(folders):
    train, test = open_source(folders / "train"), open_source(folders / "test")
    known = (test, test.labels())
    result, _ = run_knn(Pixels(), None, train, train.labels(), test=known, **READING)
    expected = {
        "exact": 1,
        "near": 1,
        "tested": 8,
        "examples": [["a/copy.bmp", "a/3.png"], ["b/again.jpg", "b/4.png"]],
    }
    assert result["duplicates"] == expected
    network = VisionTransformer(embed_dim=16, depth=1, num_heads=2, patch_size=4, image_size=16, in_chans=1)
    linear, _ = run_classifier("linear", network, network, train, train.labels(), test=known, **READING)
    assert linear["duplicates"] == expected


def test_scores_stay_what_they_were(folders, monkeypatch):
    train, test = open_source(folders / "train"), open_source(folders / "test")
    known = (test, test.labels())
    told, _ = run_knn(Pixels(), None, train, train.labels(), test=known, **READING)
    nothing = {"exact": 0, "near": 0, "tested": 8, "examples": []}
    monkeypatch.setattr(overlap, "count", lambda *_: nothing)
    untold, _ = run_knn(Pixels(), None, train, train.labels(), test=known, **READING)
    assert told["duplicates"]["exact"] == 1
    assert {**told, "duplicates": nothing} == untold
    assert told["n"] == 28  # all of them


def test_random_splits(folders):
    train = open_source(folders / "train")
    Image.fromarray(picture(3)).save(folders / "train" / "a" / "twin.png")
    train = open_source(folders / "train")
    found = run_knn(Pixels(), None, train, train.labels(), **READING)[0]["duplicates"]
    # Held out once each; in the same split in one of five cases.
    assert (found["exact"], found["near"], found["tested"]) in ((2, 0, 21), (0, 0, 21))
    halves = run_knn(Pixels(), None, train, train.labels(), n_splits=2, **READING)[0]["duplicates"]
    assert halves["exact"] in (0, 2)
    assert max(found["exact"], halves["exact"]) == 2


def test_images_that_cannot_be_read_shift_no_name(folders):
    (folders / "train" / "a" / "0.png").write_bytes(b"no image")
    (folders / "test" / "a" / "20.png").write_bytes(b"no image")
    train, test = open_source(folders / "train"), open_source(folders / "test")
    result, skipped = run_knn(Pixels(), None, train, train.labels(), test=(test, test.labels()), **READING)
    assert len(skipped) == 2
    assert result["duplicates"]["examples"] == [["a/copy.bmp", "a/3.png"], ["b/again.jpg", "b/4.png"]]


def test_the_probe_counts_images_that_are_like_another():
    images = [picture(seed) for seed in range(18)]
    source = SequenceSource([*images, images[5], noisy(images[6])])
    probe = Probe(source, [str(i % 2) for i in range(20)], max_images=100, **READING)
    assert probe.duplicates is None
    probe.measure(Pixels())
    assert probe.duplicates == {
        "exact": 2,
        "near": 2,
        "tested": 20,
        "examples": [["item 5", "item 18"], ["item 18", "item 5"], ["item 6", "item 19"], ["item 19", "item 6"]],
    }


@pytest.mark.slow
def test_the_command_says_it_beside_the_labels(folders, tmp_path, capsys):
    run = tmp_path / "run"
    dinoforge.train(folders / "train", "small", run, **TINY | {"train.steps": 1, "probe.every_minutes": None})
    capsys.readouterr()
    given = [str(run), "--data", str(folders / "train"), "--json", "--test", str(folders / "test")]
    assert main(["eval", "knn", *given]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1
    assert (
        "test     2 of 8 test images are also among the training images (1 equal, 1 nearly), such as a/copy.bmp and "
        "a/3.png: they make the score look better than it is\n" in printed.err
    )
    for name in ("a/copy.bmp", "b/again.jpg"):
        (folders / "test" / name).unlink()
    assert main(["eval", "linear", *given]) == 0
    assert "test images" not in capsys.readouterr().err
