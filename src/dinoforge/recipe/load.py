"""Recipes by name, from YAML files and from the command line."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from dinoforge.errors import RecipeError
from dinoforge.recipe.checks import validate, validate_sizes
from dinoforge.recipe.schema import ALTERNATIVES, SECTIONS, TYPES, WITHOUT_MEANING, Recipe, flatten


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in _recipe_folder().iterdir() if p.name.endswith(".yaml"))


def load_recipe(
    recipe: str | Path | Recipe = "dinov2",
    overrides: Mapping[str, Any] | Iterable[str] = (),
    *,
    beneath: Mapping[str, Any] | None = None,
) -> tuple[Recipe, dict[str, str]]:
    """A recipe by name or file, with overrides on top.

    Args:
        recipe: A name of ``recipe_names()``, a YAML file of ours or of the reference, or a recipe.
        overrides: Strings ``"section.key=value"``, or a mapping from dotted keys to values.
        beneath: Values of the file in ``init.weights`` by dotted keys; whatever the recipe says wins over them. As long
            as a recipe with ``init.architecture: file`` has none, what depends on them is not checked.

    Returns:
        The recipe, and the keys that were given but have no meaning here, each with the reason.

    Raises:
        RecipeError: A recipe or key is unknown (the error names the nearest one), a type is wrong, a value is out of
            bounds, or values contradict each other.
    """
    values = dict(beneath or {}) | (flatten(recipe) if isinstance(recipe, Recipe) else {})
    ignored: dict[str, str] = {}
    if not isinstance(recipe, Recipe):
        for layer in _layers(recipe):
            ignored |= _merge(values, layer)
    given = dict(overrides) if isinstance(overrides, Mapping) else dict(parse_override(text) for text in overrides)
    ignored |= _merge(values, given)
    result = _build(values)
    validate(result)
    if result.init.architecture == "recipe" or beneath is not None:
        validate_sizes(result)
    return result, ignored


def base_of(recipe: str | Path | Recipe) -> str:
    """Name of the recipe of ``recipe_names()`` that a recipe is, or that its file names as ``base``; else the defaults'
    name."""
    if isinstance(recipe, Recipe):
        return "dinov2"
    if str(recipe) in recipe_names():
        return str(recipe)
    return str(_read_yaml(Path(recipe).read_text(encoding="utf-8"), Path(recipe)).get("base", "dinov2"))


def converted(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Convert overrides to the types of their keys, without checking them against each other.

    Raises:
        RecipeError: A key is unknown or a type is wrong.
    """
    values: dict[str, Any] = {}
    _merge(values, overrides)
    return values


def dump(recipe: Recipe) -> str:
    """The recipe as YAML that ``load_recipe`` reads back to an equal recipe."""
    plain = dataclasses.asdict(recipe, dict_factory=lambda items: {k: _plain(v) for k, v in items})
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _recipe_folder() -> Any:
    return resources.files("dinoforge") / "recipe"


def _layers(recipe: str | Path) -> list[dict[str, Any]]:
    """The flat values of a recipe file and, before it, of the recipe that its ``base`` names."""
    path = Path(recipe)
    if str(recipe) in recipe_names():
        text = (_recipe_folder() / f"{recipe}.yaml").read_text(encoding="utf-8")
    elif path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot read the recipe {path}: {error}") from error
    elif str(recipe) == "auto":
        raise RecipeError(
            "the recipe auto is a function of the images: dinoforge train DATA --recipe auto --dry-run shows it, and "
            "RUN/recipe.yaml has that of a run"
        )
    else:
        hint = _nearest(str(recipe), recipe_names())
        raise RecipeError(
            f"no recipe {str(recipe)!r}{hint}: expected a YAML file or one of {', '.join(recipe_names())}"
        )
    values = _read_yaml(text, path)
    base = values.pop("base", None)
    if base is not None and base not in recipe_names():
        raise RecipeError(f"{path}: base must be one of {', '.join(recipe_names())}, got {base!r}")
    return (_layers(base) if base else []) + [_flat_layer(values)]


