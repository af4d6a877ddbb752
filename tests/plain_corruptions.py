"""A plain implementation of each corruption: one image at a time, in float64, with NumPy, Pillow and colorsys.

A function takes an image (32, 32, 3) in [0, 1], an iterator over its random numbers, and the constants of a severity.
"""

import colorsys
import io
import math

import numpy as np
from PIL import Image


def gaussian_noise(x, numbers, scale):
    return x + scale * next(numbers).transpose(1, 2, 0)


def shot_noise(x, numbers, photons):
    return next(numbers).transpose(1, 2, 0) / photons


def impulse_noise(x, numbers, amount):
    chance = next(numbers).transpose(1, 2, 0)
    return np.where(chance < amount / 2, 1, np.where(chance < amount, 0, x))


def correlate(x, kernel, mode):
    """Filter (32, 32, ...) with a square kernel of odd size; `mode` is that of np.pad."""
    reach = len(kernel) // 2
    padded = np.pad(x, [(reach, reach), (reach, reach)] + [(0, 0)] * (x.ndim - 2), mode=mode)
    return sum(kernel[i, j] * padded[i:i + 32, j:j + 32] for i in range(len(kernel)) for j in range(len(kernel)))


def gaussian_kernel(sigma, reach):
    line = np.array([math.exp(-0.5 * (k / sigma) ** 2) for k in range(-reach, reach + 1)])
    return np.outer(line, line) / line.sum() ** 2


def smooth(x, sigma, truncate=4, mode="edge"):
    return correlate(x, gaussian_kernel(sigma, int(truncate * sigma + 0.5)), mode)


def defocus_blur(x, numbers, radius, sigma):
    disk = np.array([[float(i * i + j * j <= radius * radius) for i in range(-16, 16)] for j in range(-16, 16)])
    kernel = correlate(disk / disk.sum(), gaussian_kernel(sigma, 1), "constant")[8:25, 8:25]
    return correlate(x, kernel, "reflect")


def glass_blur(x, numbers, sigma, times):
    x = to_bytes(smooth(x, sigma)) / 255
    for _ in range(times):
        chance = next(numbers)
        for row in range(31, 1, -1):
            for column in range(31, 1, -1):
                up, left = (chance[:, row, column] < 0.5).astype(int)
                here, there = x[row, column], x[row - up, column - left]  # views, as in the original
                x[row, column] = there
                x[row - up, column - left] = here
    return smooth(x, sigma)


def smear(x, angle, radius, sigma):
    weights = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(2 * radius + 1)]
    out = np.zeros_like(x)
    for k, weight in enumerate(weights):
        rows = np.arange(32) + math.ceil(k * math.sin(math.radians(angle)) - 0.5)
        columns = np.arange(32) + math.ceil(k * math.cos(math.radians(angle)) - 0.5)
        out += weight / sum(weights) * x[np.clip(rows, 0, 31)][:, np.clip(columns, 0, 31)]
    return to_bytes(out) / 255


def motion_blur(x, numbers, radius, sigma):
    return smear(x, next(numbers), radius, sigma)


def enlarge(x, factor):
    crop = math.ceil(32 / factor)
    size, top = round(crop * factor), (32 - crop) // 2
    at = np.linspace(0, crop - 1, size)
    x = x[top:top + crop, top:top + crop]
    x = np.apply_along_axis(lambda line: np.interp(at, np.arange(crop), line), 0, x)
    x = np.apply_along_axis(lambda line: np.interp(at, np.arange(crop), line), 1, x)
    trim = (size - 32) // 2
    return x[trim:trim + 32, trim:trim + 32]


def zoom_blur(x, numbers, end):
    count = {1.06: 7, 1.11: 12, 1.16: 16, 1.21: 21, 1.26: 26}[end]  # length of np.arange(1, end, 0.01)
    step = 1.01 - 1  # as in np.arange: 1.25 becomes slightly more, and 26 * 1.25 rounds up
    return (x + sum(enlarge(x, 1 + k * step) for k in range(count))) / (count + 1)


