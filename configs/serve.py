"""Serving: an OpenAI-compatible HTTP endpoint for what a run has made.

    python -m experiments.serve --config=configs/serve.py --config.init_from=runs/sft [--config.port=8000]

    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \
        -d '{"model": "sft", "prompt": "Once upon a time", "max_tokens": 32}'

The model's name is the folder's unless model_name says another. Up to num_slots responses are written at the same time, each
step of the model serving all of them; docs/serving.md has the limits. Needs pip install -e '.[serve]'.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The fields that differ from experiments.serve.ServeConfig's defaults."""
    return ConfigDict()
