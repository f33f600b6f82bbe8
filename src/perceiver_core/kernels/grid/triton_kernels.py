"""Triton kernels for structured reads. See `operator` for the formula and `triton_plan` for the tiling.

In `forward` and `backward_queries`, each thread holds one query. For each stretch of columns, the thread loops over the
rows of its split. The query's coefficients and sums for these columns stay in registers, so that threads exchange no
data. Sums per row are updated in GPU memory. The softmax is computed online, and no score is written to GPU memory. In
`backward_tokens`, each thread holds one token and loops over all queries.

With fewer than 16 channels (after padding), channels are multiplied one at a time, and `forward` and
`backward_queries` rely on this layout: Triton distributes tensors over threads along the last axis, so query tensors
have the queries on the last axis. The number of queries is not specialized. If Triton knew that it is a multiple of 16,
it would assign four neighboring queries and fewer columns to each thread, and threads would have to exchange sums. With
16 or more channels, tensor cores are used, and Triton chooses the layout.

Tensors and sizes:

    content_queries     content coefficients in log2 units (times log2(e)); channels x queries for each sample and head
    row_queries         sum of the axis queries of all axes except the last, in log2 units; rows x queries
    column_queries      axis queries of the last axis, in log2 units; columns x queries
    content, scales     tokens; channels x rows x padded columns, and rows x padded columns
    bias                score bias of tokens: 0, or -inf if masked; rows x padded columns
    base                softmax maximum of each query, in log2 units; in `forward`, the maximum so far
    d_read, d_rows, d_columns
                        upstream gradients divided by the softmax total, with the layouts of the three query tensors
    offsets             `Upstream.offset` divided by the softmax total
    queries             number of queries, padded to whole blocks
    padded_width        number of columns, padded to whole stretches; padding is skipped or has scores of -inf
    batch_head          index over samples and heads; if SHARED, all samples use the same queries
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _program_part(blocks, splits, groups, BLOCK: tl.constexpr):
    """Return the query indices, the group, the split and the `batch_head` index that a program processes."""
    program = tl.program_id(0)
    block, rest = program % blocks, program // blocks
    group, rest = rest % groups, rest // groups
    split, batch_head = rest % splits, (rest // splits).to(tl.int64)
    return block * BLOCK + tl.arange(0, BLOCK), group, split, batch_head


@triton.jit
def _add_products(
    sums, left, left_stride, row, right, right_stride, column, valid,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return sums[i, j] + left[:, row[i]] . right[:, column[j]], with dot products over the channels.

    One of `left` and `right` is the content of tokens, the other the coefficients of queries. `valid` is a boolean mask
    of `column`, or None if all columns are valid. The result is undefined in invalid columns.
    """
    if PADDED < 16:
        for k in tl.static_range(CHANNELS):
            right_value = tl.load(right + k * right_stride + column, mask=valid)
            left_value = tl.load(left + k * left_stride + row)
            sums += left_value[:, None] * right_value[None, :]
    else:
        channel = tl.arange(0, PADDED)
        in_right = (channel < CHANNELS)[:, None]
        if valid is not None:
            in_right = in_right & valid[None, :]
        right_vectors = tl.load(right + channel[:, None] * right_stride + column[None, :], mask=in_right, other=0.0)
        left_vectors = tl.load(
            left + channel[None, :] * left_stride + row[:, None], mask=(channel < CHANNELS)[None, :], other=0.0
        )
        sums += tl.dot(left_vectors, right_vectors, input_precision=PRECISION, out_dtype=sums.dtype)
    return sums


