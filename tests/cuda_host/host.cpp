// The machine behind cuda_runtime.h: fibers, the scheduler of a block, barriers and warp operations.
//
// A block is run by one OS thread: warp after warp, and in a warp lane after lane, each until it waits for others or
// returns. When nobody can go on and somebody still waits, the block is stuck, which is reported. This file is compiled
// without instrumentation in all builds (its own bookkeeping is shared by all fibers on purpose); under a sanitizer
// CUDA_HOST_ASAN or CUDA_HOST_TSAN says so, and the sanitizer is told of every switch.

#include <sys/mman.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "mma_host.h"

#if defined(CUDA_HOST_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(CUDA_HOST_TSAN)
#include <sanitizer/tsan_interface.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

thread_local uint3 threadIdx, blockIdx;
thread_local dim3 blockDim, gridDim;

namespace cuda_host {
namespace {

#if defined(CUDA_HOST_TSAN)
constexpr bool kTsan = true;
#else
constexpr bool kTsan = false;
#endif
constexpr size_t kStackBytes = size_t{256} << 10;
constexpr unsigned kMostThreads = 1024;
constexpr uint32_t kAllLanes = 0xffffffff;
constexpr int kSharedWithoutAsking = 48 << 10;

// ---- Errors, and the kernels' shared memory ------------------------------------------------------------------------

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t record(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// Bytes that a block of a kernel may have, by device and kernel, as cudaFuncSetAttribute has set them.
class SharedLimits {
 public:
  void set(const void* kernel, int bytes) {
    const std::lock_guard lock(mutex_);
    limits_[{host_device, kernel}] = bytes;
  }
  int get(const void* kernel) {
    const std::lock_guard lock(mutex_);
    const auto found = limits_.find({host_device, kernel});
    return found == limits_.end() ? kSharedWithoutAsking : found->second;
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<int, const void*>, int> limits_;
} shared_limits;

// ---- Switching between stacks --------------------------------------------------------------------------------------

#if defined(__x86_64__)

// Saves the registers that a function must keep and the stack pointer, and takes those of another stack.
extern "C" void cuda_host_switch(void** save, void* const* load);
asm(R"(
.text
.globl cuda_host_switch
.hidden cuda_host_switch
cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

struct Context {
  void* stack_pointer;

  void start(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStackBytes) - 2;  // the stack is a multiple of 16 at a call
    *top = reinterpret_cast<void*>(entry);
    stack_pointer = top - 6;
  }
  void switch_to(Context& other) { cuda_host_switch(&stack_pointer, &other.stack_pointer); }
};

#else

struct Context {
  ucontext_t context;

  void start(char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    makecontext(&context, entry, 0);
  }
  void switch_to(Context& other) { swapcontext(&context, &other.context); }
};

#endif

// ---- Stacks --------------------------------------------------------------------------------------------------------

// The stacks of one block, each above a page that nobody may touch.
class Stacks {
 public:
  explicit Stacks(size_t count) : bytes_(count * kStride) {
    data_ = static_cast<char*>(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (data_ == MAP_FAILED) std::abort();
    for (size_t i = 0; i < count; ++i) mprotect(data_ + i * kStride, kGuard, PROT_NONE);
#if defined(CUDA_HOST_ASAN)
    ASAN_UNPOISON_MEMORY_REGION(data_, bytes_);  // what was here before may have left marks
#endif
  }
  ~Stacks() { munmap(data_, bytes_); }
  Stacks(const Stacks&) = delete;
  char* operator[](size_t i) { return data_ + i * kStride + kGuard; }

 private:
  static constexpr size_t kGuard = 4096, kStride = kGuard + kStackBytes;
  char* data_;
  size_t bytes_;
};

// Making stacks costs more than most kernels of a test, so they wait here for the next launch.
class StackPool {
 public:
  std::unique_ptr<Stacks> take() {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) return std::make_unique<Stacks>(kMostThreads);
    std::unique_ptr<Stacks> stacks = std::move(free_.back());
    free_.pop_back();
    return stacks;
  }
  void give_back(std::unique_ptr<Stacks> stacks) {
    const std::lock_guard lock(mutex_);
    free_.push_back(std::move(stacks));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Stacks>> free_;
} stack_pool;

// ---- Blocks --------------------------------------------------------------------------------------------------------

// What the last lane to come to a warp operation does for all: lanes[i] is what lane i brings, nullptr where it has no
// part.
using Meet = void(void* const (&lanes)[32]);

struct Thread {
  Context context;
  uint3 index;
  unsigned number;
  AsyncCopies copies;
  const char* waits_for = nullptr;  // nullptr: for nothing
  Where where;
  uint32_t mask = 0;  // of the warp operation that it waits for
  void* mine = nullptr;
  void* sanitizer = nullptr;  // its name for this fiber
};

struct Warp {
  uint32_t lanes = 0, ready = 0, waiting = 0;  // waiting: for a warp operation
  char order = 0;                              // its address stands for __syncwarp
};

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  void (*body)(const void*);
  const void* context;
  std::atomic<uint64_t> next_block{0};
  std::atomic<bool> failed{false};
  char order = 0;  // its address stands for the end of the kernel
};

class Block {
 public:
  Block(Launch& launch, uint3 index, Stacks& stacks);
  ~Block();
  Block(const Block&) = delete;
  void run();
  static void enter();  // where fibers begin

  Thread& self() { return *current_; }
  char* shared() { return shared_; }
  void wait();  // until somebody makes this thread ready
  void meet(const char* name, uint32_t mask, void* mine, Meet* meet, Where where);
  void barrier(Where where);
  void order(char* address, bool after);
  [[noreturn]] void fail(const std::string& what);
  char* warp_order() { return &warp_of(self()).order; }
  char* block_order() { return &order_; }

 private:
  Warp& warp_of(const Thread& thread) { return warps_[thread.number / 32]; }
  void resume(Thread& thread);
  void switch_to(Context& from, Context& to, void** sanitizer_from, void* sanitizer_to, const char* stack);
  void report_stuck();

  Launch& launch_;
  uint3 index_;
  Stacks& stacks_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  char* shared_ = nullptr;
  unsigned done_ = 0, at_barrier_ = 0;
  Where barrier_where_;
  char order_ = 0;  // its address stands for __syncthreads
  Thread* current_ = nullptr;
  Context scheduler_;
  void* sanitizer_ = nullptr;  // its name for the scheduler's stack
  const void* own_stack_ = nullptr;
  size_t own_stack_bytes_ = 0;
};

thread_local Block* block_here = nullptr;

std::string place(const Where& where) {
  return std::string(where.file_name()) + ":" + std::to_string(where.line());
}

Block::Block(Launch& launch, uint3 index, Stacks& stacks)
    : launch_(launch), index_(index), stacks_(stacks) {
  const dim3 size = launch.block;
  threads_ = std::vector<Thread>(size.x * size.y * size.z);
  warps_ = std::vector<Warp>((threads_.size() + 31) / 32);
  if (launch.shared_bytes > 0) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, launch.shared_bytes) != 0) std::abort();
    shared_ = static_cast<char*>(memory);
    std::memset(shared_, 0xff, launch.shared_bytes);
  }
#if defined(CUDA_HOST_TSAN)
  sanitizer_ = __tsan_get_current_fiber();
#endif
  for (unsigned i = 0; i < threads_.size(); ++i) {
    Thread& thread = threads_[i];
    thread.number = i;
    thread.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    thread.context.start(stacks[i], enter);
    warps_[i / 32].lanes |= 1u << i % 32;
    warps_[i / 32].ready |= 1u << i % 32;
#if defined(CUDA_HOST_TSAN)
    thread.sanitizer = __tsan_create_fiber(0);
#endif
  }
}

Block::~Block() {
#if defined(CUDA_HOST_TSAN)
  for (Thread& thread : threads_) __tsan_destroy_fiber(thread.sanitizer);
#endif
  std::free(shared_);
}

void Block::enter() {
  Block& block = *block_here;
#if defined(CUDA_HOST_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &block.own_stack_, &block.own_stack_bytes_);
#endif
  block.launch_.body(block.launch_.context);
  block.order(&block.launch_.order, false);
  block.self().waits_for = nullptr;
  ++block.done_;
  block.wait();
  std::abort();  // nobody resumes a thread that is done
}

void Block::run() {
  block_here = this;
  blockIdx = index_;
  blockDim = launch_.block;
  gridDim = launch_.grid;
  for (bool progress = true; progress && done_ < threads_.size() && !launch_.failed;) {
    progress = false;
    for (size_t w = 0; w < warps_.size(); ++w) {
      while (warps_[w].ready != 0 && !launch_.failed) {
        progress = true;
        resume(threads_[32 * w + static_cast<unsigned>(std::countr_zero(warps_[w].ready))]);
      }
    }
  }
  if (done_ < threads_.size() && !launch_.failed) report_stuck();
}

void Block::resume(Thread& thread) {
  current_ = &thread;
  threadIdx = thread.index;
#if defined(CUDA_HOST_ASAN)
  __sanitizer_start_switch_fiber(&sanitizer_, stacks_[thread.number], kStackBytes);
#elif defined(CUDA_HOST_TSAN)
  __tsan_switch_to_fiber(thread.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  scheduler_.switch_to(thread.context);
#if defined(CUDA_HOST_ASAN)
  __sanitizer_finish_switch_fiber(sanitizer_, nullptr, nullptr);
#endif
}

void Block::wait() {
  Thread& thread = self();
  warp_of(thread).ready &= ~(1u << thread.number % 32);
#if defined(CUDA_HOST_ASAN)
  __sanitizer_start_switch_fiber(&thread.sanitizer, own_stack_, own_stack_bytes_);
#elif defined(CUDA_HOST_TSAN)
  __tsan_switch_to_fiber(sanitizer_, __tsan_switch_to_fiber_no_sync);
#endif
  thread.context.switch_to(scheduler_);
#if defined(CUDA_HOST_ASAN)
  __sanitizer_finish_switch_fiber(thread.sanitizer, nullptr, nullptr);
#endif
}

void Block::fail(const std::string& what) {
  if (!launch_.failed.exchange(true)) {
    std::fprintf(stderr, "cuda_host: block (%u, %u, %u): %s\n", index_.x, index_.y, index_.z, what.c_str());
  }
  for (;;) wait();
}

// All wait, or are done: who waits where?
void Block::report_stuck() {
  std::map<std::string, std::pair<unsigned, unsigned>> groups;  // place -> how many, and the first of them
  for (const Thread& thread : threads_) {
    const std::string what =
        thread.waits_for == nullptr ? "returned" : std::string("wait in ") + thread.waits_for + " at " + place(thread.where);
    ++groups.try_emplace(what, 0, thread.number).first->second.first;
  }
  std::string all = "stuck:";
  for (const auto& [what, count] : groups) {
    all += " " + std::to_string(count.first) + " threads (" + std::to_string(count.second) + ", …) " + what + ";";
  }
  launch_.failed = true;
  std::fprintf(stderr, "cuda_host: block (%u, %u, %u) is %s\n", index_.x, index_.y, index_.z, all.c_str());
}

void Block::meet(const char* name, uint32_t mask, void* mine, Meet* meet, Where where) {
  Thread& thread = self();
  Warp& warp = warp_of(thread);
  const uint32_t bit = 1u << thread.number % 32;
  mask &= warp.lanes;
  if ((mask & bit) == 0) fail(std::string(name) + " at " + place(where) + ": the caller is not in its own mask");
  thread.waits_for = name;
  thread.where = where;
  thread.mask = mask;
  thread.mine = mine;
  warp.waiting |= bit;
  if ((warp.waiting & mask) != mask) {
    wait();
    return;
  }
  void* lanes[32] = {};
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1) == 0) continue;
    Thread& other = threads_[thread.number / 32 * 32 + i];
    if (other.waits_for != name || other.mask != mask || other.where.line() != where.line()) {
      fail("lanes of a warp meet at different operations: " + std::string(name) + " at " + place(where) + " and " +
           other.waits_for + " at " + place(other.where));
    }
    lanes[i] = other.mine;
  }
  meet(lanes);
  for (int i = 0; i < 32; ++i) {
    if (lanes[i] != nullptr) threads_[thread.number / 32 * 32 + i].waits_for = nullptr;
  }
  warp.waiting &= ~mask;
  warp.ready |= mask;
}

