// Spreading work over threads. Callers split their work into items whose results do not depend on the thread
// that computes them, so every result is the same for every number of threads.
#pragma once

#include <cstdint>

#ifdef CLIPUP_STD_THREADS
#include <atomic>
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace clipup {

// Calls body(i) once for every i in [0, n); in parallel when n >= `parallel_n`. `body` must not throw.
//
// OpenMP where the build has it (the Python module then shares torch's thread pool), a plain loop elsewhere.
// CLIPUP_STD_THREADS is for the thread sanitizer, which understands std::thread but not gcc's OpenMP runtime.
template <class Body>
void parallel_for(std::int64_t n, [[maybe_unused]] std::int64_t parallel_n, const Body& body) {
#ifdef CLIPUP_STD_THREADS
  constexpr std::int64_t kThreads = 4;
  std::vector<std::thread> threads;
  for (std::int64_t thread = 0; n >= parallel_n && thread < kThreads; ++thread) {
    threads.emplace_back([&body, n, thread] {
      for (std::int64_t i = thread; i < n; i += kThreads) body(i);
    });
  }
  for (std::int64_t i = 0; n < parallel_n && i < n; ++i) body(i);
  for (std::thread& thread : threads) thread.join();
#else
#ifdef _OPENMP
#pragma omp parallel for schedule(static) if (n >= parallel_n)
#endif
  for (std::int64_t i = 0; i < n; ++i) body(i);
#endif
}

// The most threads that `parallel_tasks` uses.
inline std::int64_t thread_count() {
#ifdef CLIPUP_STD_THREADS
  return 4;
#elif defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// A thread calls it at the end of its share of tasks (isa.cpp).
void after_tasks();

// Calls body(task, thread) once for every task in [0, n), thread < thread_count(). Tasks are large: a thread
// takes the next one when it has finished the last, so that no thread is idle while tasks remain. `body` must
// not throw.
template <class Body>
void parallel_tasks(std::int64_t n, const Body& body) {
#ifdef CLIPUP_STD_THREADS
  std::atomic<std::int64_t> next{0};
  std::vector<std::thread> threads;
  for (std::int64_t thread = 0; thread < thread_count(); ++thread) {
    threads.emplace_back([&, thread] {
      for (std::int64_t task = next++; task < n; task = next++) body(task, thread);
      after_tasks();
    });
  }
  for (std::thread& thread : threads) thread.join();
#elif defined(_OPENMP)
#pragma omp parallel if (n > 1)
  {
#pragma omp for schedule(dynamic, 1) nowait
    for (std::int64_t task = 0; task < n; ++task) body(task, omp_get_thread_num());
    after_tasks();
  }
#else
  for (std::int64_t task = 0; task < n; ++task) body(task, 0);
  after_tasks();
#endif
}

// Who shares a piece of work: all threads, or one of them alone while others have pieces of their own.
struct Team {
  std::int64_t alone = -1;  // this thread

  std::int64_t size() const { return alone < 0 ? thread_count() : 1; }
  // `parallel_tasks` with the team's threads.
  template <class Body>
  void tasks(std::int64_t n, const Body& body) const {
    if (alone < 0) return parallel_tasks(n, body);
    for (std::int64_t task = 0; task < n; ++task) body(task, alone);
  }
};

// Number of rows of `row_bytes` bytes from which using several threads is worth waking them.
inline std::int64_t parallel_from(std::int64_t row_bytes) {
  constexpr std::int64_t kBytes = 1 << 16;
  return kBytes / (row_bytes + 1) + 2;
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

}  // namespace clipup
