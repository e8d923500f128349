"""Values that no run can have: each is refused when the config is built, in a sentence that names the field."""

import math

import pytest

from experiments.benchmark import BenchmarkConfig
from experiments.chat import ChatConfig
from experiments.dpo import Config as DPOConfig
from experiments.generate import GenerateConfig
from experiments.make_data import Config as DataFilesConfig
from experiments.reward import Config as RewardConfig
from experiments.serve import ServeConfig
from experiments.sft import Config as SFTConfig
from experiments.tokenizer import Config as TokenizerConfig
from jaxgpt import config, partition
from jaxgpt.evaluation.config import EvaluateConfig
from jaxgpt.models import memory
from jaxgpt.models.config import ModelConfig
from jaxgpt.models.memory import check_fits, num_parameters
from jaxgpt.partition import MeshConfig
from jaxgpt.rl.config import RLConfig
from jaxgpt.train.config import PretrainConfig, check_mesh
from jaxgpt.tree import count

ENDLESS = (math.inf, -math.inf, math.nan, 1e39)
BOUNDED = [
    (PretrainConfig, "model.norm_eps", (-1.0, 0.0)), (PretrainConfig, "model.final_softcap", (0.0, -1.0)),
    (PretrainConfig, "model.attention_softcap", (0.0,)), (PretrainConfig, "model.head_dim", (-8,)),
    (PretrainConfig, "model.mlp_dim", (-5,)), (PretrainConfig, "model.vocab_size", (-1,)),
    (PretrainConfig, "model.num_kv_heads", (-1,)), (PretrainConfig, "model.query_scale", (-1.0,)),
    (PretrainConfig, "model.sliding_window", (0,)), (PretrainConfig, "model.rope.original_max_seq_length", (0,)),
    (PretrainConfig, "samples.num_heldout", (-1,)), (PretrainConfig, "samples.max_new_tokens", (0,)),
    (PretrainConfig, "nonfinite.max_skipped", (-1,)), (PretrainConfig, "profile.num_steps", (-1,)),
    (PretrainConfig, "seed", (-1, 2**32, 2**64)), (PretrainConfig, "num_train_steps", (0, -1, 2**64)),
    (PretrainConfig, "num_epochs", (-1.0,)), (PretrainConfig, "data.num_workers", (-1, 10**9)),
    (PretrainConfig, "data.prefetch", (10**9,)), (PretrainConfig, "mesh.expert", (2, -1)),
    (SFTConfig, "lora.alpha", (0.0, -1.0)), (DPOConfig, "dpo.beta", (0.0,)), (RewardConfig, "reward.margin", (-1.0,)),
    (RLConfig, "num_eval_prompts", (-1,)), (BenchmarkConfig, "num_steps", (0,)), (BenchmarkConfig, "mean_length", (-1,)),
    (ChatConfig, "max_new_tokens", (-1,)), (ChatConfig, "mesh.context", (2,)), (GenerateConfig, "mesh.context", (2,)),
    (ServeConfig, "mesh.context", (2,)), (DataFilesConfig, "largest", (0,)), (DataFilesConfig, "forget_carry", (2.0,)),
    *((PretrainConfig, f"optimizer.{name}", ENDLESS) for name in ("learning_rate", "weight_decay", "eps", "max_grad_norm")),
    (SFTConfig, "lora.alpha", ENDLESS), (SFTConfig, "num_epochs", ENDLESS), (DPOConfig, "dpo.beta", ENDLESS),
    (RLConfig, "ppo.kl_coef", ENDLESS), (RLConfig, "ppo.missing_eos_penalty", ENDLESS),
    (PretrainConfig, "model.rope.theta", ENDLESS), (ServeConfig, "grace_seconds", ENDLESS),
]  # fmt: skip


def nested(path: str, value) -> dict:
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


@pytest.mark.parametrize(
    ("cls", "path", "value"), [(cls, path, value) for cls, path, values in BOUNDED for value in values]
)
def test_a_value_out_of_bounds_names_the_field(cls, path, value):
    with pytest.raises(ValueError, match=".") as error:
        config.build(cls, nested(path, value))
    assert str(error.value).startswith(path)
    assert "\n" not in str(error.value)


