"""Numbers with their uncertainty: means, rates and ratios over records, and a win-rate freed from length.

A metric is {"value", "stderr", "low", "high", "n"}: the estimate, its standard error, a 95 % interval and the number of
records; stderr, low and high are None where one record cannot tell.
"""

import math
import statistics
from typing import Any

import numpy as np

Metric = dict[str, Any]
Z = statistics.NormalDist().inv_cdf(0.975)  # of a two-sided 95 % interval
PRIOR_STD = 5.0  # of the length coefficient: +-5 takes a win-rate of 0.5 to 0.99, more than lengths ever did
_ITERATIONS = 100


def mean_metric(values_N: np.ndarray) -> Metric:
    """The mean of a score over records. Its interval is Wilson's where all values are 0, 1 or 1/2 (a tie), which stays
    sensible near 0 and 1; else normal, value +- 1.96 stderr.
    """
    metric = ratio_metric(values_N, np.ones(len(values_N)))
    if np.isin(values_N, (0, 0.5, 1)).all():
        metric["low"], metric["high"] = wilson_interval(metric["value"], len(values_N))
    return metric


def wilson_interval(rate: float, count: float) -> tuple[float, float]:
    """The 95 % score interval (low, high) of a rate seen in `count` independent trials (count need not be whole).

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    shrink = 1 + Z**2 / count
    center = (rate + Z**2 / (2 * count)) / shrink
    half = Z / shrink * math.sqrt(rate * (1 - rate) / count + Z**2 / (4 * count**2))
    return min(rate, max(0.0, center - half)), max(rate, min(1.0, center + half))


def ratio_metric(sums_N: np.ndarray, weights_N: np.ndarray) -> Metric:
    """sum(sums_N) / sum(weights_N), as nats per token, over records drawn independently.

    The standard error is that of the linearized ratio estimator (Cochran 1977, Sampling techniques, section 6.4); with
    equal weights it is that of a mean. The interval is normal.
    """
    sums_N, weights_N = np.asarray(sums_N, np.float64), np.asarray(weights_N, np.float64)
    count, total = len(sums_N), float(weights_N.sum())
    value = float(sums_N.sum()) / total
    metric: Metric = {"value": value, "stderr": None, "low": None, "high": None, "n": count}
    if count > 1:
        residuals_N = sums_N - value * weights_N
        stderr = math.sqrt(count / (count - 1) * float(residuals_N @ residuals_N)) / total
        metric |= {"stderr": stderr, "low": value - Z * stderr, "high": value + Z * stderr}
    return metric


def length_controlled_win_rate(wins_N: np.ndarray, differences_N: np.ndarray) -> Metric:
    """The win-rate that would be seen if both answers to every prompt were of the same length.

    A logistic regression P(win) = sigmoid(a + b tanh(d / std(d))), d the difference of lengths, evaluated at d = 0. The
    prior b ~ N(0, 5^2), whose influence vanishes with N, keeps b finite where length alone tells wins from losses.
    The interval comes from the sandwich estimate of the variance of a, so that wins may be fractions. Where all wins are
    alike or all lengths equal, there is nothing to control: it is the plain win-rate.

    Args:
      wins_N: in [0, 1], 1 where the model's answer won, 1/2 a tie. differences_N: the length of the model's answer minus
        that of the baseline's.

    Source: Dubois et al. 2024 (arXiv:2404.04475), without the difficulty of each prompt, which needs many models.
    """
    wins_N, differences_N = np.asarray(wins_N, np.float64), np.asarray(differences_N, np.float64)
    spread = float(np.std(differences_N))
    if not spread or np.ptp(wins_N) == 0:
        return mean_metric(wins_N)
    x_N2 = np.stack([np.ones(len(wins_N)), np.tanh(differences_N / spread)], axis=1)
    precision_2 = np.array([0.0, PRIOR_STD**-2])
    coefficients_2 = _fit_logistic(x_N2, wins_N, precision_2)
    p_N = _sigmoid(x_N2 @ coefficients_2)
    inverse = np.linalg.inv((x_N2.T * (p_N * (1 - p_N))) @ x_N2 + np.diag(precision_2))
    scores_N2 = x_N2 * (wins_N - p_N)[:, None]
    variance = (inverse @ (scores_N2.T @ scores_N2) @ inverse)[0, 0] * len(wins_N) / (len(wins_N) - 1)
    a, half = float(coefficients_2[0]), Z * math.sqrt(variance)
    value, low, high = _sigmoid(np.array([a, a - half, a + half])).tolist()
    return {
        "value": value, "stderr": math.sqrt(variance) * value * (1 - value), "low": low, "high": high, "n": len(wins_N),
    }  # fmt: skip


def _fit_logistic(x_NK: np.ndarray, y_N: np.ndarray, precision_K: np.ndarray) -> np.ndarray:
    """Coefficients [K] that maximize the log-likelihood minus sum(precision * coefficient^2) / 2, by damped Newton steps."""

    def objective(w_K: np.ndarray) -> float:
        z_N = x_NK @ w_K
        return float(y_N @ z_N - np.logaddexp(0, z_N).sum() - precision_K @ w_K**2 / 2)

    w_K = np.zeros(x_NK.shape[1])
    for _ in range(_ITERATIONS):
        p_N = _sigmoid(x_NK @ w_K)
        gradient_K = x_NK.T @ (y_N - p_N) - precision_K * w_K
        hessian = (x_NK.T * (p_N * (1 - p_N))) @ x_NK + np.diag(precision_K)
        step_K = np.linalg.solve(hessian, gradient_K)
        size = 1.0
        while size > 1e-8 and objective(w_K + size * step_K) < objective(w_K):
            size /= 2
        w_K = w_K + size * step_K
        if np.abs(size * step_K).max() < 1e-10:
            break
    return w_K


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))
