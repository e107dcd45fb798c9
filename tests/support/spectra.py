"""Embeddings for tests of the pair search, with the most difficult spectra that we could think of."""

import numpy as np

SPECTRA = ["flat", "steep", "usual", "rank 1", "one huge", "duplicates", "last bits", "zeros", "near"]


def embeddings(rng: np.random.Generator, count: int, width: int, spectrum: str, above: float = 0.95) -> np.ndarray:
    """Return rows of unit length ("zeros": also rows of zeros), shape [count, width]."""
    decay = {"flat": 0.0, "steep": 1.5}.get(spectrum, 0.7)
    x = rng.normal(size=(count, width)) / (1 + np.arange(width)) ** decay
    x[:, 0] += rng.choice([0.5, 3.0])
    if spectrum == "rank 1":
        x = rng.normal(size=(count, 1)) * rng.normal(size=width)
    if spectrum == "one huge":
        x[:, -1] += rng.choice([-100, 100], size=count)
    if spectrum == "duplicates" and count:
        x[rng.integers(count, size=count // 2)] = x[0]
    if spectrum == "near":  # the cosine of each second row with the row before is at the threshold
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        first, second = x[: count // 2 * 2 : 2], x[1::2]
        second -= (first * second).sum(1, keepdims=True) * first
        second /= np.linalg.norm(second, axis=1, keepdims=True)
        t = np.clip(above + rng.choice([-1, 1], size=(len(second), 1)) * 10 ** rng.uniform(-7, -3, size=(len(second), 1)), -1, 1)
        x[1::2] = t * first + np.sqrt(1 - t * t) * second
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x = x.astype(np.float32)
    if spectrum == "last bits":
        x[1::2] = np.nextafter(x[: count // 2 * 2 : 2], rng.choice([-1, 1], size=(count // 2, width)).astype(np.float32))
    if spectrum == "zeros" and count:
        x[rng.integers(count, size=count // 3)] = 0
    return x


def clustered(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return unit rows in clusters of 13: close within a cluster, far between clusters."""
    x = np.repeat(rng.normal(size=(count // 13 + 1, 192)) / (1 + np.arange(192)) ** 0.7, 13, axis=0)[:count]
    x += 0.01 * rng.normal(size=x.shape)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
