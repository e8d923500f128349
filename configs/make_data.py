"""Data sets that are made on the spot.

    python -m experiments.make_data --config=configs/make_data.py:PRESET --workdir=runs/data

Presets:

  stdlib       6 MB of docstrings, language reference and source of this Python's library, and questions about it. The
               default.
  arithmetic   sums of two numbers below 100, and demonstrations by someone who forgets carries.
"""

from ml_collections import ConfigDict


def get_config(preset: str = "stdlib") -> ConfigDict:
    """The fields that differ from experiments.make_data.Config's defaults."""
    if preset not in ("stdlib", "arithmetic"):
        raise ValueError(f"configs/make_data.py has no preset {preset!r}; there are stdlib and arithmetic.")
    return ConfigDict({"kind": preset})
