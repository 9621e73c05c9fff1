// Activations, cpu/block.h, for torch. Part of `chargpt._native`.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include "../cpu/block.h"
#include "common.h"
#include "rows.h"

namespace chargpt::bindings {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr auto kSwiglu = static_cast<int64_t>(cpu::Activation::kSwiglu);

// Spreads `width` elements of y at a time over the threads: a row of SwiGLU, or one.
template <class F>
void for_widths(const Tensor& y, int64_t width, const F& f) {
  if (y.numel() > 0) for_rows(y.numel() / width, width, f);
}

Tensor activation_forward_of(const Tensor& x, int64_t kind) {
  const Tensor from = x.contiguous();
  auto shape = x.sizes().vec();
  if (kind == kSwiglu) shape.back() /= 2;
  const Tensor y = at::empty(shape, x.options());
  const cpu::ActivationCall call{.type = dtype_of(x.scalar_type()),
                                 .kind = static_cast<cpu::Activation>(kind),
                                 .width = kind == kSwiglu ? shape.back() : 1,
                                 .x = from.const_data_ptr(),
                                 .y = y.data_ptr()};
  for_widths(y, call.width, [&](int64_t begin, int64_t end) { cpu::activation(call, begin, end); });
  return y;
}

Tensor activation_backward_of(const Tensor& dy, const Tensor& x, int64_t kind) {
  const Tensor from = x.contiguous(), given = dy.contiguous(), dx = packed_like(x, x.scalar_type());
  const cpu::ActivationCall call{.type = dtype_of(x.scalar_type()),
                                 .kind = static_cast<cpu::Activation>(kind),
                                 .width = kind == kSwiglu ? dy.size(-1) : 1,
                                 .x = from.const_data_ptr(),
                                 .dy = given.const_data_ptr(),
                                 .dx = dx.data_ptr()};
  for_widths(given, call.width, [&](int64_t begin, int64_t end) { cpu::activation_backward(call, begin, end); });
  return dx;
}

class ActivationNode : public torch::autograd::Function<ActivationNode> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& x, int64_t kind) {
    context->save_for_backward({x});
    context->saved_data["kind"] = kind;
    return activation_forward_of(x, kind);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const Tensor x = context->get_saved_variables()[0];
    const int64_t kind = context->saved_data["kind"].toInt();
    if (!needs_operators(gradients[0])) return {activation_backward_of(gradients[0], x, kind), Tensor()};
    refuse_tangents(gradients[0]);
    static const auto differentiable_backward = c10::Dispatcher::singleton()
                                                    .findSchemaOrThrow("chargpt::activation_backward", "")
                                                    .typed<Tensor(const Tensor&, const Tensor&, int64_t)>();
    return {differentiable_backward.call(gradients[0], x, kind), Tensor()};
  }
};

Tensor activation(const Tensor& x, int64_t kind) {
  const py::gil_scoped_release nogil;
  return needs_gradient(x) ? ActivationNode::apply(x, kind) : activation_forward_of(x, kind);
}

Tensor activation_forward(const Tensor& x, int64_t kind) {
  const py::gil_scoped_release nogil;
  return activation_forward_of(x, kind);
}

Tensor activation_backward(const Tensor& dy, const Tensor& x, int64_t kind) {
  const py::gil_scoped_release nogil;
  return activation_backward_of(dy, x, kind);
}

}  // namespace

void define_activation(py::module_& m) {
  m.def("activation", &activation, "An activation, connected to autograd. For plain tensors.");
  m.def("activation_forward", &activation_forward, "An activation.");
  m.def("activation_backward", &activation_backward, "The gradient of an activation's x.");
}

}  // namespace chargpt::bindings
