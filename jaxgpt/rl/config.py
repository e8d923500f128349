"""What a run of reinforcement learning is told."""

import dataclasses
from typing import Literal

from jaxgpt.config import check_bounds
from jaxgpt.data.sources import check_fields
from jaxgpt.objectives.ppo import PPOConfig
from jaxgpt.rewards.functions import RewardSource
from jaxgpt.rl.rollout import RolloutConfig
from jaxgpt.rl.step import GroupConfig
from jaxgpt.train.config import SamplesConfig
from jaxgpt.train.finetune import FinetuneConfig
from jaxgpt.train.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class RLConfig(FinetuneConfig):
    """One RL run; init_from is the SFT model that the policy starts from and is held to.

    advantage: `gae`, with a critic (PPO), or `group`, from the other responses to the prompt (GRPO, RLOO, REINFORCE).
    reward_model: the workdir of a reward model. rewards: label -> a reward computed on the host; their weighted sum is
      added to the reward model's. gold_model, gold: the same, but only logged at evaluations, never optimised.
    critic_trunk: `own`, a second model, or `shared`: a value head beside the policy's, one optimizer, and
      ppo.value_coef weighs its loss.
    critic_init: an own critic starts as the `reward_model` (Stiennon et al. 2020), or as the `policy` with a new head.
    critic_optimizer: of an own critic; optimizer is the policy's.
    num_eval_prompts: held-out prompts that are answered at each evaluation, num_eval_samples times each;
      samples.num_heldout of the answers are kept in samples.jsonl. eval/loss, by which checkpoints are kept, is minus the
      gold reward, or minus the score without one.
    preflight: check what must hold at the first update, and stop where it does not.
    require_report_card: refuse a reward model whose report card has failed.
    batch_size is rollout.batch_size, and set by it; eval_batches, packing and sequence_length of data mean nothing here.
    """

    batch_size: int = 0
    advantage: Literal["gae", "group"] = "gae"
    rollout: RolloutConfig = RolloutConfig()
    ppo: PPOConfig = PPOConfig()
    group: GroupConfig = GroupConfig()
    reward_model: str = ""
    rewards: dict[str, RewardSource] = dataclasses.field(default_factory=dict)
    gold_model: str = ""
    gold: dict[str, RewardSource] = dataclasses.field(default_factory=dict)
    critic_trunk: Literal["own", "shared"] = "own"
    critic_init: Literal["reward_model", "policy"] = "reward_model"
    critic_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4, warmup_steps=0)
    num_eval_prompts: int = 64
    num_eval_samples: int = 1
    samples: SamplesConfig = SamplesConfig(num_heldout=8)
    preflight: bool = True
    require_report_card: bool = True

    def check_rewards(self) -> None:
        """ValueError where there is no reward, or no reward model for a critic that starts as one."""
        if self.reward_model:
            return
        if not self.rewards:
            raise ValueError("There is no reward: set reward_model to a reward model's workdir, or rewards.")
        if self.advantage == "gae" and self.critic_trunk == "own" and self.critic_init == "reward_model":
            raise ValueError("critic_init='reward_model' needs reward_model; without one use critic_init='policy'.")

    def check_complete(self) -> None:
        """ValueError naming what is missing of models, rewards and prompts, which a preset may leave open."""
        super().check_complete()
        self.check_rewards()

    @property
    def batch_field(self) -> str:
        """The field that says how many responses there are."""
        return "rollout.batch_size"

    @property
    def row_length(self) -> int:
        """Tokens of a prompt and its response, at most."""
        return self.rollout.max_prompt_length + self.rollout.max_new_tokens

    @property
    def rows_at_a_time(self) -> int:
        """Responses that one forward and backward pass sees."""
        return super().rows_at_a_time // self.ppo.num_minibatches

    def __post_init__(self):
        rows = self.rollout.batch_size
        if self.batch_size not in (0, rows):
            raise ValueError(f"batch_size={self.batch_size} is set by rollout.batch_size={rows} in RL; leave it out.")
        object.__setattr__(self, "batch_size", rows)
        super().__post_init__()
        check_fields(self.data.fields, ("prompt",))
        check_bounds(self, "", num_eval_samples=1, num_eval_prompts=0)
        if rows % self.ppo.num_minibatches:
            raise ValueError(
                f"rollout.batch_size={rows} is not a multiple of ppo.num_minibatches={self.ppo.num_minibatches}."
            )
        minibatch = rows // self.ppo.num_minibatches
        if minibatch % self.gradient_accumulation_steps:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} does not divide a minibatch of "
                f"rollout.batch_size / ppo.num_minibatches = {rows} / {self.ppo.num_minibatches} = {minibatch} responses."
            )
        if self.advantage == "group" and self.critic_trunk == "shared":
            raise ValueError("critic_trunk='shared' is a critic's; advantage='group' has none.")
        if (
            self.advantage == "group"
            and self.rollout.num_samples_per_prompt < 2
            and self.group.baseline not in ("batch_mean", "none")
        ):
            raise ValueError(
                "advantage='group' compares the responses to one prompt: rollout.num_samples_per_prompt must be at least "
                f"2, not {self.rollout.num_samples_per_prompt}."
            )
