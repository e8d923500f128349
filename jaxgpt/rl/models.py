"""The models of an RL run, from their workdirs: policy, critic, reference and reward model, abstract and on the mesh."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxgpt import partition, tree
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig
from jaxgpt.objectives.ppo import make_policy, make_value
from jaxgpt.objectives.reward import last_token_rewards
from jaxgpt.partition import DEFAULT_RULES
from jaxgpt.rl import advantages
from jaxgpt.rl.config import RLConfig
from jaxgpt.rl.rollout import Rollout
from jaxgpt.rl.step import RLState, Setup, Steps
from jaxgpt.train.finetune import Start, load_start
from jaxgpt.train.load import (
    Run,
    abstract_params,
    load_plain,
    load_trunk,
    parent_of,
    read_run,
    trainable,
    without_adapters,
)
from jaxgpt.train.optimizer import make_optimizer, make_schedule
from jaxgpt.train.step import abstract_state, init_state, make_train_step
from jaxgpt.types import Array, Params


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A finished reward model: its run, as a parent {"path", "digest"}, its plain config, and the shift of its rewards."""

    run: Run
    parent: dict[str, str]
    config: ModelConfig
    shift: float


def read_reward_model(config: RLConfig, start: Start) -> RewardModel | None:
    """The reward model of the config; ValueError where there is no reward at all, or where it does not fit the policy."""
    if not config.reward_model:
        if not config.rewards:
            raise ValueError("There is no reward: set reward_model to a reward model's workdir, or rewards.")
        if config.advantage == "gae" and config.critic_init == "reward_model":
            raise ValueError("critic_init='reward_model' needs reward_model; without one use critic_init='policy'.")
        return None
    run = read_run(config.reward_model, "reward_model")
    manifest = run.manifest()
    if manifest["stage"] != "reward":
        raise ValueError(f"reward_model: {config.reward_model} is a run of {manifest['stage']}, not a reward model.")
    parent = parent_of(run, start.tokenizer, start.template)
    card = manifest.get("report_card", {})
    if config.require_report_card and not card.get("passed", False):
        reasons = " ".join(card.get("failures", ["It has none: there were no held-out pairs."]))
        raise ValueError(
            f"reward_model: the report card of {config.reward_model} has not passed. {reasons} "
            "require_report_card=False uses it all the same."
        )
    return RewardModel(run, parent, without_adapters(run.config), manifest["reward_shift"])


