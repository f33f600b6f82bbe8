// Data structures: inputs, tiles of tokens, and the coefficients and sums of a block of queries.

#pragma once

#include <algorithm>
#include <cstdint>

#include "memory.h"
#include "vectors.h"

constexpr int BLOCK = 16;  // queries per block
constexpr int QUAD = 4;    // queries that are computed together and share each load of a token
constexpr int TILE = 256;  // maximum number of tokens per tile; less if there are many channels

// A window of the grid has up to `MAX_ROWS` rows and `MAX_COLUMNS` columns. They bound the memory of a thread.
constexpr int64_t MAX_ROWS = 256;
template <class T> constexpr int64_t MAX_COLUMNS = 4096 / sizeof(T);

constexpr int64_t MIN_TASKS = 32;  // target number of tasks; not the number of threads, so that results are reproducible
constexpr int64_t MIN_TOKENS = 4;  // minimum tokens in a split, per number that it returns for a query
constexpr int64_t MAX_RESULT_BYTES = 1 << 24;  // maximum memory for results of tasks that are not yet merged

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Sizes and tensors of a read, see `../interface.py`. The mask is null if all tokens are attended to.
template <class T> struct Inputs {
  int64_t batch, query_batch, heads, queries, channels, axes;
  const int64_t* grid;
  const T *content_queries, *axis_queries, *content, *scale;
  const uint8_t* mask;
  int64_t tokens = 1, axis_positions = 0;   // tokens per sample; positions along all axes
  int64_t width = 0, outer_positions = 0;   // size of the last axis; positions along all other axes
  int64_t tile = 0, tiles = 0, blocks = 0;  // tokens per tile; tiles per sample; blocks of queries per head
  int64_t row_tiles = 0, window_tiles = 0;  // tiles per row of the grid, and per row of a window

  void derive_sizes() {
    width = grid[axes - 1];
    for (int64_t axis = 0; axis < axes; axis++) tokens *= grid[axis], axis_positions += grid[axis];
    outer_positions = axis_positions - width;
    const int64_t fits = std::max<int64_t>(32, 8192 / std::max<int64_t>(channels, 1) / 32 * 32);
    tile = std::min<int64_t>(TILE, fits);
    row_tiles = (width + tile - 1) / tile;
    window_tiles = std::min(row_tiles, MAX_COLUMNS<T> / tile);
    tiles = tokens / width * row_tiles;
    blocks = (queries + BLOCK - 1) / BLOCK;
  }
  int block_size(int64_t first) const { return int(std::min<int64_t>(BLOCK, queries - first)); }
  int64_t window_rows() const { return std::min(MAX_ROWS, tokens / width); }
  int64_t window_columns() const { return std::min(window_tiles * tile, round_up(width, LANES<T>)); }

  // Number of splits of the grid that are processed in parallel, if there are `tasks` tasks for each.
  int64_t num_splits(int64_t tasks, int64_t numbers_per_query, int64_t most) const {
    const int64_t wanted = std::min((MIN_TASKS + tasks - 1) / tasks, most);
    return std::max<int64_t>(1, std::min(wanted, tokens / (MIN_TOKENS * numbers_per_query)));
  }
};

