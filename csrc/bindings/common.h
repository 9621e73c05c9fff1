// What the bindings share: tensors as the kernels want them. The bindings are where kernels meet torch and Python: they
// allocate, and connect to autograd; the checks are made in chargpt/kernels/ops/. torch/extension.h would cost a minute
// of compile time, so only what is used is included.

#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "../common/attention.h"
#include "../common/cross_entropy.h"
#include "../common/dtype.h"

namespace chargpt::bindings {

namespace py = pybind11;
using at::Tensor;

// The DType of a dtype. The kernels of each device take all but one of the four: on a CPU float16 is missing.
inline DType dtype_of(at::ScalarType type, at::ScalarType missing = at::kHalf,
                      const char* taken = "the C++ kernels take float32, bfloat16 and float64") {
  if (type == missing) throw py::type_error(taken);
  switch (type) {
    case at::kFloat: return DType::kFloat32;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    case at::kDouble: return DType::kFloat64;
    default: throw py::type_error(taken);
  }
}

// Losses, lse and normalisers have one number for each row, in float32, or float64 for float64.
inline at::ScalarType computing_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }
inline at::TensorOptions row_options(const Tensor& x) { return x.options().dtype(computing_type(x.scalar_type())); }

inline Tensor or_undefined(const std::optional<Tensor>& x) { return x.value_or(Tensor()); }
inline std::optional<Tensor> or_none(const Tensor& x) { return x.defined() ? std::optional(x) : std::nullopt; }

// Whether this is a tensor whose memory may be read here and now. Torch has many others: fake, batched, functional, lazy,
// zero, negative, sparse and quantised ones, subclasses, modes, a tracer that listens, a tangent of forward-mode AD.
// What tells them apart is that anything but the keys below has a say in what happens to them. What has no elements has
// no kernel: its results may have some, which nobody would write.
inline bool is_plain(const Tensor& x) {
  static const uint64_t plain =
      c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU,
                           c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::BackendSelect})
          .raw_repr();
  const auto local = c10::impl::tls_local_dispatch_key_set();
  const uint64_t keys = (x.key_set().raw_repr() | local.included_.raw_repr()) & ~local.excluded_.raw_repr();
  return (keys & ~plain) == 0 && x.has_storage() && x.numel() > 0 && !x._fw_grad(0).defined();
}

// Whether a backward pass must go through operators: create_graph=True, or gradients that are no plain tensors.
template <class... Tensors>
bool needs_operators(const Tensors&... gradients) {
  return at::GradMode::is_enabled() || ((gradients.defined() && !is_plain(gradients)) || ...);
}

// A tangent of forward-mode AD that comes with the gradients alone: the operators would lose it without a word.
template <class... Tensors>
void refuse_tangents(const Tensors&... gradients) {
  TORCH_CHECK_NOT_IMPLEMENTED(!((gradients.defined() && gradients._fw_grad(0).defined()) || ...),
                              "the backward of the C++ kernels has no forward-mode AD; take backend=torch for it");
}

template <class... Tensors>
bool needs_gradient(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && ((tensors.defined() && tensors.requires_grad()) || ...);
}

// ---------------------------------------------------------------------------------------------------- heads, attention

inline Tensor with_whole_rows(const Tensor& x) {
  return !x.defined() || x.stride(3) == 1 || x.size(3) == 1 ? x : x.contiguous();
}

