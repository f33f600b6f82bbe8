"""Wrapper that makes any model of this library a `PreTrainedModel` of transformers, as docs/how-to/hugging-face.md."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

import perceiver_core as pc


class WrappedConfig(PretrainedConfig):
    """Holds the constructor calls of a model: what `pc.save` writes to config.json."""

    model_type = "perceiver-core"

    def __init__(self, model: Any = None, **options: Any) -> None:
        super().__init__(**options)
        self.model = model


class Wrapped(PreTrainedModel):
    config_class = WrappedConfig
    main_input_name = "inputs"
    supports_gradient_checkpointing = True

    def __init__(self, config: WrappedConfig) -> None:
        super().__init__(config)
        self.model = pc.registry.from_config(config.model)
        first: dict[nn.Parameter, str] = {}
        names = {name: first.setdefault(p, name) for name, p in self.named_parameters(remove_duplicate=False)}
        self._tied_weights_keys = {name: other for name, other in names.items() if name != other}
        # Without, transformers does not look for tied weights; with it, peft asks for the embedding.
        self.config.tie_word_embeddings = bool(self._tied_weights_keys)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding  # type: ignore[no-any-return]

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: parts initialize themselves."""

    def _set_gradient_checkpointing(self, enable: bool = True, **options: Any) -> None:
        for block in self.model.modules():
            vars(block).pop("forward", None)
        if enable:
            pc.checkpoint_activations(self.model)

    def forward(self, inputs: Any, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.model(inputs)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten()), "logits": logits}


def wrapped(model: nn.Module) -> Wrapped:
    """Returns the wrapper around a new model with the weights of `model`."""
    result = Wrapped(WrappedConfig(pc.registry.to_config(model)))
    result.model.load_state_dict(model.state_dict())
    return result.train(model.training)
