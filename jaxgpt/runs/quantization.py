"""Weight-only quantization: a tensor as small integers and a float32 scale for each block of it. Plain numpy.

Symmetric: the value is integer * scale, with scale = (largest magnitude of the block) / levels, so that 0 stays 0 and the
error of a value is at most half its block's scale. The shape of the scales says what the blocks are: along each axis, the
scales divide the tensor into equal parts. int8 has 127 levels; int4 has 7, two values in a byte along one axis.
"""

from typing import Any

import numpy as np

INT8_LEVELS, INT4_LEVELS = 127, 7


def quantize(values: np.ndarray, block: tuple[int, ...], levels: int) -> tuple[np.ndarray, np.ndarray]:
    """(integers int8 in the tensor's shape, between -levels and levels; scales f32, one for each block).

    values: float. block: sizes along each axis, that divide the tensor's.
    """
    parts = [size for n, b in zip(values.shape, block, strict=True) for size in (n // b, b)]
    largest = np.abs(values.reshape(parts)).max(axis=tuple(range(1, 2 * values.ndim, 2)))
    scales = np.where(largest > 0, largest / levels, 1).astype(np.float32)
    integers = np.rint(values / _expand(scales, values.shape))
    return np.clip(integers, -levels, levels).astype(np.int8), scales


def dequantize(integers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """What the integers stand for, f32."""
    return integers.astype(np.float32) * _expand(scales, integers.shape)


def pack_int4(integers: np.ndarray, axis: int) -> np.ndarray:
    """Two neighbours along `axis`, which has an even size, in one u8: the even one in the low four bits."""
    pairs = np.moveaxis(integers, axis, -1).view(np.uint8) & 15
    return np.moveaxis(pairs[..., 0::2] | (pairs[..., 1::2] << 4), -1, axis)


def unpack_int4(packed: np.ndarray, axis: int) -> np.ndarray:
    """The inverse of `pack_int4`, int8."""
    pairs = np.moveaxis(packed, axis, -1)
    integers = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*pairs.shape[:-1], -1).astype(np.int8)
    return np.moveaxis(np.where(integers > 7, integers - 16, integers).astype(np.int8), -1, axis)


def dequantize_part(values: Any, scales: Any, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
    """The part of the tensor that `index` selects, f32; no other part is read.

    values: the integers as int8 in the tensor's shape, or as u8 with one axis packed. scales: as above. Both have a shape
    and a method read(index) (`weights.StoredTensor`). index: one slice of step 1 for each axis.
    """
    bounds = [part.indices(n)[:2] for part, n in zip(index, shape, strict=True)]
    whole = lambda block: tuple(
        slice(start // b, -(-stop // b)) for (start, stop), b in zip(bounds, block, strict=True)
    )

    def inner(block: tuple[int, ...]) -> tuple[slice, ...]:
        """Where the part begins and ends in the blocks it touches."""
        return tuple(slice(start % b, start % b + stop - start) for (start, stop), b in zip(bounds, block, strict=True))

    packing = tuple(n // stored for n, stored in zip(shape, values.shape, strict=True))
    integers = values.read(whole(packing))
    if 2 in packing:
        integers = unpack_int4(integers, packing.index(2))[inner(packing)]
    block = tuple(n // count for n, count in zip(shape, scales.shape, strict=True))
    factors = scales.read(whole(block))
    for axis, size in enumerate(block):
        factors = np.repeat(factors, size, axis) if size > 1 else factors
    return integers.astype(np.float32) * factors[inner(block)]


def _expand(scales: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    for axis, (count, size) in enumerate(zip(scales.shape, shape, strict=True)):
        scales = np.repeat(scales, size // count, axis)
    return scales
