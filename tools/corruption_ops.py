"""The corruptions of CIFAR-10-C (Hendrycks and Dietterich, arXiv 1903.12261) as operations on whole batches.

An operation takes images (N, 3, 32, 32) float32 in [0, 1] on any device, random numbers, and the constants of one
severity, which are weaker than ImageNet-C's. Everything that does not depend on the images is computed on the CPU, so
that it is the same for every device; pixelate and JPEG run in Pillow, also on the CPU.

Checked against the published code (SciPy 1.17, scikit-image 0.26, OpenCV 5.0, ImageMagick 6.9) with the same random
numbers on 300 test images: pixels are equal or 1 apart, except in glass blur (up to 2) and elastic transform (1.4% of
the values up to 5 apart, because OpenCV 4.5 uses fixed point). Frost is missing, because it needs photographs.
"""

import io
import math
import zlib
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from augment import SIZE, reflect

BLOCK = 500  # images that share a random generator


class BlockRandom:
    """Generate random numbers for all 500 images of a block, so that they do not depend on how many are used."""

    def __init__(self, key: list[int], count: int):
        self.rng = np.random.default_rng(key)
        self.count = count

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal values (N, *shape) float32."""
        return torch.from_numpy(self.rng.standard_normal((BLOCK, *shape), dtype=np.float32)[:self.count])

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Return values (N, *shape) float32 in [low, high)."""
        return low + (high - low) * torch.from_numpy(self.rng.random((BLOCK, *shape), dtype=np.float32)[:self.count])

    def poisson(self, rates: Tensor) -> Tensor:
        """Return Poisson counts for rates (N, ...), as float32. Not a full block, so use it last."""
        return torch.from_numpy(self.rng.poisson(rates.numpy()).astype(np.float32))


# --- building blocks -------------------------------------------------------------------------------------------------

clamp = partial(torch.clamp, min=0, max=SIZE - 1)  # SciPy's border mode "nearest"


def truncate(x: Tensor) -> Tensor:
    """Round down to whole byte values, like the published code's cast; 0.001 absorbs float32 rounding errors."""
    return (x * 255 + 0.001).floor() / 255


def symmetric(position: Tensor) -> Tensor:
    """Reflect positions into 0..31, repeating the edge pixel (SciPy's "reflect"); `reflect` does not repeat it."""
    return torch.where(position < 0, -1 - position, torch.where(position >= SIZE, 2 * SIZE - 1 - position, position))


