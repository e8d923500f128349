"""Scores, rewards, advantages and running moments against golden numbers, float64 numpy and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import numerics
from jaxgpt.rl import advantages

close = lambda got, wanted: np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)

# Three responses: ended at the third token, cut off by the length, ended at once.
LOGP = np.array([[-1.2, -0.7, -0.3, -2.0, -2.0], [-0.5, -1.1, -0.9, -0.4, -1.6], [-0.8, -9.0, -9.0, -9.0, -9.0]])
REFERENCE = np.array([[-1.0, -0.9, -0.6, -1.0, -1.0], [-0.6, -1.0, -1.4, -0.4, -1.2], [-1.3, -7.0, -7.0, -7.0, -7.0]])
VALUES = np.array([[0.1, 0.2, -0.1, 5.0, 5.0], [0.0, 0.3, 0.25, -0.2, 0.4], [0.5, 5.0, 5.0, 5.0, 5.0]])
MASK = np.array([[1.0, 1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0, 0.0]])
SCORES = np.array([1.5, -0.4, 0.8])
PENALISED = np.array([1.5, -1.0, 0.8])
KL = {
    "k1": [[-0.2, 0.2, 0.3, 0, 0], [0.1, -0.1, 0.5, 0, -0.4], [0.5, 0, 0, 0, 0]],
    "k2": [[0.02, 0.02, 0.045, 0, 0], [0.005, 0.005, 0.125, 0, 0.08], [0.125, 0, 0, 0, 0]],
    "k3": [
        [0.021402758160169816, 0.01873075307798186, 0.040818220681717865, 0, 0],
        [0.004837418035959565, 0.0051709180756476375, 0.10653065971263337, 0, 0.09182469764127038],
        [0.10653065971263342, 0, 0, 0, 0],
    ],
}
REWARDS = np.array([[0.02, -0.02, 1.47, 0.0, 0.0], [-0.01, 0.01, -0.05, 0.0, -0.96], [0.75, 0.0, 0.0, 0.0, 0.0]])
ADVANTAGES = np.array(
    [[1.232925, 1.1715, 1.57, 0, 0], [-0.7925535, -1.13953, -1.1574, -0.692, -1.36], [0.25, 0, 0, 0, 0]]
)
RETURNS = np.array([[1.332925, 1.3715, 1.47, 0, 0], [-0.7925535, -0.83953, -0.9074, -0.892, -0.96], [0.75, 0, 0, 0, 0]])


def wild(x, mask=MASK):
    """The same with nan where nothing should be looked at."""
    return np.where(mask != 0, x, np.nan).astype(np.float32)


def test_a_response_cut_off_gets_the_penalty_for_its_score():
    has_eos = np.array([True, False, True])
    close(advantages.apply_missing_eos(SCORES, has_eos, -1.0), PENALISED)
    close(advantages.apply_missing_eos(SCORES, has_eos, None), SCORES)
    torso = advantages.apply_missing_eos(np.array([np.nan, 2.0]), has_eos[1:], 0.0)
    np.testing.assert_array_equal(torso, [0.0, 2.0])


def test_scores_are_clipped_on_both_sides():
    close(advantages.clip_scores(np.array([-3.0, -0.5, 0.5, 3.0]), 1.0), [-1, -0.5, 0.5, 1])
    close(advantages.clip_scores(SCORES, None), SCORES)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimates_are_the_golden_numbers(kind):
    close(advantages.kl_estimate(LOGP, REFERENCE, kind) * MASK, KL[kind])
    rewards, kl = advantages.shaped_rewards(PENALISED, wild(LOGP), wild(REFERENCE), MASK, 0.1, kind)
    close(kl, KL[kind])
    last = np.array([[0, 0, 1, 0, 0], [0, 0, 0, 0, 1], [1, 0, 0, 0, 0]])
    close(rewards, last * PENALISED[:, None] - 0.1 * np.array(KL[kind]))


def test_an_estimator_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="k1, k2, k3, not 'k4'"):
        advantages.kl_estimate(LOGP, REFERENCE, "k4")


def test_rewards_are_the_golden_numbers_and_floating_point_whatever_the_scores_are():
    rewards, kl = jax.jit(advantages.shaped_rewards)(PENALISED, wild(LOGP), wild(REFERENCE), MASK, 0.1)
    close(rewards, REWARDS)
    close(kl.sum(1).mean(), 0.3)
    for scores in (np.array([1, 0, 1]), np.array([True, False, True])):
        rewards, _ = advantages.shaped_rewards(scores, LOGP, LOGP, MASK, 0.1)
        assert rewards.dtype == jnp.float32
        close(rewards.sum(1), [1, 0, 1])
    halves, _ = advantages.shaped_rewards(np.array([0.5, 0.25, 0.5]), LOGP, REFERENCE, MASK.astype(np.int32), 0.1)
    close(halves[0, 2], 0.5 - 0.1 * 0.3)


def test_a_row_without_a_live_token_has_no_reward():
    rewards, kl = advantages.shaped_rewards(SCORES, LOGP, REFERENCE, np.zeros_like(MASK), 0.1)
    assert not rewards.any()
    assert not kl.any()


def test_shapes_that_disagree_are_refused():
    with pytest.raises(ValueError, match="reference_BR"):
        advantages.shaped_rewards(SCORES, LOGP, REFERENCE[:, :1], MASK, 0.1)
    with pytest.raises(ValueError, match="scores_B"):
        advantages.shaped_rewards(SCORES[:, None], LOGP, REFERENCE, MASK, 0.1)
    with pytest.raises(ValueError, match="values_BR"):
        advantages.gae(REWARDS, VALUES[:, :-1], MASK, gamma=1.0, lam=0.95)


gae = jax.jit(advantages.gae, static_argnames=("gamma", "lam"))


def test_gae_is_the_golden_numbers():
    got, returns = gae(wild(REWARDS), wild(VALUES), MASK, gamma=1.0, lam=0.95)
    close(got, ADVANTAGES)
    close(returns, RETURNS)
    got, returns = gae(wild(REWARDS), wild(VALUES), MASK, gamma=0.9, lam=0.5)
    close(got, [[0.278425, 0.3965, 1.57, 0, 0], [0.1288115, -0.29153, -0.5034, -0.052, -1.36], [0.25, 0, 0, 0, 0]])
    close(returns, [[0.378425, 0.5965, 1.47, 0, 0], [0.1288115, 0.00847, -0.2534, -0.252, -0.96], [0.75, 0, 0, 0, 0]])


def test_gae_skips_a_hole_in_the_mask():
    mask = np.array([[1.0, 1, 0, 0, 1]])
    rewards, values = np.array([[0.1, -0.2, 9.0, 9.0, 1.0]]), np.array([[0.3, 0.1, 7.0, 7.0, 0.5]])
    got, returns = gae(wild(rewards, mask), wild(values, mask), mask, gamma=1.0, lam=0.95)
    close(got, [[0.54125, 0.675, 0, 0, 0.5]])
    close(returns, [[0.84125, 0.775, 0, 0, 1.0]])


def test_gae_with_lambda_1_telescopes_and_with_lambda_0_looks_one_token_ahead():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 7)), rng.normal(size=(2, 7))
    mask = (np.arange(7) < np.array([[7], [4]])).astype(np.float64)
    alive = rewards * mask
    left = np.stack([sum(0.9**k * alive[:, t + k] for k in range(7 - t)) for t in range(7)], axis=1)
    got, returns = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    close(returns, left * mask)
    close(got, (left - values) * mask)
    after = np.pad(values * mask, ((0, 0), (0, 1)))[:, 1:]
    close(gae(rewards, values, mask, gamma=0.9, lam=0.0)[0], (rewards + 0.9 * after - values) * mask)


def test_more_padding_and_another_order_of_rows_change_nothing():
    pipeline = lambda scores, logp, reference, values, mask: gae(
        advantages.shaped_rewards(scores, logp, reference, mask, 0.1)[0], values, mask, gamma=0.9, lam=0.95
    )
    rows = lambda *arrays: [np.asarray(a, np.float32) for a in arrays]
    plain = pipeline(*rows(PENALISED, LOGP, REFERENCE, VALUES, MASK))
    wider = [np.pad(a, ((0, 0), (0, 4)), constant_values=c) for a, c in zip((LOGP, REFERENCE, VALUES, MASK),
             (np.nan, 3.0, -7.0, 0.0), strict=True)]  # fmt: skip
    for a, b in zip(pipeline(*rows(PENALISED, *wider)), plain, strict=True):
        np.testing.assert_array_equal(a[:, :5], b)
        assert not a[:, 5:].any()
    order = [2, 0, 1]
    moved = pipeline(*(a[order] for a in rows(PENALISED, LOGP, REFERENCE, VALUES, MASK)))
    for a, b in zip(moved, plain, strict=True):
        np.testing.assert_array_equal(a, b[jnp.array(order)])
    whitened = numerics.masked_whiten(plain[0], MASK)
    close(numerics.masked_whiten(moved[0], MASK[order]), whitened[jnp.array(order)])
    close(numerics.masked_whiten(np.pad(plain[0], ((0, 0), (0, 3))), np.pad(MASK, ((0, 0), (0, 3))))[:, :5], whitened)


GROUPS = np.array([1.0, 0.2, -0.3, 0.7, 0.5, 0.1, 0.9, 0.4])


def test_the_best_of_a_group_is_imitated_and_ties_share():
    scores = np.array([1, 3, 2, 0, 5, 5, 1, 5])
    got = advantages.group_advantages(scores, 4, scale="none", baseline="best")
    close(got, [0, 1, 0, 0, 1 / 3, 1 / 3, 0, 1 / 3])


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [1.0495976769968014, -0.349865892332267, -1.2245306231629347, 0.5247988384984006,
              0.0756420970114861, -1.1346314551722902, 1.2859156491952626, -0.22692629103445794]),
        ({"scale": "batch"}, [1.3820348277025662, -0.46067827590085525, -1.6123739656529936, 0.691017413851283,
                              0.05758478448760697, -0.8637717673141038, 0.9789413362893177, -0.17275353462082064]),
        ({"scale": "none", "baseline": "leave_one_out"}, [0.8, -0.8 / 3, -2.8 / 3, 0.4, 0.1 / 3, -0.5, 1.7 / 3, -0.1]),
        ({"scale": "none", "baseline": "batch_mean"}, [0.5625, -0.2375, -0.7375, 0.2625, 0.0625, -0.3375, 0.4625,
                                                       -0.0375]),
        ({"scale": "none", "baseline": "none"}, GROUPS),
    ],
    ids=["grpo", "batch", "rloo", "reinforce", "plain"],
)  # fmt: skip
def test_group_advantages_are_the_golden_numbers(options, wanted):
    close(advantages.group_advantages(GROUPS, 4, **options), wanted)


def test_binary_rewards_as_in_grpo_and_dr_grpo_and_equal_ones_teach_nothing():
    scores = np.array([1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5])
    a = 0.8658754297607016
    close(advantages.group_advantages(scores, 4), [a, -a, -a, a, 0, 0, 0, 0])
    close(advantages.group_advantages(scores, 4, scale="none"), [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0])
    np.testing.assert_array_equal(advantages.has_spread(scores, 4), [True] * 4 + [False] * 4)
    equal = np.full(3, 1000.7)  # the mean of these is another float32
    for baseline in ("mean", "leave_one_out"):
        assert not advantages.group_advantages(equal, 3, baseline=baseline).any()


def test_integer_scores_are_not_truncated():
    got = advantages.group_advantages(np.array([1, 0, 0, 0]), 4, scale="none")
    close(got, [0.75, -0.25, -0.25, -0.25])


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (3, {}, "8 responses do not divide into groups of 3"),
        (1, {}, r"rollout\.num_samples_per_prompt must be at least 2"),
        (1, {"baseline": "leave_one_out", "scale": "none"}, r"rollout\.num_samples_per_prompt"),
        (4, {"baseline": "median"}, "baseline must be one of"),
        (4, {"scale": "std"}, "scale must be one of"),
    ],
)
def test_groups_without_meaning_are_refused(size, options, message):
    with pytest.raises(ValueError, match=message):
        advantages.group_advantages(GROUPS, size, **options)


def test_the_kl_coefficient_moves_towards_its_target_by_the_golden_steps():
    close(advantages.adaptive_kl(0.15, 7.8, 6.0, 10_000, 512), 0.151536)
    close(advantages.adaptive_kl(0.15, 5.4, 6.0, 10_000, 512), 0.149232)
    close(advantages.adaptive_kl(0.15, 6.0, 6.0, 10_000, 512), 0.15)
    with pytest.raises(ValueError, match=r"ppo\.kl_horizon=100 "):
        advantages.adaptive_kl(0.15, 5.4, 6.0, 100, 512)


def test_running_moments_are_those_of_everything_seen_however_it_came():
    rng = np.random.default_rng(1)
    x = rng.normal(100.0, 0.5, 60)  # a mean that drowns the deviations in a sum of squares
    update = jax.jit(advantages.update_moments)
    for cuts in ((0, 60), (0, 1, 2, 30, 60), (0, 7, 7, 60)):
        moments = advantages.init_moments()
        for start, stop in zip(cuts, cuts[1:], strict=False):
            moments = update(moments, x[start:stop].astype(np.float32))
        assert moments.count == 60
        np.testing.assert_allclose(moments.mean, x.mean(), rtol=1e-6)
        np.testing.assert_allclose(moments.m2 / 60, x.var(), rtol=1e-3)
        np.testing.assert_allclose(advantages.normalize(x, moments), (x - x.mean()) / x.std(), atol=1e-3)
    mask = rng.random(60) > 0.5
    part = update(advantages.init_moments(), np.where(mask, x, np.nan).astype(np.float32), mask)
    np.testing.assert_allclose(part.mean, x[mask].mean(), rtol=1e-6)
    np.testing.assert_allclose(part.m2 / part.count, x[mask].var(), rtol=1e-3)
    again = update(part, x.astype(np.float32), np.zeros(60))
    jax.tree.map(np.testing.assert_array_equal, again, part)


def test_moments_of_nothing_normalize_nothing_and_equal_scores_become_0():
    close(advantages.normalize(SCORES, advantages.init_moments()), SCORES)
    one = advantages.update_moments(advantages.init_moments(), np.full(4, 2.5))
    assert not advantages.normalize(np.full(2, 2.5), one).any()


def test_a_score_that_is_not_finite_leaves_no_trace_in_the_moments():
    moments = advantages.init_moments()
    for scores in ([1.0, 2.0], [np.nan, 4.0], [np.inf, -np.inf], [7.0, 9.0]):
        moments = advantages.update_moments(moments, np.array(scores, np.float32))
    seen = np.array([1.0, 2.0, 4.0, 7.0, 9.0])
    close(moments.count, 5)
    close(moments.mean, seen.mean())
    close(moments.m2, np.sum((seen - seen.mean()) ** 2))


def test_a_kl_that_is_not_finite_leaves_the_coefficient_alone():
    for kl in (np.nan, np.inf):
        close(advantages.adaptive_kl(0.15, kl, 6.0, 10_000, 512), 0.15)


def test_explained_variance_of_a_perfect_an_ignorant_and_a_wrong_critic():
    returns = wild(RETURNS)
    live = MASK != 0
    mean = RETURNS[live].mean()
    explained = lambda values: advantages.explained_variance(wild(values), returns, MASK)
    close(explained(RETURNS), 1)
    close(explained(np.full_like(RETURNS, mean)), 0)
    close(explained(2 * mean - RETURNS), -3)
    np.testing.assert_allclose(explained(VALUES), 1 - (RETURNS - VALUES)[live].var() / RETURNS[live].var(), rtol=1e-5)
    assert advantages.explained_variance(VALUES, np.ones_like(VALUES), MASK) == 0
