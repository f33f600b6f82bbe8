"""Head for decoder outputs of several modalities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from perceiver_core import modalities
from perceiver_core.registry import register


@partial(register, name="heads.Multimodal")
class Multimodal(nn.Module):
    """Head that applies one head per modality to a dictionary of decoder outputs.

    Args:
        heads: Mapping from modality names to heads, with a head for each modality of the queries. All heads that have
            the attribute `dim` (input width) must have the same `dim`.

    Example:
        >>> label = pc.heads.SingleQuery(pc.heads.Linear(32, 10))
        >>> head = pc.heads.Multimodal({"audio": pc.heads.Waveform(32, patch_size=16), "label": label})
        >>> outputs = {"audio": torch.randn(2, 60, 32), "label": torch.randn(2, 1, 32)}
        >>> {name: tuple(x.shape) for name, x in head(outputs).items()}
        {'audio': (2, 960), 'label': (2, 10)}

    Reference: deepmind-research/perceiver/io_processors.py, `MultimodalPostprocessor`.
    """

    needs_query_layout = True

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        modalities.check("heads", heads, "a head")
        self.heads = nn.ModuleDict(heads)
        widths = {name: head.dim for name, head in heads.items() if isinstance(getattr(head, "dim", None), int)}
        if len(set(widths.values())) > 1:
            raise ValueError(f"heads must take outputs of one width, as a decoder gives them; they take {widths}")
        self.dim = next(iter(widths.values()), None)

    def forward(
        self,
        outputs: Mapping[str, Tensor],
        *,
        query_inputs: Mapping[str, object] | None = None,
        grid: Mapping[str, Sequence[int] | None] | None = None,
    ) -> dict[str, Tensor]:
        """Apply the head of each modality. Return a dictionary from modality names to results.

        Args:
            outputs: Mapping from modality names to decoder outputs.
            query_inputs: Mapping from modality names to selected queries, for heads such as `Grid`.
            grid: Mapping from modality names to the grid sizes of the queries, for heads such as `Grid`.

        Raises:
            ValueError: If a modality in `outputs` has no head.
            TypeError, ValueError: If a head raises this error. The modality is added to the message.
        """
        modalities.check_names("outputs", outputs, self.heads.keys())
        query_inputs, grid = query_inputs or {}, grid or {}
        results = {}
        for name, x in outputs.items():
            head, options = self.heads[name], {}
            if getattr(head, "needs_query_layout", False):
                options = {"query_inputs": query_inputs.get(name), "grid": grid.get(name)}
            results[name] = modalities.call("outputs", name, head, x, **options)
        return results
