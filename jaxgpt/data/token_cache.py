"""Tokens on disk: each source is tokenized once, into flat files that are mapped into memory.

An entry is a folder named by the digest of everything that decides its content: the files' bytes, the tokenizer, and
the fields of `data` that matter. It appears by one rename, so that a killed run leaves none half written, and of
several processes that write the same entry the first wins.
"""

import array
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from jaxgpt.data.config import DataConfig
from jaxgpt.data.sources import Document, content_digest, is_held_out, read_texts
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.json_object import read_object

Split = Literal["train", "held_out", "all"]

FORMAT = 4  # part of every key: another layout of the files, or other rules of splitting, is another entry
ABANDONED_SECONDS = 24 * 3600
ENCODE_CHARACTERS = 1 << 20  # texts are encoded together up to this length


@dataclasses.dataclass(frozen=True)
class TokenizedSource:
    """The tokens of one source, split already made, as they lie on disk.

    key: digest of all that decides the content. num_bytes: UTF-8 bytes of the text. dtype: of the tokens.
    notes: what else was counted while tokenizing, e.g. {"truncated": 3}.
    """

    path: str
    key: str
    dtype: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    notes: dict[str, int] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """All tokens, mapped into memory: u16 where the vocabulary fits, else u32."""
        return map_file(Path(self.path) / "tokens.bin", self.dtype, self.num_tokens)

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """i64 [documents + 1], mapped into memory: document d is tokens[offsets[d] : offsets[d + 1]], never empty."""
        return map_file(Path(self.path) / "offsets.bin", "int64", self.num_documents + 1)

    @functools.cached_property
    def trained(self) -> np.ndarray | None:
        """bool, for each token whether it is a target to learn; None where all are."""
        file = Path(self.path) / "trained.bin"
        return map_file(file, "bool", self.num_tokens) if file.exists() else None

    def __getstate__(self) -> dict:
        # Worker processes map the files themselves; pickling a mapped array would send its content.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def tokenize_source(
    paths: Sequence[str], tokenizer: Tokenizer, config: DataConfig, split: Split, cache_dir: str | os.PathLike
) -> TokenizedSource:
    """The tokens of one side of the held-out split of some files, from the cache or tokenized now.

    A document is [BOS if config.add_bos] + tokens + [EOS]; one without text is left out. Under
    `holdout.by == "position"` each file is cut at int(characters * (1 - fraction)), and what is left of its documents
    gets neither BOS nor EOS.

    Args:
      paths: files, in the order in which their documents shall lie.
      split: the side; `all` does not split.
      cache_dir: created where missing. Processes on several hosts may share it.

    Raises:
      ValueError: where no document is on this side, or the cache entry is damaged.
    """
    by_position = config.holdout.by == "position"
    recipe = {
        "text_separator": config.text_separator,
        "special": "none" if by_position else "bos_eos" if config.add_bos else "eos",
        "split": split if split == "all" else [split, config.holdout.by, config.holdout.fraction],
    }
    documents = _split_documents(paths, config, split)
    return cached_source(
        cache_dir, paths, tokenizer, config, recipe,
        lambda folder: _write(folder, documents, tokenizer, config, split, paths),
    )  # fmt: skip


def cached_source(
    cache_dir: str | os.PathLike,
    paths: Sequence[str],
    tokenizer: Tokenizer,
    config: DataConfig,
    recipe: dict,
    write: Callable[[Path], None],
) -> TokenizedSource:
    """The entry that the files' content, the tokenizer, data.fields and `recipe` name; `write` fills it where missing.

    write: leaves tokens.bin, offsets.bin and meta.json (see `write_meta`) in the folder it is given.
    """
    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    recipe = recipe | {
        "format": FORMAT,
        "files": file_digests(paths, cache_dir),
        "tokenizer": tokenizer.digest,
        "fields": config.fields,
    }
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    entry = cache_dir / key[:32]
    source = _read_entry(entry, key)
    if source is None:
        _publish(entry, write)
        source = _read_entry(entry, key)
    if source is None:
        raise ValueError(f"{entry} cannot be read again after it was written; is the disk of data.cache_dir whole?")
    return source


