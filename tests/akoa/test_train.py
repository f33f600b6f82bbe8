"""Training runs: learning rates, losses, resuming, and the single evaluation on the test set."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image

import perceiver_core as pc
from examples.akoa import train
from examples.akoa.dataset.labels import Row, write_labels
from examples.akoa.training.laterality import (
    AtomicCheckpointIO,
    learning_rate_factor,
    smoothed_losses,
)

pytestmark = pytest.mark.no_shape_checks

ROOT = Path(__file__).parents[2]


def write_knees(root: Path, patients: int, parts: tuple[str, ...]) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for p in range(patients):
        for side in ("left", "right"):
            for k in range(3):
                gray = rng.integers(0, 60, (37, 31), np.uint8)
                gray[:, slice(0, 10) if side == "left" else slice(21, 31)] += 150
                name = f"OAI{9000000 + p}_BaseLine_3_de3d1_SAG_3D_DESS_WE_{side.upper()}.nii.gz_{k}.png"
                Image.fromarray(gray).save(root / name)
                rows.append(Row(name, str(9000000 + p), 3, side, k, parts[p % len(parts)]))
    write_labels(root / "labels.csv", rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("knees")
    write_knees(root, 7, ("train", "val", "test", "train"))
    return root


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the evaluation, which takes seconds; records the folders it is called with."""
    seen: list[Path] = []

    def evaluate_run(model, splits, out, *, history, **_):
        seen.append(out)
        assert set(splits) == {"train", "val", "test"}
        assert not model.training
        assert history.exists()
        (out / "report.json").write_text(json.dumps({"test_looked_at": 1}))
        return {"test_looked_at": 1}

    monkeypatch.setattr(train.evaluate, "evaluate_run", evaluate_run)
    monkeypatch.setattr(train.results, "is_complete", lambda out: (out / "report.json").exists())
    return seen


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    queried = f"--data {folder} --labels {folder / 'labels.csv'} --out {out} --size 16 12 --batch 7 --epochs 3"
    return [*queried.split(), "--accelerator", "cpu", *more]


def watch(monkeypatch: pytest.MonkeyPatch, callback: Callback) -> None:
    """Adds a callback to the next trainers."""
    make = train.make_trainer

    def watched(options, out):
        trainer = make(options, out)
        trainer.callbacks.insert(0, callback)
        return trainer

    monkeypatch.setattr(train, "make_trainer", watched)


def last(out: Path) -> dict:
    return AtomicCheckpointIO().load_checkpoint(out / "checkpoints" / "last.ckpt")


