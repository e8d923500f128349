"""A checkpoint of transformers comes in, learns by adapters through SFT, a reward model and PPO, and goes out again."""

import json
import pathlib

import jax
import numpy as np
import pytest

from jaxgpt import partition, tree
from jaxgpt.data.chat import CHAT_TEMPLATES, Message
from jaxgpt.generate import decode
from jaxgpt.generate.samplers import SamplerConfig
from jaxgpt.generate.text import pad_prompts
from jaxgpt.interop.checkpoint import load_hf
from jaxgpt.models import decoder
from jaxgpt.partition import MeshConfig
from jaxgpt.runs.load import LoadedModel, load_model
from jaxgpt.runs.weights import write_weights
from tests.experiments.conftest import command

tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    adapters = {{"rank": 4, "alpha": 8.0}}
    short = {{"batch_size": 8, "num_epochs": 0.0, "num_train_steps": 3, "lora": adapters,
             "optimizer": {{"learning_rate": 0.01, "warmup_steps": 1}}}}
    return ConfigDict({{"stages": {{
        "base": {{"command": "import_hf", "fields": {{"source": {source!r}}}}},
        "sft": {{"command": "sft", "config": "configs/sft.py:lora", "fields": {{
            **short, "init_from": "@base", "data": {{"train": {first!r}, "sequence_length": 96}},
            "samples": {{"num_heldout": 1, "max_new_tokens": 4}}}}}},
        "reward": {{"command": "reward", "config": "configs/reward.py:lora", "fields": {{
            **short, "init_from": "@sft", "data": {{"train": {preferences!r}, "sequence_length": 64}}}}}},
        "ppo": {{"command": "ppo", "config": "configs/ppo.py:lora", "fields": {{
            "init_from": "@sft", "reward_model": "@reward", "require_report_card": False, "lora": adapters,
            "rollout": {{"batch_size": 8, "max_prompt_length": 64, "max_new_tokens": 8}},
            "ppo": {{"num_epochs": 1, "num_minibatches": 1}}, "num_train_steps": 2, "num_eval_prompts": 8,
            "data": {{"train": {first!r}, "holdout": {{"fraction": 0.2}}}}}}}},
        "final": {{"command": "finalize", "fields": {{"init_from": "@ppo"}}}},
        "hf": {{"command": "export_hf", "fields": {{"init_from": "@final"}}}},
    }}}})
"""
SIZES = {
    "vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
}  # fmt: skip
forward = jax.jit(decoder.forward, static_argnums=0)
generate = jax.jit(decode.generate, static_argnums=0, static_argnames=("max_new", "sampler", "eos_ids", "pad_id"))


def write_tokenizer(folder: pathlib.Path) -> None:
    """Byte-level BPE with the special tokens and the template of ChatML; it has fewer ids than the model, as many have."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["first of Ann likes Bob? last of Cid sees Dora? and 6. user assistant"] * 9, trainer)
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    made.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHAT_TEMPLATES["chatml"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def write_llama(folder: pathlib.Path) -> None:
    """A Llama of random bfloat16 numbers, under the names of transformers."""
    embed, mlp, heads, kv_heads, vocab = 16, 24, 16, 8, SIZES["vocab_size"]
    shapes = {
        "model.embed_tokens.weight": (vocab, embed),
        "model.norm.weight": (embed,),
        "lm_head.weight": (vocab, embed),
    }
    for layer in range(SIZES["num_hidden_layers"]):
        of_layer = {
            "self_attn.q_proj": (heads, embed), "self_attn.k_proj": (kv_heads, embed),
            "self_attn.v_proj": (kv_heads, embed), "self_attn.o_proj": (embed, heads), "mlp.gate_proj": (mlp, embed),
            "mlp.up_proj": (mlp, embed), "mlp.down_proj": (embed, mlp), "input_layernorm": (embed,),
            "post_attention_layernorm": (embed,),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    rng = np.random.default_rng(0)
    make = lambda name: np.asarray(("norm" in name) + 0.2 * rng.standard_normal(shapes[name]), jax.numpy.bfloat16)
    tensors = {name: make(name) for name in sorted(shapes)}
    write_weights(
        str(folder), {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in tensors.items()}, tensors.__getitem__
    )
    options = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rope_theta": 10_000.0,
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(SIZES | options))


def one_device():
    return partition.make_mesh(MeshConfig(), devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def root(records, tmp_path_factory) -> pathlib.Path:
    """The finished pipeline, one folder a stage."""
    folder = tmp_path_factory.mktemp("life_cycle")
    source = folder / "llama"
    source.mkdir()
    write_tokenizer(source)
    write_llama(source)
    names = {name: records[name] for name in ("first", "preferences")}
    (folder / "config.py").write_text(CONFIG.format(source=str(source), **names))
    done = command("pipeline", f"--config={folder / 'config.py'}", f"--workdir={folder / 'run'}")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def final(root) -> LoadedModel:
    return load_model(str(root / "final"), one_device())


def logits(config, params) -> np.ndarray:
    tokens = np.random.default_rng(1).integers(0, 300, (2, 24)).astype(np.int32)
    return np.asarray(forward(config, params, tokens))


def test_the_artifact_comes_from_the_checkpoint_and_no_longer_answers_as_it_did(root, final):
    manifest = json.loads((root / "final/manifest.json").read_text())
    stages = [(entry["role"], entry["stage"]) for entry in manifest["lineage"]]
    assert stages == [("init_from", "ppo"), ("init_from", "sft"), ("reward_model", "reward"), ("init_from", "import")]
    assert manifest["source_stage"] == "ppo"
    trained = logits(final.config, final.params)
    for stage in ("base", "sft"):
        before = load_model(str(root / stage), one_device())
        assert before.tokenizer.digest == final.tokenizer.digest
        assert before.template.digest == final.template.digest
        assert np.abs(logits(before.config, before.params) - trained).max() > 1e-3, stage


def test_what_is_exported_is_the_artifact_to_the_bit(root, final):
    config, params = load_hf(str(root / "hf"), one_device())
    ours, theirs = tree.named_leaves(final.params), tree.named_leaves(params)
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        np.testing.assert_array_equal(theirs[name], leaf, err_msg=name)
    np.testing.assert_array_equal(logits(config, params), logits(final.config, final.params))
    source, exported = (
        json.loads((folder / "config.json").read_text()) for folder in (root.parent / "llama", root / "hf")
    )
    assert {name: exported[name] for name in SIZES} == {name: source[name] for name in SIZES}


def test_transformers_opens_it_with_the_same_logits_and_answers_alike(root, final):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "hf")
    tokens = np.random.default_rng(1).integers(0, 300, (2, 24))
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits(final.config, final.params), theirs, atol=1e-4, rtol=0)
    text = "last of Cid sees Dora?"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ours = final.template.encode_prompt(final.tokenizer, [Message("user", text)])
    np.testing.assert_array_equal(prompt["input_ids"][0], ours)
    with torch.no_grad():
        generated = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, len(ours) :].numpy()
    prompts, mask = pad_prompts([ours], final.tokenizer.pad_id, multiple=32)
    out = generate(
        final.config, final.params, prompts, mask, jax.random.key(0), max_new=24, sampler=SamplerConfig(temperature=0.0),
        eos_ids=final.template.stop_ids(final.tokenizer), pad_id=final.tokenizer.pad_id,
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(out.tokens_BR[0, : int(out.lengths_B[0])]), generated)
