// The native module `chargpt._native`: where the C++ kernels meet torch and Python (a block's small operators do in
// bindings_block.cpp, the CUDA kernels in bindings_cuda.cpp). It checks, allocates, spreads the rows over torch's threads, and connects the kernels to autograd.
// chargpt/kernels/backends/cpp.py makes operators of it. torch/extension.h would cost a minute of compile time, so only what is
// used is included.

#include <ATen/Parallel.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros_like.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/attention.h"
#include "cpu/cross_entropy.h"

namespace py = pybind11;
namespace cpu = chargpt::cpu;
using at::Tensor;

void define_block(py::module_& m);  // bindings_block.cpp

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

enum class Reduction { kNone, kSum, kMean };

struct CrossEntropyArguments {
  cpu::CrossEntropyOptions options;
  Reduction reduction;
};

CrossEntropyArguments cross_entropy_arguments(int64_t ignore_index, double label_smoothing, double z_loss,
                                              std::optional<double> softcap, const std::string& reduction) {
  const auto parsed = reduction == "none" ? Reduction::kNone
                      : reduction == "sum" ? Reduction::kSum
                                           : Reduction::kMean;
  return {{ignore_index, label_smoothing, z_loss, softcap.value_or(0.0)}, parsed};
}

// Logits as N rows, each contiguous: a view where the strides allow it.
Tensor as_rows(const Tensor& logits) {
  const int64_t V = logits.size(-1);
  const Tensor rows = logits.reshape({-1, V});
  return rows.stride(1) == 1 || V == 1 ? rows : rows.contiguous();
}

Tensor as_targets(const Tensor& targets) { return targets.to(at::kLong).reshape({-1}).contiguous(); }

// Losses and normalisers have one number for each row, in float32, or float64 for float64.
at::TensorOptions row_options(const Tensor& logits) {
  return logits.options().dtype(logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

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
cpu::CrossEntropy<T> problem_of(const Tensor& rows, const Tensor& targets, const cpu::CrossEntropyOptions& options,
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
    const CrossEntropyResult result = ::forward(logits, targets, arguments, reduced);
    context->save_for_backward({logits, targets, result.normalisers});
    context->saved_data["kept"] = c10::IValue::make_capsule(c10::make_intrusive<Kept>(arguments, result.gradient));
    return result.loss;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& loss_gradients) {
    return {gradient(context, loss_gradients[0]), Tensor(), Tensor()};
  }

 private:
  // What the node keeps besides tensors: one object, because each named entry of saved_data costs an allocation.
  struct Kept : torch::CustomClassHolder {
    Kept(const CrossEntropyArguments& arguments, const Tensor& gradient) : arguments(arguments), gradient(gradient) {}
    const CrossEntropyArguments arguments;
    Tensor gradient;  // undefined where it was not computed, or has been handed over
  };

  static Tensor gradient(torch::autograd::AutogradContext* context, const Tensor& loss_gradient) {
    Kept& kept = static_cast<Kept&>(*context->saved_data["kept"].toCapsule());
    const bool differentiable = at::GradMode::is_enabled();  // create_graph=True
    if (kept.gradient.defined() && !differentiable) {
      const Tensor gradient = std::move(kept.gradient);  // now it is the receiver's alone
      if (loss_gradient.item<double>() != 1.0) gradient.mul_(loss_gradient);
      return gradient;
    }
    const auto saved = context->get_saved_variables();  // checks that nobody has written into them
    const CrossEntropyArguments& arguments = kept.arguments;
    if (!differentiable) return ::backward(loss_gradient, saved[0], saved[1], saved[2], arguments);
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
  if (!at::GradMode::is_enabled() || !logits.requires_grad()) return forward(logits, targets, arguments, false).loss;
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

// Whether all these are tensors whose memory may be read here and now: no fake, functorch or subclass tensors, no mode.
bool is_plain(const py::args& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const py::handle& x) {
    return !at::isTensorSubclassLike(x.cast<Tensor>());
  });
}

// ---------------------------------------------------------------------------------------------------------- attention

struct AttentionResult {
  Tensor out, lse;  // (B, H, T, D) over (B, T, H, D) memory, so that joining the heads copies nothing; (B, H, T)
};

cpu::DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return cpu::DType::kFloat32;
    case at::kBFloat16: return cpu::DType::kBFloat16;
    case at::kDouble: return cpu::DType::kFloat64;
    default: throw py::type_error("the C++ kernels take float32, bfloat16 and float64");
  }
}

