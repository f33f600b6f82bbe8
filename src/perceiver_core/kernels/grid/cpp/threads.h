// Parallel execution of tasks.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

// Runs `work` on up to `max_threads` threads. Each takes its next task by incrementing the shared counter. Uses OpenMP
// if the compiler has it, and so PyTorch's own threads: these spin for a while after their last work, which would slow
// down additional threads.
template <class Work> void run_parallel(int64_t tasks, int64_t max_threads, Work work) {
  std::atomic<int64_t> next{0};
  const int threads = int(std::min<int64_t>(max_threads, tasks));
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
