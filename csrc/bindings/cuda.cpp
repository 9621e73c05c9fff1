// The native module `chargpt._native_cuda`: the CUDA kernels for torch. It allocates outputs and workspaces, picks the
// tensors' device and its current stream, and never waits for the GPU. Autograd and operators are made of it by
// chargpt/kernels/backends/cuda.py. Only headers of c10/cuda are used: those of ATen/cuda want the headers of cuBLAS and
// its sisters, which many CUDA toolkits that can compile the kernels do not have.

#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <tuple>

#include "../cuda/attention.h"
#include "../cuda/cross_entropy.h"
#include "common.h"

namespace chargpt::bindings {
namespace {

DType element_of(const Tensor& x) {
  return dtype_of(x.scalar_type(), at::kDouble, "the CUDA kernels take float32, bfloat16 and float16");
}

cudaStream_t stream() { return c10::cuda::getCurrentCUDAStream(); }

// The caching allocator hands memory out again in the order of the stream, so it may be let go of at once.
Tensor workspace_for(const Tensor& x, size_t bytes) {
  return at::empty({static_cast<int64_t>(bytes)}, x.options().dtype(at::kByte));
}

// ---------------------------------------------------------------------------------------------------------- attention


std::tuple<Tensor, Tensor> causal_attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                                    double dropout_p, std::optional<int64_t> window,
                                                    const std::optional<Tensor>& seed) {
  const py::gil_scoped_release nogil;
  const c10::cuda::CUDAGuard device(q.device());
  const Tensor Q = with_whole_rows(q), K = with_whole_rows(k), V = with_whole_rows(v);
  const Tensor out = empty_by_time(q);
  const Tensor lse = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  C10_CUDA_CHECK(cuda::attention_forward(element_of(q), shape_of(q, k), attention_options(scale, dropout_p, window, seed),
                                         view(Q), view(K), view(V), mutable_view(out), lse.data_ptr<float>(),
                                         stream()));
  return {out, lse};
}

// Into dq, dk and dv, of any strides.
void write_attention_gradients(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& out_gradient,
                               const Tensor& lse_gradient, const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& out, const Tensor& lse, const AttentionOptions& options) {
  const Tensor Q = with_whole_rows(q), K = with_whole_rows(k), V = with_whole_rows(v), O = with_whole_rows(out);
  const Tensor dO = with_whole_rows(out_gradient), row_lse = lse.contiguous();
  const Tensor dlse = lse_gradient.defined() ? lse_gradient.contiguous() : Tensor();
  const auto dtype = element_of(q);
  const auto shape = shape_of(q, k);
  const Tensor workspace = workspace_for(q, cuda::attention_backward_workspace(dtype, shape));
  C10_CUDA_CHECK(cuda::attention_backward(dtype, shape, options, view(dO), view(Q), view(K), view(V), view(O),
                                          row_lse.const_data_ptr<float>(),
                                          dlse.defined() ? dlse.const_data_ptr<float>() : nullptr, mutable_view(dq),
                                          mutable_view(dk), mutable_view(dv), workspace.data_ptr(), stream()));
}

std::tuple<Tensor, Tensor, Tensor> causal_attention_backward(
    const std::optional<Tensor>& out_gradient, const std::optional<Tensor>& lse_gradient, const Tensor& q,
    const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse, double scale, double dropout_p,
    std::optional<int64_t> window, const std::optional<Tensor>& seed) {
  const py::gil_scoped_release nogil;
  const c10::cuda::CUDAGuard device(q.device());
  const Tensor dq = empty_by_time(q), dk = empty_by_time(k), dv = empty_by_time(v);
  write_attention_gradients(dq, dk, dv, out_gradient.has_value() ? *out_gradient : at::zeros_like(out),
                            or_undefined(lse_gradient), q, k, v, out, lse,
                            attention_options(scale, dropout_p, window, seed));
  return {dq, dk, dv};
}

void causal_attention_backward_into(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& out_gradient,
                                    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                                    const Tensor& lse, double scale, double dropout_p, std::optional<int64_t> window,
                                    const std::optional<Tensor>& seed) {
  const py::gil_scoped_release nogil;
  const c10::cuda::CUDAGuard device(q.device());
  write_attention_gradients(dq, dk, dv, out_gradient, Tensor(), q, k, v, out, lse,
                            attention_options(scale, dropout_p, window, seed));
}

// ------------------------------------------------------------------------------------------------------ cross-entropy


cuda::CrossEntropy problem_of(const Tensor& rows, const Tensor& targets, const CrossEntropyArguments& arguments) {
  return {.dtype = element_of(rows),
          .logits = rows.const_data_ptr(),
          .N = rows.size(0),
          .V = rows.size(1),
          .row_stride = rows.stride(0),
          .targets = targets.const_data_ptr<int64_t>(),
          .options = arguments.options,
          .reduction = arguments.reduction};
}

std::tuple<Tensor, Tensor, std::optional<Tensor>> softmax_cross_entropy_forward(
    const Tensor& logits, const Tensor& targets, int64_t ignore_index, double label_smoothing, double z_loss,
    std::optional<double> softcap, const std::string& reduction, bool with_gradient) {
  const py::gil_scoped_release nogil;
  const c10::cuda::CUDAGuard device(logits.device());
  const Tensor rows = as_rows(logits), labels = as_targets(targets);
  const auto problem = problem_of(
      rows, labels, cross_entropy_arguments(ignore_index, label_smoothing, z_loss, softcap, reduction));
  const auto numbers = logits.options().dtype(at::kFloat);
  const Tensor loss = reduction == "none" ? at::empty(targets.sizes(), numbers) : at::empty({}, numbers);
  const Tensor normalisers = at::empty({2, problem.N}, numbers);
  std::optional<Tensor> gradient;
  if (with_gradient) gradient = at::empty(logits.sizes(), logits.options());
  const Tensor workspace = workspace_for(logits, cuda::cross_entropy_workspace(problem));
  C10_CUDA_CHECK(cuda::cross_entropy_forward(problem, loss.data_ptr<float>(), normalisers.data_ptr<float>(),
                                             gradient ? gradient->data_ptr() : nullptr, workspace.data_ptr(),
                                             stream()));
  return {loss, normalisers, gradient};
}

Tensor softmax_cross_entropy_backward(const Tensor& loss_gradient, const Tensor& logits, const Tensor& targets,
                                      const Tensor& normalisers, int64_t ignore_index, double label_smoothing,
                                      double z_loss, std::optional<double> softcap, const std::string& reduction) {
  const py::gil_scoped_release nogil;
  const c10::cuda::CUDAGuard device(logits.device());
  const Tensor rows = as_rows(logits), labels = as_targets(targets);
  const Tensor weights = loss_gradient.to(at::kFloat).contiguous(), found = normalisers.contiguous();
  const auto problem = problem_of(
      rows, labels, cross_entropy_arguments(ignore_index, label_smoothing, z_loss, softcap, reduction));
  const Tensor gradient = at::empty(logits.sizes(), logits.options());
  const Tensor workspace = workspace_for(logits, cuda::cross_entropy_workspace(problem));
  C10_CUDA_CHECK(cuda::cross_entropy_backward(problem, weights.const_data_ptr<float>(), found.const_data_ptr<float>(),
                                              gradient.data_ptr(), workspace.data_ptr(), stream()));
  return gradient;
}

void scale_(const Tensor& gradient, const Tensor& factor) {
  const py::gil_scoped_release nogil;
  const c10::cuda::CUDAGuard device(gradient.device());
  const Tensor number = factor.to(at::kFloat);
  C10_CUDA_CHECK(cuda::cross_entropy_scale_gradient(element_of(gradient), gradient.data_ptr(), gradient.numel(),
                                                    number.const_data_ptr<float>(), stream()));
}

}  // namespace
}  // namespace chargpt::bindings

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace chargpt::bindings;
  m.doc() = "chargpt's CUDA kernels";
  m.def("causal_attention_forward", &causal_attention_forward, "O and lse.");
  m.def("causal_attention_backward", &causal_attention_backward, "The gradients of q, k and v.");
  m.def("causal_attention_backward_into", &causal_attention_backward_into, "The same, written to given tensors.");
  m.def("softmax_cross_entropy_forward", &softmax_cross_entropy_forward,
        "Loss, normalisers (2, N), and the gradient of the logits or None.");
  m.def("softmax_cross_entropy_backward", &softmax_cross_entropy_backward, "The gradient of the logits.");
  m.def("scale_", &scale_, "Multiplies a contiguous gradient in place by one number that is on its device.");
  m.attr("wide_float32_shared_bytes") = chargpt::cuda::kWideFloat32SharedBytes;  // a block's, for float32 with D > 128
}
