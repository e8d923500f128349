"""Adapters as parameters of their own: which leaves they are, how they start, and how they are merged into their base."""

import dataclasses

import jax.numpy as jnp

from jaxgpt import tree
from jaxgpt.models.config import LoraConfig, ModelConfig
from jaxgpt.models.layers import kernel_input_axes
from jaxgpt.types import Array, Params

LEAVES = ("lora_a", "lora_b", "magnitude")


def is_adapter(name: str) -> bool:
    """Whether the parameter of this path name belongs to an adapter."""
    return name.rsplit("/", 1)[-1] in LEAVES


def magnitudes(cfg: ModelConfig, base: Params) -> Params:
    """DoRA's magnitudes of fresh adapters, the norms of the base's kernels: a tree of "magnitude" leaves, else empty."""
    out: dict = {}
    for name, kernel in tree.named_leaves(base).items() if cfg.lora.dora else ():
        module = _module(name)
        if name.endswith("/kernel") and module is not None and cfg.lora.adapts(module):
            out[name.removesuffix("kernel") + "magnitude"] = _norm(kernel, kernel_input_axes(name, kernel.ndim))
    return tree.from_named(out)


def merge(cfg: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """One plain model: (the config without adapters, the parameters with every adapter added into its kernel)."""
    lora, named = cfg.lora, tree.named_leaves(params)
    merged = {name: leaf for name, leaf in named.items() if not is_adapter(name)}
    for name in merged:
        prefix = name.removesuffix("kernel")
        if f"{prefix}lora_a" in named:
            adapter = {leaf: named[prefix + leaf] for leaf in LEAVES if prefix + leaf in named}
            merged[name] = _merged_kernel(lora, name, named[name], adapter)
    return dataclasses.replace(cfg, lora=LoraConfig()), tree.from_named(merged)


def _merged_kernel(lora: LoraConfig, name: str, kernel: Array, adapter: dict[str, Array]) -> Array:
    a, b = adapter["lora_a"], adapter["lora_b"]
    layers, rank = a.shape[0], a.shape[-1]
    delta = jnp.einsum("LIZ,LZO->LIO", a.reshape(layers, -1, rank), b.reshape(layers, rank, -1))
    kernel = kernel + lora.scale * delta.reshape(kernel.shape)
    if "magnitude" not in adapter:
        return kernel
    inputs = kernel_input_axes(name, kernel.ndim)
    return kernel * jnp.expand_dims(adapter["magnitude"] / _norm(kernel, inputs), inputs)


def _norm(kernel: Array, inputs: tuple[int, ...]) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=inputs))


def _module(name: str) -> str | None:
    """`mlp/up` of `layers/mlp/up/kernel`; None outside the layers."""
    parts = name.split("/")
    return "/".join(parts[1:-1]) if parts[0] == "layers" else None
