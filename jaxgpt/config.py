"""ConfigDict to frozen dataclasses: where a user's configuration becomes the library's, checked field by field."""

import ast
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

from jaxgpt.nearest import nearest_field

T = TypeVar("T")

LARGEST_FLOAT = 3.4028234663852886e38  # of float32, which all numbers of a config become
LARGEST_INT = 2**63 - 1


# Pairs of fields of one section of which the second, where it is not 0, says what the first would.
EXCLUSIVE = (("num_train_steps", "num_epochs"),)


def build(cls: type[T], values: Mapping[str, Any], field: str = "") -> T:
    """An instance of the dataclass `cls` from a (nested) mapping; missing keys keep their defaults.

    field: the name of the section, for messages ("model" makes "model.num_heads").

    Raises:
      ValueError: one sentence naming the field, for an unknown key (with the nearest known one), a value of the wrong
        type, or whatever the dataclass's own __post_init__ finds.
    """
    unknown = _first_unknown(cls, values, "")
    if unknown is not None:
        raise ValueError(_no_field(cls, *unknown, field))
    hints = typing.get_type_hints(cls)
    arguments = {key: convert(value, hints[key], _join(field, key)) for key, value in values.items()}
    if type(arguments.get("seed")) is int:
        check_seed(arguments["seed"], _join(field, "seed"))
    for steps, epochs in EXCLUSIVE:
        if steps in hints and arguments.get(epochs):
            arguments.setdefault(steps, 0)  # not the default, which has no say
    return cls(**arguments)


def _first_unknown(hint: Any, values: Any, path: str) -> tuple[str, list[str]] | None:
    """The first key of nested values that is no field of `hint`, as a path, and the fields that are there beside it."""
    section, item = _inside(hint)
    if not isinstance(values, Mapping):
        return None
    hints = typing.get_type_hints(section) if section is not None else dict.fromkeys(values, item)
    for key, value in values.items():
        here = _join(path, str(key))
        if key not in hints:
            while isinstance(value, Mapping) and value:
                key, value = next(iter(value.items()))
                here = _join(here, str(key))
            return here, [_join(path, name) for name in hints]
        unknown = _first_unknown(hints[key], value, here)
        if unknown is not None:
            return unknown
    return None


def _inside(hint: Any) -> tuple[Any, Any]:
    """(dataclass, None) for the type of a section, (None, type of the items) for that of a mapping, else (None, None)."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    for option in typing.get_args(hint) if is_union else (hint,):
        if dataclasses.is_dataclass(option):
            return option, None
        if typing.get_origin(option) is dict:
            return None, typing.get_args(option)[1]
    return None, None


def _no_field(cls: Any, path: str, siblings: list[str], field: str = "") -> str:
    nearest = nearest_field(path, [*_fields(cls), *siblings])
    return f"There is no config field {_join(field, path)}" + (
        f"; the nearest field is {_join(field, nearest)}." if nearest else "."
    )


def _fields(cls: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all fields of a config, sections included."""
    for name, hint in typing.get_type_hints(cls).items():
        yield prefix + name
        section, _ = _inside(hint)
        if section is not None:
            yield from _fields(section, f"{prefix}{name}.")


def convert(value: Any, hint: Any, field: str) -> Any:
    """`value` as the annotated type `hint`, or ValueError naming `field`. An int serves as a float, a list as a tuple."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, options, field)
    if origin is Literal:
        if value in options:
            return value
        close = difflib.get_close_matches(str(value), [str(o) for o in options], n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{field}={shown(value)} is not one of {', '.join(map(str, options))}; the nearest is {close!r}."
        )
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if type(value) is hint:
            return value
        if isinstance(value, Mapping):
            return build(hint, value, field)
        raise ValueError(f"{field} is a section with fields of its own, not {shown(value)}.")
    if origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(convert(v, options[0], f"{field}[{i}]") for i, v in enumerate(value))
        raise ValueError(f"{field} must be a list, not {shown(value)}.")
    if origin is dict:
        if isinstance(value, Mapping):
            return {str(k): convert(v, options[1], _join(field, str(k))) for k, v in value.items()}
        raise ValueError(f"{field} must be a mapping, not {shown(value)}.")
    return _convert_scalar(value, hint, field)


def _convert_scalar(value: Any, hint: Any, field: str) -> Any:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if hint is float and (is_integer or type(value) is float):
        if not abs(value) <= LARGEST_FLOAT:
            raise ValueError(f"{field} must be a finite number of at most {LARGEST_FLOAT:.3g}, not {shown(value)}.")
        return float(value)
    if hint in (int, float, str, bool) and (type(value) is not hint):
        raise ValueError(f"{field} must be {_NAMES[hint]}, not {shown(value)}.")
    if hint is int and not -LARGEST_INT - 1 <= value <= LARGEST_INT:
        raise ValueError(f"{field} must be an integer of at most {LARGEST_INT}, not {shown(value)}.")
    if hint is str and "\0" in value:
        raise ValueError(f"{field} must not have a NUL character in it.")
    return value


def shown(value: Any) -> str:
    """A value as it is shown in a message: in one line, and not whole where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "an integer of thousands of digits"
    return text if len(text) <= 120 else f"{text[:100]}..."


