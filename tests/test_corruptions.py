"""Each corruption of a batch against a plain way to make it, image by image; and what the program says of them.

The plain ways use loops, NumPy, Pillow and colorsys, in float64, and share only the random numbers with the batch's.
"""

import colorsys
import heapq
import io
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import models
from synthetic import NAMES, make_images
from tools import corruption_ops as ops
from tools import corruptions
from utils import UserError, save_checkpoint

ALL = [*ops.MAIN, *ops.EXTRA]
RANDOM = {"gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "glass_blur", "motion_blur", "fog", "snow",
          "spatter", "elastic_transform"}


@pytest.fixture(scope="module")
def images():
    """Give noise, a generated picture, flat grey with a spot, and colours with black and white; (4, 32, 32, 3)."""
    found = np.random.default_rng(5).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    found[1] = make_images(1, 3, 0)[0][0]
    found[2] = 119
    found[2, 8:12, 20:23] = (250, 30, 40)
    found[3] = np.repeat(np.linspace(0, 255, 32).astype(np.uint8)[None, :, None], 32, 0).repeat(3, 2)
    found[3, 10:20, :, 1] = 0
    return torch.from_numpy(found)


class Recorder(ops.Draws):
    """Draws that remember what they handed out."""

    def __init__(self, *args):
        super().__init__(*args)
        self.numbers = []

    def keep(self, tensor):
        self.numbers.append(tensor.double().numpy())
        return tensor

    def normal(self, *shape):
        return self.keep(super().normal(*shape))

    def uniform(self, *args):
        return self.keep(super().uniform(*args))

    def poisson(self, rates):
        return self.keep(super().poisson(rates))


# --- plain ways: image (32, 32, 3) in [0, 1], that image's draws in order, constants ---------------------------------


def gaussian_noise(x, draws, scale):
    return x + scale * next(draws).transpose(1, 2, 0)


def shot_noise(x, draws, photons):
    return next(draws).transpose(1, 2, 0) / photons


def impulse_noise(x, draws, amount):
    chance = next(draws).transpose(1, 2, 0)
    return np.where(chance < amount / 2, 1, np.where(chance < amount, 0, x))


def speckle_noise(x, draws, scale):
    return x * (1 + scale * next(draws).transpose(1, 2, 0))


def correlate(x, kernel, mode):
    """Filter (32, 32, ...) by a square kernel of odd size, with a border of NumPy's."""
    reach = len(kernel) // 2
    padded = np.pad(x, [(reach, reach), (reach, reach)] + [(0, 0)] * (x.ndim - 2), mode=mode)
    return sum(kernel[i, j] * padded[i:i + 32, j:j + 32] for i in range(len(kernel)) for j in range(len(kernel)))


def bell(sigma, reach):
    line = np.array([math.exp(-0.5 * (k / sigma) ** 2) for k in range(-reach, reach + 1)])
    return np.outer(line, line) / line.sum() ** 2


def smooth(x, sigma, truncate=4, mode="edge"):
    return correlate(x, bell(sigma, int(truncate * sigma + 0.5)), mode)


def gaussian_blur(x, draws, sigma):
    return smooth(x, sigma)


def defocus_blur(x, draws, radius, sigma):
    disk = np.array([[float(i * i + j * j <= radius * radius) for i in range(-16, 16)] for j in range(-16, 16)])
    kernel = correlate(disk / disk.sum(), bell(sigma, 1), "constant")[8:25, 8:25]
    return correlate(x, kernel, "reflect")


def glass_blur(x, draws, sigma, times):
    x = to_bytes(smooth(x, sigma)) / 255
    for _ in range(times):
        chance = next(draws)
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
        down = math.ceil(k * math.sin(math.radians(angle)) - 0.5)
        right = math.ceil(k * math.cos(math.radians(angle)) - 0.5)
        for row in range(32):
            for column in range(32):
                source = x[min(max(row + down, 0), 31), min(max(column + right, 0), 31)]
                out[row, column] += weight / sum(weights) * source
    return to_bytes(out) / 255


def motion_blur(x, draws, radius, sigma):
    return smear(x, next(draws), radius, sigma)


