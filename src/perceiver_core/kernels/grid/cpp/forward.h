// The forward pass.

#pragma once

#include "grid.h"
#include "products.h"
#include "threads.h"

// Reads of parts of the grid, batch x splits x heads x latents x ...; `base` is in powers of two.
template <class T> struct Results {
  T *y, *marg, *base, *total;
};

// One thread's walk of a block of latents over a range of tiles.
template <class T> struct Forward {
  static constexpr T SLACK = 16;  // how far, in powers of two, a score may exceed the base before sums are scaled anew
  const Read<T>& s;
  Latents<T> asks;
  Sums<T> sums;
  Tile<T> tile;
  Places<T> places;
  std::vector<T> work;
  T base[BLOCK];
  vec<T> total[BLOCK];

  explicit Forward(const Read<T>& read) : s(read), asks(read), sums(read), tile(read), work(BLOCK * read.tile) {}

  void walk(int64_t batch, int64_t head, int64_t first, int64_t begin, int64_t end) {
    const int count = s.count(first);
    const int64_t asked = s.query_batch == 1 ? head : batch * s.heads + head;
    const Span span(s, begin, end);
    asks.read(s, span, asked * s.latents + first, count, s.a, s.u, T(LOG2E));
    sums.clear(span);
    for (int l = 0; l < BLOCK; l++) base[l] = -INF<T>, total[l] = zeros<T>();
    T row[BLOCK];
    for (int64_t index = begin; index < end; index++) {
      tile.pack(s, batch, index);
      places.find(s, tile.row);
      places.add_up(row, asks);
      scores<T>(work.data(), row, &asks.last[tile.column], asks.padded, asks.a.data(), tile, s.channels);
      for (int l = 0; l < count; l++) {
        raise_base(l, scaled_scores(&work[l * s.tile]));
        weigh(l, &work[l * s.tile]);
      }
      gather<T>(sums.a.data(), work.data(), tile, s.channels);
    }
  }

  // Scores times scale, -inf for tokens that are not there; gives the highest.
  T scaled_scores(T* weights) const {
    vec<T> top = zeros<T>() - INF<T>;
    for (int64_t j = 0; j < tile.padded; j += LANES<T>) {
      const vec<T> score = load<T>(weights + j) * load<T>(&tile.r[j]) + load<T>(&tile.bias[j]);
      store<T>(weights + j, score);
      top = top > score ? top : score;
    }
    return highest<T>(top);
  }

  void raise_base(int l, T peak) {
    if (!(peak > base[l] + SLACK)) return;
    if (base[l] != -INF<T>) {
      const T factor = std::exp2(base[l] - peak);
      total[l] *= factor;
      sums.shrink(l, factor);
    }
    base[l] = peak;
  }

  // Scores to weights times scale; summed up by themselves and for every place.
  void weigh(int l, T* weights) {
    const T from = base[l] == -INF<T> ? T(0) : base[l];
    vec<T> all = zeros<T>(), scaled = zeros<T>();
    T* column = &sums.last[l * sums.padded + tile.column];
    for (int64_t j = 0; j < tile.padded; j += LANES<T>) {
      vec<T> p = exp2(load<T>(weights + j) - from);
      all += p;
      p *= load<T>(&tile.r[j]);
      scaled += p;
      store<T>(weights + j, p);
      store<T>(column + j, load<T>(column + j) + p);
    }
    total[l] += all;
    if (s.axes > 1) places.add_to(sums, l, sum<T>(scaled));
  }

  // Latents that met no token have a total of 0, and base 0.
  void write(int64_t there, int count, Span span, const Results<T>& to) const {
    T factors[BLOCK];
    for (int l = 0; l < count; l++) {
      const T all = sum<T>(total[l]);
      factors[l] = all > 0 ? 1 / all : T(0);
      to.base[there + l] = all > 0 ? base[l] : T(0), to.total[there + l] = all;
    }
    sums.write(s, span, there, there, count, to.y, to.marg, factors);
  }
};

template <class T> void forward(const Read<T>& s, const Results<T>& to, int64_t splits, int64_t threads) {
  const int64_t tasks = s.batch * splits * s.heads * s.blocks;
  in_parallel(tasks, threads, [&](std::atomic<int64_t>& next) {
    Forward<T> one(s);
    for (int64_t task; (task = next++) < tasks;) {
      const int64_t row = task / s.blocks, first = task % s.blocks * BLOCK;  // row: of batch x splits x heads
      const int64_t part = row / s.heads % splits, batch = row / s.heads / splits;
      const int64_t begin = s.tiles * part / splits, end = s.tiles * (part + 1) / splits;
      one.walk(batch, row % s.heads, first, begin, end);
      one.write(row * s.latents + first, s.count(first), Span(s, begin, end), to);
    }
  });
}
