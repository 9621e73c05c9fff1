// The element types of the kernels. Each kind of device takes some of them.

#pragma once

namespace chargpt {

enum class DType { kFloat32, kFloat16, kBFloat16, kFloat64 };

}  // namespace chargpt
