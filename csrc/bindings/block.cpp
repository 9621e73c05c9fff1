// The small operators of a block, cpu/block.h, for torch: spreads the rows over torch's threads. Part of
// `chargpt._native`.

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <tuple>

#include "../cpu/block.h"
#include "common.h"

namespace chargpt::bindings {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kGrain = 16384;  // elements: fewer are not worth a thread


// x (..., C) as rows, each contiguous: x itself where its strides allow it, else a copy, which `kept` holds.
struct RowsOf {
  Tensor kept;
  cpu::Rows rows;

  explicit RowsOf(const Tensor& x) : kept(x) {
    if (!x.defined()) return;
    if (!x.is_contiguous()) {  // reshape costs a microsecond
      kept = x.reshape({-1, x.size(-1)});
      if (kept.stride(1) != 1 && kept.size(1) != 1) kept = kept.contiguous();
    }
    rows = {kept.const_data_ptr(), x.is_contiguous() ? x.size(-1) : kept.stride(0)};
  }
};

Tensor packed_like(const Tensor& x, at::ScalarType type) { return at::empty(x.sizes(), x.options().dtype(type)); }

// Runs f(begin, end) over rows of so many elements.
template <class F>
void for_rows(int64_t rows, int64_t elements, const F& f) {
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / elements), f);
}


// ------------------------------------------------------------------------------------------------------- add_rms_norm

struct Normed {
  Tensor sum, normed, rstd;  // sum: x itself where there is no y; rstd: one number for each row
};

Normed normalise(const Tensor& x, const Tensor& y, at::ScalarType type) {
  const RowsOf x_rows(x), y_rows(y);
  const int64_t C = x.size(-1), rows = x.numel() / C;
  Normed result{y.defined() ? packed_like(x, x.scalar_type()) : x, packed_like(x, type),
                at::empty({rows}, x.options().dtype(computing_type(x.scalar_type())))};
  const cpu::AddRmsNorm call{.x_type = dtype_of(x.scalar_type()),
                             .y_type = y.defined() ? dtype_of(y.scalar_type()) : dtype_of(x.scalar_type()),
                             .normed_type = dtype_of(type),
                             .C = C,
                             .x = x_rows.rows,
                             .y = y_rows.rows,
                             .sum = y.defined() ? result.sum.data_ptr() : nullptr,
                             .normed = result.normed.data_ptr(),
                             .rstd = result.rstd.data_ptr()};
  for_rows(rows, C, [&](int64_t begin, int64_t end) { cpu::add_rms_norm(call, begin, end); });
  return result;
}

// dx, and dy in y_type where that is another dtype; else dy is dx.
std::tuple<Tensor, Tensor> normalise_backward(const Tensor& dsum, const Tensor& dnormed, const Tensor& sum,
                                              const Tensor& rstd, at::ScalarType y_type) {
  if (!dnormed.defined()) return {dsum, dsum.to(y_type)};
  const bool two = y_type != sum.scalar_type();
  const RowsOf s_rows(sum), dnormed_rows(dnormed), dsum_rows(dsum);
  const Tensor dx = packed_like(sum, sum.scalar_type()), dy = two ? packed_like(sum, y_type) : dx;
  const Tensor numbers = rstd.contiguous();
  const cpu::AddRmsNormBackward call{.x_type = dtype_of(sum.scalar_type()),
                                     .y_type = dtype_of(y_type),
                                     .normed_type = dtype_of(dnormed.scalar_type()),
                                     .C = sum.size(-1),
                                     .sum = s_rows.rows,
                                     .rstd = numbers.const_data_ptr(),
                                     .dsum = dsum_rows.rows,
                                     .dnormed = dnormed_rows.rows,
                                     .dx = dx.data_ptr(),
                                     .dy = two ? dy.data_ptr() : nullptr};
  const int64_t rows = sum.numel() / call.C;
  for_rows(rows, call.C, [&](int64_t begin, int64_t end) { cpu::add_rms_norm_backward(call, begin, end); });
  return {dx, dy};
}

