// Parts of a model that more than one kernel knows. chargpt/generation/native.py and chargpt/kernels/ops/ have the numbers.

#pragma once

namespace chargpt::cpu {

enum class Norm { kNone, kLayer, kRms };
enum class Activation { kNone, kRelu, kReluSquared, kGelu, kSwiglu, kGeluTanh };

}  // namespace chargpt::cpu
