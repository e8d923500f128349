"""Tokenizer training: text in, tokenizer.model out, with the bytes per token it reaches on held-out text.

    python -m experiments.tokenizer --config=configs/tokenizer.py --workdir=runs/tokenizer --config.data.train=PATH

See configs/tokenizer.py for presets, jaxgpt/data/sentencepiece_tokenizer.py for the fields of `tokenizer`.
"""

import dataclasses
import os
from collections.abc import Iterator

from experiments.shared import cli
from jaxgpt.config import to_dict
from jaxgpt.data.config import HoldoutConfig
from jaxgpt.data.sentencepiece_tokenizer import TokenizerConfig, train_tokenizer
from jaxgpt.data.sources import check_fields, content_digest, is_held_out, read_texts, resolve_paths
from jaxgpt.data.tokenizer import bytes_per_token
from jaxgpt.runs import manifest as manifests
from jaxgpt.runs import workdir as workdirs


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """The text, in the fields of jaxgpt.data.config.DataConfig of the same names."""

    train: str | tuple[str, ...] = ()
    fields: dict[str, str] = dataclasses.field(default_factory=dict)
    text_separator: str | None = None
    holdout: HoldoutConfig = HoldoutConfig()


@dataclasses.dataclass(frozen=True)
class Config:
    """One tokenizer."""

    tokenizer: TokenizerConfig = TokenizerConfig()
    data: CorpusConfig = CorpusConfig()

    def __post_init__(self):
        check_fields(self.data.fields, ("text",))

    def check_complete(self) -> None:
        """ValueError where there is no text."""
        if not self.data.train:
            raise ValueError("data.train is empty; give the text with --config.data.train=PATH.")


def main(config: Config, workdir: str) -> None:
    """Train the tokenizer of `workdir`; nothing to do where it is there already."""
    with workdirs.lock(workdir):
        workdirs.check_same(workdir, to_dict(config))
        done = manifests.read_manifest(workdir)
        if done:
            print(f"{workdir} is finished: {_summary(done)}.")
            return
        config.check_complete()
        paths = resolve_paths(config.data.train, "data.train")
        tokenizer = train_tokenizer(texts(paths, config.data, held_out=False), config.tokenizer)
        fraction = config.data.holdout.fraction
        metric = bytes_per_token(tokenizer, texts(paths, config.data, held_out=fraction > 0))
        workdirs.write_config(workdir, to_dict(config))
        tokenizer.save(workdir)
        metrics = {"eval/bytes_per_token": metric}
        log = workdirs.JsonLog(os.path.join(workdir, "metrics.jsonl"))
        log.truncate_after(-1)  # of a run that was killed before its manifest
        log.append(0, metrics)
        manifest = manifests.base_manifest(
            stage="tokenizer", tokenizer_digest=tokenizer.digest, special_ids=tokenizer.special_ids,
            vocab_size=tokenizer.vocab_size, data_fingerprint=content_digest(paths), parents={}, final_metrics=metrics,
        )  # fmt: skip
        manifests.write_manifest(workdir, manifest)
        print(f"Finished: {_summary(manifest)}.")


def texts(paths: list[str], config: CorpusConfig, *, held_out: bool) -> Iterator[str]:
    """The texts of one side of the held-out split."""
    holdout = config.holdout
    for path in paths:
        for document in read_texts(path, fields=config.fields, text_separator=config.text_separator):
            if holdout.by == "hash":
                if is_held_out(document.text, holdout.fraction) == held_out:
                    yield document.text
            else:
                cut = int(len(document.text) * (1 - holdout.fraction))
                yield document.text[cut:] if held_out else document.text[:cut]


def _summary(manifest: dict) -> str:
    metric = manifest["final_metrics"]["eval/bytes_per_token"]
    return f"{manifest['vocab_size']} pieces, {metric:.3f} bytes per token on held-out text"


if __name__ == "__main__":
    cli.run(main, Config, default_config="configs/tokenizer.py")
