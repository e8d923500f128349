"""Rotary positions in config.json: rope_theta and rope_scaling of transformers 4, rope_parameters of 5."""

import difflib
import math
from collections.abc import Mapping
from typing import Any

from jaxgpt.models.config import RopeConfig

_SCALINGS: dict[str, Any] = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}


def read_rope(options: Mapping[str, Any]) -> RopeConfig:
    """The RopeConfig of the options of a config.json; ValueError naming what it cannot express."""
    scaling: Mapping[str, Any] = options.get("rope_parameters") or options.get("rope_scaling") or {}
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise ValueError("config.json: rope_parameters differ from layer type to layer type; one for all is supported.")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise unsupported("partial_rotary_factor", scaling["partial_rotary_factor"], 1.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in _SCALINGS:
        nearest = difflib.get_close_matches(str(kind), _SCALINGS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"config.json: rope_type={kind!r} is not one of {', '.join(_SCALINGS)}; the nearest is {nearest!r}."
        )
    fields: dict[str, Any] = {"theta": float(scaling.get("rope_theta") or options.get("rope_theta") or 10_000.0)}
    if kind == "default":
        return RopeConfig(**fields)
    longest = options.get("max_position_embeddings", 0)
    original = options.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
    original = original or longest
    factor = scaling.get("factor") or (longest / original if kind == "yarn" else None)
    if factor is None:
        raise ValueError(f"config.json: rope_scaling has no factor, which rope_type={kind!r} needs.")
    fields["factor"] = float(factor)
    if kind == "llama3":
        fields |= {f: float(scaling[f]) for f in ("low_freq_factor", "high_freq_factor") if f in scaling}
    if kind == "yarn":
        fields |= {f: float(scaling[f]) for f in ("beta_fast", "beta_slow") if scaling.get(f)}
        _check_yarn(scaling, fields["factor"])
    if kind in ("llama3", "yarn"):
        fields["original_max_seq_length"] = original
    return RopeConfig(scaling=_SCALINGS[kind], **fields)


def _check_yarn(scaling: Mapping[str, Any], factor: float) -> None:
    """ValueError where YaRN's temperature or ramp are not those of the paper."""
    if scaling.get("truncate") is False:
        raise unsupported("rope_scaling.truncate", False, True)
    temperature = lambda scale: 0.1 * scale * math.log(factor) + 1.0
    found = scaling.get("attention_factor")
    if found is None and scaling.get("mscale") and scaling.get("mscale_all_dim"):
        found = temperature(scaling["mscale"]) / temperature(scaling["mscale_all_dim"])
    if found is not None and not math.isclose(found, temperature(1.0), rel_tol=1e-6):
        raise unsupported("rope_scaling.attention_factor", found, temperature(1.0))


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """The options that say the same, in the spelling of transformers 4."""
    scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_max_seq_length
    if rope.scaling == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
    return {"rope_theta": rope.theta, "rope_scaling": None if rope.scaling == "none" else scaling}


def unsupported(option: str, value: Any, supported: Any) -> ValueError:
    """The sentence for an option with a value that means something a ModelConfig cannot say."""
    return ValueError(f"config.json: {option}={value!r} is not supported; {supported!r} is.")
