"""JSON that every reader takes, and objects out of bytes and files, with errors that say where.

A file may be a user's, or one that a disk has damaged.
"""

import json
import math
from typing import Any


def to_json(value: Any, **options: Any) -> str:
    """JSON of plain values, numbers that are not finite as null: jq, JavaScript and strict parsers know no NaN.

    options: of json.dumps.
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object in some bytes.

    where: the file, or "file, line n", for messages; the line within `raw` is added where it has several.

    Raises:
      ValueError: for what is not UTF-8, not JSON, nested too deeply, a number too long to be read, or not an object.
    """
    try:
        value = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        line = _line(raw, error.start)
        unit = f"byte {error.start} of the line" if not line else f"byte {error.start}"
        raise ValueError(f"{where}{line}: not valid UTF-8 ({unit}).") from error
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if b"\n" in raw.rstrip() else ""
        raise ValueError(f"{where}{line}: not valid JSON ({error.msg} at column {error.colno}).") from error
    except RecursionError as error:
        raise ValueError(f"{where}: not readable JSON (it is nested too deeply).") from error
    except ValueError as error:  # Python refuses to read integers of thousands of digits
        raise ValueError(f"{where}: not readable JSON (an integer with too many digits).") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(value).__name__}.")
    return value


def read_object(path: str) -> dict[str, Any]:
    """The JSON object of a file; OSError where it cannot be read, ValueError as `parse_object`."""
    with open(path, "rb") as file:
        return parse_object(file.read(), path)


def _line(raw: bytes, start: int) -> str:
    return f", line {raw.count(chr(10).encode(), 0, start) + 1}" if b"\n" in raw.rstrip() else ""
