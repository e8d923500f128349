"""Checkpoints of Hugging Face transformers: safetensors, config and tokenizer, read and written tensor by tensor."""

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from jaxgpt import partition, tree
from jaxgpt.config import to_dict
from jaxgpt.data.chat import ChatTemplate
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.interop import tokenizer as interop_tokenizer
from jaxgpt.interop.families import config_from_hf, config_to_hf
from jaxgpt.interop.names import BASE_PREFIXES, TABLES, Layout
from jaxgpt.json_object import read_object
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig
from jaxgpt.runs import manifest as manifests
from jaxgpt.runs import workdir as workdirs
from jaxgpt.runs.artifact import digests
from jaxgpt.runs.load import abstract_params
from jaxgpt.runs.weights import StoredTensor, open_weights, write_weights
from jaxgpt.types import Params

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16),
}  # fmt: skip
MAX_FILE_BYTES = 5_000_000_000  # of a file of weights, as on the hub
# Buffers that older releases kept among the weights.
_NO_PARAMETER = re.compile(r"attn\.(masked_)?bias|.*\.attn\.(masked_)?bias|.*rotary_emb\.inv_freq")
_HEAD = "lm_head.weight"
_COMPARED = 1 << 24  # numbers of two tensors that are compared at a time
# Ours has a bias, a classifier of transformers has none: see `export_checkpoint`.
_NOT_STORED = "head/bias"


