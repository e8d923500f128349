"""Sums and losses under a mask, in float32: cross-entropy, log-probs and entropy, each with a chunked form; KL estimates."""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxgpt.types import Array

KLEstimator = Literal["k1", "k2", "k3"]


def masked_sum(x: Array, mask: Array) -> Array:
    """Sum of x where mask is non-zero, weighted by it, f32; x may be anything, even nan, where mask is 0."""
    return jnp.sum(jnp.where(mask != 0, x.astype(jnp.float32), 0.0) * mask.astype(jnp.float32))


def masked_mean(x: Array, mask: Array) -> Array:
    """Weighted mean of x under mask, f32; 0 where the mask is empty."""
    weight = jnp.sum(mask.astype(jnp.float32))
    return masked_sum(x, mask) / jnp.where(weight == 0, 1.0, weight)


def masked_whiten(x: Array, mask: Array, *, shift_mean: bool = True, eps: float = 1e-8) -> Array:
    """(x - mean) / sqrt(var + eps) over the whole array under mask, f32; 0 where the mask is 0.

    The variance is that of the population (ddof 0). shift_mean=False puts the mean back: the scale alone changes.
    x may be anything, even nan, where mask is 0. Under jit the array is the global one, whatever its sharding.
    """
    x = jnp.where(mask != 0, x.astype(jnp.float32), 0.0)
    mean = masked_mean(x, mask)
    deviation = x - mean
    deviation -= masked_mean(deviation, mask)  # the mean's rounding error, which a tiny variance would blow up
    whitened = deviation / jnp.sqrt(masked_mean(jnp.square(deviation), mask) + eps)
    return jnp.where(mask != 0, whitened if shift_mean else whitened + mean, 0.0)


def token_logprobs(logits_V: Array, targets: Array) -> Array:
    """Log softmax(logits)[target], f32. logits: [..., V]; targets: i32 [...]."""
    logits_V = logits_V.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits_V, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits_V, axis=-1)


def entropy(logits_V: Array) -> Array:
    """Entropy of softmax(logits) in nats, f32 [...]. logits: [..., V]; -inf is a token that cannot be drawn."""
    log_p_V = jax.nn.log_softmax(logits_V.astype(jnp.float32), axis=-1)
    # p log p is 0 at p = 0; as a product it would be 0 * -inf, and so would its gradient.
    return -jnp.sum(jnp.exp(log_p_V) * jnp.where(jnp.isneginf(log_p_V), 0.0, log_p_V), axis=-1)


