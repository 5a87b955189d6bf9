"""Embeddings of classes that can be told apart."""

import numpy as np


def blobs(samples=240, features=16, classes=4, spread=0.6, seed=0):
    """Samples of which each class has a centre of its own, and their classes."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(1).normal(size=(classes, features))
    y = np.arange(samples) % classes
    return (centres[y] + spread * generator.normal(size=(samples, features))).astype(np.float32), y


def few(y, labelled=16):
    """The classes of the first samples, −1 for the others."""
    return np.where(np.arange(len(y)) < labelled, y, -1)
