// Small kernels that try the shim itself: what it computes, and whether it notices what is wrong. See test_shim.py.

#include <array>
#include <atomic>
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "launch.cuh"
#include "mma.cuh"

using namespace chargpt;
using namespace chargpt::cuda;

namespace {

constexpr uint32_t kAll = 0xffffffff;
constexpr int kThreads = 64;

// ---- What it computes ----------------------------------------------------------------------------------------------

__global__ void indices(int* out) {  // (blocks, threads, 6)
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  int* mine = out + 6 * (block * blockDim.x * blockDim.y * blockDim.z + thread);
  const unsigned values[6] = {blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z};
  for (int i = 0; i < 6; ++i) mine[i] = static_cast<int>(values[i]);
}

__global__ void shuffles(const int* argument, int* out) {  // out: (10, 32)
  const int lane = static_cast<int>(threadIdx.x), value = 100 + lane;
  int row = 0;
  const auto put = [&](int result) { out[32 * row++ + lane] = result; };
  put(__shfl_sync(kAll, value, 5));
  put(__shfl_sync(kAll, value, lane + 1, 8));
  put(__shfl_xor_sync(kAll, value, 16));
  put(__shfl_xor_sync(kAll, value, 3, 4));
  put(__shfl_down_sync(kAll, value, 5));
  put(__shfl_up_sync(kAll, value, 3, 16));
  put(static_cast<int>(__ballot_sync(kAll, argument[lane] > 0)));
  put(__any_sync(kAll, argument[lane] > 0));
  put(__all_sync(kAll, argument[lane] > 0));
  // Two halves, each with its own mask, at different times.
  const uint32_t half = lane < 16 ? 0xffff : 0xffff0000;
  int sum = value;
  for (int round = 0; round < (lane < 16 ? 1 : 3); ++round) sum += __shfl_xor_sync(half, sum, 1);
  put(sum);
}

__global__ void reverse(const int* in, int* out) {
  int* const shared = reinterpret_cast<int*>(dynamic_shared());
  const unsigned i = threadIdx.x, n = blockDim.x, start = blockIdx.x * n;
  shared[i] = in[start + i];
  __syncthreads();
  out[start + i] = shared[n - 1 - i];
}

__global__ void untouched_shared(float* out) {
  out[threadIdx.x] = reinterpret_cast<float*>(dynamic_shared())[threadIdx.x];
}

// d (16, 8) = a (16, 16) · b (16, 8), all row by row, the fragments filled by the layout of the PTX manual.
template <class T>
__global__ void product(const uint16_t* a, const uint16_t* b, float* d) {
  const int lane = static_cast<int>(threadIdx.x), group = lane >> 2, id = lane & 3;
  uint32_t fa[4], fb[2];
  for (int i = 0; i < 8; i += 2) {
    const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8, column = id * 2 + (i >= 4 ? 8 : 0);
    fa[i / 2] = a[row * 16 + column] | static_cast<uint32_t>(a[row * 16 + column + 1]) << 16;
  }
  for (int i = 0; i < 4; i += 2) {
    const int row = id * 2 + (i >= 2 ? 8 : 0);
    fb[i / 2] = b[row * 8 + group] | static_cast<uint32_t>(b[(row + 1) * 8 + group]) << 16;
  }
  float fd[4];
  for (int i = 0; i < 4; ++i) fd[i] = d[(i < 2 ? group : group + 8) * 8 + id * 2 + (i & 1)];
  mma_m16n8k16<T>(fd, fa, fb);
  for (int i = 0; i < 4; ++i) d[(i < 2 ? group : group + 8) * 8 + id * 2 + (i & 1)] = fd[i];
}

// matrices: (4, 8, 8); out: (32, 12): x4, x4 transposed, x2, x2 transposed
__global__ void load_matrices(const uint16_t* matrices, uint32_t* out) {
  uint16_t* const shared = reinterpret_cast<uint16_t*>(dynamic_shared());
  const unsigned lane = threadIdx.x;
  for (unsigned i = lane; i < 4 * 64; i += 32) shared[i] = matrices[i];
  __syncwarp();
  uint32_t four[4], four_transposed[4], two[2], two_transposed[2];
  ldmatrix_x4(four, shared + 8 * lane);
  ldmatrix_x4_trans(four_transposed, shared + 8 * lane);
  ldmatrix_x2(two, shared + 8 * (lane % 16));
  ldmatrix_x2_trans(two_transposed, shared + 8 * (lane % 16));
  for (int i = 0; i < 4; ++i) out[12 * lane + i] = four[i];
  for (int i = 0; i < 4; ++i) out[12 * lane + 4 + i] = four_transposed[i];
  for (int i = 0; i < 2; ++i) out[12 * lane + 8 + i] = two[i];
  for (int i = 0; i < 2; ++i) out[12 * lane + 10 + i] = two_transposed[i];
}

// Four copies in three groups; out: (4, 4), the four destinations before any wait and after wait<2>, wait<1>, wait<0>.
__global__ void copies(const float* in, float* out) {
  float* const shared = reinterpret_cast<float*>(dynamic_shared());
  const auto look = [&](int time) {
    for (int i = 0; i < 4; ++i) out[4 * time + i] = shared[4 * i];
  };
  cp_async_16(shared, in, true);
  cp_async_16(shared + 4, in + 4, false);
  cp_async_commit();
  cp_async_4(shared + 8, in + 8, true);
  cp_async_commit();
  cp_async_16(shared + 12, in + 12, true);
  cp_async_commit();
  look(0);
  cp_async_wait<2>();
  look(1);
  cp_async_wait<1>();
  look(2);
  cp_async_wait<0>();
  look(3);
}

// ---- How much shared memory a launch may have ----------------------------------------------------------------------

// One kernel for each `number`, since the limit is a kernel's and stays.
template <int number>
__global__ void touch_ends(int bytes) {
  dynamic_shared()[0] = dynamic_shared()[bytes - 1] = static_cast<char>(number);
}

using Touch = void (*)(int);
constexpr auto kTouches = []<int... numbers>(std::integer_sequence<int, numbers...>) {
  return std::array<Touch, sizeof...(numbers)>{touch_ends<numbers>...};
}(std::make_integer_sequence<int, 8>());

int limit(int number) {
  cudaFuncAttributes attributes;
  cudaFuncGetAttributes(&attributes, kTouches[number]);
  return attributes.maxDynamicSharedSizeBytes;
}

struct Mishaps {
  int failed;   // launches
  int lowered;  // times that a thread found, after its launch, a limit below what the chip has
};

// A host thread for each size, all at once, each launches the same kernel `times` times.
Mishaps launch_from_host_threads(int number, const std::vector<int>& sizes, int times) {
  std::atomic<int> failed = 0, lowered = 0;
  std::barrier together(static_cast<std::ptrdiff_t>(sizes.size()));
  std::vector<std::thread> threads;
  for (const int bytes : sizes) {
    threads.emplace_back([&, bytes] {
      together.arrive_and_wait();
      for (int i = 0; i < times; ++i) {
        failed += launch(kTouches[number], dim3(1), dim3(1), bytes, nullptr, bytes) != cudaSuccess ? 1 : 0;
        lowered += limit(number) < host_shared_bytes ? 1 : 0;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return {failed, lowered};
}

// ---- What is wrong -------------------------------------------------------------------------------------------------

// Each is run with 3 blocks of 64 threads, 256 bytes of shared memory, and one int per thread of the grid.

__global__ void fine(int* data) {
  int* const shared = reinterpret_cast<int*>(dynamic_shared());
  const unsigned i = threadIdx.x, start = blockIdx.x * kThreads;
  for (int round = 0; round < 3; ++round) {
    shared[i] = data[start + i];
    __syncthreads();
    data[start + i] = shared[kThreads - 1 - i] + 1;
    __syncthreads();
  }
  shared[i] = data[start + i];
  __syncwarp();
  data[start + i] = shared[i ^ 1] + __shfl_xor_sync(kAll, static_cast<int>(i), 1) + __any_sync(kAll, i == 3);
  __syncthreads();
  if (i < 32) {
    cp_async_8(shared + 2 * i, data + start + 2 * i, true);
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    uint32_t a[4], b[2];
    ldmatrix_x4(a, shared + 4 * (i % 16));
    ldmatrix_x2_trans(b, shared + 4 * (i % 16));
    float d[4] = {};
    mma_m16n8k16<__half>(d, a, b);
    data[start + i] = static_cast<int>(d[0] > 0);
  }
}

__global__ void no_barrier_before_reading(int* data) {
  int* const shared = reinterpret_cast<int*>(dynamic_shared());
  shared[threadIdx.x] = data[blockIdx.x * kThreads + threadIdx.x];
  data[blockIdx.x * kThreads + threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

__global__ void no_barrier_before_writing_again(int* data) {
  int* const shared = reinterpret_cast<int*>(dynamic_shared());
  for (int round = 0; round < 2; ++round) {
    shared[threadIdx.x] = round;
    __syncthreads();
    data[blockIdx.x * kThreads + threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
  }
}

__global__ void warp_barrier_between_warps(int* data) {
  int* const shared = reinterpret_cast<int*>(dynamic_shared());
  shared[threadIdx.x] = 1;
  __syncwarp();
  data[blockIdx.x * kThreads + threadIdx.x] = shared[threadIdx.x ^ 32];
}

__global__ void shuffle_for_a_barrier(int* data) {
  int* const shared = reinterpret_cast<int*>(dynamic_shared());
  shared[threadIdx.x] = 1;
  __shfl_sync(kAll, 0, 0);
  data[blockIdx.x * kThreads + threadIdx.x] = shared[threadIdx.x ^ 1];
}

__global__ void copy_without_barrier(int* data) {
  int* const shared = reinterpret_cast<int*>(dynamic_shared());
  if (threadIdx.x % 4 == 0) {
    cp_async_16(shared + threadIdx.x, data + blockIdx.x * kThreads + threadIdx.x, true);
    cp_async_commit();
    cp_async_wait<0>();
  }
  data[blockIdx.x * kThreads + threadIdx.x] = shared[threadIdx.x ^ 1];
}

__global__ void copy_over_what_others_read(int* data) {
  int* const shared = reinterpret_cast<int*>(dynamic_shared());
  shared[threadIdx.x] = 1;
  __syncthreads();
  const int read = shared[threadIdx.x ^ 1];
  if (threadIdx.x % 4 == 0) {
    cp_async_16(shared + threadIdx.x, data + blockIdx.x * kThreads + threadIdx.x, true);
    cp_async_commit();
  }
  __syncthreads();
  cp_async_wait<0>();
  data[blockIdx.x * kThreads + threadIdx.x] = read;
}

__global__ void two_blocks_write_the_same(int* data) { data[threadIdx.x] = static_cast<int>(blockIdx.x); }

__global__ void two_blocks_read_and_write(int* data) {
  if (blockIdx.x == 0) {
    data[threadIdx.x] = 1;
  } else {
    data[blockIdx.x * kThreads + threadIdx.x] = data[threadIdx.x];
  }
}

__global__ void ldmatrix_without_barrier(int* data) {
  int* const shared = reinterpret_cast<int*>(dynamic_shared());
  shared[threadIdx.x] = data[threadIdx.x];
  uint32_t a[4];
  ldmatrix_x4(a, shared + 4 * (threadIdx.x % 16));
  data[blockIdx.x * kThreads + threadIdx.x] = static_cast<int>(a[0]);
}

__global__ void past_shared(int* data) {
  int* const shared = reinterpret_cast<int*>(dynamic_shared());
  shared[threadIdx.x + 1] = data[threadIdx.x];
}

__global__ void past_global(int* data) { data[blockIdx.x * kThreads + threadIdx.x + 1] += 1; }

__global__ void past_an_array(int* data) {
  int few[4] = {0, 1, 2, 3};
  data[blockIdx.x * kThreads + threadIdx.x] = few[threadIdx.x % 5];
}

__global__ void misaligned_vector(int* data) {
  if (threadIdx.x == 0) data[0] = static_cast<int>(reinterpret_cast<const uint4*>(data + 1)->y);
}

__global__ void half_a_block_at_a_barrier(int* data) {
  if (threadIdx.x < 32) __syncthreads();
  data[blockIdx.x * kThreads + threadIdx.x] = 0;
}

__global__ void different_barriers(int* data) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  data[blockIdx.x * kThreads + threadIdx.x] = 0;
}

__global__ void lanes_missing_from_a_shuffle(int* data) {
  if (threadIdx.x % 2 == 0) data[threadIdx.x] = __shfl_xor_sync(kAll, 1, 2);
}

__global__ void lanes_in_different_shuffles(int* data) {
  data[threadIdx.x] = threadIdx.x % 2 == 0 ? __shfl_xor_sync(kAll, 1, 2) : __shfl_down_sync(kAll, 1, 2);
}

__global__ void caller_not_in_its_mask(int* data) { data[threadIdx.x] = __shfl_sync(0x1, 1, 0); }

__global__ void reads_from_a_lane_outside_the_mask(int* data) {
  if (threadIdx.x % 32 < 16) data[threadIdx.x] = __shfl_sync(0xffff, 1, 20);
}

using Kernel = void (*)(int*);
const std::map<std::string, Kernel>& kernels() {
  static const std::map<std::string, Kernel> all = {
#define CHARGPT_KERNEL(name) {#name, name}
      CHARGPT_KERNEL(fine),
      CHARGPT_KERNEL(no_barrier_before_reading),
      CHARGPT_KERNEL(no_barrier_before_writing_again),
      CHARGPT_KERNEL(warp_barrier_between_warps),
      CHARGPT_KERNEL(shuffle_for_a_barrier),
      CHARGPT_KERNEL(copy_without_barrier),
      CHARGPT_KERNEL(copy_over_what_others_read),
      CHARGPT_KERNEL(two_blocks_write_the_same),
      CHARGPT_KERNEL(two_blocks_read_and_write),
      CHARGPT_KERNEL(ldmatrix_without_barrier),
      CHARGPT_KERNEL(past_shared),
      CHARGPT_KERNEL(past_global),
      CHARGPT_KERNEL(past_an_array),
      CHARGPT_KERNEL(misaligned_vector),
      CHARGPT_KERNEL(half_a_block_at_a_barrier),
      CHARGPT_KERNEL(different_barriers),
      CHARGPT_KERNEL(lanes_missing_from_a_shuffle),
      CHARGPT_KERNEL(lanes_in_different_shuffles),
      CHARGPT_KERNEL(caller_not_in_its_mask),
      CHARGPT_KERNEL(reads_from_a_lane_outside_the_mask),
#undef CHARGPT_KERNEL
  };
  return all;
}

int run_kernel(const std::string& name) {
  std::vector<int> data(3 * kThreads);
  return launch(kernels().at(name), dim3(3), dim3(kThreads), kThreads * sizeof(int), nullptr, data.data());
}

}  // namespace

// ---- For Python ----------------------------------------------------------------------------------------------------

extern "C" {

int run_indices(const unsigned* grid, const unsigned* block, int* out) {
  return launch(indices, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), 0, nullptr, out);
}
int run_shuffles(const int* argument, int* out) { return launch(shuffles, dim3(1), dim3(32), 0, nullptr, argument, out); }
int run_reverse(const int* in, int* out, int blocks, int threads) {
  return launch(reverse, dim3(blocks), dim3(threads), threads * sizeof(int), nullptr, in, out);
}
int run_untouched_shared(float* out) { return launch(untouched_shared, dim3(1), dim3(32), 128, nullptr, out); }
int run_product(const uint16_t* a, const uint16_t* b, float* d, bool bf16) {
  return launch(bf16 ? product<__nv_bfloat16> : product<__half>, dim3(1), dim3(32), 0, nullptr, a, b, d);
}
int run_load_matrices(const uint16_t* matrices, uint32_t* out) {
  return launch(load_matrices, dim3(1), dim3(32), 4 * 128, nullptr, matrices, out);
}
int run_copies(const float* in, float* out) { return launch(copies, dim3(1), dim3(1), 64, nullptr, in, out); }
int run_by_name(const char* name) { return run_kernel(name); }

int run_touch_ends(int number, int bytes) {
  return launch(kTouches[number], dim3(1), dim3(1), bytes, nullptr, bytes);
}
int run_touch_ends_bare(int number, int bytes) {  // as <<<>>> alone does
  cuda_host::launch(kTouches[number], dim3(1), dim3(1), bytes, [=] { kTouches[number](bytes); });
  return cudaGetLastError();
}
int set_shared_limit(int number, int bytes) {
  return cudaFuncSetAttribute(kTouches[number], cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}
int shared_limit(int number) { return limit(number); }
void run_from_host_threads(int number, const int* sizes, int count, int times, int* failed, int* lowered) {
  const Mishaps found = launch_from_host_threads(number, {sizes, sizes + count}, times);
  *failed = found.failed;
  *lowered = found.lowered;
}
int last_error() { return cudaGetLastError(); }
int launches() { return host_launches; }  // so far
void set_chip(int device, int shared_bytes) {
  host_device = device;
  host_shared_bytes = shared_bytes;
}

void widen(const uint16_t* bits, float* out, int count, bool bf16) {
  for (int i = 0; i < count; ++i) out[i] = bf16 ? __bfloat162float({bits[i]}) : __half2float({bits[i]});
}
void narrow(const float* x, uint16_t* bits, int count, bool bf16) {
  for (int i = 0; i < count; ++i) bits[i] = bf16 ? __float2bfloat16_rn(x[i]).bits : __float2half_rn(x[i]).bits;
}

}  // extern "C"

// The kernel to run under a sanitizer, or "host_threads".
int main(int count, char** arguments) {
  if (count != 2) return 2;
  if (std::string(arguments[1]) == "host_threads") {
    const Mishaps found = launch_from_host_threads(0, {60 << 10, 200 << 10}, 50);
    return found.failed + found.lowered == 0 ? 0 : 1;
  }
  return run_kernel(arguments[1]) == cudaSuccess ? 0 : 1;
}
