"""Images and batches: decoding, order, and which batches are augmented."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from examples.akoa.dataset.datamodule import (
    ImageDataset,
    KneeDataModule,
    ShardSampler,
    Split,
    read_images,
    to_model_input,
)
from examples.akoa.dataset.images import read_image
from examples.akoa.dataset.labels import Row, write_labels
from examples.akoa.driver import Verdict, classify
from examples.akoa.generate_labels import read_thumbnail

pytestmark = pytest.mark.no_shape_checks


def write_knees(root: Path, patients: int = 7, slices: int = 3, folds: int = 0) -> Path:
    """PNG files whose bright half is on the left of left knees; labels.csv beside them. Returns that."""
    rng = np.random.default_rng(0)
    rows = []
    parts = [f"fold{i}" for i in range(folds)] or ["train", "val", "test", "train"]
    for p in range(patients):
        for side in ("left", "right"):
            for k in range(slices):
                gray = rng.integers(0, 60, (41, 43), np.uint8)
                gray[:, slice(0, 14) if side == "left" else slice(29, 43)] += 150
                name = f"OAI{9000000 + p}_BaseLine_3_de3d1_SAG_3D_DESS_WE_{side.upper()}.nii.gz_{k}.png"
                Image.fromarray(np.repeat(gray[:, :, None], 3, axis=2)).save(root / name)
                rows.append(Row(name, str(9000000 + p), 3, side, k, parts[p % len(parts)]))
    write_labels(root / "labels.csv", rows)
    return root / "labels.csv"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("knees")
    write_knees(root)
    return root


def make(folder: Path, **more) -> KneeDataModule:
    options = {"size": (13, 11), "batch": 5, "progress": False, **more}
    return KneeDataModule(labels=folder / "labels.csv", data=folder, **options)


def placed(
    knees: KneeDataModule, rank: int = 0, ranks: int = 1, step: int = 0, training: bool = True
) -> KneeDataModule:
    """Returns the batch as a trainer places it on the device."""
    knees.trainer = SimpleNamespace(global_rank=rank, world_size=ranks, global_step=step, training=training)
    return knees


# Pictures


def test_images_are_shrunk_without_aliasing(tmp_path):
    stripes = np.tile(np.array([0, 255], np.uint8), (40, 30))
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    small = read_image(tmp_path / "stripes.png", (8, 7))
    assert small.shape == (8, 7)
    assert small.dtype == np.uint8
    assert np.abs(small.astype(int) - 127).max() < 20


def test_images_come_in_the_order_of_the_rows(folder):
    knees = make(folder)
    rows = knees.rows[::-1]
    pictures = read_images(folder, rows, (13, 11), progress=False)
    assert pictures.shape == (len(rows), 13, 11)
    assert pictures.dtype == torch.uint8
    for row, picture in zip(rows, pictures, strict=True):
        assert torch.equal(picture, torch.from_numpy(read_image(folder / row.image, (13, 11)).copy()))


@pytest.mark.refusal
@pytest.mark.parametrize("content", [None, b"", b"no PNG", "half"])
def test_errors_name_an_unreadable_image(folder, tmp_path, content):
    labels = write_knees(tmp_path, patients=4, slices=1)
    path = next(tmp_path.glob("*.png"))
    whole = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    knees = KneeDataModule(labels=labels, data=tmp_path, size=7, progress=False)
    with pytest.raises(
        ValueError, match=rf"{path.name}' cannot be read: .*; or write labels.csv again with generate_labels"
    ):
        knees.setup()


def test_the_audit_training_and_the_driver_read_the_same_image(tmp_path):
    """16 bits were once clipped to two gray levels."""
    levels = np.random.default_rng(3).integers(0, 65_536, (41, 43)).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "16.png")
    Image.fromarray((levels >> 8).astype(np.uint8)).save(tmp_path / "8.png")
    for read in (lambda path: read_image(path, (13, 11)), lambda path: read_thumbnail(path)[0]):
        assert np.array_equal(read(tmp_path / "16.png"), read(tmp_path / "8.png"))
    row = Row("16.png", "9000001", 3, "left", 0, "train")
    image = read_images(tmp_path, [row], (13, 11), progress=False)[0]
    assert np.array_equal(image, read_image(tmp_path / "8.png", (13, 11)))
    (skipped_or_verdict,) = classify(nn.Flatten(), [tmp_path / "16.png"], (1, 1))
    assert isinstance(skipped_or_verdict, Verdict)


def test_inputs_lie_between_minus_one_and_one():
    shown = to_model_input(torch.tensor([[[0, 51, 255]]], dtype=torch.uint8))
    torch.testing.assert_close(shown, torch.tensor([[[[-1.0, -0.6, 1.0]]]]))


def test_a_right_knee_is_one():
    rows = [Row("a.png", "9000001", 3, side, 0, "train") for side in ("left", "right", "right")]
    assert Split(rows, torch.zeros(3, 2, 2, dtype=torch.uint8)).labels.tolist() == [0, 1, 1]


def test_every_split_holds_its_own_rows(folder):
    knees = make(folder)
    splits = {name: knees.split(name) for name in ("train", "val", "test")}
    assert {name: len(split.rows) for name, split in splits.items()} == {"train": 18, "val": 12, "test": 12}
    for name, split in splits.items():
        assert {row.split for row in split.rows} == {name}
        assert len(split.images) == len(split.rows)
        bright = split.images[..., -3:].float().mean((1, 2)) > split.images[..., :3].float().mean((1, 2))
        assert torch.equal(bright.float(), split.labels)


def test_batches_are_indexed_whole(folder):
    pictures = ImageDataset(make(folder).split("train"))
    images, labels = pictures.__getitems__([4, 0, 9])
    for place, index in enumerate([4, 0, 9]):
        assert torch.equal(images[place], pictures[index][0])
        assert labels[place] == pictures[index][1]


def test_an_epoch_shows_every_image_once_in_another_order(folder):
    loader = make(folder).train_dataloader()
    orders = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        sizes = [len(labels) for _, labels in loader]
        assert sizes == [5, 5, 5, 3]
        orders.append(list(loader.sampler))
        assert sorted(orders[-1]) == list(range(18))
    assert orders[0] == orders[2] != orders[1]


@pytest.mark.parametrize("ranks", [2, 5])
def test_ranks_share_an_epoch(folder, ranks):
    shares = [list(placed(make(folder), rank, ranks).train_dataloader().sampler) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert {i for share in shares for i in share} == set(range(18))
    shown = [list(placed(make(folder), rank, ranks).val_dataloader().sampler) for rank in range(ranks)]
    assert sorted(i for share in shown for i in share) == list(range(12))


def test_a_share_repeats_nothing():
    assert [list(ShardSampler(7, rank, 3)) for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [len(ShardSampler(7, rank, 3)) for rank in range(3)] == [3, 2, 2]


def test_only_training_batches_are_augmented(folder):
    knees = make(folder)
    batch = next(iter(knees.train_dataloader()))

    def seen(knees: KneeDataModule, **place):
        return placed(knees, **place).on_after_batch_transfer(batch, 0)[0]

    assert torch.equal(seen(knees, training=False), to_model_input(batch[0]))
    assert torch.equal(seen(make(folder, augment=False)), to_model_input(batch[0]))
    drawn = [seen(knees, step=4), seen(knees, step=5), seen(knees, rank=1, step=4), seen(make(folder, seed=1), step=4)]
    assert all(not torch.equal(one, other) for one, other in pairwise([to_model_input(batch[0]), *drawn]))
    assert torch.equal(drawn[0], seen(knees, step=4))


def test_folds_share_decoded_images(tmp_path):
    labels = write_knees(tmp_path, patients=4, slices=1, folds=4)
    knees = KneeDataModule(labels=labels, data=tmp_path, size=7, fold=0, progress=False)
    other = knees.with_fold(2)
    assert other.images is knees.images
    for run, fold in ((knees, 0), (other, 2)):
        tested = {row.patient for row in run.split("test").rows}
        checked = {row.patient for row in run.split("val").rows}
        trained = {row.patient for row in run.split("train").rows}
        assert tested == {str(9000000 + fold)}
        assert checked == {str(9000000 + (fold + 1) % 4)}
        assert len(trained) == 2
        assert not trained & (tested | checked)


@pytest.mark.refusal
def test_invalid_knees_raise(folder, tmp_path):
    labels = write_knees(tmp_path, patients=4, slices=1, folds=4)
    with pytest.raises(ValueError, match="choose one with fold"):
        KneeDataModule(labels=labels, data=tmp_path)
    with pytest.raises(ValueError, match="fold 4 is not among the 4"):
        KneeDataModule(labels=labels, data=tmp_path, fold=4)
    with pytest.raises(ValueError, match="size and batch must be 1 or more"):
        make(folder, batch=0)
    with pytest.raises(ValueError, match="split must be one of train, val, test; got 'all'"):
        make(folder).split("all")


@pytest.mark.refusal
def test_a_leaking_split_raises(tmp_path):
    labels = write_knees(tmp_path, patients=4, slices=2)
    lines = labels.read_text().splitlines()
    lines[1] = lines[1].replace("train", "test")
    labels.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="1 patients are in two parts"):
        KneeDataModule(labels=labels, data=tmp_path)
