// How decode.cpp draws a token from logits: as chargpt/generation/sampler.py, which is the specification.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/philox.h"
#include "decode.h"

namespace chargpt::cpu {

// The number in [0, 1) of sample and position: Philox with the counter (position, sample, 0, 1).
inline double uniform_number(uint64_t seed, uint32_t sample, uint32_t position) {
  uint32_t c0 = position, c1 = sample, c2 = 0, c3 = 1;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t{kPhiloxFactor0} * c0, p1 = uint64_t{kPhiloxFactor1} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxKeyStep0;
    k1 += kPhiloxKeyStep1;
  }
  return static_cast<double>((uint64_t{c0} << 21) + (c1 >> 11)) * 0x1p-53;
}

// The token that a number in [0, 1) chooses from logits (V); -1 if they have no softmax. 0 as temperature takes the
// likeliest.
inline int64_t draw_token(const float* logits, int64_t V, const DrawOptions& options, double uniform) {
  if (options.bias != nullptr) {
    thread_local std::vector<float> biased;
    biased.resize(V);
    for (int64_t i = 0; i < V; ++i) biased[i] = logits[i] + options.bias[i];
    logits = biased.data();
  }
  float top = logits[0];
  int64_t likeliest = 0;
  for (int64_t i = 0; i < V; ++i) {
    if (!(logits[i] <= top)) top = logits[i], likeliest = i;  // a NaN too
    if (top != top) return -1;
  }
  if (std::isinf(top)) return -1;
  if (options.temperature == 0) return likeliest;
  thread_local std::vector<double> p;
  p.resize(V);
  double total = 0;
  for (int64_t i = 0; i < V; ++i) {
    total += p[i] = std::exp((static_cast<double>(logits[i]) - static_cast<double>(top)) / options.temperature);
  }
  for (double& x : p) x /= total;
  if (options.top_k > 0 || options.top_p < 1) {
    thread_local std::vector<int64_t> order;
    order.resize(V);
    for (int64_t i = 0; i < V; ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [](int64_t a, int64_t b) { return p[a] > p[b]; });
    const int64_t kept = options.top_k > 0 ? std::min(options.top_k, V) : V;
    double sum = 0, before = 0;
    for (int64_t i = 0; i < kept; ++i) sum += p[order[i]];
    for (int64_t i = 0; i < V; ++i) {
      const double here = p[order[i]];
      if (i >= kept || (options.top_p < 1 && before >= options.top_p * sum)) p[order[i]] = 0;
      before += here;
    }
  }
  const double least = options.min_p * *std::max_element(p.begin(), p.end());
  total = 0;
  for (double& x : p) total += x = x < least ? 0 : x;
  double reached = 0;
  for (double& x : p) reached += x = static_cast<float>(x / total);
  const double wanted = uniform * reached;
  int64_t last = 0;
  reached = 0;
  for (int64_t i = 0; i < V; ++i) {
    if (p[i] == 0) continue;
    last = i;
    if ((reached += p[i]) > wanted) break;
  }
  return last;
}

}  // namespace chargpt::cpu
