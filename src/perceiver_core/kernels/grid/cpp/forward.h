// Forward pass.

#pragma once

#include "grid.h"
#include "products.h"
#include "threads.h"

// Results for each split of the grid: batch x splits x heads x queries x ... `base` is in log2 units.
template <class T> struct Outputs {
  T *read, *marginals, *base, *total;
};

// State of one thread. `walk` processes a range of tiles for one block of queries, with online softmax.
template <class T> struct Forward {
  static constexpr T SLACK = 16;  // the sums are rescaled if a score exceeds `base` by more than this, in log2 units
  const Inputs<T>& in;
  Coefficients<T> coefficients;
  Sums<T> sums;
  Tile<T> tile;
  RowPositions<T> positions;
  std::vector<T> weights;
  T base[BLOCK];  // running softmax maximum, up to SLACK too low
  vec<T> total[BLOCK];

  explicit Forward(const Inputs<T>& in)
      : in(in), coefficients(in), sums(in), tile(in), weights(BLOCK * in.tile) {}

  void walk(int64_t batch, int64_t head, int64_t first, int64_t begin, int64_t end) {
    const int count = in.block_size(first);
    const int64_t query_row = in.query_batch == 1 ? head : batch * in.heads + head;
    const Span span(in, begin, end);
    coefficients.load_block(in, span, query_row * in.queries + first, count, in.content_queries, in.axis_queries,
                            T(LOG2E));
    sums.clear(span);
    for (int q = 0; q < BLOCK; q++) base[q] = -INF<T>, total[q] = zeros<T>();
    T row[BLOCK];
    for (int64_t index = begin; index < end; index++) {
      tile.pack(in, batch, index);
      positions.find(in, tile.row);
      positions.gather(row, coefficients);
      compute_products<T>(weights.data(), row, &coefficients.last[tile.column], coefficients.padded,
                          coefficients.content.data(), tile, in.channels);
      for (int q = 0; q < count; q++) {
        raise_base(q, scale_scores(&weights[q * in.tile]));
        exponentiate(q, &weights[q * in.tile]);
      }
      add_content_sums<T>(sums.content.data(), weights.data(), tile, in.channels);
    }
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
      sums.rescale(q, factor);
    }
    base[q] = peak;
  }

  // Overwrites scores with weights times scale, and adds these to the sums for each position.
  void exponentiate(int q, T* scores) {
    const T finite_base = base[q] == -INF<T> ? T(0) : base[q];
    vec<T> unscaled_sum = zeros<T>(), scaled_sum = zeros<T>();
    T* column = &sums.last[q * sums.padded + tile.column];
    for (int64_t j = 0; j < tile.padded; j += LANES<T>) {
      vec<T> p = exp2(load<T>(scores + j) - finite_base);
      unscaled_sum += p;
      p *= load<T>(&tile.scale[j]);
      scaled_sum += p;
      store<T>(scores + j, p);
      store<T>(column + j, load<T>(column + j) + p);
    }
    total[q] += unscaled_sum;
    if (in.axes > 1) positions.add_to(sums, q, sum<T>(scaled_sum));
  }

  // Writes the results. Queries whose tokens are all masked have a total of 0 and a base of 0.
  void write(int64_t first_row, int count, Span span, const Outputs<T>& out) const {
    T factors[BLOCK];
    for (int q = 0; q < count; q++) {
      const T all = sum<T>(total[q]);
      factors[q] = all > 0 ? 1 / all : T(0);
      out.base[first_row + q] = all > 0 ? base[q] : T(0), out.total[first_row + q] = all;
    }
    sums.write(in, span, first_row, first_row, count, out.read, out.marginals, factors);
  }
};

template <class T> void forward(const Inputs<T>& in, const Outputs<T>& out, int64_t splits, int64_t threads) {
  const int64_t tasks = in.batch * splits * in.heads * in.blocks;
  run_parallel(tasks, threads, [&](std::atomic<int64_t>& next) {
    Forward<T> pass(in);
    for (int64_t task; (task = next++) < tasks;) {
      const int64_t row = task / in.blocks, first = task % in.blocks * BLOCK;  // row: index over batch x splits x heads
      const int64_t split = row / in.heads % splits, batch = row / in.heads / splits;
      const int64_t begin = in.tiles * split / splits, end = in.tiles * (split + 1) / splits;
      pass.walk(batch, row % in.heads, first, begin, end);
      pass.write(row * in.queries + first, in.block_size(first), Span(in, begin, end), out);
    }
  });
}
