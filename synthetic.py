"""Generated images in place of CIFAR-10: six shapes and four textures.

They let every program run without a download. They are much easier than photographs, so accuracy on them does not
predict accuracy on CIFAR-10.
"""

import numpy as np

IMAGES_PER_FILE = 2_000  # the official files hold 10,000; these take half a second each to draw
FILES = ("test_batch", *(f"data_batch_{i}" for i in range(1, 6)))
PIXELS = np.arange(32) - 15.5  # pixel centers along one axis, measured from the center of the image


def _stripes(u: np.ndarray) -> np.ndarray:
    return np.abs(u - np.rint(u)) - 0.25


# Signed distance from (u, v) to the edge of each figure, negative inside; u points right and v points down. The unit is
# the radius of a shape, the period of a texture.
FIGURES = {
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.8) - 0.2,
    "moon": lambda u, v: np.maximum(np.hypot(u, v) - 1, 0.85 - np.hypot(u - 0.55, v)),
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.8,
    "triangle": lambda u, v: np.maximum(0.866 * np.abs(u) - 0.5 * v, v) - 0.6,
    "cross": lambda u, v: np.minimum(np.maximum(abs(u) - 1, abs(v) - 0.3), np.maximum(abs(u) - 0.3, abs(v) - 1)),
    # a square that stands on its corner, joined with two discs on its upper sides
    "heart": lambda u, v: np.minimum(0.707 * (abs(u) + abs(v - 0.1)), np.hypot(abs(u) - 0.424, v + 0.324)) - 0.6,
    "stripes": lambda u, v: _stripes(u),
    "waves": lambda u, v: _stripes(v + 0.3 * np.sin(2.6 * u)),
    "dots": lambda u, v: np.hypot(u - np.rint(u), v - np.rint(v)) - 0.3,
    "checks": lambda u, v: np.sin(np.pi * u) * np.sin(np.pi * v) / 3,
}
NAMES = list(FIGURES)


def draw(name: str, rng: np.random.Generator) -> np.ndarray:
    """Draw one bright figure on a dark background, at a random position, size and angle: (32, 32, 3) uint8."""
    x0, y0 = rng.uniform(-4, 4, 2)  # pixels from the center of the image
    size, angle = rng.uniform(9, 12), rng.uniform(-0.4, 0.4)  # pixels, radians
    x, y = (PIXELS - x0) / size, (PIXELS[:, None] - y0) / size
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    coverage = np.clip(0.5 - size * FIGURES[name](u, v), 0, 1)[:, :, None]  # fraction of each pixel inside
    # Bright on dark keeps the demo short: arbitrary pairs of colors take more training steps to learn.
    background, color = rng.uniform(0, 0.4, 3), rng.uniform(0.6, 1, 3)
    image = background + (color - background) * coverage + rng.normal(0, 0.04, (32, 32, 3))
    return (255 * image.clip(0, 1)).astype(np.uint8)


def make_batch(name: str, count: int = IMAGES_PER_FILE) -> tuple[np.ndarray, np.ndarray]:
    """Draw what `cifar10.read_labeled` would read from the batch file of this name, balanced and shuffled.

    Returns:
        Images (count, 32, 32, 3) uint8 and labels (count,) int64.
    """
    rng = np.random.default_rng([0, FILES.index(name)])
    labels = rng.permutation(np.arange(count) % len(NAMES))
    return np.stack([draw(NAMES[label], rng) for label in labels]), labels
