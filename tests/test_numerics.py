"""Losses against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import numerics

V, D = 11, 5


def reference(logits, targets, weights, z_loss, smoothing):
    logits, weights = logits.astype(np.float64), weights.astype(np.float64)
    log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    log_p = logits - log_z[..., None]
    one_hot = np.eye(V)[targets]
    smooth = (1 - smoothing) * one_hot + smoothing / V
    loss = -(smooth * log_p).sum(-1) + z_loss * log_z**2
    nll = -(one_hot * log_p).sum(-1)
    return (loss * weights).sum(), (nll * weights).sum(), ((logits.argmax(-1) == targets) * weights).sum()


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(3, 8, D)).astype(np.float32),
        "head": rng.normal(size=(D, V)).astype(np.float32) * 2,
        "targets": rng.integers(0, V, (3, 8)),
        "weights": (rng.random((3, 8)) > 0.3) * rng.random((3, 8)).astype(np.float32),
    }


@pytest.mark.parametrize(("z_loss", "smoothing"), [(0.0, 0.0), (0.01, 0.0), (0.01, 0.2)])
@pytest.mark.parametrize("chunk_tokens", [1, 6, 7, 1000])
def test_chunked_cross_entropy_is_the_weighted_sum_in_float64(case, z_loss, smoothing, chunk_tokens):
    total, sums = numerics.chunked_cross_entropy(
        lambda head, x: x @ head, case["head"], case["x"], case["targets"], case["weights"],
        chunk_tokens=chunk_tokens, z_loss=z_loss, label_smoothing=smoothing,
    )  # fmt: skip
    loss, nll, correct = reference(case["x"] @ case["head"], case["targets"], case["weights"], z_loss, smoothing)
    np.testing.assert_allclose(total, loss, rtol=1e-5)
    np.testing.assert_allclose(sums["loss"], nll, rtol=1e-5)
    np.testing.assert_allclose(sums["accuracy"], correct, rtol=1e-5)
    np.testing.assert_allclose(sums["weight"], case["weights"].sum(), rtol=1e-6)


def test_chunked_gradients_match_finite_differences_of_the_float64_loss(case):
    def loss(head, x):
        return numerics.chunked_cross_entropy(
            lambda head, x: x @ head, head, x, case["targets"], case["weights"],
            chunk_tokens=6, z_loss=0.01, label_smoothing=0.1,
        )[0] * 3  # fmt: skip

    d_head, d_x = jax.grad(loss, argnums=(0, 1))(jnp.asarray(case["head"]), jnp.asarray(case["x"]))

    def loss64(head, x):
        return 3 * reference(x @ head, case["targets"], case["weights"], 0.01, 0.1)[0]

    head, x, rng = case["head"].astype(np.float64), case["x"].astype(np.float64), np.random.default_rng(1)
    for _ in range(5):  # directional derivatives
        a, b = rng.normal(size=head.shape), rng.normal(size=x.shape)
        e = 1e-5
        slope = (loss64(head + e * a, x + e * b) - loss64(head - e * a, x - e * b)) / (2 * e)
        np.testing.assert_allclose((d_head * a).sum() + (d_x * b).sum(), slope, rtol=1e-4)


def test_a_masked_sum_ignores_nan_under_the_mask():
    x = jnp.array([1.0, jnp.nan, 3.0])
    mask = jnp.array([1.0, 0.0, 0.5])
    assert numerics.masked_sum(x, mask) == 2.5
    np.testing.assert_allclose(numerics.masked_mean(x, mask), 2.5 / 1.5, rtol=1e-6)
    assert numerics.masked_mean(x, jnp.zeros(3)) == 0


def test_token_logprobs_equal_log_softmax(case):
    logits = case["x"] @ case["head"]
    wide = logits.astype(np.float64)
    expected = np.take_along_axis(wide - np.log(np.exp(wide).sum(-1, keepdims=True)), case["targets"][..., None], -1)
    np.testing.assert_allclose(numerics.token_logprobs(logits, case["targets"]), expected[..., 0], rtol=1e-5, atol=1e-5)


def test_logits_of_the_whole_batch_never_exist(case):
    def loss(head, x):
        return numerics.chunked_cross_entropy(
            lambda head, x: x @ head, head, x, case["targets"], case["weights"], chunk_tokens=3
        )[0]

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(case["head"], case["x"]))
    assert f"f32[3,1,{V}]" in text
    assert f"f32[3,8,{V}]" not in text


@pytest.mark.parametrize("chunk_tokens", [1, 6, 7, 1000])
def test_chunked_token_logprobs_and_their_gradients_are_the_unchunked_ones_in_float64(case, chunk_tokens):
    cotangent = np.random.default_rng(2).normal(size=case["targets"].shape)

    def total(head, x):
        logprobs = numerics.chunked_token_logprobs(
            lambda head, x: x @ head, head, x, case["targets"], chunk_tokens=chunk_tokens
        )
        return jnp.sum(logprobs * cotangent), logprobs

    (_, logprobs), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(case["head"], case["x"])
    head, x = case["head"].astype(np.float64), case["x"].astype(np.float64)
    p = np.exp(x @ head)
    p /= p.sum(-1, keepdims=True)
    one_hot = np.eye(V)[case["targets"]]
    np.testing.assert_allclose(logprobs, (one_hot * np.log(p)).sum(-1), rtol=1e-5, atol=1e-5)
    d_logits = cotangent[..., None] * (one_hot - p)
    np.testing.assert_allclose(gradients[0], np.einsum("BTD,BTV->DV", x, d_logits), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradients[1], d_logits @ head.T, rtol=1e-4, atol=1e-5)


def test_chunked_token_logprobs_keep_no_logits_for_the_backward_pass(case):
    def total(head, x):
        return numerics.chunked_token_logprobs(lambda head, x: x @ head, head, x, case["targets"], chunk_tokens=3).sum()

    text = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(case["head"], case["x"]))
    assert f"f32[3,1,{V}]" in text
    for whole in (f"f32[3,8,{V}]", f"f32[8,3,1,{V}]"):  # at once, or stacked by the scan over chunks
        assert whole not in text


def test_whitening_gives_the_golden_numbers_and_ignores_what_is_masked():
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], np.float32)
    advantages = np.array(
        [[1.232925, 1.1715, 1.57, 0, 0], [-0.7925535, -1.13953, -1.1574, -0.692, -1.36], [0.25, 0, 0, 0, 0]], np.float32
    )
    rewards = np.array([[0.02, -0.02, 1.47, 0, 0], [-0.01, 0.01, -0.05, 0, -0.96], [0.75, 0, 0, 0, 0]], np.float32)
    wild = lambda x: np.where(mask == 1, x, np.nan)
    wanted = [
        [1.2117395640353272, 1.1559784269262166, 1.5177336265677417, 0, 0],
        [-0.6269740598972108, -0.9419566270952474, -0.9581788740653706, -0.5356923749106259, -1.142097577822894],
        [0.31944789626206277, 0, 0, 0, 0],
    ]
    np.testing.assert_allclose(numerics.masked_whiten(wild(advantages), mask), wanted, atol=1e-6)
    wanted = [
        [-0.049447771961127346, -0.11372077963686117, 2.280448756284224, 0, 0],
        [-0.0976525277179277, -0.06551602388006075, -0.16192553539366147, -0.08158427579899424, -1.6241364600166057],
        [1.1235346181210148, 0, 0, 0, 0],
    ]
    got = jax.jit(lambda x: numerics.masked_whiten(x, mask, shift_mean=False))(wild(rewards))
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert not numerics.masked_whiten(rewards, jnp.zeros_like(mask)).any()
    np.testing.assert_allclose(numerics.masked_whiten(jnp.full((2, 3), 1000.1), jnp.ones((2, 3))), 0, atol=1e-6)


def test_temperature_is_in_the_log_probs_and_the_entropy_as_in_the_golden_numbers():
    logits, temperature = jnp.array([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]]), 0.7
    logprobs = numerics.token_logprobs(logits / temperature, jnp.array([1, 0]))
    np.testing.assert_allclose(logprobs, [-0.30525442227415467, -4.302632652123208], rtol=1e-6)
    np.testing.assert_allclose(
        numerics.entropy(logits / temperature), [0.7428151258457545, 0.09344884278370506], rtol=1e-6
    )


def test_entropy_and_its_gradient_survive_tokens_that_cannot_be_drawn():
    logits = jnp.array([[0.3, -jnp.inf, 1.0], [-jnp.inf, 2.0, -jnp.inf]])
    value, slope = jax.value_and_grad(lambda x: jnp.sum(numerics.entropy(x) * jnp.array([1.0, 0.5])))(logits)
    p = np.exp([0.3, 1.0]) / np.exp([0.3, 1.0]).sum()
    h = -(p * np.log(p)).sum()
    np.testing.assert_allclose(value, h, rtol=1e-6)
    np.testing.assert_allclose(slope[0], [-p[0] * (np.log(p[0]) + h), 0, -p[1] * (np.log(p[1]) + h)], atol=1e-6)
    np.testing.assert_array_equal(slope[1], [0, 0, 0])


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimators_average_to_the_kl_where_they_should(kind):
    rng = np.random.default_rng(4)
    logp, reference = (np.log(rng.dirichlet(np.ones(6))) for _ in range(2))
    d = logp - reference
    exact = {"k1": (np.exp(logp) * d).sum(), "k2": (np.exp(logp) * d**2).sum() / 2, "k3": (np.exp(logp) * d).sum()}
    estimates = numerics.kl_estimate(logp, reference, kind)
    np.testing.assert_allclose((np.exp(logp) * estimates).sum(), exact[kind], rtol=1e-5)
    tiny = numerics.kl_estimate(jnp.float32(-1.0), jnp.float32(-1.0) - 1e-3, kind)  # 1 - 1e-3 in float32
    d = float(np.float32(-1.0)) - float(np.float32(-1.0) - np.float32(1e-3))
    np.testing.assert_allclose(tiny, {"k1": d, "k2": d * d / 2, "k3": np.expm1(-d) + d}[kind], rtol=1e-3)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_chunked_entropy_and_gradients_are_the_unchunked_ones_in_float64(case, chunk_tokens):
    a, b = np.random.default_rng(5).normal(size=(2, *case["targets"].shape))

    def total(head, x):
        logprobs, entropy = numerics.chunked_logprobs_and_entropy(
            lambda head, x: x @ head / 0.7, head, x, case["targets"], chunk_tokens=chunk_tokens
        )
        return jnp.sum(a * logprobs + b * entropy), (logprobs, entropy)

    (_, (logprobs, entropy)), (d_head, d_x) = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
        case["head"], case["x"]
    )
    head, x = case["head"].astype(np.float64), case["x"].astype(np.float64)
    p = np.exp(x @ head / 0.7)
    p /= p.sum(-1, keepdims=True)
    one_hot, h = np.eye(V)[case["targets"]], -(p * np.log(p)).sum(-1)
    np.testing.assert_allclose(logprobs, (one_hot * np.log(p)).sum(-1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropy, h, rtol=1e-5, atol=1e-5)
    d_logits = (a[..., None] * (one_hot - p) - b[..., None] * p * (np.log(p) + h[..., None])) / 0.7
    np.testing.assert_allclose(d_head, np.einsum("BTD,BTV->DV", x, d_logits), rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(d_x, d_logits @ head.T, rtol=1e-4, atol=2e-5)


def test_chunked_entropy_keeps_no_logits_for_the_backward_pass(case):
    def total(head, x):
        both = numerics.chunked_logprobs_and_entropy(lambda head, x: x @ head, head, x, case["targets"], chunk_tokens=3)
        return sum(a.sum() for a in both)

    text = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(case["head"], case["x"]))
    assert f"f32[3,1,{V}]" in text
    for whole in (f"f32[3,8,{V}]", f"f32[8,3,1,{V}]"):
        assert whole not in text
