"""PPO's losses against golden numbers and exact expectations; its forward pass against whole, unpadded sequences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import partition
from jaxgpt.config import build
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig
from jaxgpt.models.decoder import VALUE_HEAD
from jaxgpt.objectives.ppo import (
    PPOConfig,
    kl_loss,
    make_policy,
    make_ppo,
    make_value,
    policy_loss,
    response_logprobs,
    response_values,
    token_means,
    token_weights,
    value_loss,
)
from jaxgpt.types import Trajectory

close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)

# Three responses of 3, 5 and 1 tokens, an update after they were sampled.
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], np.float32)
OLD = np.array([[-1.2, -0.7, -0.3, -2.0, -2.0], [-0.5, -1.1, -0.9, -0.4, -1.6], [-0.8, -9.0, -9.0, -9.0, -9.0]])
NEW = OLD + np.array([[0.3, -0.1, 0.05, 0.0, 0.0], [-0.4, 0.25, -0.02, 0.5, -0.3], [0.1, 0, 0, 0, 0]])
A = np.array(
    [
        [1.2117395640353272, 1.1559784269262166, 1.5177336265677417, 0, 0],
        [-0.6269740598972108, -0.9419566270952474, -0.9581788740653706, -0.5356923749106259, -1.142097577822894],
        [0.31944789626206277, 0, 0, 0, 0],
    ]
)
GRADIENT = [
    [0, -0.11621917056946532, -0.17728327706762542, 0, 0],
    [0, 0.1343884722897505, 0.10435618457215964, 0.09813415700744628, 0],
    [-0.0392271694210309, 0, 0, 0, 0],
]

# Four responses of one group, as GRPO sees them.
GROUP_MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]], np.float32)
GROUP_OLD = np.array([[-1.0, -0.5, -2.0, -0.7], [-0.3, -1.2, -3, -3], [-0.9, -3, -3, -3], [-1.5, -0.2, -0.8, -3]])
GROUP_NEW = GROUP_OLD + np.array([[0.25, -0.3, 0.05, 0.1], [-0.25, 0.3, 0, 0], [0.02, 0, 0, 0], [0.5, -0.05, -0.4, 0]])
GROUP_REF = GROUP_OLD + np.array([[0.1, 0.2, -0.3, 0.05], [0.4, -0.1, 0, 0], [-0.2, 0, 0, 0], [0.15, 0.3, -0.25, 0]])
GROUP_A = np.array([1.0495976769968014, -0.349865892332267, -1.2245306231629347, 0.5247988384984006])[:, None]


def wild(x, mask):
    """The same with nan where nothing should be looked at."""
    return np.where(mask != 0, x, np.nan).astype(np.float32)


def same(got, wanted):
    """Trees equal but for float32's rounding, at the scale of each array."""
    check = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * (1e-1 + np.abs(b).max()))
    jax.tree.map(check, got, wanted)


def policy_and_gradient(logp, old, advantages, mask, config, reference=None, coef=0.0):
    """(loss, metrics, gradient) as the train step makes them: sums divided by the weight."""
    weights, row_weights = token_weights(mask, config.aggregation)
    args = [wild(np.broadcast_to(x, mask.shape), mask) for x in (logp, old, advantages)]

    def total(logp):
        loss_sum, sums = policy_loss(logp, *args[1:], weights, config)
        if reference is not None:
            kl_sum, kl_sums = kl_loss(logp, wild(reference, mask), weights, config.kl_estimator, coef)
            loss_sum, sums = loss_sum + kl_sum, sums | kl_sums
        return loss_sum / row_weights.sum(), {name: value / row_weights.sum() for name, value in sums.items()}

    (loss, metrics), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(args[0])
    return loss, token_means(metrics), gradient


