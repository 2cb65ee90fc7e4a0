"""The process of the noisy quadratic, and the theory of estimators of its optimum.

    dθ = A (μ* − θ) dt + √h σ dW        A = diag(a_1, …, a_d)

is SGD of step size h on a quadratic loss with Hessian A, in continuous time (EMA Without the Lag, Eq. 3). One optimizer
step is the time h. Everything splits into the eigenvectors of A, so A is taken to be diagonal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.evidence.saved import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A noisy quadratic and where a run on it begins.

    Attributes:
        curvatures: the eigenvalues a_i > 0 of the Hessian.
        distance: θ_0 − μ* in every direction.
        step_size: h, which is also the time that one optimizer step takes.
        noise: σ.
        optimum: μ* in every direction; not 0, which could hide a mistake.
    """

    curvatures: tuple[float, ...]
    distance: float
    step_size: float = 0.1
    noise: float = 1.0
    optimum: float = 1.0

    @property
    def a(self) -> Array:
        return np.array(self.curvatures)

    @property
    def decay(self) -> Array:
        """φ_i = exp(−a_i h): by how much one step shrinks the distance to the optimum."""
        return np.exp(-self.a * self.step_size)

    @property
    def spread(self) -> Array:
        """h σ² / (2 a_i): the variance that a run of any length ends up with."""
        return self.step_size * self.noise**2 / (2 * self.a)

    def states(self, steps: int, *, replicas: int, seed: int) -> Iterator[Array]:
        """θ_0, …, θ_steps of independent replicas, each of shape (replicas, d), by the exact transition of one step."""
        random = np.random.default_rng(seed)
        state = np.full((replicas, len(self.curvatures)), self.optimum + self.distance)
        yield state
        scale = np.sqrt(self.spread * (1 - self.decay**2))
        for _ in range(steps):
            state = self.optimum + self.decay * (state - self.optimum) + scale * random.standard_normal(state.shape)
            yield state

    def squared_distances(self, estimates: Array) -> Array:
        """‖θ̂ − μ*‖² of each replica."""
        distances: Array = np.sum((estimates - self.optimum) ** 2, axis=1)
        return distances


def expected_of_weights(process: Process, weights: Array) -> float:
    """E‖Σ_k w_k θ_k − μ*‖² for weights of θ_0, …, θ_K that sum to 1: the expectation for any affine scheme.

    The noise of step j reaches the estimate with S_j = w_j + φ w_{j+1} + φ² w_{j+2} + …, so its part is S_j² times the
    variance of one transition, and S_0 is what is left of θ_0 − μ*.

    Args:
        weights: of every step; 0 for those that were left out.
    """
    reach = np.zeros(len(process.curvatures))
    total = 0.0
    per_step = process.spread * (1 - process.decay**2)
    for place in range(len(weights) - 1, -1, -1):
        reach = weights[place] + process.decay * reach
        if place:
            total += float(np.sum(per_step * reach**2))
    return total + float(np.sum((reach * process.distance) ** 2))


def expected_of_last(process: Process, steps: int) -> float:
    """‖e^{−AT}(θ_0 − μ*)‖² + (hσ²/2) Tr[A⁻¹(I − e^{−2AT})], Proposition 2; exact for a saved run, too."""
    kept = process.decay**steps
    return float(np.sum((kept * process.distance) ** 2) + np.sum(process.spread * (1 - kept**2)))


def expected_of_flat_in_continuous_time(process: Process, steps: int) -> float:
    """Of (1/T)∫θ dt, Proposition 3: bias (AT)⁻¹(I − e^{−AT})(θ_0 − μ*), and for each eigenvalue a the variance

    (hσ²/T²) · [T/a² − 2(1 − e^{−aT})/a³ + (1 − e^{−2aT})/(2a³)]
    """
    a, time = process.a, process.step_size * steps
    kept = np.exp(-a * time)
    bias = (1 - kept) / (a * time) * process.distance
    variance = time / a**2 - 2 * (1 - kept) / a**3 + (1 - kept**2) / (2 * a**3)
    return float(np.sum(bias**2 + process.step_size * process.noise**2 / time**2 * variance))


def expected_of_flat(process: Process, steps: int, every: int = 1) -> float:
    """Of the mean of the K = steps / every checkpoints after θ_0, the sum in place of the integral.

        bias      φ (1 − φ^K) / (K (1 − φ)) · (θ_0 − μ*)
        variance  v / (K² (1 − φ)²) · [K − 2 φ (1 − φ^K)/(1 − φ) + φ² (1 − φ^{2K})/(1 − φ²)]

    with φ = e^{−a h every} and v = (hσ²/2a)(1 − φ²), the variance of one transition. The noise before checkpoint j
    enters with (1 − φ^{K−j+1}) / (K (1 − φ)).
    """
    phi, count = process.decay**every, steps // every
    kept = phi**count
    bias = phi * (1 - kept) / (count * (1 - phi)) * process.distance
    inner = count - 2 * phi * (1 - kept) / (1 - phi) + phi**2 * (1 - kept**2) / (1 - phi**2)
    variance = process.spread * (1 - phi**2) / (count * (1 - phi)) ** 2 * inner
    return float(np.sum(bias**2 + variance))


def likeliest(process: Process, first: Array, mean: Array, last: Array, steps: int, every: int = 1) -> Array:
    """The maximum-likelihood estimate of μ* from a saved run, with A known: mean + φ/(K(1 − φ)) (θ_K − θ_0).

    It maximises Π_j p(θ_{j+1} | θ_j), and becomes θ̄ + (AT)⁻¹(θ_T − θ_0), Eq. 11, as the interval goes to 0.

    Args:
        process: of which A, h and σ are used, but not the optimum.
        first: θ_0, of shape (replicas, d).
        mean: of the K = steps / every checkpoints after it.
        last: θ_K.
        steps: at θ_K.
        every: optimizer steps between two checkpoints.
    """
    phi = process.decay**every
    return mean + phi / (steps // every * (1 - phi)) * (last - first)


def expected_of_likeliest(process: Process, steps: int, every: int = 1) -> float:
    """Σ v / (K (1 − φ)²) of a saved run, with φ, v and K as in `expected_of_flat`; it has no bias."""
    phi = process.decay**every
    return float(np.sum(process.spread * (1 - phi**2) / (steps // every * (1 - phi) ** 2)))


def expected_of_likeliest_in_continuous_time(process: Process, steps: int) -> float:
    """hσ² Tr(A⁻²) / T, Theorem 2: no estimator without bias has less (Proposition 1)."""
    time = process.step_size * steps
    return float(process.step_size * process.noise**2 * np.sum(1 / process.a**2) / time)