inline View view(const Tensor& x) {
  if (!x.defined()) return {nullptr, 0, 0, 0};
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}
inline MutableView mutable_view(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

// (B, heads, T, D), over (B, T, heads, D) memory, so that joining the heads copies nothing.
inline Tensor empty_by_time(int64_t B, int64_t heads, int64_t T, int64_t D, const at::TensorOptions& options) {
  return at::empty_strided({B, heads, T, D}, {T * heads * D, D, heads * D, 1}, options);
}
inline Tensor empty_by_time(const Tensor& x) {
  return empty_by_time(x.size(0), x.size(1), x.size(2), x.size(3), x.options());
}

// Memory for the gradients of q, k and v: that of one packed projection (B, T, (H + 2 H_kv) D) where they are of as many
// positions, so that qkv_heads hands it on as it is when it did nothing but split.
inline std::tuple<Tensor, Tensor, Tensor> empty_side_by_side(const Tensor& q, const Tensor& k, const Tensor& v) {
  const int64_t B = q.size(0), H = q.size(1), T = q.size(2), D = q.size(3), H_kv = k.size(1);
  if (k.size(2) != T) return {empty_by_time(q), empty_by_time(k), empty_by_time(v)};
  const at::AutoDispatchBelowADInplaceOrView no_views;  // whose records would hold the memory too: `joined` counts
  const Tensor all = empty_by_time(B, H + 2 * H_kv, T, D, q.options());
  return {all.narrow(1, 0, H), all.narrow(1, H, H_kv), all.narrow(1, H + H_kv, H_kv)};
}

// What three such gradients lie in; undefined where they do not lie so, or somebody else holds one, who must not find
// another value in it later.
inline Tensor joined(const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  if (!dq.defined() || !dk.defined() || !dv.defined()) return Tensor();
  if (dq.use_count() > 1 || dk.use_count() > 1 || dv.use_count() > 1 || dq.storage().use_count() > 3) return Tensor();
  const at::AutoDispatchBelowADInplaceOrView no_views;
  const int64_t B = dq.size(0), H = dq.size(1), T = dq.size(2), D = dq.size(3), H_kv = dk.size(1);
  const int64_t width = (H + 2 * H_kv) * D, first = dq.storage_offset();
  const auto lies = [&](const Tensor& x, int64_t heads_before) {
    return x.is_alias_of(dq) && x.scalar_type() == dq.scalar_type() &&
           x.strides() == at::IntArrayRef{T * width, D, width, 1} &&
           x.storage_offset() == first + heads_before * D;
  };
  if (!lies(dq, 0) || !lies(dk, H) || !lies(dv, H + H_kv)) return Tensor();
  return dq.as_strided({B, T, width}, {T * width, width, 1}, first);
}

inline AttentionShape shape_of(const Tensor& q, const Tensor& k) {
  return {.B = q.size(0), .H = q.size(1), .H_kv = k.size(1), .T = q.size(2), .S = k.size(2), .D = q.size(3)};
}

// A seed on the CPU is read here, one on a GPU by the kernels: nothing waits.
inline AttentionOptions attention_options(double scale, double dropout_p, std::optional<int64_t> window,
                                          const std::optional<Tensor>& seed) {
  const bool dropout = seed.has_value() && seed->defined(), here = dropout && seed->is_cpu();
  return {.scale = scale,
          .window = window.value_or(0),
          .dropout = dropout,
          .dropout_p = dropout_p,
          .seed = here ? static_cast<uint64_t>(seed->item<int64_t>()) : 0,
          .device_seed = dropout && !here ? seed->const_data_ptr<int64_t>() : nullptr};
}

// ------------------------------------------------------------------------------------------------------ cross-entropy

// Logits as N rows, each contiguous: a view where the strides allow it.
inline Tensor as_rows(const Tensor& logits) {
  const int64_t V = logits.size(-1);
  const Tensor rows = logits.reshape({-1, V});
  return rows.stride(1) == 1 || V == 1 ? rows : rows.contiguous();
}

inline Tensor as_targets(const Tensor& targets) { return targets.to(at::kLong).reshape({-1}).contiguous(); }

struct CrossEntropyArguments {
  CrossEntropyOptions options;
  Reduction reduction;
};

inline CrossEntropyArguments cross_entropy_arguments(int64_t ignore_index, double label_smoothing, double z_loss,
                                                     std::optional<double> softcap, const std::string& reduction) {
  const auto parsed = reduction == "none" ? Reduction::kNone
                      : reduction == "sum" ? Reduction::kSum
                                           : Reduction::kMean;
  return {{ignore_index, label_smoothing, z_loss, softcap.value_or(0.0)}, parsed};
}

}  // namespace chargpt::bindings
