"""The model card of an artifact: what it is, where it comes from, how good it is, what it cost, and how to use it."""

from collections.abc import Sequence
from typing import Any

# What is shown of a stage's last metrics, where it has them.
_SHOWN = (
    "eval/loss", "eval/perplexity", "eval/bits_per_byte", "eval/accuracy", "eval/margin", "eval/scores", "eval/gold",
    "objective/kl", "objective/scores",
)  # fmt: skip
_WHAT = {
    "pretrain": "A language model", "sft": "An assistant, fine-tuned on conversations", "reward": "A reward model",
    "dpo": "An assistant, tuned on preferences (DPO)", "ppo": "An assistant, trained on a reward (PPO)",
    "grpo": "An assistant, trained on a reward (group advantages)",
}  # fmt: skip


def summary(manifest: dict[str, Any]) -> str:
    """One line: dtype, size, and what it cost."""
    ratio = manifest["float32_bytes"] / manifest["weight_bytes"]
    text = (
        f"{manifest['num_parameters']:,} parameters, {manifest['quantization']['dtype']}, "
        f"{manifest['weight_bytes'] / 1e6:.2f} MB, {ratio:.2f} times smaller than float32"
    )
    held_out = manifest.get("held_out")
    if held_out is None:
        return text
    return (
        f"{text}; held-out loss {held_out['loss']['source']:.4f} -> {held_out['loss']['artifact']:.4f} "
        f"({held_out['relative_increase']:+.3%})"
    )


def model_card(name: str, manifest: dict[str, Any], config: dict[str, Any]) -> str:
    """README.md of an artifact. name: its folder. manifest, config: as in its manifest.json and config.json.

    Of paths it has the last part alone, since it is made to be published.
    """
    name = name.rstrip("/").rsplit("/", 1)[-1]
    what = _WHAT.get(manifest["source_stage"], "A model")
    sections = [
        f"# {name}",
        f"{what}: {summary(manifest)}.",
        _architecture(config["model"], manifest),
        _lineage(manifest["lineage"]),
        _cost(manifest),
        _proof(manifest["proof"]),
        _use(name, manifest),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    line = lambda cells: "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])


def _architecture(model: dict[str, Any], manifest: dict[str, Any]) -> str:
    fields = (
        "vocab_size", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "max_seq_length",
        "position", "norm", "activation", "gated_mlp", "tie_embeddings", "head",
    )  # fmt: skip
    rows = [(name, f"{model[name]}") for name in fields]
    rows += [("tokenizer", f"`{manifest['tokenizer_digest'][:12]}`, {manifest['vocab_size']:,} pieces")]
    template = manifest["chat_template_digest"]
    rows += [("chat template", f"`{template[:12]}`" if template else "none")]
    return "## Architecture\n\nA decoder-only transformer.\n\n" + _table(("field", "value"), rows)


def _lineage(lineage: list[dict[str, Any]]) -> str:
    rows = []
    for entry in lineage:
        metrics = entry.get("metrics", {})
        shown = ", ".join(f"{name} {metrics[name]:.4g}" for name in _SHOWN if name in metrics)
        stage = entry.get("stage", "no longer on disk")
        folder = entry["path"].rstrip("/").rsplit("/", 1)[-1]  # whole paths are of the machine it was made on
        rows.append((stage, entry["role"], f"`{folder}`", f"`{entry['digest'][:12]}`", shown))
    header = ("stage", "role", "folder", "manifest", "final metrics")
    return "## Lineage\n\nNearest first; digests are those of the manifests.\n\n" + _table(header, rows)


def _cost(manifest: dict[str, Any]) -> str:
    dtype, average = manifest["quantization"]["dtype"], manifest["average"]
    stored = {
        "float32": "Weights are stored as they were trained, in float32.",
        "bfloat16": "Weights are stored in bfloat16.",
        "int8": "Kernels and tables are stored as int8 with a float32 scale per output channel; norms and biases as float32.",
        "int4": "Kernels and tables are stored as int4, two in a byte, with a float32 scale per "
        f"{manifest['quantization'].get('group_size')} inputs; norms and biases as float32.",
    }[dtype]
    made = {
        "none": "",
        "ema": " They are the exponential moving average that the optimizer kept.",
        "last_k": f" They are the mean of the checkpoints of steps {', '.join(map(str, average.get('steps', ())))}.",
        "soup": f" They are the mean of {average.get('models')} runs.",
    }[average["kind"]]
    text = f"## Weights and what they cost\n\n{stored}{made}"
    held_out = manifest.get("held_out")
    if held_out is None:
        return text
    rows = [(name, f"{loss:.6f}") for name, loss in held_out["loss"].items()]
    table = _table((f"held-out loss ({held_out['stage']}, {held_out['rows']:,} rows)", "nats"), rows)
    return f"{text}\n\n{table}\n\nRelative increase: {held_out['relative_increase']:+.4%}."


def _proof(proof: dict[str, Any]) -> str:
    lines = ["Read back from the files, the model gave exactly the logits of the parameters that were written"]
    if "greedy_tokens_equal_to_source" in proof:
        lines.append(
            f", and the same greedy tokens; {proof['greedy_tokens_equal_to_source']:.1%} of them are those of the source"
        )
    lines.append(f". Largest difference of a logit from the source's: {proof['max_logit_difference_from_source']:.3g}.")
    return "## Proof\n\n" + "".join(lines)


def _use(name: str, manifest: dict[str, Any]) -> str:
    if "reward_shift" in manifest:
        commands = (
            f"python -m experiments.reward --workdir={name} --config.score=responses.jsonl\n"
            f"python -m experiments.ppo --config=configs/ppo.py --workdir=runs/ppo --config.init_from=SFT_MODEL "
            f"--config.reward_model={name} --config.data.train=prompts.jsonl"
        )
        more = f"Rewards are the head's values minus {manifest['reward_shift']:.6g}, `reward_shift` of manifest.json."
    else:
        commands = (
            f"python -m experiments.generate --config.init_from={name} --config.prompt='...'\n"
            f"python -m experiments.sft --config=configs/sft.py --workdir=runs/next --config.init_from={name} "
            "--config.data.train=tasks.jsonl"
        )
        more = "Defaults for sampling, and the ids that end a text, are in generation.json."
    files = (
        "The weights are safetensors under the project's parameter names; `NAME:scale` are the scales of a quantized tensor. "
        "manifest.json has the sha256 of every file that is read, all of which are checked when the model is loaded."
    )
    return f"## Use\n\n```\n{commands}\n```\n\n{more} {files}"
