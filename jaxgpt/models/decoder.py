"""The decoder: tokens to hidden states to logits or values, with or without a cache. Axis legend in jaxgpt/types.py.

Plain functions over a plain pytree of parameters; Linen modules describe one block and the parts around the stack. The
blocks' parameters are stacked ([L, ...]) whether the layers are scanned or unrolled, so that a checkpoint fits both.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from jaxgpt.models.attention import Places, attention
from jaxgpt.models.config import ModelConfig
from jaxgpt.models.layers import (
    MLP,
    Einsum,
    Norm,
    apply_rope,
    compute_dtype,
    kernel_std,
    lora_for,
    make_norm,
    rope_tables,
    sinusoidal_positions,
)
from jaxgpt.partition import shard
from jaxgpt.types import Array, Params

VALUE_HEAD = "value_head"  # among the parameters of a policy whose trunk serves the critic, too


class KVCache(struct.PyTreeNode):
    """Keys and values of the tokens so far, for a fixed number of slots S.

    k_LBKSH, v_LBKSH: compute dtype. positions_BS, segments_BS: i32; segment 0 is an empty slot. index_B: i32, the slot each
    row writes next; rows are independent, so that one may be refilled while others go on.
    """

    k_LBKSH: Array
    v_LBKSH: Array
    positions_BS: Array
    segments_BS: Array
    index_B: Array


class Block(nn.Module):
    """One layer: attention and MLP, each with its residual connection.

    store: (k, v of the new tokens) -> (the cache with them, k, v of all its slots), or None without a cache. Returns x and
      what store made of the cache.
    """

    cfg: ModelConfig
    window: int | None

    @nn.compact
    def __call__(self, x_BTD, places: Places, rope, store: Callable | None, dropout_rng):
        cfg = self.cfg
        rngs = (None, None) if dropout_rng is None else jax.random.split(dropout_rng)
        out, stored = self.self_attention(self.before("attention_norm", x_BTD), places, rope, store)
        x_BTD = self.residual("attention", x_BTD, out, rngs[0])
        out = MLP(cfg, name="mlp")(self.before("mlp_norm", x_BTD))
        return self.residual("mlp", x_BTD, out, rngs[1]), stored

    def before(self, name: str, x_BTD: Array) -> Array:
        return x_BTD if self.cfg.norm_position == "post" else make_norm(self.cfg, name)(x_BTD)

    def residual(self, name: str, x_BTD: Array, out_BTD: Array, dropout_rng: Array | None) -> Array:
        if self.cfg.norm_position == "sandwich":
            out_BTD = make_norm(self.cfg, f"{name}_post_norm")(out_BTD)
        x_BTD = x_BTD + dropout(out_BTD, self.cfg.dropout, dropout_rng)
        if self.cfg.norm_position == "post":
            x_BTD = make_norm(self.cfg, f"{name}_norm")(x_BTD)
        return shard(x_BTD, "batch", "length", "act_embed")

    def self_attention(self, x_BTD, places, rope, store):
        cfg, dtype, dim, head_dim = self.cfg, x_BTD.dtype, self.cfg.embed_dim, self.cfg.head_dim

        def project(name: str, heads: int, axis: str) -> Array:
            shape, bias = (dim, heads, head_dim), (1, 2) if cfg.qkv_bias else None
            layer = Einsum("BTD,DNH->BNTH", shape, ("embed", axis, "head_dim"), kernel_std(cfg, dim), dtype, bias,
                           (heads, 1, head_dim), lora_for(cfg, name), name=name)  # fmt: skip
            return shard(layer(x_BTD), "batch", f"act_{axis}", "length", None)

        q_BNTH = project("query", cfg.num_heads, "heads")
        k_BKTH = project("key", cfg.num_kv_heads, "kv_heads")
        v_BKTH = project("value", cfg.num_kv_heads, "kv_heads")
        if cfg.qk_norm:
            q_BNTH = Norm("rmsnorm", cfg.norm_eps, cfg.norm_scale_offset, name="query_norm")(q_BNTH)
            k_BKTH = Norm("rmsnorm", cfg.norm_eps, cfg.norm_scale_offset, name="key_norm")(k_BKTH)
        if rope is not None:
            q_BNTH, k_BKTH = apply_rope(q_BNTH, rope), apply_rope(k_BKTH, rope)
        stored, k_BKSH, v_BKSH = (None, k_BKTH, v_BKTH) if store is None else store(k_BKTH, v_BKTH)
        out_BNTH = attention(q_BNTH, k_BKSH, v_BKSH, places, cfg, self.window)
        out_BNTH = shard(out_BNTH, "batch", "act_heads", "length", None)
        std = kernel_std(cfg, cfg.num_heads * head_dim, residual=True)
        out = Einsum("BNTH,NHD->BTD", (cfg.num_heads, head_dim, dim), ("heads", "head_dim", "embed"), std, dtype,
                     (2,) if cfg.attention_out_bias else None, (dim,), lora_for(cfg, "out"),
                     name="out")  # fmt: skip
        return out(out_BNTH), stored


def dropout(x: Array, rate: float, rng: Array | None) -> Array:
    """X with elements zeroed at `rate` and the rest scaled to keep the mean; x itself without rng."""
    if rng is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(rng, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def init_params(cfg: ModelConfig, rng: Array) -> Params:
    """Fresh parameters, f32, boxed with their logical axis names (`partition.unbox` makes them plain).

    Kernels as in `layers.kernel_std`; embeddings with std 0.02 (`gpt2`) or 1 / sqrt(D) (`fan_in`), positions 0.02, biases
    0, norms 1; the scalar head with std 1 / sqrt(D + 1) (Stiennon et al. 2020, arXiv:2009.01325).
    """
    if cfg.vocab_size < 1:
        raise ValueError("model.vocab_size is 0: it must be set, or taken from the tokenizer, before a model is built.")
    names = ("embedding", "positions", "layers", "head")
    rngs = dict(zip(names, jax.random.split(rng, len(names)), strict=True))

    def table(rng, shape, axes, std):
        return nn.LogicallyPartitioned(jax.random.normal(rng, shape, jnp.float32) * std, axes)

    dim = cfg.embed_dim
    std = 0.02 if cfg.init == "gpt2" else 1 / math.sqrt(dim)
    params = {"embedder": {"embedding": table(rngs["embedding"], (cfg.vocab_size, dim), ("vocab", "embed"), std)}}
    if cfg.position == "learned":
        shape = (cfg.max_seq_length, dim)
        params["positions"] = {"embedding": table(rngs["positions"], shape, ("positions", "embed"), 0.02)}

    # Positions of any kind and windows leave parameter shapes alone: one dummy token shows a block its inputs.
    one = jnp.zeros((1, 1), jnp.int32)
    x, places = jnp.zeros((1, 1, dim), compute_dtype(cfg)), Places(one, one, one, one, True, True)
    block = Block(_plain_attention(cfg), None)
    stacked = jax.vmap(lambda rng: block.init(rng, x, places, None, None, None)["params"])(
        jax.random.split(rngs["layers"], cfg.num_layers)
    )
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    params["layers"] = jax.tree.map(lambda box: box.add_axis(0, {nn.PARTITION_NAME: "layers"}), stacked, is_leaf=is_box)
    if cfg.norm_position != "post":
        params["final_norm"] = make_norm(cfg, "final_norm").init(rngs["head"], x)["params"]
    if cfg.head == "scalar":
        kernel = table(rngs["head"], (dim, 1), ("embed", None), 1 / math.sqrt(dim + 1))
        params["head"] = {"kernel": kernel, "bias": nn.LogicallyPartitioned(jnp.zeros((1,), jnp.float32), (None,))}
    elif not cfg.tie_embeddings:
        std = kernel_std(cfg, dim)
        params["head"] = {"kernel": table(rngs["head"], (dim, cfg.vocab_size), ("embed", "vocab"), std)}
    return params


def _plain_attention(cfg: ModelConfig) -> ModelConfig:
    """The same parameters, with attention that takes any length."""
    return dataclasses.replace(cfg, attention_kernel="xla")


def hidden_states(
    cfg: ModelConfig,
    params: Params,
    tokens_BT: Array,
    segments_BT: Array | None = None,
    positions_BT: Array | None = None,
    *,
    dropout_rng: Array | None = None,
) -> Array:
    """Final hidden states, after the last norm: compute dtype [B, T, D].

    segments_BT: i32, 0 is padding; None means that each row is one segment. positions_BT: i32; None means 0, 1, 2, ....
    dropout_rng: dropout on the embeddings and on what each sub-layer adds to the residual stream; None for none.
    """
    single = segments_BT is None
    if segments_BT is None:
        segments_BT = jnp.ones_like(tokens_BT)
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    places = Places(segments_BT, positions_BT, segments_BT, positions_BT, in_order=True, single=single)
    x_BTD, _ = _trunk(cfg, params, tokens_BT, places, dropout_rng=dropout_rng)
    return x_BTD


def init_cache(cfg: ModelConfig, batch: int, length: int) -> KVCache:
    """An empty cache of `length` slots per row."""
    shape = (cfg.num_layers, batch, cfg.num_kv_heads, length, cfg.head_dim)
    # Every leaf has a buffer of its own, so that a cache may be donated.
    zeros = lambda: shard(jnp.zeros(shape, compute_dtype(cfg)), "layers", "batch", "act_kv_heads", None, None)
    empty = lambda: jnp.zeros((batch, length), jnp.int32)
    return KVCache(zeros(), zeros(), empty(), empty(), jnp.zeros((batch,), jnp.int32))


def decode(
    cfg: ModelConfig, params: Params, tokens_BT: Array, segments_BT: Array, positions_BT: Array, cache: KVCache
) -> tuple[Array, KVCache]:
    """Final hidden states [B, T, D] of T new tokens of each row, seeing the cache, and the cache with them written.

    Each row's tokens go to its slots index_B, index_B + 1, ...; padding (segment 0), left or right, takes slots but is
    never seen. Serves prefill (T = prompt length) and one-token steps alike.
    """
    put = jax.vmap(lambda old, new, i: jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (i,)))
    segments_BS = put(cache.segments_BS, segments_BT, cache.index_B)
    positions_BS = put(cache.positions_BS, positions_BT, cache.index_B)
    places = Places(segments_BT, positions_BT, segments_BS, positions_BS, in_order=False, single=False)

    def store(kv, layer, *new):
        kv = tuple(_put_layer(old, n, layer, cache.index_B) for old, n in zip(kv, new, strict=True))
        return kv, *(jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in kv)

    x_BTD, (k, v) = _trunk(cfg, params, tokens_BT, places, kv=(cache.k_LBKSH, cache.v_LBKSH), store=store)
    return x_BTD, KVCache(k, v, positions_BS, segments_BS, cache.index_B + tokens_BT.shape[1])


def _put_layer(old_LBKSH: Array, new_BKTH: Array, layer: Array | int, index_B: Array) -> Array:
    """The stacked cache with new_BKTH in one layer's slots index_B, index_B + 1, ... of each row.

    One scatter on the whole array: XLA does it in place where the cache is carried by a loop or donated, while taking
    the layer out and putting it back would copy the cache at every token.
    """
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3),
        inserted_window_dims=(0,),
        scatter_dims_to_operand_dims=(0, 3),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    indices = jnp.stack([jnp.full_like(index_B, layer), index_B], axis=-1)
    return jax.lax.scatter(
        old_LBKSH, indices, new_BKTH.astype(old_LBKSH.dtype), numbers, unique_indices=True, mode="clip"
    )


def head_params(cfg: ModelConfig, params: Params) -> Params:
    """The parameters that `logits` needs."""
    return params["embedder"] if cfg.tie_embeddings else params["head"]


def logits(cfg: ModelConfig, head: Params, x_D: Array) -> Array:
    """Logits of hidden states, f32 [..., V]; head: from `head_params`."""
    with jax.named_scope("logits"):
        table, equation = (
            (head["embedding"], "...D,VD->...V") if cfg.tie_embeddings else (head["kernel"], "...D,DV->...V")
        )
        out = jnp.einsum(equation, x_D, table.astype(x_D.dtype), preferred_element_type=jnp.float32)
        if cfg.final_softcap is not None:
            out = cfg.final_softcap * jnp.tanh(out / cfg.final_softcap)
        return out


def values(cfg: ModelConfig, params: Params, x_BTD: Array) -> Array:
    """The scalar head's value of each token, f32 [B, T]."""
    if cfg.head != "scalar":
        raise ValueError(f"model.head={cfg.head!r} has no values; use model.head='scalar'.")
    head = params["head"]
    return jnp.einsum("BTD,DO->BTO", x_BTD.astype(jnp.float32), head["kernel"])[..., 0] + head["bias"][0]


