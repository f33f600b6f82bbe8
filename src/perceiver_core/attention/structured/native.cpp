// Reads of a position-encoded grid, forward and backward, for the CPU. `op.py` says what is computed;
// `native.py` compiles this and calls it. Plain C++17 with the vector types of GCC and Clang, no library.
//
// A block of latents stays in registers and level-1 cache and walks the grid tile by tile, a tile being up to `TILE`
// tokens along the last axis. Softmax is online. Nothing of size latents x inputs is written to memory.
//
//     score[l, m] = r[m] * (sum_k a[l, k] x[k, m] + sum_axes u[l, i_axis(m)])        p = softmax over m
//     y[l, k] = sum_m p r x[k, m]        marg[l, i] = sum of p r over the tokens with index i along their axis

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

constexpr int BLOCK = 16;   // latents a task holds
constexpr int QUAD = 4;     // latents that share a load of a token
constexpr int TILE = 256;   // most tokens a tile holds; fewer where they have many channels
constexpr double LOG2E = 1.4426950408889634;

// May-alias and element alignment, so that any address of a float can be loaded as a vector.
typedef float floats __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef double doubles __attribute__((vector_size(BYTES), aligned(8), may_alias));
typedef int32_t ints __attribute__((vector_size(BYTES), aligned(4), may_alias));

template <class T> struct Vector;
template <> struct Vector<float> { using type = floats; };
template <> struct Vector<double> { using type = doubles; };
template <class T> using vec = typename Vector<T>::type;
template <class T> constexpr int LANES = BYTES / sizeof(T);
template <class T> constexpr T INF = std::numeric_limits<T>::infinity();

template <class T> inline vec<T> load(const T* p) { return *reinterpret_cast<const vec<T>*>(p); }
template <class T> inline void store(T* p, vec<T> v) { *reinterpret_cast<vec<T>*>(p) = v; }
template <class T> inline vec<T> zeros() { return vec<T>{}; }

template <class T> inline T sum(vec<T> v) {
  T parts[LANES<T>];
  store<T>(parts, v);
  for (int half = LANES<T> / 2; half; half /= 2)
    for (int i = 0; i < half; i++) parts[i] += parts[i + half];
  return parts[0];
}

template <class T> inline T highest(vec<T> v) {
  T parts[LANES<T>];
  store<T>(parts, v);
  for (int half = LANES<T> / 2; half; half /= 2)
    for (int i = 0; i < half; i++) parts[i] = parts[i] > parts[i + half] ? parts[i] : parts[i + half];
  return parts[0];
}

// 2^x for x <= 127, to 1e-7: the integer part goes into the exponent, the rest into a polynomial. 0 below -126.
inline floats exp2(floats x) {
  constexpr float ROUND = 12582912.0f;  // adding 1.5 * 2^23 leaves the nearest integer in the low bits
  floats inside = x < -126.0f ? zeros<float>() : x;
  floats shifted = inside + ROUND;
  ints exponent = reinterpret_cast<ints&>(shifted) << 23;
  floats f = inside - (shifted - ROUND);
  floats p = f * 1.5403530393381608e-4f + 1.3333558146428443e-3f;
  p = p * f + 9.6181291076284772e-3f;
  p = p * f + 5.5504108664821580e-2f;
  p = p * f + 2.4022650695910071e-1f;
  p = p * f + 6.9314718055994531e-1f;
  p = p * f + 1.0f;
  ints bits = reinterpret_cast<ints&>(p) + exponent;
  floats power = reinterpret_cast<floats&>(bits);
  floats other = x < -126.0f ? zeros<float>() : x;  // NaN stays NaN
  return x >= -126.0f ? power : other;
}

inline doubles exp2(doubles x) {
  doubles power;
  for (int i = 0; i < LANES<double>; i++) power[i] = std::exp2(x[i]);
  return power;
}

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Sizes {
  int64_t batch, heads, latents, channels, axes, query_batch;
  const int64_t* grid;
  int64_t n, width, rows, tables, tile, tiles;  // tiles: along a row
};

Sizes sizes_of(int64_t batch, int64_t query_batch, int64_t heads, int64_t latents, int64_t channels, int64_t axes,
               const int64_t* grid) {
  Sizes s{batch, heads, latents, channels, axes, query_batch, grid, 1, grid[axes - 1], 1, 0, 0, 0};
  for (int64_t axis = 0; axis < axes; axis++) s.n *= grid[axis], s.tables += grid[axis];
  s.rows = s.n / s.width;
  int64_t fits = std::max<int64_t>(32, 8192 / std::max<int64_t>(channels, 1) / 32 * 32);
  s.tile = std::min<int64_t>(TILE, fits);
  s.tiles = (s.width + s.tile - 1) / s.tile;
  return s;
}

