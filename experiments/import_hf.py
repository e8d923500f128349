"""Import: a checkpoint of Hugging Face transformers becomes an artifact that every stage starts from.

    python -m experiments.import_hf --config.source=Qwen3-0.6B --workdir=runs/qwen3
    python -m experiments.sft --config.init_from=runs/qwen3 ...

See configs/import_hf.py.
"""

import dataclasses
import os
from typing import Literal

import jax

from experiments.shared import cli
from jaxgpt.interop.checkpoint import import_checkpoint
from jaxgpt.runs import manifest as manifests
from jaxgpt.runs import workdir as workdirs


@dataclasses.dataclass(frozen=True)
class Config:
    """source: a folder with config.json, safetensors and tokenizer.json. dtype: of the artifact's weights; `auto` keeps what
    is stored.
    """

    source: str = ""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


def main(config: Config, workdir: str) -> None:
    """Import the checkpoint into `workdir`; nothing to do where it is there already."""
    if not config.source:
        raise ValueError("source is required: --config.source=DIR, the folder of a checkpoint of transformers.")
    if jax.process_count() > 1:
        raise ValueError("An import runs in one process; start it without a launcher.")
    manifest, source = manifests.read_manifest(workdir), os.path.abspath(config.source)
    if manifest is None:
        with workdirs.new_folder(workdir) as folder:
            manifest = import_checkpoint(source, folder, config.dtype)
        print(f"{workdir}: a {manifest['family']} model from {source}.")
        if manifest.get("untied"):
            print(
                "config.json says tie_word_embeddings, but lm_head.weight differs from the embedding: the model has been "
                "imported untied, with the head that is stored (model.tie_embeddings=False)."
            )
        return
    if manifest["stage"] != "import" or (manifest["source"], manifest["dtype"]) != (source, config.dtype):
        raise ValueError(f"--workdir={workdir} holds something else; use another folder for {source}.")
    print(f"{workdir} is finished: a {manifest['family']} model from {source}.")


if __name__ == "__main__":
    cli.run(main, Config, default_config="configs/import_hf.py")
