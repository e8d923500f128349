"""Reward losses against float64 numpy, published definitions by hand, and a world whose scores are known."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import partition
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig
from jaxgpt.objectives.reward import RewardConfig, last_token_rewards, make_reward, plackett_luce, ranked_loss
from jaxgpt.partition import DEFAULT_RULES, MeshConfig
from jaxgpt.train.optimizer import OptimizerConfig, make_optimizer
from jaxgpt.train.step import init_state, make_eval_step, make_train_step
from jaxgpt.types import PairBatch
from tests.objectives.reference import numeric_gradient

MODEL = ModelConfig(
    vocab_size=16,
    num_layers=2,
    embed_dim=16,
    num_heads=2,
    mlp_dim=32,
    max_seq_length=16,
    position="learned",
    head="scalar",
    remat="none",
)
# Strict orders, ties, absent candidates in the middle, one candidate, nothing but a tie, nothing at all.
RANKS = np.array(
    [[0, 1, 2, 3], [2, 0, 0, 1], [1, -1, 0, 1], [-1, -1, 0, -1], [0, 0, -1, -1], [-1, -1, -1, -1], [0, 0, 0, 1]],
    np.int32,
)
MARGINS = np.array([0.3, 0.0, 1.0, 2.0, 0.7, 0.5, 0.2], np.float32)


@pytest.fixture(scope="module")
def rewards():
    return np.random.default_rng(0).normal(size=RANKS.shape).astype(np.float32)


def log_sigmoid(x):
    return -np.logaddexp(0.0, -x)


def pairs_of(ranks, ties):
    """(i, j, is strict) of one prompt, i the better one."""
    for i, j in itertools.permutations(range(len(ranks)), 2):
        if min(ranks[i], ranks[j]) >= 0:
            if ranks[i] < ranks[j]:
                yield i, j, True
            elif ranks[i] == ranks[j] and i < j and ties == "half":
                yield i, j, False


def bradley_terry64(rewards, ranks, margins, config):
    """Pair by pair in float64: the loss of each prompt."""
    losses = []
    for r, rank, margin in zip(np.asarray(rewards, np.float64), ranks, margins.astype(np.float64), strict=True):
        terms = []
        for i, j, strict in pairs_of(rank, config.ties):
            d = r[i] - r[j] - (config.margin * margin if strict else 0.0)
            e = config.label_smoothing if strict else 0.5
            centering = config.center_coef * (r[i] + r[j]) ** 2
            terms.append(-(1 - e) * log_sigmoid(d) - e * log_sigmoid(-d) + centering)
        losses.append(np.mean(terms) if terms else 0.0)
    return np.array(losses)


def plackett_luce64(rewards, ranks, margins, config):
    """Choice by choice in float64, as a product of probabilities."""
    losses = []
    for r, rank in zip(np.asarray(rewards, np.float64), ranks, strict=True):
        factors = []
        for i in np.flatnonzero(rank >= 0):
            left = np.flatnonzero((rank >= 0) & (rank >= rank[i]))
            if len(left) > 1:
                factors.append(np.exp(r[i]) / np.exp(r[left]).sum())
        pairs = list(pairs_of(rank, "skip"))
        centering = [config.center_coef * (r[i] + r[j]) ** 2 for i, j, _ in pairs]
        losses.append(-np.log(np.prod(factors)) / len(factors) + np.mean(centering) if pairs else 0.0)
    return np.array(losses)


ranked = jax.jit(ranked_loss, static_argnames="config")


@functools.partial(jax.jit, static_argnames="config")
def loss_and_gradient(rewards, ranks, margins, config, scale=1.0):
    """((sum of scale * loss, (losses, metric sums)), its gradient)."""

    def total(rewards):
        loss_B, sums = ranked_loss(rewards, ranks, margins, config)
        return jnp.sum(scale * loss_B), (loss_B, sums)

    return jax.value_and_grad(total, has_aux=True)(rewards)


@pytest.mark.parametrize(
    "config",
    [
        RewardConfig(),
        RewardConfig(ties="half"),
        RewardConfig(margin=0.5, label_smoothing=0.1, ties="half", center_coef=0.01),
        RewardConfig(loss="plackett_luce"),
        RewardConfig(loss="plackett_luce", center_coef=0.1),
    ],
    ids=lambda c: f"{c.loss}-{c.ties}-{c.center_coef}",
)
def test_losses_and_gradients_are_those_of_float64(rewards, config):
    reference = bradley_terry64 if config.loss == "bradley_terry" else plackett_luce64
    scale = np.linspace(0.5, 2, len(RANKS))  # a different cotangent for each prompt
    (_, (loss_B, sums)), gradient = loss_and_gradient(rewards, RANKS, MARGINS, config, scale)
    expected = reference(rewards, RANKS, MARGINS, config)
    np.testing.assert_allclose(loss_B, expected, rtol=1e-6, atol=1e-7)
    counted = [any(pairs_of(rank, config.ties)) for rank in RANKS]
    assert sums["weight"] == sum(counted) == (5 if config.ties == "half" else 4)

    loss64 = lambda r: (scale * reference(r, RANKS, MARGINS, config)).sum()
    np.testing.assert_allclose(gradient, numeric_gradient(loss64, rewards.astype(np.float64)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ties", ["skip", "half"])
def test_metrics_are_means_over_each_prompts_strict_pairs(rewards, ties):
    rewards = rewards.copy()
    rewards[0, 1] = rewards[0, 2]  # equal rewards of a strict pair
    config = RewardConfig(ties=ties, center_coef=0.3)
    _, sums = ranked(rewards, RANKS, MARGINS, config)
    plain = RewardConfig(ties=ties)
    np.testing.assert_allclose(sums["loss"], bradley_terry64(rewards, RANKS, MARGINS, plain).sum(), rtol=1e-6)
    accuracy, margin, mean = 0.0, 0.0, 0.0
    for r, rank in zip(rewards.astype(np.float64), RANKS, strict=True):
        if any(pairs_of(rank, ties)):
            d = np.array([r[i] - r[j] for i, j, strict in pairs_of(rank, ties) if strict])
            accuracy += np.mean((d > 0) + 0.5 * (d == 0)) if len(d) else 0.5
            margin += np.mean(d) if len(d) else 0.0
            mean += r[rank >= 0].mean()
    np.testing.assert_allclose([sums["accuracy"], sums["margin"]], [accuracy, margin], rtol=1e-6)
    np.testing.assert_allclose(sums["reward_mean"], mean, rtol=1e-6)


def test_pairs_give_the_golden_numbers():
    chosen, rejected = np.array([0.7, -0.2, 1.5], np.float32), np.array([0.1, 0.4, 1.4], np.float32)
    margins = np.array([0.0, 0.5, 1.0], np.float32)
    ranks = np.tile(np.array([0, 1], np.int32), (3, 1))
    golden = {  # loss, gradient of the mean for the chosen ones
        RewardConfig(): (0.7064575203484473, [-0.11811456459140152, -0.21521876874193183, -0.15834027084035332]),
        RewardConfig(margin=1.0): (1.021992383444468, [-0.11811456459140152, -0.2500867018650392, -0.23698316754166796]),
        RewardConfig(center_coef=0.01): (
            0.7367575203484473, [-0.11278123125806819, -0.2138854354085985, -0.13900693750701998]),
        RewardConfig(loss="plackett_luce"): (
            0.7064575203484473, [-0.11811456459140152, -0.21521876874193183, -0.15834027084035332]),
    }  # fmt: skip
    for config, (loss, gradient) in golden.items():
        (value, (_, sums)), slope = loss_and_gradient(np.stack([chosen, rejected], 1), ranks, margins, config, 1 / 3)
        np.testing.assert_allclose(value, loss, atol=1e-6)
        np.testing.assert_allclose(slope[:, 0], gradient, atol=1e-6)
        np.testing.assert_allclose(sums["accuracy"] / sums["weight"], 2 / 3, atol=1e-6)
        np.testing.assert_allclose(sums["margin"] / sums["weight"], 0.033333333333333326, atol=1e-6)


def test_ranked_lists_give_the_golden_numbers():
    rewards = np.array([[1.2, 0.3, -0.5, 0.1], [0.0, 0.4, 0.4, -1.0]], np.float32)
    ranks = np.array([[0, 1, 2, 3], [2, 0, 0, 1]], np.int32)
    (loss, _), gradient = loss_and_gradient(rewards, ranks, np.zeros(2), RewardConfig(), 1 / 2)
    np.testing.assert_allclose(loss, 0.511596260802923, atol=1e-6)
    golden = [[-0.05777130473861776, -0.03926175201540946, -0.015097126855822776, 0.11213018360985],
              [0.15336832584051008, -0.05991284513289663, -0.05991284513289663, -0.03354263557471683]]  # fmt: skip
    np.testing.assert_allclose(gradient, golden, atol=1e-6)
    nine = np.linspace(0.8, -0.8, 9, dtype=np.float32)[None]
    (loss, _), gradient = loss_and_gradient(nine, np.arange(9)[None], np.zeros(1), RewardConfig())
    np.testing.assert_allclose(loss, 0.43122995742552306, atol=1e-6)
    np.testing.assert_allclose(
        gradient[0, :3], [-0.0661683866500037, -0.048997619495737096, -0.03235516251437692], atol=1e-6
    )


def test_the_order_of_the_candidates_does_not_matter_and_a_swap_is_a_mirror(rewards):
    order = [2, 0, 3, 1]
    for config in (RewardConfig(margin=1.0, ties="half", center_coef=0.1), RewardConfig(loss="plackett_luce")):
        plain, sums = ranked(rewards, RANKS, MARGINS, config)
        moved, moved_sums = ranked(rewards[:, order], RANKS[:, order], MARGINS, config)
        np.testing.assert_allclose(plain, moved, rtol=1e-5, atol=1e-6)
        for name, value in sums.items():
            np.testing.assert_allclose(value, moved_sums[name], rtol=1e-5, atol=1e-6, err_msg=name)
    pair, ranks = rewards[:, :2], np.tile(np.array([0, 1], np.int32), (len(rewards), 1))
    _, won = ranked(pair, ranks, MARGINS, RewardConfig())
    _, lost = ranked(pair, ranks[:, ::-1], MARGINS, RewardConfig())
    np.testing.assert_allclose(won["margin"], -lost["margin"], rtol=1e-6)
    np.testing.assert_allclose(won["accuracy"] + lost["accuracy"], len(pair), rtol=1e-6)


def test_plackett_luce_is_a_probability_over_all_orders():
    """Per choice times the number of choices, exponentiated: the probabilities of the 24 orders sum to 1."""
    orders = np.array(list(itertools.permutations(range(4))), np.int32)
    rewards = np.tile(np.array([0.3, -1.0, 2.0, 0.1], np.float32), (24, 1))
    loss_B, _ = ranked(rewards, orders, np.zeros(24, np.float32), RewardConfig(loss="plackett_luce"))
    np.testing.assert_allclose(np.exp(-3 * np.asarray(loss_B, np.float64)).sum(), 1, rtol=1e-6)


@pytest.mark.parametrize("config", [RewardConfig(ties="half", center_coef=0.1), RewardConfig(loss="plackett_luce")])
def test_absent_candidates_may_hold_anything(rewards, config):
    clean = np.where(RANKS >= 0, rewards, 0.0)
    wild = np.where(RANKS >= 0, rewards, np.nan)
    run = lambda rewards: loss_and_gradient(rewards, RANKS, MARGINS, config)
    ours, theirs = run(wild), run(clean)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    np.testing.assert_array_equal(np.asarray(ours[1])[RANKS < 0], 0)


def test_no_candidate_at_all_makes_no_nan_on_the_way_either():
    with jax.debug_nans(True):  # looks at every operation where nothing is jitted
        gradient = jax.grad(lambda r: plackett_luce(r, jnp.array([[-1, -1]])).sum())(jnp.ones((1, 2)))
    np.testing.assert_array_equal(gradient, 0)


def test_huge_reward_differences_keep_finite_losses_and_gradients():
    rewards, ranks = np.array([[-1e4, 1e4, 0.0]], np.float32), np.array([[0, 1, 2]])
    for config in (RewardConfig(label_smoothing=0.1), RewardConfig(loss="plackett_luce")):
        _, gradient = loss_and_gradient(rewards, ranks, np.zeros(1), config)
        assert np.isfinite(gradient).all()
        assert np.max(np.abs(gradient)) > 0.1


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"margin": -1.0}, "reward.margin"),
        ({"label_smoothing": 0.5}, "reward.label_smoothing"),
        ({"center_coef": -0.1}, "reward.center_coef"),
        ({"loss": "plackett_luce", "ties": "half"}, "reward.ties"),
        ({"loss": "plackett_luce", "margin": 1.0}, "reward.margin"),
        ({"loss": "plackett_luce", "label_smoothing": 0.1}, "reward.label_smoothing"),
    ],
)
def test_configs_without_meaning_are_refused_by_field(fields, name):
    with pytest.raises(ValueError, match=name):
        RewardConfig(**fields)
    with pytest.raises(ValueError, match=r"model\.head"):
        make_reward(ModelConfig(vocab_size=16), RewardConfig())


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda rng: partition.unbox(decoder.init_params(MODEL, rng)))(jax.random.key(0))


score = jax.jit(functools.partial(last_token_rewards, MODEL))


def padded(rows, length, side):
    tokens, segments = np.full((len(rows), length), 3, np.int32), np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        tokens[i, at], segments[i, at] = row, 1
    return tokens, segments


def test_the_reward_is_the_value_at_the_last_real_token_wherever_the_padding_is(params):
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 16, size) for size in (6, 1, 6)]
    values = jax.jit(lambda tokens: decoder.values(MODEL, params, decoder.hidden_states(MODEL, params, tokens)))
    alone = [values(row[None])[0, -1] for row in rows]  # neither padding nor segments
    for side in ("right", "left"):
        got = score(params, *padded(rows, 9, side))
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, alone, atol=1e-6, err_msg=side)


def pair_batch(rows, ranks, length, side="right"):
    """rows: B lists of C token lists, None for an absent candidate."""
    shape = (len(rows), len(rows[0]), length)
    tokens, segments = padded([[] if r is None else r for row in rows for r in row], length, side)
    zeros = np.zeros(shape, np.int32)
    ranks = np.asarray(ranks, np.int32)
    return PairBatch(tokens.reshape(shape), zeros, zeros.astype(np.float32), segments.reshape(shape), ranks,
                     np.zeros(len(rows), np.float32))  # fmt: skip


def test_the_objective_is_a_sum_over_prompts_whatever_the_padding_and_the_absent(params):
    rng = np.random.default_rng(2)
    draw = lambda size: rng.integers(0, 16, size)
    rows = [[draw(5), draw(3), draw(6)], [draw(2), None, draw(4)], [draw(3), None, None], [None, None, None]]
    ranks = [[1, 0, 2], [1, -1, 0], [0, -1, -1], [-1, -1, -1]]
    objective = make_reward(MODEL, RewardConfig(center_coef=0.01))
    run = jax.jit(lambda batch: jax.value_and_grad(objective, has_aux=True)(params, batch, None))
    (loss, sums), gradient = run(pair_batch(rows, ranks, 9))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert sums["weight"] == 2
    r = score(params, *padded([[] if row is None else row for row in itertools.chain(*rows[:2])], 9, "right"))
    expected = bradley_terry64(r.reshape(2, 3), np.array(ranks[:2]), np.zeros(2), RewardConfig(center_coef=0.01)).sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)

    left = run(pair_batch(rows, ranks, 9, "left"))
    swap = [2, 0, 1]
    moved = run(pair_batch([[row[i] for i in swap] for row in rows], np.asarray(ranks)[:, swap], 9))
    halves = [run(pair_batch(rows[i:j], ranks[i:j], 9)) for i, j in ((0, 2), (2, 4))]
    for other in (left, moved, jax.tree.map(jnp.add, *halves)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), other, ((loss, sums), gradient))


def test_bradley_terry_scores_are_recovered_from_sampled_preferences():
    """Items with known scores; P(i beats j) = sigmoid(s_i - s_j); a fifth of the pairs is never seen in training."""
    scores = np.random.default_rng(0).permutation(np.linspace(-2.5, 2.5, 12))
    pairs = np.random.default_rng(1).permutation(list(itertools.combinations(range(12), 2)))
    held_out, seen = pairs[:13], pairs[13:]

    def sample(rng, pairs, size):
        """A prompt of 1 to 3 tokens, then the item as the last real token."""
        items = rng.permuted(pairs[rng.integers(0, len(pairs), size)], axis=1)
        first_wins = rng.random(size) < 1 / (1 + np.exp(scores[items[:, 1]] - scores[items[:, 0]]))
        lengths, prompts = rng.integers(1, 4, size), rng.integers(12, 16, (size, 3))
        at = np.arange(4)
        tokens = np.where(at < lengths[:, None], np.pad(prompts, ((0, 0), (0, 1))), 0)[:, None].repeat(2, axis=1)
        tokens[np.arange(size)[:, None], [[0, 1]], lengths[:, None]] = items
        segments = np.tile((at <= lengths[:, None])[:, None].astype(np.int32), (1, 2, 1))
        ranks = np.stack([~first_wins, first_wins], axis=1).astype(np.int32)
        nothing = np.zeros(tokens.shape, np.int32)
        return PairBatch(tokens.astype(np.int32), nothing, nothing.astype(np.float32), segments, ranks,
                         np.zeros(size, np.float32))  # fmt: skip

    model = ModelConfig(**{f: getattr(MODEL, f) for f in ("vocab_size", "embed_dim", "num_heads", "mlp_dim", "head")},
                        num_layers=1, max_seq_length=4, remat="none")  # fmt: skip
    mesh = partition.make_mesh(MeshConfig(), devices=jax.devices()[:1])
    rule = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=10, weight_decay=0.0), 200)
    objective = make_reward(model, RewardConfig())
    init = lambda rng: decoder.init_params(model, rng)
    state, frozen, shardings = init_state(init, rule, jax.random.key(0), mesh, DEFAULT_RULES)
    step = make_train_step(objective, rule, mesh, DEFAULT_RULES, shardings=shardings)
    rng = np.random.default_rng(2)
    for _ in range(200):
        state, _ = step(state, frozen, sample(rng, seen, 512))

    learned = np.asarray(last_token_rewards(model, state.params, np.stack([np.full(12, 13), np.arange(12)], 1),
                                            np.ones((12, 2), np.int32)))  # fmt: skip
    difference = lambda s, which: s[which[:, 0]] - s[which[:, 1]]
    assert np.corrcoef(difference(learned, pairs), difference(scores, pairs))[0, 1] >= 0.98
    assert np.polyfit(difference(scores, pairs), difference(learned, pairs), 1)[0] == pytest.approx(1, abs=0.15)

    bayes = np.mean(1 / (1 + np.exp(-abs(difference(scores, held_out)))))
    sums = make_eval_step(objective, mesh, DEFAULT_RULES)(state.params, frozen, sample(rng, held_out, 20_000))
    assert float(sums["accuracy"] / sums["weight"]) == pytest.approx(bayes, abs=0.01)
