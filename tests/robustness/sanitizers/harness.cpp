// Drives the compiled reads with random inputs, to be built with sanitizers.
//
//     harness [number of cases] [first seed]
//
// Each case calls the forward and backward pass with one and with several threads, and with failing allocations. It
// ends with exit code 1 if results differ from the formula, depend on the number of threads, or are not written.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

// Allocations until one fails: 0 = none fails. If `all_later` is true, all later ones fail too.
static std::atomic<int64_t> until_failure{0};
static std::atomic<bool> all_later{false}, has_failed{false};

static void* failing_malloc(size_t size) {
  int64_t left = until_failure.load();
  while (left > 1 && !until_failure.compare_exchange_weak(left, left - 1)) {
  }
  if (left != 1) return malloc(size);
  has_failed = true;
  if (!all_later) until_failure = 0;
  return nullptr;
}
#define malloc failing_malloc
#include "reads.cpp"
#undef malloc

// The library must not allocate memory in another way.
static std::atomic<bool> is_running{false};
[[noreturn]] static void fail(const char* reason) {
  std::fprintf(stderr, "%s\n", reason);
  std::exit(1);
}
void* operator new(size_t size) {
  if (is_running) fail("a read uses operator new");
  void* memory = malloc(size ? size : 1);
  if (!memory) throw std::bad_alloc();
  return memory;
}
void operator delete(void* memory) noexcept { free(memory); }
void operator delete(void* memory, size_t) noexcept { free(memory); }

static std::mt19937_64 generator;
static int64_t uniform(int64_t from, int64_t to) { return std::uniform_int_distribution<int64_t>(from, to)(generator); }

template <class T> std::vector<T> normal(int64_t size) {
  std::normal_distribution<double> distribution;
  std::vector<T> values(size);
  for (T& value : values) value = T(distribution(generator));
  return values;
}

// Sizes and inputs of a case, each in its own allocation of exactly its size.
template <class T> struct Case {
  std::vector<int64_t> grid;
  int64_t batch, query_batch, heads, queries, channels, tokens = 1, positions = 0;
  bool needs_token_gradients;
  std::vector<T> content_queries, axis_queries, content, scale, d_read, d_marginals, offset;
  std::vector<uint8_t> mask;

  explicit Case(bool is_small) {
    const int64_t axes = uniform(1, 4), large = is_small ? -1 : uniform(-4, axes - 1);
    for (int64_t axis = 0; axis < axes; axis++)
      grid.push_back(axis == large ? uniform(250, 2500) : uniform(1, large < 0 ? 6 : 3));
    for (int64_t size : grid) tokens *= size, positions += size;
    batch = uniform(is_small, 3), query_batch = uniform(0, 1) ? 1 : batch, heads = uniform(1, 2);
    queries = is_small ? uniform(1, 3) : uniform(0, 9) ? uniform(1, 40) : 0, channels = uniform(1, 9);
    needs_token_gradients = uniform(0, 1);
    const int64_t rows = heads * queries;
    content_queries = normal<T>(query_batch * rows * channels), axis_queries = normal<T>(query_batch * rows * positions);
    content = normal<T>(batch * channels * tokens), scale = normal<T>(batch * tokens);
    d_read = normal<T>(batch * rows * channels), d_marginals = normal<T>(batch * rows * positions);
    offset = normal<T>(batch * rows);
    if (const int64_t kept = uniform(0, 3); kept < 3)  // of 2: no token, every other token, every token
      for (int64_t i = 0; i < batch * tokens; i++) mask.push_back(uint8_t(uniform(0, 1) < kept && (kept > 1 || i % 2)));
  }

  template <class Function, class... Pointers> int64_t call(Function function, int64_t threads, Pointers... pointers) {
    return function(batch, query_batch, heads, queries, channels, int64_t(grid.size()), grid.data(),
                    content_queries.data(), axis_queries.data(), content.data(), scale.data(),
                    mask.empty() ? nullptr : mask.data(), pointers..., threads);
  }
};