def enlarge(x, factor):
    crop = math.ceil(32 / factor)
    size, top = round(crop * factor), (32 - crop) // 2
    at = np.linspace(0, crop - 1, size)
    x = x[top:top + crop, top:top + crop]
    x = np.apply_along_axis(lambda line: np.interp(at, np.arange(crop), line), 0, x)
    x = np.apply_along_axis(lambda line: np.interp(at, np.arange(crop), line), 1, x)
    trim = (size - 32) // 2
    return x[trim:trim + 32, trim:trim + 32]


def zoom_blur(x, draws, end):
    count = {1.06: 7, 1.11: 12, 1.16: 16, 1.21: 21, 1.26: 26}[end]  # what np.arange makes of 1, end, 0.01
    step = 1.01 - 1  # as NumPy has it: 1.25 becomes a little more, and 26 * 1.25 rounds up
    return (x + sum(enlarge(x, 1 + k * step) for k in range(count))) / (count + 1)


def diamond_square(draws, decay):
    height, step, wibble = np.zeros((32, 32)), 32, 100.0
    while step >= 2:
        half = step // 2
        for offsets, corners in (((half, half), [(0, 0), (0, step), (step, 0), (step, step)]),
                                 ((0, half), [(0, 0), (0, step), (half, half), (-half, half)]),
                                 ((half, 0), [(0, 0), (step, 0), (half, half), (half, -half)])):
            noise = next(draws)
            for i in range(0, 32, step):
                for j in range(0, 32, step):
                    total = sum(height[(i + a) % 32, (j + b) % 32] for a, b in corners)
                    height[i + offsets[0], j + offsets[1]] = total / 4 + wibble * noise[i // step, j // step]
        step, wibble = half, wibble / decay
    return (height - height.min()) / np.ptp(height)


def fog(x, draws, amount, decay):
    return (x + amount * diamond_square(draws, decay)[..., None]) * x.max() / (x.max() + amount)


def snow(x, draws, mean, scale, factor, threshold, radius, sigma, keep):
    flakes = enlarge(mean + scale * next(draws)[0], factor)
    flakes = to_bytes(np.where(flakes < threshold, 0, flakes)) / 255
    flakes = smear(flakes, next(draws), radius, sigma)[..., None]
    grey = (x @ [0.299, 0.587, 0.114])[..., None]
    return keep * x + (1 - keep) * np.maximum(x, grey * 1.5 + 0.5) + flakes + flakes[::-1, ::-1]


def canny(x):
    """Find edges between 50 and 150: gradient, non-maximum suppression in four directions, hysteresis by a stack."""
    sobel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    right, down = correlate(x, sobel, "edge"), correlate(x, sobel.T, "edge")
    size = np.pad(np.abs(right) + np.abs(down), 1)
    ridge = set()
    for i, j in np.ndindex(32, 32):
        angle = math.degrees(math.atan2(abs(down[i, j]), abs(right[i, j])))
        a, b = (0, 1) if angle < 22.5 else (1, 0) if angle > 67.5 else (1, 1 if right[i, j] * down[i, j] >= 0 else -1)
        here, before, after = size[i + 1, j + 1], size[i + 1 - a, j + 1 - b], size[i + 1 + a, j + 1 + b]
        if here > 50 and here > before and (here > after or here == after and 0 in (a, b)):
            ridge.add((i, j))
    stack = [(i, j) for i, j in ridge if size[i + 1, j + 1] > 150]
    edges = set(stack)
    while stack:
        i, j = stack.pop()
        new = {(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & ridge - edges
        edges |= new
        stack += new
    return edges


def chamfer(edges):
    """Walk from the edges by Dijkstra's algorithm, in steps like a chess king's and a knight's."""
    distance, queue = np.full((32, 32), 20.0), [(0.0, i, j) for i, j in edges]
    while queue:
        d, i, j = heapq.heappop(queue)
        if d < distance[i, j]:
            distance[i, j] = d
            for a, b in np.ndindex(5, 5):
                cost = {1: 1, 2: 1.4, 5: 2.1969}.get((a - 2) ** 2 + (b - 2) ** 2)
                if cost and 0 <= i + a - 2 < 32 and 0 <= j + b - 2 < 32:
                    heapq.heappush(queue, (d + cost, i + a - 2, j + b - 2))
    return distance


def spatter(x, draws, mean, scale, sigma, threshold, amount, mud):
    drops = smooth(mean + scale * next(draws), sigma)
    if mud:
        opacity = smooth((drops > threshold) * 1.0, amount)[..., None]
        return np.where(opacity < 0.8, x, (1 - opacity) * x + opacity * np.array([63, 42, 20]) / 255)
    drops = np.floor(np.where(drops < threshold, 0, drops) * 255 + 1e-3) % 256  # a C cast to bytes
    mean_of_9 = np.full((3, 3), 1 / 9)
    relief = np.floor(correlate(chamfer(canny(drops)), mean_of_9, "reflect") + 1e-9)
    first = (relief == relief.min()).sum()
    relief = np.array([[round(255 * ((relief <= v).sum() - first) / (1024 - first)) for v in row] for row in relief])
    relief = np.clip(correlate(relief, np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]), "reflect"), 0, 255)
    layer = drops * np.round(correlate(relief, mean_of_9, "reflect"))
    return x + amount * (layer / layer.max())[..., None] * np.array([175, 238, 238]) / 255


def in_hsv(x, change):
    return np.array([[colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*pixel))) for pixel in row] for row in x])


