"""Scenes made in memory, for demonstrations and tests: images with a label and a mask."""
import math

import numpy as np
from PIL import Image

OUTLINES = ("triangle", "square", "star", "disc")
TEXTURES = ("stripes", "checks", "rings")


def edge(outline, angle):
    """How far an outline is from its centre in each direction; all have the same area."""
    if outline == "disc":
        return 0.64
    if outline == "star":
        return 0.62 + 0.26 * np.cos(5 * angle)
    half = math.pi / (3 if outline == "triangle" else 4)  # of a side's angle
    reach = 1.0 if outline == "triangle" else 0.8  # of the corners
    return reach * math.cos(half) / np.cos(angle % (2 * half) - half)


def wave(texture, u, v, frequency, phase):
    """A texture's values from -1 to 1 at coordinates u, v in units of the object's radius."""
    if texture == "rings":
        return np.sin(frequency * np.hypot(u, v) + phase)
    stripes = np.sin(frequency * u + phase)
    if texture == "stripes":
        return stripes
    return 2 * stripes * np.sin(frequency * v)


class Shapes:
    """Scenes of two or three textured objects of one class, the label. They are large, so that a
    crop shows the class, and gray: colours would tell scenes apart more easily than classes do."""

    classes = [f"{texture} {outline}" for outline in OUTLINES for texture in TEXTURES]

    def __init__(self, split, size):
        self.size = size
        self.seed = int(split == "val")
        self.length = 2_000 if split == "val" else 10_000

    def __len__(self):
        return self.length

    def name(self, index):
        return f"shapes scene {index}"

    def digest(self):
        return f"gray {self.seed} {self.size}"

    def label(self, index):
        return int(np.random.default_rng((self.seed, index)).integers(12))

    def load(self, index):
        return Image.fromarray(self.scene(index)[0])

    def scene(self, index):
        """Image (size, size, 3) and mask (size, size), uint8: 0 is the ground, else 1 + class."""
        rng = np.random.default_rng((self.seed, index))
        label = rng.integers(12)  # the first draw, as in label()
        ground = Image.fromarray(rng.integers(110, 140, (12, 12), np.uint8))
        image = np.array(ground.resize((self.size, self.size)))  # bicubic
        mask = np.zeros_like(image)
        for _ in range(rng.integers(2, 4)):
            self.draw(image, mask, label, rng)
        return np.stack(3 * [image], 2), mask

    def draw(self, image, mask, kind, rng):
        """Draws an object of this class: at a random place, of random size, rotation and shades."""
        radius = rng.uniform(0.3, 0.4) * self.size  # in pixels
        y, x = rng.uniform(radius, self.size - radius, 2).tolist()
        rows = slice(int(y - radius), int(y + radius) + 2)
        columns = slice(int(x - radius), int(x + radius) + 2)
        pixels = np.arange(self.size, dtype=np.float32)
        dy = (pixels[rows, None] - y) / radius
        dx = (pixels[None, columns] - x) / radius
        turn = rng.uniform(0, 2 * math.pi)
        u = math.cos(turn) * dx - math.sin(turn) * dy
        v = math.sin(turn) * dx + math.cos(turn) * dy
        frequency = rng.uniform(8, 12)
        phase = rng.uniform(0, 2 * math.pi)
        share = (0.5 + wave(TEXTURES[kind % 3], u, v, frequency, phase)).clip(0, 1)
        dark = rng.uniform(20, 60)
        light = rng.uniform(190, 235)
        inside = np.hypot(u, v) < edge(OUTLINES[kind // 3], np.arctan2(v, u))
        image[rows, columns][inside] = (dark + (light - dark) * share)[inside]
        mask[rows, columns][inside] = kind + 1
