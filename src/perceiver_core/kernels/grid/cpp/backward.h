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

// Gradients of content queries and axis queries for each split: batch x splits x heads x queries x ... If the grid has
// a single axis, each split has its own positions, so all splits write to one axis-query gradient without a split axis.
// Gradients of content and scale are null if they are not needed.
template <class T> struct Gradients {
  T *content_queries, *axis_queries, *content, *scale;
};

// State of one thread. `walk` processes a range of tiles for one block of queries.
template <class T> struct Backward {
  const Inputs<T>& in;
  const Upstream<T>& upstream;
  const Gradients<T>& out;
  Coefficients<T> coefficients, d_coefficients;
  Sums<T> sums;
  Tile<T> tile;
  RowPositions<T> positions;
  std::vector<T> products, d_weights;  // overwritten with gradients of products, and weights times scale
  std::vector<T> d_tokens;             // gradients of a tile: channels, then scale
  std::vector<T> content_queries;      // without the factor log2(e)

  Backward(const Inputs<T>& in, const Upstream<T>& upstream, const Gradients<T>& out)
      : in(in), upstream(upstream), out(out), coefficients(in), d_coefficients(in), sums(in), tile(in),
        products(BLOCK * in.tile), d_weights(BLOCK * in.tile), d_tokens((in.channels + 1) * in.tile),
        content_queries(BLOCK * in.channels) {}

  void walk(int64_t batch, int64_t head, int64_t first, int64_t begin, int64_t end) {
    const int count = in.block_size(first);
    const int64_t first_row = (batch * in.heads + head) * in.queries + first;
    const Span span(in, begin, end);
    coefficients.load_block(in, span, in.query_batch == 1 ? head * in.queries + first : first_row, count,
                            in.content_queries, in.axis_queries, T(LOG2E));
    d_coefficients.load_block(in, span, first_row, count, upstream.d_read, upstream.d_marginals, T(1));
    for (size_t i = 0; i < content_queries.size(); i++) content_queries[i] = coefficients.content[i] * T(1 / LOG2E);
    sums.clear(span);
    std::fill(products.begin(), products.end(), T(0)), std::fill(d_weights.begin(), d_weights.end(), T(0));
    T row[BLOCK], d_row[BLOCK];
    for (int64_t index = begin; index < end; index++) {
      tile.pack(in, batch, index);
      positions.find(in, tile.row);
      positions.gather(row, coefficients), positions.gather(d_row, d_coefficients);
      compute_products<T>(products.data(), row, &coefficients.last[tile.column], coefficients.padded,
                          coefficients.content.data(), tile, in.channels);
      compute_products<T>(d_weights.data(), d_row, &d_coefficients.last[tile.column], d_coefficients.padded,
                          d_coefficients.content.data(), tile, in.channels);
      if (out.content) load_token_gradients(batch, head == 0 && first == 0);
      for (int q = 0; q < count; q++) differentiate(q, first_row + q);
      add_content_sums<T>(sums.content.data(), products.data(), tile, in.channels);
      if (out.content) store_token_gradients(batch);
    }
  }

  // Loads the token gradients summed over earlier blocks of queries, or zeros for the first block.
  void load_token_gradients(int64_t batch, bool is_first) {
    for (int64_t k = 0; k <= in.channels; k++) {
      const T* earlier = token_gradient(batch, k);
      for (int64_t j = 0; j < tile.padded; j++)
        d_tokens[k * in.tile + j] = is_first || j >= tile.count ? T(0) : earlier[tile.start + j];
    }
  }

  void store_token_gradients(int64_t batch) {
    add_token_sums<T>(d_tokens.data(), content_queries.data(), products.data(), d_coefficients.content.data(),
                      d_weights.data(), tile, in.channels);
    for (int64_t k = 0; k <= in.channels; k++)
      std::memcpy(token_gradient(batch, k) + tile.start, &d_tokens[k * in.tile], tile.count * sizeof(T));
  }

  T* token_gradient(int64_t batch, int64_t k) const {
    return k < in.channels ? out.content + (batch * in.channels + k) * in.tokens : out.scale + batch * in.tokens;
  }

  // Overwrites products with their gradients, and gradients of weights with weights times scale.
  void differentiate(int q, int64_t query_row) {
    T *product_row = &products[q * in.tile], *d_weight_row = &d_weights[q * in.tile];
    T *d_scale = &d_tokens[in.channels * in.tile], *column = &sums.last[q * sums.padded + tile.column];
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
    if (in.axes > 1) positions.add_to(sums, q, sum<T>(row_sum));
  }
};

template <class T>
void backward(const Inputs<T>& in, const Upstream<T>& upstream, const Gradients<T>& out, int64_t splits,
              int64_t threads) {
  static constexpr T ONES[BLOCK] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  run_parallel(in.batch * splits, threads, [&](std::atomic<int64_t>& next) {
    Backward<T> pass(in, upstream, out);
    for (int64_t task; (task = next++) < in.batch * splits;) {
      const int64_t batch = task / splits, split = task % splits;
      const int64_t begin = in.tiles * split / splits, end = in.tiles * (split + 1) / splits;
      for (int64_t block = 0; block < in.heads * in.blocks; block++) {
        const int64_t head = block / in.blocks, first = block % in.blocks * BLOCK;
        const int64_t content_row = (task * in.heads + head) * in.queries + first;
        const int64_t axes_row = in.axes > 1 ? content_row : (batch * in.heads + head) * in.queries + first;
        pass.walk(batch, head, first, begin, end);
        pass.sums.write(in, Span(in, begin, end), content_row, axes_row, in.block_size(first), out.content_queries,
                        out.axis_queries, ONES);
      }
    }
  });
}
