"""The Triton kernels of a structured read. `gpu` calls them; `op` says what is computed.

A block of queries stays on chip and walks down the rows of the grid, a stretch of columns wide. What it adds for each
column and what it sums up there stay in registers; of each row it writes one number a query. Softmax is online. No
score is ever written to memory.

Queries are the fastest axis of everything that belongs to queries, so that a thread has a few of them and sums over
columns by itself. Few channels are multiplied one by one, many by matrix units.

Names as in `op`: `a` content queries; `columns` and `rows` axis queries, of the last axis and of all others together;
`x` content, `r` scale. `shared` says that one batch of queries serves all samples, `one` counts samples and heads.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _place(blocks, splits, stretches, BLOCK: tl.constexpr, STRETCH: tl.constexpr):
    """Which queries, columns, part of the rows, and sample and head a program has."""
    number = tl.program_id(0)
    block, rest = number % blocks, number // blocks
    stretch, rest = rest % stretches, rest // stretches
    split, one = rest % splits, (rest // splits).to(tl.int64)
    return block * BLOCK + tl.arange(0, BLOCK), stretch * STRETCH + tl.arange(0, STRETCH), stretch, split, one


@triton.jit
def _present(keep, sample, at, n, column, width, MASKED: tl.constexpr):
    """Which tokens of a stretch are there."""
    there = column < width
    if MASKED:
        there &= tl.load(keep + sample * n + at, mask=there, other=0) != 0
    return there


@triton.jit
def _product(
    a, asked, queries, query, x, sample, n, at, there,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):
    """Sums over channels of content times what queries have for it: columns x queries."""
    is_query = query < queries
    if PADDED < 16:
        sums = tl.zeros([at.shape[0], query.shape[0]], a.dtype.element_ty)
        for k in tl.static_range(CHANNELS):
            asks = tl.load(a + (asked * CHANNELS + k) * queries + query, mask=is_query, other=0.0)
            token = tl.load(x + (sample * CHANNELS + k) * n + at, mask=there, other=0.0)
            sums += token[:, None] * asks[None, :]
    else:
        channel = tl.arange(0, PADDED)
        real = channel < CHANNELS
        asks = tl.load(
            a + (asked * CHANNELS + channel[:, None]) * queries + query[None, :],
            mask=real[:, None] & is_query[None, :], other=0.0,
        )
        token = tl.load(
            x + (sample * CHANNELS + channel[None, :]) * n + at[:, None],
            mask=real[None, :] & there[:, None], other=0.0,
        )
        sums = tl.dot(token, asks, input_precision=PRECISION, out_dtype=a.dtype.element_ty)
    return sums


@triton.jit
def _content_of(
    weights, x, sample, n, at, there, CHANNELS: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr
):
    """Sums over columns of content times weights: channels x queries."""
    channel = tl.arange(0, PADDED)
    if PADDED < 16:
        sums = tl.zeros([PADDED, weights.shape[1]], weights.dtype)
        for k in tl.static_range(CHANNELS):
            token = tl.load(x + (sample * CHANNELS + k) * n + at, mask=there, other=0.0)
            sums += tl.where(channel[:, None] == k, tl.sum(weights * token[:, None], 0)[None, :], 0.0)
    else:
        token = tl.load(
            x + (sample * CHANNELS + channel[:, None]) * n + at[None, :],
            mask=(channel < CHANNELS)[:, None] & there[None, :], other=0.0,
        )
        sums = tl.dot(token, weights, input_precision=PRECISION, out_dtype=weights.dtype)
    return sums


@triton.jit
def _queries_of(
    weights, a, asked, queries, query, CHANNELS: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr
):
    """Sums over queries of what they have for content times weights: channels x columns."""
    channel, is_query = tl.arange(0, PADDED), query < queries
    if PADDED < 16:
        sums = tl.zeros([PADDED, weights.shape[0]], weights.dtype)
        for k in tl.static_range(CHANNELS):
            asks = tl.load(a + (asked * CHANNELS + k) * queries + query, mask=is_query, other=0.0)
            sums += tl.where(channel[:, None] == k, tl.sum(weights * asks[None, :], 1)[None, :], 0.0)
    else:
        asks = tl.load(
            a + (asked * CHANNELS + channel[:, None]) * queries + query[None, :],
            mask=(channel < CHANNELS)[:, None] & is_query[None, :], other=0.0,
        )
        sums = tl.dot(asks, tl.trans(weights), input_precision=PRECISION, out_dtype=weights.dtype)
    return sums


@triton.jit
def forward(
    a, rows, columns, x, r, keep,
    read, row_sums, row_bases, column_sums, bases, totals,
    heads, queries, height, width, blocks, splits, stretches,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, SHARED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr, STRETCH: tl.constexpr, PRECISION: tl.constexpr,
):
    """Parts of the read, each relative to a base of its own."""
    query, column, stretch, split, one = _place(blocks, splits, stretches, BLOCK, STRETCH)
    sample, asked = one // heads, one % heads if SHARED else one
    n = (one * 0 + height) * width  # in 64 bits, as `one` is
    is_query = query < queries
    inside = (column < width)[:, None] & is_query[None, :]
    table = tl.load(columns + (asked * width + column[:, None]) * queries + query[None, :], mask=inside, other=0.0)
    base = tl.full([BLOCK], float("-inf"), table.dtype)
    total = tl.zeros([BLOCK], table.dtype)
    sums = tl.zeros([STRETCH, BLOCK], table.dtype)
    got = tl.zeros([PADDED, BLOCK], table.dtype)
    for row in range(height * split // splits, height * (split + 1) // splits):
        at = (sample * 0 + row) * width + column
        there = _present(keep, sample, at, n, column, width, MASKED)
        scale = tl.load(r + sample * n + at, mask=there, other=0.0)
        here = tl.load(rows + (asked * height + row) * queries + query, mask=is_query, other=0.0)
        score = _product(a, asked, queries, query, x, sample, n, at, there, CHANNELS, PADDED, PRECISION)
        score = (score + table + here[None, :]) * (scale * LOG2E)[:, None]
        score = tl.where(there[:, None], score, float("-inf"))
        top = tl.maximum(base, tl.max(score, 0))
        start = tl.where(top == float("-inf"), 0.0, top)
        shrink = tl.exp2(base - start)
        p = tl.exp2(score - start[None, :])
        total = total * shrink + tl.sum(p, 0)
        p *= scale[:, None]
        got = got * shrink[None, :] + _content_of(p, x, sample, n, at, there, CHANNELS, PADDED, PRECISION)
        sums = sums * shrink[None, :] + p
        base = top
        place = ((one * stretches + stretch) * height + row) * queries + query
        tl.store(row_sums + place, tl.sum(p, 0), mask=is_query)
        tl.store(row_bases + place, base, mask=is_query)
    part = (one * splits + split) * stretches + stretch
    tl.store(bases + part * queries + query, base, mask=is_query)
    tl.store(totals + part * queries + query, total, mask=is_query)
    channel = tl.arange(0, PADDED)
    tl.store(
        read + (part * CHANNELS + channel[:, None]) * queries + query[None, :], got,
        mask=(channel < CHANNELS)[:, None] & is_query[None, :],
    )
    place = (one * splits + split) * width + column
    tl.store(column_sums + place[:, None] * queries + query[None, :], sums, mask=inside)


@triton.jit
def _slopes(score, gift, scale, there, base, inverse, offset):
    """Weights and gradients of scores, from sums before scaling and the gradients of weights before scaling."""
    p = tl.exp2(score * (scale * LOG2E)[:, None] - base[None, :]) * inverse[None, :]
    p = tl.where(there[:, None], p, 0.0)
    return p, p * (gift * scale[:, None] + offset[None, :])


@triton.jit
def backward_queries(
    a, rows, columns, x, r, keep, bases, inverses, gifts, gift_rows, gift_columns, offsets,
    d_a, d_rows, d_columns,
    heads, queries, height, width, blocks, splits, stretches,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, SHARED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr, STRETCH: tl.constexpr, PRECISION: tl.constexpr,
):
    """Parts of the gradients of what queries have, walking as the forward pass does."""
    query, column, stretch, split, one = _place(blocks, splits, stretches, BLOCK, STRETCH)
    sample, asked = one // heads, one % heads if SHARED else one
    n = (one * 0 + height) * width
    is_query = query < queries
    inside = (column < width)[:, None] & is_query[None, :]
    table = tl.load(columns + (asked * width + column[:, None]) * queries + query[None, :], mask=inside, other=0.0)
    gift_table = tl.load(
        gift_columns + (one * width + column[:, None]) * queries + query[None, :], mask=inside, other=0.0
    )
    own = one * queries + query
    base = tl.load(bases + own, mask=is_query, other=0.0)
    inverse = tl.load(inverses + own, mask=is_query, other=0.0)
    offset = tl.load(offsets + own, mask=is_query, other=0.0)
    sums = tl.zeros([STRETCH, BLOCK], table.dtype)
    got = tl.zeros([PADDED, BLOCK], table.dtype)
    for row in range(height * split // splits, height * (split + 1) // splits):
        at = (sample * 0 + row) * width + column
        there = _present(keep, sample, at, n, column, width, MASKED)
        scale = tl.load(r + sample * n + at, mask=there, other=0.0)
        here = tl.load(rows + (asked * height + row) * queries + query, mask=is_query, other=0.0)
        gift_here = tl.load(gift_rows + (one * height + row) * queries + query, mask=is_query, other=0.0)
        score = _product(a, asked, queries, query, x, sample, n, at, there, CHANNELS, PADDED, PRECISION)
        gift = _product(gifts, one, queries, query, x, sample, n, at, there, CHANNELS, PADDED, PRECISION)
        score += table + here[None, :]
        gift += gift_table + gift_here[None, :]
        _, slope = _slopes(score, gift, scale, there, base, inverse, offset)
        slope *= scale[:, None]
        got += _content_of(slope, x, sample, n, at, there, CHANNELS, PADDED, PRECISION)
        sums += slope
        place = ((one * stretches + stretch) * height + row) * queries + query
        tl.store(d_rows + place, tl.sum(slope, 0), mask=is_query)
    channel = tl.arange(0, PADDED)
    place = ((one * splits + split) * stretches + stretch) * CHANNELS + channel
    tl.store(
        d_a + place[:, None] * queries + query[None, :], got,
        mask=(channel < CHANNELS)[:, None] & is_query[None, :],
    )
    place = (one * splits + split) * width + column
    tl.store(d_columns + place[:, None] * queries + query[None, :], sums, mask=inside)


@triton.jit
def backward_tokens(
    a, rows, columns, x, r, keep, bases, inverses, gifts, gift_rows, gift_columns, offsets,
    d_x, d_r,
    heads, queries, height, width, blocks, stretches,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, SHARED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr, STRETCH: tl.constexpr, PRECISION: tl.constexpr,
):
    """Gradients of content and scale: a stretch of a row stays on chip and meets all queries of all heads."""
    number = tl.program_id(0)
    stretch, rest = number % stretches, number // stretches
    row, sample = rest % height, (rest // height).to(tl.int64)
    column, channel = stretch * STRETCH + tl.arange(0, STRETCH), tl.arange(0, PADDED)
    n = (sample * 0 + height) * width
    at = (sample * 0 + row) * width + column
    is_column = column < width
    there = _present(keep, sample, at, n, column, width, MASKED)
    scale = tl.load(r + sample * n + at, mask=there, other=0.0)
    d_tokens = tl.zeros([PADDED, STRETCH], scale.dtype)
    d_scale = tl.zeros([STRETCH], scale.dtype)
    for step in range(heads * blocks):
        head, query = step // blocks, step % blocks * BLOCK + tl.arange(0, BLOCK)
        one = sample * heads + head
        asked = sample * 0 + head if SHARED else one
        is_query = query < queries
        inside, own = is_column[:, None] & is_query[None, :], one * queries + query
        table = tl.load(columns + (asked * width + column[:, None]) * queries + query[None, :], mask=inside, other=0.0)
        gift_table = tl.load(
            gift_columns + (one * width + column[:, None]) * queries + query[None, :], mask=inside, other=0.0
        )
        here = tl.load(rows + (asked * height + row) * queries + query, mask=is_query, other=0.0)
        gift_here = tl.load(gift_rows + (one * height + row) * queries + query, mask=is_query, other=0.0)
        base = tl.load(bases + own, mask=is_query, other=0.0)
        inverse = tl.load(inverses + own, mask=is_query, other=0.0)
        offset = tl.load(offsets + own, mask=is_query, other=0.0)
        score = _product(a, asked, queries, query, x, sample, n, at, there, CHANNELS, PADDED, PRECISION)
        gift = _product(gifts, one, queries, query, x, sample, n, at, there, CHANNELS, PADDED, PRECISION)
        score += table + here[None, :]
        gift += gift_table + gift_here[None, :]
        p, slope = _slopes(score, gift, scale, there, base, inverse, offset)
        d_scale += tl.sum(slope * score + p * gift, 1)
        d_tokens += _queries_of(slope * scale[:, None], a, asked, queries, query, CHANNELS, PADDED, PRECISION)
        d_tokens += _queries_of(p * scale[:, None], gifts, one, queries, query, CHANNELS, PADDED, PRECISION)
    place = (sample * CHANNELS + channel[:, None]) * n + at[None, :]
    tl.store(d_x + place, d_tokens, mask=(channel < CHANNELS)[:, None] & is_column[None, :])
    tl.store(d_r + sample * n + at, d_scale, mask=is_column)
