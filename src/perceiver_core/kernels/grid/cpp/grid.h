// Data structures: inputs, tiles of tokens, and the coefficients and sums of a block of queries.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "vectors.h"

constexpr int BLOCK = 16;   // queries per block
constexpr int QUAD = 4;     // queries that are computed together and share each load of a token
constexpr int TILE = 256;   // maximum number of tokens per tile; less if there are many channels

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Sizes and tensors of a read, see `../interface.py`. The mask is null if all tokens are attended to.
template <class T> struct Inputs {
  int64_t batch, query_batch, heads, queries, channels, axes;
  const int64_t* grid;
  const T *content_queries, *axis_queries, *content, *scale;
  const uint8_t* mask;
  int64_t tokens = 1, axis_positions = 0;   // tokens per sample; positions along all axes
  int64_t width = 0, rows = 0;              // size of the last axis; product of the other sizes
  int64_t tile = 0, tiles = 0, blocks = 0;  // tokens per tile; tiles per sample; blocks of queries per head

  void derive_sizes() {
    width = grid[axes - 1];
    for (int64_t axis = 0; axis < axes; axis++) tokens *= grid[axis], axis_positions += grid[axis];
    rows = tokens / width;
    const int64_t fits = std::max<int64_t>(32, 8192 / std::max<int64_t>(channels, 1) / 32 * 32);
    tile = std::min<int64_t>(TILE, fits);
    tiles = rows * ((width + tile - 1) / tile);
    blocks = (queries + BLOCK - 1) / BLOCK;
  }
  int block_size(int64_t first) const { return int(std::min<int64_t>(BLOCK, queries - first)); }
};

// Range of positions along the last axis in a range of tiles: the tiles' own if it is the only axis, otherwise all.
struct Span {
  int64_t from, to;

  template <class T>
  Span(const Inputs<T>& in, int64_t begin, int64_t end)
      : from(in.axes == 1 ? begin * in.tile : 0), to(in.axes == 1 ? std::min(end * in.tile, in.width) : in.width) {}
};

// Packed tokens of a tile: content, scale, and a score bias of 0, or -inf for tokens that are masked or past the end.
template <class T> struct Tile {
  int64_t start, count, padded, row, column;
  std::vector<T> content, scale, bias;
  const int64_t stride;

  explicit Tile(const Inputs<T>& in) : content(in.channels * in.tile), scale(in.tile), bias(in.tile), stride(in.tile) {}

  void pack(const Inputs<T>& in, int64_t batch, int64_t index) {
    const T *from = in.content + batch * in.channels * in.tokens, *scales = in.scale + batch * in.tokens;
    const uint8_t* mask = in.mask ? in.mask + batch * in.tokens : nullptr;
    const int64_t in_row = in.tiles / in.rows;
    row = index / in_row, column = index % in_row * in.tile;
    start = row * in.width + column;
    count = std::min(in.tile, in.width - column), padded = round_up(count, LANES<T>);
    for (int64_t j = 0; j < padded; j++) {
      const bool valid = j < count && (!mask || mask[start + j]);
      scale[j] = valid ? scales[start + j] : T(0);
      bias[j] = valid ? T(0) : -INF<T>;
    }
    for (int64_t k = 0; k < in.channels; k++)
      for (int64_t j = 0; j < padded; j++)
        content[k * stride + j] = bias[j] == T(0) ? from[k * in.tokens + start + j] : T(0);
  }
};