class Builder:
    """The parts of one run, made once. Abstract until `create` or `reload` put parameters on the mesh."""

    def __init__(self, config: RLConfig, start: Start, reward: RewardModel | None, mesh: Mesh):
        self.config, self.start, self.reward, self.mesh = config, start, reward, mesh
        updates = config.num_train_steps * config.ppo.num_epochs * config.ppo.num_minibatches
        self.optimizer = make_optimizer(config.optimizer, updates)
        self.schedule = make_schedule(config.optimizer, updates)
        self.critic_optimizer = make_optimizer(config.critic_optimizer, updates)
        self.critic = self._critic_config()
        self.setup = Setup(
            policy=start.model, reference=without_adapters(start.model), critic=self.critic, rollout=config.rollout,
            ppo=config.ppo, group=config.group, eos_ids=start.template.stop_ids(start.tokenizer),
            pad_id=start.tokenizer.pad_id,
        )  # fmt: skip
        self.rng = jax.random.key(config.seed)
        policy, self.policy_frozen = self._abstract(start.model, self.optimizer)
        critic: Any = None
        self.critic_frozen: Params = {}
        if self.critic is not None:
            critic, self.critic_frozen = self._abstract(self.critic, self.critic_optimizer)
        whole = partition.replicated(mesh)
        scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=whole)
        make_state: Any = RLState  # of abstract leaves
        self.abstract = make_state(
            step=scalar(jnp.int32), policy=policy, critic=critic, kl_coef=scalar(jnp.float32),
            moments=jax.tree.map(lambda _: scalar(jnp.float32), advantages.init_moments()),
            rng=jax.ShapeDtypeStruct(self.rng.shape, self.rng.dtype, sharding=whole),
        )  # fmt: skip
        self.shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

    def _critic_config(self) -> ModelConfig | None:
        if self.config.advantage == "group":
            return None
        if self.reward is None or self.config.critic_init == "policy":
            trunk = without_adapters(self.start.model)
        else:
            trunk = self.reward.config
        return dataclasses.replace(trunk, head="scalar", lora=self.config.lora)

    def _abstract(self, model: ModelConfig, optimizer) -> tuple[Any, Params]:
        init = functools.partial(decoder.init_params, model)
        return abstract_state(init, optimizer, self.rng, self.mesh, DEFAULT_RULES, trainable(model))

    def create(self) -> tuple[RLState, Params]:
        """A fresh state, and what is frozen beside it."""
        abstract = tree.merge(self.abstract.policy.params, self.policy_frozen)
        loaded = self.start.load(abstract, self.mesh)
        policy_rng, critic_rng, rng = jax.random.split(self.rng, 3)
        init = functools.partial(decoder.init_params, self.start.model)
        policy, _, _ = init_state(
            init, self.optimizer, policy_rng, self.mesh, DEFAULT_RULES, trainable(self.start.model), loaded=loaded
        )
        critic = None
        if self.critic is not None:
            critic, _, _ = init_state(
                functools.partial(decoder.init_params, self.critic), self.critic_optimizer, critic_rng, self.mesh,
                DEFAULT_RULES, trainable(self.critic), loaded=self._load_critic(self.critic),
            )  # fmt: skip
        make = lambda rng: (
            jnp.zeros((), jnp.int32),
            jnp.float32(self.config.ppo.kl_coef),
            advantages.init_moments(),
            rng,
        )
        shardings = (self.shardings.step, self.shardings.kl_coef, self.shardings.moments, self.shardings.rng)
        step, kl_coef, moments, rng = jax.jit(make, out_shardings=shardings)(rng)
        return RLState(step, policy, critic, kl_coef, moments, rng), self.reload()

    def _load_critic(self, model: ModelConfig) -> Params:
        """The critic's trunk, and with a reward model its head, shifted as its rewards are."""
        abstract = abstract_params(model, self.mesh)
        if self.reward is None or self.config.critic_init == "policy":
            return load_start(self.start.parent, model, abstract, self.mesh)
        params = load_start(self.reward.run, model, abstract, self.mesh)
        params["head"]["bias"] = params["head"]["bias"] - self.reward.shift
        return params

    def reload(self) -> Params:
        """What is frozen: bases under adapters, the reference, the reward model."""
        frozen: dict[str, Params] = {}
        reference = load_trunk(self.start.parent, abstract_params(self.setup.reference, self.mesh), self.mesh)
        frozen["policy" if self.config.lora.rank else "reference"] = reference
        if self.critic is not None and self.critic_frozen:
            frozen["critic"] = tree.split(self._load_critic(self.critic), trainable(self.critic))[1]
        if self.reward is not None:
            frozen["reward"] = load_plain(self.reward.run, self.mesh)[1]
        return frozen

    def steps(self) -> Steps:
        """The train steps of policy and critic."""
        config, accum = self.config, self.config.gradient_accumulation_steps
        make = functools.partial(make_train_step, mesh=self.mesh, rules=DEFAULT_RULES, accum=accum)
        policy = make_policy(self.setup.policy, config.ppo, config.rollout.temperature)
        critic = None
        if self.critic is not None:
            value = make_value(self.critic, config.ppo)
            critic = make(value, self.critic_optimizer, shardings=self.shardings.critic)
        return Steps(make(policy, self.optimizer, shardings=self.shardings.policy), critic)

    def score(self, frozen: Params, rollout: Rollout) -> Array:
        """The reward model's scores, f32 [B]; 0 without one."""
        if self.reward is None:
            return jnp.zeros(len(rollout.tokens_BS), jnp.float32)
        rewards_B = last_token_rewards(self.reward.config, frozen["reward"], rollout.tokens_BS, rollout.segments_BS)
        return rewards_B - self.reward.shift

    def memory(self) -> str:
        """What each model keeps, over all devices, as a table."""
        trained = {"policy": self.abstract.policy, "critic": self.abstract.critic}
        frozen = {"policy": self.policy_frozen, "critic": self.critic_frozen, "reference": {}, "reward model": {}}
        if not self.config.lora.rank:
            frozen["reference"] = abstract_params(self.setup.reference, self.mesh)
        if self.reward is not None:
            frozen["reward model"] = abstract_params(self.reward.config, self.mesh)
        mib = lambda *trees: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees)) / 2**20
        lines = []
        for name, base in frozen.items():
            state = trained.get(name)
            params, moments = (state.params, state.opt_state) if state is not None else ({}, {})
            lines.append(
                f"{name:<13}{mib(params, base):10.1f} MiB of parameters, {mib(moments):10.1f} MiB of optimizer state"
            )
        return "\n".join(lines)
