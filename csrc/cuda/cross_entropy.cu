// Softmax cross-entropy, loss and gradient, with one read of the logits and one write of the gradient.
//
// For a row x of V logits with target y, smoothing e, z-loss weight z and a factor s on its loss:
//   m = max x,  S = sum exp(x - m),  lse = m + log S
//   loss       = (1 - e) (lse - x_y) + e (lse - mean x) + z lse^2
//   gradient_j = s [(1 + 2 z lse) exp(x_j - m) / S - e / V - (1 - e) (j == y)]
// With softcap c the x above are c tanh(logit / c), and gradient_j gains the factor 1 - (x_j / c)^2. Exponentials are
// 2^((x - m) log2 e), the difference taken first: it is exact where it matters, however large the logits are.
//
// Between the sums and the gradient a row has to be kept somewhere. By length, in chunks of 16 bytes (row.cuh):
//   up to 256      short_rows: in registers, 8 or 32 lanes for a row. At V = 65 the rows that a warp reads together lie
//                  side by side, so it reads whole cache lines although each row starts at an odd element.
//   more           long_rows, resident: in shared memory, one block for a row, maximum and sum in one sweep (the sum is
//                  rescaled when the maximum grows; Milakov & Gimelshein 2018). A block goes through many rows, and each
//                  thread asks for its chunks of the next row as soon as it has used those of this one, so reading goes
//                  on while the gradient is written. V = 50257 takes 98 KiB in bfloat16, two blocks on a multiprocessor
//                  of an H100 (228 KiB), and 196 KiB in float32, one.
//   what does not  the same with as much of the row as fits, where that is half of it at least: at V = 128256 in
//   fit there      bfloat16 nine tenths of 250 KiB. The second sweep reads the rest again, most likely from the L2 cache.
//                  Longer rows are kept nowhere (long_rows, not resident). Without a gradient there is one sweep.
// The backward that gets the sums is one sweep over the row in any layout. Means divide by the number of rows that are
// not ignored, which are counted first; losses are added at the end: nobody waits for the GPU. Of many rows each block
// takes a span, and one more block adds up what these blocks found.

#include "cross_entropy.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "cross_entropy_row.cuh"

namespace chargpt::cuda {
namespace {

constexpr int kMostThreads = 1024;  // of a block
constexpr int kShortThreads = 256;  // of a block of short_rows, gradients and scale
constexpr int kSpan = 8192;         // elements that a block of scale has

// ---- Kernels -------------------------------------------------------------------------------------------------------

// kLanes lanes for a row, each with up to kChunks chunks in registers.
// budget: short_rows registers<=80 shared<=0
template <class T, int kLanes, int kChunks>
__global__ void __launch_bounds__(kShortThreads) short_rows(const LossProblem<T> problem) {
  constexpr int kEdges = (kMostEdges<T> + kLanes - 1) / kLanes;
  const int64_t i = int64_t{blockIdx.x} * (kShortThreads / kLanes) + threadIdx.x / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int target = i < problem.N ? problem.target(i) : kIgnored;
  // Ignored rows, and those after the last one, have no elements: their lanes only come along.
  const Row<T> row(problem.row(i), target == kIgnored ? 0 : problem.V);

  uint4 chunks[kChunks];
  float edges[kEdges] = {};
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (lane + c * kLanes < row.chunks) chunks[c] = __ldg(row.chunk(lane + c * kLanes));
  }
#pragma unroll
  for (int e = 0; e < kEdges; ++e) {
    if (lane + e * kLanes < row.edges) edges[e] = row.edge(lane + e * kLanes);
  }
  const float target_logit = problem.target_logit(i, target), pivot = pivot_at(target_logit);

  Sums sums = no_sums();
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (lane + c * kLanes < row.chunks) add_chunk(sums, problem, chunks[c], pivot);
  }
#pragma unroll
  for (int e = 0; e < kEdges; ++e) {
    if (lane + e * kLanes < row.edges) add_edge(sums, problem, edges[e], pivot);
  }
  sums = reduce_lanes<kLanes>(sums, Merge{});