def gather(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Read pixels of (N, C, 32, 32) at rows and columns, int64, that broadcast to (N, 32, 32)."""
    index = (rows * SIZE + columns).flatten(1).to(x.device)[:, None].expand(-1, x.shape[1], -1)
    return x.flatten(2).gather(2, index).view_as(x)


def interpolate(x: Tensor, rows: Tensor, columns: Tensor, border: Callable[[Tensor], Tensor]) -> Tensor:
    """Read (N, C, 32, 32) bilinearly at rows and columns (N, 32, 32) float32."""
    top, left = rows.floor(), columns.floor()
    total = torch.zeros_like(x)
    for down in (0, 1):
        for right in (0, 1):
            weight = (1 - (rows - top - down).abs()) * (1 - (columns - left - right).abs())
            total += weight[:, None].to(x.device) * gather(x, border(top.long() + down), border(left.long() + right))
    return total


def separable(matrix: Tensor, x: Tensor) -> Tensor:
    """Apply a (32, 32) matrix along the rows and the columns of (..., 32, 32)."""
    matrix = matrix.to(x.device)
    return matrix @ x @ matrix.T


def gaussian(x: Tensor, sigma: float, reach: float = 4, border: Callable[[Tensor], Tensor] = clamp) -> Tensor:
    """Blur (..., 32, 32) like SciPy's gaussian_filter, up to `reach` standard deviations; sigma may be 0."""
    steps = torch.arange(-int(reach * sigma + 0.5), int(reach * sigma + 0.5) + 1)
    weights = torch.softmax(-(steps / max(sigma, 0.01)).square() / 2, 0).expand(SIZE, -1)
    positions = border(torch.arange(SIZE)[:, None] + steps)
    return separable(torch.zeros(SIZE, SIZE).scatter_add_(1, positions, weights), x)


def zoom(x: Tensor, factor: float) -> Tensor:
    """Enlarge the center of (..., 32, 32) linearly, like SciPy's zoom of a center crop."""
    crop = math.ceil(SIZE / factor)
    size = round(crop * factor)
    steps = torch.arange(SIZE, dtype=torch.float64)
    positions = (SIZE - crop) // 2 + (steps + (size - SIZE) // 2) * ((crop - 1) / (size - 1))
    return separable((1 - (positions[:, None] - steps).abs()).clamp(min=0).float(), x)


def directional_blur(x: Tensor, angle: Tensor, radius: int, sigma: float) -> Tensor:
    """Blur (N, C, 32, 32) to one side, at an angle per image in degrees, like ImageMagick's motion blur."""
    angle = angle.double().deg2rad()
    steps = torch.arange(SIZE)
    total = torch.zeros_like(x)
    for step, weight in enumerate(torch.softmax(-(torch.arange(2 * radius + 1) / sigma).square() / 2, 0).tolist()):
        down, right = ((step * part - 0.5).ceil().long()[:, None] for part in (angle.sin(), angle.cos()))
        total += weight * gather(x, clamp(steps + down)[:, :, None], clamp(steps + right)[:, None, :])
    return truncate(total)


# --- corruptions -----------------------------------------------------------------------------------------------------


def gaussian_noise(x: Tensor, rng: BlockRandom, scale: float) -> Tensor:
    return x + scale * rng.normal(*x.shape[1:]).to(x.device)


def shot_noise(x: Tensor, rng: BlockRandom, photons: int) -> Tensor:
    """Replace values by Poisson counts; `photons` is the mean count of white."""
    return (rng.poisson(x.cpu() * photons) / photons).to(x.device)


def impulse_noise(x: Tensor, rng: BlockRandom, amount: float) -> Tensor:
    """Set single values to 1 or 0 (salt and pepper), each with probability amount / 2."""
    chance = rng.uniform(0, 1, *x.shape[1:]).to(x.device)
    return x.masked_fill(chance < amount, 0).masked_fill(chance < amount / 2, 1)


def defocus_blur(x: Tensor, rng: BlockRandom, radius: float, sigma: float) -> Tensor:
    """Convolve with a disk that was blurred by a 3x3 Gaussian."""
    steps = torch.arange(-2, 3)
    disk = (steps[:, None].square() + steps.square() <= radius ** 2).float()  # at most 3x3, so 5x5 after the blur
    edge = torch.softmax(-(torch.arange(-1, 2) / sigma).square() / 2, 0)
    kernel = F.conv2d((disk / disk.sum())[None, None], edge.outer(edge)[None, None], padding=1)[0, 0].tolist()
    padded = F.pad(x, (2, 2, 2, 2), mode="reflect")
    # not conv2d, which uses TF32 on CUDA
    return sum(kernel[i][j] * padded[:, :, i:i + SIZE, j:j + SIZE] for i in range(5) for j in range(5) if kernel[i][j])


def glass_blur(x: Tensor, rng: BlockRandom, sigma: float, times: int) -> Tensor:
    """Blur, move pixels by at most one, and blur again.

    The published code is meant to swap neighbors, but its assignment between array views copies: each pixel takes the
    value above it, to its left, or both, which the scan from the lower right has not changed yet.
    """
    x = truncate(gaussian(x, sigma))
    steps = torch.arange(SIZE)
    inner = (steps >= 2)[:, None] & (steps >= 2)
    for _ in range(times):
        back = ((rng.uniform(0, 1, 2, SIZE, SIZE) < 0.5) & inner).long()
        x = gather(x, steps[:, None] - back[:, 0], steps - back[:, 1])
    return gaussian(x, sigma)


def motion_blur(x: Tensor, rng: BlockRandom, radius: int, sigma: float) -> Tensor:
    return directional_blur(x, rng.uniform(-45, 45), radius, sigma)


def zoom_blur(x: Tensor, rng: BlockRandom, end: float) -> Tensor:
    """Average the image and its enlargements by 1 up to `end`."""
    factors = np.arange(1, end, 0.01)  # as published; rounding decides whether `end` is included
    return (x + sum(zoom(x, factor) for factor in factors)) / (len(factors) + 1)


def plasma_fractal(rng: BlockRandom, decay: float) -> Tensor:
    """Make clouds (N, 32, 32) in [0, 1] by the diamond-square algorithm with wrap-around."""
    height = torch.zeros(rng.count, SIZE, SIZE)
    step, wibble = SIZE, 100.0
    while step >= 2:
        half, cells = step // 2, SIZE // step
        noise = [wibble * rng.uniform(-wibble, wibble, cells, cells) for _ in range(3)]
        corners = height[:, ::step, ::step]
        pairs = corners + corners.roll(-1, 1)
        centers = (pairs + pairs.roll(-1, 2)) / 4 + noise[0]
        height[:, half::step, half::step] = centers
        height[:, ::step, half::step] = (centers + centers.roll(1, 1) + corners + corners.roll(-1, 2)) / 4 + noise[1]
        height[:, half::step, ::step] = (centers + centers.roll(1, 2) + pairs) / 4 + noise[2]
        step, wibble = half, wibble / decay
    height -= height.amin((1, 2), keepdim=True)
    return height / height.amax((1, 2), keepdim=True)


def fog(x: Tensor, rng: BlockRandom, amount: float, decay: float) -> Tensor:
    """Add clouds, then scale back to the image's own maximum."""
    highest = x.amax((1, 2, 3), keepdim=True)
    return (x + amount * plasma_fractal(rng, decay)[:, None].to(x.device)) * highest / (highest + amount)


def snow(x: Tensor, rng: BlockRandom, mean: float, scale: float, factor: float, threshold: float, radius: int,
         sigma: float, keep: float) -> Tensor:
    """Whiten the image, then add motion-blurred flakes and the same flakes rotated by 180 degrees."""
    flakes = zoom(mean + scale * rng.normal(1, SIZE, SIZE), factor)
    flakes = truncate(flakes.masked_fill(flakes < threshold, 0).clamp(max=1))
    flakes = directional_blur(flakes, rng.uniform(-135, -45), radius, sigma).to(x.device)
    red, green, blue = x.split(1, dim=1)
    white = torch.maximum(x, (0.299 * red + 0.587 * green + 0.114 * blue) * 1.5 + 0.5)
    return keep * x + (1 - keep) * white + flakes + flakes.flip(2, 3)


def brightness(x: Tensor, rng: BlockRandom, amount: float) -> Tensor:
    """Raise V of HSV."""
    value = x.amax(1, keepdim=True)
    raised = (value + amount).clamp(max=1)
    return torch.where(value > 0, x * (raised / value), raised)


def contrast(x: Tensor, rng: BlockRandom, factor: float) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * factor + mean


def elastic_transform(x: Tensor, rng: BlockRandom, amplitude: float, sigma: float, shift: float) -> Tensor:
    """Apply a random affine map, then a smooth displacement field; all lengths in image widths."""
    points = torch.tensor([[26.0, 26], [26, 6], [6, 6]], dtype=torch.float64)  # x, y
    moved = points + SIZE * rng.uniform(-shift, shift, 3, 2)
    inverse = torch.linalg.solve(F.pad(moved, (0, 1), value=1), points.expand_as(moved))  # (N, 3, 2)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    source = torch.stack([columns, rows, torch.ones_like(rows)], -1).double() @ inverse[:, None]  # (N, 32, 32, 2)
    source = ((source * 32).round() / 32).float()  # OpenCV works in 1/32 pixel
    x = interpolate(x, source[..., 1], source[..., 0], reflect)
    right, down = (gaussian(rng.uniform(-1, 1, SIZE, SIZE), sigma * SIZE, 3, symmetric) for _ in range(2))
    return interpolate(x, rows + amplitude * SIZE * down, columns + amplitude * SIZE * right, symmetric)


def with_pillow(x: Tensor, function: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Apply a Pillow function image by image."""
    images = (x * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    changed = np.stack([np.asarray(function(Image.fromarray(image))) for image in images])
    return torch.from_numpy(changed).to(x.device).permute(0, 3, 1, 2) / 255


def pixelate(x: Tensor, rng: BlockRandom, factor: float) -> Tensor:
    small, box = int(SIZE * factor), Image.Resampling.BOX
    return with_pillow(x, lambda image: image.resize((small, small), box).resize((SIZE, SIZE), box))


def jpeg_compression(x: Tensor, rng: BlockRandom, quality: int) -> Tensor:
    def compress(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)
    return with_pillow(x, compress)


# The constants of the five severities.
CORRUPTIONS = {
    gaussian_noise: ((0.04,), (0.06,), (0.08,), (0.09,), (0.10,)),
    shot_noise: ((500,), (250,), (100,), (75,), (50,)),
    impulse_noise: ((0.01,), (0.02,), (0.03,), (0.05,), (0.07,)),
    defocus_blur: ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    glass_blur: ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2)),
    motion_blur: ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    zoom_blur: ((1.06,), (1.11,), (1.16,), (1.21,), (1.26,)),
    snow: ((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
           (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)),
    fog: ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    brightness: ((0.05,), (0.1,), (0.15,), (0.2,), (0.3,)),
    contrast: ((0.75,), (0.5,), (0.4,), (0.3,), (0.15,)),
    elastic_transform: ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    pixelate: ((0.95,), (0.9,), (0.85,), (0.75,), (0.65,)),
    jpeg_compression: ((80,), (65,), (58,), (50,), (40,)),
}


def corrupt(images: Tensor, operation: Callable[..., Tensor], severity: int, seed: int = 0) -> Tensor:
    """Corrupt images (N, 32, 32, 3) uint8, from the first of the data set on, at a severity of 1 to 5."""
    constants, name = CORRUPTIONS[operation][severity - 1], zlib.crc32(operation.__name__.encode())
    corrupted, white = [], torch.tensor([255.0], device=images.device)  # by a plain number, CUDA multiplies by 1 / 255
    for block, chunk in enumerate(images.split(BLOCK)):
        rng = BlockRandom([seed, name, severity, block], len(chunk))
        x = operation(chunk.permute(0, 3, 1, 2).float() / white, rng, *constants)
        corrupted.append((truncate(x.clamp(0, 1)) * 255).round().to(torch.uint8).permute(0, 2, 3, 1))
    return torch.cat(corrupted)
