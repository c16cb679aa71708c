"""Scenes made in memory, for demonstrations and tests: images with a label and a mask."""

import itertools
import math

import numpy as np
from PIL import Image


class Shapes:
    """Scenes made in memory: three to five textured objects on a grey textured ground; scene `index` is always the same.

    An object's class is its outline (4) and its texture (3) together, whatever its colours, size and rotation. All
    objects of a scene but one are of one class, which is the scene's label.
    """

    outlines, textures = ("triangle", "square", "star", "disc"), ("stripes", "checks", "rings")
    classes = [f"{texture} {outline}" for outline, texture in itertools.product(outlines, textures)]

    def __init__(self, split, size):
        self.size, self.seed = size, {"train": 0, "val": 1}[split]
        self.length = {"train": 10_000, "val": 2_000}[split]

    def __len__(self):
        return self.length

    def name(self, index):
        return f"shapes scene {index}"

    def label(self, index):
        return int(np.random.default_rng((self.seed, index)).integers(12))

    def load(self, index):
        return Image.fromarray(self.scene(index)[0])

    def scene(self, index):
        """Image (size, size, 3) and mask (size, size), uint8: 0 is the ground, 1 + class an object."""
        rng = np.random.default_rng((self.seed, index))
        label = rng.integers(12)  # first draw: see label()
        y, x = np.mgrid[0:self.size, 0:self.size].astype(np.float32) / self.size
        ground = Image.fromarray(rng.integers(50, 200, (12, 12), np.uint8)).resize((self.size, self.size), Image.BICUBIC)
        image = np.asarray(ground)[..., None].repeat(3, 2)
        mask = np.zeros((self.size, self.size), np.uint8)
        for kind in [rng.integers(12)] + [label] * rng.integers(4, 7):
            radius = rng.uniform(0.16, 0.26)
            center, turn = rng.uniform(radius, 1 - radius, 2).tolist(), rng.uniform(0, 2 * math.pi)
            window = tuple(slice(int((c - radius) * self.size), int((c + radius) * self.size) + 2) for c in center)
            dy, dx = ((coordinate[window] - c) / radius for coordinate, c in zip((y, x), center))
            u, v = math.cos(turn) * dx - math.sin(turn) * dy, math.sin(turn) * dx + math.cos(turn) * dy
            r, angle = np.hypot(u, v), np.arctan2(v, u)
            outline, texture = self.outlines[kind // 3], self.textures[kind % 3]
            f, phase = rng.uniform((13, 0), (18, 2 * math.pi)).tolist()
            if outline == "disc":  # all four outlines have the same area
                edge = 0.64
            elif outline == "star":
                edge = 0.62 + 0.26 * np.cos(5 * angle)
            else:  # a regular polygon in polar coordinates
                corner, reach = {"triangle": (math.pi / 3, 1.0), "square": (math.pi / 4, 0.8)}[outline]
                edge = reach * math.cos(corner) / np.cos(angle % (2 * corner) - corner)
            wave = np.sin(f * (r if texture == "rings" else u) + phase)
            wave = 2 * wave * np.sin(f * v) if texture == "checks" else wave
            inside = r < edge
            image[window][inside] = self.paint(wave, rng.uniform(0, 120, (1, 3)), rng.uniform(110, 255, (1, 3)))[inside]
            mask[window][inside] = 1 + kind
        return image, mask

    @staticmethod
    def paint(wave, dark, light):
        """Two colours (1, c) mixed by a wave (h, w) in [-1, 1] -> (h, w, c) uint8."""
        palette = (dark + (light - dark) * np.linspace(0, 1, 256)[:, None]).astype(np.uint8)  # (256, c)
        return palette[(127 + 255 * wave).clip(0, 255).astype(np.uint8)]
