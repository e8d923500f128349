"""Pytrees by path: names, split and merge by predicate, counts, norms, digests."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.types import Array


def path_name(path: tuple) -> str:
    """`layers/attention/query/kernel` for a jax key path."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path name, in tree order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def from_named(leaves: Mapping[str, Any]) -> dict:
    """The nested dict whose `named_leaves` these are."""
    out: dict = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = out
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return out


def split(params: dict, is_first: Callable[[str], bool]) -> tuple[dict, dict]:
    """Two nested dicts: the leaves whose path name satisfies the predicate, and the others."""
    named = named_leaves(params)
    first = {name: leaf for name, leaf in named.items() if is_first(name)}
    return from_named(first), from_named({name: leaf for name, leaf in named.items() if name not in first})


def merge(first: dict, second: dict) -> dict:
    """One nested dict from two with disjoint leaves: the inverse of `split`."""
    out = dict(first)
    for key, value in second.items():
        if key not in out:
            out[key] = value
        elif isinstance(value, dict) and isinstance(out[key], dict):
            out[key] = merge(out[key], value)
        else:
            raise ValueError(f"Both trees hold a leaf at {key!r}.")
    return out


def count(tree: Any) -> int:
    """Number of elements over all leaves; abstract leaves count too."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def global_norm(tree: Any) -> Array:
    """The 2-norm over all leaves, f32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)))


def digest(tree: Any) -> str:
    """sha256 (hex) over path names, shapes, dtypes and bytes of all leaves, in the order of their names."""
    sha = hashlib.sha256()
    for name, leaf in sorted(named_leaves(tree).items()):
        array = np.asarray(leaf)
        sha.update(f"{name}:{array.dtype}:{array.shape};".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()