void Block::barrier(Where where) {
  Thread& thread = self();
  if (at_barrier_ == 0) {
    barrier_where_ = where;
  } else if (barrier_where_.line() != where.line() ||
             std::strcmp(barrier_where_.file_name(), where.file_name()) != 0) {
    fail("threads of a block meet at different barriers: " + place(barrier_where_) + " and " + place(where));
  }
  thread.waits_for = "__syncthreads";
  thread.where = where;
  if (++at_barrier_ < threads_.size()) {
    wait();
    return;
  }
  at_barrier_ = 0;
  for (Thread& other : threads_) other.waits_for = nullptr;
  for (Warp& warp : warps_) warp.ready = warp.lanes;
}

// Tells ThreadSanitizer that what came before (after = false) is ordered before what comes after (true).
void Block::order([[maybe_unused]] char* address, [[maybe_unused]] bool after) {
#if defined(CUDA_HOST_TSAN)
  after ? __tsan_acquire(address) : __tsan_release(address);
#endif
}

}  // namespace

// ---- What kernels call ---------------------------------------------------------------------------------------------

char* dynamic_shared() { return block_here->shared(); }

int lane() { return static_cast<int>(block_here->self().number % 32); }

AsyncCopies& async_copies() { return block_here->self().copies; }

void fail(const char* what, Where where) {
  block_here->fail(std::string(what) + " at " + place(where));
  std::abort();
}

