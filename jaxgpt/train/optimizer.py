"""Optimizers and learning-rate schedules by name, built from optax."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxgpt import tree
from jaxgpt.models.layers import kernel_input_axes
from jaxgpt.types import Array, Params

Schedule = Callable[[Any], Array]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update rule.

    schedule: after warmup_steps of linear warm-up, `cosine` and `linear` fall to final_lr_fraction * learning_rate at
      the last step; `wsd` (warm-up, stable, decay) stays and falls linearly over the last decay_fraction of the steps;
      `constant` stays.
    weight_decay: decoupled, on matrices and embeddings alone (not on norms and biases), times the learning rate.
    max_grad_norm: global-norm clipping; 0 switches it off.
    ema_decay: an exponential moving average of the parameters beside them; 0 switches it off.
    """

    name: Literal["adamw", "lion", "adafactor", "muon"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_steps: int = 100
    final_lr_fraction: float = 0.1
    decay_fraction: float = 0.2
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0

    def __post_init__(self):
        for name in ("b1", "b2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} must be in [0, 1), not {getattr(self, name)}.")
        for name in ("learning_rate", "eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"optimizer.{name} must be positive, not {getattr(self, name)}.")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} must not be negative, not {getattr(self, name)}.")
        for name in ("final_lr_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optimizer.{name} must be in [0, 1], not {getattr(self, name)}.")


def make_schedule(config: OptimizerConfig, num_train_steps: int) -> Schedule:
    """Step (the number of updates before this one) -> learning rate, f32.

    Warm-up step s has rate learning_rate * (s + 1) / warmup_steps, so that the first update is not wasted.
    """

    def decay(progress):
        if config.schedule == "cosine":
            falling = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        elif config.schedule == "linear":
            falling = 1 - progress
        elif config.schedule == "wsd":
            falling = jnp.minimum(1.0, (1 - progress) / max(config.decay_fraction, 1e-9))
        else:
            return 1.0
        return config.final_lr_fraction + (1 - config.final_lr_fraction) * falling

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        warm = jnp.minimum(1.0, (step + 1) / max(config.warmup_steps, 1))
        length = max(num_train_steps - config.warmup_steps, 1)
        progress = jnp.clip((step - config.warmup_steps) / length, 0.0, 1.0)
        return config.learning_rate * warm * decay(progress)

    return schedule


def make_optimizer(config: OptimizerConfig, num_train_steps: int) -> optax.GradientTransformation:
    """Clipping, update rule, decoupled decay, schedule and the optional average, as one optax transformation."""
    schedule = make_schedule(config, num_train_steps)
    steps = [optax.clip_by_global_norm(config.max_grad_norm)] if config.max_grad_norm else []
    steps.append(_RULES[config.name](config, schedule))
    if config.ema_decay:
        steps.append(params_ema(config.ema_decay))
    return optax.chain(*steps)


def _adamw(config: OptimizerConfig, schedule: Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=decay_mask
    )


def _lion(config: OptimizerConfig, schedule: Schedule) -> optax.GradientTransformation:
    return optax.lion(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=decay_mask)


def _adafactor(config: OptimizerConfig, schedule: Schedule) -> optax.GradientTransformation:
    # optax.adafactor's own decay is not multiplied by the learning rate, and its schedule comes before the momentum:
    # these are its parts in the order of the other rules (Shazeer & Stern 2018, arXiv:1804.04235).
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=0.8, min_dim_size_to_factor=128),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


def _muon(config: OptimizerConfig, schedule: Schedule) -> optax.GradientTransformation:
    # Muon for the matrices inside the layers, AdamW for embeddings, head, norms and biases. With consistent_rms = 0.2 an
    # update has AdamW's typical size, so that both share one learning rate (Liu et al. 2025, arXiv:2502.16982).
    def labels(params):
        return jax.tree.map(lambda d: "adamw" if d is None else "muon", matrix_dims(params), is_leaf=_is_dims)

    muon = optax.contrib.muon(
        schedule,
        beta=0.95,
        weight_decay=config.weight_decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=matrix_dims,
    )
    return optax.partition({"muon": muon, "adamw": _adamw(config, schedule)}, labels)


_RULES = {"adamw": _adamw, "lion": _lion, "adafactor": _adafactor, "muon": _muon}


def matrix_dims(params: Params) -> Any:
    """Which axes of each kernel inside the stacked layers are its inputs and outputs; None on every other leaf."""

    def dims(path, leaf):
        name = tree.path_name(path)
        if not (name.startswith("layers/") and name.endswith("/kernel")):
            return None
        inputs = kernel_input_axes(name, leaf.ndim)
        outputs = [axis for axis in range(1, leaf.ndim) if axis not in inputs]
        return optax.contrib.MuonDimensionNumbers(inputs, tuple(outputs))

    return jax.tree_util.tree_map_with_path(dims, params)


def _is_dims(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, optax.contrib.MuonDimensionNumbers)


def decay_mask(params: Params) -> Any:
    """True on kernels and embedding tables, the leaves that weight decay touches."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: tree.path_name(path).rsplit("/", 1)[-1] in ("kernel", "embedding"), params
    )


class EmaState(NamedTuple):
    """ema: the running average of the parameters, f32, in their structure."""

    ema: Params


def params_ema(decay: float) -> optax.GradientTransformation:
    """Passes updates through and averages the parameters they lead to: ema <- decay * ema + (1 - decay) * params."""

    def init(params):
        return EmaState(jax.tree.map(jnp.array, params))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("params_ema needs the parameters: call update(updates, state, params).")
        after = optax.apply_updates(params, updates)
        return updates, EmaState(jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, after))

    return optax.GradientTransformation(init, update)


def ema_params(opt_state: Any) -> Params | None:
    """The averaged parameters in an optimizer state, or None where no average is kept."""
    found = [
        s for s in jax.tree.leaves(opt_state, is_leaf=lambda s: isinstance(s, EmaState)) if isinstance(s, EmaState)
    ]
    return found[0].ema if found else None
