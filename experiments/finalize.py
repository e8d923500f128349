"""Finalize: adapters merged, checkpoints averaged, weights cast or quantized, and an artifact that is proven when read back.

    python -m experiments.finalize --config=configs/finalize.py:int8 --workdir=runs/final --config.init_from=runs/sft

What it makes is accepted wherever a workdir is: as init_from of every stage, and a reward model as reward_model. See
configs/finalize.py for presets, jaxgpt/finalize/config.py for all fields.
"""

from experiments.shared import cli
from jaxgpt.finalize.config import FinalizeConfig
from jaxgpt.finalize.publish import finished, publish
from jaxgpt.reporting.model_card import model_card, summary


def main(config: FinalizeConfig, workdir: str) -> None:
    """Make the artifact in `workdir`, or say that it is there."""
    config.check_complete()
    workdir = workdir.rstrip("/")
    manifest = finished(config, workdir)
    if manifest is not None:
        print(f"{workdir} is finished: {summary(manifest)}.")
        return
    manifest = publish(config, workdir, lambda manifest, resolved: model_card(workdir, manifest, resolved))
    print(f"Published {workdir}: {summary(manifest)}.")


if __name__ == "__main__":
    cli.run(main, FinalizeConfig, default_config="configs/finalize.py")
