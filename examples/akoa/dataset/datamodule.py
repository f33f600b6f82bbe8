"""Batches of knee images, from a folder of PNG files and its labels.csv.

Images are decoded once, at reduced size, into one uint8 tensor (18,680 images of 64x64 are 77 MB). A batch is one
indexing of this tensor, so no worker processes are needed. Batches are transferred to the device as uint8; scaling and
augmentation happen there. The order of an epoch is a function of the seed and the epoch, an augmentation one of the
seed and the step, and neither uses the global random generators, so a resumed run gets the same batches as an
uninterrupted one.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from tqdm import tqdm

from examples.akoa.dataset.augmentation import augment, seeded_generator
from examples.akoa.dataset.images import UnreadableImageError, read_image
from examples.akoa.dataset.labels import SPLITS, Row, audit_split, read_labels
from examples.akoa.dataset.splits import as_fold

T = TypeVar("T")


@dataclass(frozen=True)
class Split:
    """Part of the data: labels of the images, and the images in the same order."""

    rows: list[Row]
    images: UInt8[Tensor, "n h w"]

    @property
    def labels(self) -> Float[Tensor, " n"]:
        """Labels of the images: 1 for right knees, 0 for left ones."""
        return torch.tensor([float(row.side == "right") for row in self.rows])


def to_model_input(images: UInt8[Tensor, "b h w"]) -> Float[Tensor, "b 1 h w"]:
    """Scale gray levels from 0 to 255 to [-1, 1], and add a channel axis.

    Example:
        >>> to_model_input(torch.tensor([[[0, 255]]], dtype=torch.uint8))
        tensor([[[[-1.,  1.]]]])
    """
    return images.unsqueeze(1).float() / 127.5 - 1


def read_images(
    folder: Path, rows: Sequence[Row], size: tuple[int, int], *, progress: bool = True
) -> UInt8[Tensor, "n h w"]:
    """Read the images of all rows, in order.

    Pillow releases the interpreter lock while it decodes and resizes, so threads use all cores.

    Raises:
        ValueError: An image cannot be read.
    """
    images = np.empty((len(rows), *size), np.uint8)
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            decoded = pool.map(lambda row: read_image(folder / row.image, size), rows)
            bar = tqdm(decoded, "decoding", len(rows), unit="image", disable=None if progress else True)
            for i, image in enumerate(bar):
                images[i] = image
    except UnreadableImageError as error:
        raise ValueError(
            f"{error}; or write labels.csv again with generate_labels --allow unreadable, which leaves such files out"
        ) from error
    return torch.from_numpy(images)


class ImageDataset(Dataset[tuple[Tensor, Tensor]]):
    """Split as a dataset that a DataLoader indexes by whole batches."""

    def __init__(self, split: Split) -> None:
        self.images, self.labels = split.images, split.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return a batch: images `b h w` in uint8, labels `b`."""
        index = torch.tensor(indices)
        return self.images[index], self.labels[index]


class ShardSampler(Sampler[int]):
    """Sampler of every `num_ranks`-th of n indices from `rank` on, in order and without repetition.

    Metrics are thus exact, while a DistributedSampler repeats indices until all ranks have the same number.
    """

    def __init__(self, n: int, rank: int, num_ranks: int) -> None:
        self.indices = range(rank, n, num_ranks)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class KneeDataModule(LightningDataModule):
    """Training, validation and test batches of knees.

    On the device, a batch is a tensor of images `b 1 h w` in [-1, 1] and labels `b`, 1 for right and 0 for left.

    Args:
        labels: Path of labels.csv, as generate_labels writes it.
        data: Folder that the paths in labels.csv are relative to.
        size: Size of the images in pixels: one number, or (height, width).
        batch: Number of images of a batch on each rank.
        fold: Run of a cross-validation, if the labels are split into folds; see `splits.as_fold`.
        augment: Augment training batches.
        seed: Seed of orders and augmentations.
        progress: Show a progress bar while images are decoded.

    Raises:
        ValueError: A size or a batch below 1, a split that leaks or lacks a part, folds without `fold`, or `fold`
            without folds.
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
        try:
            self.rows = _choose_fold(self.all_rows, fold)
        except ValueError as error:
            raise ValueError(f"{labels}: {error}") from error
        self.images: Tensor | None = None

    def prepare_data(self) -> None:
        """Do nothing, since there is nothing to download."""

    def setup(self, stage: str | None = None) -> None:
        """Decode the images, once."""
        if self.images is None:
            self.images = read_images(self.data, self.rows, self.size, progress=self.progress)

    def with_fold(self, fold: int) -> KneeDataModule:
        """Return another run of the cross-validation that shares the decoded images."""
        self.setup()
        other = copy.copy(self)
        other.trainer = None
        other.rows = _choose_fold(self.all_rows, fold)
        return other

    def split(self, name: str) -> Split:
        """Return rows and images of `train`, `val` or `test`.

        Raises:
            ValueError: `name` is none of these.
        """
        if name not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {name!r}")
        self.setup()
        assert self.images is not None
        index = [i for i, row in enumerate(self.rows) if row.split == name]
        return Split([self.rows[i] for i in index], self.images[index])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Shuffled training batches; each rank gets its share of one common order."""
        images = ImageDataset(self.split("train"))
        rank, num_ranks = self._rank_and_count()
        order: Sampler[int] = DistributedSampler(images, num_ranks, rank, shuffle=True, seed=self.seed)
        return self._loader(images, order)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Validation batches in order, without repetition."""
        images = ImageDataset(self.split("val"))
        return self._loader(images, ShardSampler(len(images), *self._rank_and_count()))

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Test batches in order, without repetition."""
        images = ImageDataset(self.split("test"))
        return self._loader(images, ShardSampler(len(images), *self._rank_and_count()))

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Scale images, and augment those of training."""
        trainer = self.trainer
        if trainer is None or not trainer.training or not self.augment:
            return to_model_input(batch[0]), batch[1]
        key = (self.seed, trainer.global_step, trainer.global_rank)
        return augment(to_model_input(batch[0]), batch[1], seeded_generator(batch[0].device, *key))

    def _loader(self, images: ImageDataset, order: Sampler[int]) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(images, self.batch, sampler=order, collate_fn=_identity)

    def _rank_and_count(self) -> tuple[int, int]:
        """Rank and number of ranks; the trainer must not replace the samplers by its own."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size


def _identity(batch: T) -> T:
    return batch


def _choose_fold(rows: list[Row], fold: int | None) -> list[Row]:
    """Rows whose split is train, val or test, after the audit."""
    audit_split(rows)
    if fold is not None:
        return as_fold(rows, fold)
    if any(row.split not in SPLITS for row in rows):
        raise ValueError("the labels are split into folds; choose one with fold=0, 1, ... (--fold or --folds)")
    return rows