  if (i >= problem.N) return;
  if (lane == 0) finish_row(problem, i, target, sums, pivot, target_logit);
  if (problem.gradient == nullptr) return;
  if (target == kIgnored) return put_zeros(problem.gradient_row(i), problem.V, lane, kLanes);
  const GradientRow<T> gradient(problem, i, target, sums.maximum, sums.sum, target_logit);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (lane + c * kLanes < row.chunks) gradient.put_chunk(row.chunk_at(lane + c * kLanes), chunks[c]);
  }
#pragma unroll
  for (int e = 0; e < kEdges; ++e) {
    if (lane + e * kLanes < row.edges) gradient.put_edge(row.edge_at(lane + e * kLanes), edges[e]);
  }
}

// A block for a row, kResident: its first `room` chunks are kept in shared memory, chunk c at held[c], where its thread
// alone looks. So no barrier is needed before the thread, which has the values in registers by then, asks for the next row's chunk in their place.
// budget: long_rows registers<=64 shared<=0
template <class T, bool kResident>
__global__ void __launch_bounds__(kMostThreads) long_rows(const LossProblem<T> problem, int room) {
  Sums* scratch = reinterpret_cast<Sums*>(dynamic_shared());  // (2, kWarp)
  uint4* const held = reinterpret_cast<uint4*>(dynamic_shared() + kScratchBytes);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const auto target_of = [&](int64_t i) { return i < problem.N ? problem.target(i) : kIgnored; };
  const auto row_of = [&](int64_t i, int target) {  // of nothing where there is nothing to do
    return Row<T>(problem.row(i), target == kIgnored ? 0 : problem.V);
  };

  int target = target_of(blockIdx.x);
  Row<T> row = row_of(blockIdx.x, target);
  if (kResident) {
    for (int c = thread; c < min(row.chunks, room); c += threads) cp_async_16(held + c, row.chunk(c), true);
    cp_async_commit();
  }
  for (int64_t i = blockIdx.x, next = i + gridDim.x; i < problem.N; i = next, next += gridDim.x) {
    const int next_target = target_of(next);
    const Row<T> next_row = row_of(next, next_target);
    const float target_logit = problem.target_logit(i, target), pivot = pivot_at(target_logit);
    const float edge = thread < row.edges ? row.edge(thread) : 0.0f;

    Sums sums = no_sums();
    if (kResident) cp_async_wait<0>();
#pragma unroll 4
    for (int c = thread; c < row.chunks; c += threads) {
      add_chunk(sums, problem, kResident && c < room ? held[c] : __ldg(row.chunk(c)), pivot);
    }
    if (thread < row.edges) add_edge(sums, problem, edge, pivot);
    sums = reduce_block(sums, no_sums(), scratch, Merge{});
    scratch += scratch == reinterpret_cast<Sums*>(dynamic_shared()) ? kWarp : -kWarp;
    if (thread == 0) finish_row(problem, i, target, sums, pivot, target_logit);

    if (problem.gradient != nullptr) {
      const GradientRow<T> gradient(problem, i, target, sums.maximum, sums.sum, target_logit);
      if (target == kIgnored) put_zeros(gradient.out, problem.V, thread, threads);
      if (thread < row.edges) gradient.put_edge(row.edge_at(thread), edge);
#pragma unroll 4
      for (int c = thread; c < max(row.chunks, kResident ? next_row.chunks : 0); c += threads) {
        const bool is_held = kResident && c < room;
        if (c < row.chunks) gradient.put_chunk(row.chunk_at(c), is_held ? held[c] : __ldg(row.chunk(c)));
        if (is_held && c < next_row.chunks) cp_async_16(held + c, next_row.chunk(c), true);
      }
      if (kResident) cp_async_commit();
    }
    row = next_row;
    target = next_target;
  }
}

// The backward, where the forward has left maxima and sums: `lanes` threads, a power of two, for a row.
// budget: gradients registers<=64 shared<=0
template <class T>
__global__ void __launch_bounds__(kShortThreads) gradients(const LossProblem<T> problem, int lanes) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % lanes;
  const int64_t i = int64_t{blockIdx.x} * (kShortThreads / lanes) + thread / lanes;
  if (i >= problem.N) return;
  const int target = problem.target(i);
  if (target == kIgnored) return put_zeros(problem.gradient_row(i), problem.V, lane, lanes);
  const Row<T> row(problem.row(i), problem.V);
  const GradientRow<T> gradient(problem, i, target, problem.maxima[i], problem.sums[i],
                                problem.target_logit(i, target));
