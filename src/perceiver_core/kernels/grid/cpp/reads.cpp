// Structured reads on the CPU, forward and backward. `../operator.py` has the formula, `../cpp_library.py` compiles
// this file, and `../cpp.py` calls it. Plain C++17 with the vector types of GCC and Clang, without libraries.
//
// The grid is processed tile by tile, while a block of queries stays in registers and level-1 cache. A tile holds up to
// `TILE` tokens along the last axis. The softmax is online. Nothing of size queries x tokens is written to memory, and
// no memory is needed that grows with the grid: a thread processes one window of the grid at a time, and copies of
// results for different parts of the grid are limited to `MAX_RESULT_BYTES`.
//
//     score[q, m] = scale[m] * (sum_k content_queries[q, k] content[k, m] + sum_axes axis_queries[q, i_axis(m)])
//     p[q, m] = softmax of score[q, m] over m
//     read[q, k] = sum_m p[q, m] scale[m] content[k, m]
//     marginals[q, i] = sum of p[q, m] scale[m] over the tokens m at position i along an axis
//
// The functions return 0, or the number of bytes of working memory that could not be allocated. They throw nothing.

#include "backward.h"
#include "forward.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Version of the functions' arguments and results; equals `VERSION` in `../cpp_library.py`.
EXPORTED int64_t read_grid_version() { return 1; }

#define FUNCTIONS(T, NAME)                                                                                             \
  EXPORTED int64_t forward_##NAME(                                                                                     \
      int64_t batch, int64_t query_batch, int64_t heads, int64_t queries, int64_t channels, int64_t axes,              \
      const int64_t* grid, const T* content_queries, const T* axis_queries, const T* content, const T* scale,          \
      const uint8_t* mask, T* read, T* marginals, T* base, T* total, int64_t threads) {                                \
    Inputs<T> in{batch, query_batch, heads, queries, channels, axes, grid, content_queries, axis_queries, content,     \
                 scale, mask};                                                                                         \
    in.derive_sizes();                                                                                                 \
    return forward<T>(in, {read, marginals, base, total}, threads);                                                    \
  }                                                                                                                    \
  EXPORTED int64_t backward_##NAME(                                                                                    \
      int64_t batch, int64_t query_batch, int64_t heads, int64_t queries, int64_t channels, int64_t axes,              \
      const int64_t* grid, const T* content_queries, const T* axis_queries, const T* content, const T* scale,          \
      const uint8_t* mask, const T* base, const T* total, const T* d_read, const T* d_marginals, const T* offset,      \
      T* d_content_queries, T* d_axis_queries, T* d_content, T* d_scale, int64_t threads) {                            \
    Inputs<T> in{batch, query_batch, heads, queries, channels, axes, grid, content_queries, axis_queries, content,     \
                 scale, mask};                                                                                         \
    in.derive_sizes();                                                                                                 \
    return backward<T>(in, {base, total, d_read, d_marginals, offset},                                                 \
                       {d_content_queries, d_axis_queries, d_content, d_scale}, threads);                              \
  }

FUNCTIONS(float, float32)
FUNCTIONS(double, float64)