def check_bounds(config: Any, section: str, **bounds: Any) -> None:
    """ValueError naming the first field of a config that is below its least value; None in a field is let through.

    section: what stands before the field's name, as "model.". bounds: field -> the least value, or "positive".
    """
    for name, least in bounds.items():
        value = getattr(config, name)
        if value is None:
            continue
        if least == "positive" and not value > 0:
            raise ValueError(f"{section}{name} must be positive, not {shown(value)}.")
        if least != "positive" and not value >= least:
            raise ValueError(f"{section}{name} must be at least {least}, not {shown(value)}.")


def check_seed(seed: int, field: str = "seed") -> None:
    """ValueError for a seed that is not one of jax's, which has 32 bits."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"{field} must be from 0 to 2**32 - 1 = {2**32 - 1}, not {shown(seed)}.")


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
    raise ValueError(f"{field} must be {' or '.join(names)}, not {shown(value)}.")


def field_type(cls: Any, path: str) -> Any:
    """The annotated type of a dotted field path below the dataclass `cls`; ValueError naming the nearest known field."""
    hint, seen = cls, ""
    for key in path.split("."):
        section, item = _inside(hint)
        if section is not None:
            hints = typing.get_type_hints(section)
            if key not in hints:
                raise ValueError(_no_field(cls, path, [_join(seen, name) for name in hints]))
            hint = hints[key]
        elif item is not None:
            hint = item
        elif hint is not Any:
            raise ValueError(f"{seen} is a single value: it has no field {key!r}.")
        seen = _join(seen, key)
    return hint


def override(values: dict, cls: Any, path: str, text: str) -> None:
    """Set the dotted field `path` of the nested dict `values` from the text of a flag, read as the field's type.

    Lists may be written a,b,c or as a Python literal, mappings as a Python literal, None as none. What other values are
    computed from may be a leaf with a method `set` (a FieldReference); it is told the value.
    """
    hint = field_type(cls, path)
    value = to_dict(
        convert(_parse(text, hint, path), hint, path)
    )  # plain, so that a later override may change a part of it
    *sections, last = path.split(".")
    for key in sections:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    set_field(values, last, value)


def set_field(section: dict[str, Any], name: str, value: Any) -> None:
    """Give a field of a section its value, in place of the field of EXCLUSIVE that would say the same in another way."""
    for steps, epochs in EXCLUSIVE:
        if name == steps and value:
            section.pop(epochs, None)
        elif name == epochs and value:
            section.pop(steps, None)
    refer = getattr(section.get(name), "set", None)
    if callable(refer):
        refer(value, False)  # not type-safe: the value has the type of the field
    else:
        section[name] = value


def check_exclusive(fields: Mapping[str, Any], where: str) -> None:
    """ValueError where both of a pair of EXCLUSIVE are set among these dotted fields, which all stand in one place."""
    for name, value in fields.items():
        section, _, last = name.rpartition(".")
        for steps, epochs in EXCLUSIVE:
            other = fields.get(_join(section, steps))
            if last == epochs and _is_set(value) and _is_set(other):
                raise ValueError(
                    f"{where} sets both {_join(section, steps)}={other} and {name}={value}; give one of the two."
                )


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of a nested mapping, empty mappings included as values."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_set(value: Any) -> bool:
    try:
        return value is not None and float(value) != 0
    except (TypeError, ValueError):
        return True


def _parse(text: str, hint: Any, field: str) -> Any:
    """The Python value that `text` stands for where a `hint` is wanted; `convert` judges whether it fits.

    Raises ValueError naming the field where Python cannot read a text for its depth.
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if type(None) in options and text.lower() == "none":
            return None
        if str in options:
            return _literal(text, field) if text[:1] in "[({" and text else text
        return _parse(text, next(o for o in options if o is not type(None)), field)
    if hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if hint is str or origin is Literal:
        return text
    if origin is tuple and text[:1] not in ("[", "("):
        return tuple(_parse(item, options[0], field) for item in text.split(",") if item)
    return _literal(text, field)


def _literal(text: str, field: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (RecursionError, MemoryError) as error:  # ast's own, of the parser's stack
        raise ValueError(f"{field}={shown(text)} is nested too deeply to be read.") from error
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
