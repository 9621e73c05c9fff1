// The attention kernels on the CPU: entry points for test_attention_on_host.py, and a program of its own for the
// sanitizers, in which every buffer ends where its tensor ends and results are compared with float64 loops.

#include "../../csrc/cuda/attention.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

using namespace chargpt::cuda;

// ---- For Python ----------------------------------------------------------------------------------------------------

// A tensor: its first element, and the strides of (batch, head, time).
struct Tensor {
  void* data;
  int64_t strides[3];
};

extern "C" {

// Which of the kernels runs depends on the chip.
void attention_set_chip(int multiprocessors, int shared_bytes) {
  host_multiprocessors = multiprocessors;
  host_shared_bytes = shared_bytes;
}

// tensors: q, k, v, out
int attention_run_forward(int dtype, const AttentionShape* shape, const AttentionOptions* options, const Tensor* x,
                          float* lse) {
  const auto view = [&](int i) { return View{x[i].data, x[i].strides[0], x[i].strides[1], x[i].strides[2]}; };
  const MutableView out{x[3].data, x[3].strides[0], x[3].strides[1], x[3].strides[2]};
  return attention_forward(static_cast<DType>(dtype), *shape, *options, view(0), view(1), view(2), out, lse, nullptr);
}

// tensors: dout, q, k, v, out, dq, dk, dv
int attention_run_backward(int dtype, const AttentionShape* shape, const AttentionOptions* options, const Tensor* x,
                           const float* lse, const float* dlse) {
  const auto view = [&](int i) { return View{x[i].data, x[i].strides[0], x[i].strides[1], x[i].strides[2]}; };
  const auto writable = [&](int i) {
    return MutableView{x[i].data, x[i].strides[0], x[i].strides[1], x[i].strides[2]};
  };
  std::vector<char> workspace(attention_backward_workspace(static_cast<DType>(dtype), *shape), '\xff');
  return attention_backward(static_cast<DType>(dtype), *shape, *options, view(0), view(1), view(2), view(3), view(4),
                            lse, dlse, writable(5), writable(6), writable(7), workspace.data(), nullptr);
}

}  // extern "C"