// Under ThreadSanitizer threads meet twice: were the first to leave also free to go on, what it does next would be
// counted as done before the barrier.
void barrier(Where where) {
  Block& block = *block_here;
  block.order(block.block_order(), false);
  block.barrier(where);
  if constexpr (kTsan) {
    block.order(block.block_order(), true);
    block.barrier(where);
  }
}

void warp_barrier(uint32_t mask, Where where) {
  Block& block = *block_here;
  const auto meet = [&] { block.meet("__syncwarp", mask, &block, [](void* const(&)[32]) {}, where); };
  block.order(block.warp_order(), false);
  meet();
  if constexpr (kTsan) {
    block.order(block.warp_order(), true);
    meet();
  }
}

namespace {

cudaError_t run_grid(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*),
                     const void* context) {
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z, threads = uint64_t{block.x} * block.y * block.z;
  if (blocks == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || threads == 0 ||
      threads > kMostThreads || block.z > 64) {
    return cudaErrorInvalidConfiguration;
  }
  if (shared_bytes > static_cast<size_t>(std::min(shared_limits.get(kernel), host_shared_bytes))) {
    return cudaErrorInvalidValue;
  }
  Launch launch{.grid = grid, .block = block, .shared_bytes = shared_bytes, .body = body, .context = context};
  // ThreadSanitizer takes memory that is used again for the same memory, so there every block keeps its own to the end.
  std::vector<std::unique_ptr<Stacks>> kept_stacks;
  std::vector<std::unique_ptr<Block>> kept_blocks;
  const auto take_blocks = [&] {
    std::unique_ptr<Stacks> stacks = kTsan ? nullptr : stack_pool.take();
    for (uint64_t i = launch.next_block++; i < blocks && !launch.failed; i = launch.next_block++) {
      if (kTsan) kept_stacks.push_back(std::make_unique<Stacks>(threads));
      const uint3 index{static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                        static_cast<unsigned>(i / grid.x / grid.y)};
      auto one = std::make_unique<Block>(launch, index, kTsan ? *kept_stacks.back() : *stacks);
      one->run();
      if (kTsan) kept_blocks.push_back(std::move(one));
    }
    if (!kTsan && !launch.failed) stack_pool.give_back(std::move(stacks));  // not those of threads that never ended
  };
  const uint64_t workers = kTsan ? 1 : std::min<uint64_t>(blocks, std::max(1u, std::thread::hardware_concurrency()));
  std::vector<std::thread> others;
  for (uint64_t i = 1; i < workers; ++i) others.emplace_back(take_blocks);
  take_blocks();
  for (std::thread& other : others) other.join();
#if defined(CUDA_HOST_TSAN)
  __tsan_acquire(&launch.order);
#endif
  return launch.failed ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace

void run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*),
         const void* context) {
  ++host_launches;
  record(run_grid(kernel, grid, block, shared_bytes, body, context));
}