@pytest.mark.parametrize(
    ("bump", "options", "loss", "metrics"),
    [
        (0.0, {}, -0.0001652661516884507, {"clipfrac": 1 / 3, "approxkl": 0.037522222222222235,
                                           "ratio": 1.0816913186084018, "ratio_var": 0.08476126549466725}),
        (0.0, {"clip_epsilon_high": 0.28}, -0.010936284498669194,
         {"clipfrac": 1 / 3, "approxkl": 0.037522222222222235, "ratio": 1.0816913186084018,
          "ratio_var": 0.08476126549466725}),
        (1.5, {"dual_clip": 3.0}, 0.43227446751322596, {"clipfrac": 1 / 9, "approxkl": 0.17085555555555557,
                                                        "ratio": 1.6275962830490267, "ratio_var": 0.7224198558596069}),
    ],
    ids=["clip", "clip_higher", "dual_clip"],
)  # fmt: skip
def test_the_policy_loss_its_gradient_and_its_metrics_are_the_golden_numbers(bump, options, loss, metrics):
    logp = NEW.copy()
    logp[1, [0, 4]] += bump
    got, means, gradient = policy_and_gradient(logp, OLD, A, MASK, PPOConfig(**options))
    close(got, loss)
    close(gradient, GRADIENT)
    close(means["loss"], loss)
    for name, value in metrics.items():
        close(means[name], value, err_msg=name)


def test_a_policy_that_has_not_moved_has_ratio_1_exactly_and_the_gradient_of_the_log_probs():
    loss, means, gradient = policy_and_gradient(OLD, OLD, A, MASK, PPOConfig())
    close(loss, 0)  # the advantages are white
    assert means["ratio"] == 1
    assert means["ratio_var"] == means["approxkl"] == means["clipfrac"] == 0
    close(gradient, -A * MASK / 9)


@pytest.mark.parametrize(
    ("options", "coef", "loss", "gradient", "kl"),
    [
        ({"aggregation": "sequence"}, 0, 0.014162062464710856,
         [[0, -0.04859756771902718, -0.06896323129063471, -0.07249905176853887], [0, 0.059033694529393534, 0, 0],
          [0.3123169456636561, 0, 0, 0], [0, -0.04160034142695639, -0.029315265131808155, 0]], None),
        ({"aggregation": "token"}, 0, -0.3779790656995043,
         [[0, -0.07775610835044348, -0.11034117006501555, -0.1159984828296622], [0, 0.047226955623514824, 0, 0],
          [0.12492677826546243, 0, 0, 0], [0, -0.04992040971234768, -0.03517831815816979, 0]], None),
        ({"aggregation": "constant"}, 0, -0.2362369160621902,
         [[0, -0.04859756771902718, -0.06896323129063471, -0.07249905176853887], [0, 0.029516847264696767, 0, 0],
          [0.07807923641591402, 0, 0, 0], [0, -0.031200256070217296, -0.021986448848856116, 0]], None),
        ({"aggregation": "token", "clip_epsilon_high": 0.28}, 0, -0.39057423782346595,
         [[0, -0.07775610835044348, -0.11034117006501555, -0.1159984828296622], [0, 0.047226955623514824, 0, 0],
          [0.12492677826546243, 0, 0, 0], [0, -0.04992040971234768, -0.03517831815816979, 0]], None),
        ({"aggregation": "sequence", "kl_estimator": "k3"}, 0.04, 0.01705688799307903,
         [[0.0003482300589373555, -0.0502193708957775, -0.06822495151493149, -0.07237712532979065],
          [-0.004577704145069481, 0.06068209429921534, 0, 0], [0.3142917576840313, 0, 0, 0],
          [0.0009843730342709554, -0.042997233255600585, -0.029854712607569098, 0]], 0.07093163153968814),
        ({"aggregation": "constant", "kl_estimator": "k3"}, 0.04, -0.23446362527369796,
         [[0.0003482300589373555, -0.0502193708957775, -0.06822495151493149, -0.07237712532979065],
          [-0.0022888520725347404, 0.03034104714960767, 0, 0], [0.07857293942100782, 0, 0, 0],
          [0.0007382797757032167, -0.03224792494170044, -0.022391034455676823, 0]], 0.07093163153968814),
        ({"aggregation": "token", "kl_estimator": "k2"}, 0.04, -0.3753872656995043,
         [[0.0006, -0.07975610835044349, -0.10894117006501555, -0.1157984828296622], [-0.0026, 0.04882695562351482, 0, 0],
          [0.12580677826546244, 0, 0, 0], [0.0014, -0.05132041970234768, -0.03577831815816979, 0]], 0.064795),
    ],
    ids=["grpo", "dapo", "dr_grpo", "clip_higher", "grpo_k3", "dr_grpo_k3", "dapo_k2"],
)  # fmt: skip
def test_aggregations_and_kl_in_the_loss_are_the_golden_numbers(options, coef, loss, gradient, kl):
    config = PPOConfig(kl_in="loss", **options)
    got, means, slope = policy_and_gradient(
        GROUP_NEW, GROUP_OLD, GROUP_A, GROUP_MASK, config, GROUP_REF if coef else None, coef
    )
    close(got, loss)
    close(slope, gradient)
    ratio, high = np.exp(GROUP_NEW - GROUP_OLD), config.clip_epsilon_high or 0.2
    is_clipped = ((ratio > 1 + high) & (GROUP_A > 0)) | ((ratio < 0.8) & (GROUP_A < 0))
    close(means["clipfrac"], is_clipped[GROUP_MASK == 1].mean())  # of tokens, whatever they weigh
    close(means["ratio"], ratio[GROUP_MASK == 1].mean())
    assert (kl is None) == ("kl" not in means)
    if kl is not None:
        close(means["kl"], kl)


