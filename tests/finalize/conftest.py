"""Finished runs of a tiny model, written by hand: random parameters, a real tokenizer, real checkpoints and manifests."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import partition
from jaxgpt.config import to_dict
from jaxgpt.data.chat import ChatTemplate
from jaxgpt.data.sentencepiece_tokenizer import TokenizerConfig, train_tokenizer
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig
from jaxgpt.partition import MeshConfig
from jaxgpt.rl.advantages import init_moments
from jaxgpt.rl.step import RLState
from jaxgpt.runs import manifest as manifests
from jaxgpt.runs import workdir as workdirs
from jaxgpt.runs.checkpoint import CheckpointConfig, Checkpointer
from jaxgpt.train.optimizer import OptimizerConfig, make_optimizer
from jaxgpt.types import TrainState

TEXT = "\n\n".join(f"Ann sees Bob and {i % 7} of {i % 5}." for i in range(60))


def one_device():
    return partition.make_mesh(MeshConfig(), devices=jax.devices()[:1])


def random_params(model: ModelConfig, seed: int) -> dict:
    """Parameters as a fresh model has them, but with norms and biases that are not all alike."""
    init = jax.jit(lambda rng: partition.unbox(decoder.init_params(model, rng)))
    params = init(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.02 * rng.standard_normal(x.shape).astype(np.float32), params)


class Maker:
    """Writes runs below a folder."""

    def __init__(self, root: pathlib.Path, tokenizer: Tokenizer):
        self.root, self.tokenizer = root, tokenizer
        self.text = root / "held_out.txt"
        self.text.write_text(TEXT)
        self.model = ModelConfig(
            vocab_size=tokenizer.vocab_size, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=24,
            max_seq_length=64, qkv_bias=True, tie_embeddings=False,
        )  # fmt: skip

    def __call__(
        self, name: str, checkpoints: list[dict], *, model=None, stage="pretrain", parent=None, template="", ema=False,
        tokenizer=None, policy=False, **manifest,
    ) -> pathlib.Path:  # fmt: skip
        """A finished run with a checkpoint of each of the given parameters; with ema its average is half of them."""
        folder, model, tokenizer = self.root / name, model or self.model, tokenizer or self.tokenizer
        folder.mkdir()
        data = {"eval": str(self.text), "text_separator": "\n\n", "sequence_length": 32, "packing": "best_fit"}
        config = {"model": to_dict(model), "init_from": str(parent or ""), "data": data, "batch_size": 8}
        workdirs.write_config(str(folder), config)
        tokenizer.save(str(folder))
        chat = ChatTemplate.from_config(template) if template else None
        if chat is not None:
            chat.save(str(folder))
        optimizer = make_optimizer(OptimizerConfig(ema_decay=0.5 if ema else 0.0), 10)
        with Checkpointer(str(folder / "checkpoints"), CheckpointConfig(max_to_keep=9, async_save=False)) as saver:
            for step, params in enumerate(checkpoints, 1):
                opt_state = optimizer.init(jax.tree.map(lambda x: x / 2, params))
                state = TrainState(jnp.int32(step), params, opt_state, jax.random.key(0))
                critic = state.replace(params=jax.tree.map(jnp.ones_like, params)) if stage == "ppo" else None
                whole = state
                if policy:
                    whole = RLState(state.step, state, critic, jnp.float32(0), init_moments(), jax.random.key(0))
                sources = {"init_from": self.digest(parent)} if parent else {}
                saver.save(step, whole, {"sources": sources}, None)
        parents = {"init_from": {"path": str(parent), "digest": self.digest(parent)}} if parent else {}
        content = manifests.base_manifest(
            stage=stage, tokenizer_digest=tokenizer.digest, chat_template_digest=chat.digest if chat else None,
            special_ids=tokenizer.special_ids, vocab_size=tokenizer.vocab_size, parents=parents, step=len(checkpoints),
            final_metrics={"eval/loss": 5.5, "train/loss": 5.25, "train/grad_norm": 1.0}, data_fingerprint="f" * 64,
            **manifest,
        )  # fmt: skip
        manifests.write_manifest(str(folder), content)
        return folder

    @staticmethod
    def digest(folder) -> str:
        return manifests.manifest_digest(json.loads((pathlib.Path(folder) / "manifest.json").read_text()))


@pytest.fixture(scope="session")
def make(tmp_path_factory) -> Maker:
    config = TokenizerConfig(model_type="char", vocab_size=400)
    return Maker(tmp_path_factory.mktemp("runs"), train_tokenizer([TEXT], config))


@pytest.fixture(scope="session")
def pretrained(make) -> pathlib.Path:
    """A run with three checkpoints and the optimizer's average."""
    return make("pretrained", [random_params(make.model, seed) for seed in range(3)], ema=True)
