"""Knees as batches, from a folder of PNG files and its labels.csv.

Unusual here: the pictures are decoded once, shrunk, into one uint8 tensor (18,680 at 64x64 are 77 MB),
and a batch is one indexing of it, so there are no worker processes. They travel to the device as uint8;
scaling and augmentation happen there. The order of an epoch is a function of the seed and the epoch, an
augmentation one of the seed and the step, and neither touches the global generators: a run that is resumed
sees what it would have seen.

    python -m examples.akoa.data --data data/AKOA_Analysis --labels labels.csv

measures which share of a training step the input takes.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from tqdm import tqdm

from examples.akoa.augmentation import augment, generator_for, mirror
from examples.akoa.labels import SPLITS, Row, audit_split, read_labels
from examples.akoa.model import knee_model
from examples.akoa.splits import as_fold

__all__ = ["Knees", "Pictures", "Share", "Split", "as_input", "augment", "mirror", "read_picture", "read_pictures"]


@dataclass(frozen=True)
class Split:
    """One part of the data: what is known of each picture, and the pictures in that order."""

    rows: list[Row]
    pictures: UInt8[Tensor, "n h w"]

    @property
    def labels(self) -> Float[Tensor, " n"]:
        """1 for a right knee, 0 for a left one."""
        return torch.tensor([float(row.side == "right") for row in self.rows])


def as_input(pictures: UInt8[Tensor, "b h w"]) -> Float[Tensor, "b 1 h w"]:
    """Gray levels 0 to 255 as the model takes them: in [-1, 1], with a channel.

    Example:
        >>> as_input(torch.tensor([[[0, 255]]], dtype=torch.uint8))
        tensor([[[[-1.,  1.]]]])
    """
    return pictures.unsqueeze(1).float() / 127.5 - 1


def read_picture(path: Path, size: tuple[int, int]) -> UInt8[np.ndarray, "h w"]:
    """A PNG in gray levels, shrunk to `size` (height, width) without aliasing.

    Raises:
        ValueError: the file is not there, cut short, or no PNG.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            gray = image.convert("L").resize((size[1], size[0]), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"picture {str(path)!r} cannot be read: {error}; write labels.csv again with generate_labels, "
            "which leaves such files out"
        ) from error
    return np.asarray(gray)


def read_pictures(
    folder: Path, rows: Sequence[Row], size: tuple[int, int], *, progress: bool = True
) -> UInt8[Tensor, "n h w"]:
    """The pictures of all rows, in order.

    Pillow lets go of the interpreter while it decodes and shrinks, so threads use all cores.

    Raises:
        ValueError: a picture cannot be read.
    """
    pictures = np.empty((len(rows), *size), np.uint8)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda row: read_picture(folder / row.image, size), rows)
        bar = tqdm(found, "decoding", len(rows), unit="picture", disable=None if progress else True)
        for i, picture in enumerate(bar):
            pictures[i] = picture
    return torch.from_numpy(pictures)


