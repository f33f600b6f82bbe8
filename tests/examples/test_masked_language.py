"""Masks have the documented rate and cover their tokens, and the example runs."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

pytestmark = pytest.mark.no_shape_checks

pytest.importorskip("matplotlib")
language = pytest.importorskip("examples.masked_language")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return language.build().eval()


def test_a_toy_run_writes_its_result_and_image(tmp_path):
    result = language.main(["--toy", "--out", str(tmp_path / "new")])
    assert result == json.loads((tmp_path / "new" / "result.json").read_text())
    assert (tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")
    rows = {"most frequent byte", "counts, two neighbors", "counts, four neighbors", "Perceiver IO"}
    for table in result["tables"].values():
        assert set(table) >= rows
    assert set(result["correct_by_length"]) == {"16", "32", "64", "128", "256"}


@pytest.mark.parametrize("length", [1, 16, 100, 256])
def test_15_percent_are_masked_and_labeled(length):
    windows = torch.randint(256, (50, length), dtype=torch.uint8)
    ids, labels = language.mask_bytes(windows)
    hidden = ids == language.MASK
    assert (hidden.sum(1) == max(1, round(0.15 * length))).all()
    assert torch.equal(labels[hidden], windows[hidden].long())
    assert (labels[~hidden] == language.IGNORE_INDEX).all()
    assert torch.equal(ids[~hidden], windows[~hidden].long())
    assert torch.equal(language.masked_positions(labels), torch.stack([row.nonzero()[:, 0] for row in hidden]))
    if length == 100:
        assert (hidden.sum(0) > 0).all()  # any position may be


@pytest.mark.parametrize("length", [7, 100, 256])
def test_querying_masked_positions_equals_the_loss_on_labels(model, length):
    """Also for shorter sequences, where all outputs are queried."""
    ids, labels = language.mask_bytes(torch.randint(256, (3, length), dtype=torch.uint8))
    with torch.no_grad():
        logits = model(ids)
    assert logits.shape == (3, length, language.MASK + 1)
    whole = F.cross_entropy(logits.mT, labels, ignore_index=language.IGNORE_INDEX) / torch.log(torch.tensor(2.0))
    said, costs = language.predict(model, ids, labels)
    torch.testing.assert_close(costs.mean(), whole)
    assert torch.equal(
        said, logits.gather(1, language.masked_positions(labels)[..., None].expand(-1, -1, 257))[..., :256].argmax(-1)
    )


def test_a_short_sequence_may_be_padded(model):
    ids, mask = torch.randint(256, (1, 60)), torch.ones(1, 60, dtype=torch.bool)
    mask[0, 40:] = False
    with torch.no_grad():
        torch.testing.assert_close(model(ids, mask=mask)[:, :40], model(ids[:, :40]), rtol=1e-4, atol=1e-4)


def test_counts_use_the_surrounding_tokens():
    actual = language.neighbors(torch.tensor([list(b"abcde")]))
    assert bytes(actual[0, 2].tolist()) == b"bdae"
    assert actual[0, 0].tolist() == [language.MASK, ord("b"), language.MASK, ord("c")]


def test_counts_learn_from_unmasked_tokens():
    text = torch.tensor(list(b"abcabc" * 500), dtype=torch.uint8)
    counts = language.fit_counts(text, 4)
    mask, (a, b, c) = language.MASK, b"abc"
    contexts = torch.tensor([[a, c, c, a], [mask, c, c, mask], [mask, mask, c, a], [b, mask, a, b]]).numpy()
    assert bytes(counts.most_likely(contexts).tolist()) == b"bbbc"