template <class T> struct Results {
  std::vector<T> read, marginals, base, total, d_content_queries, d_axis_queries, d_content, d_scale;
  int64_t needed = 0;  // bytes that could not be allocated

  template <class Forward, class Backward>
  Results(Case<T>& c, int64_t threads, int64_t failing, Forward forward, Backward backward) {
    const T unset = std::numeric_limits<T>::quiet_NaN();
    const int64_t rows = c.batch * c.heads * c.queries;
    read.assign(rows * c.channels, unset), marginals.assign(rows * c.positions, unset);
    base.assign(rows, unset), total.assign(rows, unset);
    d_content_queries.assign(c.content_queries.size(), unset), d_axis_queries.assign(c.axis_queries.size(), unset);
    if (c.needs_token_gradients) d_content.assign(c.content.size(), unset), d_scale.assign(c.scale.size(), unset);
    until_failure = failing, is_running = true;
    needed = c.call(forward, threads, read.data(), marginals.data(), base.data(), total.data());
    if (!needed)
      needed = c.call(backward, threads, static_cast<const T*>(base.data()), static_cast<const T*>(total.data()),
                      static_cast<const T*>(c.d_read.data()), static_cast<const T*>(c.d_marginals.data()),
                      static_cast<const T*>(c.offset.data()), d_content_queries.data(), d_axis_queries.data(),
                      c.needs_token_gradients ? d_content.data() : nullptr,
                      c.needs_token_gradients ? d_scale.data() : nullptr);
    until_failure = 0, is_running = false;
  }

  bool operator==(const Results& other) const {
    return read == other.read && marginals == other.marginals && base == other.base && total == other.total &&
           d_content_queries == other.d_content_queries && d_axis_queries == other.d_axis_queries &&
           d_content == other.d_content && d_scale == other.d_scale;
  }
};

// Compares the sums of content with the formula, in float64.
template <class T> void compare_with_formula(const Case<T>& c, const Results<T>& results) {
  for (int64_t row = 0; row < c.batch * c.heads * c.queries; row++) {
    const int64_t rows = c.heads * c.queries, sample = row / rows, query = c.query_batch == 1 ? row % rows : row;
    std::vector<double> scores(c.tokens), expected(c.channels);
    double top = -1e300, total = 0;
    for (int64_t m = 0; m < c.tokens; m++) {
      int64_t rest = m, end = c.positions;
      for (size_t axis = c.grid.size(); axis-- > 0; rest /= c.grid[axis])
        end -= c.grid[axis], scores[m] += c.axis_queries[query * c.positions + end + rest % c.grid[axis]];
      for (int64_t k = 0; k < c.channels; k++)
        scores[m] += double(c.content_queries[query * c.channels + k]) * c.content[(sample * c.channels + k) * c.tokens + m];
      scores[m] *= c.scale[sample * c.tokens + m];
      if (c.mask.empty() || c.mask[sample * c.tokens + m]) top = std::max(top, scores[m]);
    }
    for (int64_t m = 0; m < c.tokens; m++) {
      if (!c.mask.empty() && !c.mask[sample * c.tokens + m]) continue;
      const double p = std::exp(scores[m] - top);
      total += p;
      for (int64_t k = 0; k < c.channels; k++)
        expected[k] += p * c.scale[sample * c.tokens + m] * c.content[(sample * c.channels + k) * c.tokens + m];
    }
    for (int64_t k = 0; k < c.channels; k++)
      if (!(std::abs(results.read[row * c.channels + k] - (total > 0 ? expected[k] / total : 0)) < 1e-3))
        fail("a result differs from the formula");
  }
}

template <class T, class Forward, class Backward> void run_case(bool is_small, Forward forward, Backward backward) {
  Case<T> c(is_small);
  const Results<T> one(c, 1, 0, forward, backward), several(c, uniform(2, 8), 0, forward, backward);
  if (one.needed || several.needed) fail("memory was missing");
  if (!(one == several)) fail("results depend on the number of threads, or were not written");
  compare_with_formula(c, one);
  for (int64_t failing = 1; is_small; failing++) {
    all_later = failing % 2 == 0, has_failed = false;
    const Results<T> results(c, failing % 3 + 1, failing, forward, backward);
    if (!has_failed) break;
    if (!results.needed && !(results == one)) fail("results after a failed allocation differ");
  }
}

int main(int count, char** arguments) {
  const int64_t cases = count > 1 ? std::atoll(arguments[1]) : 100, seed = count > 2 ? std::atoll(arguments[2]) : 0;
  for (int64_t i = 0; i < cases; i++) {
    std::fprintf(stderr, "\rcase %lld ", static_cast<long long>(seed + i));  // seen if a sanitizer ends the process
    generator.seed(uint64_t(seed + i));
    const bool is_small = i % 3 == 0;
    if (uniform(0, 1)) run_case<float>(is_small, forward_float32, backward_float32);
    else run_case<double>(is_small, forward_float64, backward_float64);
  }
  std::fprintf(stderr, "\n");
}