def diamond_square(numbers, decay):
    height, step, wibble = np.zeros((32, 32)), 32, 100.0
    while step >= 2:
        half = step // 2
        for offsets, corners in (((half, half), [(0, 0), (0, step), (step, 0), (step, step)]),
                                 ((0, half), [(0, 0), (0, step), (half, half), (-half, half)]),
                                 ((half, 0), [(0, 0), (step, 0), (half, half), (half, -half)])):
            noise = next(numbers)
            for i in range(0, 32, step):
                for j in range(0, 32, step):
                    total = sum(height[(i + a) % 32, (j + b) % 32] for a, b in corners)
                    height[i + offsets[0], j + offsets[1]] = total / 4 + wibble * noise[i // step, j // step]
        step, wibble = half, wibble / decay
    return (height - height.min()) / np.ptp(height)


def fog(x, numbers, amount, decay):
    return (x + amount * diamond_square(numbers, decay)[..., None]) * x.max() / (x.max() + amount)


def snow(x, numbers, mean, scale, factor, threshold, radius, sigma, keep):
    flakes = enlarge(mean + scale * next(numbers)[0], factor)
    flakes = to_bytes(np.where(flakes < threshold, 0, flakes)) / 255
    flakes = smear(flakes, next(numbers), radius, sigma)[..., None]
    gray = (x @ [0.299, 0.587, 0.114])[..., None]
    return keep * x + (1 - keep) * np.maximum(x, gray * 1.5 + 0.5) + flakes + flakes[::-1, ::-1]


def brightness(x, numbers, amount):
    def brighten(pixel):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        return colorsys.hsv_to_rgb(hue, saturation, min(value + amount, 1))
    return np.apply_along_axis(brighten, 2, x)


def contrast(x, numbers, factor):
    return factor * x + (1 - factor) * x.mean(axis=(0, 1))


def read_at(x, rows, columns, mode):
    """Interpolate (32, 32, 3) bilinearly at rows and columns (32, 32); `mode` is that of np.pad."""
    x = np.pad(x, ((40, 40), (40, 40), (0, 0)), mode=mode)
    i, j = np.floor(rows).astype(int), np.floor(columns).astype(int)
    p, q = (rows - i)[..., None], (columns - j)[..., None]
    i, j = i + 40, j + 40
    return (1 - p) * ((1 - q) * x[i, j] + q * x[i, j + 1]) + p * ((1 - q) * x[i + 1, j] + q * x[i + 1, j + 1])


def elastic_transform(x, numbers, amplitude, sigma, shift):
    points = np.array([[26, 26], [26, 6], [6, 6]])
    moved = points + 32 * next(numbers)
    forward = np.linalg.solve(np.c_[points, np.ones(3)], moved)  # (3, 2): x, y, 1 -> moved x, y
    linear = np.linalg.inv(forward[:2])
    rows, columns = np.indices((32, 32))
    source = np.round((np.stack([columns, rows], -1) - forward[2]) @ linear * 32) / 32
    x = read_at(x, source[..., 1], source[..., 0], "reflect")
    if amplitude == 0:
        return x
    right, down = (32 * amplitude * smooth(next(numbers), sigma * 32, 3, "symmetric") for _ in range(2))
    return read_at(x, rows + down, columns + right, "symmetric")


def pixelate(x, numbers, factor):
    image = Image.fromarray(to_bytes(x)).resize((int(32 * factor),) * 2, Image.Resampling.BOX)
    return np.asarray(image.resize((32, 32), Image.Resampling.BOX)) / 255


def jpeg_compression(x, numbers, quality):
    file = io.BytesIO()
    Image.fromarray(to_bytes(x)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)) / 255


def to_bytes(x):
    return np.floor(np.clip(x, 0, 1) * 255 + 1e-3).astype(np.uint8)
