"""What the tests of objectives hold gradients against."""

import numpy as np


def numeric_gradient(f, x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central differences of a float64 function of an array, element by element."""
    gradient = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        bump = np.zeros(x.shape)
        bump[index] = step
        gradient[index] = (f(x + bump) - f(x - bump)) / (2 * step)
    return gradient