class _Loader(yaml.SafeLoader):
    """YAML 1.2's values: 010 is ten, 1:30, yes and 2026-11-29 are text; what is left empty is not null but text.

    Raises:
        yaml.YAMLError: It is no YAML, or a key stands twice.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if name in seen:
                raise yaml.MarkedYAMLError(None, None, f"{name} stands there a second time", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node)).replace("_", "")
        return int(text, 0 if text.lstrip("+-").lower().startswith(("0x", "0o", "0b")) else 10)


_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL", "~nN"),
    "int": (r"[-+]?(?:[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+|0b[01]+)", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
"""Tag -> what a scalar of it looks like, and the characters that it begins with."""


class _Dumper(yaml.SafeDumper):
    """Quotes what ``_Loader`` would take for something else than text."""


_Loader.yaml_implicit_resolvers, _Dumper.yaml_implicit_resolvers = {}, {}
for _tag, (_form, _starts) in _SCALARS.items():
    for _yaml in (_Loader, _Dumper):
        _yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_form})$"), list(_starts))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


def _read_yaml(text: str, path: Path) -> dict[str, Any]:
    """The sections of a recipe file.

    Raises:
        RecipeError: It is no YAML, has a key twice, or says nothing.
    """
    try:
        values = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if values is None or values == "":
        raise RecipeError(
            f"{path} is empty: expected sections with keys, base with the name of a recipe, or {{}} for the defaults"
        )
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected sections with keys, got {type(values).__name__}")
    return values


def _flat_layer(values: Mapping[Any, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if name in SECTIONS:
            if value not in (None, "") and not isinstance(value, Mapping):
                raise RecipeError(f"{name} is a section with keys, got {value!r}")
            flat |= {f"{name}.{key}": v for key, v in (value or {}).items()}
        else:
            flat[str(name)] = value
    return flat


def parse_override(text: str) -> tuple[str, Any]:
    """Read ``section.key=value``; the value is YAML, or a list such as ``0.5,0.5,0.5``; a key of text takes it as it
    is."""
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not key:
        raise RecipeError(f"expected key=value, such as train.steps=1000, got {text!r}")
    if not value:
        raise RecipeError(
            f"{key} has no value in {text!r}, as when a shell's variable is not set: give one, or write {key}=null "
            "where there is to be none"
        )
    if _is_text(key) and value[0] not in "'\"" and value not in ("null", "~"):
        return key, value
    try:
        found = yaml.load(value, _Loader)  # a SafeLoader
        if isinstance(found, str) and "," in value and value[0] not in "'\"":
            found = yaml.load(f"[{value}]", _Loader)
    except yaml.YAMLError:
        return key, value
    return key, found


def _is_text(key: str) -> bool:
    return str in (TYPES.get(key), *typing.get_args(TYPES.get(key)))


def _merge(values: dict[str, Any], layer: Mapping[str, Any]) -> dict[str, str]:
    """Lays ``layer`` over ``values``; returns the keys without meaning."""
    ignored: dict[str, str] = {}
    for keys in ALTERNATIVES:
        named = [k for k in keys if layer.get(k) is not None]
        if named:
            for key in keys:
                values.pop(key, None)
    if layer.get("train.steps") is not None and layer.get("train.epochs") is not None:
        raise RecipeError("train.steps and train.epochs contradict each other: give one of them")
    for key, value in layer.items():
        section = key.split(".")[0]
        if key in WITHOUT_MEANING or section in WITHOUT_MEANING:
            ignored[key] = WITHOUT_MEANING.get(key) or WITHOUT_MEANING[section]
        elif key == "student.pretrained_weights":
            if value:
                raise RecipeError("student.pretrained_weights: give init.weights=FILE instead")
            ignored[key] = "empty"
        elif key in TYPES:
            values[key] = _convert(key, value, TYPES[key])
        elif key in SECTIONS:
            raise RecipeError(f"{key} is a section: give its keys, such as {key}.{next(iter(_keys_of(key)))}=value")
        else:
            raise RecipeError(f"unknown key {key!r}{_nearest(key, [*TYPES, *SECTIONS])}")
    return ignored


def _keys_of(section: str) -> list[str]:
    return [f.name for f in dataclasses.fields(SECTIONS[section])]


def nearest_keys(word: str) -> list[str]:
    """Up to three keys of recipes whose names are close to a word."""
    return _near(word, list(TYPES))


def _nearest(word: str, words: list[str]) -> str:
    near = _near(word, words)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _near(word: str, words: list[str]) -> list[str]:
    last = word.split(".")[-1]
    same_ending = [w for w in words if w.split(".")[-1] == last]
    endings = {w.split(".")[-1]: w for w in reversed(words)}
    near = same_ending or difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    near = near or [endings[e] for e in difflib.get_close_matches(last, list(endings), n=1, cutoff=0.6)]
    return near[:3]


def _build(values: Mapping[str, Any]) -> Recipe:
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    top: dict[str, Any] = {}
    for key, value in values.items():
        section, dot, name = key.partition(".")
        if dot:
            sections[section][name] = value
        else:
            top[key] = value
    return Recipe(**top, **{name: cls(**sections[name]) for name, cls in SECTIONS.items()})


def _convert(key: str, value: Any, hint: Any) -> Any:
    """``value`` as the type of ``key``, or an error that says what was expected."""
    if isinstance(value, str) and not value.strip():
        raise RecipeError(f"{key} has no value: give one, or write null where there is to be none")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(key, value, next(a for a in arguments if a is not type(None)))
    if origin is Literal:
        if value in arguments:
            return value
        raise RecipeError(f"{key}: expected {' | '.join(map(str, arguments))}, got {value!r}")
    if origin is tuple:
        variadic = len(arguments) == 2 and arguments[1] is Ellipsis
        if variadic and not isinstance(value, list | tuple):
            value = [value]
        if not isinstance(value, list | tuple) or (not variadic and len(value) != len(arguments)) or not value:
            count = "numbers" if variadic else f"{len(arguments)} numbers"
            raise RecipeError(f"{key}: expected a list of {count}, got {value!r}")
        return tuple(_convert(key, v, arguments[0]) for v in value)
    if hint is float:
        # YAML 1.1 reads 1e-3 (no point) as text.
        try:
            number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
        except (ValueError, OverflowError):
            number = None
        if number is None or number != number or abs(number) == float("inf"):
            raise RecipeError(f"{key}: expected a number, got {value!r}")
        return number
    if hint is int and isinstance(value, float | str) and not isinstance(value, bool):
        try:
            value = int(float(value)) if float(value).is_integer() else value
        except ValueError:
            pass  # told below, with the value as given
    if hint is bool and isinstance(value, str):
        value = {"yes": True, "on": True, "no": False, "off": False}.get(value.lower(), value)
    if type(value) is not hint:
        expected = {int: "a whole number", bool: "true or false", str: "text"}[hint]
        raise RecipeError(f"{key}: expected {expected}, got {value!r}")
    return value
