// The addition to the residual stream, dropout and the norm, cpu/block.h, for torch. Part of `chargpt._native`.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <tuple>

#include "../cpu/block.h"
#include "common.h"
#include "rows.h"

namespace chargpt::bindings {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kBlocks = 128;     // into which rows are cut where a weight wants its gradient: of the rows alone,
constexpr int64_t kLeastBlock = 16;  // so that the threads do not matter to the order of the sum

struct NormOptions {
  cpu::Norm norm;
  cpu::Dropout dropout;
};

NormOptions norm_options(int64_t norm, double p, const std::optional<Tensor>& seed) {
  const bool on = seed.has_value() && seed->defined();
  return {static_cast<cpu::Norm>(norm), {on, p, on ? static_cast<uint64_t>(seed->item<int64_t>()) : 0}};
}

// A weight or bias as the kernel reads it.
Tensor channels(const Tensor& x, at::ScalarType type) { return x.defined() ? x.to(type).contiguous() : x; }

void* second_row(const Tensor& x) { return static_cast<char*>(x.data_ptr()) + x.size(1) * x.element_size(); }

struct Normed {
  Tensor sum, normed;  // sum: x itself where there is no y; normed: undefined without a norm
  Tensor statistics;   // (2, rows): mean and rstd
};

Normed normalise(const Tensor& x, const Tensor& y, const Tensor& weight, const Tensor& bias, const NormOptions& options,
                 at::ScalarType type) {
  const Tensor& given = x.defined() ? x : y;
  const auto stream = given.scalar_type(), computing = computing_type(stream);
  const RowsOf x_rows(x), y_rows(y);
  const Tensor w = channels(weight, computing), b = channels(bias, computing);
  const int64_t C = given.size(-1), rows = given.numel() / C;
  const bool norm = options.norm != cpu::Norm::kNone;
  Normed result{.sum = y.defined() ? packed_like(given, stream) : x};
  if (norm) {
    result.normed = packed_like(given, type);
    result.statistics = at::empty({2, rows}, given.options().dtype(computing));
  }
  const cpu::AddNorm call{.x_type = dtype_of(stream),
                          .y_type = y.defined() ? dtype_of(y.scalar_type()) : dtype_of(stream),
                          .normed_type = norm ? dtype_of(type) : dtype_of(stream),
                          .norm = options.norm,
                          .dropout = options.dropout,
                          .C = C,
                          .x = x_rows.rows,
                          .y = y_rows.rows,
                          .weight = w.defined() ? w.const_data_ptr() : nullptr,
                          .bias = b.defined() ? b.const_data_ptr() : nullptr,
                          .sum = y.defined() ? result.sum.data_ptr() : nullptr,
                          .normed = norm ? result.normed.data_ptr() : nullptr,
                          .mean = norm ? result.statistics.data_ptr() : nullptr,
                          .rstd = norm ? second_row(result.statistics) : nullptr};
  for_rows(rows, C, [&](int64_t begin, int64_t end) { cpu::add_norm(call, begin, end); });
  return result;
}

template <class Real>
void add_blocks(const Tensor& parts, const Tensor& total) {
  const Real* from = parts.const_data_ptr<Real>();
  Real* to = total.mutable_data_ptr<Real>();
  const int64_t C = total.numel();
  for (int64_t block = 0; block < parts.size(0); ++block) {
    for (int64_t i = 0; i < C; ++i) to[i] += from[block * C + i];
  }
}

// (blocks, C) to (C,), in the dtype of `weight`; one block after the other.
Tensor added_blocks(const Tensor& parts, const Tensor& weight) {
  if (!parts.defined()) return {};
  const Tensor total = at::zeros({parts.size(1)}, parts.options());
  if (parts.scalar_type() == at::kDouble) {
    add_blocks<double>(parts, total);
  } else {
    add_blocks<float>(parts, total);
  }
  return total.to(weight.scalar_type());
}

struct NormGradients {
  Tensor dx, dy, dweight, dbias;
};

// What the caller saved, and which gradients it wants.
struct NormSaved {
  Tensor sum, weight, bias, statistics;
  NormOptions options;
  bool wants_x;
  std::optional<at::ScalarType> y_type;  // where there is a y
};

NormGradients normalise_backward(const Tensor& dsum, const Tensor& dnormed, const NormSaved& saved) {
  const Tensor& sum = saved.sum;
  const auto stream = sum.scalar_type(), computing = computing_type(stream);
  const auto y_type = saved.y_type.value_or(stream);
  const bool dropout = saved.options.dropout.on;
  const bool own_y = saved.y_type && (dropout || y_type != stream);  // dy differs from dx
  const bool make_x = dnormed.defined() && (saved.wants_x || !own_y);
  const RowsOf s_rows(sum), dnormed_rows(dnormed), dsum_rows(dsum);
  const Tensor w = channels(dnormed.defined() ? saved.weight : Tensor(), computing);
  const int64_t C = sum.size(-1), rows = sum.numel() / C;
  const int64_t block = std::max(kLeastBlock, (rows + kBlocks - 1) / kBlocks), blocks = (rows + block - 1) / block;
  NormGradients result{.dx = make_x ? packed_like(sum, stream) : dsum};
  result.dy = own_y ? packed_like(sum, y_type) : result.dx;
  Tensor dweight, dbias;
  if (w.defined()) dweight = at::empty({blocks, C}, sum.options().dtype(computing));
  if (w.defined() && saved.bias.defined()) dbias = at::empty({blocks, C}, sum.options().dtype(computing));
  const bool norm = dnormed.defined();
  const Tensor numbers = norm ? saved.statistics.contiguous() : Tensor();
  const cpu::AddNormBackward call{.x_type = dtype_of(stream),
                                  .y_type = dtype_of(y_type),
                                  .normed_type = norm ? dtype_of(dnormed.scalar_type()) : dtype_of(stream),
                                  .norm = saved.options.norm,
                                  .dropout = saved.options.dropout,
                                  .C = C,
                                  .rows = rows,
                                  .block = block,
                                  .sum = s_rows.rows,
                                  .dsum = dsum_rows.rows,
                                  .dnormed = dnormed_rows.rows,
                                  .weight = w.defined() ? w.const_data_ptr() : nullptr,
                                  .mean = norm ? numbers.const_data_ptr() : nullptr,
                                  .rstd = norm ? second_row(numbers) : nullptr,
                                  .dx = make_x ? result.dx.data_ptr() : nullptr,
                                  .dy = own_y ? result.dy.data_ptr() : nullptr,
                                  .dweight = dweight.defined() ? dweight.data_ptr() : nullptr,
                                  .dbias = dbias.defined() ? dbias.data_ptr() : nullptr};
  if (make_x || own_y || w.defined()) {
    for_rows(blocks, C * block, [&](int64_t begin, int64_t end) { cpu::add_norm_backward(call, begin, end); });
  }
  result.dweight = added_blocks(dweight, saved.weight);
  result.dbias = added_blocks(dbias, saved.bias);
  return result;
}

// As normalise_backward, by operators, so that it can be differentiated again.
NormGradients differentiable_backward(const Tensor& dsum, const Tensor& dnormed, const NormSaved& saved,
                                      const Tensor& seed) {
  NormGradients result{.dx = dsum};
  if (dnormed.defined()) {
    static const auto norm_backward =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("chargpt::norm_backward", "")
            .typed<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const std::optional<Tensor>&,
                                                      const std::optional<Tensor>&, const Tensor&, int64_t)>();
    std::tie(result.dx, result.dweight, result.dbias) =
        norm_backward.call(dnormed, saved.sum, or_none(saved.weight), or_none(saved.bias), saved.statistics,
                           static_cast<int64_t>(saved.options.norm));
    if (!saved.weight.defined()) result.dweight = Tensor();
    if (!saved.bias.defined()) result.dbias = Tensor();
    if (dsum.defined()) result.dx = result.dx.add(dsum);
  }
  if (!saved.y_type) return result;
  result.dy = result.dx;
  if (saved.options.dropout.on) {
    static const auto row_dropout = c10::Dispatcher::singleton()
                                        .findSchemaOrThrow("chargpt::row_dropout", "")
                                        .typed<Tensor(const Tensor&, double, const Tensor&)>();
    result.dy = row_dropout.call(result.dy, saved.options.dropout.p, seed);
  }
  result.dy = result.dy.to(*saved.y_type);
  return result;
}

