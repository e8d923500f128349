"""Reading what a user brings: text, jsonl, parquet and array_record files, record by record, with errors that say where."""

import difflib
import glob
import gzip
import hashlib
import json
import os
import re
import string
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import pyarrow
import pyarrow.parquet

from jaxgpt.config import shown
from jaxgpt.json_object import parse_object

T = TypeVar("T")

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet", ".array_record")


class Record(NamedTuple):
    """One record and where it stands: line counts from 1 (in parquet and array_record files, the row)."""

    fields: dict[str, Any]
    path: str
    line: int


class Document(NamedTuple):
    """One text and where it stands."""

    text: str
    path: str
    line: int


def resolve_paths(path: str | Iterable[str], field: str) -> list[str]:
    """The files that paths, globs and folders name, each once, sorted; `field` is the config field, for errors.

    Raises ValueError for a pattern without a file, with the nearest name there is, and for a file of another kind.
    """
    patterns = [path] if isinstance(path, str) else list(path)
    found: set[str] = set()
    for pattern in patterns:
        files = matching_files(pattern, SUFFIXES)
        if not files:
            raise ValueError(f"{field}: no file matches {shown(pattern)}{_nearest_file(pattern)}.")
        found.update(files)
    for file in sorted(found):
        if not file.endswith(SUFFIXES):
            raise ValueError(f"{field}: {file} is not of a supported kind ({', '.join(SUFFIXES)}).")
    if not found:
        raise ValueError(f"{field} is empty.")
    return sorted(found)


def matching_files(pattern: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files that a path or a glob names, or those of a folder whose names end in one of `suffixes`; maybe none."""
    if os.path.isfile(pattern):  # whatever its name, which may have brackets
        return [pattern]
    is_folder = os.path.isdir(pattern)
    matches = glob.glob(os.path.join(glob.escape(pattern), "*") if is_folder else pattern, recursive=True)
    return [m for m in matches if os.path.isfile(m) and (not is_folder or m.endswith(suffixes))]


def _nearest_file(pattern: str) -> str:
    folder = os.path.dirname(pattern) or "."
    if not os.path.isdir(folder):
        return f" (there is no folder {shown(folder)})"
    names = [name for name in os.listdir(folder) if name.endswith(SUFFIXES)]
    close = difflib.get_close_matches(os.path.basename(pattern), names, n=1, cutoff=0.4)
    return f"; the nearest is {os.path.join(folder, close[0])!r}" if close else ""


def content_digest(paths: Iterable[str]) -> str:
    """sha256 (hex) over the bytes of the files, in the given order; names and times do not matter."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def read_records(path: str) -> Iterator[Record]:
    """The records of a .jsonl, .jsonl.gz, .parquet or .array_record file (JSON objects), one at a time.

    Raises ValueError naming file and line for bytes that are not UTF-8, lines that are not JSON objects, a damaged or an
    empty file.
    """
    count = 0
    for record in _READERS[_suffix(path)](path):
        count += 1
        yield record
    if not count:
        raise ValueError(f"{path} is empty: it has no records.")


def _suffix(path: str) -> str:
    for suffix in (".jsonl.gz", ".jsonl", ".parquet", ".array_record"):
        if path.endswith(suffix):
            return suffix
    raise ValueError(f"{path} has no records; supported are .jsonl, .jsonl.gz, .parquet and .array_record.")


def _read_jsonl(path: str) -> Iterator[Record]:
    with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
        line = 0
        try:
            for line, raw in enumerate(file, start=1):
                if raw.strip():
                    yield _parse(raw, path, line)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip data after line {line} ({error}).") from error


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # as JSON may write one; most lines have none
_HALF = re.compile("[\ud800-\udfff]")


def _parse(raw: bytes, path: str, line: int) -> Record:
    fields = parse_object(raw, f"{path}, line {line}")
    for key, value in fields.items() if _SURROGATE.search(raw) else ():
        if half := _HALF.search(json.dumps([key, value], ensure_ascii=False)):
            raise ValueError(
                f"{path}, line {line}: the field {ascii(key)} has half a surrogate pair ({ascii(half.group())}), which is no "
                "character."
            )
    return Record(fields, path, line)


def _read_parquet(path: str) -> Iterator[Record]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            line = 0
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    line += 1
                    yield Record(fields, path, line)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file ({error}).") from error


def _read_array_record(path: str) -> Iterator[Record]:
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise ValueError(f"{path}: reading array_record files needs a package: pip install array_record.") from error
    if not os.path.getsize(path):
        return
    line = -1
    try:
        reader = array_record_module.ArrayRecordReader(path)
        for line in range(reader.num_records()):
            raw = reader.read([line])[0]
            yield _parse(raw, path, line + 1)
        reader.close()
    except (RuntimeError, IndexError) as error:
        place = f" after record {line + 1}" if line >= 0 else ""
        raise ValueError(f"{path} is not a readable array_record file{place} ({_first_line(error)}).") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


_READERS = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".parquet": _read_parquet,
    ".array_record": _read_array_record,
}