def forward(
    cfg: ModelConfig,
    params: Params,
    tokens_BT: Array,
    segments_BT: Array | None = None,
    positions_BT: Array | None = None,
) -> Array:
    """Logits of whole sequences, f32 [B, T, V], without a cache and without dropout."""
    x_BTD = hidden_states(cfg, params, tokens_BT, segments_BT, positions_BT)
    return logits(cfg, head_params(cfg, params), x_BTD)


def _embed(cfg: ModelConfig, params: Params, tokens_BT: Array, positions_BT: Array) -> Array:
    dtype = compute_dtype(cfg)
    x_BTD = jnp.take(params["embedder"]["embedding"], tokens_BT, axis=0).astype(dtype)
    if cfg.scale_embeddings:
        x_BTD = x_BTD * jnp.asarray(math.sqrt(cfg.embed_dim), dtype)
    if cfg.position == "learned":
        x_BTD = x_BTD + jnp.take(params["positions"]["embedding"], positions_BT, axis=0).astype(dtype)
    elif cfg.position == "sinusoidal":
        x_BTD = x_BTD + sinusoidal_positions(positions_BT, cfg.embed_dim).astype(dtype)
    return shard(x_BTD, "batch", "length", "act_embed")


def _trunk(cfg, params, tokens_BT, places: Places, *, kv=None, store=None, dropout_rng=None):
    """Embedding, blocks and final norm: (x_BTD, kv).

    kv: the cache's stacked keys and values. store: (kv, layer, k, v) -> (kv with them, k and v of the layer's slots).
    """
    with jax.named_scope("embed"):
        x_BTD = _embed(cfg, params, tokens_BT, places.positions_BT)
    rngs = None
    if dropout_rng is not None and (cfg.dropout or cfg.lora.dropout):
        embed_rng, layers_rng = jax.random.split(dropout_rng)
        x_BTD = dropout(x_BTD, cfg.dropout, embed_rng)
        rngs = jax.random.split(layers_rng, cfg.num_layers)
    rope = rope_tables(cfg.rope, cfg.head_dim, places.positions_BT) if cfg.position == "rope" else None

    def make_layer(kind: str):
        block = Block(cfg, cfg.sliding_window if kind == "local" else None)

        def layer(carry, inputs, index):
            x_BTD, kv = carry
            params, rng = inputs
            store_here = None if store is None else functools.partial(store, kv, index)
            rngs = None if rng is None else {"dropout": rng}
            return block.apply({"params": params}, x_BTD, places, rope, store_here, rng, rngs=rngs)

        return layer if store is not None else _remat(cfg, layer)

    layers = [make_layer(kind) for kind in (cfg.window_pattern if cfg.sliding_window is not None else ("global",))]
    with jax.named_scope("layers"):
        x_BTD, kv = _stack(cfg, layers, (x_BTD, kv), (params["layers"], rngs))
    if cfg.norm_position != "post":
        norm: Callable = make_norm(cfg, "final_norm").apply
        x_BTD = norm({"params": params["final_norm"]}, x_BTD)
    return x_BTD, kv


