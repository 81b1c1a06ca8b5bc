"""The sub-folders of a folder that are classes: not train/ and val/, nor images/ and masks/."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dinoforge.data.names import printable

_PARTS = {
    "train": "train training trn trainset trainingset",
    "val": "val valid validation valset validset validationset",
    "test": "test testing tst testset testingset",
    "dev": "dev devset",
    "eval": "eval evaluation evalset",
    "holdout": "holdout",
    "fold": "fold",
    "split": "split",
}
_BESIDE = "unlabeled unlabelled labeled labelled extra trainval minival query gallery pred prediction predict all"
_PART_OF_WORD = {word: part for part, words in _PARTS.items() for word in words.split()} | {
    word: word for word in _BESIDE.split()
}
"""The part of a split that words in names of folders mean."""

_QUALIFIERS = frozenset("set data image images img imgs only jpg jpeg png part full small large a b i ii iii".split())
"""Words beside these that change nothing, just as numbers."""

_ROLES = re.compile(
    r"(data|dataset|images?|imgs?|jpegimages|photos?|pictures?|pics|inputs?|raw|rgb|masks?|labels?|annotations?|annots?|"
    r"gts?|ground[-_ ]?truths?|segmentations?|segs?|targets?|outputs?|overlays?|depths?)([-_ ]?(png|jpe?g|tiff?|\d+))?",
    re.IGNORECASE,
)
"""Names of folders that tell what the files are for, not what they show."""

FEW_STRAYS = 10
"""The number of images without a label that hurts no measurement, whatever their share."""

_DEEPEST = 4  # levels of folders that are looked through


def few(strays: int, images: int) -> bool:
    """Whether as few images may lack a label while the others keep theirs: up to 10, or 1 %; under half."""
    return strays <= max(FEW_STRAYS, images // 100) and 2 * strays < images


def is_split(name: str) -> bool:
    """Whether a folder or a cell names a part of a split: ``train``, ``Val``, ``test2017``, ``fold_3``."""
    part, rest = _part_of(name)
    return part in _PARTS and not rest


@dataclass(frozen=True)
class ClassFolders:
    """The folder in an image's path that is its label.

    Args:
        depth: The place of the folder in the relative path, from 0; None where there are no labels.
        said: The kind of the labels, or the reason why there are none, in words.
    """

    depth: int | None
    said: str

    def label(self, name: str) -> str | None:
        """Find the label of an image by its relative path; None where it has none."""
        if self.depth is None:
            return None
        parts = name.split("/", self.depth + 1)
        return parts[self.depth] if len(parts) == self.depth + 2 else None


def class_folders(names: Sequence[bytes]) -> ClassFolders:
    """Find out which sub-folders are classes: the top ones, or those below train/, val/, …

    Args:
        names: Relative paths of all images, with forward slashes.
    """
    depth, above = 0, ""
    tops = _folders_at(names, depth)
    # images/cat/…, cars/train/…: a single folder is looked through if it cannot be a class, or stands before a split.
    while len(tops) == 1 and None not in tops and depth < _DEEPEST and not _is_split_level(tops):
        (only,) = tops
        below = _folders_at(names, depth + 1)
        if set(below) == {None} or not (_is_split_level(below) or _ROLES.fullmatch(str(only))):
            break
        depth, tops, above = depth + 1, below, f"{above}{only}/"

    found = sorted(name for name in tops if name is not None)
    if not found:
        return ClassFolders(None, "none: the images lie in no sub-folders")
    if _is_split_level(tops):
        return _below_splits(names, depth, above)
    if splits := _splits_among(found):
        rest = [name for name in found if name not in splits]
        beside = f", and beside them {'lies' if len(rest) == 1 else 'lie'} {_listed(rest, above)}" if rest else ""
        return ClassFolders(
            None,
            f"none: {_listed(splits, above)} are parts of a split and no classes{beside}. Give one part as the data, "
            "or a table of labels",
        )
    if all(map(_ROLES.fullmatch, found)):
        return ClassFolders(None, f"none: {_listed(found, above)} {_are(found)} no class{_es(found)} by name")
    strays = [name for name in names if name.count(b"/") <= depth]
    where = f"sub-folders of {above}" if above else "sub-folders"
    if not few(len(strays), len(names)):
        return ClassFolders(
            None, f"none: {len(strays):,} of {len(names):,} images lie in none of the {where}, such as {_first(strays)}"
        )
    return ClassFolders(depth, f"{len(found):,} class{_es(found)} from {where}{_said_of_strays(strays)}")


def _below_splits(names: Sequence[bytes], depth: int, above: str) -> ClassFolders:
    """Find the classes in train/, val/, …, which lie at a depth: one level deeper, where the parts agree on them."""
    deeper = depth + 1
    while deeper < _DEEPEST and _is_split_level(_folders_at(names, deeper)):
        deeper += 1  # training_set/training_set/…, as archives unpack
    classes: defaultdict[str, set[str]] = defaultdict(set)  # the classes of each part
    bare: defaultdict[str, list[bytes]] = defaultdict(list)  # images of each part that lie in none
    labelled = 0
    for name in names:
        parts = name.split(b"/", deeper + 1)
        part = os.fsdecode(parts[depth]) if len(parts) > depth + 1 else ""
        if len(parts) == deeper + 2:
            classes[part].add(os.fsdecode(parts[deeper]))
            labelled += 1
        else:
            bare[part].append(name)
    every = sorted(part for part in {*classes, *bare} if part)
    splits = f"{_listed(every, above)} {'is a part' if len(every) == 1 else 'are parts'} of a split"
    if not classes:
        return ClassFolders(None, f"none: {splits} and {'holds' if len(every) == 1 else 'hold'} no sub-folders")
    found = sorted(set().union(*classes.values()))
    if all(map(_ROLES.fullmatch, found)):
        return ClassFolders(
            None, f"none: {splits}, and {_listed(found)} in {_it(every)} {_are(found)} no class{_es(found)} by name"
        )
    for part, own in sorted(classes.items()):
        others = set().union(*(has for other, has in classes.items() if other != part))
        if len(classes) > 1 and 2 * len(own & others) < len(own):
            return ClassFolders(
                None,
                f"none: {splits}, and their sub-folders do not agree: {above}{part}/ has {_listed(sorted(own))}, "
                f"{'the other' if len(classes) == 2 else 'the others'} {_listed(sorted(others))}",
            )
    without = sorted(part for part in bare if part and part not in classes)  # such as a test/ that nobody labelled
    strays = [name for part, images in bare.items() if part not in without for name in images]
    if not few(len(strays), labelled + len(strays)):
        return ClassFolders(
            None,
            f"none: {splits}, and {len(strays):,} images lie in none of {_its(every)} sub-folders, such as "
            + _first(strays),
        )
    said = f"{len(found):,} class{_es(found)} from sub-folders of {_listed(sorted(classes), above)}"
    if without:
        count = sum(len(bare[part]) for part in without)
        said += f"; the {count:,} image{'' if count == 1 else 's'} of {_listed(without, above)} have none"
    return ClassFolders(deeper, said + _said_of_strays(strays))


def _folders_at(names: Iterable[bytes], depth: int) -> set[str | None]:
    """The folders at a depth of the paths; None stands for paths that are not so deep."""
    found: set[bytes | None] = set()
    for name in names:
        parts = name.split(b"/", depth + 1)
        found.add(parts[depth] if len(parts) == depth + 2 else None)
    return {None if name is None else os.fsdecode(name) for name in found}


def _part_of(name: str) -> tuple[str | None, tuple[str, ...]]:
    """Find the part of a split in a name, and its other words: ``DIV2K_train_HR`` gives train and (div, k, hr)."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    words = re.findall(r"[^\W\d_]+", re.sub(r"hold[-_ ]out", "holdout", apart))
    part = next((found for word in words if (found := _PART_OF_WORD.get(word))), None)
    return part, tuple(word for word in words if word not in _QUALIFIERS and word not in _PART_OF_WORD)


