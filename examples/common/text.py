"""Data, token embedding and counting baseline of the examples on text.

The text is the source code of Python's standard library; whole packages are held out for the test.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import perceiver_core as pc

CHUNK_BYTES = 4096  # nearby bytes resemble each other, so the bootstrap draws chunks of text, not single bytes
EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


class Text(NamedTuple):
    """Bytes of the training and of the test text, and the names of the packages in each."""

    train: Tensor
    test: Tensor
    packages: dict[str, list[str]]

    def sizes(self) -> dict[str, dict[str, int]]:
        """Numbers of bytes and of packages, for the result file."""
        counts = {name: len(packages) for name, packages in self.packages.items()}
        return {"bytes": {"train": len(self.train), "test": len(self.test)}, "packages": counts}


def load(*, toy: bool) -> Text:
    """Load the standard library of the running Python, without its tests and tables.

    Args:
        toy: Truncate both texts, for quick checks.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, list[bytes]] = {"train": [], "test": []}
    packages: dict[str, set[str]] = {"train": set(), "test": set()}
    for path in source_files(root):
        name = package_name(path.relative_to(root))
        split = "test" if is_test_package(name) else "train"
        parts[split].append(path.read_bytes())
        packages[split].add(name)
    train, test = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts.values())
    sorted_names = {split: sorted(names) for split, names in packages.items()}
    return Text(train[: 100_000 if toy else None], test[: 3 * CHUNK_BYTES if toy else None], sorted_names)


def source_files(root: Path) -> list[Path]:
    """All Python files below a folder, sorted by path, without excluded folders."""
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name.isidentifier() and name not in EXCLUDED]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files)


def package_name(path: Path) -> str:
    """Name of the top-level package or module, without leading underscores.

    A private module thus belongs to the public one that it implements: `_pydecimal` to `pydecimal`.
    """
    return path.parts[0].removesuffix(".py").lstrip("_")


def is_test_package(name: str) -> bool:
    """True for one package in 16, chosen by a hash of its name alone."""
    return hashlib.sha256(name.encode()).digest()[0] < 16


def chunk_means(scores: Tensor, length: int) -> Tensor:
    """Mean score of each chunk of `CHUNK_BYTES` bytes.

    Args:
        scores: Scores `n q` of `q` bytes in each of `n` consecutive windows.
        length: Number of bytes between the starts of consecutive windows.

    Returns:
        Means, one for each chunk; windows at the end that do not fill a chunk are dropped.
    """
    windows = CHUNK_BYTES // length
    return scores[: len(scores) // windows * windows].reshape(-1, windows * scores.shape[1]).double().mean(1)


class ConvTokenEmbedding(pc.adapters.TokenEmbedding):
    """Token embedding followed by a residual convolution over neighboring tokens.

        x = embedding(ids) + positions;  x + gelu(convolution(norm(x)))

    Without the convolution a small model spends most of a short training on learning which tokens are neighbors.
    Since a token depends on more than its id, `pc.generate` needs `use_cache=False` with this adapter.

    Args:
        vocab_size: Number of ids.
        dim: Number of channels of a token.
        num_previous: Number of tokens before a token that the convolution covers.
        num_next: Number of tokens after it that the convolution covers.
        positions: Position features, as in the base class.
    """

    def __init__(
        self, vocab_size: int, dim: int, *, num_previous: int, num_next: int = 0, positions: nn.Module | None = None
    ) -> None:
        super().__init__(vocab_size, dim, positions=positions)
        self.padding = num_previous, num_next
        self.norm, self.conv = nn.LayerNorm(dim), nn.Conv1d(dim, dim, num_previous + 1 + num_next)

    def forward(self, ids: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None) -> pc.Tokens:
        """Embed ids; the convolution sees zeros at masked positions, as it does outside the sequence."""
        x = super().forward(ids, mask=mask, positions=positions).materialize()
        inputs = self.norm(x) if mask is None else self.norm(x) * mask[..., None]
        return pc.Tokens(x + F.gelu(self.conv(F.pad(inputs.mT, self.padding))).mT, mask=mask)


class WittenBellModel:
    """Probabilities of bytes in their contexts, by counts with Witten and Bell's interpolation.

        p(x | c) = (count(c, x) + distinct(c) p(x | shorter c)) / (count(c) + distinct(c))

    The shorter context is `c` without its last column, and distinct(c) is the number of different bytes that occur in
    context `c`. The weight of each context thus follows from the training text alone.

    Args:
        contexts: Context of each training byte, `n order`, nearest byte first, as numbers up to 256.
        targets: Training bytes, `n`.
    """

    def __init__(self, contexts: np.ndarray, targets: np.ndarray) -> None:
        self.order = contexts.shape[1]
        self.levels = []
        for order in range(self.order + 1):
            pairs, count = np.unique(_context_codes(contexts[:, :order]) * 257 + targets, return_counts=True)
            known, first, distinct = np.unique(pairs // 257, return_index=True, return_counts=True)
            self.levels.append((pairs, count, known, np.add.reduceat(count, first), distinct))

    def probability(self, contexts: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Probability of target bytes in their contexts.

        Args:
            contexts: Contexts `n order`.
            targets: One byte for each context, `n`, or several, `n m` or `1 m`.

        Returns:
            Probabilities `n` or `n m`.
        """
        p = np.array(1 / 256)
        for order, (pairs, count, known, total, distinct) in enumerate(self.levels):
            code = _context_codes(contexts[:, :order]).reshape(-1, *[1] * (targets.ndim - 1))
            n, k = _lookup(known, code, total), _lookup(known, code, distinct)
            m = _lookup(pairs, code * 257 + targets, count)
            p = np.where(n > 0, (m + k * p) / np.maximum(n + k, 1), p)
        return p

    def bits(self, contexts: np.ndarray, targets: np.ndarray) -> Tensor:
        """Negative log probability of each target byte, in bits."""
        return torch.tensor(-np.log2(self.probability(contexts, targets)))

    def most_likely(self, contexts: np.ndarray) -> Tensor:
        """Most likely byte in each context."""
        parts = np.array_split(contexts, len(contexts) // 4096 + 1)
        return torch.tensor(np.concatenate([self.probability(x, np.arange(256)[None]).argmax(1) for x in parts]))


def _context_codes(contexts: np.ndarray) -> np.ndarray:
    """Unique integer of each row of contexts."""
    codes = np.zeros(len(contexts), dtype=np.int64)
    for column in contexts.T:
        codes = codes * 257 + column
    return codes


def _lookup(sorted_keys: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values of keys in a sorted table, 0 for keys that are not in it."""
    index = np.searchsorted(sorted_keys, keys).clip(max=len(sorted_keys) - 1)
    return np.where(sorted_keys[index] == keys, values[index], 0)
