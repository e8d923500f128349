"""Causal attention within segments: one meaning, several kernels. Axis legend in jaxgpt/types.py."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from jaxgpt import partition
from jaxgpt.models.config import ModelConfig
from jaxgpt.models.layers import alibi_slopes
from jaxgpt.types import Array


class Places(NamedTuple):
    """Where queries and keys stand. Segment 0 is padding or an empty slot: it neither attends nor is attended to.

    segments and positions of queries: i32 [B, T]; of keys: i32 [B, S]. in_order: T == S and row order is the order of
      positions within each segment, so that kernels may use static causal masks. single: all one segment.
    """

    segments_BT: Array
    positions_BT: Array
    key_segments_BS: Array
    key_positions_BS: Array
    in_order: bool
    single: bool


def attention(
    q_BNTH: Array, k_BKSH: Array, v_BKSH: Array, places: Places, cfg: ModelConfig, window: int | None
) -> Array:
    """softmax(mask(cap(scale q.k) + alibi)) v, in the dtype of q; softmax in float32. Returns [B, N, T, H].

    A query sees the keys of its own segment whose position is at most its own, and within `window` of it if given.
    A padding query gets finite values without meaning.
    """
    kernel = choose_kernel(cfg, q_BNTH.dtype, places)
    with jax.named_scope(f"attention_{kernel}"):
        return _KERNELS[kernel](q_BNTH, k_BKSH, v_BKSH, places, cfg, window)


def choose_kernel(cfg: ModelConfig, dtype, places: Places) -> str:
    """The kernel to use; `auto` takes the fastest that can express the options on this backend.

    Raises ValueError where a kernel asked for by name cannot express an option.
    """
    if cfg.attention_kernel == "auto":
        fast = {"tpu": "splash", "gpu": "cudnn"}.get(jax.default_backend(), "xla")
        return "xla" if _obstacle(fast, cfg, dtype, places) else fast
    # A cache is read with one query at a time, where flash kernels have nothing to offer.
    if cfg.attention_kernel != "xla" and not places.in_order:
        return "xla"
    obstacle = _obstacle(cfg.attention_kernel, cfg, dtype, places)
    if obstacle:
        raise ValueError(
            f"model.attention_kernel={cfg.attention_kernel!r} cannot be used with {obstacle}; use 'xla' or 'auto'."
        )
    return cfg.attention_kernel


def _obstacle(kernel: str, cfg: ModelConfig, dtype, places: Places) -> str:
    """What keeps a kernel from being used, or the empty string."""
    if kernel == "xla":
        return ""
    if not places.in_order:
        return "a key-value cache"
    if cfg.position == "alibi":
        return "model.position='alibi'"
    length = places.segments_BT.shape[-1]
    if kernel == "splash":
        return f"sequences of {length} tokens (not a multiple of 128)" if length % 128 else ""
    if cfg.attention_softcap is not None:
        return "model.attention_softcap"
    if dtype != jnp.bfloat16:
        return "model.dtype='float32'"
    if length % 2:
        return f"sequences of {length} tokens (an odd number)"
    if cfg.head_dim % 8 or cfg.head_dim > _cudnn_head_dim():
        return f"model.head_dim={cfg.head_dim} (not a multiple of 8, or more than {_cudnn_head_dim()})"
    return ""


def _cudnn_head_dim() -> int:
    """The largest head dim of cuDNN's flash attention: 256 from Hopper on, 128 before it."""
    if jax.default_backend() != "gpu":
        return 128
    return 256 if float(jax.local_devices()[0].compute_capability) >= 9 else 128


def mask_BTS(places: Places, window: int | None) -> Array:
    """True where a query may look at a key: bool [B, T, S]."""
    distance = places.positions_BT[:, :, None] - places.key_positions_BS[:, None, :]
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    if not places.single:
        mask &= places.segments_BT[:, :, None] == places.key_segments_BS[:, None, :]
        mask &= places.segments_BT[:, :, None] != 0
    return mask


