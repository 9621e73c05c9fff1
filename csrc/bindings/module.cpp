// The native module `chargpt._native`. chargpt/kernels/backends/cpp.py makes operators of what it holds.

#include <algorithm>

#include "../cpu/simd/isa.h"
#include "common.h"

namespace chargpt::bindings {

void define_activation(py::module_& m);
void define_attention(py::module_& m);
void define_cross_entropy(py::module_& m);
void define_decode(py::module_& m);
void define_heads(py::module_& m);
void define_norm(py::module_& m);
void define_product(py::module_& m);

namespace {

bool all_plain(const py::args& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const py::handle& x) { return is_plain(x.cast<Tensor>()); });
}

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
  features["amx_bf16"] = cpu::has_amx();
#else
  for (const char* name : {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "amx_bf16"}) features[name] = false;
#endif
  return features;
}

}  // namespace
}  // namespace chargpt::bindings

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace chargpt::bindings;
  m.doc() = "chargpt's compiled kernels";
  m.def("build_info", &build_info, "The torch version, compiler and C++ standard that this module was built with.");
  m.def("cpu_features", &cpu_features, "Instruction sets that this CPU offers, by name.");
  m.def("is_plain", &all_plain, "Whether kernels may read these tensors' memory here and now.");
  define_attention(m);
  define_cross_entropy(m);
  define_norm(m);
  define_heads(m);
  define_activation(m);
  define_decode(m);
  define_product(m);
}
