"""Text as the bytes of its UTF-8, with the special tokens of the published language model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.adapters.token_embedding import TokenEmbedding
from perceiver_core.registry import register


@register
class Bytes(TokenEmbedding):
    """Ids of six special tokens and 256 bytes: nothing is unknown, and no tokenizer has to be kept with a model.

    `Bytes.PAD`, `BOS`, `EOS`, `MASK`, `CLS` and `SEP` are 0 to 5; byte k is 6 + k.

    Args:
        dim: the width of a token.
        positions: as those of `TokenEmbedding`.
        positions_include_padding: as that of `TokenEmbedding`.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> text = pc.adapters.Bytes(dim=32, positions=pc.positions.LearnedEmbedding(2048, dim=32))
        >>> ids, mask = text.encode(["A cat.", "Où ?"])
        >>> ids[0].tolist(), mask[1].tolist()
        ([71, 38, 105, 103, 122, 52], [True, True, True, True, True, False])
        >>> text.decode(ids), text(ids, mask=mask).dim
        (['A cat.', 'Où ?'], 32)

    Reference: Jaegle et al. 2022 (Perceiver IO), section 4.1 (bytes); transformers, `PerceiverTokenizer`.
    """

    PAD, BOS, EOS, MASK, CLS, SEP = range(6)
    SPECIAL = 6

    def __init__(self, dim: int, *, positions: nn.Module | None = None, positions_include_padding: bool = False) -> None:
        super().__init__(self.SPECIAL + 256, dim, positions=positions, positions_include_padding=positions_include_padding)

    @classmethod
    def encode(
        cls, texts: str | Sequence[str], *, ends: bool = False, left: bool = False, most: int | None = None
    ) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
        """Ids of texts, padded to the longest, and which of them are there.

        Args:
            texts: one or several.
            ends: whether CLS stands before each text and SEP after it, as the published language model wants.
            left: whether padding stands on the left, as `generate` wants, and not on the right.
            most: how many ids a text may have, ends included; what is more is cut off. No limit unless given.

        Raises:
            TypeError: texts that are not strings.
            ValueError: no text that has a token. One without, "" beside others, is masked: it is not there.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if wrong := [type(text).__name__ for text in texts if not isinstance(text, str)]:
            raise TypeError(f"texts must be strings; got {wrong[0]}")
        if most is not None:
            checks.positive(most=most)
        room = None if most is None else max(0, most - 2 * ends)
        rows = [[cls.SPECIAL + byte for byte in text.encode()[:room]] for text in texts]
        rows = [[cls.CLS, *row, cls.SEP] if ends else row for row in rows]
        if not any(rows):
            raise ValueError(f"texts must have a character at least, or ends=True; got {texts!r:.80}")
        width = max(map(len, rows))
        gaps = [[cls.PAD] * (width - len(row)) for row in rows]
        ids = torch.tensor([gap + row if left else row + gap for row, gap in zip(rows, gaps, strict=True)])
        return ids, ids != cls.PAD

    @classmethod
    def decode(cls, ids: Int[Tensor, "b n"] | Int[Tensor, " n"]) -> list[str]:
        """The texts of ids, special tokens left out; bytes that are no UTF-8 become the replacement character.

        Raises:
            ValueError: ids beyond those there are.
        """
        ids = ids[None] if isinstance(ids, Tensor) and ids.ndim == 1 else ids
        checks.ids("ids", ids, cls.SPECIAL + 256)
        rows = ([i - cls.SPECIAL for i in row if i >= cls.SPECIAL] for row in ids.tolist())
        return [bytes(row).decode(errors="replace") for row in rows]
