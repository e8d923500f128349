"""Where each parameter is in a checkpoint of transformers: one table per family, read in both directions.

Axes are those of jaxgpt/types.py, besides P (positions), O (one output) and C (the parts that GPT-2 keeps in one tensor).
"(N H)" is one axis of the stored tensor that holds both. Since a row-major array may be seen with such an axis split, a
part of a parameter is a part of the stored tensor, transposed: nothing else needs to be read.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxgpt.models.config import ModelConfig
from jaxgpt.runs.weights import StoredTensor


class Stored(NamedTuple):
    """name: of the tensor; {} is the number of the layer. axes: its layout. part: which one along C."""

    name: str
    axes: str
    part: int = 0


# Layouts of our parameters, a layer's without the leading L.
OURS = {
    "embedder/embedding": "V D", "positions/embedding": "P D", "final_norm/scale": "D", "final_norm/bias": "D",
    "head/kernel": "D V", "layers/query/kernel": "D N H", "layers/key/kernel": "D K H", "layers/value/kernel": "D K H",
    "layers/query/bias": "N H", "layers/key/bias": "K H", "layers/value/bias": "K H", "layers/out/kernel": "N H D",
    "layers/out/bias": "D", "layers/query_norm/scale": "H", "layers/key_norm/scale": "H", "layers/mlp/gate/kernel": "D F",
    "layers/mlp/up/kernel": "D F", "layers/mlp/down/kernel": "F D", "layers/mlp/gate/bias": "F",
    "layers/mlp/up/bias": "F", "layers/mlp/down/bias": "D", "layers/attention_norm/scale": "D",
    "layers/attention_norm/bias": "D", "layers/mlp_norm/scale": "D", "layers/mlp_norm/bias": "D",
    "layers/attention_post_norm/scale": "D", "layers/mlp_post_norm/scale": "D",
}  # fmt: skip

_GPT2 = {
    "embedder/embedding": Stored("transformer.wte.weight", "V D"),
    "positions/embedding": Stored("transformer.wpe.weight", "P D"),
    "final_norm/scale": Stored("transformer.ln_f.weight", "D"),
    "final_norm/bias": Stored("transformer.ln_f.bias", "D"),
    "head/kernel": Stored("lm_head.weight", "V D"),
    "layers/attention_norm/scale": Stored("transformer.h.{}.ln_1.weight", "D"),
    "layers/attention_norm/bias": Stored("transformer.h.{}.ln_1.bias", "D"),
    "layers/query/kernel": Stored("transformer.h.{}.attn.c_attn.weight", "D (C N H)", 0),
    "layers/key/kernel": Stored("transformer.h.{}.attn.c_attn.weight", "D (C K H)", 1),
    "layers/value/kernel": Stored("transformer.h.{}.attn.c_attn.weight", "D (C K H)", 2),
    "layers/query/bias": Stored("transformer.h.{}.attn.c_attn.bias", "(C N H)", 0),
    "layers/key/bias": Stored("transformer.h.{}.attn.c_attn.bias", "(C K H)", 1),
    "layers/value/bias": Stored("transformer.h.{}.attn.c_attn.bias", "(C K H)", 2),
    "layers/out/kernel": Stored("transformer.h.{}.attn.c_proj.weight", "(N H) D"),
    "layers/out/bias": Stored("transformer.h.{}.attn.c_proj.bias", "D"),
    "layers/mlp_norm/scale": Stored("transformer.h.{}.ln_2.weight", "D"),
    "layers/mlp_norm/bias": Stored("transformer.h.{}.ln_2.bias", "D"),
    "layers/mlp/up/kernel": Stored("transformer.h.{}.mlp.c_fc.weight", "D F"),
    "layers/mlp/up/bias": Stored("transformer.h.{}.mlp.c_fc.bias", "F"),
    "layers/mlp/down/kernel": Stored("transformer.h.{}.mlp.c_proj.weight", "F D"),
    "layers/mlp/down/bias": Stored("transformer.h.{}.mlp.c_proj.bias", "D"),
}
_LLAMA = {
    "embedder/embedding": Stored("model.embed_tokens.weight", "V D"),
    "final_norm/scale": Stored("model.norm.weight", "D"),
    "head/kernel": Stored("lm_head.weight", "V D"),
    "layers/attention_norm/scale": Stored("model.layers.{}.input_layernorm.weight", "D"),
    "layers/query/kernel": Stored("model.layers.{}.self_attn.q_proj.weight", "(N H) D"),
    "layers/key/kernel": Stored("model.layers.{}.self_attn.k_proj.weight", "(K H) D"),
    "layers/value/kernel": Stored("model.layers.{}.self_attn.v_proj.weight", "(K H) D"),
    "layers/out/kernel": Stored("model.layers.{}.self_attn.o_proj.weight", "D (N H)"),
    "layers/query/bias": Stored("model.layers.{}.self_attn.q_proj.bias", "(N H)"),
    "layers/key/bias": Stored("model.layers.{}.self_attn.k_proj.bias", "(K H)"),
    "layers/value/bias": Stored("model.layers.{}.self_attn.v_proj.bias", "(K H)"),
    "layers/out/bias": Stored("model.layers.{}.self_attn.o_proj.bias", "D"),
    "layers/query_norm/scale": Stored("model.layers.{}.self_attn.q_norm.weight", "H"),
    "layers/key_norm/scale": Stored("model.layers.{}.self_attn.k_norm.weight", "H"),
    "layers/mlp_norm/scale": Stored("model.layers.{}.post_attention_layernorm.weight", "D"),
    "layers/mlp/gate/kernel": Stored("model.layers.{}.mlp.gate_proj.weight", "F D"),
    "layers/mlp/up/kernel": Stored("model.layers.{}.mlp.up_proj.weight", "F D"),
    "layers/mlp/down/kernel": Stored("model.layers.{}.mlp.down_proj.weight", "D F"),
    "layers/mlp/gate/bias": Stored("model.layers.{}.mlp.gate_proj.bias", "F"),
    "layers/mlp/up/bias": Stored("model.layers.{}.mlp.up_proj.bias", "F"),
    "layers/mlp/down/bias": Stored("model.layers.{}.mlp.down_proj.bias", "D"),
}
_GEMMA2 = _LLAMA | {
    "layers/attention_post_norm/scale": Stored("model.layers.{}.post_attention_layernorm.weight", "D"),
    "layers/mlp_norm/scale": Stored("model.layers.{}.pre_feedforward_layernorm.weight", "D"),
    "layers/mlp_post_norm/scale": Stored("model.layers.{}.post_feedforward_layernorm.weight", "D"),
}
TABLES = {"gpt2": _GPT2, "llama": _LLAMA, "mistral": _LLAMA, "qwen3": _LLAMA, "gemma": _LLAMA, "gemma2": _GEMMA2}
BASE_PREFIXES = ("transformer.", "model.")  # which checkpoints of a bare trunk leave out
_SCORE = Stored("score.weight", "O D")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Parameters of one model of a family: their layouts, ours and stored, and the sizes of the axes."""

    family: str
    config: ModelConfig

    def stored(self, path: str) -> Stored:
        """Where the parameter of this path is."""
        if path == "head/kernel" and self.config.head == "scalar":
            return _SCORE
        return TABLES[self.family][path]

    def ours(self, path: str) -> str:
        """The axes of a parameter, without L."""
        return "D O" if path == "head/kernel" and self.config.head == "scalar" else OURS[path]

    def stored_shape(self, axes: str) -> tuple[int, ...]:
        """The shape of a stored tensor with these axes."""
        groups = axes.replace("(", " ( ").replace(")", " ) ").split()
        shape, inside = [], False
        for group in groups:
            if group in "()":
                inside = group == "("
                shape += [1] * inside
            elif inside:
                shape[-1] *= self.sizes()[group]
            else:
                shape.append(self.sizes()[group])
        return tuple(shape)

    def sizes(self) -> dict[str, int]:
        """The size of each axis."""
        cfg = self.config
        return {
            "V": cfg.vocab_size, "D": cfg.embed_dim, "N": cfg.num_heads, "K": cfg.num_kv_heads, "H": cfg.head_dim,
            "F": cfg.mlp_dim, "P": cfg.max_seq_length, "C": 3, "O": 1,
        }  # fmt: skip

    def read(self, path: str, tensor: StoredTensor, index: tuple[slice, ...]) -> np.ndarray:
        """The part of one parameter (of one layer) that `index` selects, read from where it is stored."""
        where, ours = self.stored(path), self.ours(path).split()
        letters = _letters(where.axes)
        split = dataclasses.replace(tensor, shape=tuple(self.sizes()[letter] for letter in letters))
        wanted: Mapping[str, slice | int] = dict(zip(ours, index, strict=True)) | {"C": where.part}
        array = split.read(tuple(wanted[letter] for letter in letters))
        rest = [letter for letter in letters if letter != "C"]
        return array.transpose([rest.index(letter) for letter in ours])

    def write(self, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        """The stored tensor that holds these parameters (of one layer), by path: one, or all along C in their order."""
        ordered = sorted(parts, key=lambda path: self.stored(path).part)
        where = self.stored(ordered[0])
        letters = _letters(where.axes)
        arrays = []
        for path in ordered:
            ours, rest = self.ours(path).split(), [x for x in _letters(self.stored(path).axes) if x != "C"]
            arrays.append(np.asarray(parts[path]).transpose([ours.index(letter) for letter in rest]))
        array = np.stack(arrays, letters.index("C")) if "C" in letters else arrays[0]
        return array.reshape(self.stored_shape(where.axes))


def _letters(axes: str) -> list[str]:
    return axes.replace("(", "").replace(")", "").split()
