"""Embeddings of all shapes for the pair search, some as bad as we could think of."""

import numpy as np

SPECTRA = ["flat", "steep", "usual", "rank 1", "one huge", "duplicates", "last bits", "zeros", "near"]


def embeddings(rng: np.random.Generator, count: int, width: int, spectrum: str, above: float = 0.95) -> np.ndarray:
    """Unit rows (but for "zeros"); some spectra are as bad as we could think of."""
    decay = {"flat": 0.0, "steep": 1.5}.get(spectrum, 0.7)
    x = rng.normal(size=(count, width)) / (1 + np.arange(width)) ** decay
    x[:, 0] += rng.choice([0.5, 3.0])
    if spectrum == "rank 1":
        x = rng.normal(size=(count, 1)) * rng.normal(size=width)
    if spectrum == "one huge":
        x[:, -1] += rng.choice([-100, 100], size=count)
    if spectrum == "duplicates" and count:
        x[rng.integers(count, size=count // 2)] = x[0]
    if spectrum == "near":  # each second row at the threshold to the one before
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        one, other = x[: count // 2 * 2 : 2], x[1::2]
        other -= (one * other).sum(1, keepdims=True) * one
        other /= np.linalg.norm(other, axis=1, keepdims=True)
        t = np.clip(above + rng.choice([-1, 1], size=(len(other), 1)) * 10 ** rng.uniform(-7, -3, size=(len(other), 1)), -1, 1)
        x[1::2] = t * one + np.sqrt(1 - t * t) * other
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x = x.astype(np.float32)
    if spectrum == "last bits":
        x[1::2] = np.nextafter(x[: count // 2 * 2 : 2], rng.choice([-1, 1], size=(count // 2, width)).astype(np.float32))
    if spectrum == "zeros" and count:
        x[rng.integers(count, size=count // 3)] = 0
    return x


def clustered(rng: np.random.Generator, count: int) -> np.ndarray:
    """Unit rows about one centre for 13 of them: close within a cluster, far between."""
    x = np.repeat(rng.normal(size=(count // 13 + 1, 192)) / (1 + np.arange(192)) ** 0.7, 13, axis=0)[:count]
    x += 0.01 * rng.normal(size=x.shape)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
