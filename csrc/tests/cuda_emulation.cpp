// Fibers instead of the threads of a block, and their scheduler.
//
// Nothing here is instrumented, so that the thread sanitizer sees only the ordering that a GPU guarantees,
// and the address sanitizer does not mistake a jump between stacks for returning functions.
#include "cuda_emulation.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);
#endif

#define CLIPUP_UNSEEN __attribute__((no_sanitize("address", "thread")))

namespace clipup::cuda::emulation {
namespace {

constexpr int kWarpSize = 32;
constexpr int kMostThreads = 1024;
constexpr std::size_t kStackBytes = std::size_t{256} << 10U;

// announce() on an address happens before a later observe() of it.
CLIPUP_UNSEEN void announce([[maybe_unused]] void* address) {
#ifdef __SANITIZE_THREAD__
  __tsan_release(address);
#endif
}

CLIPUP_UNSEEN void observe([[maybe_unused]] void* address) {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(address);
#endif
}

[[noreturn]] CLIPUP_UNSEEN void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s\n", what);
  std::abort();
}

struct Fiber {
  void* registers[5];  // of __builtin_setjmp
  ucontext_t start;    // where it begins
  bool started;
  unsigned thread;
  void* stack;
  std::size_t stack_bytes;
  void* fake_stack;  // the address sanitizer's
  void* order;       // the thread sanitizer's
};

// Threads that wait at a barrier. It may fill again before all threads that it released have continued;
// values and addresses that these still read are therefore double-buffered.
struct Barrier {
  int arrived;
  int waiting[kMostThreads];
};

struct Warp {
  Barrier barrier;
  unsigned generation;
  Collective instruction;
  std::uint64_t values[2][kWarpSize];
  char syncs[2];  // addresses
};

Fiber main_fiber;
Fiber fibers[kMostThreads];
Fiber* running = nullptr;
Warp warps[kMostThreads / kWarpSize];
Barrier block_barrier;
unsigned block_generation = 0;
char block_syncs[2];
char launch_begin, launch_end;  // addresses

int ready[kMostThreads];
int ready_count = 0, finished = 0;
unsigned block = 0, threads_of_block = 0, blocks_of_grid = 0;
const std::function<void()>* body_of_launch = nullptr;
std::uint64_t schedule = 0, drawn = 0;

// A random number below `end` (splitmix64).
CLIPUP_UNSEEN std::uint64_t draw(std::uint64_t end) {
  std::uint64_t x = schedule + ++drawn * 0x9E3779B97F4A7C15U;
  x = (x ^ (x >> 30U)) * 0xBF58476D1CE4E5B9U;
  x = (x ^ (x >> 27U)) * 0x94D049BB133111EBU;
  return (x ^ (x >> 31U)) % end;
}

[[noreturn]] __attribute__((noinline)) CLIPUP_UNSEEN void jump(void** registers) {
  __builtin_longjmp(registers, 1);
}

// __builtin_setjmp costs a few instructions; swapcontext would ask the system for the signal mask.
__attribute__((noinline)) CLIPUP_UNSEEN void go_to(Fiber& to) {
  Fiber& from = *running;
  running = &to;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(to.order, __tsan_switch_to_fiber_no_sync);
#endif
  if (__builtin_setjmp(from.registers) == 0) {
    if (to.started) jump(to.registers);
    to.started = true;
    setcontext(&to.start);
  }
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(running->fake_stack, nullptr, nullptr);
#endif
}

// A fiber runs the threads of its index in successive blocks.
CLIPUP_UNSEEN void serve() {
#ifdef __SANITIZE_ADDRESS__
  const void* stack = nullptr;
  std::size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
  main_fiber.stack = const_cast<void*>(stack);
  main_fiber.stack_bytes = bytes;
#endif
  for (;;) {
    observe(&launch_begin);
    (*body_of_launch)();
    announce(&launch_end);
    ++finished;
    go_to(main_fiber);
  }
}

CLIPUP_UNSEEN void create(Fiber& fiber) {
  fiber.stack_bytes = kStackBytes;
  fiber.stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (fiber.stack == MAP_FAILED) fail("no memory for a stack");
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack;
  fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, serve, 0);
#ifdef __SANITIZE_THREAD__
  fiber.order = __tsan_create_fiber(0);
#endif
}