def test_the_value_loss_and_its_gradient_are_the_golden_numbers():
    old = np.array([[0.1, 0.2, -0.1, 5.0, 5.0], [0.0, 0.3, 0.25, -0.2, 0.4], [0.5, 5.0, 5.0, 5.0, 5.0]])
    new = old + np.array([[0.3, -0.1, 0.5, 0, 0], [-0.4, 0.05, -0.3, 0.25, 0.1], [-0.35, 0, 0, 0, 0]])
    returns = np.array(
        [[1.332925, 1.3715, 1.47, 0, 0], [-0.7925535, -0.83953, -0.9074, -0.892, -0.96], [0.75, 0, 0, 0, 0]]
    )
    wanted = [
        [0, -0.14127777777777775, 0, 0, 0],
        [0, 0.13216999999999995, 0, 0.10466666666666663, 0.1622222222222222],
        [-0.06666666666666667, 0, 0, 0, 0],
    ]

    @functools.partial(jax.jit, static_argnames="clip")
    def run(values, clip):
        total = lambda v: value_loss(v, wild(old, MASK), wild(returns, MASK), MASK, clip)
        return jax.value_and_grad(total, has_aux=True)(values)

    (loss, sums), gradient = run(wild(new, MASK), 0.2)
    close(loss / 9, 0.5901236853826248)
    close(gradient / 9, wanted)
    means = token_means(sums)
    close(means["clipfrac"], 4 / 9)
    error = ((new - returns) ** 2)[MASK == 1].mean()
    close(means["error"], error)
    for off in (0.0, None):
        (loss, sums), gradient = run(wild(new, MASK), off)
        close(loss / 9, error / 2)
        close(gradient, (new - returns) * MASK)
        assert sums["clipfrac"] == 0


def test_token_weights_count_tokens_sequences_or_sums_over_a_constant():
    mask = np.vstack([GROUP_MASK, np.zeros((1, 4), np.float32)])  # the last row is not used
    lengths = np.array([4, 2, 1, 3, 0])
    for aggregation, weights, rows in (
        ("token", mask, lengths),
        ("sequence", mask / np.maximum(lengths, 1)[:, None], lengths > 0),
        ("constant", mask / 4, lengths > 0),
    ):
        got = token_weights(mask, aggregation)
        for a, b in zip(got, (weights, rows), strict=True):
            assert a.dtype == jnp.float32
            close(a, b)
    with pytest.raises(ValueError, match="'mean'"):
        token_weights(mask, "mean")


def test_means_over_no_tokens_are_0_and_a_prefix_picks_its_own():
    _, sums = policy_loss(*(jnp.zeros((2, 3)) for _ in range(4)), PPOConfig())
    means = token_means({f"policy/{name}": value for name, value in sums.items()} | {"value/tokens": 3.0}, "policy/")
    assert set(means) == {
        "policy/loss", "policy/approxkl", "policy/clipfrac", "policy/ratio", "policy/ratio_var", "value/tokens",
    }  # fmt: skip
    assert all(np.isfinite(value) for value in means.values())


