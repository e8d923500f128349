"""The models of an RL run, from their workdirs: policy, critic, reference and reward model, abstract and on the mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxgpt import partition, tree
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig
from jaxgpt.models.decoder import VALUE_HEAD
from jaxgpt.objectives.ppo import make_policy, make_ppo, make_value
from jaxgpt.objectives.reward import last_token_rewards
from jaxgpt.partition import DEFAULT_RULES
from jaxgpt.rl import advantages
from jaxgpt.rl.config import RLConfig
from jaxgpt.rl.rollout import Rollout
from jaxgpt.rl.step import RLState, Setup, Steps, trunk
from jaxgpt.runs.load import (
    Run,
    abstract_adapters,
    abstract_params,
    adapter_base,
    load_adapters,
    load_plain,
    load_trunk,
    parent_of,
    read_run,
    trainable,
    without_adapters,
)
from jaxgpt.train.finetune import Start, load_start
from jaxgpt.train.optimizer import make_optimizer, make_schedule
from jaxgpt.train.step import abstract_state, init_state, make_train_step
from jaxgpt.types import Array, Params


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A finished reward model.

    parent: {"path", "digest"}. shift: of its rewards. shares_base: it is adapters on the very model that the policy's stand
    on, and stays so. config: with its adapters where it shares the base, else plain.
    """

    run: Run
    parent: dict[str, str]
    config: ModelConfig
    shift: float
    shares_base: bool


def read_reward_model(config: RLConfig, start: Start) -> RewardModel | None:
    """The reward model of the config; ValueError where there is no reward at all, or where it does not fit the policy."""
    config.check_rewards()
    if not config.reward_model:
        return None
    reward = _read(config.reward_model, "reward_model", start)
    card = reward.run.manifest().get("report_card", {})
    if config.require_report_card and not card.get("passed", False):
        reasons = " ".join(card.get("failures", ["It has none: there were no held-out pairs."]))
        raise ValueError(
            f"reward_model: the report card of {config.reward_model} has not passed. {reasons} "
            "require_report_card=False uses it all the same."
        )
    adapters = config.lora.rank > 0 and reward.run.config.lora.rank > 0
    if adapters and adapter_base(reward.run).digest() == start.parent.digest():
        return dataclasses.replace(reward, config=reward.run.config, shares_base=True)
    return reward


def read_gold_model(config: RLConfig, start: Start) -> RewardModel | None:
    """The reward model that is only watched, if the config has one; ValueError where it does not fit the policy."""
    return _read(config.gold_model, "gold_model", start) if config.gold_model else None


def _read(workdir: str, field: str, start: Start) -> RewardModel:
    run = read_run(workdir, field)
    manifest = run.manifest()
    if "reward_shift" not in manifest:
        raise ValueError(f"{field}: {workdir} is a run of {manifest['stage']}, not a reward model.")
    parent = parent_of(run, start.tokenizer, start.template)
    if run.config.vocab_size < start.model.vocab_size:
        raise ValueError(
            f"{field}: {workdir} has model.vocab_size={run.config.vocab_size}, but the policy may write any of "
            f"{start.model.vocab_size} ids."
        )
    return RewardModel(run, parent, without_adapters(run.config), manifest["reward_shift"], shares_base=False)


def reward_scores(reward: RewardModel | None, frozen: Params, rollout: Rollout, name: str = "reward") -> Array:
    """The rewards of a rollout's responses, f32 [B], by frozen[name]; 0 without a reward model. Jittable."""
    if reward is None:
        return jnp.zeros(len(rollout.tokens_BS), jnp.float32)
    params = frozen[name]
    if reward.shares_base:
        params = tree.merge(params, trunk(frozen["policy"]))
    return last_token_rewards(reward.config, params, rollout.tokens_BS, rollout.segments_BS) - reward.shift


