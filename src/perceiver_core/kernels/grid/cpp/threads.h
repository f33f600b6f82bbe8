// Work on several threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

// Runs `work` on as many threads, each of which takes tasks by counting `next` up. With OpenMP where there is one: its
// threads are those of PyTorch, which spin for a while after their last work and would be in the way of others.
template <class Work> void in_parallel(int64_t tasks, int64_t wanted, Work work) {
  std::atomic<int64_t> next{0};
  const int threads = int(std::min<int64_t>(wanted, tasks));
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