def test_expected_gradients_over_every_answer_are_those_the_config_promises():
    """One token, every answer weighted by its probability: the gradient of the expectation, without sampling."""
    rng = np.random.default_rng(0)
    theta, reward, beta = rng.normal(size=6), rng.normal(size=6), 0.3
    p, q = np.exp(theta) / np.exp(theta).sum(), rng.dirichlet(np.ones(6))
    log_ratio = np.log(p) - np.log(q)
    centred = lambda x: p * (x - (p * x).sum())  # the gradient of E_p[x], x constant, to theta

    def gradient(loss):
        return jax.grad(lambda theta: loss(jax.nn.log_softmax(theta)[:, None]))(jnp.asarray(theta, jnp.float32))

    column = lambda x: jnp.asarray(x, jnp.float32)[:, None]
    reference = column(np.log(q))
    wanted = {"k1": np.zeros(6), "k2": centred(log_ratio), "k3": p - q}  # 0, of KL(p || q), of KL(q || p)
    for kind, slope in wanted.items():
        close(gradient(lambda logp, kind=kind: kl_loss(logp, reference, column(p), kind)[0]), slope, err_msg=kind)

    surrogate = lambda logp: policy_loss(logp, column(np.log(p)), column(reward), column(p), PPOConfig())[0]
    close(gradient(surrogate), -centred(reward))
    # k1 in the reward: the gradient of E[r] - beta KL(p || q), zero at the closed-form optimum q exp(r / beta).
    shaped = lambda logp: policy_loss(
        logp, column(np.log(p)), column(reward - beta * log_ratio), column(p), PPOConfig()
    )[0]
    close(gradient(shaped), -centred(reward - beta * log_ratio))
    optimum = q * np.exp(reward / beta)
    theta = np.log(optimum / optimum.sum())
    p, log_ratio = np.exp(theta), theta - np.log(q)
    close(gradient(shaped), 0)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"num_epochs": 0}, "num_epochs"),
        ({"num_minibatches": 0}, "num_minibatches"),
        ({"clip_epsilon": 0.0}, "clip_epsilon"),
        ({"clip_epsilon": 1.0}, "clip_epsilon"),
        ({"clip_epsilon_high": 0.0}, "clip_epsilon_high"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"value_clip": -0.1}, "value_clip"),
        ({"value_coef": -1.0}, "value_coef"),
        ({"entropy_coef": -0.1}, "entropy_coef"),
        ({"gamma": 1.1}, "gamma"),
        ({"gae_lambda": -0.1}, "gae_lambda"),
        ({"kl_coef": -0.1}, "kl_coef"),
        ({"kl_coef": float("nan")}, "kl_coef"),
        ({"kl_estimator": "k4"}, "kl_estimator"),
        ({"kl_in": "both"}, "kl_in"),
        ({"kl_target": 0.0}, "kl_target"),
        ({"kl_target": 6.0, "kl_coef": 0.0}, "kl_target"),
        ({"kl_horizon": 0}, "kl_horizon"),
        ({"reward_clip": -5.0}, "reward_clip"),
        ({"target_kl": 0.0}, "target_kl"),
        ({"aggregation": "mean"}, "aggregation"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
    ],
)
def test_configs_without_meaning_are_refused_by_field(fields, name):
    with pytest.raises(ValueError, match=rf"ppo\.{name}\b"):
        PPOConfig(**fields)


def test_optional_fields_may_be_switched_off_and_the_config_is_built_from_a_mapping():
    off = {"value_clip": None, "clip_epsilon_high": None, "dual_clip": None, "kl_target": None, "reward_clip": None}
    assert build(PPOConfig, off | {"kl_in": "loss"}, "ppo") == PPOConfig(value_clip=None, kl_in="loss")
    assert PPOConfig(value_clip=0).value_clip == 0


POLICY = ModelConfig(
    vocab_size=16,
    num_layers=1,
    embed_dim=16,
    num_heads=2,
    mlp_dim=32,
    max_seq_length=32,
    position="learned",
    init="fan_in",
    remat="none",
    dropout=0.5,  # which must not be heard of
)
CRITIC = dataclasses.replace(POLICY, head="scalar")
PROMPTS, LENGTHS = (3, 1, 4), (2, 4, 1)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda rng: partition.unbox(decoder.init_params(POLICY, rng)))(jax.random.key(0))


@pytest.fixture(scope="module")
def critic():
    return jax.jit(lambda rng: partition.unbox(decoder.init_params(CRITIC, rng)))(jax.random.key(1))


@functools.cache
def sequences():
    rng = np.random.default_rng(3)
    return [rng.integers(1, 16, p + r).astype(np.int32) for p, r in zip(PROMPTS, LENGTHS, strict=True)]


