"""Parameters as they are stored: cast, or quantized with their scales, one tensor at a time."""

import dataclasses
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np

from jaxgpt.models.config import ModelConfig
from jaxgpt.models.layers import kernel_input_axes
from jaxgpt.runs.artifact import SCALE
from jaxgpt.runs.quantization import INT4_LEVELS, INT8_LEVELS, dequantize, pack_int4, quantize

WeightsDtype = Literal["float32", "bfloat16", "int8", "int4"]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """How the parameters of one model are stored; for a dtype and group size as in FinalizeConfig."""

    model: ModelConfig
    dtype: WeightsDtype
    group_size: int

    def layout(self, name: str, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        """The stored tensors of a parameter; ValueError where the groups do not divide it."""
        block = self._block(name, shape)
        if block is None:
            dtype = ml_dtypes.bfloat16 if self.dtype == "bfloat16" else np.float32
            return {name: jax.ShapeDtypeStruct(shape, dtype)}
        counts = tuple(n // b for n, b in zip(shape, block, strict=True))
        values = jax.ShapeDtypeStruct(shape, np.int8)
        if self.dtype == "int4":
            axis = _group_axis(name, len(shape))
            values = jax.ShapeDtypeStruct(tuple(n // 2 if i == axis else n for i, n in enumerate(shape)), np.uint8)
        return {name: values, name + SCALE: jax.ShapeDtypeStruct(counts, np.float32)}

    def encode(self, name: str, values: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """(the stored tensors of a parameter, f32; what they stand for, f32); ValueError where it is not finite."""
        if not np.isfinite(values).all():
            raise ValueError(f"init_from: {name} holds values that are not finite; such a model cannot be published.")
        block = self._block(name, values.shape)
        if block is None:
            stored = values.astype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else np.float32)
            return {name: stored}, stored.astype(np.float32)
        integers, scales = quantize(values, block, INT4_LEVELS if self.dtype == "int4" else INT8_LEVELS)
        meant = dequantize(integers, scales)
        if self.dtype == "int4":
            integers = pack_int4(integers, _group_axis(name, values.ndim))
        return {name: integers, name + SCALE: scales}, meant

    def _block(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The sizes of the blocks that share a scale; None for what is not quantized."""
        if self.dtype not in ("int8", "int4") or not self._is_linear_map(name):
            return None
        if self.dtype == "int8":
            inputs = _input_axes(name, len(shape))
            return tuple(n if axis in inputs else 1 for axis, n in enumerate(shape))
        axis = _group_axis(name, len(shape))
        size = min(self.group_size, shape[axis])
        if shape[axis] % size or shape[axis] % 2:
            fitting = [n for n in range(2, self.group_size + 1, 2) if shape[axis] % n == 0]
            nearest = f"the nearest group_size is {max(fitting)}" if fitting else "use dtype=int8"
            raise ValueError(
                f"group_size={self.group_size} does not divide the {shape[axis]} inputs of {name} into even groups; "
                f"{nearest}."
            )
        return tuple(size if i == axis else 1 for i in range(len(shape)))

    def _is_linear_map(self, name: str) -> bool:
        """Kernels and tables; not norms and biases, nor a reward head, whose one output is all there is."""
        return name.endswith(("/kernel", "/embedding")) and not (name == "head/kernel" and self.model.head == "scalar")


def _input_axes(name: str, ndim: int) -> tuple[int, ...]:
    """The axes that a map contracts with its input; a table [V, D] is a map from its rows, as the tied head uses it."""
    if name.startswith("layers/"):
        return kernel_input_axes(name, ndim)
    return (0,) if name == "head/kernel" else (1,)


def _group_axis(name: str, ndim: int) -> int:
    """The input axis along which int4 has its groups and packs its pairs; of several, the last."""
    return _input_axes(name, ndim)[-1]


class WeightWriter:
    """What `weights.write_weights` asks for, made from parameters that are given up one by one.

    named: path name -> array; each is taken out when it is stored. meant: path name -> what was stored, on the devices of
    the original, in its place.
    """

    def __init__(self, encoder: Encoder, named: dict[str, jax.Array]):
        self._encoder, self._named = encoder, named
        self._ready: dict[str, np.ndarray] = {}
        self.meant: dict[str, Any] = {}

    def layout(self) -> dict[str, jax.ShapeDtypeStruct]:
        """All stored tensors by name."""
        found: dict[str, jax.ShapeDtypeStruct] = {}
        for name, leaf in self._named.items():
            found |= self._encoder.layout(name, leaf.shape)
        return found

    def read(self, name: str) -> np.ndarray:
        """A stored tensor; a parameter's scales directly after it, which is the order of their names."""
        if name not in self._ready:
            leaf = self._named.pop(name)
            self._ready, meant = self._encoder.encode(name, np.asarray(leaf))
            self.meant[name] = jax.device_put(meant, leaf.sharding)
        return self._ready[name]
