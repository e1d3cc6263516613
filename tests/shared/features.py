"""Features that were drawn at random, and teachers of them."""

import numpy as np

CLASSES = 6


def drawn(images: int = 200, features: int = 12, seed: int = 0) -> tuple[np.ndarray, np.random.Generator]:
    """Features as a network has them: not centred, and some stronger than others."""
    generator = np.random.default_rng(seed)
    values = generator.normal(1, 1, (images, features)) * generator.gamma(2, 1, features)
    return values.astype(np.float32), generator


def noisy_teacher(features: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return np.maximum(0, features) @ generator.normal(size=(features.shape[1], CLASSES)) + generator.normal(
        size=(len(features), CLASSES)
    )
