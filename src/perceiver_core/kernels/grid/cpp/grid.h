// What a block of latents meets on its walk over the grid: tiles of tokens; and what it asks them, and sums up of them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "vectors.h"

constexpr int BLOCK = 16;   // latents a task holds
constexpr int QUAD = 4;     // latents that share a load of a token
constexpr int TILE = 256;   // most tokens a tile holds; fewer where they have many channels

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A read: its sizes and what it is given. `op.py` says what the letters stand for; keep may be null: all tokens are there.
template <class T> struct Read {
  int64_t batch, query_batch, heads, latents, channels, axes;
  const int64_t* grid;
  const T *a, *u, *x, *r;
  const uint8_t* keep;
  int64_t n = 1, places = 0;              // tokens; places along all axes
  int64_t width = 0, rows = 0;            // of a row, which is along the last axis; of them
  int64_t tile = 0, tiles = 0, blocks = 0;  // tokens of a tile; tiles of a sample; blocks of latents of a head

  void measure() {
    width = grid[axes - 1];
    for (int64_t axis = 0; axis < axes; axis++) n *= grid[axis], places += grid[axis];
    rows = n / width;
    const int64_t fits = std::max<int64_t>(32, 8192 / std::max<int64_t>(channels, 1) / 32 * 32);
    tile = std::min<int64_t>(TILE, fits);
    tiles = rows * ((width + tile - 1) / tile);
    blocks = (latents + BLOCK - 1) / BLOCK;
  }
  int count(int64_t first) const { return int(std::min<int64_t>(BLOCK, latents - first)); }
};

// The places along the last axis that a walk over some tiles can come to: where it is the only axis, those of the tiles.
struct Span {
  int64_t from, to;

  template <class T>
  Span(const Read<T>& s, int64_t begin, int64_t end)
      : from(s.axes == 1 ? begin * s.tile : 0), to(s.axes == 1 ? std::min(end * s.tile, s.width) : s.width) {}
};

// The tokens of a tile, packed: channels, scale and 0 or -inf for tokens that are not there (masked, or past the end).
template <class T> struct Tile {
  int64_t start, count, padded, row, column;
  std::vector<T> x, r, bias;
  const int64_t stride;

  explicit Tile(const Read<T>& s) : x(s.channels * s.tile), r(s.tile), bias(s.tile), stride(s.tile) {}

  void pack(const Read<T>& s, int64_t batch, int64_t index) {
    const T *content = s.x + batch * s.channels * s.n, *scale = s.r + batch * s.n;
    const uint8_t* keep = s.keep ? s.keep + batch * s.n : nullptr;
    const int64_t in_row = s.tiles / s.rows;
    row = index / in_row, column = index % in_row * s.tile;
    start = row * s.width + column;
    count = std::min(s.tile, s.width - column), padded = up(count, LANES<T>);
    for (int64_t j = 0; j < padded; j++) {
      const bool there = j < count && (!keep || keep[start + j]);
      r[j] = there ? scale[start + j] : T(0);
      bias[j] = there ? T(0) : -INF<T>;
    }
    for (int64_t k = 0; k < s.channels; k++)
      for (int64_t j = 0; j < padded; j++) x[k * stride + j] = bias[j] == T(0) ? content[k * s.n + start + j] : T(0);
  }
};

// What a block of latents of one head multiplies the tokens with; zeros for latents that are not there.
template <class T> struct Latents {
  int64_t others, padded;      // entries of the axes but the last; of the last, to whole vectors
  std::vector<T> a, outer, last;  // BLOCK x channels, BLOCK x others, BLOCK x padded

  explicit Latents(const Read<T>& s)
      : others(s.places - s.width), padded(up(s.width, LANES<T>)), a(BLOCK * s.channels), outer(BLOCK * others),
        last(BLOCK * padded) {}

  void read(const Read<T>& s, Span span, int64_t first, int count, const T* content, const T* tables, T factor) {
    std::fill(a.begin(), a.end(), T(0)), std::fill(outer.begin(), outer.end(), T(0));
    for (int l = count; l < BLOCK; l++) std::fill(last.data() + l * padded + span.from, last.data() + l * padded + span.to, T(0));
    for (int l = 0; l < count; l++) {
      const T *from = tables + (first + l) * s.places, *c = content + (first + l) * s.channels;
      for (int64_t k = 0; k < s.channels; k++) a[l * s.channels + k] = c[k] * factor;
      for (int64_t i = 0; i < others; i++) outer[l * others + i] = from[i] * factor;
      for (int64_t i = span.from; i < span.to; i++) last[l * padded + i] = from[others + i] * factor;
    }
  }
};

// What a block of latents sums over the tokens. The sums over content keep the lanes of a vector apart to the end.
template <class T> struct Sums {
  int64_t others, padded, lanes;
  std::vector<T> a, outer, last;

  explicit Sums(const Read<T>& s)
      : others(s.places - s.width), padded(up(s.width, LANES<T>)), lanes(s.channels * LANES<T>), a(BLOCK * lanes),
        outer(BLOCK * others), last(BLOCK * padded) {}

  void clear(Span span) {
    std::fill(a.begin(), a.end(), T(0)), std::fill(outer.begin(), outer.end(), T(0));
    for (int l = 0; l < BLOCK; l++) std::fill(last.data() + l * padded + span.from, last.data() + l * padded + span.to, T(0));
  }

  void shrink(int l, T factor) {
    for (int64_t k = 0; k < lanes; k++) a[l * lanes + k] *= factor;
    for (int64_t i = 0; i < others; i++) outer[l * others + i] *= factor;
    for (int64_t i = 0; i < padded; i++) last[l * padded + i] *= factor;
  }

  // To row `first` of `content`, and to row `there` of `tables` what lies in the span.
  void write(const Read<T>& s, Span span, int64_t first, int64_t there, int count, T* content, T* tables,
             const T* factors) const {
    for (int l = 0; l < count; l++) {
      T *to = tables + (there + l) * s.places, *c = content + (first + l) * s.channels;
      for (int64_t k = 0; k < s.channels; k++) c[k] = sum<T>(load<T>(&a[l * lanes + k * LANES<T>])) * factors[l];
      for (int64_t i = 0; i < others; i++) to[i] = outer[l * others + i] * factors[l];
      for (int64_t i = span.from; i < span.to; i++) to[others + i] = last[l * padded + i] * factors[l];
    }
  }
};

// Where a row of the grid stands in the tables of the axes but the last.
template <class T> struct Places {
  std::vector<int64_t> at;
  void find(const Read<T>& s, int64_t row) {
    at.resize(s.axes - 1);
    int64_t offset = s.places - s.width;
    for (int64_t axis = s.axes - 2; axis >= 0; axis--) {
      offset -= s.grid[axis];
      at[axis] = offset + row % s.grid[axis];
      row /= s.grid[axis];
    }
  }
  void add_up(T* totals, const Latents<T>& of) const {
    for (int l = 0; l < BLOCK; l++) {
      totals[l] = T(0);
      for (int64_t i : at) totals[l] += of.outer[l * of.others + i];
    }
  }
  void add_to(Sums<T>& to, int l, T value) const {
    for (int64_t i : at) to.outer[l * to.others + i] += value;
  }
};