def _xla(q_BNTH, k_BKSH, v_BKSH, places, cfg, window):
    batch, heads, length, head_dim = q_BNTH.shape
    kv_heads = k_BKSH.shape[1]
    q_BKGTH = q_BNTH.reshape(batch, kv_heads, heads // kv_heads, length, head_dim)
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
    scores = scores * cfg.query_scale
    if cfg.attention_softcap is not None:
        scores = cfg.attention_softcap * jnp.tanh(scores / cfg.attention_softcap)
    if cfg.position == "alibi":
        distance = places.positions_BT[:, :, None] - places.key_positions_BS[:, None, :]
        slopes = jnp.asarray(alibi_slopes(heads), jnp.float32).reshape(1, kv_heads, -1, 1, 1)
        scores = scores - slopes * distance[:, None, None].astype(jnp.float32)
    # A large finite number: a row without any key stays finite, and so do its gradients.
    scores = jnp.where(mask_BTS(places, window)[:, None, None], scores, -1e30)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v_BKSH.dtype)
    out = jnp.einsum("BKGTS,BKSH->BKGTH", probabilities, v_BKSH)
    return out.reshape(batch, heads, length, head_dim)


def _cudnn(q_BNTH, k_BKSH, v_BKSH, places, cfg, window):
    def kernel(q_BNTH, k_BKSH, v_BKSH, segments_BT):
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BNTH, k_BKSH, v_BKSH))
        mask = None if places.single else (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
        out = jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=True, scale=cfg.query_scale, implementation="cudnn",
            local_window_size=None if window is None else (window - 1, 0),
        )  # fmt: skip
        return jnp.swapaxes(out, 1, 2)

    return _per_device(kernel, q_BNTH, k_BKSH, v_BKSH, places.segments_BT)


def _splash(q_BNTH, k_BKSH, v_BKSH, places, cfg, window, *, interpret: bool = False):
    length = q_BNTH.shape[2]
    shape = (length, length)
    mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    block = next(b for b in (512, 256, 128) if length % b == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": block for name in names}

    def kernel(q_BNTH, k_BKSH, v_BKSH, segments_BT):
        row_kernel = splash.make_splash_mha_single_device(
            mask=splash.MultiHeadMask([mask] * q_BNTH.shape[1]),
            block_sizes=splash.BlockSizes(**blocks),
            attn_logits_soft_cap=cfg.attention_softcap,
            interpret=interpret,
        )
        row = lambda q, k, v, segments_T: row_kernel(q, k, v, splash.SegmentIds(segments_T, segments_T))
        return jax.vmap(row)(q_BNTH, k_BKSH, v_BKSH, segments_BT)

    q_BNTH = (q_BNTH * cfg.query_scale).astype(q_BNTH.dtype)
    return _per_device(kernel, q_BNTH, k_BKSH, v_BKSH, places.segments_BT)


def _per_device(kernel, q_BNTH: Array, k_BKSH: Array, v_BKSH: Array, segments_BT: Array) -> Array:
    """`kernel` on each device's rows and heads: the partitioner cannot see into it.

    Queries travel grouped by their kv head, so that a device never gets queries without their keys: kv heads that the
    mesh does not divide keep all heads whole. A single kv head goes to every device, and its queries are split.
    """
    batch, heads, length, head_dim = q_BNTH.shape
    kv_heads = k_BKSH.shape[1]
    q_BKGTH = q_BNTH.reshape(batch, kv_heads, heads // kv_heads, length, head_dim)

    def grouped(q_BKGTH, k_BKSH, v_BKSH, segments_BT):
        out_BNTH = kernel(q_BKGTH.reshape(len(q_BKGTH), -1, length, head_dim), k_BKSH, v_BKSH, segments_BT)
        return out_BNTH.reshape(q_BKGTH.shape)

    q_names = ("batch", "act_kv_heads", "act_heads" if kv_heads == 1 else None, None, None)
    kv_names = ("batch", "act_kv_heads", None, None)
    split = partition.per_device(grouped, (q_names, kv_names, kv_names, ("batch", None)), q_names)
    return split(q_BKGTH, k_BKSH, v_BKSH, segments_BT).reshape(q_BNTH.shape)


_KERNELS: dict[str, Callable[..., Array]] = {"xla": _xla, "cudnn": _cudnn, "splash": _splash}
