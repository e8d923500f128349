"""A tiny model, and what it would generate: full forward passes over the growing sequence, one row at a time."""

import functools

import jax
import numpy as np

from jaxgpt import partition
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig

CFG = ModelConfig(
    vocab_size=17,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    max_seq_length=32,
    init="fan_in",
    dtype="float32",
    scan_layers=True,
    tie_embeddings=False,  # tied and untrained, a model repeats its last token
)


@functools.cache
def params(cfg=CFG):
    return jax.jit(lambda: partition.unbox(decoder.init_params(cfg, jax.random.key(0))))()


@functools.cache
def full_forward(cfg=CFG):
    return jax.jit(functools.partial(decoder.forward, cfg))


def logits_after(sequence, cfg=CFG):
    """Float64 logits of the token after `sequence`, from one forward pass without cache or padding before it."""
    tokens = np.zeros((1, 16), np.int32)
    tokens[0, : len(sequence)] = sequence
    return np.asarray(full_forward(cfg)(params(cfg), tokens), np.float64)[0, len(sequence) - 1]


def greedy_reference(prompt, steps, eos=(), cfg=CFG, penalty=1.0):
    sequence = list(prompt)
    while len(sequence) < len(prompt) + steps:
        z = logits_after(sequence, cfg)
        for token in set(sequence):
            z[token] = z[token] * penalty if z[token] < 0 else z[token] / penalty
        sequence.append(int(np.argmax(z)))
        if sequence[-1] in eos:
            break
    return sequence[len(prompt) :]
