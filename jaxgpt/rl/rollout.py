"""Rollouts: prompts in, sequences of prompt and response out, ready for the trainer's own forward pass. Pure, jittable."""

import dataclasses

import jax.numpy as jnp
from flax import struct

from jaxgpt.generate.decode import generate
from jaxgpt.generate.samplers import SamplerConfig
from jaxgpt.models.config import ModelConfig
from jaxgpt.types import Array, Params


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How responses are drawn.

    batch_size: responses per iteration, num_samples_per_prompt of them to each prompt, side by side.
    temperature: also divides the trainer's logits: the policy that is trained is the one that is sampled from.
    num_slots: responses that are decoded at once; the next prompt takes the place of a response that has ended, so that one
      long response does not hold up the others. 0: all of batch_size. It changes no token, but log-probs by rounding.
    top_k, top_p: of the sampler alone. The trainer's log-probs are of the whole distribution, so that with either of them
      the sampled actions are no longer quite the policy's; off (0 and 1) is the sound choice.
    """

    batch_size: int = 64
    max_prompt_length: int = 64
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_samples_per_prompt: int = 1
    num_slots: int = 0

    def __post_init__(self):
        for name in ("batch_size", "max_prompt_length", "max_new_tokens", "num_samples_per_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout.{name} must be at least 1, not {getattr(self, name)}.")
        if self.temperature <= 0:
            raise ValueError(f"rollout.temperature must be positive, not {self.temperature}: RL needs to explore.")
        if not 0 <= self.num_slots <= self.batch_size:
            raise ValueError(
                f"rollout.num_slots must be 0 (one per response) or from 1 to rollout.batch_size={self.batch_size}, "
                f"not {self.num_slots}."
            )
        if self.batch_size % self.num_samples_per_prompt:
            raise ValueError(
                f"rollout.batch_size={self.batch_size} is not a multiple of "
                f"rollout.num_samples_per_prompt={self.num_samples_per_prompt}."
            )
        _ = self.sampler

    @property
    def sampler(self) -> SamplerConfig:
        """The same for the sampler."""
        return SamplerConfig(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


class Prompts(struct.PyTreeNode):
    """A batch of prompts, padded on the left. tokens_BP: i32. mask_BP: f32, 1 on real tokens. index_B: i32, which prompt."""

    tokens_BP: Array
    mask_BP: Array
    index_B: Array


class Rollout(struct.PyTreeNode):
    """Prompts with responses; axes as in `types.Trajectory`.

    sampler_logprobs_BR: f32, under the distribution sampled from. has_eos_B: bool, whether the response ended by itself.
    """

    tokens_BS: Array
    segments_BS: Array
    positions_BS: Array
    response_mask_BR: Array
    sampler_logprobs_BR: Array
    has_eos_B: Array


def roll_out(
    model: ModelConfig,
    params: Params,
    prompts: Prompts,
    rng: Array,
    *,
    max_new: int,
    sampler: SamplerConfig,
    eos_ids: tuple[int, ...],
    pad_id: int,
    num_slots: int = 0,
) -> Rollout:
    """Sample one response to each prompt; a row's draws depend on rng, its index and its prompt alone."""
    out = generate(
        model, params, prompts.tokens_BP, prompts.mask_BP, rng, max_new=max_new, sampler=sampler, eos_ids=eos_ids,
        pad_id=pad_id, num_slots=num_slots,
    )  # fmt: skip
    segments_BS = jnp.concatenate([prompts.mask_BP != 0, out.mask_BR != 0], axis=1).astype(jnp.int32)
    return Rollout(
        tokens_BS=jnp.concatenate([prompts.tokens_BP, out.tokens_BR], axis=1),
        segments_BS=segments_BS,
        positions_BS=jnp.maximum(jnp.cumsum(segments_BS, axis=1, dtype=jnp.int32) - 1, 0),
        response_mask_BR=out.mask_BR,
        sampler_logprobs_BR=out.logprobs_BR,
        has_eos_B=out.has_eos_B,
    )