def make_batch(left=0, right=0, aggregation="token", pad=0):
    """Three prompts of 3, 1 and 4 tokens, responses of 2, 4 and 1; `left` and `right` add padding."""
    prompt, response = max(PROMPTS) + left, max(LENGTHS) + right
    tokens, segments = np.full((3, prompt + response), pad, np.int32), np.zeros((3, prompt + response), np.int32)
    for i, row in enumerate(sequences()):
        real = slice(prompt - PROMPTS[i], prompt + LENGTHS[i])
        tokens[i, real], segments[i, real] = row, 1
    mask = segments[:, prompt:].astype(np.float32)
    rng = np.random.default_rng(4)
    extras = [wild(np.pad(rng.normal(size=(3, max(LENGTHS))), ((0, 0), (0, right))), mask) for _ in range(5)]
    weights, row_weights = token_weights(mask, aggregation)
    return Trajectory(
        tokens_BS=tokens,
        segments_BS=segments,
        positions_BS=np.maximum(np.cumsum(segments, axis=1) - 1, 0),
        response_mask_BR=mask,
        old_logprobs_BR=extras[0] * 0.1 - 2.5,
        advantages_BR=extras[1],
        weights_BR=np.asarray(weights),
        row_weights_B=np.asarray(row_weights),
        returns_BR=extras[2],
        old_values_BR=extras[3],
        reference_logprobs_BR=extras[4] * 0.1 - 2.5,
    )


forward = jax.jit(functools.partial(decoder.forward, POLICY))


@functools.partial(jax.jit, static_argnames=("chunk_tokens", "temperature"))
def logprobs(params, batch, chunk_tokens=1000, temperature=0.7):
    return response_logprobs(
        POLICY, params, batch.tokens_BS, batch.segments_BS, batch.positions_BS,
        num_response=batch.response_mask_BR.shape[1], temperature=temperature, chunk_tokens=chunk_tokens,
    )  # fmt: skip


@jax.jit
def values(critic, batch):
    return response_values(
        CRITIC, critic, batch.tokens_BS, batch.segments_BS, batch.positions_BS,
        num_response=batch.response_mask_BR.shape[1],
    )  # fmt: skip


def logprobs64(params, temperature=0.7):
    """Log-probs and entropies of each response, from the logits of whole sequences without padding, in float64."""
    rows = np.stack(sequences())  # all of one length
    logits = np.asarray(forward(params, rows), np.float64) / temperature
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    out = np.zeros((2, 3, max(LENGTHS)))
    for i, row in enumerate(rows):
        places = np.arange(PROMPTS[i] - 1, len(row) - 1)
        out[0, i, : LENGTHS[i]] = log_p[i, places, row[places + 1]]
        out[1, i, : LENGTHS[i]] = -(np.exp(log_p[i]) * log_p[i]).sum(-1)[places]
    return out


def test_response_logprobs_are_those_of_the_sequence_alone_whatever_the_padding(params):
    expected = logprobs64(params)
    for left, right, chunk_tokens, pad in ((0, 0, 1000, 0), (3, 0, 4, 5), (0, 4, 5, 7)):
        got = logprobs(params, make_batch(left, right, pad=pad), chunk_tokens)
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == jnp.float32
            np.testing.assert_allclose(a[:, : max(LENGTHS)], b, rtol=1e-5, atol=1e-5, err_msg=f"{left} {right}")
            assert not a[:, max(LENGTHS) :].any()


def test_response_values_are_those_of_the_sequence_alone_whatever_the_padding(critic):
    expected = np.zeros((3, max(LENGTHS)))
    head = jax.tree.map(lambda p: np.asarray(p, np.float64), critic["head"])
    x = np.asarray(jax.jit(functools.partial(decoder.hidden_states, CRITIC))(critic, np.stack(sequences())), np.float64)
    v = (x @ head["kernel"] + head["bias"])[..., 0]
    for i in range(3):
        expected[i, : LENGTHS[i]] = v[i, PROMPTS[i] - 1 : -1]
    for left, right in ((0, 0), (3, 4)):
        got = values(critic, make_batch(left, right))
        np.testing.assert_allclose(got[:, : max(LENGTHS)], expected, rtol=1e-5, atol=1e-5)
        assert not got[:, max(LENGTHS) :].any()


