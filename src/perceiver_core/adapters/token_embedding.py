"""Adapters for token ids (such as text or musical notes) and for UTF-8 bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from perceiver_core import checks
from perceiver_core.adapters.lengths import Lengths, VariableSize
from perceiver_core.argument_errors import checked, explained
from perceiver_core.layers import init
from perceiver_core.positions.grid import is_called_with
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class TokenEmbedding(VariableSize, nn.Module):
    """Adapter for token ids: a learned embedding plus an optional position embedding.

    Args:
        vocab_size: Vocabulary size.
        dim: Embedding width.
        positions: Module that maps position indices, `n` or `b n`, to vectors of width `dim`, such as
            `positions.LearnedEmbedding`. Omit it for models with rotary embeddings (`positions.Rotary`).
        positions_include_padding: Whether masked tokens count toward positions. If True, the position of a token is its
            index in `ids` (as in DeepMind's Perceiver IO). If False, its position is the number of valid tokens before
            it (as in Perceiver AR).

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
        """Maximum sequence length; None for no limit."""
        return getattr(self.positions, "length", None)

    def forward(
        self,
        ids: Shaped[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        positions: Int[Tensor, "*#b n"] | None = None,
        lengths: Lengths | None = None,
    ) -> Tokens:
        """Convert token ids to tokens.

        Args:
            ids: Token ids of any integer dtype.
            mask: Mask of valid tokens, True = attend.
            positions: Position indices, `n` or `b n`; None to compute them (see `positions_include_padding`). Ignored
                if the adapter has no position embedding.
            lengths: Number of ids of each sequence before padding at the end, `b`.

        Raises:
            ValueError: If `positions` is None and a sequence is longer than the position embedding (`length`).
            ValueError: If an id is out of range or a sample has no valid token (checked on the CPU in eager mode only).
        """
        checks.ids("ids", ids, self.vocab_size)
        checks.same_device("ids", ids, self.vectors)
        ids, mask = self._with_lengths(ids, mask, lengths)
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
    """Adapter for UTF-8 text. The vocabulary consists of six special tokens and the 256 bytes.

    The special tokens `Bytes.PAD`, `BOS`, `EOS`, `MASK`, `CLS` and `SEP` have the ids 0 to 5. Byte k has the id 6 + k.
    There are no unknown tokens, and there is no tokenizer to save. See `TokenEmbedding` for the arguments.

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
    @checked
    def encode(
        cls,
        texts: str | Sequence[str],
        *,
        add_special_tokens: bool = False,
        padding_side: str = "right",
        max_length: int | None = None,
    ) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
        """Encode strings to ids, padded to the longest. Return the ids `b n` and the mask `b n` of valid ids.

        An empty text without special tokens is fully masked.

        Args:
            texts: A string or a sequence of strings.
            add_special_tokens: Whether to add CLS before and SEP after each text, as `PerceiverTokenizer` does.
            padding_side: Side of the padding: "right" or "left". For `generate`, use "left".
            max_length: Maximum number of ids per text, including special tokens; None for no limit. Longer texts are
                truncated, possibly within a multi-byte character. Special tokens are never truncated.

        Raises:
            TypeError: If a text is not a string.
            ValueError: If `texts` is an empty list, or all texts are empty and `add_special_tokens` is False.
            ValueError: If `padding_side` or `max_length` is invalid.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if wrong := [type(text).__name__ for text in texts if not isinstance(text, str)]:
            raise TypeError(f"texts must be strings; got {wrong[0]}")
        if max_length is not None:
            checks.positive(max_length=max_length)
        if padding_side not in ("left", "right"):
            raise ValueError(f'padding_side must be "left" or "right"; got {padding_side!r}')
        room = None if max_length is None else max(0, max_length - 2 * add_special_tokens)
        rows = [[cls.SPECIAL + byte for byte in _utf8(text, index)[:room]] for index, text in enumerate(texts)]
        rows = [[cls.CLS, *row, cls.SEP] if add_special_tokens else row for row in rows]
        if not any(rows):
            raise ValueError(f"texts must have a character at least, or add_special_tokens=True; got {texts!r:.80}")
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        ids = pad_sequence(tensors, batch_first=True, padding_value=cls.PAD, padding_side=padding_side)
        return ids, ids != cls.PAD

    @classmethod
    @explained
    def decode(cls, ids: Int[Tensor, "b n"] | Int[Tensor, " n"]) -> list[str]:
        """Decode ids to strings, one per row. Skip special tokens, and replace invalid UTF-8 with U+FFFD."""
        ids = ids[None] if isinstance(ids, Tensor) and ids.ndim == 1 else ids
        checks.ids("ids", ids, cls.SPECIAL + 256)
        rows = ([i - cls.SPECIAL for i in row if i >= cls.SPECIAL] for row in ids.tolist())
        return [bytes(row).decode(errors="replace") for row in rows]


def _utf8(text: str, index: int) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"texts[{index}] must be valid Unicode; got half of a surrogate pair at index {error.start}. Replace it: "
            'text.encode(errors="replace").decode()'
        ) from error
