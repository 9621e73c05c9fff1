// The attention kernels on the CPU: entry points for test_attention_on_host.py, and a program of its own for the
// sanitizers, in which every buffer ends where its tensor ends and results are compared with float64 loops.

#include "../../csrc/cuda/attention.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

using namespace chargpt;
using namespace chargpt::cuda;

// ---- For Python ----------------------------------------------------------------------------------------------------

// A tensor: its first element, and the strides of (batch, head, time).
struct Tensor {
  void* data;
  int64_t strides[3];
};

extern "C" {

// Which of the kernels runs depends on the chip.
void attention_set_chip(int multiprocessors, int shared_bytes) {
  host_multiprocessors = multiprocessors;
  host_shared_bytes = shared_bytes;
}

// tensors: q, k, v, out
int attention_run_forward(int dtype, const AttentionShape* shape, const AttentionOptions* options, const Tensor* x,
                          float* lse) {
  const auto view = [&](int i) { return View{x[i].data, x[i].strides[0], x[i].strides[1], x[i].strides[2]}; };
  const MutableView out{x[3].data, x[3].strides[0], x[3].strides[1], x[3].strides[2]};
  return attention_forward(static_cast<DType>(dtype), *shape, *options, view(0), view(1), view(2), out, lse, nullptr);
}

// tensors: dout, q, k, v, out, dq, dk, dv
int attention_run_backward(int dtype, const AttentionShape* shape, const AttentionOptions* options, const Tensor* x,
                           const float* lse, const float* dlse) {
  const auto view = [&](int i) { return View{x[i].data, x[i].strides[0], x[i].strides[1], x[i].strides[2]}; };
  const auto writable = [&](int i) {
    return MutableView{x[i].data, x[i].strides[0], x[i].strides[1], x[i].strides[2]};
  };
  std::vector<char> workspace(attention_backward_workspace(static_cast<DType>(dtype), *shape), '\xff');
  return attention_backward(static_cast<DType>(dtype), *shape, *options, view(0), view(1), view(2), view(3), view(4),
                            lse, dlse, writable(5), writable(6), writable(7), workspace.data(), nullptr);
}

}  // extern "C"

// ---- For the sanitizers --------------------------------------------------------------------------------------------

namespace {

int failures = 0;

struct Case {
  AttentionShape shape;
  AttentionOptions options = {.scale = 0.3};
  int64_t odd = 0;       // elements before each tensor and after each row: odd numbers rule out wide copies
  bool resident = true;  // whether K and V may stay in shared memory
};

float widened(float x) { return x; }
float widened(__half x) { return __half2float(x); }
float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
void narrow(float& to, float x) { to = x; }
void narrow(__half& to, float x) { to = __float2half_rn(x); }
void narrow(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

// (batch, heads, time, D) over (batch, time, heads, D + odd) memory on the heap, which begins and ends where it must.
template <class T>
struct Host {
  int64_t B, H, L, D, row, offset;
  std::vector<T> data;

  Host(int64_t B, int64_t H, int64_t L, int64_t D, int64_t odd)
      : B(B), H(H), L(L), D(D), row(D + odd), offset(odd), data(std::max<int64_t>(0, offset + B * L * H * row - odd)) {}
  T& at(int64_t b, int64_t h, int64_t t, int64_t d) { return data[offset + ((b * L + t) * H + h) * row + d]; }
  Tensor tensor() { return {data.data() + offset, {L * H * row, row, H * row}}; }
};

bool keep(const AttentionOptions& options, int64_t batch_head, int64_t query, int64_t key) {
  uint32_t c[4] = {static_cast<uint32_t>(key / 8), static_cast<uint32_t>(query), static_cast<uint32_t>(batch_head), 0};
  uint32_t k[2] = {static_cast<uint32_t>(options.seed), static_cast<uint32_t>(options.seed >> 32)};
  for (int round = 0; round < 7; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c[0], p1 = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(p1),
                              static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(p0)};
    std::memcpy(c, next, sizeof c);
    k[0] += 0x9E3779B9;
    k[1] += 0xBB67AE85;
  }
  return (c[key % 8 / 2] >> key % 2 * 16 & 0xFFFF) >= static_cast<uint32_t>(options.dropout_p * 65536);
}

void compare(const char* what, const Case& c, double tolerance, const std::vector<double>& got,
             const std::vector<double>& wanted) {
  double largest = 1;
  for (double x : wanted) largest = std::max(largest, std::abs(x));
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::abs(got[i] - wanted[i]) <= tolerance * largest) continue;
    if (++failures <= 20) {
      std::printf("%s[%zu]: got %.9g, wanted %.9g (H %ld/%ld T %ld S %ld D %ld window %ld dropout %g resident %d)\n",
                  what, i, got[i], wanted[i], static_cast<long>(c.shape.H), static_cast<long>(c.shape.H_kv),
                  static_cast<long>(c.shape.T), static_cast<long>(c.shape.S), static_cast<long>(c.shape.D),
                  static_cast<long>(c.options.window), c.options.dropout_p, c.resident);
    }
    return;
  }
}

