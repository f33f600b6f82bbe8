// Forward pass.

#pragma once

#include "grid.h"
#include "products.h"
#include "threads.h"

// Results: batch x heads x queries x ..., or for each split of the grid: batch x splits x heads x queries x ... `base`
// is in log2 units.
template <class T> struct Outputs {
  T *read, *marginals, *base, *total;
};

// State of one thread. `process_block` processes a range of tiles for one block of queries, with online softmax.
template <class T> struct Forward {
  static constexpr T SLACK = 16;  // the sums are rescaled if a score exceeds `base` by more than this, in log2 units
  const Inputs<T>& in;
  const Outputs<T>& out;
  Window<T> window;
  Coefficients<T> coefficients;
  Sums<T> sums;
  Tile<T> tile;
  Buffer<T> weights;
  int count = 0;                          // queries in the block
  int64_t batch = 0;                      // sample
  T* axes = nullptr;                      // marginals of the block, not normalized
  int64_t columns_from = 0, columns_to = 0;  // columns whose marginals are written
  T base[BLOCK];                          // running softmax maximum, up to SLACK too low
  T written_base[BLOCK];                  // `base` of the marginals that are written
  vec<T> total[BLOCK];

  Forward(Memory& memory, const Inputs<T>& in, const Outputs<T>& out)
      : in(in), out(out), window(memory, in), coefficients(memory, in), sums(memory, in), tile(memory, in),
        weights(memory, BLOCK * in.tile) {}

  // Computes the results of the queries from `first` on of a head, for a range of tiles, and writes them to `out_row`.
  void process_block(int64_t sample, int64_t head, int64_t first, int64_t begin, int64_t end, int64_t out_row) {
    const int64_t query_row = in.query_batch == 1 ? head : sample * in.heads + head;
    batch = sample, count = in.block_size(first), axes = out.marginals + out_row * in.axis_positions;
    coefficients.start(in, query_row * in.queries + first, count, in.content_queries, in.axis_queries, T(LOG2E));
    sums.clear_content();
    for (int q = 0; q < BLOCK; q++) base[q] = written_base[q] = -INF<T>, total[q] = zeros<T>();
    for (int q = 0; q < count; q++) std::fill_n(axes + q * in.axis_positions, in.outer_positions, T(0));
    columns_from = columns_to = in.axes == 1 ? begin * in.tile : 0;
    walk(in, begin, end, window, *this);
    finish(out_row);
  }

  void enter_columns() { coefficients.load_columns(in, window), sums.clear_columns(); }
  void enter_rows() { coefficients.load_rows(in, window), sums.clear_rows(window); }

  void process_tile(int64_t row, int64_t column) {
    const int64_t i = row - window.top, j = column - window.left;
    tile.pack(in, batch, row, column);
    compute_products<T>(weights.data(), &coefficients.rows[i * BLOCK], &coefficients.columns[j], coefficients.padded,
                        coefficients.content.data(), tile, in.channels);
    for (int q = 0; q < count; q++) {
      raise_base(q, scale_scores(&weights[q * in.tile]));
      sums.rows[i * BLOCK + q] += exponentiate(q, &weights[q * in.tile], &sums.columns[q * sums.padded + j]);
    }
    add_content_sums<T>(sums.content.data(), weights.data(), tile, in.channels);
  }

  void leave_rows() {
    for (int q = 0; q < count; q++) raise_written_base(q), sums.add_rows(q, window, axes + q * in.axis_positions);
  }

  void leave_columns() {
    for (int q = 0; q < count; q++) {
      raise_written_base(q);
      const T* from = &sums.columns[q * sums.padded];
      std::copy(from, from + window.columns(), axes + q * in.axis_positions + in.outer_positions + window.left);
    }
    columns_to = window.right;
  }

  // Overwrites products with scores, -inf for masked tokens, and returns the maximum score.
  T scale_scores(T* scores) const {
    vec<T> top = zeros<T>() - INF<T>;
    for (int64_t j = 0; j < tile.padded; j += LANES<T>) {
      const vec<T> score = load<T>(scores + j) * load<T>(&tile.scale[j]) + load<T>(&tile.bias[j]);
      store<T>(scores + j, score);
      top = top > score ? top : score;
    }
    return highest<T>(top);
  }

  void raise_base(int q, T peak) {
    if (!(peak > base[q] + SLACK)) return;
    if (base[q] != -INF<T>) {
      const T factor = std::exp2(base[q] - peak);
      total[q] *= factor;
      for (int64_t k = 0; k < sums.lanes; k++) sums.content[q * sums.lanes + k] *= factor;
      for (int64_t i = 0; i < window.rows(); i++) sums.rows[i * BLOCK + q] *= factor;
      for (int64_t j = 0; j < sums.padded; j++) sums.columns[q * sums.padded + j] *= factor;
    }
    base[q] = peak;
  }

  void raise_written_base(int q) {
    if (written_base[q] != base[q] && written_base[q] != -INF<T>) scale_written(q, std::exp2(written_base[q] - base[q]));
    written_base[q] = base[q];
  }

  void scale_written(int q, T factor) {
    T *outer = axes + q * in.axis_positions, *columns = outer + in.outer_positions;
    for (int64_t i = 0; i < in.outer_positions; i++) outer[i] *= factor;
    for (int64_t j = columns_from; j < columns_to; j++) columns[j] *= factor;
  }

  // Overwrites scores with weights times scale, adds these to the sums of the columns, and returns their sum.
  T exponentiate(int q, T* scores, T* columns) {
    const T finite_base = base[q] == -INF<T> ? T(0) : base[q];
    vec<T> unscaled_sum = zeros<T>(), scaled_sum = zeros<T>();
    for (int64_t j = 0; j < tile.padded; j += LANES<T>) {
      vec<T> p = exp2(load<T>(scores + j) - finite_base);
      unscaled_sum += p;
      p *= load<T>(&tile.scale[j]);
      scaled_sum += p;
      store<T>(scores + j, p);
      store<T>(columns + j, load<T>(columns + j) + p);
    }
    total[q] += unscaled_sum;
    return in.axes > 1 ? sum<T>(scaled_sum) : T(0);
  }

  // Normalizes the results. Queries whose tokens are all masked have a total of 0 and a base of 0.
  void finish(int64_t out_row) {
    for (int q = 0; q < count; q++) {
      const T all = sum<T>(total[q]), factor = all > 0 ? 1 / all : T(0);
      out.base[out_row + q] = all > 0 ? base[q] : T(0), out.total[out_row + q] = all;
      for (int64_t k = 0; k < in.channels; k++)
        out.read[(out_row + q) * in.channels + k] = sums.content_sum(q, k) * factor;
      scale_written(q, factor);
    }
  }
};

