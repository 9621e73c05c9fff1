// Causal attention of cpu/attention.h for torch. Part of `chargpt._native`.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <tuple>

#include "../cpu/attention.h"
#include "common.h"
#include "parallel.h"

namespace chargpt::bindings {
namespace {

struct AttentionResult {
  Tensor out, lse;  // (B, H, T, D) over (B, T, H, D) memory; (B, H, T)
};

AttentionResult attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                  const AttentionOptions& options) {
  const Tensor Q = with_whole_rows(q), K = with_whole_rows(k), V = with_whole_rows(v);
  AttentionResult result{empty_by_time(q), at::empty({q.size(0), q.size(1), q.size(2)}, row_options(q))};
  const bool done = cpu::attention_forward(dtype_of(q.scalar_type()), shape_of(q, k), options, view(Q), view(K), view(V),
                                           mutable_view(result.out), result.lse.data_ptr(), &parallel_for);
  TORCH_CHECK_WITH(OutOfMemoryError, done, "no memory for the scratch space of attention");
  return result;
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& out_gradient, const Tensor& lse_gradient,
                                                      const Tensor& q, const Tensor& k, const Tensor& v,
                                                      const Tensor& out, const Tensor& lse,
                                                      const AttentionOptions& options, bool side_by_side) {
  const Tensor Q = with_whole_rows(q), K = with_whole_rows(k), V = with_whole_rows(v);
  const Tensor dO = with_whole_rows(out_gradient.defined() ? out_gradient : at::zeros_like(out));
  const Tensor dlse = lse_gradient.defined() ? lse_gradient.contiguous() : lse_gradient;
  const Tensor O = with_whole_rows(out), row_lse = lse.contiguous();
  const auto [dq, dk, dv] = side_by_side ? empty_side_by_side(q, k, v)
                                         : std::tuple(empty_by_time(q), empty_by_time(k), empty_by_time(v));
  const bool done = cpu::attention_backward(
      dtype_of(q.scalar_type()), shape_of(q, k), options, view(dO), view(Q), view(K), view(V), view(O), row_lse.const_data_ptr(),
      dlse.defined() ? dlse.const_data_ptr() : nullptr, mutable_view(dq), mutable_view(dk), mutable_view(dv),
      &parallel_for);
  TORCH_CHECK_WITH(OutOfMemoryError, done, "no memory for the scratch space of attention");
  return {dq, dk, dv};
}

class AttentionNode : public torch::autograd::Function<AttentionNode> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const Tensor& q,
                                                const Tensor& k, const Tensor& v, double scale, double dropout_p,
                                                std::optional<int64_t> window, const std::optional<Tensor>& seed) {
    const AttentionResult result = attention_forward(q, k, v, attention_options(scale, dropout_p, window, seed));
    context->save_for_backward({q, k, v, result.out, result.lse});
    context->set_materialize_grads(false);
    context->saved_data["scale"] = scale;
    context->saved_data["dropout_p"] = dropout_p;
    context->saved_data["window"] = window;
    context->saved_data["seed"] = seed;
    return {result.out, result.lse};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    if (!gradients[0].defined() && !gradients[1].defined()) return torch::autograd::variable_list(7);
    auto& data = context->saved_data;
    const auto saved = context->get_saved_variables();
    const double scale = data["scale"].toDouble(), dropout_p = data["dropout_p"].toDouble();
    const auto window = data["window"].toOptional<int64_t>();
    const auto seed = data["seed"].toOptional<Tensor>();
    std::tuple<Tensor, Tensor, Tensor> inputs;
    if (needs_operators(gradients[0], gradients[1])) {
      refuse_tangents(gradients[0], gradients[1]);
      static const auto differentiable_backward =
          c10::Dispatcher::singleton()
              .findSchemaOrThrow("chargpt::causal_attention_backward", "")
              .typed<std::tuple<Tensor, Tensor, Tensor>(
                  const std::optional<Tensor>&, const std::optional<Tensor>&, const Tensor&, const Tensor&,
                  const Tensor&, const Tensor&, const Tensor&, double, double, std::optional<int64_t>,
                  const std::optional<Tensor>&)>();
      inputs = differentiable_backward.call(or_none(gradients[0]), or_none(gradients[1]), saved[0], saved[1],
                                            saved[2], saved[3], saved[4], scale, dropout_p, window, seed);
    } else {
      inputs = attention_backward(gradients[0], gradients[1], saved[0], saved[1], saved[2], saved[3], saved[4],
                                  attention_options(scale, dropout_p, window, seed), true);
    }
    auto& [dq, dk, dv] = inputs;
    return {dq, dk, dv, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor> causal_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                            double dropout_p, std::optional<int64_t> window,
                                            const std::optional<Tensor>& seed) {
  const py::gil_scoped_release nogil;
  if (needs_gradient(q, k, v)) {
    const auto outputs = AttentionNode::apply(q, k, v, scale, dropout_p, window, seed);
    return {outputs[0], outputs[1]};
  }
  const AttentionResult result = attention_forward(q, k, v, attention_options(scale, dropout_p, window, seed));
  return {result.out, result.lse};
}

std::tuple<Tensor, Tensor> causal_attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                                    double dropout_p, std::optional<int64_t> window,
                                                    const std::optional<Tensor>& seed) {
  const py::gil_scoped_release nogil;
  const AttentionResult result = attention_forward(q, k, v, attention_options(scale, dropout_p, window, seed));
  return {result.out, result.lse};
}

// Each in memory of its own, because the results of an operator may not share any.
std::tuple<Tensor, Tensor, Tensor> causal_attention_backward(
    const std::optional<Tensor>& out_gradient, const std::optional<Tensor>& lse_gradient, const Tensor& q,
    const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse, double scale, double dropout_p,
    std::optional<int64_t> window, const std::optional<Tensor>& seed) {
  const py::gil_scoped_release nogil;
  return attention_backward(or_undefined(out_gradient), or_undefined(lse_gradient), q, k, v, out, lse,
                            attention_options(scale, dropout_p, window, seed), false);
}

}  // namespace

void define_attention(py::module_& m) {
  m.def("attention_isa", [](const Tensor& x) { return cpu::attention_isa(dtype_of(x.scalar_type())); },
        "The code path that attention takes for a tensor of this dtype on this CPU.");
  m.attr("max_head_size") = kMaxHeadSize;
  m.def("causal_attention", &causal_attention, "O and lse, connected to autograd. For plain tensors.");
  m.def("causal_attention_forward", &causal_attention_forward, "O and lse.");
  m.def("causal_attention_backward", &causal_attention_backward, "The gradients of q, k and v.");
}

}  // namespace chargpt::bindings