template <class T>
void check(const Case& c, DType dtype) {
  const auto [B, H, H_kv, L, S, D] = c.shape;
  Host<T> q(B, H, L, D, c.odd), k(B, H_kv, S, D, c.odd), v = k, dout = q, out = q, dq = q, dk = k, dv = k;
  std::mt19937 random(static_cast<unsigned>(L * 1000 + D));
  std::normal_distribution<float> normal;
  for (Host<T>* x : {&q, &k, &v, &dout}) {
    for (T& element : x->data) narrow(element, normal(random));
  }
  std::vector<float> lse(B * H * L), dlse(B * H * L);
  for (float& x : dlse) x = normal(random);

  attention_set_chip(c.resident ? 1 : 1000, 232448);
  const Tensor forward[] = {q.tensor(), k.tensor(), v.tensor(), out.tensor()};
  const Tensor backward[] = {dout.tensor(), q.tensor(),  k.tensor(),  v.tensor(),
                             out.tensor(),  dq.tensor(), dk.tensor(), dv.tensor()};
  const int type = static_cast<int>(dtype);
  if (attention_run_forward(type, &c.shape, &c.options, forward, lse.data()) != 0 ||
      attention_run_backward(type, &c.shape, &c.options, backward, lse.data(), dlse.data()) != 0) {
    std::printf("a launch failed\n");
    ++failures;
    return;
  }

  // The same in float64 loops, in the order (b, h, t, d)
  std::vector<double> true_out, true_lse, true_dq, true_dk(B * H_kv * S * D), true_dv = true_dk;
  std::vector<double> got_out, got_dq, got_dk, got_dv;
  const double grow = c.options.dropout ? 1 / (1 - c.options.dropout_p) : 1;
  for (int64_t bh = 0; bh < B * H; ++bh) {
    const int64_t b = bh / H, h = bh % H, h_kv = h / (H / H_kv), kv = (b * H_kv + h_kv) * S;
    for (int64_t i = 0; i < L; ++i) {
      const int64_t end = S - L + i + 1;
      const int64_t first = c.options.window > 0 ? std::max<int64_t>(0, end - c.options.window) : 0;
      std::vector<double> s(end), p(end), dp(end), row_out(D), row_dq(D);
      double top = -INFINITY, sum = 0, delta = 0;
      for (int64_t j = first; j < end; ++j) {
        for (int64_t d = 0; d < D; ++d) {
          s[j] += c.options.scale * widened(q.at(b, h, i, d)) * widened(k.at(b, h_kv, j, d));
        }
        top = std::max(top, s[j]);
      }
      for (int64_t j = first; j < end; ++j) sum += std::exp(s[j] - top);
      true_lse.push_back(top + std::log(sum));
      for (int64_t j = first; j < end; ++j) {
        p[j] = std::exp(s[j] - top) / sum;
        const double factor = !c.options.dropout || keep(c.options, bh, S - L + i, j) ? grow : 0;
        for (int64_t d = 0; d < D; ++d) {
          row_out[d] += p[j] * factor * widened(v.at(b, h_kv, j, d));
          true_dv[(kv + j) * D + d] += p[j] * factor * widened(dout.at(b, h, i, d));
          dp[j] += factor * widened(dout.at(b, h, i, d)) * widened(v.at(b, h_kv, j, d));
        }
        delta += p[j] * dp[j];
      }
      for (int64_t j = first; j < end; ++j) {
        const double ds = c.options.scale * p[j] * (dp[j] - delta + dlse[bh * L + i]);
        for (int64_t d = 0; d < D; ++d) {
          row_dq[d] += ds * widened(k.at(b, h_kv, j, d));
          true_dk[(kv + j) * D + d] += ds * widened(q.at(b, h, i, d));
        }
      }
      for (int64_t d = 0; d < D; ++d) {
        true_out.push_back(row_out[d]);
        true_dq.push_back(row_dq[d]);
        got_out.push_back(widened(out.at(b, h, i, d)));
        got_dq.push_back(widened(dq.at(b, h, i, d)));
      }
    }
  }
  for (int64_t i = 0; i < B * H_kv * S * D; ++i) {
    const int64_t b = i / (H_kv * S * D), h = i / (S * D) % H_kv, t = i / D % S, d = i % D;
    got_dk.push_back(widened(dk.at(b, h, t, d)));
    got_dv.push_back(widened(dv.at(b, h, t, d)));
  }
  const double tolerance = dtype == DType::kFloat32 ? 3e-6 : dtype == DType::kFloat16 ? 3e-3 : 2e-2;
  compare("O", c, tolerance, got_out, true_out);
  compare("lse", c, 3e-6, {lse.begin(), lse.end()}, true_lse);
  compare("dQ", c, tolerance, got_dq, true_dq);
  compare("dK", c, tolerance, got_dk, true_dk);
  compare("dV", c, tolerance, got_dv, true_dv);
}

