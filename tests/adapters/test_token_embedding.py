"""Embedding of token ids: supported positions, the position of each token under a mask, and bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import perceiver_core as pc
from perceiver_core import positions
from perceiver_core.adapters import Bytes, TokenEmbedding

IDS = torch.tensor([[3, 1, 4, 1, 5]])
MASKS = {"left": [0, 0, 1, 1, 1], "right": [1, 1, 1, 0, 0], "gap": [1, 0, 1, 0, 1]}


@pytest.mark.refusal
@pytest.mark.parametrize(
    "where",
    [
        positions.LearnedGrid((7,), 6),
        positions.Projected(positions.LearnedEmbedding(7, 5), 6),
        positions.Fourier(num_axes=1, num_bands=2, max_resolution=7),
        positions.LearnedEmbedding,
        lambda indices: indices,
    ],
)
def test_positions_without_indices_raise(where):
    with pytest.raises(TypeError, match="positions must be a module"):
        TokenEmbedding(11, 6, positions=where)


@pytest.mark.parametrize("where", [positions.LearnedEmbedding(7, 6), nn.Embedding(7, 6)])
def test_positions_with_indices_are_accepted(where):
    assert TokenEmbedding(11, 6, positions=where).positions is where


def places(text, mask):
    """Returns the positions of the unmasked tokens."""
    mask = torch.tensor([mask], dtype=torch.bool)
    added = text(IDS, mask=mask).content - text.vectors[IDS]
    return torch.cdist(added, text.positions.vectors).argmin(-1)[mask].tolist()


@pytest.mark.parametrize("name", MASKS)
def test_masked_tokens_are_counted_on_request(name):
    where, all_places = positions.LearnedEmbedding(5, 6), [i for i, there in enumerate(MASKS[name]) if there]
    assert places(TokenEmbedding(7, 6, positions=where), MASKS[name]) == [0, 1, 2]
    assert places(TokenEmbedding(7, 6, positions=where, positions_include_padding=True), MASKS[name]) == all_places
    assert places(Bytes(6, positions=where, positions_include_padding=True), MASKS[name]) == all_places


TEXTS = ["A cat.", "Où est-ce ?", "\0\x7f\n", "東京 🐈", "x" * 40]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("length", [None, 9])
def test_ids_are_those_of_transformers(special, side, length):
    tokenizer = pytest.importorskip("transformers").PerceiverTokenizer(padding_side=side)
    options = {"add_special_tokens": special, "max_length": length}
    theirs = tokenizer(TEXTS, **options, padding=True, truncation=length is not None, return_tensors="pt")
    ids, mask = Bytes.encode(TEXTS, **options, padding_side=side)
    assert torch.equal(ids, theirs["input_ids"])
    assert torch.equal(mask, theirs["attention_mask"].bool())
    specials = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id)
    assert specials == (Bytes.PAD, Bytes.BOS, Bytes.EOS, Bytes.MASK)
    assert (tokenizer.cls_token_id, tokenizer.sep_token_id) == (Bytes.CLS, Bytes.SEP)
    assert tokenizer.vocab_size + 6 == len(tokenizer) == Bytes(8).vocab_size


@given(st.lists(st.text(), min_size=1, max_size=5), st.sampled_from(["left", "right"]))
def test_decoding_restores_texts(texts, side):
    ids, mask = Bytes.encode(texts, add_special_tokens=True, padding_side=side)
    assert Bytes.decode(ids) == texts
    assert mask.sum(1).tolist() == [2 + len(text.encode()) for text in texts]
    assert pc.checks.padded_on_the_left("mask", mask) is None if side == "left" else mask[:, 0].all()


def test_special_tokens_are_not_decoded():
    ids = torch.tensor([Bytes.BOS, 6 + ord("a"), Bytes.MASK, 6 + ord("b"), 6 + 0xFF, Bytes.EOS])
    assert Bytes.decode(ids) == ["ab\ufffd"]


@pytest.mark.parametrize(
    ("length", "special", "expected"), [(3, False, "abc"), (4, True, "ab"), (2, True, ""), (9, True, "abcde")]
)
def test_long_texts_are_truncated(length, special, expected):
    ids, mask = Bytes.encode("abcde", add_special_tokens=special, max_length=length)
    assert ids.shape == (1, min(length, 5 + 2 * special)) and mask.all()
    assert Bytes.decode(ids) == [expected]
    if special:
        assert (ids[0, 0], ids[0, -1]) == (Bytes.CLS, Bytes.SEP)


def test_padding_has_no_effect(tmp_path):
    torch.manual_seed(0)
    text = Bytes(dim=12, positions=pc.positions.LearnedEmbedding(50, 12))
    model = pc.Perceiver(
        text, pc.Encoder(12, num_latents=5, dim=14, depth=1, num_heads=2), pc.heads.Classification(14, 3)
    ).double()
    model.eval()
    ids, mask = text.encode(["short", "a longer one"])
    alone = model(text.encode("short")[0])
    torch.testing.assert_close(model(ids, mask=mask)[:1], alone, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(pc.load(pc.save(model, tmp_path))(ids, mask=mask), model(ids, mask=mask))


def test_a_missing_text_is_masked():
    ids, mask = Bytes.encode(["a cat", ""])
    assert mask.tolist() == [[True] * 5, [False] * 5]
    with pytest.raises(ValueError, match=r"mask leaves no token to attend to in samples \[1\]"):
        Bytes(8)(ids, mask=mask)
    both = pc.adapters.Multimodal({"text": Bytes(8), "label": pc.adapters.OneHotLabel(3)})
    assert both({"text": ids, "label": torch.tensor([0, 2])}, mask={"text": mask}).mask[1].tolist() == [False] * 5 + [
        True
    ]


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("texts", "options", "kind", "message"),
    [
        ([b"bytes"], {}, TypeError, r"texts\[0\] must be a string; got b'bytes'"),
        ([""], {}, ValueError, "texts must have a character at least, or add_special_tokens=True"),
        ([], {"add_special_tokens": True}, ValueError, "texts must have a character at least"),
        (["a"], {"max_length": 0}, ValueError, "max_length must be a whole number of at least 1"),
        (["a"], {"padding_side": "top"}, ValueError, 'padding_side must be "left" or "right"; got'),
    ],
)
def test_invalid_texts_raise(texts, options, kind, message):
    with pytest.raises(kind, match=message):
        Bytes.encode(texts, **options)


@pytest.mark.refusal
def test_invalid_ids_raise():
    with pytest.raises(ValueError, match="262"):
        Bytes.decode(torch.tensor([262]))
    with pytest.raises(TypeError, match="ids must be whole numbers"):
        Bytes.decode(torch.zeros(3))