def brightness(x, draws, amount):
    return in_hsv(x, lambda h, s, v: (h, s, min(v + amount, 1)))


def saturate(x, draws, factor, offset):
    return in_hsv(x, lambda h, s, v: (h, min(s * factor + offset, 1), v))


def contrast(x, draws, factor):
    means = [x[..., channel].mean() for channel in range(3)]
    return factor * x + (1 - factor) * np.array(means)


def look_up(x, row, column, mode):
    """Interpolate one pixel between four, beyond the border as NumPy pads."""
    x = np.pad(x, ((40, 40), (40, 40), (0, 0)), mode=mode)
    i, j = math.floor(row), math.floor(column)
    p, q = row - i, column - j
    i, j = i + 40, j + 40
    return ((1 - p) * ((1 - q) * x[i, j] + q * x[i, j + 1]) + p * ((1 - q) * x[i + 1, j] + q * x[i + 1, j + 1]))


def elastic_transform(x, draws, amplitude, sigma, shift):
    points = np.array([[26, 26], [26, 6], [6, 6]])
    moved = points + 32 * next(draws)
    forward = np.linalg.solve(np.c_[points, np.ones(3)], moved)  # (3, 2): x, y, 1 -> moved x, y
    linear = np.linalg.inv(forward[:2])
    out = np.zeros_like(x)
    for row, column in np.ndindex(32, 32):
        source = (np.array([column, row]) - forward[2]) @ linear
        source = np.round(source * 32) / 32
        out[row, column] = look_up(x, source[1], source[0], "reflect")
    if amplitude == 0:
        return out
    right, down = (32 * amplitude * smooth(next(draws), sigma * 32, 3, "symmetric") for _ in range(2))
    return np.array([[look_up(out, i + down[i, j], j + right[i, j], "symmetric") for j in range(32)]
                     for i in range(32)])


def pixelate(x, draws, factor):
    image = Image.fromarray(to_bytes(x)).resize((int(32 * factor),) * 2, Image.Resampling.BOX)
    return np.asarray(image.resize((32, 32), Image.Resampling.BOX)) / 255


def jpeg_compression(x, draws, quality):
    file = io.BytesIO()
    Image.fromarray(to_bytes(x)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)) / 255


def to_bytes(x):
    return np.floor(np.clip(x, 0, 1) * 255 + 1e-3).astype(np.uint8)


