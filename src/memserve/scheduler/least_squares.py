"""Small least squares with coefficients that cannot be negative, and with relative errors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]

# Relative errors beyond this pull no harder than this: one disturbed point is not the truth.
_HUBER = 0.1
_ROUNDS = 5
_TOLERANCE = 1e-10


def fit_relative(features: Matrix, seconds: Vector, weights: Vector | None = None) -> Vector:
    """Coefficients >= 0 [columns] with least relative error of `features` [points, columns] @
    coefficients against `seconds` [points] > 0. Outliers count linearly, not squared; `weights`
    [points] are of the squares.
    """
    scaled = features / seconds[:, None]
    ones = np.ones(len(seconds))
    given = ones if weights is None else weights
    pull = given
    coefficients = np.zeros(features.shape[1])
    for _ in range(_ROUNDS):
        root = np.sqrt(pull)
        coefficients = non_negative(scaled * root[:, None], ones * root)
        off = np.abs(scaled @ coefficients - 1)
        pull = given * _HUBER / np.maximum(off, _HUBER)
    return coefficients


def non_negative(a: Matrix, b: Vector) -> Vector:
    """argmin |a x - b| over x >= 0, by active sets (Lawson and Hanson, 1974)."""
    norms = np.linalg.norm(a, axis=0)
    norms[norms == 0] = 1.0
    a = a / norms
    columns = a.shape[1]
    x = np.zeros(columns)
    passive = np.zeros(columns, dtype=bool)
    for _ in range(10 * columns):
        gradient = a.T @ (b - a @ x)
        gradient[passive] = -np.inf
        if passive.all() or gradient.max() <= _TOLERANCE:
            break
        passive[int(gradient.argmax())] = True
        while True:
            solution = np.zeros(columns)
            solution[passive] = np.linalg.lstsq(a[:, passive], b, rcond=None)[0]
            negative = passive & (solution <= 0)
            if not negative.any():
                break
            # As far towards the solution as nothing becomes negative; what is 0 there is out.
            reach = x[negative] / (x[negative] - solution[negative])
            x = x + reach.min() * (solution - x)
            passive &= x > _TOLERANCE
        x = solution
    coefficients: Vector = x / norms
    return coefficients
