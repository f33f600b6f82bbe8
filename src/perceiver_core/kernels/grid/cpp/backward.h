// Backward pass: recomputes the softmax weights and computes the gradients from them.

#pragma once

#include <cstring>

#include "grid.h"
#include "products.h"
#include "threads.h"

// Softmax statistics of the forward pass and gradients of its outputs; see `Upstream` in `../interface.py`.
template <class T> struct Upstream {
  const T *base, *total, *d_read, *d_marginals, *offset;
};

// Gradients of the inputs. Gradients of content and scale are null if they are not needed.
template <class T> struct Gradients {
  T *content_queries, *axis_queries, *content, *scale;
};

// Gradients of a range of query rows (head x query) with `width` numbers each, in several copies that are summed.
template <class T> struct Copies {
  T* data;
  int64_t first, rows, width;
  T* at(int64_t copy, int64_t row) const { return data + (copy * rows + row - first) * width; }
};

// State of one thread. `process_block` processes a range of tiles for one block of queries.
template <class T> struct Backward {
  const Inputs<T>& in;
  const Upstream<T>& upstream;
  const Gradients<T>& out;
  Window<T> window;
  Coefficients<T> coefficients, d_coefficients;
  Sums<T> sums;
  Tile<T> tile;
  Buffer<T> products, d_weights;  // overwritten with gradients of products, and weights times scale
  Buffer<T> d_tokens;             // gradients of a tile: channels, then scale
  Buffer<T> content_queries;      // without the factor log2(e)
  int count = 0;                  // queries in the block
  int64_t batch = 0;              // sample
  int64_t first_row = 0;          // row of the block in `upstream`
  bool is_first_block = false;    // whether no other block has contributed to the token gradients of the sample
  bool adds = false;              // whether gradients of queries are added to those of other samples
  T* axes = nullptr;              // gradients of the axis queries of the block

  Backward(Memory& memory, const Inputs<T>& in, const Upstream<T>& upstream, const Gradients<T>& out)
      : in(in), upstream(upstream), out(out), window(memory, in), coefficients(memory, in), d_coefficients(memory, in),
        sums(memory, in), tile(memory, in), products(memory, BLOCK * in.tile), d_weights(memory, BLOCK * in.tile),
        d_tokens(memory, (in.channels + 1) * in.tile), content_queries(memory, BLOCK * in.channels) {}

  // Computes gradients for a range of tiles of a sample. Writes those of the queries to `to_content` and `to_axes`, or
  // adds them if `adds_to` is true.
  void process_block(int64_t sample, int64_t block, int64_t begin, int64_t end, T* to_content, T* to_axes,
                     bool adds_to) {
    const int64_t head = block / in.blocks, first = block % in.blocks * BLOCK, query_row = head * in.queries + first;
    batch = sample, count = in.block_size(first), first_row = sample * in.heads * in.queries + query_row;
    is_first_block = block == 0, adds = adds_to, axes = to_axes;
    coefficients.start(in, in.query_batch == 1 ? query_row : first_row, count, in.content_queries, in.axis_queries,
                       T(LOG2E));
    d_coefficients.start(in, first_row, count, upstream.d_read, upstream.d_marginals, T(1));
    for (int64_t i = 0; i < BLOCK * in.channels; i++) content_queries[i] = coefficients.content[i] * T(1 / LOG2E);
    sums.clear_content();
    std::fill_n(products.data(), BLOCK * in.tile, T(0)), std::fill_n(d_weights.data(), BLOCK * in.tile, T(0));
    for (int q = 0; q < count && !adds; q++) std::fill_n(axes + q * in.axis_positions, in.outer_positions, T(0));
    walk(in, begin, end, window, *this);
    for (int64_t i = 0; i < count * in.channels; i++) {
      const T value = sums.content_sum(int(i / in.channels), i % in.channels);
      to_content[i] = adds ? to_content[i] + value : value;
    }
  }

  void enter_columns() {
    coefficients.load_columns(in, window), d_coefficients.load_columns(in, window), sums.clear_columns();
  }
  void enter_rows() {
    coefficients.load_rows(in, window), d_coefficients.load_rows(in, window), sums.clear_rows(window);
  }

  void process_tile(int64_t row, int64_t column) {
    const int64_t i = row - window.top, j = column - window.left;
    tile.pack(in, batch, row, column);
    compute_products<T>(products.data(), &coefficients.rows[i * BLOCK], &coefficients.columns[j], coefficients.padded,
                        coefficients.content.data(), tile, in.channels);
    compute_products<T>(d_weights.data(), &d_coefficients.rows[i * BLOCK], &d_coefficients.columns[j],
                        d_coefficients.padded, d_coefficients.content.data(), tile, in.channels);
    if (out.content) load_token_gradients();
    for (int q = 0; q < count; q++)
      sums.rows[i * BLOCK + q] += differentiate(q, first_row + q, &sums.columns[q * sums.padded + j]);
    add_content_sums<T>(sums.content.data(), products.data(), tile, in.channels);
    if (out.content) store_token_gradients();
  }

  void leave_rows() {
    for (int q = 0; q < count; q++) sums.add_rows(q, window, axes + q * in.axis_positions);
  }

  void leave_columns() {
    for (int q = 0; q < count; q++) {
      const T* from = &sums.columns[q * sums.padded];
      T* to = axes + q * in.axis_positions + in.outer_positions + window.left;
      for (int64_t j = 0; j < window.columns(); j++) to[j] = adds ? to[j] + from[j] : from[j];
    }
  }

  // Loads the token gradients summed over earlier blocks of queries, or zeros for the first block.
  void load_token_gradients() {
    for (int64_t k = 0; k <= in.channels; k++) {
      const T* earlier = token_gradient(k);
      for (int64_t j = 0; j < tile.padded; j++)
        d_tokens[k * in.tile + j] = is_first_block || j >= tile.count ? T(0) : earlier[tile.start + j];
    }
  }

  void store_token_gradients() {
    add_token_sums<T>(d_tokens.data(), content_queries.data(), products.data(), d_coefficients.content.data(),
                      d_weights.data(), tile, in.channels);
    for (int64_t k = 0; k <= in.channels; k++)
      std::memcpy(token_gradient(k) + tile.start, &d_tokens[k * in.tile], tile.count * sizeof(T));
  }

  T* token_gradient(int64_t k) const {
    return k < in.channels ? out.content + (batch * in.channels + k) * in.tokens : out.scale + batch * in.tokens;
  }

  // Overwrites products with their gradients, and gradients of weights with weights times scale. Adds the gradients of
  // products to `column`, and returns their sum.
  T differentiate(int q, int64_t query_row, T* column) {
    T *product_row = &products[q * in.tile], *d_weight_row = &d_weights[q * in.tile];
    T* d_scale = &d_tokens[in.channels * in.tile];
    const T base = upstream.base[query_row];
    const T inverse_total = upstream.total[query_row] > 0 ? 1 / upstream.total[query_row] : T(0);
    const T offset = upstream.offset[query_row];
    vec<T> row_sum = zeros<T>();
    for (int64_t j = 0; j < tile.padded; j += LANES<T>) {
      const vec<T> scale = load<T>(&tile.scale[j]);
      const vec<T> product = load<T>(product_row + j), d_weight = load<T>(d_weight_row + j);
      const vec<T> p = exp2(product * scale + load<T>(&tile.bias[j]) - base) * inverse_total;
      const vec<T> d_score = p * (d_weight * scale + offset);
      const vec<T> d_product = d_score * scale;
      if (out.content)
        store<T>(d_scale + j, load<T>(d_scale + j) + d_score * (product * T(1 / LOG2E)) + p * d_weight);
      row_sum += d_product;
      store<T>(column + j, load<T>(column + j) + d_product);
      store<T>(product_row + j, d_product), store<T>(d_weight_row + j, p * scale);
    }
    return in.axes > 1 ? sum<T>(row_sum) : T(0);
  }
};

