"""Held-out packages are held out, tokens depend on their neighbors only, and counts equal the formula."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.common import text

pytestmark = pytest.mark.no_shape_checks


def test_no_package_is_in_training_and_in_the_test():
    actual = text.load(toy=True)
    train, test = (set(actual.packages[split]) for split in ("train", "test"))
    assert train
    assert test
    assert not train & test
    assert all(text.is_test_package(name) for name in test)
    assert {"json", "logging"} <= test
    assert {"argparse", "email", "pydecimal"} <= train
    assert actual.sizes()["bytes"] == {"train": 100_000, "test": 3 * text.CHUNK_BYTES}


def test_a_module_and_the_private_one_behind_it_are_one_package():
    assert text.package_name(Path("_pyio.py")) == text.package_name(Path("pyio.py")) == "pyio"
    assert text.package_name(Path("json/decoder.py")) == text.package_name(Path("json.py")) == "json"


def test_tests_and_tables_and_what_was_installed_are_left_out(tmp_path):
    for name in ("a.py", "b/c.py", "b/tests/d.py", "site-packages/e.py", "encodings/f.py", "config-3.11/g.py", "h.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in text.source_files(tmp_path)] == ["a.py", "b/c.py"]


def test_pieces_are_means_of_windows_side_by_side():
    scores = torch.arange(5 * 8.0).view(5, 8)  # of five windows of 2048 bytes, two a piece
    assert text.chunk_means(scores, 2048).tolist() == [7.5, 23.5]


def before(content, order):
    """The bytes before each byte, nearest first."""
    x = np.frombuffer(content, dtype=np.uint8)
    return np.stack([x[order - 1 - back : len(x) - 1 - back] for back in range(order)], axis=1), x[order:]


def test_probabilities_of_counts_sum_to_one():
    counts = text.WittenBellModel(*before(b"abracadabra, abracadabra", 3))
    contexts = np.array([[97, 114, 98], [98, 97, 32], [0, 0, 0], [256, 97, 98]])  # fully known, partly known, unknown
    p = counts.probability(contexts, np.arange(256)[None])
    assert p.shape == (4, 256)
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-12)
    assert (p > 0).all()


def test_counts_equal_the_formula():
    """Witten-Bell smoothing with dictionaries, directly from the formula."""
    content = b"to be or not to be, that is the question: to be"
    order = 3
    counts = text.WittenBellModel(*before(content, order))

    def by_hand(context, byte):  # the context in reading order
        p = 1 / 256
        for k in range(order + 1):
            end = context[len(context) - k :]
            after = Counter(content[i] for i in range(order, len(content)) if content[i - k : i] == end)
            if n := after.total():
                p = (after[byte] + len(after) * p) / (n + len(after))
        return p

    for context, byte in ((b"to ", ord("b")), (b" be", ord(" ")), (b"xbe", ord(",")), (b"xyz", ord("t"))):
        actual = counts.probability(np.array([list(context[::-1])]), np.array([byte]))
        assert actual[0] == pytest.approx(by_hand(context, byte), rel=1e-12)
        assert counts.bits(np.array([list(context[::-1])]), np.array([byte]))[0] == pytest.approx(-np.log2(actual[0]))
    assert chr(counts.most_likely(np.array([list(b"to "[::-1])]))[0]) == "b"


@pytest.mark.parametrize(("back", "ahead"), [(3, 0), (2, 1)])
def test_a_token_depends_only_on_its_neighbors(back, ahead):
    torch.manual_seed(0)
    embed = text.ConvTokenEmbedding(11, 8, num_previous=back, num_next=ahead)
    ids = torch.randint(10, (1, 12))
    other = ids.clone()
    other[0, 5] = 10
    changed = (embed(ids).content != embed(other).content).any(-1)[0].nonzero().flatten().tolist()
    assert changed == list(range(5 - ahead, 5 + back + 1))


def test_padding_equals_the_outside():
    torch.manual_seed(0)
    embed = text.ConvTokenEmbedding(11, 8, num_previous=2, num_next=2)
    torch.nn.init.normal_(embed.norm.bias)
    ids, mask = torch.randint(11, (1, 12)), torch.ones(1, 12, dtype=torch.bool)
    mask[0, 7:] = False
    torch.testing.assert_close(embed(ids, mask=mask).content[:, :7], embed(ids[:, :7]).content)