constexpr AttentionOptions kDropped{.scale = 0.3, .window = 0, .dropout = true, .dropout_p = 0.3,
                                    .seed = 0x299F31D0A4093822};
constexpr AttentionOptions kWindowed{.scale = -0.3, .window = 21};

// What races depend on: several tiles, so that buffers are used again; several rounds of strips; several heads.
const std::vector<Case> kCases = {
    {{1, 1, 1, 100, 135, 16}, {.scale = 0.3}, 0, true},
    {{1, 2, 1, 70, 140, 16}, kDropped, 0, false},
    {{1, 1, 1, 130, 200, 32}, {.scale = 0.3}, 0, true},
    {{1, 1, 1, 130, 200, 32}, {.scale = 0.3}, 0, false},
    {{2, 2, 1, 70, 70, 64}, kDropped, 0, true},
    {{1, 2, 1, 33, 140, 64}, kWindowed, 0, false},
    {{1, 2, 2, 65, 65, 31}, kDropped, 1, true},
    {{1, 2, 2, 66, 66, 31}, kWindowed, 3, false},
    {{1, 1, 1, 40, 70, 80}, {.scale = 0.1}, 0, false},
    {{1, 1, 1, 40, 70, 128}, {.scale = 0.1}, 5, false},
    {{1, 1, 1, 35, 35, 200}, {.scale = 0.1}, 0, false},
    {{1, 3, 3, 1, 1, 1}, {.scale = 0.3}, 0, true},
    {{1, 2, 1, 0, 3, 4}, {.scale = 0.3}, 0, true},
    {{0, 2, 2, 3, 3, 4}, {.scale = 0.3}, 0, true},
};

}  // namespace

int main() {
  for (const Case& c : kCases) {
    check<__nv_bfloat16>(c, DType::kBFloat16);
    check<float>(c, DType::kFloat32);
    check<__half>(c, DType::kFloat16);
  }
  std::printf("attention: %d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
