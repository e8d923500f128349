"""Against transformers itself, where it is installed: every family and option, both ways, and the same tokens generated."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from jaxgpt.data.chat import CHAT_TEMPLATES, ChatTemplate, Message
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.generate import decode
from jaxgpt.generate.samplers import SamplerConfig
from jaxgpt.generate.text import pad_prompts
from jaxgpt.interop.checkpoint import export_checkpoint, load_hf
from jaxgpt.interop.families import config_from_hf
from jaxgpt.interop.tokenizer import write_tokenizer
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig, RopeConfig
from jaxgpt.partition import unbox

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch and transformers
forward = jax.jit(decoder.forward, static_argnums=0)
values = jax.jit(lambda cfg, p, *batch: decoder.values(cfg, p, decoder.hidden_states(cfg, p, *batch)), static_argnums=0)
generate = jax.jit(decode.generate, static_argnums=0, static_argnames=("max_new", "sampler", "eos_ids", "pad_id"))
SHAPE = {
    "vocab_size": 400, "num_layers": 2, "embed_dim": 32, "num_heads": 4, "mlp_dim": 48, "max_seq_length": 128,
    "dtype": "float32",
}  # fmt: skip
LLAMA3 = RopeConfig(theta=5e4, scaling="llama3", factor=8.0, original_max_seq_length=16)
GPT2 = {
    "position": "learned", "norm": "layernorm", "norm_bias": True, "activation": "gelu_tanh", "gated_mlp": False,
    "qkv_bias": True, "attention_out_bias": True, "mlp_bias": True,
}  # fmt: skip
GEMMA = {
    "norm_scale_offset": True,
    "norm_eps": 1e-6,
    "activation": "gelu_tanh",
    "scale_embeddings": True,
    "head_dim": 12,
}
GEMMA2 = GEMMA | {
    "norm_position": "sandwich", "sliding_window": 6, "window_pattern": ("local", "global"), "attention_softcap": 2.0,
    "final_softcap": 3.0, "query_scale": 10**-0.5, "num_kv_heads": 2,
}  # fmt: skip
QWEN3 = {"qk_norm": True, "head_dim": 16, "norm_eps": 1e-6, "num_kv_heads": 2}
MODELS = {
    "gpt2": GPT2,
    "gpt2_untied": GPT2 | {"tie_embeddings": False, "activation": "gelu_exact"},
    "llama": {"tie_embeddings": False},
    "llama_biases": {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True, "num_kv_heads": 1, "rope": LLAMA3},
    "llama_linear": {"rope": RopeConfig(scaling="linear", factor=3.0), "num_kv_heads": 2},
    "llama_yarn": {"rope": RopeConfig(theta=100.0, scaling="yarn", factor=4.0, original_max_seq_length=32, beta_fast=8.0)},
    "mistral": {"sliding_window": 6, "num_kv_heads": 2, "tie_embeddings": False},
    "gemma": GEMMA | {"num_kv_heads": 1},
    "gemma2": GEMMA2,
    "gemma2_without_windows": GEMMA2 | {"sliding_window": None, "window_pattern": ("local",)},
    "qwen3": QWEN3 | {"tie_embeddings": False},
    "qwen3_windows": QWEN3 | {
        "sliding_window": 6, "window_pattern": ("global", "local"), "qkv_bias": True,
        "attention_out_bias": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    library = pytest.importorskip("transformers")
    library.logging.set_verbosity_error()
    return library


def make(**fields):
    """A model with parameters far from their start."""
    config = ModelConfig(**SHAPE | fields)
    boxed = jax.eval_shape(functools.partial(decoder.init_params, config), jax.random.key(0))
    rng = np.random.default_rng(0)
    return config, jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), unbox(boxed))


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_model_has_the_same_logits_and_comes_back_exactly(transformers, trained, mesh, tmp_path, name):
    import torch

    config, params = make(**MODELS[name])
    export_checkpoint(config, params, trained["bpe"], None, str(tmp_path))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(model).__name__ == json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    tokens = np.random.default_rng(0).integers(16, 400, (2, 40)).astype(np.int32)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens).long()).logits.numpy()
    np.testing.assert_allclose(forward(config, params, tokens), theirs, atol=1e-4, rtol=0)
    # What transformers writes again, in its own spelling, is the same model to the bit.
    model.save_pretrained(tmp_path / "again", max_shard_size="20kB")
    back, loaded = load_hf(str(tmp_path / "again"), mesh)
    assert dataclasses.replace(back, dtype="float32", init="gpt2") == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize("template", [None, *CHAT_TEMPLATES])
def test_an_exported_model_generates_the_same_tokens(transformers, trained, tmp_path, template):
    import torch

    config, params = make(**MODELS["qwen3"])
    tokenizer, text = trained["bpe"], "the quick  brown\n fox ▁ é"
    chat = None if template is None else ChatTemplate.from_config(template)
    export_checkpoint(config, params, tokenizer, chat, str(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.PreTrainedTokenizerFast)
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
    if chat is None:
        ours = tokenizer.encode(text, add_bos=True)
        prompt = theirs(text, return_tensors="pt")
        stop = (tokenizer.eos_id,)
    else:
        ours = chat.encode_prompt(tokenizer, [Message("user", text)])
        conversation = [{"role": "user", "content": text}]
        prompt = theirs.apply_chat_template(
            conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        stop = chat.stop_ids(tokenizer)
        several = [Message("user", "a"), Message("assistant", "b"), Message("user", text)]
        if template == "roles":  # with special tokens around every turn
            turns = [message._asdict() for message in several]
            ids = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
            np.testing.assert_array_equal(chat.encode_prompt(tokenizer, several), ids)
    np.testing.assert_array_equal(prompt["input_ids"][0], ours)
    with torch.no_grad():
        generated = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, len(ours) :].numpy()
    prompts, mask = pad_prompts([ours], tokenizer.pad_id, multiple=64)
    out = generate(
        config, params, prompts, mask, jax.random.key(0), max_new=24, sampler=SamplerConfig(temperature=0.0),
        eos_ids=stop, pad_id=tokenizer.pad_id,
    )  # fmt: skip
    length = int(out.lengths_B[0])
    assert len(generated) == length
    np.testing.assert_array_equal(np.asarray(out.tokens_BR[0, :length]), generated)


def test_a_tokenizer_that_was_imported_goes_out_again(transformers, tmp_path):
    from tests.interop.test_tokenizer import SPECIAL, byte_level, folder_of

    for name, source in (("qwen", byte_level()), ("llama3", byte_level(bos=SPECIAL[0]))):
        folder = tmp_path / name
        (folder / "again").mkdir(parents=True)
        ours = load_tokenizer(folder_of(folder, source, bos_token=SPECIAL[0]))
        write_tokenizer(ours, ChatTemplate.from_config("chatml"), str(folder / "again"), 64)
        theirs = transformers.AutoTokenizer.from_pretrained(folder / "again")
        assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_id, ours.pad_id)
        text = "the quick <b> ▁ é\n"
        np.testing.assert_array_equal(theirs(text)["input_ids"], ours.encode(text, add_bos=True))
        messages = [Message("user", text)]
        ids = theirs.apply_chat_template(
            [message._asdict() for message in messages], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        np.testing.assert_array_equal(ids, ChatTemplate.from_config("chatml").encode_prompt(ours, messages))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "qwen3"])
def test_a_reward_model_is_a_classifier_with_one_label(transformers, trained, mesh, tmp_path, name):
    import torch

    config, params = make(**MODELS[name] | {"head": "scalar", "final_softcap": None})
    if name == "gemma2":
        config = dataclasses.replace(config, final_softcap=3.0)
    export_checkpoint(config, params, trained["bpe"], None, str(tmp_path), reward_shift=0.5)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager")
    assert model.config.num_labels == 1
    rows = [trained["bpe"].encode(text, add_bos=True, add_eos=True) for text in ("the fox", "a lazy dog sings of rain")]
    length = max(map(len, rows))
    tokens = np.stack([np.pad(row, (0, length - len(row))) for row in rows])
    with torch.no_grad():
        batch = torch.tensor(tokens).long()
        logits = model.eval()(batch, attention_mask=(batch != 0).long()).logits[:, 0].numpy()
    rewards = (
        np.asarray(values(config, params, tokens, (tokens != 0).astype(np.int32)))[
            [0, 1], [len(row) - 1 for row in rows]
        ]
        - 0.5
    )
    np.testing.assert_allclose(logits - model.config.reward_shift, rewards, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    back, loaded = load_hf(str(tmp_path / "again"), mesh)
    assert back.head == "scalar"
    np.testing.assert_array_equal(loaded["head"]["kernel"], params["head"]["kernel"])
    np.testing.assert_array_equal(loaded["head"]["bias"], [0.0])


def test_defaults_are_those_of_transformers(transformers):
    configs = ("GPT2Config", "LlamaConfig", "MistralConfig", "GemmaConfig", "Gemma2Config", "Qwen3Config")
    for name in configs:
        whole = getattr(transformers, name)().to_dict() | {"architectures": None}
        sizes = (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "vocab_size",
            "model_type",
        )
        given = {key: whole[key] for key in (*sizes, "n_embd", "n_layer", "n_head") if key in whole}
        assert config_from_hf(given) == config_from_hf(whole), name
