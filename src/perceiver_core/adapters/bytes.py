"""Text as UTF-8 bytes, with the special tokens of the published language model."""

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
    """Adapter for ids of 256 bytes and six special tokens: no unknown tokens, and no tokenizer to save with a model.

    `Bytes.PAD`, `BOS`, `EOS`, `MASK`, `CLS` and `SEP` are 0 to 5; byte k is 6 + k.

    Args:
        dim: Width of a token.
        positions: As in `TokenEmbedding`.
        positions_include_padding: As in `TokenEmbedding`.

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

    def __init__(
        self, dim: int, *, positions: nn.Module | None = None, positions_include_padding: bool = False
    ) -> None:
        super().__init__(
            self.SPECIAL + 256, dim, positions=positions, positions_include_padding=positions_include_padding
        )

    @classmethod
    def encode(
        cls, texts: str | Sequence[str], *, ends: bool = False, left: bool = False, most: int | None = None
    ) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
        """Return the ids of texts, padded to the longest, and the mask of valid ids.

        Args:
            texts: One or several texts.
            ends: Whether CLS precedes and SEP follows each text, as the published language model requires.
            left: Whether padding is on the left, as `generate` requires, instead of the right.
            most: Maximum number of ids of a text, ends included, to which longer texts are truncated; no limit by
                default.

        Raises:
            TypeError: Texts that are not strings.
            ValueError: No text that has a token. Among others, an empty text is fully masked.
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
        """Return the texts of ids, without special tokens; invalid UTF-8 becomes the replacement character."""
        ids = ids[None] if isinstance(ids, Tensor) and ids.ndim == 1 else ids
        checks.ids("ids", ids, cls.SPECIAL + 256)
        rows = ([i - cls.SPECIAL for i in row if i >= cls.SPECIAL] for row in ids.tolist())
        return [bytes(row).decode(errors="replace") for row in rows]
