// What csrc/cuda/mma.cuh says in PTX, in C++ over the whole warp; the layouts are drawn there. See cuda_runtime.h.

#pragma once

#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace cuda_host {

// The copies that a thread has begun, oldest first.
struct AsyncCopy {
  void* shared;
  uint32_t words[4];
  int size, group;
};
struct AsyncCopies {
  std::vector<AsyncCopy> pending;
  int group = 0;  // that the next copy belongs to
};
AsyncCopies& async_copies();  // of this thread

using Row = uint16_t[8];  // of a matrix, that a lane's address names
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where);
void mma_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where);
void distribute_matrices(const Row& row, uint32_t* result, int matrices, bool transposed, Where where);

template <int kMatrices, bool kTransposed>
void ldmatrix(uint32_t* result, const void* shared_row, Where where) {
  if (reinterpret_cast<uintptr_t>(shared_row) % 16 != 0) fail("ldmatrix: an address is no multiple of 16", where);
  Row row = {};
  if (lane() < 8 * kMatrices) std::memcpy(row, shared_row, 16);  // the other lanes' addresses do not count
  distribute_matrices(row, result, kMatrices, kTransposed, where);
}

template <int kBytes>
void cp_async(void* shared, const void* global, bool valid, Where where) {
  const auto misaligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % kBytes != 0; };
  if (misaligned(shared) || misaligned(global)) fail("cp.async: an address is no multiple of the size", where);
  AsyncCopies& copies = async_copies();
  AsyncCopy copy{shared, {}, kBytes, copies.group};
  if (valid) std::memcpy(copy.words, global, kBytes);
  copies.pending.push_back(copy);
  std::memset(shared, 0xff, kBytes);  // NaN in every type: the hardware may write from now on
}

}  // namespace cuda_host

namespace chargpt::cuda {

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row,
                        cuda_host::Where where = cuda_host::Where::current()) {
  cuda_host::ldmatrix<4, false>(r, shared_row, where);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row,
                              cuda_host::Where where = cuda_host::Where::current()) {
  cuda_host::ldmatrix<4, true>(r, shared_row, where);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row,
                        cuda_host::Where where = cuda_host::Where::current()) {
  cuda_host::ldmatrix<2, false>(r, shared_row, where);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared_row,
                              cuda_host::Where where = cuda_host::Where::current()) {
  cuda_host::ldmatrix<2, true>(r, shared_row, where);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  cuda_host::Where where = cuda_host::Where::current()) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    cuda_host::mma_bf16(d, a, b, where);
  } else {
    static_assert(std::is_same_v<T, __half>);
    cuda_host::mma_fp16(d, a, b, where);
  }
}

inline void cp_async_16(void* shared, const void* global, bool valid,
                        cuda_host::Where where = cuda_host::Where::current()) {
  cuda_host::cp_async<16>(shared, global, valid, where);
}
inline void cp_async_8(void* shared, const void* global, bool valid,
                       cuda_host::Where where = cuda_host::Where::current()) {
  cuda_host::cp_async<8>(shared, global, valid, where);
}
inline void cp_async_4(void* shared, const void* global, bool valid,
                       cuda_host::Where where = cuda_host::Where::current()) {
  cuda_host::cp_async<4>(shared, global, valid, where);
}
inline void cp_async_commit() { ++cuda_host::async_copies().group; }

template <int N>
void cp_async_wait() {
  cuda_host::AsyncCopies& copies = cuda_host::async_copies();
  size_t done = 0;
  for (; done < copies.pending.size() && copies.pending[done].group < copies.group - N; ++done) {
    const cuda_host::AsyncCopy& copy = copies.pending[done];
    std::memcpy(copy.shared, copy.words, copy.size);
  }
  copies.pending.erase(copies.pending.begin(), copies.pending.begin() + done);
}

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

}  // namespace chargpt::cuda
