"""Makes tests/interop/golden: tiny random checkpoints of transformers and what it computes with them.

    python -m tests.interop.make_golden

Needs torch and transformers (made with transformers 5.23, torch 2.13); the tests that read the files need neither.
"""

import json
import pathlib
import shutil

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent / "golden"
SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
GPT2 = {
    "vocab_size": 32, "n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}


def configs() -> dict:
    """name -> a config; between them every family and option."""
    t = transformers
    qwen3 = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "attention_bias": True}
    caps = {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 9}
    return {
        "gpt2": t.GPT2Config(**GPT2),
        "gpt2_untied": t.GPT2Config(**GPT2, n_inner=24, tie_word_embeddings=False, scale_attn_weights=False),
        "llama2": t.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, rope_parameters=LINEAR),
        "llama3": t.LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=LLAMA3),
        "mistral": t.MistralConfig(**SIZES, sliding_window=5),
        "gemma": t.GemmaConfig(**SIZES | {"num_key_value_heads": 1}),
        "gemma2": t.Gemma2Config(**SIZES, sliding_window=5, **caps),
        "qwen3": t.Qwen3Config(**SIZES, rope_parameters=YARN),
        "qwen3_windows": t.Qwen3Config(**SIZES, **qwen3, tie_word_embeddings=True),
        "reward": t.LlamaConfig(**SIZES, num_labels=1),
        "reward_gpt2": t.GPT2Config(**GPT2, num_labels=1),
    }


def as_version_4(values: dict) -> dict:
    """config.json as transformers 4 writes it."""
    rope = dict(values.pop("rope_parameters"))
    values["rope_theta"] = rope.pop("rope_theta")
    values["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    values["torch_dtype"] = values.pop("dtype")
    return values | {"transformers_version": "4.57.0"}


def randomized(model):
    """The model with bfloat16 numbers for weights, far from what they start with, and norms near 1 (or 0)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_((parameter + noise if parameter.ndim == 1 else noise).bfloat16().float())
    return model.eval()


def main() -> None:
    """Write a folder for each config."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    tokens = np.random.default_rng(0).integers(3, 32, (2, 20))
    for name, config in configs().items():
        config._attn_implementation = "eager"
        is_reward = name.startswith("reward")
        kind = transformers.AutoModelForSequenceClassification if is_reward else transformers.AutoModelForCausalLM
        model = randomized(kind.from_config(config))
        expected = {}
        if is_reward:
            for side in ("right", "left"):
                row = np.pad(tokens[1, 6:], (0, 6) if side == "right" else (6, 0))
                batch = torch.tensor(np.stack([tokens[0], row]))
                positions = (batch != 0).long().cumsum(1).sub(1).clamp(min=0)
                out = model(batch, attention_mask=(batch != 0).long(), position_ids=positions)
                expected[f"logits_{side}"] = out.logits[:, 0].detach().numpy()
        else:
            expected["logits"] = model(torch.tensor(tokens)).logits.detach().numpy()
        folder = FOLDER / name
        # One with several files; the dtype of one stays float32, and one is of another release.
        model = model if name == "gpt2_untied" else model.to(torch.bfloat16)
        model.save_pretrained(folder, max_shard_size="6kB" if name == "llama3" else "1GB")
        if name in ("llama3", "mistral"):
            values = as_version_4(json.loads((folder / "config.json").read_text()))
            (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        np.savez_compressed(folder / "expected.npz", tokens=tokens.astype(np.int32), **expected)
        (folder / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