def test_a_value_knows_the_token_before_but_neither_its_own_nor_a_later_one(critic):
    """By gradient: one embedding row per place of one sequence, so that a place's influence can be seen."""
    model = dataclasses.replace(CRITIC, dropout=0.0)
    prompt, response = 3, 4
    length = prompt + response
    tokens = jnp.arange(length)[None]
    whole = jnp.ones_like(tokens)

    def of_embeddings(table):
        moved = {**critic, "embedder": {"embedding": table}}
        return response_values(model, moved, tokens, whole, tokens, num_response=response)[0]

    jacobian = jax.jit(jax.jacobian(of_embeddings))(critic["embedder"]["embedding"])
    influence = np.abs(jacobian).sum(-1)[:, :length] > 0  # [R, S]: whether V_t depends on the token of a place
    np.testing.assert_array_equal(influence, np.arange(length) < prompt + np.arange(response)[:, None])


def test_a_policy_before_its_first_update_has_ratio_1(params):
    batch = make_batch()
    old, _ = logprobs(params, batch, PPOConfig().chunk_tokens)
    objective = make_policy(POLICY, PPOConfig(), 0.7)
    run = jax.jit(jax.value_and_grad(objective, has_aux=True))
    # The key is there for dropout, which would be heard at once.
    (_, sums), gradient = run(params, batch.replace(old_logprobs_BR=old), jax.random.key(0))
    means = token_means(sums)
    np.testing.assert_allclose(means["ratio"], 1, atol=1e-6)  # two programs, whose rounding may differ
    assert max(means["approxkl"], means["ratio_var"]) < 1e-12
    assert means["clipfrac"] == 0
    assert sums["weight"] == sum(LENGTHS)
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient))


def plain_loss(params, batch, config, temperature):
    """The whole objective by plain autodiff through unchunked logits."""
    logits = decoder.forward(POLICY, params, batch.tokens_BS, batch.segments_BS, batch.positions_BS)
    live = batch.response_mask_BR == 1
    start = batch.tokens_BS.shape[1] - live.shape[1]
    log_p = jax.nn.log_softmax(logits / temperature)[:, start - 1 : -1]
    logp = jnp.take_along_axis(log_p, batch.tokens_BS[:, start:, None], -1)[..., 0]
    entropy = -(jnp.exp(log_p) * log_p).sum(-1)
    old, advantage, reference = (
        jnp.where(live, x, 0) for x in (batch.old_logprobs_BR, batch.advantages_BR, batch.reference_logprobs_BR)
    )
    ratio = jnp.exp(jnp.where(live, logp - old, 0))
    loss = jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 0.8, 1.2))
    coef = config.kl_coef if batch.kl_coef_B is None else batch.kl_coef_B[:, None]
    loss += coef * jnp.square(logp - reference) / 2
    return jnp.sum(batch.weights_BR * (loss - config.entropy_coef * entropy))


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_policy_objective_and_its_gradient_are_those_through_whole_logits(params, adaptive):
    config = PPOConfig(kl_in="loss", kl_estimator="k2", kl_coef=0.3, entropy_coef=0.2, chunk_tokens=4)
    ours = jax.jit(jax.value_and_grad(make_policy(POLICY, config, 0.7), has_aux=True))
    plain = jax.jit(jax.value_and_grad(functools.partial(plain_loss, config=config, temperature=0.7)))
    wanted, entropy = logprobs64(params)
    for aggregation, weight in (("token", 7), ("sequence", 3), ("constant", 3)):
        batch = make_batch(aggregation=aggregation)
        if adaptive:
            batch = batch.replace(kl_coef_B=np.array([0.1, 0.5, 2.0], np.float32))
        (loss, sums), gradient = ours(params, batch, None)
        expected, slope = plain(params, batch)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        same(gradient, slope)
        live, means = batch.response_mask_BR == 1, token_means(sums)
        close(means["kl"], np.mean((wanted - batch.reference_logprobs_BR)[live] ** 2) / 2, rtol=1e-4)
        close(means["entropy"], entropy[live].mean(), rtol=1e-4)
        close(sums["weight"], weight)