// Parts of the work. The samples are divided into `slots`, and the grid of each sample into `splits`. Each pair of a
// slot and a split is a task with its own copies of the gradients of queries. If the grid has a single axis, the splits
// of a slot have different axis positions and share a copy of the gradients of axis queries. The blocks of queries are
// divided into phases of `blocks` blocks, and the copies are merged after each phase.
template <class T> struct Plan {
  int64_t slots, splits, content_copies, axis_copies, blocks;

  explicit Plan(const Inputs<T>& in) {
    const int64_t block_bytes = BLOCK * int64_t(sizeof(T));
    const int64_t most = std::max<int64_t>(1, MAX_RESULT_BYTES / (block_bytes * (in.channels + in.axis_positions)));
    slots = in.query_batch == 1 ? std::min(in.batch, most) : in.batch;
    splits = in.axes == 1 ? in.num_splits(slots, in.channels, MIN_TASKS)
                          : in.num_splits(slots, in.channels + in.axis_positions, most / slots);
    content_copies = slots * splits, axis_copies = in.axes == 1 ? slots : content_copies;
    const int64_t copied = (content_copies == in.query_batch ? 0 : content_copies * in.channels) +
                           (axis_copies == in.query_batch ? 0 : axis_copies * in.axis_positions);
    blocks = copied ? std::max<int64_t>(1, MAX_RESULT_BYTES / (block_bytes * copied)) : in.heads * in.blocks;
  }
};

