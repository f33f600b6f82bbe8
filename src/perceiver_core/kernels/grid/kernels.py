"""The Triton kernels of a structured read. `gpu` calls them; `op` says what is computed.

A thread has a query, and walks with it down the rows of the grid, a stretch of columns wide: what the query adds for
each column and what is summed up there stay in its registers, so that nothing is exchanged between threads. Of each
row it writes one number. Softmax is online. No score is ever written to memory.

The gradients of tokens are the same the other way around: a thread has a token, and meets all queries.

Triton lays tensors out over threads along their last axis. Queries are the last axis of what belongs to queries, and
how many there are is not told when a kernel is compiled: a number that is known to be a multiple of 16 makes Triton
give each thread four neighbors and fewer columns, and then threads have to exchange sums. Few channels are multiplied
one by one, many by matrix units, for which Triton arranges threads as it must.

Names as in `op`: `a` content queries, in exponents of 2; `columns` and `rows` axis queries, of the last axis and of all
others together; `x` content, `r` scale, `hidden` what the mask adds. `one` counts samples and heads, and `SHARED` says
that the queries of one sample serve all. Queries and columns come in whole blocks and stretches: `gpu` fills them up.
`wide` is the width so filled; columns beyond `width` have scores of -inf.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _place(blocks, splits, groups, BLOCK: tl.constexpr):
    """Which queries, group of stretches, part of the rows, and sample and head a program has."""
    number = tl.program_id(0)
    block, rest = number % blocks, number // blocks
    group, rest = rest % groups, rest // groups
    split, one = rest % splits, (rest // splits).to(tl.int64)
    return block * BLOCK + tl.arange(0, BLOCK), group, split, one


@triton.jit
def _product(
    sums, a, queries, query, x, n, at, CHANNELS: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Plus the sums over channels of content times what queries have for it: columns x queries."""
    if PADDED < 16:
        for k in tl.static_range(CHANNELS):
            asks = tl.load(a + k * queries + query)
            token = tl.load(x + k * n + at)
            sums += token[:, None] * asks[None, :]
    else:
        channel = tl.arange(0, PADDED)
        real = channel < CHANNELS
        asks = tl.load(a + channel[:, None] * queries + query[None, :], mask=real[:, None], other=0.0)
        token = tl.load(x + channel[None, :] * n + at[:, None], mask=real[None, :], other=0.0)
        sums += tl.dot(token, asks, input_precision=PRECISION, out_dtype=sums.dtype)
    return sums