// The running fiber waits until `count` have arrived.
CLIPUP_UNSEEN void wait_at(Barrier& barrier, unsigned count) {
  const unsigned thread = running->thread;
  barrier.waiting[barrier.arrived++] = static_cast<int>(thread);
  if (barrier.arrived == static_cast<int>(count)) {
    for (int i = 0; i < barrier.arrived; ++i) ready[ready_count++] = barrier.waiting[i];
    barrier.arrived = 0;
  }
  go_to(main_fiber);
}

CLIPUP_UNSEEN void run_block() {
  for (unsigned thread = 0; thread < threads_of_block; ++thread) {
    if (fibers[thread].stack == nullptr) create(fibers[thread]);
    fibers[thread].thread = thread;
    ready[thread] = static_cast<int>(threads_of_block - 1 - thread);
  }
  ready_count = static_cast<int>(threads_of_block);
  finished = 0;
  announce(&launch_begin);
  while (ready_count > 0) {
    const int place = schedule == 0 ? ready_count - 1 : static_cast<int>(draw(ready_count));
    std::swap(ready[place], ready[ready_count - 1]);
    go_to(fibers[ready[--ready_count]]);
  }
  observe(&launch_end);
  if (finished != static_cast<int>(threads_of_block)) {
    fail("threads of a block wait for others that have ended or wait at another barrier");
  }
}

}  // namespace

CLIPUP_UNSEEN Index thread_index() { return {running->thread}; }
CLIPUP_UNSEEN Index block_index() { return {block}; }
CLIPUP_UNSEEN Index block_size() { return {threads_of_block}; }
CLIPUP_UNSEEN Index grid_size() { return {blocks_of_grid}; }

CLIPUP_UNSEEN void wait_for_block() {
  if (block_barrier.arrived == 0) ++block_generation;
  char* const sync = &block_syncs[block_generation % 2];
  announce(sync);
  wait_at(block_barrier, threads_of_block);
  observe(sync);
}

CLIPUP_UNSEEN const std::uint64_t* exchange(Collective instruction, unsigned lanes, std::uint64_t value) {
  if (lanes != 0xFFFFFFFFU) fail("all lanes of a warp must execute a collective instruction");
  Warp& warp = warps[running->thread / kWarpSize];
  if (warp.barrier.arrived == 0) {
    ++warp.generation;
    warp.instruction = instruction;
  }
  if (warp.instruction != instruction) fail("lanes of a warp have met at different instructions");
  std::uint64_t* const values = warp.values[warp.generation % 2];
  char* const sync = &warp.syncs[warp.generation % 2];
  values[running->thread % kWarpSize] = value;
  if (instruction == Collective::kSync) announce(sync);
  wait_at(warp.barrier, kWarpSize);
  if (instruction == Collective::kSync) observe(sync);
  return values;
}

void set_schedule(std::uint64_t seed) {
  schedule = seed;
  drawn = 0;
}

CLIPUP_UNSEEN void run(std::int64_t blocks, int threads, const std::function<void()>& body) {
  if (threads <= 0 || threads > kMostThreads || threads % kWarpSize != 0 || blocks <= 0 ||
      blocks > INT32_MAX) {
    fail("a launch takes 1 to 2^31 - 1 blocks of whole warps, 1024 threads at most");
  }
  if (running == nullptr) {
    main_fiber.started = true;
#ifdef __SANITIZE_THREAD__
    main_fiber.order = __tsan_get_current_fiber();
#endif
    running = &main_fiber;
  }
  body_of_launch = &body;
  threads_of_block = static_cast<unsigned>(threads);
  blocks_of_grid = static_cast<unsigned>(blocks);
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  for (unsigned i = blocks_of_grid; schedule != 0 && i > 1; --i) std::swap(order[i - 1], order[draw(i)]);
  for (const unsigned next : order) {
    block = next;
    run_block();
  }
}

}  // namespace clipup::cuda::emulation