// The function returns the sum and the norm, or where there is no y, the norm.
class AddRmsNormNode : public torch::autograd::Function<AddRmsNormNode> {
 public:
  static variable_list forward(AutogradContext* context, const Tensor& x, const std::optional<Tensor>& branch,
                               at::ScalarType type) {
    const Tensor y = or_undefined(branch);
    const Normed result = normalise(x, y, type);
    context->save_for_backward({result.sum, result.rstd});
    context->set_materialize_grads(false);
    context->saved_data["y_type"] = y.defined() ? static_cast<int64_t>(y.scalar_type()) : int64_t{-1};
    if (y.defined()) return {result.sum, result.normed};
    return {result.normed};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const int64_t code = context->saved_data["y_type"].toInt();
    const Tensor dsum = code < 0 ? Tensor() : gradients[0], dnormed = gradients.back();
    if (!dsum.defined() && !dnormed.defined()) return variable_list(3);
    const auto saved = context->get_saved_variables();
    const auto y_type = code < 0 ? saved[0].scalar_type() : static_cast<at::ScalarType>(code);
    Tensor dx, dy;
    if (dnormed.defined() && needs_operators(dnormed, dsum)) {
      static const auto differentiable_backward = c10::Dispatcher::singleton()
                                                      .findSchemaOrThrow("chargpt::rms_norm_backward", "")
                                                      .typed<Tensor(const Tensor&, const Tensor&, const Tensor&)>();
      dx = differentiable_backward.call(dnormed, saved[0], saved[1]);
      if (dsum.defined()) dx = dx.add(dsum);
      dy = dx.to(y_type);
    } else {
      std::tie(dx, dy) = normalise_backward(dsum, dnormed, saved[0], saved[1], y_type);
    }
    return {dx, code < 0 ? Tensor() : dy, Tensor()};
  }
};

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const std::optional<Tensor>& y, at::ScalarType type) {
  const py::gil_scoped_release nogil;
  const Tensor branch = or_undefined(y);
  if (needs_gradient(x, branch)) {
    const variable_list outputs = AddRmsNormNode::apply(x, y, type);
    return {branch.defined() ? outputs[0] : x, outputs.back()};
  }
  const Normed result = normalise(x, branch, type);
  return {result.sum, result.normed};
}

std::tuple<Tensor, Tensor> rms_norm_forward(const Tensor& x, at::ScalarType type) {
  const py::gil_scoped_release nogil;
  const Normed result = normalise(x, Tensor(), type);
  return {result.normed, result.rstd};
}

Tensor rms_norm_backward(const Tensor& dnormed, const Tensor& x, const Tensor& rstd) {
  const py::gil_scoped_release nogil;
  return std::get<0>(normalise_backward(Tensor(), dnormed, x, rstd, x.scalar_type()));
}

// ---------------------------------------------------------------------------------------------------------- qkv_heads

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
      const auto [dqkv, dvalue_rows] = join_heads(dq, dk, dv, qkv, cos, sin, options, value_type);
      return {dqkv, dvalue_rows, Tensor(), Tensor(), Tensor()};
    }
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

// ------------------------------------------------------------------------------------------------------- relu_squared

Tensor square_of_relu(const Tensor& x) {
  const Tensor from = x.contiguous(), to = packed_like(x, x.scalar_type());
  const DType type = dtype_of(x.scalar_type());
  at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    cpu::relu_squared(type, from.const_data_ptr(), to.data_ptr(), begin, end);
  });
  return to;
}

Tensor square_of_relu_backward(const Tensor& dy, const Tensor& x) {
  const Tensor from = x.contiguous(), given = dy.contiguous(), to = packed_like(x, x.scalar_type());
  const DType type = dtype_of(x.scalar_type());
  at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    cpu::relu_squared_backward(type, from.const_data_ptr(), given.const_data_ptr(), to.data_ptr(), begin, end);
  });
  return to;
}

class ReluSquaredNode : public torch::autograd::Function<ReluSquaredNode> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& x) {
    context->save_for_backward({x});
    return square_of_relu(x);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const Tensor x = context->get_saved_variables()[0];
    if (!needs_operators(gradients[0])) return {square_of_relu_backward(gradients[0], x)};
    static const auto differentiable_backward = c10::Dispatcher::singleton()
                                                    .findSchemaOrThrow("chargpt::relu_squared_backward", "")
                                                    .typed<Tensor(const Tensor&, const Tensor&)>();
    return {differentiable_backward.call(gradients[0], x)};
  }
};

Tensor relu_squared(const Tensor& x) {
  const py::gil_scoped_release nogil;
  return needs_gradient(x) ? ReluSquaredNode::apply(x) : square_of_relu(x);
}

Tensor relu_squared_forward(const Tensor& x) {
  const py::gil_scoped_release nogil;
  return square_of_relu(x);
}

Tensor relu_squared_backward(const Tensor& dy, const Tensor& x) {
  const py::gil_scoped_release nogil;
  return square_of_relu_backward(dy, x);
}

}  // namespace

void define_block(py::module_& m) {
  m.def("block_isa", &cpu::block_isa, "The code path that a block's small operators take on this CPU.");
  m.def("add_rms_norm", &add_rms_norm, "The sum and its norm, connected to autograd. For plain tensors.");
  m.def("rms_norm_forward", &rms_norm_forward, "The norm, and 1 / root mean square of each row.");
  m.def("rms_norm_backward", &rms_norm_backward, "The gradient of the rows that were normalised.");
  m.def("qkv_heads", &qkv_heads, "q, k and v, connected to autograd. For plain tensors.");
  m.def("qkv_heads_forward", &qkv_heads_forward, "q, k and v in memory of their own.");
  m.def("qkv_heads_backward", &qkv_heads_backward, "The gradient of the packed projection.");
  m.def("relu_squared", &relu_squared, "max(x, 0) squared, connected to autograd. For plain tensors.");
  m.def("relu_squared_forward", &relu_squared_forward, "max(x, 0) squared.");
  m.def("relu_squared_backward", &relu_squared_backward, "Its gradient.");
}

}  // namespace chargpt::bindings