// The tokens of a tile, packed: channels, scale and 0 or -inf for tokens that are not there (masked, or past the end).
template <class T> struct Tile {
  int64_t start, count, padded, row, column;
  std::vector<T> x, r, bias;
  const int64_t stride;

  explicit Tile(const Sizes& s) : x(s.channels * s.tile), r(s.tile), bias(s.tile), stride(s.tile) {}

  void pack(const Sizes& s, int64_t index, const T* content, const T* scale, const uint8_t* keep) {
    row = index / s.tiles, column = index % s.tiles * s.tile;
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

// What a block of latents of one head multiplies the tokens with; zeros for latents that are not there.
template <class T> struct Latents {
  int64_t others, padded;      // entries of the axes but the last; of the last, to whole vectors
  std::vector<T> a, outer, last;  // BLOCK x channels, BLOCK x others, BLOCK x padded

  explicit Latents(const Sizes& s)
      : others(s.tables - s.width), padded(up(s.width, LANES<T>)), a(BLOCK * s.channels), outer(BLOCK * others),
        last(BLOCK * padded) {}

  void read(const Sizes& s, int64_t first, int count, const T* content, const T* tables, T factor) {
    for (auto* part : {&a, &outer, &last}) std::fill(part->begin(), part->end(), T(0));
    for (int l = 0; l < count; l++) {
      const T *from = tables + (first + l) * s.tables, *c = content + (first + l) * s.channels;
      for (int64_t k = 0; k < s.channels; k++) a[l * s.channels + k] = c[k] * factor;
      for (int64_t i = 0; i < others; i++) outer[l * others + i] = from[i] * factor;
      for (int64_t i = 0; i < s.width; i++) last[l * padded + i] = from[others + i] * factor;
    }
  }
};

// What a block of latents sums over the tokens. The sums over content keep the lanes of a vector apart to the end.
template <class T> struct Sums {
  int64_t others, padded, lanes;
  std::vector<T> a, outer, last;

  explicit Sums(const Sizes& s)
      : others(s.tables - s.width), padded(up(s.width, LANES<T>)), lanes(s.channels * LANES<T>), a(BLOCK * lanes),
        outer(BLOCK * others), last(BLOCK * padded) {}

  void clear() {
    for (auto* part : {&a, &outer, &last}) std::fill(part->begin(), part->end(), T(0));
  }

  void shrink(int l, T factor) {
    for (int64_t k = 0; k < lanes; k++) a[l * lanes + k] *= factor;
    for (int64_t i = 0; i < others; i++) outer[l * others + i] *= factor;
    for (int64_t i = 0; i < padded; i++) last[l * padded + i] *= factor;
  }

  void write(const Sizes& s, int64_t first, int count, T* content, T* tables, const T* factors) const {
    for (int l = 0; l < count; l++) {
      T *to = tables + (first + l) * s.tables, *c = content + (first + l) * s.channels;
      for (int64_t k = 0; k < s.channels; k++) c[k] = sum<T>(load<T>(&a[l * lanes + k * LANES<T>])) * factors[l];
      for (int64_t i = 0; i < others; i++) to[i] = outer[l * others + i] * factors[l];
      for (int64_t i = 0; i < s.width; i++) to[others + i] = last[l * padded + i] * factors[l];
    }
  }
};

// Where a row of the grid stands in the tables of the axes but the last.
struct Places {
  std::vector<int64_t> at;
  void find(const Sizes& s, int64_t row) {
    at.resize(s.axes - 1);
    int64_t offset = s.tables - s.width;
    for (int64_t axis = s.axes - 2; axis >= 0; axis--) {
      offset -= s.grid[axis];
      at[axis] = offset + row % s.grid[axis];
      row /= s.grid[axis];
    }
  }
  template <class T> void add_up(T* totals, const Latents<T>& of) const {
    for (int l = 0; l < BLOCK; l++) {
      totals[l] = T(0);
      for (int64_t i : at) totals[l] += of.outer[l * of.others + i];
    }
  }
  template <class T> void add_to(Sums<T>& to, int l, T value) const {
    for (int64_t i : at) to.outer[l * to.others + i] += value;
  }
};

// Runs `work` on as many threads, each of which takes tasks by counting `next` up. With OpenMP where there is one: its
// threads are those of PyTorch, which spin for a while after their last work and would be in the way of others.
template <class Work> void in_parallel(int64_t tasks, int threads, Work work) {
  std::atomic<int64_t> next{0};
  threads = int(std::min<int64_t>(threads, tasks));
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  work(next);
#else
  std::vector<std::thread> others;
  for (int i = 1; i < threads; i++) others.emplace_back([&] { work(next); });
  work(next);
  for (auto& other : others) other.join();
#endif
}

template <class T>
void forward(const Sizes& s, const T* a, const T* u, const T* x, const T* r, const uint8_t* keep, T* y, T* marg, T* base_out,
             T* total_out, int threads) {
  const int64_t blocks = (s.latents + BLOCK - 1) / BLOCK, tasks = s.batch * s.heads * blocks;
  constexpr T SLACK = 16;  // how far, in powers of two, a score may exceed the base before sums are scaled anew
  in_parallel(tasks, threads, [&](std::atomic<int64_t>& next) {
    Latents<T> asks(s);
    Sums<T> sums(s);
    Tile<T> tile(s);
    Places places;
    std::vector<T> work(BLOCK * s.tile);
    for (int64_t task; (task = next++) < tasks;) {
      const int64_t head = task / blocks, batch = head / s.heads, first = task % blocks * BLOCK;
      const int count = std::min<int64_t>(BLOCK, s.latents - first);
      const int64_t asked = s.query_batch == 1 ? head % s.heads : head;
      asks.read(s, asked * s.latents + first, count, a, u, T(LOG2E));
      sums.clear();
      T base[BLOCK], row[BLOCK], factors[BLOCK];
      vec<T> total[BLOCK] = {};
      std::fill(base, base + BLOCK, -INF<T>);
      for (int64_t index = 0; index < s.rows * s.tiles; index++) {
        tile.pack(s, index, x + batch * s.channels * s.n, r + batch * s.n, keep ? keep + batch * s.n : nullptr);
        places.find(s, tile.row);
        places.add_up(row, asks);
        scores<T>(work.data(), row, &asks.last[tile.column], asks.padded, asks.a.data(), tile, s.channels);
        for (int l = 0; l < count; l++) {
          T* weights = &work[l * s.tile];
          vec<T> top = zeros<T>() - INF<T>;
          for (int64_t j = 0; j < tile.padded; j += LANES<T>) {
            const vec<T> score = load<T>(weights + j) * load<T>(&tile.r[j]) + load<T>(&tile.bias[j]);
            store<T>(weights + j, score);
            top = top > score ? top : score;
          }
          const T peak = highest<T>(top);
          if (peak > base[l] + SLACK) {
            if (base[l] != -INF<T>) {
              const T factor = std::exp2(base[l] - peak);
              total[l] *= factor;
              sums.shrink(l, factor);
            }
            base[l] = peak;
          }
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
        gather<T>(sums.a.data(), work.data(), tile, s.channels);
      }
      const int64_t here = head * s.latents + first;
      for (int l = 0; l < count; l++) {
        const T all = sum<T>(total[l]);
        factors[l] = all > 0 ? 1 / all : T(0);
        base_out[here + l] = all > 0 ? base[l] : T(0), total_out[here + l] = all;
      }
      sums.write(s, here, count, y, marg, factors);
    }
  });
}

// base, total: what `forward` gave. d_a, d_u: a part for each of `splits` ranges of tiles, batch x splits x heads x latents x ...; d_x, d_r may be null.
// offset = d_lse - sum of d_y * y - sum of d_marg * marg, for every latent.
template <class T>
void backward(const Sizes& s, const T* a, const T* u, const T* x, const T* r, const uint8_t* keep, const T* base,
              const T* total, const T* d_y, const T* d_marg, const T* offset, T* d_a, T* d_u, T* d_x, T* d_r, int64_t splits,
              int threads) {
  const int64_t blocks = (s.latents + BLOCK - 1) / BLOCK, tiles = s.rows * s.tiles;
  in_parallel(s.batch * splits, threads, [&](std::atomic<int64_t>& next) {
    Latents<T> asks(s), gives(s);
    Sums<T> sums(s);
    Tile<T> tile(s);
    Places places;
    std::vector<T> p_buffer(BLOCK * s.tile), s_buffer(BLOCK * s.tile), d_tokens((s.channels + 1) * s.tile);
    std::vector<T> plain(BLOCK * s.channels);  // a as it was given
    const T ones[BLOCK] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    for (int64_t task; (task = next++) < s.batch * splits;) {
      const int64_t batch = task / splits, part = task % splits;
      const int64_t begin = tiles * part / splits, end = tiles * (part + 1) / splits;
      for (int64_t block = 0; block < s.heads * blocks; block++) {
        const int64_t head = block / blocks, first = block % blocks * BLOCK;
        const int count = std::min<int64_t>(BLOCK, s.latents - first);
        const int64_t here = (batch * s.heads + head) * s.latents + first;
        asks.read(s, s.query_batch == 1 ? head * s.latents + first : here, count, a, u, T(LOG2E));
        gives.read(s, here, count, d_y, d_marg, T(1));
        for (size_t i = 0; i < plain.size(); i++) plain[i] = asks.a[i] * T(1 / LOG2E);
        sums.clear();
        std::fill(p_buffer.begin(), p_buffer.end(), T(0)), std::fill(s_buffer.begin(), s_buffer.end(), T(0));
        T row[BLOCK], d_row[BLOCK];
        for (int64_t index = begin; index < end; index++) {
          tile.pack(s, index, x + batch * s.channels * s.n, r + batch * s.n, keep ? keep + batch * s.n : nullptr);
          places.find(s, tile.row);
          places.add_up(row, asks), places.add_up(d_row, gives);
          scores<T>(s_buffer.data(), row, &asks.last[tile.column], asks.padded, asks.a.data(), tile, s.channels);
          scores<T>(p_buffer.data(), d_row, &gives.last[tile.column], gives.padded, gives.a.data(), tile, s.channels);
          T* d_scale = &d_tokens[s.channels * s.tile];
          if (d_x) {  // what earlier blocks of latents left there
            for (int64_t k = 0; k <= s.channels; k++)
              for (int64_t j = 0; j < tile.padded; j++) {
                const T* from = k < s.channels ? d_x + (batch * s.channels + k) * s.n : d_r + batch * s.n;
                d_tokens[k * s.tile + j] = block && j < tile.count ? from[tile.start + j] : T(0);
              }
          }
          for (int l = 0; l < count; l++) {
            T *one = &s_buffer[l * s.tile], *two = &p_buffer[l * s.tile];
            T* column = &sums.last[l * sums.padded + tile.column];
            const T from = base[here + l], inverse = total[here + l] > 0 ? 1 / total[here + l] : T(0);
            const T shift = offset[here + l];
            vec<T> scaled = zeros<T>();
            for (int64_t j = 0; j < tile.padded; j += LANES<T>) {
              const vec<T> scale = load<T>(&tile.r[j]), score = load<T>(one + j), gift = load<T>(two + j);
              const vec<T> p = exp2(score * scale + load<T>(&tile.bias[j]) - from) * inverse;
              const vec<T> d_score = p * (gift * scale + shift);
              const vec<T> d_scaled = d_score * scale;
              if (d_x) store<T>(d_scale + j, load<T>(d_scale + j) + d_score * (score * T(1 / LOG2E)) + p * gift);
              scaled += d_scaled;
              store<T>(column + j, load<T>(column + j) + d_scaled);
              store<T>(one + j, d_scaled), store<T>(two + j, p * scale);
            }
            if (s.axes > 1) places.add_to(sums, l, sum<T>(scaled));
          }
          gather<T>(sums.a.data(), s_buffer.data(), tile, s.channels);
          if (d_x) {
            scatter<T>(d_tokens.data(), plain.data(), s_buffer.data(), gives.a.data(), p_buffer.data(), tile, s.channels);
            for (int64_t k = 0; k <= s.channels; k++) {
              T* to = k < s.channels ? d_x + (batch * s.channels + k) * s.n : d_r + batch * s.n;
              std::memcpy(to + tile.start, &d_tokens[k * s.tile], tile.count * sizeof(T));
            }
          }
        }
        const int64_t there = ((batch * splits + part) * s.heads + head) * s.latents + first;
        sums.write(s, there, count, d_a, d_u, ones);
      }
    }
  });
}

}  // namespace

#define EXPORTED(T, NAME)                                                                                              \
  extern "C" void forward_##NAME(int64_t batch, int64_t query_batch, int64_t heads, int64_t latents, int64_t channels, \
                                 int64_t axes, const int64_t* grid, const T* a, const T* u, const T* x, const T* r,    \
                                 const uint8_t* keep, T* y, T* marg, T* base, T* total, int64_t threads) {                        \
    forward<T>(sizes_of(batch, query_batch, heads, latents, channels, axes, grid), a, u, x, r, keep, y, marg, base,    \
               total, int(threads));                                                                                   \
  }                                                                                                                    \
  extern "C" void backward_##NAME(                                                                                     \
      int64_t batch, int64_t query_batch, int64_t heads, int64_t latents, int64_t channels, int64_t axes,              \
      const int64_t* grid, const T* a, const T* u, const T* x, const T* r, const uint8_t* keep, const T* base,         \
      const T* total, const T* d_y, const T* d_marg, const T* offset, T* d_a, T* d_u, T* d_x, T* d_r, int64_t splits,                  \
      int64_t threads) {                                                                                               \
    backward<T>(sizes_of(batch, query_batch, heads, latents, channels, axes, grid), a, u, x, r, keep, base, total, d_y, \
                d_marg, offset, d_a, d_u, d_x, d_r, splits, int(threads));                                             \
  }

EXPORTED(float, float32)
EXPORTED(double, float64)
