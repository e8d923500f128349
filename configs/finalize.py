"""Finalization: a finished run becomes an artifact to publish, smaller if asked for, and proven.

    python -m experiments.finalize --config=configs/finalize.py:PRESET --workdir=runs/final --config.init_from=runs/sft

Presets:

  float32    the parameters as they are, without what training needed: a third of an AdamW checkpoint. The default.
  bfloat16   half of that.
  int8       weights in 8 bits, one scale per output channel: 3.9 times smaller than float32.
  int4       weights in 4 bits, one scale per 32 inputs: 6.3 times smaller; the loss may rise by 5 %.

Averages, with any preset:

  --config.average.kind=last_k --config.average.k=3      the last checkpoints of the run
  --config.average.kind=ema                              what optimizer.ema_decay kept
  --config.average.kind=soup --config.average.runs=A,B   several runs from one start

The held-out loss before and after is that of the source's own held-out data, or of --config.data.eval=FILE. Costs two
passes over them, seconds for the tiny models; the artifact is not published where the loss rises by more than
max_loss_increase.
"""

from ml_collections import ConfigDict

_PRESETS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "int8"},
    "int4": {"dtype": "int4", "max_loss_increase": 0.05},
}


def get_config(preset: str = "float32") -> ConfigDict:
    """The fields that differ from jaxgpt.finalize.config.FinalizeConfig's defaults."""
    if preset not in _PRESETS:
        raise ValueError(f"configs/finalize.py has no preset {preset!r}; there are {', '.join(_PRESETS)}.")
    return ConfigDict(_PRESETS[preset])