def check_fields(fields: Mapping[str, str], known: Iterable[str], field: str = "data.fields") -> None:
    """ValueError for a mapping of a name that no record of the stage has, with the nearest: it would be without effect."""
    known = list(known)
    for name, there in fields.items():
        if name not in known:
            # The two are easily exchanged: {name in the file: standard name}.
            turned = there in known and difflib.get_close_matches(name, known, n=1, cutoff=0.7) == []
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            hint = f"write {{{there!r}: {name!r}}}" if turned else f"the nearest is {nearest!r}"
            raise ValueError(
                f"{field} maps {name!r}, which is none of the records' standard names ({', '.join(known)}); {hint}."
            )


def required_field(record: Record, name: str, fields: Mapping[str, str], kind: type[T]) -> T:
    """The value of the standard field `name`, under the name that `fields` maps it to.

    A mapped name is a field's, a path of names and list indices ("instances.0.output"), or a text with paths in braces
    ("{instruction} {instances.0.input}"). Raises ValueError naming file and line where a field is missing, with the
    fields there are and the nearest, or of another type.
    """
    key = fields.get(name, name)
    if key in record.fields or "{" not in key:
        return _typed(record, key, kind)
    return _checked(record, key, _format(record, key), kind)


def present_field(record: Record, names: Iterable[str], fields: Mapping[str, str]) -> str | None:
    """Which of the alternative standard names the record goes by: the first that is mapped, else the first it has."""
    names = list(names)
    return next((n for n in names if n in fields), None) or next((n for n in names if n in record.fields), None)


def _typed(record: Record, key: str, kind: Any) -> Any:
    return _checked(record, key, record.fields[key] if key in record.fields else _follow(record, key), kind)


def _checked(record: Record, key: str, value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        wanted = kind[0] if isinstance(kind, tuple) else kind
        raise ValueError(
            f"{record.path}, line {record.line}: the field {key!r} must be {wanted.__name__}, not {type(value).__name__}."
        )
    return value


def _format(record: Record, template: str) -> str:
    """The text with the values of the paths in its braces ({{ and }} stand for braces); numbers are written out."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"data.fields: {template!r} cannot be read ({error}).") from error
    if any(spec or conversion for _, _, spec, conversion in parts):
        raise ValueError(f"data.fields: {template!r} may have only names of fields in its braces.")
    return "".join(
        literal + ("" if key is None else str(_typed(record, key, (str, int, float)))) for literal, key, _, _ in parts
    )


def _follow(record: Record, path: str) -> Any:
    """The value at a dotted path of names and list indices."""
    value: Any = record.fields
    seen = ""
    for step in path.split("."):
        where = f"{record.path}, line {record.line}"
        if isinstance(value, list) and re.fullmatch(r"-?\d+", step) and -len(value) <= int(step) < len(value):
            value = value[int(step)]
        elif isinstance(value, list):
            raise ValueError(f"{where}: {seen[:-1]!r} is a list of {len(value)}, and {step!r} is no index of it.")
        elif not isinstance(value, dict):
            raise ValueError(f"{where}: {seen[:-1]!r} is of type {type(value).__name__} and has no field {step!r}.")
        elif step not in value:
            there = ", ".join(seen + key for key in value) or "none"
            close = difflib.get_close_matches(step, value, n=1)
            nearest = f"; the nearest is {seen + close[0]!r}" if close else ""
            raise ValueError(
                f"{where}: no field {seen + step!r} (there are: {there}){nearest}; data.fields can map it."
            )
        else:
            value = value[step]
        seen += f"{step}."
    return value


def read_texts(path: str, *, fields: Mapping[str, str], text_separator: str | None) -> Iterator[Document]:
    """The documents of a file: its "text" fields, or for .txt the whole file or its parts between text_separator.

    Parts that are empty or white space are left out. A line end in text_separator is one of Windows, too. Raises ValueError
    as `read_records`, and where nothing is left.
    """
    count = 0
    if path.endswith(".txt"):
        documents = _read_txt(path, text_separator)
    else:
        documents = (Document(required_field(r, "text", fields, str), r.path, r.line) for r in read_records(path))
    for document in documents:
        if document.text.strip():
            count += 1
            yield document
    if not count:
        raise ValueError(f"{path} is empty: it has no text.")


def _read_txt(path: str, separator: str | None) -> Iterator[Document]:
    with open(path, "rb") as file:
        raw = file.read()
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not valid UTF-8 (byte {error.start} of the file).") from error
    ends = re.escape(separator or "").replace(re.escape("\n"), "\r?\n")
    line = 1
    for part in re.split(ends, text) if separator else [text]:
        yield Document(part, path, line)
        line += part.count("\n") + (separator or "").count("\n")


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out side: its content's hash, as a number in [0, 1), is below fraction."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < fraction * 2**64