// ---- Warp operations -----------------------------------------------------------------------------------------------

uint64_t exchange(const char* name, uint32_t mask, uint64_t value, int source, Where where) {
  struct Mine {
    uint64_t value, result;
    int source;
    bool valid;
  } mine{value, 0, source, false};
  block_here->meet(name, mask, &mine, [](void* const(&lanes)[32]) {
    for (void* lane : lanes) {
      if (lane == nullptr) continue;
      Mine& to = *static_cast<Mine*>(lane);
      const Mine* from = static_cast<const Mine*>(lanes[to.source]);
      to.valid = from != nullptr;
      to.result = to.valid ? from->value : 0;
    }
  }, where);
  if (!mine.valid) fail("a shuffle reads from a lane that takes no part", where);
  return mine.result;
}

uint32_t ballot(uint32_t mask, bool vote, Where where) {
  struct Mine {
    bool vote;
    uint32_t result;
  } mine{vote, 0};
  block_here->meet("a vote", mask, &mine, [](void* const(&lanes)[32]) {
    uint32_t all = 0;
    for (int i = 0; i < 32; ++i) all |= lanes[i] != nullptr && static_cast<const Mine*>(lanes[i])->vote ? 1u << i : 0;
    for (void* lane : lanes) {
      if (lane != nullptr) static_cast<Mine*>(lane)->result = all;
    }
  }, where);
  return mine.result;
}