def test_sums_add_over_rows_and_padding_and_order_change_nothing(params, critic):
    config = PPOConfig(kl_in="loss", kl_estimator="k3", entropy_coef=0.1, value_coef=0.3, chunk_tokens=4)
    run = jax.jit(jax.value_and_grad(make_ppo(POLICY, config, 0.7), has_aux=True))
    both = {**params, VALUE_HEAD: critic["head"]}
    rows = lambda batch, index: jax.tree.map(lambda a: a[np.array(index)], batch)
    for aggregation in ("token", "sequence", "constant"):
        batch = make_batch(aggregation=aggregation)
        whole = run(both, batch, None)
        parts = [run(both, rows(batch, [i]), None) for i in range(3)]
        same(jax.tree.map(lambda *a: sum(a), *parts), whole)
        same(run(both, rows(batch, [2, 0, 1]), None), whole)
        if aggregation != "constant":  # whose constant is the length that is added to
            same(run(both, make_batch(left=3, right=4, aggregation=aggregation, pad=5), None), whole)


def test_one_loss_over_a_shared_trunk_is_the_weighted_sum_of_both(params, critic):
    batch, config = make_batch(), PPOConfig(value_coef=0.3, value_clip=0.1)
    policy, value = make_policy(POLICY, config, 0.7), make_value(CRITIC, config)
    both = {**params, VALUE_HEAD: critic["head"]}
    (loss, sums), gradient = jax.jit(jax.value_and_grad(make_ppo(POLICY, config, 0.7), has_aux=True))(both, batch, None)

    def plain(both):
        critic = {**both, "head": both[VALUE_HEAD]}
        return policy(both, batch, None)[0] + 0.3 * value(critic, batch, None)[0]

    wanted, slope = jax.jit(jax.value_and_grad(plain))(both)
    close(loss, wanted, rtol=1e-5)
    same(gradient, slope)
    assert sums["weight"] == 7
    assert {"policy/approxkl", "value/clipfrac", "policy/tokens", "value/tokens"} <= set(sums)


def test_the_value_objective_is_the_clipped_error_of_the_values(critic):
    batch = make_batch()
    total, _ = jax.jit(make_value(CRITIC, PPOConfig(value_clip=0.1)))(critic, batch, None)
    v, live = np.asarray(values(critic, batch), np.float64), batch.response_mask_BR == 1
    v, old, returns = v[live], batch.old_values_BR[live], batch.returns_BR[live]
    clipped = np.clip(v, old - 0.1, old + 0.1)
    close(total, np.maximum((v - returns) ** 2, (clipped - returns) ** 2).sum() / 2, rtol=1e-5)


def test_rows_without_weight_are_out_of_loss_gradient_and_metrics(params):
    batch = make_batch(aggregation="sequence")
    used = np.array([1.0, 0.0, 1.0], np.float32)
    dropped = batch.replace(weights_BR=batch.weights_BR * used[:, None], row_weights_B=batch.row_weights_B * used)
    run = jax.jit(jax.value_and_grad(make_policy(POLICY, PPOConfig(aggregation="sequence"), 0.7), has_aux=True))
    got, wanted = run(params, dropped, None), run(params, jax.tree.map(lambda a: a[[0, 2]], batch), None)
    same(got, wanted)
    assert got[0][1]["tokens"] == 3


def test_what_is_missing_or_impossible_is_refused(params, critic):
    batch = make_batch()
    for make in (
        lambda: make_policy(CRITIC, PPOConfig(), 1.0),
        lambda: make_value(POLICY, PPOConfig()),
        lambda: jax.eval_shape(
            functools.partial(response_values, POLICY, num_response=4), params, *[batch.tokens_BS] * 3
        ),
    ):
        with pytest.raises(ValueError, match=r"model\.head"):
            make()
    with pytest.raises(ValueError, match=r"rollout\.temperature"):
        make_policy(POLICY, PPOConfig(), 0.0)
    none = batch.replace(reference_logprobs_BR=None)
    with pytest.raises(ValueError, match="reference_logprobs_BR"):
        jax.eval_shape(make_policy(POLICY, PPOConfig(kl_in="loss"), 1.0), params, none, None)
    with pytest.raises(ValueError, match="returns_BR"):
        jax.eval_shape(make_value(CRITIC, PPOConfig()), critic, batch.replace(returns_BR=None), None)
    values_of_all = functools.partial(response_values, CRITIC, num_response=8)
    with pytest.raises(ValueError, match="8 of 8 tokens are the response"):
        jax.eval_shape(values_of_all, critic, *[batch.tokens_BS] * 3)
