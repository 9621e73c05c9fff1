// Runs product.cpp without torch, for the sanitizers: every buffer ends where its matrix ends, results are compared with
// float64 loops, and all ways to divide the work must give the same bits. `make sanitize` runs it on every code path.

#include "../cpu/product.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

using namespace chargpt::cpu;

namespace {

int failures = 0;

float widen(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

std::vector<uint16_t> random_rows(int64_t rows, int64_t columns, int64_t stride, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<uint16_t> x(rows == 0 ? 0 : (rows - 1) * stride + columns);
  for (uint16_t& one : x) {
    const float value = normal(random);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    one = static_cast<uint16_t>(bits >> 16);
  }
  return x;
}

void one_by_one(int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
  for (int64_t i = count - 1; i >= 0; --i) body(context, i, i + 1);
}

void check(int64_t K, int64_t M, int64_t N, int64_t gap) {
  std::mt19937 random(static_cast<unsigned>(K * 1000003 + M * 1009 + N));
  const auto a = random_rows(K, M, M + gap, random), b = random_rows(K, N, N + gap, random);
  std::vector<float> first;
  for (ParallelFor parallel_for : {static_cast<ParallelFor>(nullptr), &one_by_one}) {
    std::vector<float> c(M == 0 ? 0 : (M - 1) * (N + gap) + N, 0.5f);
    const TransposedProduct product{K, M, N, a.data(), M + gap, b.data(), N + gap, c.data(), N + gap};
    if (!add_transposed_product(product, parallel_for)) ++failures;
    if (first.empty()) {
      first = c;
    } else if (!c.empty() && std::memcmp(c.data(), first.data(), sizeof(float) * c.size()) != 0) {
      ++failures;
      std::printf("other bits when the work is divided otherwise (%ld, %ld, %ld)\n", long(K), long(M), long(N));
    }
    for (int64_t i = 0; i < static_cast<int64_t>(c.size()); ++i) {
      const int64_t m = i / (N + gap), n = i % (N + gap);
      double wanted = 0.5, size = 1;
      for (int64_t k = 0; n < N && k < K; ++k) {
        const double term = double(widen(a[k * (M + gap) + m])) * widen(b[k * (N + gap) + n]);
        wanted += term;
        size += std::fabs(term);
      }
      if (!(std::fabs(c[i] - wanted) <= 1e-6 * size) && ++failures <= 20) {
        std::printf("(%ld, %ld, %ld) at (%ld, %ld): %g, not %g\n", long(K), long(M), long(N), long(m), long(n), c[i],
                    wanted);
      }
    }
  }
}

}  // namespace

int main() {
  int cases = 0;
  for (int64_t K : {0, 1, 2, 31, 63, 64, 65, 130}) {
    for (int64_t M : {0, 1, 17, 64, 65, 100}) {
      for (int64_t N : {0, 1, 8, 31, 64, 80, 200}) {
        check(K, M, N, (K + M + N) % 2 * 3);
        ++cases;
      }
    }
  }
  std::printf("product, %s: %d cases, %d failures\n", product_isa(), cases, failures);
  return failures == 0 ? 0 : 1;
}