@triton.jit
def _collected(
    weights, vectors, stride, number, CHANNELS: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Sums of content of columns, or of what queries have, times weights: channels x the last axis of the weights."""
    channel = tl.arange(0, PADDED)
    if PADDED < 16:
        sums = tl.zeros([PADDED, weights.shape[1]], weights.dtype)
        for k in tl.static_range(CHANNELS):
            vector = tl.load(vectors + k * stride + number)
            sums += tl.where(channel[:, None] == k, tl.sum(weights * vector[:, None], 0)[None, :], 0.0)
    else:
        place = vectors + channel[:, None] * stride + number[None, :]
        vector = tl.load(place, mask=(channel < CHANNELS)[:, None], other=0.0)
        sums = tl.dot(vector, weights, input_precision=PRECISION, out_dtype=weights.dtype)
    return sums


@triton.jit(do_not_specialize=["queries"])
def forward(
    a, rows, columns, x, r, hidden,
    read, bases, totals, row_sums, row_bases, column_sums, column_bases,
    heads, queries, height, width, wide, stretches, blocks, splits, groups,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, SHARED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr, STRETCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Parts of the read, each relative to a base of its own."""
    query, group, split, one = _place(blocks, splits, groups, BLOCK)
    sample, asked = one // heads, one % heads if SHARED else one
    n = (one * 0 + height) * wide  # in 64 bits, as `one` is
    a, x, r, hidden = a + asked * CHANNELS * queries, x + sample * CHANNELS * n, r + sample * n, hidden + sample * n
    columns += asked * width * queries
    rows += asked * height * queries
    row_sums += (one * groups + group) * height * queries
    row_bases += (one * groups + group) * height * queries
    column_sums += (one * splits + split) * wide * queries
    column_bases += (one * splits + split) * stretches * queries
    first = stretches * group // groups
    step = tl.arange(0, STRETCH)
    cell = step[:, None] * queries + query[None, :]
    base = tl.full([BLOCK], float("-inf"), a.dtype.element_ty)
    total = tl.zeros([BLOCK], a.dtype.element_ty)
    got = tl.zeros([PADDED, BLOCK], a.dtype.element_ty)
    for stretch in range(first, stretches * (group + 1) // groups):
        there = (stretch * STRETCH + step < width)[:, None]
        corner = (n * 0 + stretch) * STRETCH * queries
        table = tl.load(columns + corner + cell, mask=there, other=float("-inf"))
        sums = tl.zeros([STRETCH, BLOCK], a.dtype.element_ty)
        for row in range(height * split // splits, height * (split + 1) // splits):
            at = (n * 0 + row) * wide + stretch * STRETCH
            line = (n * 0 + row) * queries
            scale = tl.load(r + at + step)
            here = tl.load(rows + line + query)
            score = _product(table + here[None, :], a, queries, query, x + at, n, step, CHANNELS, PADDED, PRECISION)
            score *= scale[:, None]
            if MASKED:
                score += tl.load(hidden + at + step)[:, None]
            top = tl.maximum(base, tl.max(score, 0))
            start = tl.where(top == float("-inf"), 0.0, top)
            shrink = tl.exp2(base - start)
            base = top
            p = tl.exp2(score - start[None, :])
            total = total * shrink + tl.sum(p, 0)
            p *= scale[:, None]
            got = got * shrink[None, :] + _collected(p, x + at, n, step, CHANNELS, PADDED, PRECISION)
            sums = sums * shrink[None, :] + p
            # What the stretches before this one found in the row; nothing before the first.
            again = query * 0 + stretch > first
            before = tl.load(row_sums + line + query, mask=again, other=0.0)
            before *= tl.exp2(tl.load(row_bases + line + query, mask=again, other=float("-inf")) - start)
            tl.store(row_sums + line + query, before + tl.sum(p, 0))
            tl.store(row_bases + line + query, base)
        tl.store(column_sums + corner + cell, sums)
        tl.store(column_bases + (n * 0 + stretch) * queries + query, base)
        tl.debug_barrier()  # the next stretch reads what this one wrote of each row
    part = (one * splits + split) * groups + group
    tl.store(bases + part * queries + query, base)
    tl.store(totals + part * queries + query, total)
    channel = tl.arange(0, PADDED)[:, None]
    tl.store(read + (part * CHANNELS + channel) * queries + query[None, :], got, mask=channel < CHANNELS)


@triton.jit(do_not_specialize=["queries"])
def backward_queries(
    a, rows, columns, x, r, hidden, bases, gifts, gift_rows, gift_columns, offsets,
    d_a, d_rows, d_columns,
    heads, queries, height, width, wide, stretches, blocks, splits, groups,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, SHARED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr, STRETCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Parts of the gradients of what queries have, walking as the forward pass does."""
    query, group, split, one = _place(blocks, splits, groups, BLOCK)
    sample, asked = one // heads, one % heads if SHARED else one
    n = (one * 0 + height) * wide
    a, x, r, hidden = a + asked * CHANNELS * queries, x + sample * CHANNELS * n, r + sample * n, hidden + sample * n
    columns += asked * width * queries
    rows += asked * height * queries
    gifts += one * CHANNELS * queries
    gift_columns += one * width * queries
    gift_rows += one * height * queries
    d_rows += (one * groups + group) * height * queries
    d_columns += (one * splits + split) * wide * queries
    base = tl.load(bases + one * queries + query)
    offset = tl.load(offsets + one * queries + query)
    first = stretches * group // groups
    step = tl.arange(0, STRETCH)
    cell = step[:, None] * queries + query[None, :]
    got = tl.zeros([PADDED, BLOCK], a.dtype.element_ty)
    for stretch in range(first, stretches * (group + 1) // groups):
        there = (stretch * STRETCH + step < width)[:, None]
        corner = (n * 0 + stretch) * STRETCH * queries
        table = tl.load(columns + corner + cell, mask=there, other=float("-inf"))
        gift_table = tl.load(gift_columns + corner + cell, mask=there, other=0.0)
        sums = tl.zeros([STRETCH, BLOCK], a.dtype.element_ty)
        for row in range(height * split // splits, height * (split + 1) // splits):
            at = (n * 0 + row) * wide + stretch * STRETCH
            line = (n * 0 + row) * queries
            scale = tl.load(r + at + step)[:, None]
            here, gift_here = tl.load(rows + line + query), tl.load(gift_rows + line + query)
            score = _product(table + here[None, :], a, queries, query, x + at, n, step, CHANNELS, PADDED, PRECISION)
            gift = _product(
                gift_table + gift_here[None, :], gifts, queries, query, x + at, n, step, CHANNELS, PADDED, PRECISION
            )
            score *= scale
            if MASKED:
                score += tl.load(hidden + at + step)[:, None]
            slope = tl.exp2(score - base[None, :]) * (gift * scale + offset[None, :]) * scale
            got += _collected(slope, x + at, n, step, CHANNELS, PADDED, PRECISION)
            sums += slope
            before = tl.load(d_rows + line + query, mask=query * 0 + stretch > first, other=0.0)
            tl.store(d_rows + line + query, before + tl.sum(slope, 0))
        tl.store(d_columns + corner + cell, sums)
        tl.debug_barrier()
    channel = tl.arange(0, PADDED)[:, None]
    place = ((one * splits + split) * groups + group) * CHANNELS + channel
    tl.store(d_a + place * queries + query[None, :], got, mask=channel < CHANNELS)


@triton.jit
def _turned_product(
    sums, a, queries, query, x, n, at, there, CHANNELS: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """As `_product`, queries x columns."""
    if PADDED < 16:
        for k in tl.static_range(CHANNELS):
            asks = tl.load(a + k * queries + query)
            token = tl.load(x + k * n + at, mask=there, other=0.0)
            sums += asks[:, None] * token[None, :]
    else:
        channel = tl.arange(0, PADDED)
        real = channel < CHANNELS
        asks = tl.load(a + channel[None, :] * queries + query[:, None], mask=real[None, :], other=0.0)
        token = tl.load(x + channel[:, None] * n + at[None, :], mask=real[:, None] & there[None, :], other=0.0)
        sums += tl.dot(asks, token, input_precision=PRECISION, out_dtype=sums.dtype)
    return sums


@triton.jit(do_not_specialize=["width", "wide"])
def backward_tokens(
    a, rows, columns, x, r, hidden, bases, gifts, gift_rows, gift_columns, offsets,
    d_x, d_r,
    heads, queries, height, width, wide, pieces,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, SHARED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr, STRETCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of content and scale: tokens of a row, one a thread, meet all queries of all heads.

    Here `columns` and `gift_columns` have the columns last.
    """
    number = tl.program_id(0)
    piece, rest = number % pieces, number // pieces
    row, sample = rest % height, (rest // height).to(tl.int64)
    column = piece * STRETCH + tl.arange(0, STRETCH)
    there = column < width
    n = (sample * 0 + height) * wide
    x, r, hidden = x + sample * CHANNELS * n, r + sample * n, hidden + sample * n
    at = (sample * 0 + row) * wide + column
    cell = (sample * 0 + tl.arange(0, BLOCK)[:, None]) * width + column[None, :]
    scale = tl.load(r + at, mask=there, other=0.0)
    of_gifts = tl.zeros([PADDED, STRETCH], scale.dtype)
    of_scores = tl.zeros([PADDED, STRETCH], scale.dtype)
    d_gift = tl.zeros([STRETCH], scale.dtype)
    d_score = tl.zeros([STRETCH], scale.dtype)
    for head in range(heads):
        one = sample * heads + head
        asked = sample * 0 + head if SHARED else one
        for first in range(0, queries, BLOCK):
            query = first + tl.arange(0, BLOCK)
            corner = (n * 0 + first) * width
            table = tl.load(columns + asked * queries * width + corner + cell, mask=there[None, :], other=0.0)
            gift = tl.load(gift_columns + one * queries * width + corner + cell, mask=there[None, :], other=0.0)
            table += tl.load(rows + (asked * height + row) * queries + query)[:, None]
            gift += tl.load(gift_rows + (one * height + row) * queries + query)[:, None]
            own, other = a + asked * CHANNELS * queries, gifts + one * CHANNELS * queries
            base = tl.load(bases + one * queries + query)[:, None]
            offset = tl.load(offsets + one * queries + query)[:, None]
            sums = _turned_product(table, own, queries, query, x, n, at, there, CHANNELS, PADDED, PRECISION)
            gift = _turned_product(gift, other, queries, query, x, n, at, there, CHANNELS, PADDED, PRECISION)
            score = sums * scale[None, :]
            if MASKED:
                score += tl.load(hidden + at, mask=there, other=0.0)[None, :]
            p = tl.exp2(score - base)
            slope = p * (gift * scale[None, :] + offset)
            d_score += tl.sum(slope * sums, 0)
            d_gift += tl.sum(p * gift, 0)
            of_scores += _collected(slope, own, queries, query, CHANNELS, PADDED, PRECISION)
            of_gifts += _collected(p, other, queries, query, CHANNELS, PADDED, PRECISION)
    channel = tl.arange(0, PADDED)[:, None]
    d_tokens = (of_scores * LN2 + of_gifts) * scale[None, :]
    place = d_x + (sample * CHANNELS + channel) * n + at[None, :]
    tl.store(place, d_tokens, mask=(channel < CHANNELS) & there[None, :])
    tl.store(d_r + sample * n + at, d_score * LN2 + d_gift, mask=there)