def _is_split_level(folders: Iterable[str | None]) -> bool:
    """Whether folders beside each other are the parts of one split, and nothing else."""
    parts = [_part_of(name) for name in folders if name is not None]
    kinds, rests = {part for part, _ in parts}, {rest for _, rest in parts}
    if None in kinds or len(rests) != 1 or not kinds.intersection(_PARTS):
        return False
    return rests == {()} or len(kinds) > 1


def _splits_among(folders: Sequence[str]) -> list[str]:
    """Find the folders that are parts of a split: at least two that differ in nothing but the part."""
    alike: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in folders:
        part, rest = _part_of(name)
        if part in _PARTS:
            alike[rest].append(name)
    several = [
        found for rest, found in alike.items() if len({_part_of(name)[0] if rest else name for name in found}) > 1
    ]
    return sorted(name for found in several for name in found)


def _first(names: Sequence[bytes]) -> str:
    return printable(os.fsdecode(names[0]))


def _said_of_strays(names: Sequence[bytes]) -> str:
    """Say which images have no label and take no part."""
    if not names:
        return ""
    first = ", ".join(printable(os.fsdecode(name)) for name in names[:3]) + (", …" if len(names) > 3 else "")
    if len(names) == 1:
        return f"; 1 image lies in none and takes no part: {first}"
    return f"; {len(names):,} images lie in none and take no part: {first}"


def _listed(folders: Sequence[str], above: str = "") -> str:
    """Name up to four folders, such as ``a/, b/ and c/``."""
    shown = [f"{printable(above + folder)}/" for folder in folders[:4]]
    if len(folders) > 4:
        return f"{', '.join(shown)} and {len(folders) - 4:,} more"
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def _are(things: Sequence[str]) -> str:
    return "is" if len(things) == 1 else "are"


def _es(things: Sequence[str]) -> str:
    return "" if len(things) == 1 else "es"


def _it(things: Sequence[str]) -> str:
    return "it" if len(things) == 1 else "them"


def _its(things: Sequence[str]) -> str:
    return "its" if len(things) == 1 else "their"
