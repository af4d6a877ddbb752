"""Generated images in CIFAR-10's format: seven shapes and three textures, drawn from signed distances.

They need no download, and show that training, evaluation and prediction work. They are no photographs: an accuracy on
them says nothing about CIFAR-10.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

import batches

IMAGES_PER_FILE = 10_000  # as in the official files
FILES = ("test_batch", *(f"data_batch_{i}" for i in range(1, 6)))
SIDE = 32  # pixels
CHUNK = 500  # images drawn at once: some 20 MB of working memory, and faster than larger chunks


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Fold the plane into half a ray of the star, where one straight edge runs inwards from the tip at (1.2, 0)."""
    angle = np.abs((np.arctan2(u, -v) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    radius = np.hypot(u, v)
    return 0.588 * (radius * np.cos(angle) - 1.2) + 0.809 * radius * np.sin(angle)


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Join a square that stands on its corner and two discs on its upper sides."""
    u = np.abs(u)
    return np.minimum(0.707 * (u + np.abs(v - 0.1)) - 0.6, np.hypot(u - 0.424, v + 0.324) - 0.6)


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.maximum(u, v) - 0.95, np.minimum(u, v) - 0.3)


def _stripes(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(u - np.rint(u)) - 0.16


# Distance to the edge, negative inside, on coordinates whose unit is the shape's size or the texture's period; v points
# down. The figures cover much the same share of the image, so that colours tell little about the class.
DISTANCES = {
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.76) - 0.2,
    "moon": lambda u, v: np.maximum(np.hypot(u, v) - 1, 0.85 - np.hypot(u - 0.55, v)),
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.75,
    "triangle": lambda u, v: np.maximum(0.866 * np.abs(u) - 0.5 * v, v) - 0.6,
    "star": _star,
    "cross": _cross,
    "heart": _heart,
    "stripes": _stripes,
    "waves": lambda u, v: _stripes(u + 0.3 * np.sin(2.6 * v), v),
    "dots": lambda u, v: np.hypot(u - np.rint(u), v - np.rint(v)) - 0.3,
}
NAMES = list(DISTANCES)


def _cover(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the share of each pixel that the figure covers, at a random place, size and turn: (N, 32, 32) float32."""
    low, high = (-5, -5, 7, -0.6), (5, 5, 12, 0.6)  # pixels right, pixels down, pixels per unit, radians
    draws = rng.uniform(low, high, (len(labels), 4)).astype(np.float32)
    right, down, size, turn = draws.T[:, :, None, None]
    axis = np.arange(SIDE, dtype=np.float32) - (SIDE - 1) / 2
    x, y = (axis - right) / size, (axis[:, None] - down) / size
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    distance = np.empty_like(u)
    for label, name in enumerate(NAMES):
        rows = labels == label
        distance[rows] = DISTANCES[name](u[rows], v[rows])
    return np.clip(0.5 - distance * size, 0, 1)


def _draw(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paint an image for each label, in two free colours under a slope of light and noise: (N, 32, 32, 3) uint8."""
    cover = _cover(labels, rng)[..., None]
    ground, change, slope_x, slope_y = rng.random((4, len(labels), 1, 1, 3), dtype=np.float32)
    # Going 0.25 to 0.75 of the circle in each channel, the figure stands out, and has no colours of its own.
    figure = (ground + 0.25 + 0.5 * change) % 1
    axis = np.linspace(-0.3, 0.3, SIDE, dtype=np.float32)[:, None]
    light = (slope_x - 0.5) * axis + (slope_y - 0.5) * axis[:, None]
    noise = rng.standard_normal((len(labels), SIDE, SIDE, 3), dtype=np.float32)
    noise *= 0.12 * rng.random((len(labels), 1, 1, 1), dtype=np.float32)
    return (np.clip(ground + (figure - ground) * cover + light + noise, 0, 1) * 255).astype(np.uint8)


def make_images(count: int, seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw `count` images, always the same ones for a seed and the index of a file.

    Returns:
        Images (count, 32, 32, 3) uint8 and labels (count,) int64, shuffled, as many of each class as can be.
    """
    rng = np.random.default_rng([seed, index])
    labels = rng.permutation(np.arange(count) % len(NAMES))
    return np.concatenate([_draw(labels[start:start + CHUNK], rng) for start in range(0, count, CHUNK)]), labels


def write(folder: str | Path, files: Sequence[str], seed: int = 0, count: int = IMAGES_PER_FILE) -> None:
    """Write those of the batch files, and the `batches.meta`, that the folder does not hold yet."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "batches.meta").exists():
        batches.write_label_names(folder / "batches.meta", NAMES)
    for name in files:
        if not (folder / name).exists():
            batches.write_batch(folder / name, *make_images(count, seed, FILES.index(name)), name)
