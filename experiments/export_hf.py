"""Export: a trained model as a checkpoint that AutoTokenizer and AutoModelForCausalLM of Hugging Face transformers open.

    python -m experiments.export_hf --config.init_from=runs/sft --workdir=sft-hf [--config.dtype=bfloat16]

A reward model becomes a sequence classifier with one label. See configs/export_hf.py.
"""

import dataclasses
import os

import jax

from experiments.shared import cli
from jaxgpt import partition
from jaxgpt.interop.checkpoint import Dtype, export_checkpoint, read_config
from jaxgpt.partition import MeshConfig
from jaxgpt.runs import manifest as manifests
from jaxgpt.runs import workdir as workdirs
from jaxgpt.runs.load import load_plain, read_run


@dataclasses.dataclass(frozen=True)
class Config:
    """init_from: the workdir of a finished run, or an artifact. dtype: of the checkpoint's weights."""

    init_from: str = ""
    dtype: Dtype = "float32"
    mesh: MeshConfig = MeshConfig()


def main(config: Config, workdir: str) -> None:
    """Export the model to `workdir`; nothing to do where it is there already."""
    if not config.init_from:
        raise ValueError("init_from is required: --config.init_from=DIR, the workdir of a finished run or an artifact.")
    if jax.process_count() > 1:
        raise ValueError("An export runs in one process; start it without a launcher.")
    run = read_run(config.init_from)
    source = run.manifest()
    manifest = manifests.base_manifest(
        stage="export",
        dtype=config.dtype,
        parents={"init_from": {"path": os.path.abspath(run.workdir), "digest": run.digest()}},
    )
    done = manifests.read_manifest(workdir)
    if done is not None:
        if (done["stage"], done.get("parents"), done.get("dtype")) != ("export", manifest["parents"], config.dtype):
            raise ValueError(f"--workdir={workdir} holds another model; use another folder for this one.")
        print(f"{workdir} is finished: {config.init_from} as {read_config(workdir)['architectures'][0]}.")
        return
    with workdirs.new_folder(workdir) as folder:
        model, params = load_plain(run, partition.make_mesh(config.mesh))
        export_checkpoint(
            model, params, run.tokenizer, run.template, folder, config.dtype,
            reward_shift=source.get("reward_shift", 0.0),
            notes={"jaxgpt": {"digest": run.digest(), "stage": source["stage"]}},
        )  # fmt: skip
        manifests.write_manifest(folder, manifest)
    print(f"{workdir}: {config.init_from} as {read_config(workdir)['architectures'][0]}.")


if __name__ == "__main__":
    cli.run(main, Config, default_config="configs/export_hf.py")