Tensor with_whole_rows(const Tensor& x) { return x.stride(3) == 1 || x.size(3) == 1 ? x : x.contiguous(); }

cpu::View view(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }
cpu::MutableView mutable_view(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

// As x (B, H, T, D), over (B, T, H, D) memory.
Tensor empty_by_time(const Tensor& x) {
  return at::empty({x.size(0), x.size(2), x.size(1), x.size(3)}, x.options()).transpose(1, 2);
}

cpu::AttentionShape shape_of(const Tensor& q, const Tensor& k) {
  return {.B = q.size(0), .H = q.size(1), .H_kv = k.size(1), .T = q.size(2), .S = k.size(2), .D = q.size(3)};
}

cpu::AttentionOptions attention_options(double scale, double dropout_p, std::optional<int64_t> window,
                                        const std::optional<Tensor>& seed) {
  const bool dropout = seed.has_value() && seed->defined();
  return {.scale = scale,
          .window = window.value_or(0),
          .dropout = dropout,
          .dropout_p = dropout_p,
          .seed = dropout ? static_cast<uint64_t>(seed->item<int64_t>()) : 0};
}

void parallel_for(int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
  at::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

AttentionResult attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                  const cpu::AttentionOptions& options) {
  const Tensor Q = with_whole_rows(q), K = with_whole_rows(k), V = with_whole_rows(v);
  AttentionResult result{empty_by_time(q), at::empty({q.size(0), q.size(1), q.size(2)}, row_options(q))};
  const bool done = cpu::attention_forward(dtype_of(q), shape_of(q, k), options, view(Q), view(K), view(V),
                                           mutable_view(result.out), result.lse.data_ptr(), &parallel_for);
  TORCH_CHECK_WITH(OutOfMemoryError, done, "no memory for the scratch space of attention");
  return result;
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& out_gradient, const Tensor& lse_gradient,
                                                      const Tensor& q, const Tensor& k, const Tensor& v,
                                                      const Tensor& out, const Tensor& lse,
                                                      const cpu::AttentionOptions& options) {
  const Tensor Q = with_whole_rows(q), K = with_whole_rows(k), V = with_whole_rows(v);
  const Tensor dO = with_whole_rows(out_gradient.defined() ? out_gradient : at::zeros_like(out));
  const Tensor dlse = lse_gradient.defined() ? lse_gradient.contiguous() : lse_gradient;
  const Tensor dq = empty_by_time(q), dk = empty_by_time(k), dv = empty_by_time(v), O = with_whole_rows(out);
  const Tensor row_lse = lse.contiguous();
  const bool done = cpu::attention_backward(
      dtype_of(q), shape_of(q, k), options, view(dO), view(Q), view(K), view(V), view(O), row_lse.const_data_ptr(),
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
    const auto optional = [](const Tensor& x) { return x.defined() ? std::optional(x) : std::nullopt; };
    std::tuple<Tensor, Tensor, Tensor> inputs;
    if (at::GradMode::is_enabled()) {  // create_graph=True
      static const auto differentiable_backward =
          c10::Dispatcher::singleton()
              .findSchemaOrThrow("chargpt::causal_attention_backward", "")
              .typed<std::tuple<Tensor, Tensor, Tensor>(
                  const std::optional<Tensor>&, const std::optional<Tensor>&, const Tensor&, const Tensor&,
                  const Tensor&, const Tensor&, const Tensor&, double, double, std::optional<int64_t>,
                  const std::optional<Tensor>&)>();
      inputs = differentiable_backward.call(optional(gradients[0]), optional(gradients[1]), saved[0], saved[1],
                                            saved[2], saved[3], saved[4], scale, dropout_p, window, seed);
    } else {
      inputs = attention_backward(gradients[0], gradients[1], saved[0], saved[1], saved[2], saved[3], saved[4],
                                  attention_options(scale, dropout_p, window, seed));
    }
    auto& [dq, dk, dv] = inputs;
    return {dq, dk, dv, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor> causal_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                            double dropout_p, std::optional<int64_t> window,
                                            const std::optional<Tensor>& seed) {
  const py::gil_scoped_release nogil;
  if (at::GradMode::is_enabled() && (q.requires_grad() || k.requires_grad() || v.requires_grad())) {
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

std::tuple<Tensor, Tensor, Tensor> causal_attention_backward(
    const std::optional<Tensor>& out_gradient, const std::optional<Tensor>& lse_gradient, const Tensor& q,
    const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse, double scale, double dropout_p,
    std::optional<int64_t> window, const std::optional<Tensor>& seed) {
  const py::gil_scoped_release nogil;
  return attention_backward(out_gradient.value_or(Tensor()), lse_gradient.value_or(Tensor()), q, k, v, out, lse,
                            attention_options(scale, dropout_p, window, seed));
}

// -------------------------------------------------------------------------------------------------------------- module

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

// What this module was compiled with. `torch` is the exact version whose headers and libraries were used.
py::dict build_info() {
  py::dict info;
  info["torch"] = CHARGPT_TORCH_VERSION;
  info["compiler"] = kCompiler;
  info["cpp_standard"] = static_cast<long>(__cplusplus);
  return info;
}

// Which instruction sets this CPU offers and the operating system lets us use.
py::dict cpu_features() {
  py::dict features;
#if defined(__x86_64__)
  __builtin_cpu_init();
  features["avx2"] = static_cast<bool>(__builtin_cpu_supports("avx2"));
  features["fma"] = static_cast<bool>(__builtin_cpu_supports("fma"));
  features["avx512f"] = static_cast<bool>(__builtin_cpu_supports("avx512f"));
  features["avx512bw"] = static_cast<bool>(__builtin_cpu_supports("avx512bw"));
  features["avx512vl"] = static_cast<bool>(__builtin_cpu_supports("avx512vl"));
  features["avx512_bf16"] = static_cast<bool>(__builtin_cpu_supports("avx512bf16"));
#else
  for (const char* name : {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_bf16"}) features[name] = false;
#endif
  return features;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "chargpt's compiled kernels";
  m.def("build_info", &build_info, "The torch version, compiler and C++ standard that this module was built with.");
  m.def("cpu_features", &cpu_features, "Instruction sets that this CPU offers, by name.");
  m.def("is_plain", &is_plain, "Whether kernels may read these tensors' memory here and now.");
  m.def("cross_entropy_isa", &cpu::cross_entropy_isa, "The code path that cross-entropy takes on this CPU.");
  m.def("attention_isa", [](const Tensor& x) { return cpu::attention_isa(dtype_of(x)); },
        "The code path that attention takes for a tensor of this dtype on this CPU.");
  m.attr("max_head_size") = cpu::kMaxHeadSize;
  m.def("causal_attention", &causal_attention, "O and lse, connected to autograd. For plain tensors.");
  m.def("causal_attention_forward", &causal_attention_forward, "O and lse.");
  m.def("causal_attention_backward", &causal_attention_backward, "The gradients of q, k and v.");
  m.def("softmax_cross_entropy", &softmax_cross_entropy, "The loss, connected to autograd. For plain tensors.");
  m.def("softmax_cross_entropy_forward", &softmax_cross_entropy_forward, "Loss and normalisers (2, N).");
  m.def("softmax_cross_entropy_backward", &softmax_cross_entropy_backward, "The gradient of the logits.");
  define_block(m);
}
