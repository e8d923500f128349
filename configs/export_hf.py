"""Export: a model trained here as a checkpoint of Hugging Face transformers.

    python -m experiments.export_hf --config=configs/export_hf.py --config.init_from=runs/sft --workdir=sft-hf

AutoTokenizer and AutoModelForCausalLM open the folder and generate the same tokens; jaxgpt/interop/tokenizer.py says where
the two tokenize differently. Options that no family of transformers has (alibi, post-norm, ...) are refused by name.

Costs one pass over the parameters.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The fields that differ from experiments.export_hf.Config's defaults: none."""
    return ConfigDict()
