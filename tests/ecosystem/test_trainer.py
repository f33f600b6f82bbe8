"""transformers' Trainer: training, evaluation, and going on after a break."""

from __future__ import annotations

import copy
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments

import perceiver_core as pc
from tests.ecosystem.pretrained import Wrapped, wrapped
from tests.integration.whole_models import make

pytestmark = [
    pytest.mark.no_shape_checks,
    # transformers', which says activation_checkpointing now; earlier versions, and peft, know only these names
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"),
]
EXACT = {"rtol": 0, "atol": 0}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Returns settings with which Trainer shuffles the data, and saves after 2, 4 and 6 steps."""
    return TrainingArguments(
        str(folder),
        **{
            "per_device_train_batch_size": 4,
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "save_steps": 2,
            "remove_unused_columns": False,  # or it drops what forward does not name, such as labels
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        },
    )


class WithLoss(nn.Module):
    """The smallest module that Trainer takes: inputs by the names of the data, a loss if there are labels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.model(inputs)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Classification(Trainer):
    """Trains a model as it is: the loss is the trainer's."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs["labels"]
        logits = model(inputs["inputs"])
        loss = F.cross_entropy(logits, labels)
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss


class NextToken(Trainer):
    """Trains a PerceiverAR by its own loss."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        return model.model.loss(inputs["inputs"])


class Modalities(Trainer):
    """Trains a model of several outputs by a loss of each."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(inputs["inputs"])
        return F.cross_entropy(outputs["label"], inputs["labels"]) + outputs["image"].square().mean()


def trainer(name: str, folder: Path, **options: Any) -> Trainer:
    model, inputs = make(name)
    if name == "gated":
        model.head = pc.heads.Classification(12, 3)
    model.train()
    kind, wrap = {
        "image": (Trainer, WithLoss),  # by a module that returns the loss
        "gated": (Classification, nn.Identity),  # as it is, with running statistics
        "multimodal": (Modalities, nn.Identity),  # with inputs in a dictionary
        "text": (NextToken, wrapped),  # with tied weights, which need a PreTrainedModel: see below
    }[name]
    generator = torch.Generator().manual_seed(1)

    def varied(x: Tensor, i: int) -> Tensor:
        return x[i % 2] + torch.rand(x[0].shape, generator=generator) if x.is_floating_point() else x[i % 2]

    data = [{"inputs": tree_map(partial(varied, i=i), inputs), "labels": i % 3} for i in range(12)]
    return kind(
        model if wrap is nn.Identity else wrap(model),
        arguments(folder, **options),
        train_dataset=data,
        eval_dataset=data,
        data_collator=default_collate,  # PyTorch's, which takes dictionaries in dictionaries too
    )


each_case = pytest.mark.parametrize("name", ["image", "gated", "multimodal", "text"])


@each_case
def test_a_resumed_run_ends_with_the_same_weights(name: str, tmp_path: Path) -> None:
    whole = trainer(name, tmp_path / "whole")
    start = copy.deepcopy(whole.model.state_dict())
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = trainer(name, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=True)
    assert whole.state.global_step == resumed.state.global_step == 6
    expected = whole.model.state_dict()
    assert not any(torch.equal(expected[key], start[key]) for key in start if key.endswith("attention.value.weight"))
    torch.testing.assert_close(resumed.model.state_dict(), expected, **EXACT)


def test_the_first_step_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    run = trainer("image", tmp_path, max_steps=1, lr_scheduler_type="constant", max_grad_norm=0.0)
    plain = copy.deepcopy(run.model)
    batch = next(iter(run.get_train_dataloader()))
    run.train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    plain(**batch)["loss"].backward()
    optimizer.step()
    torch.testing.assert_close(run.model.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["image", "gated"])
def test_evaluation_and_prediction(name: str, tmp_path: Path) -> None:
    run = trainer(name, tmp_path, label_names=["labels"])
    inputs = default_collate(run.eval_dataset)
    run.model.eval()
    with torch.no_grad():
        logits = run.model(inputs["inputs"])
    logits = logits["logits"] if isinstance(logits, dict) else logits
    expected = F.cross_entropy(logits, inputs["labels"])
    assert run.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    predicted = run.predict(run.eval_dataset).predictions
    torch.testing.assert_close(torch.as_tensor(predicted), logits, rtol=1e-4, atol=1e-5)


def test_bfloat16(tmp_path: Path) -> None:
    """With bf16=True, Trainer uses autocast; the weights stay float32."""
    run = trainer("image", tmp_path, bf16=True)
    assert math.isfinite(run.train().training_loss)
    assert {weight.dtype for weight in run.model.parameters()} == {torch.float32}


def test_gradient_checkpointing(tmp_path: Path) -> None:
    """A PreTrainedModel has the switch; for other models, `pc.checkpoint_activations` is the same."""
    states = []
    for folder, switch in (("plain", False), ("recomputed", True)):
        run = trainer("text", tmp_path / folder, gradient_checkpointing=switch, max_steps=2)
        run.train()
        block = run.model.model.latent_transformer.blocks[0]
        assert ("forward" in vars(block)) is switch
        states.append(run.model.state_dict())
    torch.testing.assert_close(states[1], states[0], **EXACT)


def test_checkpoints_of_tied_weights(tmp_path: Path) -> None:
    """Trainer writes the weights of other modules by safetensors' save_file, which refuses tied ones."""
    plain = trainer("text", tmp_path / "plain", max_steps=2)
    plain.model = plain.model_wrapped = AsIs(plain.model.model)
    with pytest.raises(RuntimeError, match="Some tensors share memory"):
        plain.save_model(str(tmp_path / "plain"))

    run = trainer("text", tmp_path / "wrapped", max_steps=2)
    run.train()
    names = set(load_file(tmp_path / "wrapped" / "checkpoint-2" / "model.safetensors"))
    assert "model.embedding.vectors" in names and "model.head.vectors" not in names
    again = Wrapped.from_pretrained(tmp_path / "wrapped" / "checkpoint-2")
    torch.testing.assert_close(again.state_dict(), run.model.state_dict(), **EXACT)


@pytest.mark.parametrize("name", ["image", "text"])
def test_adapters_of_peft(name: str, tmp_path: Path) -> None:
    """Trainer takes a model with adapters, and its checkpoints are those of peft."""
    model, inputs = make(name)
    base = wrapped(model)
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["attention.query", "attention.value"]))
    labels = [1] if name == "image" else [[3] * 5]
    data = [{"inputs": inputs[i % 2], "labels": torch.tensor(labels)[0]} for i in range(8)]
    options = {"max_steps": 2, "label_names": ["labels"]}
    run = Trainer(adapted, arguments(tmp_path, **options), train_dataset=data, data_collator=default_collate)
    run.train()
    again = PeftModel.from_pretrained(base, str(tmp_path / "checkpoint-2")).eval()
    expected = adapted.eval()(inputs)["logits"]
    torch.testing.assert_close(again(inputs)["logits"], expected, rtol=1e-4, atol=1e-5)
    assert (expected - model.eval()(inputs)).abs().max() > 1e-3


class AsIs(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def test_a_trained_model_is_saved_without_its_wrapper(tmp_path: Path) -> None:
    run = trainer("image", tmp_path / "run", max_steps=2)
    run.train()
    again = pc.load(pc.save(run.model.model, tmp_path / "model"))
    torch.testing.assert_close(again.state_dict(), run.model.model.state_dict(), **EXACT)