def _read_entry(entry: Path, key: str) -> TokenizedSource | None:
    """The entry; None where there is none, or it is damaged, which is said: it is then removed, to be made anew."""
    if not entry.exists():
        return None
    try:
        source = TokenizedSource(path=str(entry), key=key, **read_object(str(entry / "meta.json")))
        for array in (source.tokens, source.offsets, source.trained):
            del array  # mapped, which looks at the files' sizes
        if source.num_documents < 1 or source.num_bytes < 0:
            raise ValueError(f"{entry / 'meta.json'} has counts that cannot be.")
    except (ValueError, TypeError, FileNotFoundError) as error:
        said = str(error).rstrip(".") if isinstance(error, ValueError) else "a part of it is missing"
        tqdm.write(f"{entry} in the token cache is damaged and is made anew: {said}.")
        shutil.rmtree(entry, ignore_errors=True)
        return None
    return source


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The smallest dtype that holds every id."""
    return np.dtype("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32")


def write_meta(folder: Path, dtype: np.dtype, offsets: array.array, num_bytes: int, notes: dict[str, int]) -> None:
    """offsets.bin and meta.json of an entry whose tokens are written."""
    (folder / "offsets.bin").write_bytes(offsets.tobytes())
    meta = {"dtype": dtype.name, "num_tokens": offsets[-1], "num_documents": len(offsets) - 1, "num_bytes": num_bytes}
    (folder / "meta.json").write_text(json.dumps(meta | {"notes": notes}))


def file_digests(paths: Sequence[str], cache_dir: Path) -> list[str]:
    """The content digest of each file, read again only where its size or time of change differs from the last time."""
    _remove_abandoned(cache_dir)
    memory = cache_dir / "file_digests.json"
    known = _known_digests(memory)
    digests = []
    for path in paths:
        stat = os.stat(path)
        identity = f"{os.path.abspath(path)}:{stat.st_size}:{stat.st_mtime_ns}"
        if identity not in known:
            known[identity] = content_digest([path])
        digests.append(known[identity])
    temporary = _temporary(memory)
    temporary.write_text(json.dumps(known))
    temporary.replace(memory)
    return digests


def _known_digests(memory: Path) -> dict[str, str]:
    """What is remembered of files; nothing, which is said, where that is damaged."""
    if not memory.exists():
        return {}
    try:
        known = read_object(str(memory))
    except ValueError as error:
        tqdm.write(f"The digests of files are made anew: {error}")
        return {}
    return {name: digest for name, digest in known.items() if isinstance(digest, str)}


def _split_documents(paths: Sequence[str], config: DataConfig, split: Split) -> Iterator[str]:
    """The texts of one side."""
    holdout = config.holdout
    for path in paths:
        read = functools.partial(read_texts, path, fields=config.fields, text_separator=config.text_separator)
        if split == "all":
            texts: Iterator[str] = (document.text for document in read())
        elif holdout.by == "position":
            texts = _split_by_position(read, holdout.fraction, split)
        else:
            side = split == "held_out"
            texts = (d.text for d in read() if is_held_out(d.text, holdout.fraction) == side)
        yield from texts


def _split_by_position(read: Callable[[], Iterable[Document]], fraction: float, split: Split) -> Iterator[str]:
    # Read twice: the place of the cut is known only when the length of the file is.
    cut = int(sum(len(document.text) for document in read()) * (1 - fraction))
    for document in read():
        yield document.text[:cut] if split == "train" else document.text[cut:]
        cut = max(0, cut - len(document.text))


def _publish(entry: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a temporary folder, then give it the name `entry` unless another process was faster."""
    folder = _temporary(entry)
    folder.mkdir()
    try:
        write(folder)
        folder.rename(entry)
    except OSError:
        if not entry.exists():
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _temporary(path: Path) -> Path:
    """A name beside `path` that no other process writes to, and that says whose it is."""
    return path.with_name(f"{path.name}.{_place()}.{os.getpid()}.{uuid.uuid4().hex}.tmp")


def _place() -> str:
    """Where process numbers are those seen here: the host, and on Linux its namespace, since containers may share a name."""
    try:
        return f"{socket.gethostname()}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def _remove_abandoned(cache_dir: Path) -> None:
    """Remove what killed runs were writing: those of this host that are gone, those from elsewhere after a day."""
    for left in cache_dir.glob("*.tmp"):
        owner, pid, *_ = left.name.rsplit(".", 3)
        is_here = owner.endswith(f".{_place()}") and pid.isdecimal()
        with contextlib.suppress(FileNotFoundError):  # another process may be removing it
            if _is_gone(int(pid)) if is_here else time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _write(
    folder: Path, texts: Iterator[str], tokenizer: Tokenizer, config: DataConfig, split: Split, paths: Sequence[str]
) -> None:
    dtype = token_dtype(tokenizer)
    by_position = config.holdout.by == "position"
    before = [tokenizer.bos_id] if config.add_bos and not by_position and tokenizer.bos_id is not None else []
    after = [] if by_position else [tokenizer.eos_id]
    offsets = array.array("q", [0])
    num_bytes = 0
    progress = tqdm(
        desc=f"tokenize ({split})", total=_text_bytes(paths, config, split), unit="B", unit_scale=True, delay=2
    )
    with open(folder / "tokens.bin", "wb") as file, progress:
        for batch in _batches(texts):
            for tokens in tokenizer.encode_batch(batch):
                if len(tokens):
                    document = np.concatenate([before, tokens, after]).astype(dtype)
                    file.write(document.tobytes())
                    offsets.append(offsets[-1] + len(document))
            batch_bytes = sum(len(text.encode()) for text in batch)
            num_bytes += batch_bytes
            progress.update(batch_bytes)
    if len(offsets) == 1:
        raise ValueError(_no_documents(paths, config, split))
    write_meta(folder, dtype, offsets, num_bytes, {})


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= ENCODE_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _text_bytes(paths: Sequence[str], config: DataConfig, split: Split) -> float | None:
    """About how much text there is, for the progress bar; None where the files are not plain text."""
    if not all(path.endswith((".txt", ".jsonl")) for path in paths):
        return None
    fraction = {"all": 1, "train": 1 - config.holdout.fraction, "held_out": config.holdout.fraction}[split]
    return fraction * sum(os.path.getsize(path) for path in paths)


def _no_documents(paths: Sequence[str], config: DataConfig, split: Split) -> str:
    files = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    holdout = config.holdout
    hint = 'for a corpus of one or a few long documents set data.holdout.by="position"'
    if holdout.by == "position":
        hint = "set data.eval, or another fraction"
    return (
        f"data.holdout.fraction={holdout.fraction} with data.holdout.by={holdout.by!r} leaves no document on the "
        f"{split.replace('_', '-')} side of {files}; {hint}."
    )


def map_file(path: Path, dtype: str, length: int) -> np.ndarray:
    """A flat file of an entry, mapped into memory; ValueError where it is not of that length."""
    expected = length * np.dtype(dtype).itemsize
    if path.stat().st_size != expected:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes where {expected} are expected; remove the folder {path.parent} "
            "(data.cache_dir) to tokenize again."
        )
    return np.asarray(np.memmap(path, dtype, mode="r", shape=(length,)))
