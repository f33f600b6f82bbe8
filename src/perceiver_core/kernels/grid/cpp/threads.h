// Parallel execution of tasks.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "memory.h"

// Maximum number of threads, and whether they may be OpenMP's, which hang in a process that was forked.
struct Threads {
  int64_t max;
  bool may_use_openmp;
};

// Starts up to `count` threads. There are fewer if the system has no memory or no threads left.
template <class Work> std::vector<std::thread> start_threads(int64_t count, Work work) {
  std::vector<std::thread> started;
  try {
    started.reserve(count);
    while (int64_t(started.size()) < count) started.emplace_back(work);
  } catch (const std::exception&) {
  }
  return started;
}

// Returns the number of threads, at most `count`, that OpenMP can start. It ends the process if it cannot start a
// thread, so as many threads are started and ended first when this thread requests more than before.
inline int64_t startable(int64_t count) {
  static thread_local int64_t known = 1;
  if (count > known) {
    std::mutex gate;
    std::unique_lock<std::mutex> closed(gate);
    auto started = start_threads(count - 1, [&] { std::lock_guard<std::mutex> pass(gate); });
    closed.unlock();
    for (auto& thread : started) thread.join();
    known = 1 + int64_t(started.size());
  }
  return std::min(count, known);
}

// Calls `work` once on each of up to `count` threads. Uses OpenMP if the compiler has it, and so PyTorch's own threads:
// these spin for a while after their last work, which would slow down additional threads.
template <class Work> void run_parallel(int64_t count, Threads threads, Work work) {
  count = std::min(count, threads.max);
  if (count <= 1) return work();
#ifdef _OPENMP
  if (threads.may_use_openmp) {
    const int team = int(startable(count));
#pragma omp parallel num_threads(team)
    work();
    return;
  }
#endif
  auto others = start_threads(count - 1, work);
  work();
  for (auto& other : others) other.join();
}

// Calls `work(pass, task)` for each task. Each thread has its own `Pass(memory, arguments...)`, and takes its next task
// by incrementing a shared counter. Threads whose pass does not fit in memory take no task. Returns 0, or the number of
// bytes that a pass needs if none fits.
template <class Pass, class Work, class... Arguments>
int64_t run_tasks(int64_t tasks, Threads threads, Work work, const Arguments&... arguments) {
  std::atomic<int64_t> next{0}, needed{0};
  run_parallel(tasks, threads, [&] {
    Memory memory;
    Pass pass(memory, arguments...);
    if (!memory.enough) {
      needed = memory.bytes;
      return;
    }
    for (int64_t task; (task = next++) < tasks;) work(pass, task);
  });
  return next < tasks ? needed.load() : 0;
}

// Calls `work(task)` for each task.
template <class Work> void run_tasks(int64_t tasks, Threads threads, Work work) {
  std::atomic<int64_t> next{0};
  run_parallel(tasks, threads, [&] {
    for (int64_t task; (task = next++) < tasks;) work(task);
  });
}
