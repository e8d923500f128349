"""Tensors in files of the safetensors format, read and written one at a time.

A file is the length of its header (u64, little-endian), the header (JSON: name -> dtype, shape, begin and end of the data),
and the data. Large models are several files and `model.safetensors.index.json`, which says where each tensor is. Reading
maps files into memory and copies only the part that is asked for, so that a sharded load never holds a whole model.

Source: the format's description, https://huggingface.co/docs/safetensors.
"""

import dataclasses
import json
import math
import operator
import os
import struct
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxgpt.json_object import parse_object, read_object

DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # as in the reference implementation


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file. start: of its data, in bytes from the beginning of the file."""

    path: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    def read(self, index: Any = ...) -> np.ndarray:
        """The tensor, or the part of it that numpy's `index` selects, copied out of the file."""
        if not math.prod(self.shape):
            return np.empty(self.shape, self.dtype)[index]
        return np.array(np.memmap(self.path, self.dtype, "r", self.start, self.shape)[index])

    def put(self, sharding: jax.sharding.Sharding, dtype: Any = None) -> jax.Array:
        """The tensor on devices; each process reads what its own devices hold."""
        read = lambda index: self.read(index).astype(self.dtype if dtype is None else dtype)
        return jax.make_array_from_callback(self.shape, sharding, read)


def open_weights(folder: str) -> dict[str, StoredTensor]:
    """All tensors of a folder by name, none of them read yet.

    Raises:
      ValueError: naming the file, if there are no weights, if a file is missing, cut off or not of this format, or if it lies
        outside the folder, by its name in the index or as a link.
    """
    index = os.path.join(folder, INDEX)
    if not os.path.isfile(index):
        single = os.path.join(folder, SINGLE)
        if not os.path.isfile(single):
            raise ValueError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}.")
        return read_header(_inside(folder, SINGLE))
    try:
        files: dict[str, str] = read_object(_inside(folder, INDEX))["weight_map"]
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise TypeError("weight_map")
        headers = {name: read_header(_inside(folder, name)) for name in sorted(set(files.values()))}
        return {name: headers[file][name] for name, file in files.items()}
    except (AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{index} does not say where the tensors are: {error!r}.") from error


def _inside(folder: str, name: str) -> str:
    """The path of a file of the folder; ValueError where its name, or a link, leads out of it.

    In the cache of the Hugging Face hub, files are links to REPOSITORY/blobs, beside REPOSITORY/snapshots/COMMIT.
    """
    path = os.path.join(folder, name)
    if os.path.basename(name) != name or name in ("", ".", ".."):
        raise ValueError(f"{os.path.join(folder, INDEX)} names the file {name!r}, which is not in the folder itself.")
    root, target = os.path.realpath(folder), os.path.realpath(path)
    snapshots = os.path.dirname(root)
    allowed = [root]
    if os.path.basename(snapshots) == "snapshots":
        allowed.append(os.path.join(os.path.dirname(snapshots), "blobs"))
    if not any(os.path.commonpath([place, target]) == place for place in allowed):
        raise ValueError(f"{path} is a link to {target}, outside of the folder; put the file itself there.")
    return path


def read_header(path: str) -> dict[str, StoredTensor]:
    """The tensors of one file; ValueError if it is missing, cut off or not of this format."""
    if not os.path.isfile(path):
        raise ValueError(f"{path} is missing.")
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"{path} is not a safetensors file, or it is cut off: its header does not fit.")
        header = file.read(length)
    try:
        entries = parse_object(header, f"{path} is damaged: its header cannot be read")
        entries.pop("__metadata__", None)
        found, name = {}, "a tensor"
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            shape = tuple(operator.index(size) for size in entry["shape"])
            tensor = StoredTensor(path, DTYPES[entry["dtype"]], shape, 8 + length + begin)
            if not 0 <= begin <= end or end - begin != math.prod(tensor.shape) * tensor.dtype.itemsize:
                raise ValueError(f"{path} is damaged: the data of {name} have the wrong size.")
            if 8 + length + end > size:
                raise ValueError(f"{path} is cut off: {name} ends at byte {8 + length + end} of {size}.")
            found[name] = tensor
    except (AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: its header cannot be read (the entry of {name}: {error!r}).") from error
    return found


def write_weights(
    folder: str,
    tensors: Mapping[str, jax.ShapeDtypeStruct],
    read: Callable[[str], np.ndarray],
    *,
    max_file_bytes: int = 5_000_000_000,
) -> list[str]:
    """Write tensors in the order of their names, with the index where they are more than one file.

    Args:
      folder: exists.
      tensors: name -> shape and dtype.
      read: the tensor of a name; called once for each, when its turn comes, so that one tensor at a time is in memory.
      max_file_bytes: of data in a file, unless a single tensor has more.

    Returns:
      The names of the files of weights.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name, tensor in sorted(tensors.items()):
        size = _num_bytes(tensor)
        if groups[-1] and filled + size > max_file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    files = (
        [SINGLE]
        if len(groups) == 1
        else [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    )
    for file, names in zip(files, groups, strict=True):
        _write_file(os.path.join(folder, file), {name: tensors[name] for name in names}, read)
    if len(files) > 1:
        where = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        with open(os.path.join(folder, INDEX), "w") as handle:
            total = sum(map(_num_bytes, tensors.values()))
            json.dump({"metadata": {"total_size": total}, "weight_map": where}, handle, indent=2)
    return files


def _num_bytes(tensor: jax.ShapeDtypeStruct) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def _write_file(path: str, tensors: Mapping[str, jax.ShapeDtypeStruct], read: Callable[[str], np.ndarray]) -> None:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # what loaders of the peers look for
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + _num_bytes(tensor)
        dtype = _NAMES[np.dtype(tensor.dtype)]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)  # the data begin at a multiple of 8
    with open(f"{path}.tmp", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name, tensor in tensors.items():
            array = np.asarray(read(name))
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise ValueError(
                    f"{name} is {array.dtype}{list(array.shape)}, not {np.dtype(tensor.dtype)}{list(tensor.shape)}."
                )
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    os.replace(f"{path}.tmp", path)
