// Matrix products between a block of queries and a tile of tokens: scores before scaling, sums over tokens, and sums
// over queries.

#pragma once

#include "grid.h"

// out[q, j] = row[q] + column[q, j] + sum_k coefficients[q, k] content[k, j]
template <class T>
void compute_products(T* out, const T* row, const T* column, int64_t column_stride, const T* coefficients,
                      const Tile<T>& tile, int64_t channels) {
  for (int q = 0; q < BLOCK; q += QUAD)
    for (int64_t j = 0; j < tile.padded; j += LANES<T>) {
      vec<T> sums[QUAD];
      for (int i = 0; i < QUAD; i++) sums[i] = load<T>(column + (q + i) * column_stride + j) + row[q + i];
      for (int64_t k = 0; k < channels; k++) {
        const vec<T> value = load<T>(&tile.content[k * tile.stride + j]);
        for (int i = 0; i < QUAD; i++) sums[i] += coefficients[(q + i) * channels + k] * value;
      }
      for (int i = 0; i < QUAD; i++) store<T>(out + (q + i) * tile.stride + j, sums[i]);
    }
}

// out[q, k] += sum_j weights[q, j] content[k, j], for the K channels from k on; `out` has an entry per vector lane
template <class T, int K>
inline void add_channel_sums(T* out, const T* weights, const Tile<T>& tile, int64_t channels, int64_t k) {
  for (int q = 0; q < BLOCK; q += QUAD) {
    T* to = out + (q * channels + k) * LANES<T>;
    vec<T> sums[QUAD][K] = {};
    for (int64_t j = 0; j < tile.padded; j += LANES<T>) {
      vec<T> values[K];
      for (int c = 0; c < K; c++) values[c] = load<T>(&tile.content[(k + c) * tile.stride + j]);
      for (int i = 0; i < QUAD; i++) {
        const vec<T> weight = load<T>(weights + (q + i) * tile.stride + j);
        for (int c = 0; c < K; c++) sums[i][c] += weight * values[c];
      }
    }
    for (int i = 0; i < QUAD; i++)
      for (int c = 0; c < K; c++) {
        T* lanes = to + (i * channels + c) * LANES<T>;
        store<T>(lanes, load<T>(lanes) + sums[i][c]);
      }
  }
}

template <class T> void add_content_sums(T* out, const T* weights, const Tile<T>& tile, int64_t channels) {
  int64_t k = 0;
  for (; k + 4 <= channels; k += 4) add_channel_sums<T, 4>(out, weights, tile, channels, k);
  if (channels - k == 3) add_channel_sums<T, 3>(out, weights, tile, channels, k);
  if (channels - k == 2) add_channel_sums<T, 2>(out, weights, tile, channels, k);
  if (channels - k == 1) add_channel_sums<T, 1>(out, weights, tile, channels, k);
}

// out[k, j] += sum_q content_queries[q, k] d_products[q, j] + d_read[q, k] weights[q, j]
template <class T>
void add_token_sums(T* out, const T* content_queries, const T* d_products, const T* d_read, const T* weights,
                    const Tile<T>& tile, int64_t channels) {
  for (int64_t k = 0; k < channels; k++)
    for (int64_t j = 0; j < tile.padded; j += LANES<T>) {
      vec<T> sums = load<T>(out + k * tile.stride + j);
      for (int q = 0; q < BLOCK; q++) {
        sums += content_queries[q * channels + k] * load<T>(d_products + q * tile.stride + j);
        sums += d_read[q * channels + k] * load<T>(weights + q * tile.stride + j);
      }
      store<T>(out + k * tile.stride + j, sums);
    }
}
