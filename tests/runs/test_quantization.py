"""Quantization against a reference in float64, one block after the other."""

import itertools

import numpy as np
import pytest

from jaxgpt.runs.quantization import (
    INT4_LEVELS,
    INT8_LEVELS,
    dequantize,
    dequantize_part,
    pack_int4,
    quantize,
    unpack_int4,
)

SHAPE = (3, 8, 4, 6)
CASES = [
    ((1, 8, 1, 1), INT8_LEVELS),
    ((1, 8, 4, 1), INT8_LEVELS),
    ((1, 4, 1, 1), INT4_LEVELS),
    ((1, 1, 1, 6), INT4_LEVELS),
]


class Stored:
    """What a StoredTensor is to `dequantize_part`, and a count of the values that were read."""

    def __init__(self, array: np.ndarray):
        self.array, self.shape, self.num_read = array, array.shape, 0

    def read(self, index) -> np.ndarray:
        part = self.array[index]
        self.num_read += part.size
        return part


def values() -> np.ndarray:
    rng = np.random.default_rng(0)
    w = rng.standard_normal(SHAPE).astype(np.float32) * np.exp(rng.standard_normal((3, 1, 4, 6))).astype(np.float32)
    w[1, :, 2, 3] = 0  # a channel of zeros
    return w


def blocks(block: tuple[int, ...]):
    """The index of every block."""
    starts = [range(0, n, b) for n, b in zip(SHAPE, block, strict=True)]
    for corner in itertools.product(*starts):
        yield tuple(slice(c, c + b) for c, b in zip(corner, block, strict=True))


@pytest.mark.parametrize(("block", "levels"), CASES)
def test_every_value_is_the_nearest_multiple_of_its_blocks_scale(block, levels):
    w = values()
    integers, scales = quantize(w, block, levels)
    back = dequantize(integers, scales)
    assert integers.dtype == np.int8
    assert scales.dtype == back.dtype == np.float32
    assert scales.shape == tuple(n // b for n, b in zip(SHAPE, block, strict=True))
    assert np.abs(integers).max() == levels
    for index in blocks(block):
        exact = np.float64(w[index])
        scale = np.abs(exact).max() / levels
        if scale == 0:
            assert not back[index].any()
            continue
        assert np.abs(exact - back[index]).max() <= scale / 2 * (1 + 1e-5)
        reference = np.rint(exact / scale) * scale
        ties = np.abs(np.abs(exact / scale) % 1 - 0.5) < 1e-5
        np.testing.assert_allclose(np.where(ties, 0, back[index]), np.where(ties, 0, reference), rtol=1e-6, atol=0)


@pytest.mark.parametrize("axis", range(4))
def test_packing_two_in_a_byte_loses_nothing(axis):
    shape = (2, 6, 4, 8)
    integers = np.random.default_rng(1).integers(-7, 8, shape).astype(np.int8)
    packed = pack_int4(integers, axis)
    assert packed.dtype == np.uint8
    assert packed.size == integers.size // 2
    np.testing.assert_array_equal(unpack_int4(packed, axis), integers)
    first = np.take(packed, [0], axis).ravel()[0]
    low, high = np.take(integers, [0], axis).ravel()[0], np.take(integers, [1], axis).ravel()[0]
    assert int(first) == (int(low) % 16) + 16 * (int(high) % 16)


@pytest.mark.parametrize(("block", "levels"), CASES)
def test_any_part_is_that_part_of_the_whole(block, levels):
    integers, scales = quantize(values(), block, levels)
    whole = dequantize(integers, scales)
    axis = int(np.argmax(np.array(block) > 1))
    rng = np.random.default_rng(2)
    for _ in range(50):
        stored = Stored(pack_int4(integers, axis) if levels == INT4_LEVELS else integers)
        bounds = [np.sort(rng.choice(n + 1, 2, replace=False)) for n in SHAPE]
        index = tuple(slice(int(a), int(b)) for a, b in bounds)
        part = dequantize_part(stored, Stored(scales), SHAPE, index)
        np.testing.assert_array_equal(part, whole[index])
        assert stored.num_read <= 2 * part.size
    everything = (slice(None),) * 4
    stored = Stored(pack_int4(integers, axis) if levels == INT4_LEVELS else integers)
    np.testing.assert_array_equal(dequantize_part(stored, Stored(scales), SHAPE, everything), whole)
