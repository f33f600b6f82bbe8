"""One head for each modality of the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from perceiver_core import modalities
from perceiver_core.registry import register


@partial(register, name="heads.Multimodal")
class Multimodal(nn.Module):
    """A head for each kind of answer.

    Args:
        heads: by name, as the queries are named.

    Raises:
        TypeError: heads that are not modules.
        ValueError: no heads, a name that a module cannot have, or heads of different widths (`.dim`).

    Example:
        >>> import torch
        >>> from perceiver_core import heads
        >>> label = heads.SingleQuery(heads.Linear(32, 10))
        >>> head = heads.Multimodal({"sound": heads.Waveform(32, patch_size=16), "label": label})
        >>> answers = {"sound": torch.randn(2, 60, 32), "label": torch.randn(2, 1, 32)}
        >>> {name: tuple(output.shape) for name, output in head(answers).items()}
        {'sound': (2, 960), 'label': (2, 10)}

    Reference: deepmind-research/perceiver/io_processors.py, `MultimodalPostprocessor`.
    """

    needs_query_layout = True

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        modalities.check("heads", heads, "a head")
        self.heads = nn.ModuleDict(heads)
        widths = {name: head.dim for name, head in heads.items() if isinstance(getattr(head, "dim", None), int)}
        if len(set(widths.values())) > 1:
            raise ValueError(f"heads must take answers of one width, as a decoder gives them; they take {widths}")
        self.dim = next(iter(widths.values()), None)

    def forward(
        self,
        answers: Mapping[str, Tensor],
        *,
        query_inputs: Mapping[str, Any] | None = None,
        grid: Mapping[str, Sequence[int] | None] | None = None,
    ) -> dict[str, Tensor]:
        """An output for each kind that was asked for.

        Args:
            answers: by name.
            query_inputs: by name which queries were asked, as a head such as `Grid` wants to know.
            grid: by name the grid that was asked on, where that is known.

        Raises:
            ValueError: a kind that there is no head for.
        """
        if unknown := answers.keys() - self.heads.keys():
            raise ValueError(f"answers name {sorted(unknown)}; there are heads for {list(self.heads)}")
        outputs = {}
        for name, answer in answers.items():
            head = self.heads[name]
            sees = getattr(head, "needs_query_layout", False)
            more = {"query_inputs": (query_inputs or {}).get(name), "grid": (grid or {}).get(name)} if sees else {}
            outputs[name] = modalities.call("answers", name, head, answer, **more)
        return outputs