def test_an_integer_of_thousands_of_digits_is_not_printed():
    for value in (10**5000, "9" * 5000):
        with pytest.raises(ValueError, match="seed must be an integer") as error:
            config.build(PretrainConfig, {"seed": value})
        assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("cls", "known"),
    [(PretrainConfig, "text"), (SFTConfig, "prompt"), (RewardConfig, "chosen"), (DPOConfig, "rejected"),
     (RLConfig, "prompt"), (TokenizerConfig, "text")],
)  # fmt: skip
def test_a_mapping_of_a_field_that_no_record_has_is_refused(cls, known):
    packing = {} if cls is TokenizerConfig else {"packing": "none"}
    typo = known[:-2] + known[-1] + known[-2]
    assert config.build(cls, {"data": {**packing, "fields": {known: "there"}}}).data.fields == {known: "there"}
    with pytest.raises(ValueError, match=rf"data\.fields maps '{typo}'.*the nearest is '{known}'"):
        config.build(cls, {"data": {**packing, "fields": {typo: "there"}}})
    with pytest.raises(ValueError, match=rf"write {{'{known}': 'zzz'}}"):
        config.build(cls, {"data": {**packing, "fields": {"zzz": known}}})


def test_a_mapping_of_a_tasks_field_that_no_record_has_is_refused():
    task = {"kind": "generation", "path": "x.jsonl", "fields": {"promt": "question"}}
    with pytest.raises(ValueError, match=r"tasks\.sums\.fields maps 'promt'.*'prompt'"):
        config.build(EvaluateConfig, {"tasks": {"sums": task}})


def test_gradient_accumulation_that_does_not_divide_a_minibatch_is_refused():
    sizes = {"rollout": {"batch_size": 24}, "ppo": {"num_minibatches": 4}}
    assert config.build(RLConfig, sizes | {"gradient_accumulation_steps": 3}).rows_at_a_time == 2
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=4 .*24 / 4 = 6"):
        config.build(RLConfig, sizes | {"gradient_accumulation_steps": 4})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"batch_size": 10**9}, "batch_size=1000000000"),
        ({"batch_size": 10**9, "gradient_accumulation_steps": 10**9}, "batch_size=1000000000"),
        ({"model": {"num_layers": 10**6, "vocab_size": 300}}, "model.num_layers=1000000"),
        ({"model": {"embed_dim": 10**7, "vocab_size": 300}}, "model.embed_dim=10000000"),
        ({"model": {"vocab_size": 10**12}}, "parameters"),
    ],
)
def test_what_can_never_fit_is_refused_with_the_numbers(fields, words):
    made = config.build(PretrainConfig, fields)
    mesh = partition.make_mesh(MeshConfig())
    with pytest.raises(ValueError, match=rf"{words}.*at least [\d,.]+ GiB.*, but there are [\d,.]+ GiB"):
        check_mesh(made, made.model, mesh)


def test_what_is_only_sampled_from_needs_no_gradients(monkeypatch):
    fields = {"model": {"num_layers": 32, "embed_dim": 4096, "mlp_dim": 11_008, "num_heads": 32, "vocab_size": 32_000}}
    made, mesh = config.build(PretrainConfig, fields), partition.make_mesh(MeshConfig())
    bytes_of_weights = 4 * num_parameters(made.model)
    monkeypatch.setattr(memory, "total_memory", lambda num_devices: 1.2 * bytes_of_weights)
    check_mesh(made, made.model, mesh, is_trained=False)
    with pytest.raises(ValueError, match="parameters and gradients"):
        check_mesh(made, made.model, mesh)


def test_estimates_are_lower_bounds_that_come_close():
    import jax

    from jaxgpt.models import decoder

    for fields in ({}, {"gated_mlp": False, "tie_embeddings": False, "position": "learned"}, {"num_kv_heads": 1}):
        model = config.build(ModelConfig, {"vocab_size": 500, **fields})
        shapes = jax.eval_shape(lambda model=model: partition.unbox(decoder.init_params(model, jax.random.key(0))))
        true = count(shapes)
        assert 0.98 * true < num_parameters(model) <= true
    check_fits({"Little": 1000}, 1)
