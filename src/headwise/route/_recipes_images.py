"""Pictures for the recipes: drawn shapes, scikit-learn's digits, and Fashion-MNIST or any folder of its file format.

Letters: B pictures, S pixels a side.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from headwise.errors import TaskError
from headwise.route._recipes import Data
from headwise.route._train import Recipe
from headwise.tasks.shapes import make_shapes

Pictures = Literal["shapes", "digits", "fashion-mnist"]
FASHION = "/usr/share/datasets/fashion-mnist"
MAGIC = {"images": (2051, 16), "labels": (2049, 8)}  # of the idx format, and the bytes before the data


@dataclass(frozen=True, kw_only=True)
class ImageSize:
    """Sizes of a ViT and of its training."""

    width: int = 64
    layers: int = 4
    heads: int = 8
    steps: int = 400
    batch: int = 64
    rate: float = 2e-3
    pictures: int = 20_000  # drawn to train on
    held_out: int = 1000

    def recipe(self, seed: int) -> Recipe:
        """The training of this size."""
        return Recipe(steps=self.steps, batch_size=self.batch, learning_rate=self.rate, weight_decay=0.05, seed=seed)


SIZES = {
    "cpu": ImageSize(),
    "gpu": ImageSize(
        width=384, layers=12, heads=12, steps=4000, batch=512, rate=1e-3, pictures=60_000, held_out=10_000
    ),
}


@dataclass(frozen=True)
class Drawn:
    """Rows of pixels (1, S, S) in [-1, 1] with a label, and what a ViT must know of them."""

    rows: Data
    side: int
    patch: int
    classes: int


def image_data(data: Pictures, images: str | None, size: ImageSize, *, seed: int) -> Drawn:
    """Pictures to train and measure on; TaskError where a package or folder is missing or of another format.

    `images`: folder of the four idx files, read for data="fashion-mnist".
    """
    if images is not None and data != "fashion-mnist":
        raise TaskError(f"images names a folder, but data is {data!r}; it is read for data='fashion-mnist'")
    makers = {"shapes": _shapes, "digits": _digits}
    if data == "fashion-mnist":
        pixels, labels, held = _idx(Path(images or FASHION), size.held_out)
    elif data in makers:
        pixels, labels, held = makers[data](size, seed)
    else:
        raise TaskError(f"data is {data!r}; it must be 'shapes', 'digits' or 'fashion-mnist'")
    rows = [{"pixel_values": p, "labels": l} for p, l in zip(pixels, labels, strict=True)]
    side = pixels.shape[-1]
    patch = 2 if side < 16 else 4
    return Drawn(Data(rows[held:], rows[:held]), side, patch, int(labels.max()) + 1)


def _shapes(size: ImageSize, seed: int) -> tuple[Tensor, Tensor, int]:
    """Always there: drawn shapes with textures, 16 classes."""
    count = size.pictures + size.held_out
    made = make_shapes(count, size=24, noise=0.2, generator=torch.Generator().manual_seed(seed + 1))
    return made.pixels, made.labels, size.held_out


def _digits(size: ImageSize, seed: int) -> tuple[Tensor, Tensor, int]:
    """scikit-learn's 1797 scanned digits of 8 × 8 pixels; 360 held out, the same for every seed."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise TaskError("data='digits' needs scikit-learn: pip install scikit-learn") from error
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    return x[order], torch.as_tensor(labels, dtype=torch.long)[order], 360


def _idx(folder: Path, held_out: int) -> tuple[Tensor, Tensor, int]:
    """The first of the published test pictures, then those to train on."""
    pixels, labels = [], []
    for part, count in (("t10k", held_out), ("train", None)):
        images = _read(folder / f"{part}-images-idx3-ubyte.gz", "images")
        names = _read(folder / f"{part}-labels-idx1-ubyte.gz", "labels")
        if len(images) != len(names) * 28 * 28:
            raise TaskError(f"{str(folder)!r}: {len(names)} labels and {len(images)} pixels; pictures have 28 × 28")
        pixels.append(images.reshape(-1, 1, 28, 28)[:count])
        labels.append(names[:count])
    return torch.cat(pixels).float() / 127.5 - 1, torch.cat(labels).long(), len(labels[0])


MOST = 256 * 2**20  # bytes of one file, unpacked


def _read(path: Path, kind: str) -> Tensor:
    magic, skip = MAGIC[kind]
    try:
        if not path.is_file():
            raise FileNotFoundError("it is no regular file")
        with gzip.open(path) as file:
            raw = file.read(MOST)
    except (OSError, EOFError, zlib.error) as error:
        raise TaskError(
            f"{str(path)!r} cannot be read ({error}); install the Debian package dataset-fashion-mnist, or name the folder "
            "of its files with images="
        ) from error
    if len(raw) <= skip or int.from_bytes(raw[:4], "big") != magic:
        raise TaskError(f"{str(path)!r} is no idx file of {kind}: it must begin with the number {magic}")
    return torch.frombuffer(bytearray(raw[skip:]), dtype=torch.uint8)