@triton.jit
def _weighted_sums(
    weights, vectors, stride, index, CHANNELS: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Return the matrix product of `vectors[:, index]` (channels x n, of tokens or queries) with `weights` (n x m)."""
    channel = tl.arange(0, PADDED)
    if PADDED < 16:
        sums = tl.zeros([PADDED, weights.shape[1]], weights.dtype)
        for k in tl.static_range(CHANNELS):
            vector = tl.load(vectors + k * stride + index)
            sums += tl.where(channel[:, None] == k, tl.sum(weights * vector[:, None], 0)[None, :], 0.0)
    else:
        pointers = vectors + channel[:, None] * stride + index[None, :]
        vector = tl.load(pointers, mask=(channel < CHANNELS)[:, None], other=0.0)
        sums = tl.dot(vector, weights, input_precision=PRECISION, out_dtype=weights.dtype)
    return sums


@triton.jit(do_not_specialize=["queries"])
def forward(
    content_queries, row_queries, column_queries, content, scales, bias,
    read, bases, totals, row_sums, row_bases, column_sums, column_bases,
    heads, queries, height, width, padded_width, stretches, blocks, splits, groups,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, SHARED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr, STRETCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute partial reads, one per split and group, each with its own softmax maximum, which is stored in `bases`.

    Sums per row and per column are relative to the running maximum at the time when they are stored. `row_bases` and
    `column_bases` contain this maximum.
    """
    query, group, split, batch_head = _program_part(blocks, splits, groups, BLOCK)
    sample, query_row = batch_head // heads, batch_head % heads if SHARED else batch_head
    tokens = (batch_head * 0 + height) * padded_width  # `batch_head * 0` makes the result 64-bit
    content_queries, content = content_queries + query_row * CHANNELS * queries, content + sample * CHANNELS * tokens
    scales, bias = scales + sample * tokens, bias + sample * tokens
    column_queries += query_row * width * queries
    row_queries += query_row * height * queries
    row_sums += (batch_head * groups + group) * height * queries
    row_bases += (batch_head * groups + group) * height * queries
    column_sums += (batch_head * splits + split) * padded_width * queries
    column_bases += (batch_head * splits + split) * stretches * queries
    first = stretches * group // groups
    step = tl.arange(0, STRETCH)
    cell = step[:, None] * queries + query[None, :]
    base = tl.full([BLOCK], float("-inf"), content_queries.dtype.element_ty)
    total = tl.zeros([BLOCK], content_queries.dtype.element_ty)
    read_sums = tl.zeros([PADDED, BLOCK], content_queries.dtype.element_ty)
    for stretch in range(first, stretches * (group + 1) // groups):
        valid = (stretch * STRETCH + step < width)[:, None]
        corner = (tokens * 0 + stretch) * STRETCH * queries
        columns = tl.load(column_queries + corner + cell, mask=valid, other=float("-inf"))
        sums = tl.zeros([STRETCH, BLOCK], content_queries.dtype.element_ty)
        for row in range(height * split // splits, height * (split + 1) // splits):
            start = (tokens * 0 + row) * padded_width + stretch * STRETCH
            line = (tokens * 0 + row) * queries
            scale = tl.load(scales + start + step)
            row_query = tl.load(row_queries + line + query)
            score = _add_products(
                columns + row_query[None, :], content + start, tokens, step, content_queries, queries, query, None,
                CHANNELS, PADDED, PRECISION,
            )  # fmt: skip
            score *= scale[:, None]
            if MASKED:
                score += tl.load(bias + start + step)[:, None]
            new_base = tl.maximum(base, tl.max(score, 0))
            finite_base = tl.where(new_base == float("-inf"), 0.0, new_base)
            decay = tl.exp2(base - finite_base)
            base = new_base
            weights = tl.exp2(score - finite_base[None, :])
            total = total * decay + tl.sum(weights, 0)
            weights *= scale[:, None]
            read_sums = read_sums * decay[None, :] + _weighted_sums(
                weights, content + start, tokens, step, CHANNELS, PADDED, PRECISION
            )
            sums = sums * decay[None, :] + weights
            # The row's sum over the group's earlier stretches, 0 at the first stretch.
            later = query * 0 + stretch > first
            earlier_sum = tl.load(row_sums + line + query, mask=later, other=0.0)
            earlier_sum *= tl.exp2(tl.load(row_bases + line + query, mask=later, other=float("-inf")) - finite_base)
            tl.store(row_sums + line + query, earlier_sum + tl.sum(weights, 0))
            tl.store(row_bases + line + query, base)
        tl.store(column_sums + corner + cell, sums)
        tl.store(column_bases + (tokens * 0 + stretch) * queries + query, base)
        tl.debug_barrier()  # the next stretch reads the row sums that this one wrote
    part = (batch_head * splits + split) * groups + group
    tl.store(bases + part * queries + query, base)
    tl.store(totals + part * queries + query, total)
    channel = tl.arange(0, PADDED)[:, None]
    tl.store(read + (part * CHANNELS + channel) * queries + query[None, :], read_sums, mask=channel < CHANNELS)


@triton.jit(do_not_specialize=["queries"])
def backward_queries(
    content_queries, row_queries, column_queries, content, scales, bias, bases, d_read, d_rows, d_columns, offsets,
    d_content_queries, d_row_queries, d_column_queries,
    heads, queries, height, width, padded_width, stretches, blocks, splits, groups,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, SHARED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr, STRETCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute partial gradients of the query tensors, one per split and group, with the same tiling as `forward`."""
    query, group, split, batch_head = _program_part(blocks, splits, groups, BLOCK)
    sample, query_row = batch_head // heads, batch_head % heads if SHARED else batch_head
    tokens = (batch_head * 0 + height) * padded_width
    content_queries, content = content_queries + query_row * CHANNELS * queries, content + sample * CHANNELS * tokens
    scales, bias = scales + sample * tokens, bias + sample * tokens
    column_queries += query_row * width * queries
    row_queries += query_row * height * queries
    d_read += batch_head * CHANNELS * queries
    d_columns += batch_head * width * queries
    d_rows += batch_head * height * queries
    d_row_queries += (batch_head * groups + group) * height * queries
    d_column_queries += (batch_head * splits + split) * padded_width * queries
    base = tl.load(bases + batch_head * queries + query)
    offset = tl.load(offsets + batch_head * queries + query)
    first = stretches * group // groups
    step = tl.arange(0, STRETCH)
    cell = step[:, None] * queries + query[None, :]
    content_sums = tl.zeros([PADDED, BLOCK], content_queries.dtype.element_ty)
    for stretch in range(first, stretches * (group + 1) // groups):
        valid = (stretch * STRETCH + step < width)[:, None]
        corner = (tokens * 0 + stretch) * STRETCH * queries
        columns = tl.load(column_queries + corner + cell, mask=valid, other=float("-inf"))
        d_column = tl.load(d_columns + corner + cell, mask=valid, other=0.0)
        sums = tl.zeros([STRETCH, BLOCK], content_queries.dtype.element_ty)
        for row in range(height * split // splits, height * (split + 1) // splits):
            start = (tokens * 0 + row) * padded_width + stretch * STRETCH
            line = (tokens * 0 + row) * queries
            scale = tl.load(scales + start + step)[:, None]
            row_query, d_row = tl.load(row_queries + line + query), tl.load(d_rows + line + query)
            score = _add_products(
                columns + row_query[None, :], content + start, tokens, step, content_queries, queries, query, None,
                CHANNELS, PADDED, PRECISION,
            )  # fmt: skip
            d_weight = _add_products(
                d_column + d_row[None, :], content + start, tokens, step, d_read, queries, query, None,
                CHANNELS, PADDED, PRECISION,
            )  # fmt: skip
            score *= scale
            if MASKED:
                score += tl.load(bias + start + step)[:, None]
            d_product = tl.exp2(score - base[None, :]) * (d_weight * scale + offset[None, :]) * scale
            content_sums += _weighted_sums(d_product, content + start, tokens, step, CHANNELS, PADDED, PRECISION)
            sums += d_product
            earlier_sum = tl.load(d_row_queries + line + query, mask=query * 0 + stretch > first, other=0.0)
            tl.store(d_row_queries + line + query, earlier_sum + tl.sum(d_product, 0))
        tl.store(d_column_queries + corner + cell, sums)
        tl.debug_barrier()
    channel = tl.arange(0, PADDED)[:, None]
    part = ((batch_head * splits + split) * groups + group) * CHANNELS + channel
    tl.store(d_content_queries + part * queries + query[None, :], content_sums, mask=channel < CHANNELS)


@triton.jit(do_not_specialize=["width", "padded_width"])
def backward_tokens(
    content_queries, row_queries, column_queries, content, scales, bias, bases, d_read, d_rows, d_columns, offsets,
    d_content, d_scales,
    heads, queries, height, width, padded_width, pieces,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, SHARED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr, STRETCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute gradients of content and scale. Each thread holds one token and loops over the queries of all heads.

    In this kernel, `column_queries` and `d_columns` have the layout queries x columns.
    """
    program = tl.program_id(0)
    piece, rest = program % pieces, program // pieces
    row, sample = rest % height, (rest // height).to(tl.int64)
    column = piece * STRETCH + tl.arange(0, STRETCH)
    valid = column < width
    tokens = (sample * 0 + height) * padded_width
    content, scales, bias = content + sample * CHANNELS * tokens, scales + sample * tokens, bias + sample * tokens
    token = (sample * 0 + row) * padded_width + column
    cell = (sample * 0 + tl.arange(0, BLOCK)[:, None]) * width + column[None, :]
    scale = tl.load(scales + token, mask=valid, other=0.0)
    from_read = tl.zeros([PADDED, STRETCH], scale.dtype)
    from_scores = tl.zeros([PADDED, STRETCH], scale.dtype)
    scale_from_read = tl.zeros([STRETCH], scale.dtype)
    scale_from_scores = tl.zeros([STRETCH], scale.dtype)
    for head in range(heads):
        batch_head = sample * heads + head
        query_row = sample * 0 + head if SHARED else batch_head
        for first in range(0, queries, BLOCK):
            query = first + tl.arange(0, BLOCK)
            corner = (tokens * 0 + first) * width
            product = tl.load(
                column_queries + query_row * queries * width + corner + cell, mask=valid[None, :], other=0.0
            )
            d_weight = tl.load(d_columns + batch_head * queries * width + corner + cell, mask=valid[None, :], other=0.0)
            product += tl.load(row_queries + (query_row * height + row) * queries + query)[:, None]
            d_weight += tl.load(d_rows + (batch_head * height + row) * queries + query)[:, None]
            coefficients = content_queries + query_row * CHANNELS * queries
            d_coefficients = d_read + batch_head * CHANNELS * queries
            base = tl.load(bases + batch_head * queries + query)[:, None]
            offset = tl.load(offsets + batch_head * queries + query)[:, None]
            product = _add_products(
                product, coefficients, queries, query, content, tokens, token, valid, CHANNELS, PADDED, PRECISION
            )
            d_weight = _add_products(
                d_weight, d_coefficients, queries, query, content, tokens, token, valid, CHANNELS, PADDED, PRECISION
            )
            score = product * scale[None, :]
            if MASKED:
                score += tl.load(bias + token, mask=valid, other=0.0)[None, :]
            weights = tl.exp2(score - base)
            d_score = weights * (d_weight * scale[None, :] + offset)
            scale_from_scores += tl.sum(d_score * product, 0)
            scale_from_read += tl.sum(weights * d_weight, 0)
            from_scores += _weighted_sums(d_score, coefficients, queries, query, CHANNELS, PADDED, PRECISION)
            from_read += _weighted_sums(weights, d_coefficients, queries, query, CHANNELS, PADDED, PRECISION)
    channel = tl.arange(0, PADDED)[:, None]
    d_tokens = (from_scores * LN2 + from_read) * scale[None, :]
    pointers = d_content + (sample * CHANNELS + channel) * tokens + token[None, :]
    tl.store(pointers, d_tokens, mask=(channel < CHANNELS) & valid[None, :])
    tl.store(d_scales + sample * tokens + token, scale_from_scores * LN2 + scale_from_read, mask=valid)