class Pictures(Dataset[tuple[Tensor, Tensor]]):
    """A split for a DataLoader, which asks it for whole batches at once."""

    def __init__(self, split: Split) -> None:
        self.pictures, self.labels = split.pictures, split.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pictures[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A batch: pictures `b h w` in uint8, labels `b`."""
        chosen = torch.tensor(indices)
        return self.pictures[chosen], self.labels[chosen]


class Share(Sampler[int]):
    """Every `ranks`-th of n indices from `rank` on, in order: nothing twice, so that metrics are exact.

    (A DistributedSampler repeats indices until all ranks have as many.)
    """

    def __init__(self, n: int, rank: int, ranks: int) -> None:
        self.indices = range(rank, n, ranks)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class Knees(LightningDataModule):
    """Training, validation and test batches.

    A batch, on the device: pictures `b 1 h w` in [-1, 1] and labels `b`, 1 right and 0 left.

    Args:
        labels: labels.csv, as generate_labels writes it.
        data: the folder that its paths start from.
        size: of the pictures, in pixels: one number, or (height, width).
        batch: pictures a batch and rank.
        fold: which run, where the file holds folds; see `splits.as_fold`.
        augment: whether training batches are augmented.
        seed: of orders and augmentations.
        progress: whether a bar is shown while pictures are decoded.

    Raises:
        ValueError: a split that leaks or lacks a part, folds without `fold` or the other way round.
    """

    def __init__(
        self,
        *,
        labels: Path,
        data: Path,
        size: int | tuple[int, int] = 64,
        batch: int = 64,
        fold: int | None = None,
        augment: bool = True,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else size
        if min(self.size) < 1 or batch < 1:
            raise ValueError(f"size and batch must be 1 or more; got size={size}, batch={batch}")
        self.data, self.batch, self.augment, self.seed = data, batch, augment, seed
        self.progress = progress
        self.all_rows = read_labels(labels)
        self.rows = _choose_fold(self.all_rows, fold)
        self.pictures: Tensor | None = None

    def prepare_data(self) -> None:
        """Nothing to download."""

    def setup(self, stage: str | None = None) -> None:
        """Decodes the pictures, once."""
        if self.pictures is None:
            self.pictures = read_pictures(self.data, self.rows, self.size, progress=self.progress)

    def with_fold(self, fold: int) -> Knees:
        """The same pictures, decoded once for both, as another run of the cross-validation."""
        self.setup()
        other = copy.copy(self)
        other.trainer = None
        other.rows = _choose_fold(self.all_rows, fold)
        return other

    def split(self, name: str) -> Split:
        """Rows and pictures of `train`, `val` or `test`.

        Raises:
            ValueError: there is no such part.
        """
        if name not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {name!r}")
        self.setup()
        assert self.pictures is not None
        chosen = [i for i, row in enumerate(self.rows) if row.split == name]
        return Split([self.rows[i] for i in chosen], self.pictures[chosen])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Shuffled; under several ranks, each sees its share of one common order."""
        pictures = Pictures(self.split("train"))
        rank, ranks = self._place()
        order: Sampler[int] = DistributedSampler(pictures, ranks, rank, shuffle=True, seed=self.seed)
        return self._loader(pictures, order)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """In order, nothing twice."""
        pictures = Pictures(self.split("val"))
        return self._loader(pictures, Share(len(pictures), *self._place()))

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """In order, nothing twice."""
        pictures = Pictures(self.split("test"))
        return self._loader(pictures, Share(len(pictures), *self._place()))

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Scales pictures, and augments those that are trained on."""
        trainer = self.trainer
        if trainer is None or not trainer.training or not self.augment:
            return as_input(batch[0]), batch[1]
        key = (self.seed, trainer.global_step, trainer.global_rank)
        return augment(as_input(batch[0]), batch[1], generator_for(batch[0].device, *key))

    def _loader(self, pictures: Pictures, order: Sampler[int]) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(pictures, self.batch, sampler=order, collate_fn=_as_it_is)

    def _place(self) -> tuple[int, int]:
        """Rank and number of ranks. The trainer must be told not to put samplers of its own in."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size


def _as_it_is(batch: Any) -> Any:
    return batch


def _choose_fold(rows: list[Row], fold: int | None) -> list[Row]:
    """Rows whose split is train, val or test, after the audit."""
    audit_split(rows)
    if fold is not None:
        return as_fold(rows, fold)
    if any(row.split not in SPLITS for row in rows):
        raise ValueError("the labels hold folds; choose one with fold=0, 1, ... (--fold or --folds)")
    return rows


def measure(knees: Knees, batches: int) -> tuple[float, float]:
    """Seconds a batch takes to make (index, scale, augment), and to train on; medians."""
    model, loader = knee_model(knees.size), knees.train_dataloader()
    optimizer = torch.optim.AdamW(model.parameters())
    waits, works = [], []
    start = time.perf_counter()
    for step, (pictures, labels) in zip(range(batches), loader, strict=False):
        inputs, wanted = augment(as_input(pictures), labels, generator_for(pictures.device, step))
        ready = time.perf_counter()
        torch.autograd.backward(F.binary_cross_entropy_with_logits(model(inputs)[:, 0], wanted))
        optimizer.step()
        optimizer.zero_grad()
        done = time.perf_counter()
        waits.append(ready - start)
        works.append(done - ready)
        start = done
    return float(np.median(waits)), float(np.median(works))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m examples.akoa.data", description="Measure the input.")
    parser.add_argument("--data", type=Path, required=True, help="folder with the PNG files")
    parser.add_argument("--labels", type=Path, required=True, help="labels.csv of generate_labels")
    parser.add_argument("--size", type=int, nargs="+", default=[64], help="pixels: one number, or height width")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--fold", type=int, help="where the labels hold folds")
    parser.add_argument("--batches", type=int, default=40, help="how many to time (%(default)s)")
    args = parser.parse_args(argv)
    try:
        size = (args.size[0], args.size[-1])
        knees = Knees(labels=args.labels, data=args.data, size=size, batch=args.batch, fold=args.fold)
        start = time.perf_counter()
        knees.setup()
    except (ValueError, OSError) as error:
        parser.error(str(error))
    seconds = time.perf_counter() - start
    wait, work = measure(knees, args.batches)
    print(f"decoded {len(knees.rows):,} pictures in {seconds:.1f} s ({len(knees.rows) / seconds:,.0f} a second)")
    print(f"a batch of {args.batch}: {wait * 1e3:.1f} ms to make, {work * 1e3:.1f} ms to train on")
    print(f"the input takes {wait / (wait + work):.1%} of a step")


if __name__ == "__main__":
    main()