class _Source:
    """A folder's config, and its tensors under the paths of our parameters.

    is_untied: whether config.json ties the head to the embedding, but the head that is stored is another one. It is the one
    that counts then, as in transformers 5, and `config` says so.
    """

    def __init__(self, folder: str):
        self.values = read_config(folder)
        try:
            self.config = config_from_hf(self.values)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        self._folder, self._stored = folder, open_weights(folder)
        self.is_untied = self.config.tie_embeddings and self.config.head == "lm" and not self._is_head_the_embedding()
        if self.is_untied:
            self.config = dataclasses.replace(self.config, tie_embeddings=False)
        self.layout = Layout(self.values["model_type"], self.config)
        boxed = jax.eval_shape(functools.partial(decoder.init_params, self.config), jax.random.key(0))
        self.abstract = tree.named_leaves(partition.unbox(boxed))
        self._tensors = {path: self._find(path) for path in self.abstract if path != _NOT_STORED}
        self._check_rest()

    def read(self, path: str, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
        """The part of a parameter that `index` selects; only that part of the files is read, a layer at a time."""
        shape = self.abstract[path].shape
        if path == _NOT_STORED:
            return np.zeros(shape, dtype)[index]
        if not path.startswith("layers/"):
            return self.layout.read(path, self._tensors[path][0], index).astype(dtype)
        layers = range(*index[0].indices(shape[0]))
        rest = [len(range(*part.indices(size))) for part, size in zip(index[1:], shape[1:], strict=True)]
        out = np.empty((len(layers), *rest), dtype)
        for place, layer in enumerate(layers):
            out[place] = self.layout.read(path, self._tensors[path][layer], index[1:])
        return out

    def read_whole(self, path: str, dtype: Any) -> np.ndarray:
        """A parameter, of all layers."""
        return self.read(path, (slice(None),) * len(self.abstract[path].shape), dtype)

    def stored_dtype(self, path: str) -> np.dtype:
        """The dtype in which a parameter is stored."""
        return np.dtype(np.float32) if path == _NOT_STORED else self._tensors[path][0].dtype

    def _find(self, path: str) -> list[StoredTensor]:
        """The tensor of each layer, or the one tensor; ValueError where one is missing or has another shape."""
        where = self.layout.stored(path)
        expected = self.layout.stored_shape(where.axes)
        found = []
        for layer in range(self.config.num_layers if "{}" in where.name else 1):
            name = self._name(where.name.format(layer))
            if name not in self._stored:
                raise ValueError(f"{self._folder} has no tensor {name}, which its config.json asks for.")
            if self._stored[name].shape != expected:
                raise ValueError(
                    f"{self._folder}: {name} has the shape {self._stored[name].shape}, but by config.json it is {expected}."
                )
            found.append(self._stored[name])
        return found

    def _is_head_the_embedding(self) -> bool:
        """Whether there is no head beside the embedding, or one with the same numbers."""
        head = self._stored.get(_HEAD)
        embedding = self._stored.get(self._name(TABLES[self.values["model_type"]]["embedder/embedding"].name))
        if head is None or embedding is None:  # a missing embedding is refused where it is looked for
            return True
        if head.shape != embedding.shape:
            return False
        rows = max(1, _COMPARED // math.prod(head.shape[1:]))
        blocks = (slice(begin, begin + rows) for begin in range(0, head.shape[0], rows))
        return all(np.array_equal(head.read(b), embedding.read(b), equal_nan=True) for b in blocks)

    def _name(self, name: str) -> str:
        if name in self._stored:
            return name
        bare = next((name.removeprefix(p) for p in BASE_PREFIXES if name.startswith(p)), name)
        return bare if bare in self._stored else name

    def _check_rest(self) -> None:
        """ValueError naming a tensor that is no parameter of the model."""
        used = {
            self._name(self.layout.stored(path).name.format(layer))
            for path, tensors in self._tensors.items()
            for layer in range(len(tensors))
        }
        tied = {_HEAD} if self.config.tie_embeddings or self.config.head == "scalar" else set()
        rest = [name for name in self._stored.keys() - used - tied if not _NO_PARAMETER.fullmatch(name)]
        if rest:
            raise ValueError(
                f"{self._folder}: the tensor {min(rest)} is no parameter of the model of its config.json "
                f"(model_type={self.values['model_type']!r})."
            )


def read_config(folder: str) -> dict[str, Any]:
    """config.json of a checkpoint; ValueError where it is missing or not JSON."""
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise ValueError(f"{folder} is not a checkpoint of transformers: it has no config.json.")
    return read_object(path)


def load_hf(folder: str, mesh: Mesh, dtype: Any = np.float32) -> tuple[ModelConfig, Params]:
    """A checkpoint of transformers on a mesh: its ModelConfig and parameters in their shardings.

    Every device's part of every parameter is read by itself, so that no more than one such part is in host memory. Where
    config.json ties the head to the embedding but the files hold another lm_head.weight, the model is an untied one.

    Raises:
      ValueError: naming the file, option or tensor, for a damaged file, a foreign architecture, or what does not fit it.
    """
    source = _Source(folder)

    def put(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: source.read(path, index or (), dtype)
        )

    leaves = tree.named_leaves(abstract_params(source.config, mesh))
    return source.config, tree.from_named({path: put(path, leaf) for path, leaf in leaves.items()})


def import_checkpoint(folder: str, out: str, dtype: Dtype | Literal["auto"] = "auto") -> dict[str, Any]:
    """Write a checkpoint of transformers as an artifact, which `init_from` takes; returns its manifest.

    One parameter (of all layers) at a time is in memory. The score of a classifier with one label becomes the scalar head
    of a reward model, its bias 0. The manifest says `untied` where the files hold another head than config.json's tied one.

    Args:
      folder: of the checkpoint, with its tokenizer.
      out: exists.
      dtype: of the artifact's weights; auto keeps what is stored.

    Raises:
      ValueError: as `load_hf`, or if the tokenizer or the chat template cannot be used.
    """
    source = _Source(folder)
    tokenizer, template = interop_tokenizer.read_tokenizer(folder), interop_tokenizer.read_template(folder)
    if tokenizer.vocab_size > source.config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, but vocab_size is {source.config.vocab_size}."
        )
    dtype_of = lambda path: source.stored_dtype(path) if dtype == "auto" else DTYPES[dtype]
    tensors = {p: jax.ShapeDtypeStruct(leaf.shape, dtype_of(p)) for p, leaf in source.abstract.items()}
    write_weights(out, tensors, lambda path: source.read_whole(path, dtype_of(path)))
    made_from = {"source": os.path.abspath(folder), "family": source.values["model_type"], "dtype": dtype}
    return _write_artifact(out, source, made_from, tokenizer, template)


def _write_artifact(
    out: str, source: _Source, made_from: dict[str, str], tokenizer: Tokenizer, template: ChatTemplate | None
) -> dict[str, Any]:
    """All but the weights; the manifest, which says that the artifact is whole, comes last."""
    tokenizer.save(out)
    if template is not None:
        template.save(out)
    workdirs.write_config(out, {"model": to_dict(source.config)})
    shift = {"reward_shift": float(source.values.get("reward_shift", 0.0))} if source.config.head == "scalar" else {}
    manifest = manifests.base_manifest(
        stage="import", tokenizer_digest=tokenizer.digest, special_ids=tokenizer.special_ids,
        chat_template_digest=template.digest if template is not None else None, vocab_size=tokenizer.vocab_size,
        files=digests(out), parents={}, final_metrics={},
        **made_from, **shift, **({"untied": True} if source.is_untied else {}),
    )  # fmt: skip
    manifests.write_manifest(out, manifest)
    return manifest


def export_checkpoint(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    folder: str,
    dtype: Dtype = "float32",
    *,
    reward_shift: float = 0.0,
    notes: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint that AutoTokenizer and AutoModelForCausalLM open; one tensor at a time is in host memory.

    A reward model becomes a classifier with one label. Those have no bias, so ours goes into `reward_shift` of config.json:
    a reward is the label's logit minus that shift, and the order of rewards is that of the logits. transformers reads the
    logit at the last token that is not padding.

    Args:
      config: without adapters.
      params: plain arrays, on devices or on the host.
      tokenizer: becomes tokenizer.json; see jaxgpt/interop/tokenizer.py.
      template: becomes chat_template.jinja.
      folder: exists.
      dtype: of the weights.
      reward_shift: what the manifest of a reward model says is taken off its rewards.
      notes: further entries of config.json, which transformers ignores.

    Raises:
      ValueError: naming the field or the kind of tokenizer that transformers has no counterpart for.
    """
    values = config_to_hf(config)
    layout, named = Layout(values["model_type"], config), tree.named_leaves(params)
    if config.head == "scalar":
        if tokenizer.pad_id == tokenizer.eos_id:
            raise ValueError("A reward model needs a padding token other than EOS: transformers finds the end by it.")
        values["reward_shift"] = reward_shift - float(named[_NOT_STORED][0])
    values |= interop_tokenizer.write_tokenizer(tokenizer, template, folder, config.max_seq_length)
    values |= {"torch_dtype": dtype, **(notes or {})}
    tensors, read = _stored_tensors(layout, named, DTYPES[dtype])
    write_weights(folder, tensors, read, max_file_bytes=MAX_FILE_BYTES)
    workdirs.write_atomic(os.path.join(folder, "config.json"), json.dumps(values, indent=2) + "\n")


def _stored_tensors(
    layout: Layout, named: dict[str, Any], dtype: np.dtype
) -> tuple[dict[str, jax.ShapeDtypeStruct], Callable[[str], np.ndarray]]:
    """The tensors to write, by name, and what makes one of them."""
    sources: dict[str, tuple[int, list[str]]] = {}  # name -> the layer, and the parameters it holds
    tensors = {}
    for path in named.keys() - {_NOT_STORED}:
        where = layout.stored(path)
        for layer in range(layout.config.num_layers if "{}" in where.name else 1):
            name = where.name.format(layer)
            sources.setdefault(name, (layer, []))[1].append(path)
            tensors[name] = jax.ShapeDtypeStruct(layout.stored_shape(where.axes), dtype)

    def read(name: str) -> np.ndarray:
        layer, paths = sources[name]
        host = lambda path: jax.device_get(named[path][layer] if path.startswith("layers/") else named[path])
        return layout.write({path: host(path) for path in paths}).astype(dtype)

    return tensors, read
