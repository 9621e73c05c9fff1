// Softmax cross-entropy of cpu/cross_entropy.h for torch: spreads the rows over torch's threads, and keeps large gradients
// in memory of its own. Part of `chargpt._native`.

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/from_blob.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <tuple>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../cpu/cross_entropy.h"
#include "common.h"

namespace chargpt::bindings {
namespace {

// ------------------------------------------------------------------------------------------------------ large buffers

// A gradient of hundreds of megabytes costs more in page faults, at its first touch, than in arithmetic. Two remedies:
// huge pages, and keeping the memory of the last one that was freed for the next training step.
class LargeBuffers {
 public:
  static constexpr size_t kSmallest = size_t{32} << 20;  // below that, malloc itself keeps what is freed

  // Uninitialised memory for a contiguous tensor.
  static Tensor empty(at::IntArrayRef shape, const at::TensorOptions& options) {
    const size_t bytes = static_cast<size_t>(c10::multiply_integers(shape)) * options.dtype().itemsize();
    if (bytes < kSmallest) return at::empty(shape, options);
    const Block block = take(bytes);
    return at::from_blob(block.data, shape, [block](void*) { give_back(block); }, options);
  }

 private:
  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
  };

  static Block take(size_t bytes) {
    Block block;
    {
      const std::lock_guard lock(mutex());
      std::swap(block, kept());
    }
    if (block.bytes >= bytes && block.bytes / 2 <= bytes) return block;
    std::free(block.data);
    constexpr size_t kHugePage = size_t{2} << 20;
    const size_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    block = {std::aligned_alloc(kHugePage, rounded), rounded};
    TORCH_CHECK_WITH(OutOfMemoryError, block.data != nullptr, "cannot allocate ", bytes, " bytes for a gradient");
#if defined(MADV_HUGEPAGE)
    madvise(block.data, rounded, MADV_HUGEPAGE);  // a wish: whether it is granted changes nothing but the speed
#endif
    return block;
  }

  static void give_back(Block block) {
    {
      const std::lock_guard lock(mutex());
      std::swap(block, kept());
    }
    std::free(block.data);
  }

  // Never destroyed: tensors may be freed after the static variables.
  static std::mutex& mutex() {
    static std::mutex& mutex = *new std::mutex;
    return mutex;
  }
  static Block& kept() {
    static Block& block = *new Block;
    return block;
  }
};

// ------------------------------------------------------------------------------------------------------ cross-entropy

template <class F>
void for_type(at::ScalarType type, const F& f) {
  switch (type) {
    case at::kFloat: return f(float{});
    case at::kDouble: return f(double{});
    case at::kBFloat16: return f(cpu::BFloat16{});
    default: throw py::type_error("the C++ kernels take float32, bfloat16 and float64");
  }
}

template <class T>
cpu::CrossEntropy<T> problem_of(const Tensor& rows, const Tensor& targets, const CrossEntropyOptions& options,
                                const Tensor& normalisers, const Tensor& gradient) {
  using Real = cpu::ComputeType<T>;
  constexpr size_t kCaches = size_t{32} << 20;  // no core's share of the last-level cache is larger
  const int64_t N = rows.size(0);
  Real* const numbers = static_cast<Real*>(normalisers.data_ptr());
  return {
      .logits = static_cast<const T*>(rows.const_data_ptr()),
      .V = rows.size(1),
      .row_stride = rows.stride(0),
      .targets = targets.const_data_ptr<int64_t>(),
      .options = options,
      .maxima = numbers,
      .sums = numbers + N,
      .gradient = gradient.defined() ? static_cast<T*>(gradient.data_ptr()) : nullptr,
      .stream = gradient.defined() && gradient.nbytes() >= kCaches,
  };
}

// Runs f(begin, end) over the rows. Ranges below some 10 microseconds of work are not worth a thread.
template <class F>
void for_rows(const Tensor& rows, const F& f) {
  at::parallel_for(0, rows.size(0), std::max<int64_t>(1, 16384 / rows.size(1)), f);
}

int64_t count_valid(const Tensor& rows, const Tensor& targets, int64_t ignore_index) {
  const int64_t V = rows.size(1);
  const int64_t valid = cpu::check_targets(targets.const_data_ptr<int64_t>(), rows.size(0), V, ignore_index);
  if (valid < 0) throw py::index_error("a target is neither ignore_index nor in [0, " + std::to_string(V) + ")");
  return valid;
}

double loss_scale(const CrossEntropyArguments& arguments, int64_t valid) {
  return arguments.reduction == Reduction::kMean ? 1.0 / static_cast<double>(std::max<int64_t>(valid, 1)) : 1.0;
}

struct CrossEntropyResult {
  Tensor loss;         // () or the shape of the targets
  Tensor normalisers;  // (2, N): largest logit m and sum of exp(x - m) of each row, unset for ignored rows
  Tensor gradient;     // as the logits, of the reduced loss; undefined unless it was asked for
};

CrossEntropyResult forward(const Tensor& logits, const Tensor& targets, const CrossEntropyArguments& arguments,
                           bool with_gradient) {
  const Tensor rows = as_rows(logits), labels = as_targets(targets);
  const int64_t N = rows.size(0);
  const double scale = loss_scale(arguments, count_valid(rows, labels, arguments.options.ignore_index));
  CrossEntropyResult result;
  result.normalisers = at::empty({2, N}, row_options(logits));
  const Tensor losses = at::empty({N}, row_options(logits));
  if (with_gradient) result.gradient = LargeBuffers::empty(logits.sizes(), logits.options());
  for_type(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using Real = cpu::ComputeType<T>;
    const auto problem = problem_of<T>(rows, labels, arguments.options, result.normalisers, result.gradient);
    Real* const out = losses.data_ptr<Real>();
    for_rows(rows, [&](int64_t begin, int64_t end) {
      cpu::cross_entropy_forward(problem, static_cast<Real>(scale), out, begin, end);
    });
    if (arguments.reduction != Reduction::kNone) {
      result.loss = at::empty({}, row_options(logits));
      *result.loss.data_ptr<Real>() = static_cast<Real>(cpu::sum_losses(out, N) * scale);
    }
  });
  if (arguments.reduction == Reduction::kNone) result.loss = losses.view(targets.sizes());
  return result;
}

