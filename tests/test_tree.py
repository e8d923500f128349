"""Splitting, merging and describing pytrees."""

import hashlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt import tree

NESTED = st.recursive(
    st.integers(), lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, min_size=1, max_size=3), max_leaves=8
).filter(lambda t: isinstance(t, dict))


@given(NESTED, st.sets(st.sampled_from("abcd")))
def test_merge_inverts_split(params, first):
    a, b = tree.split(params, lambda name: name[0] in first)
    assert tree.merge(a, b) == params
    assert all(name[0] in first for name in tree.named_leaves(a))
    assert not any(name[0] in first for name in tree.named_leaves(b))


def test_merging_two_leaves_of_one_name_is_an_error():
    with pytest.raises(ValueError, match="'x'"):
        tree.merge({"a": {"x": 1}}, {"a": {"x": 2}})


def test_count_and_norm():
    params = {"a": jnp.full((2, 3), 2.0), "b": {"c": jnp.full((4,), 3.0, jnp.bfloat16)}}
    assert tree.count(params) == 10
    np.testing.assert_allclose(tree.global_norm(params), np.sqrt(6 * 4 + 4 * 9), rtol=1e-6)


def test_the_digest_is_sha256_over_named_bytes_and_sees_one_bit():
    array = np.arange(3, dtype=np.float32)
    expected = hashlib.sha256(b"a/b:float32:(3,);" + array.tobytes()).hexdigest()
    assert tree.digest({"a": {"b": array}}) == expected
    array = array.copy()
    array.view(np.uint32)[1] ^= 1
    assert tree.digest({"a": {"b": array}}) != expected
