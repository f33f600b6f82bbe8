"""Sequences of token ids: text, musical notes, and bytes with the special tokens of the published language model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from perceiver_core import checks
from perceiver_core.layers import init
from perceiver_core.positions.grid import is_called_with
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class TokenEmbedding(nn.Module):
    """Adapter for token ids: a learned vector per id, plus the vector of its position, if there are positions.

    Args:
        vocab_size: Number of ids.
        dim: Width of a vector.
        positions: Module from indices `b n` to vectors of width `dim`, such as `positions.LearnedEmbedding`; none by
            default, for models with rotary positions (`positions.Rotary`).
        positions_include_padding: Whether positions count masked tokens too, so that a token's position is its index in
            the array (as in DeepMind's Perceiver IO). By default the first valid token has position 0, after any
            padding (as in Perceiver AR).

    Example:
        >>> positions = pc.positions.LearnedEmbedding(100, dim=32)
        >>> text = pc.adapters.TokenEmbedding(vocab_size=256, dim=32, positions=positions)
        >>> text(torch.tensor([list(b"a b c")])).content.shape
        torch.Size([1, 5, 32])
    """

    def __init__(
        self, vocab_size: int, dim: int, *, positions: nn.Module | None = None, positions_include_padding: bool = False
    ) -> None:
        super().__init__()
        checks.positive(vocab_size=vocab_size, dim=dim)
        if positions is not None and not (isinstance(positions, nn.Module) and is_called_with("indices", positions)):
            raise TypeError(
                f"positions must be a module from indices to vectors, as positions.LearnedEmbedding; got {positions!r}"
            )
        if positions is not None and getattr(positions, "dim", dim) != dim:
            raise ValueError(f"positions must be dim={dim} wide, they are added; got {positions.dim}")
        self.vocab_size, self.dim = vocab_size, dim
        self.vectors = init.embedding(vocab_size, dim)
        self.positions, self.positions_include_padding = positions, positions_include_padding

    @property
    def length(self) -> int | None:
        """Maximum length of a sequence; None for no limit."""
        return getattr(self.positions, "length", None)

    def forward(
        self,
        ids: Shaped[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        positions: Int[Tensor, "*#b n"] | None = None,
    ) -> Tokens:
        """Return the tokens.

        Args:
            ids: Ids of any integer dtype.
            mask: Valid tokens, True = attend. Positions count these, unless `positions_include_padding`.
            positions: Position of each token in its sequence, `n` or `b n`; counted from the first token by default.

        Raises:
            ValueError: Ids outside the vocabulary, a sequence longer than the positions, a sample without valid tokens.
        """
        checks.ids("ids", ids, self.vocab_size)
        if mask is not None:
            checks.is_mask("mask", mask, ids.shape)
            checks.leaves_a_token(mask)
        content = F.embedding(ids.long(), self.vectors)
        if self.positions is None:
            return Tokens(content, mask=mask)
        if positions is None:
            if self.length is not None and ids.shape[1] > self.length:
                raise ValueError(
                    f"ids must be at most {self.length} long, the number of positions; got {ids.shape[1]}. Pass the "
                    "last ones only, or build more positions"
                )
            if mask is None or self.positions_include_padding:
                positions = torch.arange(ids.shape[1], device=ids.device)
            else:
                positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        return Tokens(content + self.positions(positions), mask=mask)


@register
class Bytes(TokenEmbedding):
    """Adapter for ids of 256 bytes and six special tokens: no unknown tokens, and no tokenizer to save with a model.

    `Bytes.PAD`, `BOS`, `EOS`, `MASK`, `CLS` and `SEP` are 0 to 5; byte k is 6 + k. Arguments are those of
    `TokenEmbedding`.

    Example:
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
        cls,
        texts: str | Sequence[str],
        *,
        add_special_tokens: bool = False,
        padding_side: str = "right",
        max_length: int | None = None,
    ) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
        """Return the ids of texts, padded to the longest, and the mask of valid ids.

        Args:
            texts: One or several texts.
            add_special_tokens: Whether to put CLS before and SEP after each text, as the published model needs.
            padding_side: "right", or "left", as `generate` requires.
            max_length: Number of ids, special tokens included, to which longer texts are truncated; no limit by
                default.

        Raises:
            TypeError: Texts that are not strings.
            ValueError: No text that has a token (among others, an empty text is fully masked); or another side.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if wrong := [type(text).__name__ for text in texts if not isinstance(text, str)]:
            raise TypeError(f"texts must be strings; got {wrong[0]}")
        if max_length is not None:
            checks.positive(max_length=max_length)
        if padding_side not in ("left", "right"):
            raise ValueError(f'padding_side must be "left" or "right"; got {padding_side!r}')
        room = None if max_length is None else max(0, max_length - 2 * add_special_tokens)
        rows = [[cls.SPECIAL + byte for byte in text.encode()[:room]] for text in texts]
        rows = [[cls.CLS, *row, cls.SEP] if add_special_tokens else row for row in rows]
        if not any(rows):
            raise ValueError(f"texts must have a character at least, or add_special_tokens=True; got {texts!r:.80}")
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        ids = pad_sequence(tensors, batch_first=True, padding_value=cls.PAD, padding_side=padding_side)
        return ids, ids != cls.PAD

    @classmethod
    def decode(cls, ids: Int[Tensor, "b n"] | Int[Tensor, " n"]) -> list[str]:
        """Return the texts of ids, without special tokens; invalid UTF-8 becomes the replacement character."""
        ids = ids[None] if isinstance(ids, Tensor) and ids.ndim == 1 else ids
        checks.ids("ids", ids, cls.SPECIAL + 256)
        rows = ([i - cls.SPECIAL for i in row if i >= cls.SPECIAL] for row in ids.tolist())
        return [bytes(row).decode(errors="replace") for row in rows]