def _stack(cfg: ModelConfig, layers: list[Callable], carry: Any, inputs: Any) -> Any:
    """Apply `layers` in turn, repeated over the L stacked inputs: one lax.scan, or a Python loop over slices."""
    if _is_scanned(cfg):
        numbered = (inputs, jnp.arange(cfg.num_layers))
        grouped = jax.tree.map(lambda p: p.reshape(-1, len(layers), *p.shape[1:]), numbered)

        def group(carry, group_inputs):
            for i, layer in enumerate(layers):
                carry = layer(carry, *jax.tree.map(lambda p, i=i: p[i], group_inputs))
            return carry, None

        return jax.lax.scan(group, carry, grouped)[0]
    # split, not p[i]: its transpose is one concatenation, that of indexing a sum of L padded arrays.
    leaves, structure = jax.tree.flatten(inputs)
    slices = [[p[0] for p in jnp.split(leaf, cfg.num_layers)] for leaf in leaves]
    for i in range(cfg.num_layers):
        carry = layers[i % len(layers)](carry, jax.tree.unflatten(structure, [s[i] for s in slices]), i)
    return carry


def _is_scanned(cfg: ModelConfig) -> bool:
    return jax.default_backend() != "cpu" if cfg.scan_layers is None else cfg.scan_layers


def _remat(cfg: ModelConfig, layer: Callable) -> Callable:
    kind = cfg.remat
    if kind == "auto":  # a CPU has memory to spare; unrolled, keeping costs less than recomputing there
        kind = "dots" if _is_scanned(cfg) else "none"
    if kind == "none":
        return layer
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if kind == "dots" else None
    return jax.checkpoint(layer, policy=policy, prevent_cse=not _is_scanned(cfg))
