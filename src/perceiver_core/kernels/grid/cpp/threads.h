// Parallel execution of tasks.

#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>

#include "memory.h"

// Calls `work` in up to `count` threads, and `meanwhile` in the calling thread. Returns the number of threads, which is
// lower if the system has no memory or no threads left. std::thread would throw an exception in this case.
template <class Work, class Meanwhile> int64_t with_threads(int64_t count, Work work, Meanwhile meanwhile) {
  const auto call = [](void* work) -> void* { return (*static_cast<Work*>(work))(), nullptr; };
  Memory memory;
  Buffer<pthread_t> threads(memory, count);
  int64_t started = 0;
  while (memory.enough && started < count && !pthread_create(&threads[started], nullptr, call, &work)) started++;
  meanwhile();
  for (int64_t i = 0; i < started; i++) pthread_join(threads[i], nullptr);
  return started;
}

#ifdef _OPENMP
// Returns the number of threads, at most `count`, that OpenMP can start. It ends the process if it cannot start a
// thread, so as many threads are started and ended first when a thread requests more than before. The number of each
// calling thread is stored under a key, because the first access to a `thread_local` variable allocates memory, and ends
// the process if there is none.
inline int64_t startable(int64_t count) {
  static pthread_key_t key;
  static const bool has_key = pthread_key_create(&key, nullptr) == 0;
  int64_t others = has_key ? reinterpret_cast<intptr_t>(pthread_getspecific(key)) : 0;
  if (count - 1 > others) {
    std::mutex gate;
    gate.lock();
    others = with_threads(count - 1, [&] { gate.lock(), gate.unlock(); }, [&] { gate.unlock(); });
    if (has_key) pthread_setspecific(key, reinterpret_cast<void*>(intptr_t(others)));
  }
  return std::min(count, 1 + others);
}
#endif

// Calls `work` once on each of up to `count` threads. Uses OpenMP if the compiler has it, and so PyTorch's own threads:
// these spin for a while after their last work, which would slow down additional threads.
template <class Work> void run_parallel(int64_t count, int64_t max_threads, Work work) {
  count = std::min(count, max_threads);
  if (count <= 1) return work();
#ifdef _OPENMP
  const int team = int(startable(count));
#pragma omp parallel num_threads(team)
  work();
#else
  with_threads(count - 1, work, work);
#endif
}

// Calls `work(pass, task)` for each task. Each thread has its own `Pass(memory, arguments...)`, and takes its next task
// by incrementing a shared counter. Threads whose pass does not fit in memory take no task. Returns 0, or the number of
// bytes that a pass needs if none fits.
template <class Pass, class Work, class... Arguments>
int64_t run_tasks(int64_t tasks, int64_t threads, Work work, const Arguments&... arguments) {
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
template <class Work> void run_tasks(int64_t tasks, int64_t threads, Work work) {
  std::atomic<int64_t> next{0};
  run_parallel(tasks, threads, [&] {
    for (int64_t task; (task = next++) < tasks;) work(task);
  });
}
