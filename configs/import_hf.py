"""Import: the checkpoint of a known family (GPT-2, Llama 2 and 3, Mistral, Gemma 1 and 2, Qwen3) as an artifact.

    python -m experiments.import_hf --config=configs/import_hf.py --config.source=FOLDER --workdir=runs/imported

FOLDER holds config.json, model*.safetensors, tokenizer.json and tokenizer_config.json, as `save_pretrained` and the hub
have them. Nothing is downloaded. Logits are those of transformers to 1e-4 in float32.

Costs one pass over the files; one parameter of all layers is in memory at a time.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The fields that differ from experiments.import_hf.Config's defaults: none."""
    return ConfigDict()