// Computes the results of each split, which is a range of tiles.
template <class T>
int64_t forward_splits(const Inputs<T>& in, const Outputs<T>& out, int64_t splits, int64_t threads) {
  const auto work = [&](Forward<T>& pass, int64_t task) {
    const int64_t row = task / in.blocks, first = task % in.blocks * BLOCK;  // row: index over batch x splits x heads
    const int64_t split = row / in.heads % splits, batch = row / in.heads / splits;
    const int64_t begin = in.tiles * split / splits, end = in.tiles * (split + 1) / splits;
    pass.process_block(batch, row % in.heads, first, begin, end, row * in.queries + first);
  };
  return run_tasks<Forward<T>>(in.batch * splits * in.heads * in.blocks, threads, work, in, out);
}

// Merges the results of all splits for one query. `step` is the distance of two splits of a query, in rows.
template <class T>
void merge_splits(const Inputs<T>& in, const Outputs<T>& parts, int64_t part, int64_t step, int64_t splits,
                  const Outputs<T>& out, int64_t row) {
  T base = -INF<T>, total = 0;
  for (int64_t i = part; i < part + splits * step; i += step)
    if (parts.total[i] != 0) base = std::max(base, parts.base[i]);
  T *read = out.read + row * in.channels, *axes = out.marginals + row * in.axis_positions;
  std::fill_n(read, in.channels, T(0)), std::fill_n(axes, in.axis_positions, T(0));
  for (int64_t i = part; i < part + splits * step; i += step) {
    if (parts.total[i] == 0) continue;  // all tokens of the split are masked
    const T weight = parts.total[i] * std::exp2(parts.base[i] - base);
    total += weight;
    for (int64_t k = 0; k < in.channels; k++) read[k] += parts.read[i * in.channels + k] * weight;
    for (int64_t k = 0; k < in.axis_positions; k++) axes[k] += parts.marginals[i * in.axis_positions + k] * weight;
  }
  const T factor = total == 0 ? T(0) : 1 / total;
  for (int64_t k = 0; k < in.channels; k++) read[k] *= factor;
  for (int64_t k = 0; k < in.axis_positions; k++) axes[k] *= factor;
  out.base[row] = total == 0 ? T(0) : base, out.total[row] = total;
}

// Returns 0, or the number of bytes that could not be allocated. With few queries, the grid is split into parts that are
// processed in parallel. A grid with a single axis is not split, because its marginals are as large as the scores.
template <class T> int64_t forward(const Inputs<T>& in, const Outputs<T>& out, int64_t threads) {
  const int64_t rows = in.batch * in.heads * in.queries, numbers = in.channels + in.axis_positions;
  if (!rows) return 0;
  const int64_t most = in.axes == 1 ? 1 : MAX_RESULT_BYTES / (rows * numbers * int64_t(sizeof(T)));
  const int64_t splits = in.num_splits(in.batch * in.heads * in.blocks, numbers, most);
  if (splits == 1) return forward_splits(in, out, 1, threads);
  Memory memory;
  Buffer<T> read(memory, rows * splits * in.channels), marginals(memory, rows * splits * in.axis_positions);
  Buffer<T> base(memory, rows * splits), total(memory, rows * splits);
  if (!memory.enough) return memory.bytes;
  const Outputs<T> parts{read.data(), marginals.data(), base.data(), total.data()};
  if (const int64_t needed = forward_splits(in, parts, splits, threads)) return needed;
  const int64_t step = in.heads * in.queries;
  run_tasks(rows, threads, [&](int64_t row) {
    merge_splits(in, parts, row / step * splits * step + row % step, step, splits, out, row);
  });
  return 0;
}
