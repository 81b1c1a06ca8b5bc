import pytest

from dinoforge.data.classes import class_folders, is_split


def found(*names: str) -> tuple[list[str | None] | None, str]:
    """Labels and words for images of these names, in the order of the names."""
    classes = class_folders([name.encode() for name in sorted(names)])
    labels = None if classes.depth is None else [classes.label(name) for name in sorted(names)]
    return labels, classes.said


def images(*folders: str, each: int = 2) -> list[str]:
    return [f"{folder}/{i}.png" for folder in folders for i in range(each)]


def test_top_folders_are_classes() -> None:
    assert found(*images("cat", "dog/puppies")) == (["cat", "cat", "dog", "dog"], "2 classes from sub-folders")
    assert found(*images("cat")) == (["cat", "cat"], "1 class from sub-folders")
    assert found("1.png", "2.png") == (None, "none: the images lie in no sub-folders")


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train", "val"),
        ("Train", "Validation"),
        ("TRAINING", "valid"),
        ("training_set", "test_set"),
        ("train2017", "val2017"),
        ("dev", "test"),
        ("Training Images", "eval-images"),
        ("trainset", "testset"),
        ("trainA", "testB"),
        ("fold_1", "fold_2"),
        ("DIV2K_train_HR", "DIV2K_valid_HR"),
        ("seg_train", "seg_pred"),
    ],
)
def test_splits_have_their_classes_one_level_deeper(train: str, val: str) -> None:
    names = images(f"{train}/a", f"{train}/b", f"{val}/a", f"{val}/b", each=1)
    labels, said = found(*names)
    assert labels == ["a", "b", "a", "b"]
    assert said == f"2 classes from sub-folders of {' and '.join(f'{part}/' for part in sorted((train, val)))}"


def test_three_parts_of_which_one_lacks_a_class() -> None:
    labels, said = found(*images("train/a", "train/b", "train/rare", "val/a", "val/b", "test/a", "test/b", each=1))
    assert labels == ["a", "b", "a", "b", "rare", "a", "b"]
    assert said == "3 classes from sub-folders of test/, train/ and val/"


def test_splits_without_classes_are_no_labels() -> None:
    labels, said = found(*images("train", "val"))
    assert labels is None
    assert said == "none: train/ and val/ are parts of a split and hold no sub-folders"


def test_splits_that_do_not_agree_are_no_labels() -> None:
    """Patients, of whom none is in two parts."""
    labels, said = found(*images("train/p1", "train/p2", "val/p3"))
    assert labels is None
    assert said == (
        "none: train/ and val/ are parts of a split, and their sub-folders do not agree: train/ has p1/ and p2/, the "
        "other p3/"
    )


def test_a_part_that_nobody_labelled() -> None:
    labels, said = found(*images("train/cat", "train/dog", each=30), *images("test", each=40))
    assert labels == [None] * 40 + ["cat"] * 30 + ["dog"] * 30
    assert said == "2 classes from sub-folders of train/; the 40 images of test/ have none"


def test_splits_beside_other_folders_are_no_labels() -> None:
    labels, said = found(*images("train", "val", "cars"))
    assert labels is None
    assert said.startswith("none: train/ and val/ are parts of a split and no classes, and beside them lies cars/. ")
    labels, said = found(*images("cats_train", "cats_test", "dogs_train", "dogs_test"))
    assert labels is None
    assert said.startswith("none: cats_test/, cats_train/, dogs_test/ and dogs_train/ are parts of a split")


def test_a_class_may_be_called_train_or_test() -> None:
    assert found(*images("bus", "car", "train"))[1] == "3 classes from sub-folders"
    assert found(*images("control", "test"))[1] == "2 classes from sub-folders"
    assert found(*images("test tube", "train station"))[1] == "2 classes from sub-folders"


def test_archives_in_a_folder_of_their_own() -> None:
    names = images("training_set/training_set/cats", "training_set/training_set/dogs", "test_set/test_set/cats")
    assert found(*names) == (
        ["cats"] * 4 + ["dogs"] * 2,
        "2 classes from sub-folders of test_set/ and training_set/",
    )
    names = images("pets/train/cat", "pets/train/dog", "pets/val/cat", "pets/val/dog", each=1)
    assert found(*names) == (["cat", "dog"] * 2, "2 classes from sub-folders of pets/train/ and pets/val/")
    assert found(*images("images/cat", "images/dog")) == (
        ["cat"] * 2 + ["dog"] * 2,
        "2 classes from sub-folders of images/",
    )
    assert found(*images("cat/2019", "cat/2020"))[1] == "1 class from sub-folders"


def test_images_and_masks_are_no_classes() -> None:
    assert found(*images("images", "masks")) == (None, "none: images/ and masks/ are no classes by name")
    assert found(*images("images")) == (None, "none: images/ is no class by name")
    labels, said = found(*images("train/images", "train/masks", "val/images", "val/masks"))
    assert labels is None
    assert said == ("none: train/ and val/ are parts of a split, and images/ and masks/ in them are no classes by name")


def test_strays_are_named_and_take_no_part() -> None:
    labels, said = found(*images("a", "b", each=20), "stray.jpg")
    assert labels == ["a"] * 20 + ["b"] * 20 + [None]
    assert said == "2 classes from sub-folders; 1 image lies in none and takes no part: stray.jpg"
    labels, said = found(*images("train/a", "train/b", "val/a", "val/b", each=10), "train/0.png", "1.png")
    assert labels is not None
    assert labels.count(None) == 2
    assert said == (
        "2 classes from sub-folders of train/ and val/; 2 images lie in none and take no part: 1.png, train/0.png"
    )


@pytest.mark.parametrize(
    ("strays", "total", "kept"), [(10, 60, True), (11, 60, False), (20, 2000, True), (21, 2000, False)]
)
def test_too_many_strays_take_the_labels_away(strays: int, total: int, kept: bool) -> None:
    names = images("a", each=total - strays) + [f"{i:03}.png" for i in range(strays)]
    labels, said = found(*names)
    if kept:
        assert labels is not None
        assert said.endswith(f"{strays} images lie in none and take no part: 000.png, 001.png, 002.png, …")
    else:
        assert labels is None
        assert said == f"none: {strays} of {total:,} images lie in none of the sub-folders, such as 000.png"


def test_strays_are_not_half_of_all() -> None:
    assert found("a/1.png", "2.png")[0] is None


@pytest.mark.parametrize("name", ["train", "TEST", "val_2", "dev", "hold-out", "fold3", "Testing"])
def test_names_of_parts(name: str) -> None:
    assert is_split(name)


@pytest.mark.parametrize("name", ["cat", "trains", "contest", "a", "1", "trial", "unlabeled", "all"])
def test_other_names(name: str) -> None:
    assert not is_split(name)
