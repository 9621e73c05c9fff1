// The element types of the CUDA kernels.

#pragma once

namespace chargpt::cuda {

enum class DType { kFloat32, kFloat16, kBFloat16 };

}  // namespace chargpt::cuda
