"""The field that a mistyped or misplaced one is taken for, in the configs of the commands themselves."""

import pytest

from experiments.generate import GenerateConfig
from experiments.sft import Config as SFTConfig
from jaxgpt import config
from jaxgpt.rl.config import RLConfig
from jaxgpt.train.config import PretrainConfig

CASES = [
    (PretrainConfig, "learning_rate", "optimizer.learning_rate"),
    (PretrainConfig, "lr", "optimizer.learning_rate"),
    (PretrainConfig, "optimizer.lr", "optimizer.learning_rate"),
    (PretrainConfig, "num_layers", "model.num_layers"),
    (PretrainConfig, "n_layer", "model.num_layers"),
    (PretrainConfig, "hidden_size", "model.embed_dim"),
    (PretrainConfig, "dtype", "model.dtype"),
    (SFTConfig, "dtype", "model.dtype"),
    (PretrainConfig, "warmup", "optimizer.warmup_steps"),
    (PretrainConfig, "warmup_step", "optimizer.warmup_steps"),
    (PretrainConfig, "steps", "num_train_steps"),
    (PretrainConfig, "max_steps", "num_train_steps"),
    (PretrainConfig, "epochs", "num_epochs"),
    (PretrainConfig, "bs", "batch_size"),
    (PretrainConfig, "train_data", "data.train"),
    (PretrainConfig, "data_train", "data.train"),
    (PretrainConfig, "train", "data.train"),
    (PretrainConfig, "tokenizer", "data.tokenizer"),
    (PretrainConfig, "seq_len", "data.sequence_length"),
    (PretrainConfig, "sequence_length", "data.sequence_length"),
    (PretrainConfig, "grad_clip", "optimizer.max_grad_norm"),
    (PretrainConfig, "weight_decay", "optimizer.weight_decay"),
    (PretrainConfig, "wd", "optimizer.weight_decay"),
    (PretrainConfig, "max_to_keep", "checkpoint.max_to_keep"),
    (PretrainConfig, "fsdp", "mesh.fsdp"),
    (PretrainConfig, "optimizr.learning_rate", "optimizer.learning_rate"),
    (PretrainConfig, "optimizer.learnig_rate", "optimizer.learning_rate"),
    (PretrainConfig, "model.num_head", "model.num_heads"),
    (PretrainConfig, "model.optimizer.b1", "optimizer.b1"),
    (PretrainConfig, "model.rope.thet", "model.rope.theta"),
    (PretrainConfig, "theta", "model.rope.theta"),
    (PretrainConfig, "batchsize", "batch_size"),
    (PretrainConfig, "sed", "seed"),
    (PretrainConfig, "dat", "data"),
    (SFTConfig, "rank", "lora.rank"),
    (SFTConfig, "lora_rank", "lora.rank"),
    (SFTConfig, "lora.r", "lora.rank"),
    (SFTConfig, "loss_on", "sft.loss_on"),
    (GenerateConfig, "temperature", "sampler.temperature"),
    (GenerateConfig, "temp", "sampler.temperature"),
    (GenerateConfig, "sampler.tmp", "sampler.temperature"),
    (GenerateConfig, "max_tokens", "max_new_tokens"),
    (GenerateConfig, "top_k", "sampler.top_k"),
    (RLConfig, "learning_rate", "optimizer.learning_rate"),
    (RLConfig, "kl_coef", "ppo.kl_coef"),
    (RLConfig, "temperature", "rollout.temperature"),
    (RLConfig, "max_new_tokens", "rollout.max_new_tokens"),
    (RLConfig, "critic_lr", "critic_optimizer.learning_rate"),
    (RLConfig, "clip_epsilon", "ppo.clip_epsilon"),
]


@pytest.mark.parametrize(("cls", "given", "nearest"), CASES)
def test_the_nearest_field_is_looked_for_in_all_sections(cls, given, nearest):
    values: dict = {}
    with pytest.raises(ValueError, match=".") as error:
        config.override(values, cls, given, "1")
    assert str(error.value) == f"There is no config field {given}; the nearest field is {nearest}."
    assert values == {}
    # The same from a config file.
    *sections, last = given.split(".")
    values = {last: 1}
    for section in reversed(sections):
        values = {section: values}
    with pytest.raises(ValueError, match=f"the nearest field is {nearest}\\.$"):
        config.build(cls, values)
