// The heads of packed projections, cpu/block.h, for torch. Part of `chargpt._native`.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <tuple>

#include "../cpu/block.h"
#include "common.h"
#include "rows.h"

namespace chargpt::bindings {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct HeadOptions {
  int64_t H, H_kv;
  bool norm;
};

// cos or sin as the kernel reads it: packed rows in the computing dtype.
Tensor angles(const Tensor& table, at::ScalarType type) {
  return table.defined() ? table.to(computing_type(type)).contiguous() : table;
}

cpu::QkvHeads heads_of(const HeadOptions& options, at::ScalarType type, at::ScalarType value_type, int64_t T, int64_t D,
                       const Tensor& cos, const Tensor& sin) {
  return {.type = dtype_of(type),
          .value_type = dtype_of(value_type),
          .T = T,
          .H = options.H,
          .H_kv = options.H_kv,
          .D = D,
          .norm = options.norm,
          .cos = cos.defined() ? cos.const_data_ptr() : nullptr,
          .sin = sin.defined() ? sin.const_data_ptr() : nullptr};
}

// q, k and v (B, heads, T, D), over (B, T, heads, D) memory. What nothing is done to is a view of qkv, unless `copies`.
variable_list split_heads(const Tensor& qkv, const Tensor& value_rows, const Tensor& cos, const Tensor& sin,
                          const HeadOptions& options, bool copies) {
  const auto [H, H_kv, norm] = options;
  const int64_t B = qkv.size(0), T = qkv.size(1), D = qkv.size(2) / (H + 2 * H_kv);
  const bool make_qk = copies || norm || cos.defined(), make_v = copies || value_rows.defined();
  const auto part = [&](int64_t first, int64_t heads) {
    return qkv.narrow(2, first * D, heads * D).unflatten(2, {heads, D}).transpose(1, 2);
  };
  const auto empty = [&](int64_t heads) { return empty_by_time(B, heads, T, D, qkv.options()); };
  const Tensor q = make_qk ? empty(H) : part(0, H), k = make_qk ? empty(H_kv) : part(H, H_kv);
  const Tensor v = make_v ? empty(H_kv) : part(H + H_kv, H_kv);
  if (!make_qk && !make_v) return {q, k, v};
  const RowsOf rows(qkv), values(value_rows);
  const Tensor c = angles(cos, qkv.scalar_type()), s = angles(sin, qkv.scalar_type());
  const auto value_type = value_rows.defined() ? value_rows.scalar_type() : qkv.scalar_type();
  const cpu::QkvHeads heads = heads_of(options, qkv.scalar_type(), value_type, T, D, c, s);
  const cpu::QkvHeadsForward call{.qkv = rows.rows,
                                  .value_rows = values.rows,
                                  .q = make_qk ? q.data_ptr() : nullptr,
                                  .k = make_qk ? k.data_ptr() : nullptr,
                                  .v = make_v ? v.data_ptr() : nullptr};
  for_rows(B * T, qkv.size(2), [&](int64_t begin, int64_t end) { cpu::qkv_heads(heads, call, begin, end); });
  return {q, k, v};
}

// dqkv, and the gradient of the value rows where value_type is given. One of dq, dk and dv is defined; qkv is, where
// there is a norm.
std::tuple<Tensor, Tensor> join_heads(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& qkv,
                                      const Tensor& cos, const Tensor& sin, const HeadOptions& options,
                                      std::optional<at::ScalarType> value_type) {
  const Tensor& given = dq.defined() ? dq : dk.defined() ? dk : dv;
  const auto type = given.scalar_type();
  const int64_t B = given.size(0), T = given.size(2), D = given.size(3);
  const RowsOf rows(options.norm ? qkv : Tensor());
  const Tensor c = angles(cos, type), s = angles(sin, type);
  const Tensor q = with_whole_rows(dq), k = with_whole_rows(dk), v = with_whole_rows(dv);
  const Tensor dqkv = at::empty({B, T, (options.H + 2 * options.H_kv) * D}, given.options());
  Tensor dvalue_rows;
  if (value_type) dvalue_rows = at::empty({B, T, options.H_kv * D}, given.options().dtype(*value_type));
  const cpu::QkvHeads heads = heads_of(options, type, value_type.value_or(type), T, D, c, s);
  const cpu::QkvHeadsBackward call{.qkv = rows.rows,
                                   .dq = view(q),
                                   .dk = view(k),
                                   .dv = view(v),
                                   .dqkv = dqkv.data_ptr(),
                                   .dvalue_rows = value_type ? dvalue_rows.data_ptr() : nullptr};
  for_rows(B * T, dqkv.size(2), [&](int64_t begin, int64_t end) { cpu::qkv_heads_backward(heads, call, begin, end); });
  return {dqkv, dvalue_rows};
}

class QkvHeadsNode : public torch::autograd::Function<QkvHeadsNode> {
 public:
  static variable_list forward(AutogradContext* context, const Tensor& qkv, const std::optional<Tensor>& value_rows,
                               const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                               const HeadOptions& options) {
    const Tensor values = or_undefined(value_rows), c = or_undefined(cos), s = or_undefined(sin);
    std::optional<at::ScalarType> value_type;
    if (values.defined() && values.requires_grad()) value_type = values.scalar_type();
    context->save_for_backward({options.norm ? qkv : Tensor(), c, s});
    context->set_materialize_grads(false);
    // Plain values, which compiled autograd can hash; one tuple, because each named entry costs an allocation.
    context->saved_data["options"] = c10::ivalue::Tuple::create(
        options.H, options.H_kv, options.norm, value_type ? static_cast<int64_t>(*value_type) : int64_t{-1});
    return split_heads(qkv, values, c, s, options, false);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const Tensor &dq = gradients[0], &dk = gradients[1], &dv = gradients[2];
    if (!dq.defined() && !dk.defined() && !dv.defined()) return variable_list(5);
    const auto& values = context->saved_data["options"].toTupleRef().elements();
    const HeadOptions options{values[0].toInt(), values[1].toInt(), values[2].toBool()};
    std::optional<at::ScalarType> value_type;  // where the value rows want a gradient
    if (values[3].toInt() >= 0) value_type = static_cast<at::ScalarType>(values[3].toInt());
    const auto saved = context->get_saved_variables();
    const Tensor &qkv = saved[0], &cos = saved[1], &sin = saved[2];
    if (!needs_operators(dq, dk, dv)) {
      const bool only_split = !options.norm && !cos.defined() && !value_type;
      if (const Tensor dqkv = only_split ? joined(dq, dk, dv) : Tensor(); dqkv.defined()) {
        return {dqkv, Tensor(), Tensor(), Tensor(), Tensor()};
      }
      const auto [dqkv, dvalue_rows] = join_heads(dq, dk, dv, qkv, cos, sin, options, value_type);
      return {dqkv, dvalue_rows, Tensor(), Tensor(), Tensor()};
    }
    refuse_tangents(dq, dk, dv);
    static const auto differentiable_backward =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("chargpt::qkv_heads_backward", "")
            .typed<Tensor(const std::optional<Tensor>&, const std::optional<Tensor>&, const std::optional<Tensor>&,
                          const std::optional<Tensor>&, const std::optional<Tensor>&, const std::optional<Tensor>&,
                          int64_t, int64_t, bool)>();
    const Tensor dqkv = differentiable_backward.call(or_none(dq), or_none(dk), or_none(dv), or_none(qkv), or_none(cos),
                                                     or_none(sin), options.H, options.H_kv, options.norm);
    Tensor dvalue_rows;
    if (value_type && dv.defined()) dvalue_rows = dv.transpose(1, 2).flatten(2).to(*value_type);
    return {dqkv, dvalue_rows, Tensor(), Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor, Tensor> qkv_heads(const Tensor& qkv, const std::optional<Tensor>& value_rows,
                                             const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                                             int64_t H, int64_t H_kv, bool norm) {
  const py::gil_scoped_release nogil;
  const Tensor values = or_undefined(value_rows), c = or_undefined(cos), s = or_undefined(sin);
  const HeadOptions options{H, H_kv, norm};
  const variable_list heads = needs_gradient(qkv, values) ? QkvHeadsNode::apply(qkv, value_rows, cos, sin, options)
                                                          : split_heads(qkv, values, c, s, options, false);
  return {heads[0], heads[1], heads[2]};
}

// Without views of qkv, which an operator may not return.
std::tuple<Tensor, Tensor, Tensor> qkv_heads_forward(const Tensor& qkv, const std::optional<Tensor>& value_rows,
                                                     const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                                                     int64_t H, int64_t H_kv, bool norm) {
  const py::gil_scoped_release nogil;
  const variable_list heads =
      split_heads(qkv, or_undefined(value_rows), or_undefined(cos), or_undefined(sin), {H, H_kv, norm}, true);
  return {heads[0], heads[1], heads[2]};
}

Tensor qkv_heads_backward(const std::optional<Tensor>& dq, const std::optional<Tensor>& dk,
                          const std::optional<Tensor>& dv, const std::optional<Tensor>& qkv,
                          const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, int64_t H, int64_t H_kv,
                          bool norm) {
  const py::gil_scoped_release nogil;
  return std::get<0>(join_heads(or_undefined(dq), or_undefined(dk), or_undefined(dv), or_undefined(qkv),
                                or_undefined(cos), or_undefined(sin), {H, H_kv, norm}, std::nullopt));
}

}  // namespace

void define_heads(py::module_& m) {
  m.def("block_isa", &cpu::block_isa, "The code path that a block's small operators take on this CPU.");
  m.def("qkv_heads", &qkv_heads, "q, k and v, connected to autograd. For plain tensors.");
  m.def("qkv_heads_forward", &qkv_heads_forward, "q, k and v in memory of their own.");
  m.def("qkv_heads_backward", &qkv_heads_backward, "The gradient of the packed projection.");
}

}  // namespace chargpt::bindings