// Packed tokens of a tile: content, scale, and a score bias of 0, or -inf for tokens that are masked or past the end.
template <class T> struct Tile {
  int64_t start, count, padded;
  Buffer<T> content, scale, bias;
  const int64_t stride;

  Tile(Memory& memory, const Inputs<T>& in)
      : content(memory, in.channels * in.tile), scale(memory, in.tile), bias(memory, in.tile), stride(in.tile) {}

  // Loads the tile of a sample that begins in row `row` and column `column` of the grid.
  void pack(const Inputs<T>& in, int64_t batch, int64_t row, int64_t column) {
    const T *from = in.content + batch * in.channels * in.tokens, *scales = in.scale + batch * in.tokens;
    const uint8_t* mask = in.mask ? in.mask + batch * in.tokens : nullptr;
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

// Window of the grid: a range of rows and a range of columns.
template <class T> struct Window {
  int64_t top = 0, bottom = 0, left = 0, right = 0;
  const int64_t outer_axes, most_rows;
  Buffer<int64_t> positions;  // of each row along each axis but the last, see `positions_along`

  Window(Memory& memory, const Inputs<T>& in)
      : outer_axes(in.axes - 1), most_rows(in.window_rows()), positions(memory, outer_axes * most_rows) {}

  int64_t rows() const { return bottom - top; }
  int64_t columns() const { return right - left; }

  // Positions of the rows along an axis, as indices into the concatenated positions of all axes.
  const int64_t* positions_along(int64_t axis) const { return &positions[axis * most_rows]; }

  void find_rows(const Inputs<T>& in) {
    for (int64_t row = top; row < bottom; row++) {
      int64_t offset = in.outer_positions, rest = row;
      for (int64_t axis = outer_axes - 1; axis >= 0; axis--) {
        offset -= in.grid[axis];
        positions[axis * most_rows + row - top] = offset + rest % in.grid[axis];
        rest /= in.grid[axis];
      }
    }
  }
};

// Calls `pass` for all windows of a range of tiles, and for all tiles in them. If the grid has a single axis, windows
// cover the columns of these tiles, otherwise all columns.
template <class T, class Pass> void walk(const Inputs<T>& in, int64_t begin, int64_t end, Window<T>& window, Pass& pass) {
  const int64_t from = in.axes == 1 ? begin : 0, to = in.axes == 1 ? end : in.row_tiles;
  const int64_t rows_begin = begin / in.row_tiles, rows_end = (end + in.row_tiles - 1) / in.row_tiles;
  for (int64_t first = from; first < to; first += in.window_tiles) {
    const int64_t last = std::min(first + in.window_tiles, to);
    window.left = first * in.tile, window.right = std::min(last * in.tile, in.width);
    pass.enter_columns();
    for (window.top = rows_begin; window.top < rows_end; window.top = window.bottom) {
      window.bottom = std::min(window.top + MAX_ROWS, rows_end);
      window.find_rows(in);
      pass.enter_rows();
      for (int64_t row = window.top; row < window.bottom; row++)
        for (int64_t index = std::max(begin, row * in.row_tiles + first),
                     stop = std::min(end, row * in.row_tiles + last);
             index < stop; index++)
          pass.process_tile(row, (index - row * in.row_tiles) * in.tile);
      pass.leave_rows();
    }
    pass.leave_columns();
  }
}

// Content coefficients of a block of queries, and its axis terms for the rows and columns of a window; zeros for
// queries past the end.
template <class T> struct Coefficients {
  const int64_t padded;              // columns of a window, padded to whole vectors
  Buffer<T> content, rows, columns;  // BLOCK x channels, rows x BLOCK, BLOCK x padded
  const T* axes = nullptr;           // axis terms of the first query
  int count = 0;                     // queries
  T factor = 1;

  Coefficients(Memory& memory, const Inputs<T>& in)
      : padded(in.window_columns()), content(memory, BLOCK * in.channels),
        rows(memory, in.window_rows() * BLOCK), columns(memory, BLOCK * padded) {}

  void start(const Inputs<T>& in, int64_t first, int num_queries, const T* of_content, const T* of_axes, T factor) {
    axes = of_axes + first * in.axis_positions, count = num_queries, this->factor = factor;
    for (int64_t i = 0; i < BLOCK * in.channels; i++)
      content[i] = i < count * in.channels ? of_content[first * in.channels + i] * factor : T(0);
  }

  void load_columns(const Inputs<T>& in, const Window<T>& window) {
    for (int q = 0; q < BLOCK; q++) {
      const T* from = axes + q * in.axis_positions + in.outer_positions + window.left;
      T* to = &columns[q * padded];
      const int64_t loaded = q < count ? window.columns() : 0;
      for (int64_t i = 0; i < loaded; i++) to[i] = from[i] * factor;
      std::fill(to + loaded, to + round_up(window.columns(), LANES<T>), T(0));
    }
  }

  void load_rows(const Inputs<T>& in, const Window<T>& window) {
    std::fill_n(rows.data(), window.rows() * BLOCK, T(0));
    for (int64_t axis = 0; axis < window.outer_axes; axis++) {
      const int64_t* positions = window.positions_along(axis);
      for (int q = 0; q < count; q++)
        for (int64_t i = 0; i < window.rows(); i++)
          rows[i * BLOCK + q] += axes[q * in.axis_positions + positions[i]] * factor;
    }
  }
};

// Sums over tokens for a block of queries. Content sums have one entry per vector lane and cover all tokens so far. The
// others cover the rows and columns of a window.
template <class T> struct Sums {
  const int64_t padded, lanes;
  Buffer<T> content, rows, columns;

  Sums(Memory& memory, const Inputs<T>& in)
      : padded(in.window_columns()), lanes(in.channels * LANES<T>), content(memory, BLOCK * lanes),
        rows(memory, in.window_rows() * BLOCK), columns(memory, BLOCK * padded) {}

  void clear_content() { std::fill_n(content.data(), BLOCK * lanes, T(0)); }
  void clear_columns() { std::fill_n(columns.data(), BLOCK * padded, T(0)); }
  void clear_rows(const Window<T>& window) { std::fill_n(rows.data(), window.rows() * BLOCK, T(0)); }

  T content_sum(int q, int64_t k) const { return sum<T>(load<T>(&content[q * lanes + k * LANES<T>])); }

  // Adds the row sums of a query to its sums for each position along each axis but the last.
  void add_rows(int q, const Window<T>& window, T* axes) const {
    for (int64_t axis = 0; axis < window.outer_axes; axis++) {
      const int64_t* positions = window.positions_along(axis);
      for (int64_t i = 0; i < window.rows(); i++) axes[positions[i]] += rows[i * BLOCK + q];
    }
  }
};