def kl_estimate(logp: Array, reference: Array, kind: KLEstimator) -> Array:
    """Estimate of KL(pi || reference) from the log-probs of a token drawn from pi, nats, f32 of the same shape.

    With d = logp - reference: k1 = d; k2 = d^2 / 2; k3 = exp(-d) - 1 + d. k1 and k3 are unbiased, k2 is not but nearly so
    for close policies; k2 and k3 are never negative. What each one's *gradient* estimates: `objectives.ppo.PPOConfig`.

    Raises:
      ValueError: if kind is none of them.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    d = logp.astype(jnp.float32) - reference.astype(jnp.float32)
    if kind == "k1":
        return d
    if kind == "k2":
        return jnp.square(d) / 2
    if kind == "k3":
        return jnp.expm1(-d) + d
    raise ValueError(f"The KL estimator must be one of {', '.join(get_args(KLEstimator))}, not {kind!r}.")


def cross_entropy(
    logits_V: Array, targets: Array, *, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> tuple[Array, dict[str, Array]]:
    """The loss of each token and what it is made of, f32 [...].

    loss = (1 - e) nll + e (log Z - mean_v logit_v) + z_loss (log Z)^2, with nll = log Z - logit_target.

    Args:
      logits_V: [..., V], any float dtype. targets: i32 [...].
      z_loss: coefficient that keeps log Z near 0 (Chowdhery et al. 2022, arXiv:2204.02311, §5).
      label_smoothing: e, the share of the target spread evenly over the vocabulary (Szegedy et al. 2016).

    Returns:
      loss in nats, and {"nll", "accuracy", "log_z"}: the plain cross-entropy, 1 where the largest logit is the target's,
      and log Z.
    """
    logits_V = logits_V.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits_V, axis=-1)
    target_logit = jnp.take_along_axis(logits_V, targets[..., None], axis=-1)[..., 0]
    nll = log_z - target_logit
    loss = nll
    if label_smoothing:
        loss = (1 - label_smoothing) * nll + label_smoothing * (log_z - jnp.mean(logits_V, axis=-1))
    if z_loss:
        loss = loss + z_loss * jnp.square(log_z)
    accuracy = (target_logit >= jnp.max(logits_V, axis=-1)).astype(jnp.float32)
    return loss, {"nll": nll, "accuracy": accuracy, "log_z": log_z}


def chunked_cross_entropy(
    logits_fn: Callable[[Any, Array], Array],
    head: Any,
    x_BTD: Array,
    targets_BT: Array,
    weights_BT: Array,
    *,
    chunk_tokens: int,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Array, dict[str, Array]]:
    """Weighted sums of `cross_entropy` over a batch without ever holding the logits of all of it.

    Rows of T are cut into chunks of about chunk_tokens tokens of the whole batch. Where a gradient is asked for, the chunk's
    gradient is taken while its logits are there and only scaled afterwards (the loss is a plain sum, so the cotangent
    is one scalar): the logits are computed once, not again in the backward pass.

    Args:
      logits_fn: (head, x [..., D]) -> logits [..., V]. head: the parameters it needs; both get gradients.
      x_BTD: final hidden states. targets_BT: i32. weights_BT: f32.

    Returns:
      The weighted loss sum, and {"loss": nll sum, "accuracy", "log_z", "weight"} sums, all f32 scalars. Only the
      first carries a gradient.
    """
    batch, length, _ = x_BTD.shape
    chunks = _num_chunks(length, batch * length, chunk_tokens)

    split = functools.partial(_split, chunks=chunks)

    def chunk_sums(head, x, targets, weights):
        loss, parts = cross_entropy(logits_fn(head, x), targets, z_loss=z_loss, label_smoothing=label_smoothing)
        parts = {"loss": parts["nll"], "accuracy": parts["accuracy"], "log_z": parts["log_z"]}
        sums = {name: masked_sum(value, weights) for name, value in parts.items()}
        return masked_sum(loss, weights), sums | {"weight": jnp.sum(weights)}

    zeros = (jnp.zeros(()), dict.fromkeys(("loss", "accuracy", "log_z", "weight"), jnp.zeros(())))

    @jax.custom_vjp
    def total(head, x_BTD, targets_BT, weights_BT):
        def body(sums, chunk):
            return jax.tree.map(jnp.add, sums, chunk_sums(head, *chunk)), None

        return jax.lax.scan(body, zeros, (split(x_BTD), split(targets_BT), split(weights_BT)))[0]

    def forward(head, x_BTD, targets_BT, weights_BT):
        def body(carry, chunk):
            sums, head_gradient = carry
            x, targets, weights = chunk
            loss, vjp, parts = jax.vjp(lambda h, x: chunk_sums(h, x, targets, weights), head, x, has_aux=True)
            d_head, d_x = vjp(jnp.ones(()))
            head_gradient = jax.tree.map(lambda a, b: a + b.astype(a.dtype), head_gradient, d_head)
            return (jax.tree.map(jnp.add, sums, (loss, parts)), head_gradient), d_x

        start = (zeros, jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), head))
        (sums, head_gradient), d_x = jax.lax.scan(body, start, (split(x_BTD), split(targets_BT), split(weights_BT)))
        return sums, (head_gradient, jnp.moveaxis(d_x, 0, 1).reshape(x_BTD.shape))

    def backward(gradients, cotangents):
        scale = cotangents[0]
        head_gradient, d_x = gradients
        scaled = jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), head_gradient, head)
        return scaled, (d_x * scale).astype(d_x.dtype), None, None

    total.defvjp(forward, backward)
    return total(head, x_BTD, targets_BT, weights_BT)


def _num_chunks(length: int, tokens: int, chunk_tokens: int) -> int:
    """The smallest divisor of `length` that makes chunks of at most chunk_tokens (or of one position)."""
    return next(c for c in range(1, length + 1) if length % c == 0 and (tokens // c <= chunk_tokens or c == length))


def _split(a: Array, chunks: int) -> Array:
    """[B, T, ...] -> [C, B, T/C, ...]: every chunk has all rows, so that the batch stays sharded."""
    return jnp.moveaxis(a.reshape(len(a), chunks, -1, *a.shape[2:]), 1, 0)


def chunked_token_logprobs(
    logits_fn: Callable[[Any, Array], Array], head: Any, x_BTD: Array, targets_BT: Array, *, chunk_tokens: int
) -> Array:
    """`token_logprobs` of a batch without ever holding the logits of all of it, f32 [B, T].

    Rows of T are cut as in `chunked_cross_entropy`. Each log-prob has a cotangent of its own, known only in the backward
    pass: that computes the logits of each chunk again, and the gradient is the unchunked one.

    Args:
      logits_fn: (head, x [..., D]) -> logits [..., V]. head: the parameters it needs; both get gradients.
      x_BTD: final hidden states. targets_BT: i32.
    """
    of_tokens = lambda head, x, targets: token_logprobs(logits_fn(head, x), targets)
    return _map_chunks(of_tokens, head, x_BTD, targets_BT, chunk_tokens)


def chunked_logprobs_and_entropy(
    logits_fn: Callable[[Any, Array], Array], head: Any, x_BTD: Array, targets_BT: Array, *, chunk_tokens: int
) -> tuple[Array, Array]:
    """`chunked_token_logprobs`, and the `entropy` of the distribution that each target is drawn from, both f32 [B, T].

    Both are of the logits that logits_fn returns: a temperature is its business. Both carry gradients.
    """

    def of_tokens(head, x, targets):
        logits = logits_fn(head, x)
        return token_logprobs(logits, targets), entropy(logits)

    return _map_chunks(of_tokens, head, x_BTD, targets_BT, chunk_tokens)


def chunked_logprobs_and_greedy(
    logits_fn: Callable[[Any, Array], Array], head: Any, x_BTD: Array, targets_BT: Array, *, chunk_tokens: int
) -> tuple[Array, Array]:
    """`chunked_token_logprobs`, and 1 where no logit is larger than the target's, else 0, both f32 [B, T]."""

    def of_tokens(head, x, targets):
        parts = cross_entropy(logits_fn(head, x), targets)[1]
        return -parts["nll"], parts["accuracy"]

    return _map_chunks(of_tokens, head, x_BTD, targets_BT, chunk_tokens)


def _map_chunks(of_tokens: Callable, head: Any, x_BTD: Array, targets_BT: Array, chunk_tokens: int) -> Any:
    """of_tokens(head, x [b, t, D], targets [b, t]) -> a tree of [b, t], over chunks: the tree of [B, T].

    Nothing is kept of a chunk but its results; the backward pass computes it again.
    """
    batch, length, _ = x_BTD.shape
    split = functools.partial(_split, chunks=_num_chunks(length, batch * length, chunk_tokens))
    # The scan itself keeps XLA from reusing the forward pass's logits, so that no barrier is needed against it.
    of_chunk = jax.checkpoint(of_tokens, prevent_cse=False)
    results = jax.lax.map(lambda chunk: of_chunk(head, *chunk), (split(x_BTD), split(targets_BT)))
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(batch, length), results)
