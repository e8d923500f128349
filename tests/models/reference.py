"""An independent decoder in float64 numpy, one sequence at a time: the definition that the shipped one is held to."""

import math

import numpy as np

from jaxgpt.models.config import ModelConfig


def norm(x, p, cfg, kind=None):
    kind = kind or cfg.norm
    if kind == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps)
    y = y * (1 + p["scale"] if cfg.norm_scale_offset else p["scale"])
    return y + p.get("bias", 0.0)


def act(x, name):
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "relu_squared":
        return np.maximum(x, 0) ** 2
    if name == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def rotate(x_TH, theta):
    """RoPE by complex multiplication of the pairs (i, i + H/2)."""
    length, dim = x_TH.shape
    angle = np.arange(length)[:, None] * theta ** (-np.arange(0, dim, 2) / dim)
    z = (x_TH[:, : dim // 2] + 1j * x_TH[:, dim // 2 :]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=-1)


def attend(x, p, cfg: ModelConfig, window):
    length = len(x)
    project = lambda name: (
        np.einsum("td,dnh->nth", x, p[name]["kernel"]) + (p[name]["bias"][:, None] if "bias" in p[name] else 0.0)
    )
    q, k, v = project("query"), project("key"), project("value")
    if cfg.qk_norm:
        q, k = norm(q, p["query_norm"], cfg, "rmsnorm"), norm(k, p["key_norm"], cfg, "rmsnorm")
    out = np.zeros((length, cfg.embed_dim))
    for n in range(cfg.num_heads):
        g = n // (cfg.num_heads // cfg.num_kv_heads)
        qn, kn = (
            (rotate(q[n], cfg.rope.theta), rotate(k[g], cfg.rope.theta)) if cfg.position == "rope" else (q[n], k[g])
        )
        for t in range(length):
            first = 0 if window is None else max(0, t - window + 1)
            scores = kn[first : t + 1] @ qn[t] * cfg.query_scale
            if cfg.attention_softcap:
                scores = cfg.attention_softcap * np.tanh(scores / cfg.attention_softcap)
            if cfg.position == "alibi":
                scores = scores - 2.0 ** (-8 * (n + 1) / cfg.num_heads) * (t - np.arange(first, t + 1))
            weights = np.exp(scores - scores.max())
            out[t] += weights / weights.sum() @ v[g][first : t + 1] @ p["out"]["kernel"][n]
    return out + p["out"].get("bias", 0.0)


def mlp(x, p, cfg):
    up = x @ p["up"]["kernel"] + p["up"].get("bias", 0.0)
    if cfg.gated_mlp:
        hidden = act(x @ p["gate"]["kernel"] + p["gate"].get("bias", 0.0), cfg.activation) * up
    else:
        hidden = act(up, cfg.activation)
    return hidden @ p["down"]["kernel"] + p["down"].get("bias", 0.0)


def forward(params, tokens, cfg: ModelConfig):
    """Logits [T, V] of one sequence of token ids."""
    to64 = lambda t: {k: to64(v) for k, v in t.items()} if isinstance(t, dict) else np.asarray(t, np.float64)
    params = to64(params)
    x = params["embedder"]["embedding"][tokens]
    if cfg.scale_embeddings:
        x = x * math.sqrt(cfg.embed_dim)
    if cfg.position == "learned":
        x = x + params["positions"]["embedding"][: len(tokens)]
    if cfg.position == "sinusoidal":
        half = cfg.embed_dim // 2
        angle = np.arange(len(tokens))[:, None] / 10_000 ** (np.arange(half) / (half - 1))
        x = x + np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)
    for i in range(cfg.num_layers):
        pick = lambda t: {k: pick(v) for k, v in t.items()} if isinstance(t, dict) else t[i]  # noqa: B023
        p = pick(params["layers"])
        kind = cfg.window_pattern[i % len(cfg.window_pattern)]
        window = cfg.sliding_window if kind == "local" else None
        for name, sub in (("attention", lambda y: attend(y, p, cfg, window)), ("mlp", lambda y: mlp(y, p["mlp"], cfg))):  # noqa: B023
            y = x if cfg.norm_position == "post" else norm(x, p[f"{name}_norm"], cfg)
            y = sub(y)
            if cfg.norm_position == "sandwich":
                y = norm(y, p[f"{name}_post_norm"], cfg)
            x = x + y
            if cfg.norm_position == "post":
                x = norm(x, p[f"{name}_norm"], cfg)
    if cfg.norm_position != "post":
        x = norm(x, params["final_norm"], cfg)
    table = params["embedder"]["embedding"].T if cfg.tie_embeddings else params["head"]["kernel"]
    logits = x @ table
    return cfg.final_softcap * np.tanh(logits / cfg.final_softcap) if cfg.final_softcap else logits