// Returns what there is of the sum, where there is a y, and the norm.
class AddNormNode : public torch::autograd::Function<AddNormNode> {
 public:
  static variable_list forward(AutogradContext* context, const std::optional<Tensor>& x, const std::optional<Tensor>& y,
                               const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, int64_t norm,
                               double p, const std::optional<Tensor>& seed, at::ScalarType type) {
    const Tensor stream = or_undefined(x), branch = or_undefined(y);
    const Normed result =
        normalise(stream, branch, or_undefined(weight), or_undefined(bias), norm_options(norm, p, seed), type);
    const bool keeps = result.normed.defined();
    context->save_for_backward({keeps ? result.sum : Tensor(), or_undefined(weight), or_undefined(bias),
                                result.statistics, or_undefined(seed)});
    context->set_materialize_grads(false);
    // Plain values, which compiled autograd can hash; one tuple, because each named entry costs an allocation.
    context->saved_data["options"] =
        c10::ivalue::Tuple::create(norm, p, stream.defined() && stream.requires_grad(),
                                   branch.defined() ? static_cast<int64_t>(branch.scalar_type()) : int64_t{-1});
    variable_list outputs;
    if (branch.defined()) outputs.push_back(result.sum);
    if (keeps) outputs.push_back(result.normed);
    return outputs;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto& values = context->saved_data["options"].toTupleRef().elements();
    const int64_t norm = values[0].toInt(), y_code = values[3].toInt();
    const Tensor dsum = y_code < 0 ? Tensor() : gradients[0], dnormed = norm == 0 ? Tensor() : gradients.back();
    if (!dsum.defined() && !dnormed.defined()) return variable_list(8);
    const auto kept = context->get_saved_variables();
    NormSaved saved{.sum = norm == 0 ? dsum : kept[0],
                    .weight = kept[1],
                    .bias = kept[2],
                    .statistics = kept[3],
                    .options = norm_options(norm, values[1].toDouble(), or_none(kept[4])),
                    .wants_x = values[2].toBool(),
                    .y_type = std::nullopt};
    if (y_code >= 0) saved.y_type = static_cast<at::ScalarType>(y_code);
    refuse_tangents(dnormed, dsum);
    const NormGradients found = needs_operators(dnormed, dsum) ? differentiable_backward(dsum, dnormed, saved, kept[4])
                                                               : normalise_backward(dsum, dnormed, saved);
    return {saved.wants_x ? found.dx : Tensor(), saved.y_type ? found.dy : Tensor(), found.dweight, found.dbias,
            Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor> add_norm(const std::optional<Tensor>& x, const std::optional<Tensor>& y,
                                    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                    int64_t norm, double p, const std::optional<Tensor>& seed, at::ScalarType type) {
  const py::gil_scoped_release nogil;
  const Tensor stream = or_undefined(x), branch = or_undefined(y), w = or_undefined(weight), b = or_undefined(bias);
  Tensor sum = stream, normed;
  if (needs_gradient(stream, branch, w, b)) {
    const variable_list outputs = AddNormNode::apply(x, y, weight, bias, norm, p, seed, type);
    if (branch.defined()) sum = outputs[0];
    if (norm != 0) normed = outputs.back();
  } else {
    const Normed result = normalise(stream, branch, w, b, norm_options(norm, p, seed), type);
    sum = result.sum;
    normed = result.normed;
  }
  return {sum, normed.defined() ? normed : sum};
}

std::tuple<Tensor, Tensor> norm_forward(const Tensor& x, const std::optional<Tensor>& weight,
                                        const std::optional<Tensor>& bias, int64_t norm, at::ScalarType type) {
  const py::gil_scoped_release nogil;
  const Normed result =
      normalise(x, Tensor(), or_undefined(weight), or_undefined(bias), norm_options(norm, 0, std::nullopt), type);
  return {result.normed, result.statistics};
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& dnormed, const Tensor& x,
                                                 const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                                 const Tensor& statistics, int64_t norm) {
  const py::gil_scoped_release nogil;
  const NormSaved saved{.sum = x,
                        .weight = or_undefined(weight),
                        .bias = or_undefined(bias),
                        .statistics = statistics,
                        .options = norm_options(norm, 0, std::nullopt),
                        .wants_x = true,
                        .y_type = std::nullopt};
  const NormGradients found = normalise_backward(Tensor(), dnormed, saved);
  const auto or_empty = [&](const Tensor& gradient) { return gradient.defined() ? gradient : x.new_empty({0}); };
  return {found.dx, or_empty(found.dweight), or_empty(found.dbias)};
}

Tensor row_dropout(const Tensor& x, double p, const Tensor& seed) {
  const py::gil_scoped_release nogil;
  return normalise(Tensor(), x, Tensor(), Tensor(), norm_options(0, p, seed), x.scalar_type()).sum;
}

}  // namespace

void define_norm(py::module_& m) {
  m.def("add_norm", &add_norm, "The sum and its norm, connected to autograd. For plain tensors.");
  m.def("norm_forward", &norm_forward, "The norm, and mean and 1 / deviation of each row.");
  m.def("norm_backward", &norm_backward, "The gradients of rows, weight and bias.");
  m.def("row_dropout", &row_dropout, "Dropout by a row's and a channel's number.");
}

}  // namespace chargpt::bindings