class Builder:
    """The parts of one run, made once. Abstract until `create` or `reload` put parameters on the mesh."""

    def __init__(
        self, config: RLConfig, start: Start, reward: RewardModel | None, mesh: Mesh, gold: RewardModel | None = None
    ):
        self.config, self.start, self.reward, self.gold, self.mesh = config, start, reward, gold, mesh
        self.is_shared = config.critic_trunk == "shared"
        if config.rollout.num_slots:
            partition.local_rows(mesh, config.rollout.num_slots, "rollout.num_slots")
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
        policy, self.policy_frozen = self._abstract(self._init_policy(), self.optimizer, start.model)
        critic: Any = None
        self.critic_frozen: Params = {}
        if self.critic is not None and not self.is_shared:
            init = functools.partial(decoder.init_params, self.critic)
            critic, self.critic_frozen = self._abstract(init, self.critic_optimizer, self.critic)
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
        model = self.start.model
        if self.critic_parent is not None and not self.critic_shares_base:
            model = self.critic_parent.config
        return dataclasses.replace(without_adapters(model), head="scalar", lora=self.config.lora)

    @property
    def critic_parent(self) -> RewardModel | None:
        """The reward model that a critic of its own starts as; None where it starts as the policy."""
        return self.reward if self.config.critic_init == "reward_model" and not self.is_shared else None

    @property
    def critic_shares_base(self) -> bool:
        """Whether the critic is adapters on the policy's base: fresh ones, or those of the reward model."""
        parent, lora = self.critic_parent, self.config.lora
        return lora.rank > 0 and (parent is None or (parent.shares_base and parent.config.lora == lora))

    def _init_policy(self) -> Callable[[Any], Any]:
        init = functools.partial(decoder.init_params, self.start.model)
        if not self.is_shared:
            return init
        scalar = dataclasses.replace(self.start.model, head="scalar")
        return lambda rng: {**init(rng), VALUE_HEAD: decoder.init_params(scalar, rng)["head"]}

    def _abstract(self, init, optimizer, model: ModelConfig) -> tuple[Any, Params]:
        return abstract_state(init, optimizer, self.rng, self.mesh, DEFAULT_RULES, trainable(model))

    def create(self) -> tuple[RLState, Params]:
        """A fresh state, and what is frozen beside it."""
        loaded = self.start.load(abstract_params(self.start.model, self.mesh), self.mesh)
        policy_rng, critic_rng, rng = jax.random.split(self.rng, 3)
        policy, _, _ = init_state(
            self._init_policy(), self.optimizer, policy_rng, self.mesh, DEFAULT_RULES, trainable(self.start.model),
            loaded=loaded,
        )  # fmt: skip
        critic = None
        if self.critic is not None and not self.is_shared:
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
        abstract, parent = abstract_params(model, self.mesh), self.critic_parent
        if parent is None:
            return load_start(self.start.parent, model, abstract, self.mesh)
        if self.critic_shares_base:
            params = load_adapters(parent.run, self.mesh)
        else:
            params = load_start(parent.run, model, abstract, self.mesh)
        params["head"]["bias"] = params["head"]["bias"] - parent.shift
        return params

    def reload(self) -> Params:
        """What is frozen: bases under adapters, the reference, the reward model."""
        frozen: dict[str, Params] = {}
        reference = load_trunk(self.start.parent, abstract_params(self.setup.reference, self.mesh), self.mesh)
        frozen["policy" if self.config.lora.rank else "reference"] = reference
        if self.critic is not None and self.critic_frozen and not self.critic_shares_base:
            frozen["critic"] = tree.split(self._load_critic(self.critic), trainable(self.critic))[1]
        if self.reward is not None:
            load = load_adapters if self.reward.shares_base else lambda run, mesh: load_plain(run, mesh)[1]
            frozen["reward"] = load(self.reward.run, self.mesh)
        if self.gold is not None:
            frozen["gold"] = load_plain(self.gold.run, self.mesh)[1]
        return frozen

    def steps(self) -> Steps:
        """The train steps of policy and critic."""
        config, accum = self.config, self.config.gradient_accumulation_steps
        make = functools.partial(make_train_step, mesh=self.mesh, rules=DEFAULT_RULES, accum=accum)
        make_objective = make_ppo if self.is_shared else make_policy
        policy = make_objective(self.setup.policy, config.ppo, config.rollout.temperature)
        critic = None
        if self.critic is not None and not self.is_shared:
            value = make_value(self.critic, config.ppo)
            critic = make(value, self.critic_optimizer, shardings=self.shardings.critic)
        return Steps(make(policy, self.optimizer, shardings=self.shardings.policy), critic)

    def score(self, frozen: Params, rollout: Rollout) -> Array:
        """The reward model's scores, f32 [B]."""
        return reward_scores(self.reward, frozen, rollout)

    @property
    def parents(self) -> dict[str, dict[str, str]]:
        """{"path", "digest"} of all runs that it is built on, by the config field that names them."""
        models = {"reward_model": self.reward, "gold_model": self.gold}
        return self.start.parents | {field: model.parent for field, model in models.items() if model is not None}

    def memory(self) -> str:
        """What each model keeps of its own, over all devices, as a table."""
        policy, critic = self.abstract.policy, self.abstract.critic
        kept: dict[str, tuple] = {
            "policy": (policy.params, self.policy_frozen),
            "critic": (),
            "reference": (),
            "reward model": (),
        }
        notes = {"critic": "a head on the policy's trunk" if self.is_shared else ""}
        if critic is not None:
            kept["critic"] = (critic.params, *([] if self.critic_shares_base else [self.critic_frozen]))
            notes["critic"] = "adapters on the policy's base" if self.critic_shares_base else ""
        if self.config.lora.rank:
            notes["reference"] = "the policy's base"
        else:
            kept["reference"] = (abstract_params(self.setup.reference, self.mesh),)
        if self.reward is not None:
            kept["reward model"] = (abstract_params(self.reward.config, self.mesh),)
            if self.reward.shares_base:
                kept["reward model"] = (abstract_adapters(self.reward.run, self.mesh),)
                notes["reward model"] = "adapters on the policy's base"
        if self.gold is not None:
            kept["gold model"] = (abstract_params(self.gold.config, self.mesh),)
        mib = lambda trees: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees)) / 2**20
        moments = {"policy": policy.opt_state, "critic": critic.opt_state if critic is not None else ()}
        return "\n".join(
            f"{name:<13}{mib(trees):10.1f} MiB of parameters, {mib(moments.get(name, ())):10.1f} MiB of optimizer state"
            + (f"; {notes[name]}" if notes.get(name) else "")
            for name, trees in kept.items()
        )