// Content coefficients and axis terms of a block of queries; zeros for queries past the end.
template <class T> struct Coefficients {
  int64_t outer_positions, padded;      // positions along all other axes; along the last axis, padded to whole vectors
  std::vector<T> content, outer, last;  // BLOCK x channels, BLOCK x outer_positions, BLOCK x padded

  explicit Coefficients(const Inputs<T>& in)
      : outer_positions(in.axis_positions - in.width), padded(round_up(in.width, LANES<T>)),
        content(BLOCK * in.channels), outer(BLOCK * outer_positions), last(BLOCK * padded) {}

  void load_block(const Inputs<T>& in, Span span, int64_t first, int count, const T* of_content, const T* of_axes,
                  T factor) {
    std::fill(content.begin(), content.end(), T(0)), std::fill(outer.begin(), outer.end(), T(0));
    for (int q = count; q < BLOCK; q++)
      std::fill(last.data() + q * padded + span.from, last.data() + q * padded + span.to, T(0));
    for (int q = 0; q < count; q++) {
      const T *axes = of_axes + (first + q) * in.axis_positions, *channels = of_content + (first + q) * in.channels;
      for (int64_t k = 0; k < in.channels; k++) content[q * in.channels + k] = channels[k] * factor;
      for (int64_t i = 0; i < outer_positions; i++) outer[q * outer_positions + i] = axes[i] * factor;
      for (int64_t i = span.from; i < span.to; i++) last[q * padded + i] = axes[outer_positions + i] * factor;
    }
  }
};

// Sums over tokens for a block of queries. Content sums have one entry per vector lane; `write` adds up the lanes.
template <class T> struct Sums {
  int64_t outer_positions, padded, lanes;
  std::vector<T> content, outer, last;

  explicit Sums(const Inputs<T>& in)
      : outer_positions(in.axis_positions - in.width), padded(round_up(in.width, LANES<T>)),
        lanes(in.channels * LANES<T>), content(BLOCK * lanes), outer(BLOCK * outer_positions), last(BLOCK * padded) {}

  void clear(Span span) {
    std::fill(content.begin(), content.end(), T(0)), std::fill(outer.begin(), outer.end(), T(0));
    for (int q = 0; q < BLOCK; q++)
      std::fill(last.data() + q * padded + span.from, last.data() + q * padded + span.to, T(0));
  }

  void rescale(int q, T factor) {
    for (int64_t k = 0; k < lanes; k++) content[q * lanes + k] *= factor;
    for (int64_t i = 0; i < outer_positions; i++) outer[q * outer_positions + i] *= factor;
    for (int64_t i = 0; i < padded; i++) last[q * padded + i] *= factor;
  }

  // Writes `count` rows from `content_row` and `axes_row` on; along the last axis, only the positions in `span`.
  void write(const Inputs<T>& in, Span span, int64_t content_row, int64_t axes_row, int count, T* to_content,
             T* to_axes, const T* factors) const {
    for (int q = 0; q < count; q++) {
      T *axes = to_axes + (axes_row + q) * in.axis_positions, *channels = to_content + (content_row + q) * in.channels;
      for (int64_t k = 0; k < in.channels; k++)
        channels[k] = sum<T>(load<T>(&content[q * lanes + k * LANES<T>])) * factors[q];
      for (int64_t i = 0; i < outer_positions; i++) axes[i] = outer[q * outer_positions + i] * factors[q];
      for (int64_t i = span.from; i < span.to; i++) axes[outer_positions + i] = last[q * padded + i] * factors[q];
    }
  }
};

// Positions of a grid row along all axes but the last, as indices into `Coefficients::outer` and `Sums::outer`.
template <class T> struct RowPositions {
  std::vector<int64_t> positions;
  void find(const Inputs<T>& in, int64_t row) {
    positions.resize(in.axes - 1);
    int64_t offset = in.axis_positions - in.width;
    for (int64_t axis = in.axes - 2; axis >= 0; axis--) {
      offset -= in.grid[axis];
      positions[axis] = offset + row % in.grid[axis];
      row /= in.grid[axis];
    }
  }
  void gather(T* totals, const Coefficients<T>& coefficients) const {
    for (int q = 0; q < BLOCK; q++) {
      totals[q] = T(0);
      for (int64_t i : positions) totals[q] += coefficients.outer[q * coefficients.outer_positions + i];
    }
  }
  void add_to(Sums<T>& sums, int q, T value) const {
    for (int64_t i : positions) sums.outer[q * sums.outer_positions + i] += value;
  }
};