namespace {

struct LoadMatrix {
  const Row& row;
  uint32_t* result;
  int matrices;
  bool transposed;
};

void meet_for_ldmatrix(void* const (&lanes)[32]) {
  const auto element = [&](int matrix, int row, int column) -> uint32_t {
    return static_cast<const LoadMatrix*>(lanes[8 * matrix + row])->row[column];
  };
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const LoadMatrix& mine = *static_cast<const LoadMatrix*>(lanes[lane]);
    for (int i = 0; i < mine.matrices; ++i) {
      mine.result[i] = mine.transposed ? element(i, 2 * t, g) | element(i, 2 * t + 1, g) << 16
                                       : element(i, g, 2 * t) | element(i, g, 2 * t + 1) << 16;
    }
  }
}

struct Mma {
  float* d;
  const uint32_t *a, *b;
};

float widen_bf16(uint32_t bits) { return __bfloat162float({static_cast<uint16_t>(bits)}); }
float widen_fp16(uint32_t bits) { return __half2float({static_cast<uint16_t>(bits)}); }

template <float (*widen)(uint32_t)>
void meet_for_mma(void* const (&lanes)[32]) {
  float A[16][16], B[16][8], C[16][8] = {};
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& mine = *static_cast<const Mma*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; ++i) {
      A[g + i / 2 % 2 * 8][2 * t + i / 4 * 8 + i % 2] = widen(mine.a[i / 2] >> 16 * (i % 2) & 0xffff);
    }
    for (int i = 0; i < 4; ++i) B[2 * t + i / 2 * 8 + i % 2][g] = widen(mine.b[i / 2] >> 16 * (i % 2) & 0xffff);
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) C[row][column] += A[row][k] * B[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* d = static_cast<const Mma*>(lanes[lane])->d;
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) d[i] += C[g + i / 2 * 8][2 * t + i % 2];
  }
}

}  // namespace

void distribute_matrices(const Row& row, uint32_t* result, int matrices, bool transposed, Where where) {
  LoadMatrix mine{row, result, matrices, transposed};
  block_here->meet("ldmatrix", kAllLanes, &mine, meet_for_ldmatrix, where);
}
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
  Mma mine{d, a, b};
  block_here->meet("mma", kAllLanes, &mine, meet_for_mma<widen_bf16>, where);
}
void mma_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
  Mma mine{d, a, b};
  block_here->meet("mma", kAllLanes, &mine, meet_for_mma<widen_fp16>, where);
}

}  // namespace cuda_host

// ---- What launchers call -------------------------------------------------------------------------------------------

cudaError_t cudaGetLastError() { return std::exchange(cuda_host::last_error, cudaSuccess); }

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > host_shared_bytes) {
    return cuda_host::record(cudaErrorInvalidValue);
  }
  cuda_host::shared_limits.set(kernel, value);
  std::this_thread::yield();  // gives other host threads a chance to set theirs before this one launches
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  attributes->maxDynamicSharedSizeBytes = cuda_host::shared_limits.get(kernel);
  return cudaSuccess;
}
