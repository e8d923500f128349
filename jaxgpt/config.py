"""ConfigDict to frozen dataclasses: where a user's configuration becomes the library's, checked field by field."""

import ast
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], field: str = "") -> T:
    """An instance of the dataclass `cls` from a (nested) mapping; missing keys keep their defaults.

    field: the name of the section, for messages ("model" makes "model.num_heads").

    Raises:
      ValueError: one sentence naming the field, for an unknown key (with the nearest known one), a value of the wrong
        type, or whatever the dataclass's own __post_init__ finds.
    """
    hints = typing.get_type_hints(cls)
    known = list(hints)
    arguments = {}
    for key, value in values.items():
        if key not in known:
            raise ValueError(unknown_key(key, known, field))
        arguments[key] = convert(value, hints[key], _join(field, key))
    return cls(**arguments)


def unknown_key(key: str, known, field: str = "") -> str:
    """The sentence for a key that does not exist, with the nearest one that does."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)
    nearest = f"; the nearest field is {_join(field, close[0])}" if close else ""
    return f"There is no config field {_join(field, key)}{nearest}."


def convert(value: Any, hint: Any, field: str) -> Any:
    """`value` as the annotated type `hint`, or ValueError naming `field`. An int serves as a float, a list as a tuple."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, options, field)
    if origin is Literal:
        if value in options:
            return value
        close = difflib.get_close_matches(str(value), [str(o) for o in options], n=1, cutoff=0.0)[0]
        raise ValueError(f"{field}={value!r} is not one of {', '.join(map(str, options))}; the nearest is {close!r}.")
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if type(value) is hint:
            return value
        if isinstance(value, Mapping):
            return build(hint, value, field)
        raise ValueError(f"{field} is a section with fields of its own, not {value!r}.")
    if origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(convert(v, options[0], f"{field}[{i}]") for i, v in enumerate(value))
        raise ValueError(f"{field} must be a list, not {value!r}.")
    if origin is dict:
        if isinstance(value, Mapping):
            return {str(k): convert(v, options[1], _join(field, str(k))) for k, v in value.items()}
        raise ValueError(f"{field} must be a mapping, not {value!r}.")
    return _convert_scalar(value, hint, field)


def _convert_scalar(value: Any, hint: Any, field: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and (type(value) is not hint):
        raise ValueError(f"{field} must be {_NAMES[hint]}, not {value!r}.")
    return value


_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "True or False"}


def _convert_union(value: Any, options: tuple, field: str) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(o for o in options if o is not type(None))
    if len(options) == 1:
        return convert(value, options[0], field)
    # The options of our unions differ in kind (string, list, mapping): the kind of the value picks one, so that the
    # message about what is wrong inside it is the right one.
    kind = dict if isinstance(value, Mapping) else tuple if isinstance(value, list | tuple) else type(value)
    for option in options:
        if (typing.get_origin(option) or option) is kind:
            return convert(value, option, field)
    names = [_NAMES.get(o, "a list" if typing.get_origin(o) is tuple else "a mapping") for o in options]
    raise ValueError(f"{field} must be {' or '.join(names)}, not {value!r}.")


def field_type(cls: Any, path: str) -> Any:
    """The annotated type of a dotted field path below the dataclass `cls`; ValueError naming the nearest known field."""
    hint, seen = cls, ""
    for key in path.split("."):
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        options = typing.get_args(hint) if is_union else (hint,)
        section = next((o for o in options if dataclasses.is_dataclass(o)), None)
        mapping = next((o for o in options if typing.get_origin(o) is dict), None)
        if section is not None:
            hints = typing.get_type_hints(section)
            if key not in hints:
                raise ValueError(unknown_key(key, hints, seen))
            hint = hints[key]
        elif mapping is not None:
            hint = typing.get_args(mapping)[1]
        elif hint is not Any:
            raise ValueError(f"{seen} is a single value: it has no field {key!r}.")
        seen = _join(seen, key)
    return hint


def override(values: dict, cls: Any, path: str, text: str) -> None:
    """Set the dotted field `path` of the nested dict `values` from the text of a flag, read as the field's type.

    Lists may be written a,b,c or as a Python literal, mappings as a Python literal, None as none.
    """
    value = convert(_parse(text, field_type(cls, path)), field_type(cls, path), path)
    *sections, last = path.split(".")
    for key in sections:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[last] = to_dict(value)  # plain, so that a later override may change a part of it


def _parse(text: str, hint: Any) -> Any:
    """The Python value that `text` stands for where a `hint` is wanted; `convert` judges whether it fits."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if type(None) in options and text.lower() == "none":
            return None
        if str in options:
            return _literal(text) if text[:1] in "[({" and text else text
        return _parse(text, next(o for o in options if o is not type(None)))
    if hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if hint is str or origin is Literal:
        return text
    if origin is tuple and text[:1] not in ("[", "("):
        return tuple(_parse(item, options[0]) for item in text.split(",") if item)
    return _literal(text)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def to_dict(config: Any) -> Any:
    """Nested plain dicts and lists, ready for JSON."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(k): to_dict(v) for k, v in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(v) for v in config]
    return config


def _join(field: str, key: str) -> str:
    return f"{field}.{key}" if field else key