#pragma unroll 4
  for (int c = lane; c < row.chunks; c += lanes) gradient.put_chunk(row.chunk_at(c), __ldg(row.chunk(c)));
  for (int e = lane; e < row.edges; e += lanes) gradient.put_edge(row.edge_at(e), row.edge(e));
}

// ---- Sums over the rows --------------------------------------------------------------------------------------------

// Rows that one block counts, or adds the losses of: 16 for each of its threads, on every chip, so that the order of
// addition depends on N alone. The 64 x 256 tokens of a training step on a GPU are one span, done by one block; a
// second launch for so little would cost more than it saves. (Reasoned, not measured.)
constexpr int64_t kSumSpan = 16384;

struct KeptRows {  // 1 for each row that is not ignored
  const int64_t* targets;
  int64_t ignore_index;
  __device__ int64_t value(int64_t i) const { return targets[i] != ignore_index ? 1 : 0; }
};
template <class T>
struct Numbers {
  T* x;
  __device__ T value(int64_t i) const { return x[i]; }
  __device__ void put(T sum) const { x[blockIdx.x] = sum; }
};
struct ReducedLoss {  // the sum, divided by *count, at least 1, unless it is nullptr
  float* loss;
  const int64_t* count;
  __device__ void put(double sum) const {
    *loss = static_cast<float>(count != nullptr ? sum / max(*count, int64_t{1}) : sum);
  }
};

struct Add {
  template <class N>
  __device__ N operator()(N a, N b) const {
    return a + b;
  }
};

// Each block adds up its span of n numbers, and the last one all that are left: all n where it is the only one.
// budget: span_totals registers<=32 shared<=0
template <class Sum, class From, class To>
__global__ void __launch_bounds__(kMostThreads) span_totals(const From from, int64_t n, const To to) {
  const int64_t begin = blockIdx.x * kSumSpan, end = blockIdx.x + 1 == gridDim.x ? n : begin + kSumSpan;
  Sum mine = 0;
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x; i < end; i += kMostThreads) mine += from.value(i);
  mine = reduce_block(mine, Sum{0}, reinterpret_cast<Sum*>(dynamic_shared()), Add{});
  if (threadIdx.x == 0) to.put(mine);
}

// budget: scale registers<=32 shared<=0
template <class T>
__global__ void __launch_bounds__(kShortThreads) scale(T* x, int64_t count, const float* factor) {
  const float by = *factor;
  if (by == 1) return;
  T* const span = x + int64_t{blockIdx.x} * kSpan;
  const Row<T> row(span, static_cast<int>(min(int64_t{kSpan}, count - int64_t{blockIdx.x} * kSpan)));
  for (int c = static_cast<int>(threadIdx.x); c < row.chunks; c += kShortThreads) {
    float values[kChunk<T>];
    widen<T>(*row.chunk(c), values);
#pragma unroll
    for (float& value : values) value *= by;
    store(span + row.chunk_at(c), values, true);
  }
  const int e = static_cast<int>(threadIdx.x);
  if (e < row.edges) span[row.edge_at(e)] = narrow<T>(widen(span[row.edge_at(e)]) * by);
}

// ---- Launching -----------------------------------------------------------------------------------------------------

constexpr int64_t kMostBlocks = 0x7fffffff;

unsigned blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

template <class T, int kLanes, int kChunks>
cudaError_t launch_short(const LossProblem<T>& problem, cudaStream_t stream) {
  const unsigned blocks = blocks_for(problem.N, kShortThreads / kLanes);
  return launch(short_rows<T, kLanes, kChunks>, dim3(blocks), dim3(kShortThreads), 0, stream, problem);
}