# --- batched against plain -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("severity", [1, 3, 5])
@pytest.mark.parametrize("operation", ALL, ids=lambda operation: operation.__name__)
def test_batch_equals_image_by_image(images, monkeypatch, operation, severity):
    recorders = []
    monkeypatch.setattr(ops, "Draws", lambda *args: recorders.append(Recorder(*args)) or recorders[-1])
    found = ops.corrupt(images, operation, severity, seed=5).numpy()  # a seed by which drops of spatter wrap around
    constants = (ops.MAIN | ops.EXTRA)[operation][severity - 1]
    plain = globals()[operation.__name__]
    expected = np.stack([to_bytes(plain(image / 255, (numbers[i] for numbers in recorders[0].numbers), *constants))
                         for i, image in enumerate(images.numpy())])
    assert found.dtype == np.uint8 and found.shape == expected.shape
    if operation.__name__ in ("pixelate", "jpeg_compression", "shot_noise", "impulse_noise"):
        np.testing.assert_array_equal(found, expected)
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.005  # float32 on one side of a whole number


@pytest.mark.parametrize("operation", ALL, ids=lambda operation: operation.__name__)
def test_depends_on_seed_and_place_but_not_on_batch_or_limit(images, monkeypatch, operation):
    monkeypatch.setattr(ops, "BLOCK", 4)
    many = images.repeat(3, 1, 1, 1)[:10]
    before = many.clone()
    found = ops.corrupt(many, operation, 3, seed=1)
    assert torch.equal(many, before)
    assert torch.equal(found, ops.corrupt(many, operation, 3, seed=1))
    for count in (1, 5):
        assert torch.equal(ops.corrupt(many[:count], operation, 3, seed=1), found[:count])
    is_random = operation.__name__ in RANDOM
    assert torch.equal(found, ops.corrupt(many, operation, 3, seed=2)) != is_random
    assert torch.equal(found[:4], found[4:8]) != is_random  # the same images, in another block


def test_constants_are_those_of_cifar_10_c():
    """Compare with sums over the published constants, weighted by severity; typed from make_cifar_c.py on their own."""
    published = {
        "gaussian_noise": 1.26, "shot_noise": 1850, "impulse_noise": 0.69, "defocus_blur": 18.6, "glass_blur": 28.75,
        "motion_blur": 143.5, "zoom_blur": 17.9, "snow": 335.7, "fog": 48.2, "brightness": 3, "contrast": 4.9,
        "elastic_transform": 2.88, "pixelate": 11.55, "jpeg_compression": 784, "speckle_noise": 2.26,
        "gaussian_blur": 11.9, "spatter": 50.15, "saturate": 26.9}
    found = {operation.__name__: sum(severity * sum(constants) for severity, constants in enumerate(rows, 1))
             for operation, rows in (ops.MAIN | ops.EXTRA).items()}
    assert found == pytest.approx(published, abs=1e-9)


def test_noise_has_the_published_strength():
    grey = torch.full((40, 32, 32, 3), 128, dtype=torch.uint8)
    value = 128 / 255
    for operation, expected in ((ops.gaussian_noise, 0.08), (ops.shot_noise, math.sqrt(value / 100)),
                                (ops.speckle_noise, 0.12 * value)):
        found = ops.corrupt(grey, operation, 3).float() / 255
        assert found.mean().item() == pytest.approx(value, abs=0.005)
        assert found.std().item() == pytest.approx(expected, rel=0.02)
    found = ops.corrupt(grey, ops.impulse_noise, 5)
    assert (found == 255).float().mean().item() == pytest.approx(0.035, rel=0.05)
    assert (found == 0).float().mean().item() == pytest.approx(0.035, rel=0.05)


