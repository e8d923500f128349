"""The language-model loss: next token, teacher forcing, weights as data. Serves pretraining and SFT alike."""

import dataclasses

import jax.numpy as jnp

from jaxgpt import numerics
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig
from jaxgpt.types import Array, LMBatch, Objective


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is added to the cross-entropy, and how many tokens' logits exist at a time (over all devices)."""

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    chunk_tokens: int = 1024

    def __post_init__(self):
        if self.z_loss < 0:
            raise ValueError(f"loss.z_loss must not be negative, not {self.z_loss}.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"loss.label_smoothing must be in [0, 1), not {self.label_smoothing}.")
        if self.chunk_tokens < 1:
            raise ValueError(f"loss.chunk_tokens must be at least 1, not {self.chunk_tokens}.")


def make_next_token(model: ModelConfig, loss: LossConfig, token_bytes_V: Array | None = None) -> Objective:
    """The objective (params, LMBatch, rng) -> (loss sum, sums of {"loss", "accuracy", "log_z", "weight", "bytes"}).

    metrics["loss"] is the plain cross-entropy in nats, whatever z-loss and smoothing add to what is minimised.
    token_bytes_V: i32, UTF-8 bytes of each token; where given, "bytes" is the sum over targets by weight, as the loss is.
    """

    def next_token(params, batch: LMBatch, rng):
        x_BTD = decoder.hidden_states(
            model, params, batch.tokens_BT, batch.segments_BT, batch.positions_BT, dropout_rng=rng
        )
        loss_sum, metrics = numerics.chunked_cross_entropy(
            lambda head, x: decoder.logits(model, head, x),
            decoder.head_params(model, params),
            x_BTD,
            batch.targets_BT,
            batch.weights_BT,
            chunk_tokens=loss.chunk_tokens,
            z_loss=loss.z_loss,
            label_smoothing=loss.label_smoothing,
        )
        if token_bytes_V is not None:
            counted = jnp.take(jnp.asarray(token_bytes_V), batch.targets_BT) * batch.weights_BT.astype(jnp.float32)
            metrics |= {"bytes": jnp.sum(counted)}
        return loss_sum, metrics

    return next_token