template <class T>
cudaError_t launch_long(const LossProblem<T>& problem, cudaStream_t stream) {
  const unsigned chunks = static_cast<unsigned>(problem.V / kChunk<T>);
  // Eight chunks for a thread: enough work between two reductions, and 64 or 128 KiB of a row for a block on its way.
  // Reasoned, not measured.
  const unsigned threads = std::clamp(std::bit_floor(chunks / 8), 128u, unsigned{kMostThreads});
  int device = 0, multiprocessors = 0, most_shared = 0, all_shared = 0;
  for (const cudaError_t error : {
           cudaGetDevice(&device),
           cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
           cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
           cudaDeviceGetAttribute(&all_shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
       }) {
    if (error != cudaSuccess) return error;
  }
  const size_t free = static_cast<size_t>(most_shared) - std::min<size_t>(most_shared, kScratchBytes);
  const unsigned room = static_cast<unsigned>(std::min<size_t>(chunks, free / sizeof(uint4)));
  if (problem.gradient == nullptr || room < chunks / 2) {
    const unsigned blocks = static_cast<unsigned>(std::min(problem.N, kMostBlocks));
    return launch(long_rows<T, false>, dim3(blocks), dim3(threads), kScratchBytes, stream, problem, 0);
  }
  const size_t bytes = kScratchBytes + size_t{room} * sizeof(uint4);
  // As many blocks as run at once. Each also takes 1 KiB of the system's, and its threads 64 registers of 65536.
  const int64_t by_shared = static_cast<int64_t>(static_cast<size_t>(all_shared) / (bytes + 1024));
  const int64_t at_once = std::max<int64_t>(1, std::min<int64_t>(by_shared, 1024 / threads));
  const unsigned blocks = static_cast<unsigned>(std::min(problem.N, multiprocessors * at_once));
  return launch(long_rows<T, true>, dim3(blocks), dim3(threads), bytes, stream, problem, static_cast<int>(room));
}

template <class T>
cudaError_t launch_rows(const LossProblem<T>& problem, cudaStream_t stream) {
  const int chunks = problem.V / kChunk<T>;
  if (chunks <= 8 * 2) return launch_short<T, 8, 2>(problem, stream);
  if (chunks <= 32 * 2) return launch_short<T, 32, 2>(problem, stream);
  if (chunks <= 32 * 8) return launch_short<T, 32, 8>(problem, stream);
  return launch_long(problem, stream);
}

template <class T>
cudaError_t launch_gradients(const LossProblem<T>& problem, cudaStream_t stream) {
  const unsigned chunks = static_cast<unsigned>(problem.V / kChunk<T>);
  const unsigned lanes = std::clamp(std::bit_floor(chunks / 4), 8u, unsigned{kShortThreads});
  const unsigned blocks = blocks_for(problem.N, kShortThreads / lanes);
  return launch(gradients<T>, dim3(blocks), dim3(kShortThreads), 0, stream, problem, static_cast<int>(lanes));
}

template <class T>
LossProblem<T> problem_of(const CrossEntropy& given, float* losses, float* normalisers, void* gradient,
                          int64_t* count) {
  return {
      .logits = static_cast<const T*>(given.logits),
      .N = given.N,
      .row_stride = given.row_stride,
      .V = static_cast<int>(given.V),
      .targets = given.targets,
      .ignore_index = given.options.ignore_index,
      .smoothing = static_cast<float>(given.options.label_smoothing),
      .z_loss = static_cast<float>(given.options.z_loss),
      .softcap = static_cast<float>(given.options.softcap),
      .count = count,
      .upstream = nullptr,
      .upstream_stride = given.reduction == Reduction::kNone ? 1 : 0,
      .losses = losses,
      .maxima = normalisers,
      .sums = normalisers + given.N,
      .gradient = static_cast<T*>(gradient),
  };
}

template <class F>
cudaError_t for_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32: return f(float{});
    case DType::kFloat16: return f(__half{});
    case DType::kBFloat16: return f(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

bool valid(const CrossEntropy& problem) {
  return problem.V >= 1 && problem.V <= std::numeric_limits<int>::max() && problem.N >= 0 && problem.N <= kMostBlocks;
}

unsigned sum_blocks(int64_t n) { return blocks_for(std::max(n, int64_t{1}), kSumSpan); }

// The workspace: the count in its first 16 bytes, the losses that will be added, and, where several blocks do that,
// from the next multiple of 8 what each of them counted, and later what each added up.
constexpr size_t kCountBytes = 16;
struct Layout {
  size_t partials, bytes;
};
Layout layout(int64_t N) {
  const unsigned blocks = sum_blocks(N);
  const size_t losses_end = kCountBytes + static_cast<size_t>(N) * sizeof(float), partials = (losses_end + 7) / 8 * 8;
  return {partials, blocks > 1 ? partials + blocks * sizeof(double) : losses_end};
}
float* losses_in(void* workspace) { return reinterpret_cast<float*>(static_cast<char*>(workspace) + kCountBytes); }

// Queues to.put(the sum of n numbers, from.value(i)), with the partials of `layout`.
template <class Sum, class From, class To>
cudaError_t launch_sum(const From& from, int64_t n, const To& to, void* workspace, cudaStream_t stream) {
  static_assert(sizeof(Sum) == sizeof(double));
  constexpr size_t kScratch = kWarp * sizeof(Sum);
  const dim3 blocks(sum_blocks(n)), threads(kMostThreads);
  if (blocks.x == 1) return launch(span_totals<Sum, From, To>, blocks, threads, kScratch, stream, from, n, to);
  const Numbers<Sum> partials{reinterpret_cast<Sum*>(static_cast<char*>(workspace) + layout(n).partials)};
  const cudaError_t error =
      launch(span_totals<Sum, From, Numbers<Sum>>, blocks, threads, kScratch, stream, from, n, partials);
  if (error != cudaSuccess) return error;
  return launch(span_totals<Sum, Numbers<Sum>, To>, dim3(1), threads, kScratch, stream, partials, blocks.x, to);
}

// Queues the counting that a mean needs. Returns where the count will be, nullptr for other reductions.
int64_t* count_where(const CrossEntropy& problem, void* workspace) {
  return problem.reduction == Reduction::kMean ? static_cast<int64_t*>(workspace) : nullptr;
}
cudaError_t launch_count(const CrossEntropy& problem, int64_t* count, void* workspace, cudaStream_t stream) {
  if (count == nullptr) return cudaSuccess;
  const KeptRows rows{problem.targets, problem.options.ignore_index};
  return launch_sum<int64_t>(rows, problem.N, Numbers<int64_t>{count}, workspace, stream);
}

}  // namespace

size_t cross_entropy_workspace(const CrossEntropy& problem) {
  if (problem.reduction == Reduction::kNone) return 0;
  return layout(problem.N).bytes;
}

cudaError_t cross_entropy_forward(const CrossEntropy& problem, float* loss, float* normalisers, void* gradient,
                                  void* workspace, cudaStream_t stream) {
  if (!valid(problem)) return cudaErrorInvalidValue;
  int64_t* const count = count_where(problem, workspace);
  const bool reduced = problem.reduction != Reduction::kNone;
  float* const losses = reduced ? losses_in(workspace) : loss;
  cudaError_t error = launch_count(problem, count, workspace, stream);
  if (error == cudaSuccess && problem.N > 0) {
    error = for_type(problem.dtype, [&](auto element) {
      return launch_rows(problem_of<decltype(element)>(problem, losses, normalisers, gradient, count), stream);
    });
  }
  if (error != cudaSuccess || !reduced) return error;
  return launch_sum<double>(Numbers<float>{losses}, problem.N, ReducedLoss{loss, count}, workspace, stream);
}

cudaError_t cross_entropy_backward(const CrossEntropy& problem, const float* loss_gradient, const float* normalisers,
                                   void* gradient, void* workspace, cudaStream_t stream) {
  if (!valid(problem)) return cudaErrorInvalidValue;
  if (problem.N == 0) return cudaSuccess;
  int64_t* const count = count_where(problem, workspace);
  const cudaError_t error = launch_count(problem, count, workspace, stream);
  if (error != cudaSuccess) return error;
  return for_type(problem.dtype, [&](auto element) {
    auto typed = problem_of<decltype(element)>(problem, nullptr, const_cast<float*>(normalisers), gradient, count);
    typed.upstream = loss_gradient;
    return launch_gradients(typed, stream);
  });
}

cudaError_t cross_entropy_scale_gradient(DType dtype, void* gradient, int64_t count, const float* factor,
                                         cudaStream_t stream) {
  if (count < 0 || count > kMostBlocks * kSpan) return cudaErrorInvalidValue;
  if (count == 0) return cudaSuccess;
  return for_type(dtype, [&](auto element) {
    using T = decltype(element);
    return launch(scale<T>, dim3(blocks_for(count, kSpan)), dim3(kShortThreads), 0, stream, static_cast<T*>(gradient),
                  count, factor);
  });
}

}  // namespace chargpt::cuda