def test_water_without_a_drop_changes_nothing(images):
    x = images.permute(0, 3, 1, 2).float() / 255
    found = ops.spatter(x, ops.Draws([0], len(x)), 0.1, 0.01, 0.7, 0.7, 0.5, False)
    assert torch.equal(found, x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("operation", ALL, ids=lambda operation: operation.__name__)
def test_cuda_gives_the_bytes_of_the_cpu(images, operation):
    for severity in corruptions.SEVERITIES:
        found = ops.corrupt(images.cuda(), operation, severity).cpu().int()
        difference = (found - ops.corrupt(images, operation, severity).int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 0.005


# --- the program -----------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    args = {"num_blocks": [1, 1, 1], "channels": 16, "se_reduction": 4}
    state = {"model": models.build_model(**args).state_dict(), "args": args}
    save_checkpoint({**state, "classes": list(NAMES)}, tmp_path / "synthetic.pt")
    save_checkpoint(state, tmp_path / "cifar.pt")
    return tmp_path / "synthetic.pt"


def test_measures_every_corruption_and_names_frost(checkpoint, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ops, "BLOCK", 20)
    flags = ["--checkpoint", str(checkpoint), "--data-dir", str(data_dir), "--synthetic", "--limit-test", "20",
             "--device", "cpu", "--precision", "fp32"]
    assert corruptions.main([*flags, "--output", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    main_ones, extra = (([found["accuracy"][operation.__name__] for operation in group])
                        for group in (ops.MAIN, ops.EXTRA))
    assert (len(main_ones), len(extra), len(found["accuracy"])) == (14, 4, 19)
    assert {len(row) for row in main_ones + extra} == {5}
    assert found["mean"] == pytest.approx(np.mean(main_ones)) and found["left_out"] == ["frost"]
    printed = capsys.readouterr().out
    assert "left out of the mean: frost" in printed and "14 of the 15" in printed and "--test-dir" in printed
    assert f"clean accuracy {found['accuracy']['clean'][0]:.2f} %" in printed
    row = next(line for line in printed.splitlines() if line.startswith("contrast"))
    assert [float(cell) for cell in row.split()[1:6]] == pytest.approx(found["accuracy"]["contrast"], abs=0.005)


def test_generated_sets_are_the_clean_images_and_every_corruption_of_them(images):
    targets = torch.arange(len(images))
    sets = corruptions.make_sets(corruptions.data.Split(images, targets, []), 7, torch.device("cpu"))
    assert [(each.name, each.kind) for each in sets] == [
        ("clean", "other"), *((operation.__name__, "main") for operation in ops.MAIN),
        *((operation.__name__, "extra") for operation in ops.EXTRA)]
    assert torch.equal(sets[0].versions[0](), images) and all(torch.equal(each.targets, targets) for each in sets)
    for each, operation in zip(sets[1:], ALL, strict=True):
        assert len(each.versions) == 5
        for severity in (2, 5):
            assert torch.equal(each.versions[severity - 1](), ops.corrupt(images, operation, severity, seed=7))


def test_accuracy_counts_every_image(monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH_SIZE", 3)
    targets, sizes = torch.tensor([1, 1, 1, 1, 2, 3, 1]), []

    def predict(images):  # always class 1
        sizes.append(len(images))
        return torch.nn.functional.one_hot(torch.ones(len(images), dtype=torch.int64), 10)

    sets = [corruptions.TestSet("clean", "other", targets, [lambda: torch.zeros(7, 32, 32, 3, dtype=torch.uint8)])]
    assert corruptions.measure(sets, predict) == {"clean": [pytest.approx(100 * 5 / 7)]}
    assert sizes == [3, 3, 1]


def write_published(folder, count=6):
    """Write images that show their label in a byte, but at severity s the first s of them a wrong one."""
    labels = np.arange(count) % 10
    np.save(folder / "labels.npy", np.tile(labels, 5).astype(np.uint8))
    images = np.zeros((5, count, 32, 32, 3), np.uint8)
    images[:, :, 0, 0, 0] = labels
    for severity in range(1, 6):
        images[severity - 1, :severity, 0, 0, 0] += 1
    for name in ("frost", "fog", "spatter"):
        np.save(folder / f"{name}.npy", images.reshape(-1, 32, 32, 3))
    np.save(folder / "cifar10.1_v6_data.npy", images[1])
    np.save(folder / "cifar10.1_v6_labels.npy", labels.astype(np.int32))


def read_label(images):
    return torch.nn.functional.one_hot(images[:, 0, 0, 0].long(), 11)


def test_published_files_are_read_by_severity(tmp_path, capsys):
    write_published(tmp_path)
    sets = corruptions.find_sets(tmp_path, None)
    found = corruptions.measure(sets, read_label)
    expected = [100 * (6 - severity) / 6 for severity in range(1, 6)]
    assert found == {name: pytest.approx(expected) for name in ("frost", "fog", "spatter")} | {
        "cifar10.1_v6": [pytest.approx(expected[1])]}
    summary = corruptions.summarise(sets, found)
    assert summary["mean"] == pytest.approx(50) and "frost" not in summary["left_out"]
    assert len(summary["left_out"]) == 13
    assert "compare with published ones" in corruptions.describe(summary, True)
    limited = corruptions.measure(corruptions.find_sets(tmp_path, 4), read_label)
    assert limited["fog"] == pytest.approx([75, 50, 25, 0, 0])


def test_table_as_csv(tmp_path, checkpoint):
    write_published(tmp_path)
    flags = ["--checkpoint", str(tmp_path / "cifar.pt"), "--test-dir", str(tmp_path), "--device", "cpu"]
    corruptions.main([*flags, "--output", str(tmp_path / "out.csv")])
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[0] == "name,severity_1,severity_2,severity_3,severity_4,severity_5,mean"
    assert [line.split(",")[0] for line in lines[1:]] == ["frost", "fog", "spatter", "cifar10.1_v6"]
    assert lines[4].startswith("cifar10.1_v6,,,,,,")


@pytest.mark.parametrize("name, array, message", [
    ("fog.npy", np.zeros((29, 32, 32, 3), np.uint8), "fog.npy has uint8 (29, 32, 32, 3)"),
    ("fog.npy", np.zeros((30, 3, 32, 32), np.uint8), "(30, 3, 32, 32)"),
    ("fog.npy", np.zeros((30, 32, 32, 3), np.float32), "float32"),
    ("fog.npy", np.array([{}], dtype=object), "fog.npy cannot be read"),
    ("labels.npy", np.full(30, 10, np.uint8), "from 0 to 9"),
    ("labels.npy", np.full(30, 1.0), "float64"),
    ("labels.npy", np.arange(30) % 10, "does not repeat"),
    ("labels.npy", np.zeros((6, 5), np.uint8), "(6, 5)"),
    ("labels.npy", None, "labels.npy cannot be read"),
])
def test_foreign_published_files_are_refused(tmp_path, name, array, message):
    write_published(tmp_path)
    (tmp_path / name).unlink()
    if array is not None:
        np.save(tmp_path / name, array, allow_pickle=True)
    with pytest.raises(UserError) as error:
        corruptions.find_sets(tmp_path, None)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_severities_of_unequal_size_are_refused(tmp_path):
    write_published(tmp_path)
    for name in ("fog", "labels"):
        np.save(tmp_path / f"{name}.npy", np.load(tmp_path / f"{name}.npy")[:29])
    (tmp_path / "frost.npy").unlink()
    with pytest.raises(UserError, match="5 severities of the same size"):
        corruptions.find_sets(tmp_path, None)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickle_in_place_of_an_array_is_not_run(tmp_path):
    write_published(tmp_path)
    (tmp_path / "fog.npy").write_bytes(pickle.dumps(Hostile(tmp_path / "touched")))
    with pytest.raises(UserError, match="fog.npy cannot be read"):
        corruptions.find_sets(tmp_path, None)
    assert not (tmp_path / "touched").exists()


def test_cut_off_published_file_is_refused(tmp_path):
    write_published(tmp_path)
    whole = (tmp_path / "fog.npy").read_bytes()
    for length in (0, 50, len(whole) - 1):
        (tmp_path / "fog.npy").write_bytes(whole[:length])
        with pytest.raises(UserError, match="fog.npy cannot be read"):
            corruptions.find_sets(tmp_path, None)


@pytest.mark.parametrize("flags, message", [
    (["--test-dir", "{}/empty"], "holds neither"),
    (["--test-dir", "{}", "--limit-test", "7"], "fewer than --limit-test 7"),
    (["--test-dir", "{}", "--synthetic"], "not allowed with"),
    (["--test-dir", "{}"], "knows the classes"),
    (["--synthetic", "--output", "{}/out.txt"], "out.txt"),
    (["--synthetic", "--seed", "-1"], "-1"),
])
def test_mistakes_are_one_line(tmp_path, checkpoint, capsys, flags, message):
    write_published(tmp_path)
    with pytest.raises(SystemExit) as stop:
        corruptions.main(["--checkpoint", str(checkpoint), *(flag.format(tmp_path) for flag in flags)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
