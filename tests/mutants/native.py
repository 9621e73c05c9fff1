"""Changes of the C++ code that `make mutants` tries: (file, text, what stands in its place). The text occurs once."""

PATCHES = (
    ("csrc/cpu/simd/simd.h", "(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16", "(bits + 0x8000) >> 16"),  # ties upwards
    (
        "csrc/cpu/philox.h",
        "(word & 0xFFFF) | (word & 0xFFFF0000) << 16",
        "(word & 0xFFFF) << 32 | (word & 0xFFFF0000) >> 16",
    ),
    ("csrc/cpu/philox.h", "(first + j) / 8, c1", "(first + j) / 8 + 1, c1"),
    ("csrc/common/philox.h", "kPhiloxRounds = 7", "kPhiloxRounds = 6"),
    ("csrc/cpu/attention_forward.h", "highest[r] = chunk_top > m[r] ? chunk_top : m[r];", "highest[r] = chunk_top;"),
    ("csrc/cpu/attention_forward.h", "l[r] * shrink[r] + sum_of<Acc>(sum[r])", "l[r] + sum_of<Acc>(sum[r])"),
    ("csrc/cpu/attention_backward.h", "- scratch.delta[r + i] + scratch.dlse[r + i]", "- scratch.delta[r + i]"),
    ("csrc/cpu/attention_tiles.h", "(lane >= low) & (lane < high)", "(lane >= low) & (lane <= high)"),
    ("csrc/cpu/attention_tiles.h", "load<uint32_t>(halves) >= threshold", "load<uint32_t>(halves) > threshold"),
    ("csrc/cpu/product_kernel.h", "load<float>(c + n) + load<float>(from + n)", "load<float>(from + n)"),
    ("csrc/cpu/micro_kernel.h", "r + 1 < rows ? load_half(row + stride, left) : HalfVec{}", "load_half(row, left)"),
    ("csrc/cpu/block_norm.h", "halves[i] < threshold ? Real{0}", "halves[i] <= threshold ? Real{0}"),
    ("csrc/cpu/block_norm.h", "dropped(d, read(factors, n))", "d"),
    ("csrc/cpu/block_activation.h", "clipped<Real>(x) * bell", "x * bell"),
    ("csrc/cpu/cross_entropy_kernel.h", "if (softcap == 0) return x;", "if (softcap <= 1) return x;"),
)
