"""A finalized or imported model on disk: what must agree before it is trusted, and its parameters, read part by part.

The folder holds config.json, the tokenizer, the chat template, generation.json, safetensors under our parameter names, and
manifest.json, whose `files` has the sha256 of each of them. A quantized tensor NAME has its scales beside it, as NAME:scale.
"""

import functools
import hashlib
import os
from typing import Any

import jax
import numpy as np

from jaxgpt import tree
from jaxgpt.data.chat import ChatTemplate
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.models.config import ModelConfig
from jaxgpt.runs.manifest import read_manifest
from jaxgpt.runs.quantization import dequantize_part
from jaxgpt.runs.weights import INDEX, SINGLE, StoredTensor, open_weights
from jaxgpt.types import Params

SCALE = ":scale"
# What is read of an artifact besides its weights, where it is there.
_SMALL = (
    "config.json", "generation.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
)  # fmt: skip


def is_artifact(folder: str) -> bool:
    """Whether the folder holds weights of its own, and no run's checkpoints."""
    has_weights = any(os.path.isfile(os.path.join(folder, name)) for name in (SINGLE, INDEX))
    return has_weights and not os.path.isdir(os.path.join(folder, "checkpoints"))


def check_identity(
    folder: str, manifest: dict, model: ModelConfig, tokenizer: Tokenizer, template: ChatTemplate | None
) -> None:
    """ValueError where tokenizer, chat template or vocabulary of a folder are not those that its manifest names."""
    pairs = [
        ("tokenizer", manifest.get("tokenizer_digest"), tokenizer.digest),
        ("chat template", manifest.get("chat_template_digest"), template.digest if template is not None else None),
    ]
    for what, named, found in pairs:
        if named != found:
            raise ValueError(
                f"{folder} has the {what} {(found or 'none')[:12]}, but its manifest.json names {(named or 'none')[:12]}; "
                "restore the one it was made with."
            )
    if (manifest.get("vocab_size"), manifest.get("special_ids")) != (tokenizer.vocab_size, tokenizer.special_ids):
        raise ValueError(
            f"{folder} has a tokenizer with a vocabulary of {tokenizer.vocab_size} pieces, but its manifest.json names "
            f"another vocabulary, of {manifest.get('vocab_size')}."
        )
    if model.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"{folder}: model.vocab_size={model.vocab_size} in config.json is smaller than the tokenizer's "
            f"{tokenizer.vocab_size}."
        )


def load_artifact(folder: str, abstract: Params, manifest: dict | None = None) -> Params:
    """The parameters of a folder in the shapes, dtypes and shardings of `abstract`; each process reads its own parts.

    manifest: where it is not yet on disk.

    Raises:
      ValueError: naming what is missing, the file whose sha256 is not the manifest's, or the first tensor in which the
        weights are of another architecture.
    """
    manifest = manifest or read_manifest(folder)
    if manifest is None:
        raise ValueError(f"{folder} has weights but no manifest.json: it was never finished.")
    check_files(folder, manifest)
    tensors = open_weights(folder)
    wanted = tree.named_leaves(abstract)
    _check_tensors(folder, tensors, wanted)
    return tree.from_named(
        {name: _put(tensors[name], tensors.get(name + SCALE), leaf) for name, leaf in wanted.items()}
    )


def digests(folder: str) -> dict[str, str]:
    """The sha256 of every file of an artifact that is ever read, by name: `files` of its manifest."""
    return {name: file_digest(os.path.join(folder, name)) for name in _files(folder)}


def _files(folder: str, *, weights: bool = True) -> list[str]:
    is_weights = lambda name: name.endswith((".safetensors", ".safetensors.index.json"))
    return sorted(name for name in os.listdir(folder) if name in _SMALL or (weights and is_weights(name)))


def file_digest(path: str) -> str:
    """sha256 (hex) of a file, computed once for as long as the file is not written to."""
    status = os.stat(path)
    return _digest_of(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _digest_of(path: str, size: int, modified: int) -> str:
    del size, modified
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(folder: str, manifest: dict, *, weights: bool = True) -> None:
    """ValueError where a file of an artifact is missing, unknown, or has another sha256 than its manifest says.

    weights: whether those are looked at, too.
    """
    if not isinstance(manifest.get("files"), dict):
        raise ValueError(f"{folder}: manifest.json has no digests of the files; make the artifact anew.")
    named, present = manifest["files"], _files(folder, weights=weights)
    for name in sorted({*present, *(name for name in named if weights or name in _SMALL)}):
        path = os.path.join(folder, name)
        if name not in named:
            raise ValueError(f"{path} is not among the files that manifest.json names.")
        if name not in present:
            raise ValueError(f"{path} is missing.")
        found = file_digest(path)
        if found != named[name]:
            raise ValueError(
                f"{path} is damaged, or has been changed: its sha256 is {found[:12]}, and manifest.json names "
                f"{named[name][:12]}."
            )


def _check_tensors(folder: str, tensors: dict[str, StoredTensor], wanted: dict[str, Any]) -> None:
    names = {name.removesuffix(SCALE) for name in tensors}
    for name in sorted(names | wanted.keys()):
        ours, theirs = wanted.get(name), tensors.get(name)
        if ours is None or theirs is None or not _fits(theirs, tensors.get(name + SCALE), ours.shape):
            raise ValueError(
                f"{folder} holds weights of another architecture than its config.json says: {name} is "
                f"{'missing' if theirs is None else f'{theirs.dtype}{list(theirs.shape)}'} in the weights and "
                f"{'missing' if ours is None else list(ours.shape)} in the config."
            )


def _fits(values: StoredTensor, scales: StoredTensor | None, shape: tuple[int, ...]) -> bool:
    """Whether the stored tensor, with its scales, is one of this shape."""
    if scales is None:
        return values.shape == shape and jax.numpy.issubdtype(values.dtype, np.floating)
    if not len(values.shape) == len(scales.shape) == len(shape) or 0 in scales.shape:
        return False
    packed = [n for n, stored in zip(shape, values.shape, strict=True) if n != stored]
    halved = len(packed) == 1 and all(2 * s == n for n, s in zip(shape, values.shape, strict=True) if n != s)
    is_whole = all(n % count == 0 for n, count in zip(shape, scales.shape, strict=True))
    return is_whole and (halved if values.dtype == np.uint8 else values.dtype == np.int8 and not packed)


def _put(values: StoredTensor, scales: StoredTensor | None, leaf: Any) -> jax.Array:
    if scales is None:
        return values.put(leaf.sharding, leaf.dtype)
    read = lambda index: dequantize_part(values, scales, leaf.shape, index).astype(leaf.dtype)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, read)
