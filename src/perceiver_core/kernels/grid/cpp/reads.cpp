// Reads of a position-encoded grid, forward and backward, for the CPU. `../op.py` says what is computed; `../native.py`
// compiles this and calls it. Plain C++17 with the vector types of GCC and Clang, no library.
//
// A block of latents stays in registers and level-1 cache and walks the grid tile by tile, a tile being up to `TILE`
// tokens along the last axis. Softmax is online. Nothing of size latents x inputs is written to memory.
//
//     score[l, m] = r[m] * (sum_k a[l, k] x[k, m] + sum_axes u[l, i_axis(m)])        p = softmax over m
//     y[l, k] = sum_m p r x[k, m]        marg[l, i] = sum of p r over the tokens with index i along their axis

#include "backward.h"
#include "forward.h"

#define EXPORTED(T, NAME)                                                                                              \
  extern "C" __attribute__((visibility("default"))) void forward_##NAME(                                               \
      int64_t batch, int64_t query_batch, int64_t heads, int64_t latents, int64_t channels, int64_t axes,              \
      const int64_t* grid, const T* a, const T* u, const T* x, const T* r, const uint8_t* keep, T* y, T* marg,         \
      T* base, T* total, int64_t splits, int64_t threads) {                                                            \
    Read<T> read{batch, query_batch, heads, latents, channels, axes, grid, a, u, x, r, keep};                          \
    read.measure();                                                                                                    \
    forward<T>(read, {y, marg, base, total}, splits, threads);                                                         \
  }                                                                                                                    \
  extern "C" __attribute__((visibility("default"))) void backward_##NAME(                                              \
      int64_t batch, int64_t query_batch, int64_t heads, int64_t latents, int64_t channels, int64_t axes,              \
      const int64_t* grid, const T* a, const T* u, const T* x, const T* r, const uint8_t* keep, const T* base,         \
      const T* total, const T* d_y, const T* d_marg, const T* offset, T* d_a, T* d_u, T* d_x, T* d_r, int64_t splits,  \
      int64_t threads) {                                                                                               \
    Read<T> read{batch, query_batch, heads, latents, channels, axes, grid, a, u, x, r, keep};                          \
    read.measure();                                                                                                    \
    backward<T>(read, {base, total, d_y, d_marg, offset}, {d_a, d_u, d_x, d_r}, splits, threads);                      \
  }

EXPORTED(float, float32)
EXPORTED(double, float64)
