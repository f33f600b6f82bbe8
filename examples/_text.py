"""What the examples on text share: programs of Python's standard library, bytes with their neighbors, and counts."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import perceiver_core as pc

PIECE = 4096  # bytes; neighbors resemble each other, so intervals draw pieces of text, not single bytes
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


class Text(NamedTuple):
    """Bytes to train and to test on, and the packages that either has."""

    seen: Tensor
    unseen: Tensor
    packages: dict[str, list[str]]

    def sizes(self) -> dict[str, Any]:
        """What a result says of it."""
        counts = {name: len(packages) for name, packages in self.packages.items()}
        return {"bytes": {"train": len(self.seen), "test": len(self.unseen)}, "packages": counts}


def load(*, toy: bool) -> Text:
    """The library of the Python that runs, without its tests and tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, list[bytes]] = {"train": [], "test": []}
    packages: dict[str, set[str]] = {"train": set(), "test": set()}
    for path in programs(root):
        name = package(path.relative_to(root))
        split = "test" if in_test(name) else "train"
        parts[split].append(path.read_bytes())
        packages[split].add(name)
    seen, unseen = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts.values())
    named = {split: sorted(names) for split, names in packages.items()}
    return Text(seen[: 100_000 if toy else None], unseen[: 3 * PIECE if toy else None], named)


def programs(root: Path) -> list[Path]:
    """All files of programs below a folder, in order of their names."""
    found = []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name.isidentifier() and name not in LEFT_OUT]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found)


def package(path: Path) -> str:
    """The package or module on top; `_pydecimal` belongs to `pydecimal`."""
    return path.parts[0].removesuffix(".py").lstrip("_")


def in_test(name: str) -> bool:
    """One package in 16, whatever else there is."""
    return hashlib.sha256(name.encode()).digest()[0] < 16


def pieces(scores: Tensor, length: int) -> Tensor:
    """The mean of each piece of text, from scores `n q` of windows so long; those at the end that fill none are out."""
    windows = PIECE // length
    return scores[: len(scores) // windows * windows].reshape(-1, windows * scores.shape[1]).double().mean(1)


class Near(pc.adapters.TokenEmbedding):
    """Ids whose tokens also tell of their neighbors, by one convolution.

        x = vectors of ids and positions;  x + gelu(convolution(norm(x)))

    Without it a small model spends most of a short training on finding out who stands beside whom. Generation has to
    embed the whole sequence again for every id (`cache=False`), since a token is more than its id.

    Args:
        vocabulary: how many ids.
        dim: the width.
        back: how many neighbors before a token are seen.
        ahead: how many after it.
        positions: as for `TokenEmbedding`.
    """

    def __init__(
        self, vocabulary: int, dim: int, *, back: int, ahead: int = 0, positions: nn.Module | None = None
    ) -> None:
        super().__init__(vocabulary, dim, positions=positions)
        self.reach = back, ahead
        self.norm, self.near = nn.LayerNorm(dim), nn.Conv1d(dim, dim, back + 1 + ahead)

    def forward(self, ids: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None) -> pc.Tokens:
        """The tokens; padding is as the outside is."""
        x = super().forward(ids, mask=mask, positions=positions).materialize()
        seen = self.norm(x) if mask is None else self.norm(x) * mask[..., None]
        return pc.Tokens(x + F.gelu(self.near(F.pad(seen.mT, self.reach))).mT, mask=mask)


class Counts:
    """How often each byte stood in each context: probabilities by Witten and Bell's interpolation.

        p(x | c) = (count(c, x) + kinds(c) p(x | c less its last column)) / (count(c) + kinds(c))

    Kinds are how many different bytes stood there. How much a context counts follows from the training text alone.

    Args:
        contexts: `n order`, what stood around each byte, nearest first, numbers up to 256.
        wanted: `n`, the bytes.
    """

    def __init__(self, contexts: np.ndarray, wanted: np.ndarray) -> None:
        self.order = contexts.shape[1]
        self.levels = []
        for order in range(self.order + 1):
            pairs, count = np.unique(_codes(contexts[:, :order]) * 257 + wanted, return_counts=True)
            there, first, kinds = np.unique(pairs // 257, return_index=True, return_counts=True)
            self.levels.append((pairs, count, there, np.add.reduceat(count, first), kinds))

    def probability(self, contexts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """That of each byte in its context, `n`; or of several, where `n m` or `1 m` are wanted."""
        p = np.array(1 / 256)
        for order, (pairs, count, there, total, kinds) in enumerate(self.levels):
            code = _codes(contexts[:, :order]).reshape(-1, *[1] * (wanted.ndim - 1))
            n, k, m = _found(there, code, total), _found(there, code, kinds), _found(pairs, code * 257 + wanted, count)
            p = np.where(n > 0, (m + k * p) / np.maximum(n + k, 1), p)
        return p

    def bits(self, contexts: np.ndarray, wanted: np.ndarray) -> Tensor:
        """What each byte costs."""
        return torch.tensor(-np.log2(self.probability(contexts, wanted)))

    def best(self, contexts: np.ndarray) -> Tensor:
        """The likeliest byte in each context."""
        parts = np.array_split(contexts, len(contexts) // 4096 + 1)
        return torch.tensor(np.concatenate([self.probability(x, np.arange(256)[None]).argmax(1) for x in parts]))


def _codes(contexts: np.ndarray) -> np.ndarray:
    """A number for each row."""
    codes = np.zeros(len(contexts), dtype=np.int64)
    for column in contexts.T:
        codes = codes * 257 + column
    return codes


def _found(among: np.ndarray, wanted: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The value of each wanted key among sorted keys, 0 where it is not."""
    at = np.searchsorted(among, wanted).clip(max=len(among) - 1)
    return np.where(among[at] == wanted, values[at], 0)
