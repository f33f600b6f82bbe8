// The backward pass: the weights are computed again, and the gradients of scores follow from them.

#pragma once

#include <cstring>

#include "grid.h"
#include "products.h"
#include "threads.h"

// What `forward` gave, and what came back. offset = d_lse - sum of d_y * y - sum of d_marg * marg, for every latent.
template <class T> struct Returned {
  const T *base, *total, *d_y, *d_marg, *offset;
};

// a, u: a part for each range of tiles, batch x splits x heads x latents x ...; but of a grid of one axis the ranges
// are places of their own, and u has one part. x and r may be null: not wanted.
template <class T> struct Gradients {
  T *a, *u, *x, *r;
};

// One thread's walk over a range of tiles, with one block of latents after the other.
template <class T> struct Backward {
  const Read<T>& s;
  const Returned<T>& from;
  const Gradients<T>& to;
  Latents<T> asks, gives;
  Sums<T> sums;
  Tile<T> tile;
  Places<T> places;
  std::vector<T> one, two;  // scores, then their gradients; gradients of the weights, then the weights; with scale
  std::vector<T> d_tokens;  // channels, then scale
  std::vector<T> plain;     // a as it was given

  Backward(const Read<T>& read, const Returned<T>& from, const Gradients<T>& to)
      : s(read), from(from), to(to), asks(read), gives(read), sums(read), tile(read), one(BLOCK * read.tile),
        two(BLOCK * read.tile), d_tokens((read.channels + 1) * read.tile), plain(BLOCK * read.channels) {}

  void walk(int64_t batch, int64_t head, int64_t first, int64_t begin, int64_t end) {
    const int count = s.count(first);
    const int64_t here = (batch * s.heads + head) * s.latents + first;
    const Span span(s, begin, end);
    asks.read(s, span, s.query_batch == 1 ? head * s.latents + first : here, count, s.a, s.u, T(LOG2E));
    gives.read(s, span, here, count, from.d_y, from.d_marg, T(1));
    for (size_t i = 0; i < plain.size(); i++) plain[i] = asks.a[i] * T(1 / LOG2E);
    sums.clear(span);
    std::fill(one.begin(), one.end(), T(0)), std::fill(two.begin(), two.end(), T(0));
    T row[BLOCK], d_row[BLOCK];
    for (int64_t index = begin; index < end; index++) {
      tile.pack(s, batch, index);
      places.find(s, tile.row);
      places.add_up(row, asks), places.add_up(d_row, gives);
      scores<T>(one.data(), row, &asks.last[tile.column], asks.padded, asks.a.data(), tile, s.channels);
      scores<T>(two.data(), d_row, &gives.last[tile.column], gives.padded, gives.a.data(), tile, s.channels);
      if (to.x) fetch(batch, head == 0 && first == 0);
      for (int l = 0; l < count; l++) weigh(l, here + l);
      gather<T>(sums.a.data(), one.data(), tile, s.channels);
      if (to.x) keep(batch);
    }
  }

  // What earlier blocks of latents left for the tokens of the tile.
  void fetch(int64_t batch, bool none) {
    for (int64_t k = 0; k <= s.channels; k++) {
      const T* earlier = channel(batch, k);
      for (int64_t j = 0; j < tile.padded; j++)
        d_tokens[k * s.tile + j] = none || j >= tile.count ? T(0) : earlier[tile.start + j];
    }
  }

  void keep(int64_t batch) {
    scatter<T>(d_tokens.data(), plain.data(), one.data(), gives.a.data(), two.data(), tile, s.channels);
    for (int64_t k = 0; k <= s.channels; k++)
      std::memcpy(channel(batch, k) + tile.start, &d_tokens[k * s.tile], tile.count * sizeof(T));
  }

  T* channel(int64_t batch, int64_t k) const {
    return k < s.channels ? to.x + (batch * s.channels + k) * s.n : to.r + batch * s.n;
  }

  // Scores and gradients of weights to gradients of scores and weights, both times scale.
  void weigh(int l, int64_t here) {
    T *score_of = &one[l * s.tile], *gift_of = &two[l * s.tile], *d_scale = &d_tokens[s.channels * s.tile];
    T* column = &sums.last[l * sums.padded + tile.column];
    const T base = from.base[here], inverse = from.total[here] > 0 ? 1 / from.total[here] : T(0);
    const T shift = from.offset[here];
    vec<T> scaled = zeros<T>();
    for (int64_t j = 0; j < tile.padded; j += LANES<T>) {
      const vec<T> scale = load<T>(&tile.r[j]), score = load<T>(score_of + j), gift = load<T>(gift_of + j);
      const vec<T> p = exp2(score * scale + load<T>(&tile.bias[j]) - base) * inverse;
      const vec<T> d_score = p * (gift * scale + shift);
      const vec<T> d_scaled = d_score * scale;
      if (to.x) store<T>(d_scale + j, load<T>(d_scale + j) + d_score * (score * T(1 / LOG2E)) + p * gift);
      scaled += d_scaled;
      store<T>(column + j, load<T>(column + j) + d_scaled);
      store<T>(score_of + j, d_scaled), store<T>(gift_of + j, p * scale);
    }
    if (s.axes > 1) places.add_to(sums, l, sum<T>(scaled));
  }
};

template <class T>
void backward(const Read<T>& s, const Returned<T>& from, const Gradients<T>& to, int64_t splits, int64_t threads) {
  static constexpr T ONES[BLOCK] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  in_parallel(s.batch * splits, threads, [&](std::atomic<int64_t>& next) {
    Backward<T> one(s, from, to);
    for (int64_t task; (task = next++) < s.batch * splits;) {
      const int64_t batch = task / splits, part = task % splits;
      const int64_t begin = s.tiles * part / splits, end = s.tiles * (part + 1) / splits;
      for (int64_t block = 0; block < s.heads * s.blocks; block++) {
        const int64_t head = block / s.blocks, first = block % s.blocks * BLOCK;
        const int64_t there = (task * s.heads + head) * s.latents + first;
        const int64_t place = s.axes > 1 ? there : (batch * s.heads + head) * s.latents + first;
        one.walk(batch, head, first, begin, end);
        one.sums.write(s, Span(s, begin, end), there, place, s.count(first), to.a, to.u, ONES);
      }
    }
  });
}
