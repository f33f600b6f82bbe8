// The products of a block of latents with a tile of tokens: scores, and their two transposes.

#pragma once

#include "grid.h"

// out[l, j] = row[l] + table[l, j] + sum_k a[l, k] x[k, j]
template <class T>
void scores(T* out, const T* row, const T* table, int64_t table_stride, const T* a, const Tile<T>& t, int64_t channels) {
  for (int l = 0; l < BLOCK; l += QUAD)
    for (int64_t j = 0; j < t.padded; j += LANES<T>) {
      vec<T> sums[QUAD];
      for (int q = 0; q < QUAD; q++) sums[q] = load<T>(table + (l + q) * table_stride + j) + row[l + q];
      for (int64_t k = 0; k < channels; k++) {
        const vec<T> x = load<T>(&t.x[k * t.stride + j]);
        for (int q = 0; q < QUAD; q++) sums[q] += a[(l + q) * channels + k] * x;
      }
      for (int q = 0; q < QUAD; q++) store<T>(out + (l + q) * t.stride + j, sums[q]);
    }
}

// out[l, k] += sum_j weights[l, j] x[k, j], lane by lane, for K channels from k on
template <class T, int K>
inline void gather_some(T* out, const T* weights, const Tile<T>& t, int64_t channels, int64_t k) {
  for (int l = 0; l < BLOCK; l += QUAD) {
    T* to = out + (l * channels + k) * LANES<T>;
    vec<T> sums[QUAD][K] = {};
    for (int64_t j = 0; j < t.padded; j += LANES<T>) {
      vec<T> x[K];
      for (int i = 0; i < K; i++) x[i] = load<T>(&t.x[(k + i) * t.stride + j]);
      for (int q = 0; q < QUAD; q++) {
        const vec<T> w = load<T>(weights + (l + q) * t.stride + j);
        for (int i = 0; i < K; i++) sums[q][i] += w * x[i];
      }
    }
    for (int q = 0; q < QUAD; q++)
      for (int i = 0; i < K; i++) {
        T* lane = to + (q * channels + i) * LANES<T>;
        store<T>(lane, load<T>(lane) + sums[q][i]);
      }
  }
}

template <class T> void gather(T* out, const T* weights, const Tile<T>& t, int64_t channels) {
  int64_t k = 0;
  for (; k + 4 <= channels; k += 4) gather_some<T, 4>(out, weights, t, channels, k);
  if (channels - k == 3) gather_some<T, 3>(out, weights, t, channels, k);
  if (channels - k == 2) gather_some<T, 2>(out, weights, t, channels, k);
  if (channels - k == 1) gather_some<T, 1>(out, weights, t, channels, k);
}

// out[k, j] += sum_l a[l, k] s[l, j] + b[l, k] p[l, j]
template <class T>
void scatter(T* out, const T* a, const T* s, const T* b, const T* p, const Tile<T>& t, int64_t channels) {
  for (int64_t k = 0; k < channels; k++)
    for (int64_t j = 0; j < t.padded; j += LANES<T>) {
      vec<T> sums = load<T>(out + k * t.stride + j);
      for (int l = 0; l < BLOCK; l++) {
        sums += a[l * channels + k] * load<T>(s + l * t.stride + j);
        sums += b[l * channels + k] * load<T>(p + l * t.stride + j);
      }
      store<T>(out + k * t.stride + j, sums);
    }
}