// Sums the copies of the gradients of one query row of a sample.
template <class T> void merge_copies(const Copies<T>& copies, int64_t from, int64_t to, int64_t row, T* out) {
  std::copy_n(copies.at(from, row), copies.width, out);
  for (int64_t copy = from + 1; copy < to; copy++)
    for (int64_t k = 0; k < copies.width; k++) out[k] += copies.at(copy, row)[k];
}

// Returns 0, or the number of bytes that could not be allocated.
template <class T>
int64_t backward(const Inputs<T>& in, const Upstream<T>& upstream, const Gradients<T>& out, int64_t threads) {
  const int64_t rows = in.heads * in.queries, all_blocks = in.heads * in.blocks;
  if (!in.batch || !rows) {
    std::fill_n(out.content_queries, in.query_batch * rows * in.channels, T(0));
    std::fill_n(out.axis_queries, in.query_batch * rows * in.axis_positions, T(0));
    if (out.content) std::fill_n(out.content, in.batch * in.channels * in.tokens, T(0));
    if (out.scale) std::fill_n(out.scale, in.batch * in.tokens, T(0));
    return 0;
  }
  const Plan<T> plan(in);
  const int64_t copied_rows = std::min(plan.blocks * BLOCK, rows);
  const bool copies_content = plan.content_copies != in.query_batch, copies_axes = plan.axis_copies != in.query_batch;
  Memory memory;
  Buffer<T> content(memory, copies_content ? plan.content_copies * copied_rows * in.channels : 0);
  Buffer<T> axes(memory, copies_axes ? plan.axis_copies * copied_rows * in.axis_positions : 0);
  if (!memory.enough) return memory.bytes;
  const auto row_of = [&](int64_t block) {
    return block == all_blocks ? rows : block / in.blocks * in.queries + block % in.blocks * BLOCK;
  };
  for (int64_t first = 0; first < all_blocks; first += plan.blocks) {
    const int64_t last = std::min(first + plan.blocks, all_blocks), from = row_of(first), size = row_of(last) - from;
    const Copies<T> contents = copies_content ? Copies<T>{content.data(), from, size, in.channels}
                                              : Copies<T>{out.content_queries, 0, rows, in.channels};
    const Copies<T> axis_terms = copies_axes ? Copies<T>{axes.data(), from, size, in.axis_positions}
                                             : Copies<T>{out.axis_queries, 0, rows, in.axis_positions};
    const auto work = [&](Backward<T>& pass, int64_t task) {
      const int64_t slot = task / plan.splits, split = task % plan.splits;
      const int64_t begin = in.tiles * split / plan.splits, end = in.tiles * (split + 1) / plan.splits;
      const int64_t samples_from = in.batch * slot / plan.slots, samples_to = in.batch * (slot + 1) / plan.slots;
      for (int64_t sample = samples_from; sample < samples_to; sample++)
        for (int64_t block = first; block < last; block++)
          pass.process_block(sample, block, begin, end, contents.at(task, row_of(block)),
                             axis_terms.at(in.axes == 1 ? slot : task, row_of(block)), sample > samples_from);
    };
    if (const int64_t needed = run_tasks<Backward<T>>(plan.slots * plan.splits, threads, work, in, upstream, out))
      return needed;
    run_tasks(in.query_batch * size, threads, [&](int64_t task) {
      const int64_t sample = task / size, row = from + task % size, to = sample * rows + row;
      const int64_t contents_each = plan.content_copies / in.query_batch, axes_each = plan.axis_copies / in.query_batch;
      if (copies_content)
        merge_copies(contents, sample * contents_each, (sample + 1) * contents_each, row,
                     out.content_queries + to * in.channels);
      if (copies_axes)
        merge_copies(axis_terms, sample * axes_each, (sample + 1) * axes_each, row,
                     out.axis_queries + to * in.axis_positions);
    });
  }
  return 0;
}