def same_training(one: dict, other: dict) -> None:
    for part in ("state_dict", "current_model_state"):
        assert one[part].keys() == other[part].keys()
        for name, tensor in one[part].items():
            assert torch.equal(tensor, other[part][name]), (part, name)
    assert one["global_step"] == other["global_step"]
    assert one["lr_schedulers"] == other["lr_schedulers"]
    for index, state in one["optimizer_states"][0]["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, other["optimizer_states"][0]["state"][index][name])


# Schedule and loss


def test_the_learning_rate_moves_every_step_and_knows_how_many_there_are(folder, tmp_path, looks, monkeypatch):
    rates = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    watch(monkeypatch, Watch())
    assert train.main(arguments(folder, tmp_path / "run", "--lr", "0.01")) == 0
    steps = 3 * 3  # 18 pictures in batches of 7
    assert rates == pytest.approx([0.01 * learning_rate_factor(step, steps) for step in range(steps)])


def test_a_ragged_last_batch_weighs_as_much_as_it_holds(folder, tmp_path, looks, monkeypatch):
    """Validation has 12 pictures in batches of 7 and 5, training 18 in 7, 7 and 4."""
    sums = {"train": [], "val": []}

    def keep(logits, labels, smoothing):
        losses = smoothed_losses(logits, labels, smoothing)
        sums["train" if torch.is_grad_enabled() else "val"].append(losses.detach().double())
        return losses

    monkeypatch.setattr("examples.akoa.training.laterality.smoothed_losses", keep)
    assert train.main(arguments(folder, tmp_path / "run", "--epochs", "1")) == 0
    assert [len(losses) for losses in sums["val"]] == [7, 5]
    assert [len(losses) for losses in sums["train"]] == [7, 7, 4]
    with (tmp_path / "run" / "history.csv").open() as file:
        logged = {name: float(value) for line in csv.DictReader(file) for name, value in line.items() if value}
    for part, losses in sums.items():
        assert logged[f"{part}_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_the_same_seed_gives_the_same_weights(folder, tmp_path, looks):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert train.main(arguments(folder, tmp_path / name, "--epochs", "2", "--seed", seed)) == 0
    same_training(last(tmp_path / "a"), last(tmp_path / "b"))
    head = "model.head.logits.weight"
    assert not torch.equal(last(tmp_path / "a")["state_dict"][head], last(tmp_path / "c")["state_dict"][head])


def test_an_interrupted_run_resumes_exactly(folder, tmp_path, looks, monkeypatch, capsys):
    assert train.main(arguments(folder, tmp_path / "whole")) == 0

    class Interrupt(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 8:  # in the third epoch
                raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        watch(patch, Interrupt())
        assert train.main(arguments(folder, tmp_path / "cut")) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert capsys.readouterr().err == "interrupted: the same command with --resume continues\n"
    assert last(tmp_path / "cut")["global_step"] == 6
    assert looks == [tmp_path / "whole"]
    assert train.main(arguments(folder, tmp_path / "cut", "--resume")) == 0
    same_training(last(tmp_path / "whole"), last(tmp_path / "cut"))
    with (tmp_path / "cut" / "history.csv").open() as file:
        epochs = {int(line["epoch"]) for line in csv.DictReader(file) if line["val_loss"]}
    assert epochs == {0, 1, 2}


def test_a_run_leaves_its_best_weights_as_a_model(folder, tmp_path, looks):
    out = tmp_path / "run"
    assert train.main(arguments(folder, out)) == 0
    best = AtomicCheckpointIO().load_checkpoint(out / "checkpoints" / "best.ckpt")["state_dict"]
    for name, tensor in pc.load(out / "weights").state_dict().items():
        assert torch.equal(tensor, best[f"model.{name}"])
    assert not list(out.rglob("*.partial"))


def test_the_test_set_is_evaluated_once(folder, tmp_path, looks, capsys):
    out = tmp_path / "run"
    assert train.main(arguments(folder, out, "--epochs", "1")) == 0
    assert train.main(arguments(folder, out, "--epochs", "1", "--resume")) == 0
    assert "not looked at again" in capsys.readouterr().out
    assert looks == [out]
    (out / "report.json").unlink()  # as after a crash between training and evaluation
    assert train.main(arguments(folder, out, "--epochs", "1", "--resume")) == 0
    assert looks == [out, out]


@pytest.mark.refusal
def test_a_folder_with_a_run_is_reported(folder, tmp_path, looks, capsys):
    out = tmp_path / "run"
    assert train.main(arguments(folder, out, "--epochs", "1")) == 0
    (out / "report.json").unlink()
    assert train.main(arguments(folder, out, "--epochs", "1")) == 2
    assert "contains a run already" in capsys.readouterr().err
    assert train.main(arguments(folder, out, "--epochs", "1", "--resume", "--lr", "0.5")) == 2
    assert "lr is 0.002 in its run.json but 0.5 here" in capsys.readouterr().err


@pytest.mark.refusal
def test_a_leaking_split_is_reported(folder, tmp_path, looks, capsys):
    lines = (folder / "labels.csv").read_text().splitlines()
    lines[1] = lines[1].replace("train", "test")
    (tmp_path / "leak.csv").write_text("\n".join(lines) + "\n")
    assert train.main(arguments(folder, tmp_path / "run", "--labels", str(tmp_path / "leak.csv"))) == 2
    assert "are in two parts" in capsys.readouterr().err
    assert not looks
    assert not (tmp_path / "run").exists()


@pytest.mark.refusal
@pytest.mark.parametrize(
    "wrong",
    ["--size 3 4 5", "--epochs 0", "--seed -1", "--fold 1 --folds 3", "--folds 3 --devices 2", "--precision"],
)
def test_command_line_errors(folder, tmp_path, wrong):
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(folder, tmp_path, *wrong.split()))
    assert stop.value.code == 2


# Whole commands


@pytest.mark.slow
def test_folds_are_trained_and_pooled(tmp_path, capsys):
    write_knees(tmp_path, 6, ("fold0", "fold1", "fold2"))
    out = tmp_path / "run"
    queried = ["--epochs", "1", "--folds"]
    assert train.main(arguments(tmp_path, out, *queried, "4")) == 2
    assert "contains 3 folds, not 4" in capsys.readouterr().err
    assert train.main(arguments(tmp_path, out, *queried, "3")) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["folds"] == 3
    assert summary["data"]["patients"] == 6
    assert "3 folds, pooled" in (out / "summary.md").read_text()


def start(folder: Path, out: Path, *more: str, torchrun: bool) -> "subprocess.Popen[str]":
    """A training with two ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if torchrun else []
    devices = [] if torchrun else ["--devices", "2"]
    command = [sys.executable, *launcher, "-m", "examples.akoa.train", *arguments(folder, out, *devices, *more)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=out.parent, env=environment, text=True, **pipes)


def finished(process: "subprocess.Popen[str]") -> str:
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    return output


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_two_ranks_train_on_shares_and_resume_after_a_signal_and_after_the_death_of_a_rank(folder, tmp_path):
    """As many steps as one rank with twice the batch takes, and one report, with Lightning's launcher and torchrun."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finished(start(folder, whole, "--epochs", "6", torchrun=False))
    assert last(whole)["global_step"] == 6 * 2  # 9 pictures a rank, in 7 and 2
    assert json.loads((whole / "report.json").read_text())["test_looked_at"] == 1
    assert pc.load(whole / "weights")(torch.zeros(1, 1, 16, 12)).shape == (1, 1)
    for epoch in ("epoch 1", "epoch 3"):
        process = start(folder, cut, "--epochs", "6", "--resume", torchrun=True)
        assert process.stdout is not None
        assert any(line.startswith(epoch) for line in process.stdout)
        if epoch == "epoch 1":
            process.terminate()
        else:
            os.kill(children(process.pid)[-1], signal.SIGKILL)
        process.communicate(timeout=120)
        assert process.returncode != 0
        assert not (cut / "report.json").exists()
    assert "epoch 1 of 6" not in finished(start(folder, cut, "--epochs", "6", "--resume", torchrun=True))
    same_training(last(whole), last(cut))
    for name in ("predictions.csv", "history.csv", "slices.png", "weights/model.safetensors"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
