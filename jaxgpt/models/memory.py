"""The least memory that something must take, from shapes alone, so that what can never fit is refused before it is begun."""

import math
import os
from collections.abc import Mapping

import jax

from jaxgpt.models.config import ModelConfig

GIB = 2**30


def num_parameters(cfg: ModelConfig) -> int:
    """Parameters of the matrices and embeddings of a model; norms, biases and adapters are left out."""
    attention = cfg.embed_dim * cfg.head_dim * (2 * cfg.num_heads + 2 * cfg.num_kv_heads)
    mlp = cfg.embed_dim * cfg.mlp_dim * (3 if cfg.gated_mlp else 2)
    tables = cfg.vocab_size * (1 if cfg.tie_embeddings or cfg.head == "scalar" else 2)
    positions = cfg.max_seq_length if cfg.position == "learned" else 0
    return cfg.num_layers * (attention + mlp) + (tables + positions) * cfg.embed_dim


def cache_bytes(cfg: ModelConfig, rows: int, length: int) -> int:
    """Keys and values of a cache with `length` places in each of its rows, at two bytes each."""
    return 2 * 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * rows * length


def total_memory(num_devices: int) -> float:
    """Bytes of all devices of a mesh; on CPU the machines' memory with their swap; infinity where devices do not say."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] * num_devices
    if device.platform != "cpu":
        return math.inf
    return (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") + _swap_bytes()) * jax.process_count()


def _swap_bytes() -> int:
    """Swap space of this machine, where it is Linux; 0 elsewhere."""
    if not os.path.exists("/proc/meminfo"):
        return 0
    with open("/proc/meminfo", encoding="ascii") as file:
        return sum(1024 * int(line.split()[1]) for line in file if line.startswith("SwapTotal:"))


def check_fits(needs: Mapping[str, int], num_devices: int) -> None:
    """ValueError with the numbers where `needs`, the bytes of "what, with its field", are more than all devices have.

    needs: lower bounds; what nearly fits is for the run itself to find out.
    """
    there = total_memory(num_devices)
    if sum(needs.values()) > there:
        what, most = max(needs.items(), key=lambda item: item[1])
        rest = sum(needs.values()) - most
        others = f", and all else {rest / GIB:,.1f} GiB" if rest else ""
        raise ValueError(
            f"{what} take at least {most / GIB:,.1f} GiB{others}, but there are "
            f"{there / GIB:,.1f} GiB of memory on {num_devices} device(s)."
        )