Tensor backward(const Tensor& loss_gradient, const Tensor& logits, const Tensor& targets, const Tensor& normalisers,
                const CrossEntropyArguments& arguments) {
  const Tensor rows = as_rows(logits), labels = as_targets(targets);
  const double scale = loss_scale(arguments, count_valid(rows, labels, arguments.options.ignore_index));
  const bool reduced = arguments.reduction != Reduction::kNone;
  const Tensor weights = loss_gradient.to(normalisers.scalar_type()).reshape({-1}).contiguous();
  Tensor gradient = LargeBuffers::empty(logits.sizes(), logits.options());
  for_type(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using Real = cpu::ComputeType<T>;
    const auto problem = problem_of<T>(rows, labels, arguments.options, normalisers, gradient);
    const Real* const given = weights.const_data_ptr<Real>();
    const Real factor = static_cast<Real>(reduced ? scale * given[0] : 1.0);
    for_rows(rows, [&](int64_t begin, int64_t end) {
      cpu::cross_entropy_backward(problem, factor, reduced ? nullptr : given, begin, end);
    });
  });
  return gradient;
}

// The eager path. A mean or a sum knows its gradient but for the factor that arrives in the backward, nearly always 1,
// so the forward computes it while the row is in cache, and the backward hands it over. Everything else, a second
// backward through the same graph included, computes it from the logits and the normalisers.
class CrossEntropyNode : public torch::autograd::Function<CrossEntropyNode> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& logits, const Tensor& targets,
                        const CrossEntropyArguments& arguments) {
    const bool reduced = arguments.reduction != Reduction::kNone;
    const CrossEntropyResult result = bindings::forward(logits, targets, arguments, reduced);
    context->save_for_backward({logits, targets, result.normalisers});
    // Plain values, which compiled autograd can hash; one tuple, because each named entry costs an allocation.
    const auto& options = arguments.options;
    context->saved_data["options"] =
        c10::ivalue::Tuple::create(options.ignore_index, options.label_smoothing, options.z_loss, options.softcap,
                                   static_cast<int64_t>(arguments.reduction));
    context->saved_data["gradient"] = result.gradient;  // undefined where it was not computed
    return result.loss;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& loss_gradients) {
    return {gradient(context, loss_gradients[0]), Tensor(), Tensor()};
  }

 private:
  static Tensor gradient(torch::autograd::AutogradContext* context, const Tensor& loss_gradient) {
    c10::IValue& kept = context->saved_data["gradient"];
    const bool differentiable = needs_operators(loss_gradient);
    if (kept.isTensor() && kept.toTensor().defined() && !differentiable) {
      const Tensor gradient = std::move(kept).toTensor();  // now it is the receiver's alone
      if (loss_gradient.item<double>() != 1.0) gradient.mul_(loss_gradient);
      return gradient;
    }
    const auto saved = context->get_saved_variables();  // checks that nobody has written into them
    const auto& values = context->saved_data["options"].toTupleRef().elements();
    const CrossEntropyArguments arguments{
        {values[0].toInt(), values[1].toDouble(), values[2].toDouble(), values[3].toDouble()},
        static_cast<Reduction>(values[4].toInt())};
    if (!differentiable) return bindings::backward(loss_gradient, saved[0], saved[1], saved[2], arguments);
    refuse_tangents(loss_gradient);
    static const auto differentiable_backward =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("chargpt::softmax_cross_entropy_backward", "")
            .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, double, double,
                          std::optional<double>, c10::string_view)>();
    const auto& options = arguments.options;
    constexpr c10::string_view kNames[] = {"none", "sum", "mean"};
    return differentiable_backward.call(
        loss_gradient, saved[0], saved[1], saved[2], options.ignore_index, options.label_smoothing, options.z_loss,
        options.softcap > 0 ? std::optional(options.softcap) : std::nullopt,
        kNames[static_cast<int>(arguments.reduction)]);
  }
};

