"""Schedule, loss, moving average and checkpoints of the training module."""

from pathlib import Path

import pytest
import torch

from examples.akoa.training.laterality import (
    AtomicCheckpointIO,
    Laterality,
    learning_rate_factor,
    moving_average,
    smoothed_losses,
)

pytestmark = pytest.mark.no_shape_checks


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 1013])
def test_the_learning_rate_warms_up_and_ends_near_zero(steps):
    curve = [learning_rate_factor(step, steps) for step in range(steps)]
    top = curve.index(max(curve))
    assert max(curve) == 1
    assert curve[: top + 1] == sorted(curve[: top + 1])
    assert curve[top:] == sorted(curve[top:], reverse=True)
    assert top <= max(1, 0.11 * steps)
    if steps >= 100:
        assert curve[0] < 0.11
        assert curve[-1] < 1e-3


def test_label_smoothing_draws_targets_together():
    logits, labels = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 0.0, 1.0])
    p = logits.sigmoid()
    expected = -torch.tensor([0.9, 0.1, 0.9]) * p.log() - torch.tensor([0.1, 0.9, 0.1]) * (1 - p).log()
    torch.testing.assert_close(smoothed_losses(logits, labels, 0.2), expected)


def test_the_moving_average_forgets_its_start():
    average = torch.full((3,), 100.0)
    for update in range(1, 400):
        average = moving_average(average, torch.zeros(3), torch.tensor(update))
    assert 0 < average.max() < 0.1


@pytest.mark.refusal
def test_invalid_laterality_settings_raise():
    for wrong in ({"learning_rate": 0.0}, {"weight_decay": -1.0}, {"label_smoothing": 1.0}):
        with pytest.raises(ValueError, match="need learning_rate > 0"):
            Laterality(torch.nn.Identity(), **wrong)


def test_a_checkpoint_is_whole_or_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def torn(checkpoint, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert AtomicCheckpointIO().load_checkpoint(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.refusal
def test_checkpoints_with_more_than_tensors_raise(tmp_path):
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": Path("anything")}, path)
    with pytest.raises(ValueError, match="cannot be loaded as a checkpoint"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    path.write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot be loaded as a checkpoint"):
        AtomicCheckpointIO().load_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "none.ckpt")
