"""The corruptions of CIFAR-10-C (Hendrycks and Dietterich, arXiv 1903.12261) as operations on whole batches.

The constants are those that CIFAR-10-C was made with; they are weaker than ImageNet-C's. An operation takes images
(N, 3, 32, 32) float32 in [0, 1] on any device, the draws of their block, and the constants of one severity, and returns
images again. What does not depend on the images (angles, clouds, flakes, drops, shifts) is worked out on the CPU, so
that every device gets the same; pixelate and JPEG, which Pillow does, are, too.

Given the same random numbers, the original's way (SciPy 1.17, scikit-image 0.26, OpenCV 5.0, ImageMagick 6.9, Pillow)
gave the same bytes on 300 test images, or bytes 1 apart where a value is nearly whole; 2 in glass blur, which cuts to
bytes twice; in 2 images of spatter an edge of a drop moved (14); and elastic transform's affine map, in fixed point in
OpenCV 4.5, moved 1.4 % of the bytes (by up to 5). What does differ from the published files: the random numbers; frost
is missing, for it needs photographs; spatter without any drop leaves the image as it is, where the original divides by
zero.
"""

import io
import math
import zlib
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SIZE = 32
BLOCK = 500  # images that share a generator


class Draws:
    """Random numbers of one block of images, made on the CPU from a key.

    They are drawn for a whole block and then cut: an image's numbers depend neither on the batch size nor on how many
    images follow.
    """

    def __init__(self, key: list[int], count: int):
        self.rng = np.random.default_rng(key)
        self.count = count

    def normal(self, *shape: int) -> Tensor:
        """Draw (N, *shape) float32 of mean 0 and deviation 1."""
        return torch.from_numpy(self.rng.standard_normal((BLOCK, *shape), dtype=np.float32)[:self.count])

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Draw (N, *shape) float32 in [low, high)."""
        return low + (high - low) * torch.from_numpy(self.rng.random((BLOCK, *shape), dtype=np.float32)[:self.count])

    def poisson(self, rates: Tensor) -> Tensor:
        """Draw counts, as float32, for rates (N, ...); not cut to size, and so only for the last draw of a block."""
        return torch.from_numpy(self.rng.poisson(rates.numpy()).astype(np.float32))


# --- building stones -------------------------------------------------------------------------------------------------


def cut(x: Tensor) -> Tensor:
    """Cut values down to whole bytes, as the original does; the thousandth keeps whole ones whole in float32."""
    return (x * 255 + 0.001).floor() / 255


def nearest(position: Tensor) -> Tensor:
    """Move positions outside 0 to 31 to the edge."""
    return position.clamp(0, SIZE - 1)


def mirror(position: Tensor) -> Tensor:
    """Fold positions outside 0 to 31 back in, the edge pixel once (OpenCV's BORDER_REFLECT_101)."""
    return SIZE - 1 - (SIZE - 1 - position.abs()).abs()


def symmetric(position: Tensor) -> Tensor:
    """Fold positions outside 0 to 31 back in, the edge pixel twice (scipy's "reflect")."""
    return torch.where(position < 0, -1 - position, torch.where(position >= SIZE, 2 * SIZE - 1 - position, position))


def take(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Read pixels of (N, C, 32, 32) at rows and columns, int64, that broadcast to (N, 32, 32)."""
    index = (rows * SIZE + columns).flatten(1).to(x.device)[:, None].expand(-1, x.shape[1], -1)
    return x.flatten(2).gather(2, index).view_as(x)


def interpolate(x: Tensor, rows: Tensor, columns: Tensor, fold: Callable[[Tensor], Tensor]) -> Tensor:
    """Read (N, C, 32, 32) bilinearly at rows and columns (N, 32, 32), float32."""
    top, left = rows.floor(), columns.floor()
    total = torch.zeros_like(x)
    for down in (0, 1):
        for right in (0, 1):
            weight = (1 - (rows - top - down).abs()) * (1 - (columns - left - right).abs())
            total += weight[:, None].to(x.device) * take(x, fold(top.long() + down), fold(left.long() + right))
    return total


def both_axes(matrix: Tensor, x: Tensor) -> Tensor:
    """Apply a (32, 32) matrix along the rows and along the columns of (..., 32, 32)."""
    matrix = matrix.to(x.device)
    return matrix @ x @ matrix.T


def gaussian(x: Tensor, sigma: float, truncate: float = 4, fold: Callable[[Tensor], Tensor] = nearest) -> Tensor:
    """Smooth (..., 32, 32) as scipy's gaussian_filter does; a sigma of 0 changes nothing."""
    steps = torch.arange(-int(truncate * sigma + 0.5), int(truncate * sigma + 0.5) + 1)
    weights = torch.softmax(-(steps / max(sigma, 0.01)).square() / 2, 0).expand(SIZE, -1)
    positions = fold(torch.arange(SIZE)[:, None] + steps)
    return both_axes(torch.zeros(SIZE, SIZE).scatter_add_(1, positions, weights), x)


def zoom(x: Tensor, factor: float) -> Tensor:
    """Enlarge the middle of (..., 32, 32) linearly, as scipy's zoom does with a centred crop."""
    crop = math.ceil(SIZE / factor)
    size = round(crop * factor)
    steps = torch.arange(SIZE, dtype=torch.float64)
    positions = (SIZE - crop) // 2 + (steps + (size - SIZE) // 2) * ((crop - 1) / (size - 1))
    return both_axes((1 - (positions[:, None] - steps).abs()).clamp(min=0).float(), x)


def motion(x: Tensor, angle: Tensor, radius: int, sigma: float) -> Tensor:
    """Smear (N, C, 32, 32) to one side, along an angle per image in degrees, as ImageMagick's motion blur."""
    angle = angle.double().deg2rad()
    steps = torch.arange(SIZE)
    total = torch.zeros_like(x)
    for step, weight in enumerate(torch.softmax(-(torch.arange(2 * radius + 1) / sigma).square() / 2, 0).tolist()):
        down, right = ((step * part - 0.5).ceil().long()[:, None] for part in (angle.sin(), angle.cos()))
        total += weight * take(x, nearest(steps + down)[:, :, None], nearest(steps + right)[:, None, :])
    return cut(total)


# --- noise -----------------------------------------------------------------------------------------------------------


def gaussian_noise(x: Tensor, draws: Draws, scale: float) -> Tensor:
    """Add noise of one deviation."""
    return x + scale * draws.normal(*x.shape[1:]).to(x.device)


def shot_noise(x: Tensor, draws: Draws, photons: int) -> Tensor:
    """Count photons, of which white has so many."""
    return (draws.poisson(x.cpu() * photons) / photons).to(x.device)


def impulse_noise(x: Tensor, draws: Draws, amount: float) -> Tensor:
    """Set single values to white or black, half of the amount each."""
    chance = draws.uniform(0, 1, *x.shape[1:]).to(x.device)
    return x.masked_fill(chance < amount, 0).masked_fill(chance < amount / 2, 1)


def speckle_noise(x: Tensor, draws: Draws, scale: float) -> Tensor:
    """Add noise that grows with the value."""
    return x + x * scale * draws.normal(*x.shape[1:]).to(x.device)


# --- blur ------------------------------------------------------------------------------------------------------------


def gaussian_blur(x: Tensor, draws: Draws, sigma: float) -> Tensor:
    """Smooth; nothing is drawn."""
    return gaussian(x, sigma)


def defocus_blur(x: Tensor, draws: Draws, radius: float, sigma: float) -> Tensor:
    """Spread every pixel over a disk, the edge of which is smoothed by a 3x3 filter."""
    steps = torch.arange(-2, 3)
    disk = (steps[:, None].square() + steps.square() <= radius ** 2).float()  # at most 3x3, and so 5x5 when smoothed
    edge = torch.softmax(-(torch.arange(-1, 2) / sigma).square() / 2, 0)
    kernel = F.conv2d((disk / disk.sum())[None, None], edge.outer(edge)[None, None], padding=1)[0, 0].tolist()
    padded = F.pad(x, (2, 2, 2, 2), mode="reflect")
    # no convolution of the images: on CUDA it would run in TF32
    return sum(kernel[i][j] * padded[:, :, i:i + SIZE, j:j + SIZE] for i in range(5) for j in range(5) if kernel[i][j])


def glass_blur(x: Tensor, draws: Draws, sigma: float, times: int) -> Tensor:
    """Smooth, move pixels by at most one, smooth.

    The original sets out to exchange neighbours, but its assignment between array views copies: each pixel takes the
    value of the one above, to the left, or both, which its scan from the lower right has not yet touched.
    """
    x = cut(gaussian(x, sigma))
    steps = torch.arange(SIZE)
    inner = (steps >= 2)[:, None] & (steps >= 2)
    for _ in range(times):
        back = ((draws.uniform(0, 1, 2, SIZE, SIZE) < 0.5) & inner).long()
        x = take(x, steps[:, None] - back[:, 0], steps - back[:, 1])
    return gaussian(x, sigma)


def motion_blur(x: Tensor, draws: Draws, radius: int, sigma: float) -> Tensor:
    """Smear in a random direction."""
    return motion(x, draws.uniform(-45, 45), radius, sigma)


def zoom_blur(x: Tensor, draws: Draws, end: float) -> Tensor:
    """Average over growing enlargements."""
    factors = np.arange(1, end, 0.01)  # as in the original: rounding decides whether the end itself is in
    return (x + sum(zoom(x, factor) for factor in factors)) / (len(factors) + 1)


# --- weather ---------------------------------------------------------------------------------------------------------


def clouds(draws: Draws, decay: float) -> Tensor:
    """Make (N, 32, 32) clouds from 0 to 1 by the diamond-square algorithm on a torus."""
    height = torch.zeros(draws.count, SIZE, SIZE)
    step, wibble = SIZE, 100.0
    while step >= 2:
        half, cells = step // 2, SIZE // step
        noise = [wibble * draws.uniform(-wibble, wibble, cells, cells) for _ in range(3)]
        corners = height[:, ::step, ::step]
        pairs = corners + corners.roll(-1, 1)
        centres = (pairs + pairs.roll(-1, 2)) / 4 + noise[0]
        height[:, half::step, half::step] = centres
        height[:, ::step, half::step] = (centres + centres.roll(1, 1) + corners + corners.roll(-1, 2)) / 4 + noise[1]
        height[:, half::step, ::step] = (centres + centres.roll(1, 2) + pairs) / 4 + noise[2]
        step, wibble = half, wibble / decay
    height -= height.amin((1, 2), keepdim=True)
    return height / height.amax((1, 2), keepdim=True)


def fog(x: Tensor, draws: Draws, amount: float, decay: float) -> Tensor:
    """Add clouds, and scale back to the image's own maximum."""
    highest = x.amax((1, 2, 3), keepdim=True)
    return (x + amount * clouds(draws, decay)[:, None].to(x.device)) * highest / (highest + amount)


def snow(x: Tensor, draws: Draws, mean: float, scale: float, factor: float, threshold: float, radius: int,
         sigma: float, keep: float) -> Tensor:
    """Whiten the image, and lay smeared flakes over it, once more turned by 180 degrees."""
    flakes = zoom(mean + scale * draws.normal(1, SIZE, SIZE), factor)
    flakes = cut(flakes.masked_fill(flakes < threshold, 0).clamp(max=1))
    flakes = motion(flakes, draws.uniform(-135, -45), radius, sigma).to(x.device)
    red, green, blue = x.split(1, dim=1)
    white = torch.maximum(x, (0.299 * red + 0.587 * green + 0.114 * blue) * 1.5 + 0.5)
    return keep * x + (1 - keep) * white + flakes + flakes.flip(2, 3)


def windows(x: Tensor, mode: str) -> Tensor:
    """Return the 3x3 surroundings (N, 32, 32, 3, 3) of the pixels of (N, 32, 32)."""
    return F.pad(x[:, None], (1, 1, 1, 1), mode=mode)[:, 0].unfold(1, 3, 1).unfold(2, 3, 1)


def until_stable(x: Tensor, step: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a step until nothing changes."""
    while not torch.equal(x, after := step(x)):
        x = after
    return x


def find_edges(x: Tensor, low: float, high: float) -> Tensor:
    """Find the edges of bytes (N, 32, 32), float32, as OpenCV's Canny does by default; True on an edge."""
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    right, down = ((windows(x, "replicate") * kernel).sum((3, 4)) for kernel in (sobel, sobel.T))
    size = right.abs() + down.abs()
    near = windows(size, "constant")
    slope = 13573 / 2 ** 15  # tan(22.5 degrees) in OpenCV's fixed point
    falling = (size > near[..., 0, 0]) & (size > near[..., 2, 2])
    rising = (size > near[..., 0, 2]) & (size > near[..., 2, 0])
    ridge = torch.where(right * down < 0, rising, falling)
    upright = (size > near[..., 0, 1]) & (size >= near[..., 2, 1])
    ridge = torch.where(down.abs() > (slope + 2) * right.abs(), upright, ridge)
    level = (size > near[..., 1, 0]) & (size >= near[..., 1, 2])
    ridge = torch.where(down.abs() < slope * right.abs(), level, ridge) & (size > low)
    strong = (ridge & (size > high)).float()
    return until_stable(strong, lambda edges: F.max_pool2d(edges, 3, 1, 1) * ridge) > 0


def edge_distance(edges: Tensor) -> Tensor:
    """Return each pixel's distance to the nearest edge in OpenCV's 5x5 chamfer metric, at most 20."""
    costs = {1: 1.0, 2: 1.4, 5: 2.1969}  # of a step, by its squared length
    steps = [(i, j, costs[i * i + j * j]) for i in range(-2, 3) for j in range(-2, 3) if i * i + j * j in costs]

    def relax(distance: Tensor) -> Tensor:
        padded = F.pad(distance, (2, 2, 2, 2), value=20)
        for i, j, cost in steps:
            distance = torch.minimum(distance, padded[:, 2 + i:2 + i + SIZE, 2 + j:2 + j + SIZE] + cost)
        return distance

    return until_stable(torch.where(edges, 0.0, 20.0), relax)


def equalize(x: Tensor) -> Tensor:
    """Spread the levels of bytes (N, 32, 32), float32, over 0 to 255, as OpenCV's equalizeHist."""
    index = x.long().flatten(1)
    counts = torch.zeros(len(index), 256).scatter_add_(1, index, torch.ones(index.shape))
    lowest = counts.gather(1, index.amin(1, keepdim=True))
    table = ((counts.cumsum(1) - lowest) * (255 / (SIZE * SIZE - lowest))).round()
    table = torch.where(lowest == SIZE * SIZE, torch.arange(256), table)  # a single level stays what it is
    return table.gather(1, index).view_as(x)


def water(drops: Tensor) -> Tensor:
    """Turn drops (N, 32, 32), bytes as float32, into opacities up to 1 that shine at one side of the edges."""
    relief = equalize(windows(edge_distance(find_edges(drops, 50, 150)), "reflect").mean((3, 4)).floor())
    light = torch.tensor([[-2.0, -1, 0], [-1, 1, 1], [0, 1, 2]])
    relief = (windows(relief, "reflect") * light).sum((3, 4)).clamp(0, 255)
    layer = drops * windows(relief, "reflect").mean((3, 4)).round()
    return layer / layer.amax((1, 2), keepdim=True).clamp(min=1)


def spatter(x: Tensor, draws: Draws, mean: float, scale: float, sigma: float, threshold: float, amount: float,
            mud: bool) -> Tensor:
    """Splash pale turquoise water (added) or brown mud (opaque) over the image."""
    drops = gaussian(mean + scale * draws.normal(SIZE, SIZE), sigma)
    color = torch.tensor([63, 42, 20] if mud else [175, 238, 238]).view(3, 1, 1).to(x.device) / 255
    if mud:
        opacity = gaussian((drops > threshold).float(), amount)
        opacity = opacity.masked_fill(opacity < 0.8, 0)[:, None].to(x.device)
        return x * (1 - opacity) + opacity * color
    drops = cut(drops.masked_fill(drops < threshold, 0)) * 255 % 256  # a byte wraps around, as in the original
    return x + amount * water(drops)[:, None].to(x.device) * color


# --- colour ----------------------------------------------------------------------------------------------------------


def brightness(x: Tensor, draws: Draws, amount: float) -> Tensor:
    """Raise V of HSV, at the same hue and saturation."""
    value = x.amax(1, keepdim=True)
    raised = (value + amount).clamp(max=1)
    return torch.where(value > 0, x * (raised / value), raised)


def saturate(x: Tensor, draws: Draws, factor: float, offset: float) -> Tensor:
    """Change S of HSV, at the same hue and value; grey counts as red, since its hue is 0."""
    value, lowest = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    red = torch.tensor([0.0, 1.0, 1.0], device=x.device).view(3, 1, 1)
    distance = torch.where(value > lowest, (value - x) / (value - lowest), red)  # 0 for the largest channel
    saturation = torch.where(value > 0, 1 - lowest / value, 0)
    return value * (1 - (saturation * factor + offset).clamp(0, 1) * distance)


def contrast(x: Tensor, draws: Draws, factor: float) -> Tensor:
    """Move every channel towards its mean."""
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * factor + mean


# --- digital ---------------------------------------------------------------------------------------------------------


def elastic_transform(x: Tensor, draws: Draws, amplitude: float, sigma: float, shift: float) -> Tensor:
    """Move three points at random by an affine map, then all pixels by a smooth field; lengths in image widths."""
    points = torch.tensor([[26.0, 26], [26, 6], [6, 6]], dtype=torch.float64)  # x, y
    moved = points + SIZE * draws.uniform(-shift, shift, 3, 2)
    back = torch.linalg.solve(F.pad(moved, (0, 1), value=1), points.expand_as(moved))  # (N, 3, 2), target to source
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    source = torch.stack([columns, rows, torch.ones_like(rows)], -1).double() @ back[:, None]  # (N, 32, 32, 2)
    source = ((source * 32).round() / 32).float()  # OpenCV works in 32nds of a pixel
    x = interpolate(x, source[..., 1], source[..., 0], mirror)
    right, down = (gaussian(draws.uniform(-1, 1, SIZE, SIZE), sigma * SIZE, 3, symmetric) for _ in range(2))
    return interpolate(x, rows + amplitude * SIZE * down, columns + amplitude * SIZE * right, symmetric)


def by_pillow(x: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Change image by image with Pillow, as the original does."""
    images = (x * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    changed = np.stack([np.asarray(change(Image.fromarray(image))) for image in images])
    return torch.from_numpy(changed).to(x.device).permute(0, 3, 1, 2) / 255


def pixelate(x: Tensor, draws: Draws, factor: float) -> Tensor:
    """Shrink and enlarge again."""
    small = int(SIZE * factor)
    return by_pillow(x, lambda image: image.resize((small, small), Image.Resampling.BOX).resize(
        (SIZE, SIZE), Image.Resampling.BOX))


def jpeg_compression(x: Tensor, draws: Draws, quality: int) -> Tensor:
    """Code as JPEG, and decode."""
    def recode(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)
    return by_pillow(x, recode)


# --- all of them -----------------------------------------------------------------------------------------------------

# The five severities' constants. CIFAR-10-C's mean is taken over the first group and frost.
MAIN = {
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
EXTRA = {
    speckle_noise: ((0.06,), (0.1,), (0.12,), (0.16,), (0.2,)),
    gaussian_blur: ((0.4,), (0.6,), (0.7,), (0.8,), (1,)),
    spatter: ((0.62, 0.1, 0.7, 0.7, 0.5, False), (0.65, 0.1, 0.8, 0.7, 0.5, False), (0.65, 0.3, 1, 0.69, 0.5, False),
              (0.65, 0.1, 0.7, 0.69, 0.6, True), (0.65, 0.1, 0.5, 0.68, 0.6, True)),
    saturate: ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
}


def corrupt(images: Tensor, operation: Callable[..., Tensor], severity: int, seed: int = 0) -> Tensor:
    """Corrupt images, the first of which is the first of its data set.

    Args:
        images: (N, 32, 32, 3) uint8.
        operation: A key of MAIN or EXTRA.
        severity: 1 to 5.
        seed: Other seeds give other noise, angles and clouds.

    Returns:
        (N, 32, 32, 3) uint8 on the same device.
    """
    constants, name = (MAIN | EXTRA)[operation][severity - 1], zlib.crc32(operation.__name__.encode())
    done = []
    for block, part in enumerate(images.split(BLOCK)):
        draws = Draws([seed, name, severity, block], len(part))
        x = operation(part.permute(0, 3, 1, 2).float() / 255, draws, *constants)
        done.append((cut(x.clamp(0, 1)) * 255).round().to(torch.uint8).permute(0, 2, 3, 1))
    return torch.cat(done)