Tensor softmax_cross_entropy(const Tensor& logits, const Tensor& targets, int64_t ignore_index, double label_smoothing,
                             double z_loss, std::optional<double> softcap, const std::string& reduction) {
  const py::gil_scoped_release nogil;
  const auto arguments = cross_entropy_arguments(ignore_index, label_smoothing, z_loss, softcap, reduction);
  if (!needs_gradient(logits)) return forward(logits, targets, arguments, false).loss;
  return CrossEntropyNode::apply(logits, targets, arguments);
}

std::tuple<Tensor, Tensor> softmax_cross_entropy_forward(const Tensor& logits, const Tensor& targets,
                                                         int64_t ignore_index, double label_smoothing, double z_loss,
                                                         std::optional<double> softcap, const std::string& reduction) {
  const py::gil_scoped_release nogil;
  auto result = forward(logits, targets,
                        cross_entropy_arguments(ignore_index, label_smoothing, z_loss, softcap, reduction), false);
  return {result.loss, result.normalisers};
}

Tensor softmax_cross_entropy_backward(const Tensor& loss_gradient, const Tensor& logits, const Tensor& targets,
                                      const Tensor& normalisers, int64_t ignore_index, double label_smoothing,
                                      double z_loss, std::optional<double> softcap, const std::string& reduction) {
  const py::gil_scoped_release nogil;
  return backward(loss_gradient, logits, targets, normalisers,
                  cross_entropy_arguments(ignore_index, label_smoothing, z_loss, softcap, reduction));
}

// The losses (N) of the logits (N, V), contiguous, whose memory the gradient of the losses' sum takes.
Tensor softmax_cross_entropy_gradient_(const Tensor& logits, const Tensor& targets, int64_t ignore_index,
                                       double label_smoothing, double z_loss, std::optional<double> softcap) {
  const py::gil_scoped_release nogil;
  TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), "the logits must be contiguous rows");
  const auto arguments = cross_entropy_arguments(ignore_index, label_smoothing, z_loss, softcap, "none");
  const Tensor labels = as_targets(targets);
  count_valid(logits, labels, ignore_index);
  const Tensor normalisers = at::empty({2, logits.size(0)}, row_options(logits));
  const Tensor losses = at::empty({logits.size(0)}, row_options(logits));
  for_type(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    auto problem = problem_of<T>(logits, labels, arguments.options, normalisers, logits);
    problem.stream = false;  // it is read at once
    for_rows(logits, [&](int64_t begin, int64_t end) {
      cpu::cross_entropy_forward(problem, cpu::ComputeType<T>{1}, losses.data_ptr<cpu::ComputeType<T>>(), begin, end);
    });
  });
  return losses;
}

}  // namespace

void define_cross_entropy(py::module_& m) {
  m.def("cross_entropy_isa", &cpu::cross_entropy_isa, "The code path that cross-entropy takes on this CPU.");
  m.def("softmax_cross_entropy", &softmax_cross_entropy, "The loss, connected to autograd. For plain tensors.");
  m.def("softmax_cross_entropy_forward", &softmax_cross_entropy_forward, "Loss and normalisers (2, N).");
  m.def("softmax_cross_entropy_backward", &softmax_cross_entropy_backward, "The gradient of the logits.");
  m.def("softmax_cross_entropy_gradient_", &softmax_cross_entropy_gradient_, "Losses; the gradient takes the logits' place.");
}

}  // namespace chargpt::bindings
