// Runs attention.cpp without torch, for the sanitizers: every buffer ends where its tensor ends, results are compared
// with float64 loops, and all ways to divide the work must give the same bits. `make sanitize` runs it on every code path.

#include "../cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

using namespace chargpt;
using namespace chargpt::cpu;

namespace {

int failures = 0;

struct Case {
  AttentionShape shape;
  bool packed = false;  // q, k and v, and their gradients, are views of one (B, T, 3, H, D) buffer
  AttentionOptions options = {};
};

// Elements of one dtype behind a common face.
struct Buffer {
  DType dtype;
  std::vector<char> bytes;

  Buffer(DType type, int64_t count) : dtype(type), bytes(count * size()) {}
  int64_t size() const { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }
  void* at(int64_t i) { return bytes.data() + i * size(); }

  double get(int64_t i) const {
    const char* p = bytes.data() + i * size();
    if (dtype == DType::kFloat64) {
      double x;
      std::memcpy(&x, p, sizeof x);
      return x;
    }
    uint32_t bits = 0;
    if (dtype == DType::kFloat32) {
      std::memcpy(&bits, p, 4);
    } else {
      uint16_t half;
      std::memcpy(&half, p, 2);
      bits = static_cast<uint32_t>(half) << 16;
    }
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
  void set(int64_t i, double value) {
    const float single = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &single, sizeof bits);
    const uint16_t half = static_cast<uint16_t>(bits >> 16);
    std::memcpy(at(i), dtype == DType::kFloat64 ? static_cast<const void*>(&value)
                       : dtype == DType::kFloat32 ? static_cast<const void*>(&single)
                                                  : static_cast<const void*>(&half), size());
  }
};

struct Strides {
  int64_t start, batch, head, time;
  int64_t index(int64_t b, int64_t h, int64_t t, int64_t d) const {
    return start + b * batch + h * head + t * time + d;
  }
};

View view(Buffer& x, const Strides& s) { return {x.at(s.start), s.batch, s.head, s.time}; }
MutableView writable(Buffer& x, const Strides& s) { return {x.at(s.start), s.batch, s.head, s.time}; }

// ---- float64 loops -------------------------------------------------------------------------------------------------

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

struct Truth {
  std::vector<double> out, lse, dq, dk, dv;  // (B, H, T, D), (B, H, T), and (B, H or H_kv, T or S, D), contiguous
};

Truth loops(const Case& c, const Buffer& q, const Strides& qs, const Buffer& k, const Strides& ks, const Buffer& v,
            const Strides& vs, const Buffer& dout, const std::vector<double>& dlse) {
  const auto [B, H, H_kv, T, S, D] = c.shape;
  Truth truth;
  truth.out.resize(B * H * T * D);
  truth.lse.resize(B * H * T);
  truth.dq.resize(B * H * T * D);
  truth.dk.resize(B * H_kv * S * D);
  truth.dv.resize(B * H_kv * S * D);
  const double grow = c.options.dropout ? 1 / (1 - c.options.dropout_p) : 1;
  for (int64_t bh = 0; bh < B * H; ++bh) {
    const int64_t b = bh / H, h = bh % H, h_kv = h / (H / H_kv), kv = (b * H_kv + h_kv) * S;
    for (int64_t i = 0; i < T; ++i) {
      const int64_t end = S - T + i + 1, first = c.options.window > 0 ? std::max<int64_t>(0, end - c.options.window) : 0;
      std::vector<double> s(end), p(end), dp(end);
      double top = -INFINITY, sum = 0, delta = 0;
      const int64_t row = (bh * T + i) * D;
      for (int64_t j = first; j < end; ++j) {
        for (int64_t d = 0; d < D; ++d) s[j] += q.get(qs.index(b, h, i, d)) * k.get(ks.index(b, h_kv, j, d));
        s[j] *= c.options.scale;
        top = std::max(top, s[j]);
      }
      for (int64_t j = first; j < end; ++j) sum += std::exp(s[j] - top);
      truth.lse[bh * T + i] = top + std::log(sum);
      for (int64_t j = first; j < end; ++j) {
        p[j] = std::exp(s[j] - top) / sum;
        const double factor = !c.options.dropout || keep(c.options, bh, S - T + i, j) ? grow : 0;
        for (int64_t d = 0; d < D; ++d) {
          truth.out[row + d] += p[j] * factor * v.get(vs.index(b, h_kv, j, d));
          truth.dv[(kv + j) * D + d] += p[j] * factor * dout.get(row + d);
          dp[j] += factor * dout.get(row + d) * v.get(vs.index(b, h_kv, j, d));
        }
        delta += p[j] * dp[j];
      }
      for (int64_t j = first; j < end; ++j) {
        const double ds = c.options.scale * p[j] * (dp[j] - delta + dlse[bh * T + i]);
        for (int64_t d = 0; d < D; ++d) {
          truth.dq[row + d] += ds * k.get(ks.index(b, h_kv, j, d));
          truth.dk[(kv + j) * D + d] += ds * q.get(qs.index(b, h, i, d));
        }
      }
    }
  }
  return truth;
}

// ---- Ways to divide the work ---------------------------------------------------------------------------------------

void one_by_one(int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
  for (int64_t i = count; i > 0; --i) body(context, i - 1, i);
}

void three_threads(int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < 3; ++i) {
    const int64_t begin = count * i / 3, end = count * (i + 1) / 3;
    if (begin < end) threads.emplace_back(body, context, begin, end);
  }
  for (std::thread& thread : threads) thread.join();
}

// ---- One case ------------------------------------------------------------------------------------------------------

void compare(const char* what, const Case& c, DType dtype, const std::vector<double>& got,
             const std::vector<double>& wanted) {
  const double tolerance = dtype == DType::kFloat64 ? 1e-12 : dtype == DType::kFloat32 ? 2e-6 : 2e-2;
  double largest = 1;
  for (double x : wanted) largest = std::max(largest, std::abs(x));
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::abs(got[i] - wanted[i]) <= tolerance * largest) continue;
    if (++failures <= 20) {
      std::printf("%s[%zu]: got %.9g, wanted %.9g (B %ld H %ld/%ld T %ld S %ld D %ld window %ld dropout %g dtype %d)\n",
                  what, i, got[i], wanted[i], static_cast<long>(c.shape.B), static_cast<long>(c.shape.H),
                  static_cast<long>(c.shape.H_kv), static_cast<long>(c.shape.T), static_cast<long>(c.shape.S),
                  static_cast<long>(c.shape.D), static_cast<long>(c.options.window), c.options.dropout_p,
                  static_cast<int>(dtype));
    }
    return;
  }
}

std::vector<double> gather(const Buffer& x, const Strides& s, int64_t B, int64_t H, int64_t T, int64_t D) {
  std::vector<double> values;
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t h = 0; h < H; ++h) {
      for (int64_t t = 0; t < T; ++t) {
        for (int64_t d = 0; d < D; ++d) values.push_back(x.get(s.index(b, h, t, d)));
      }
    }
  }
  return values;
}

void check(const Case& c, DType dtype) {
  const auto [B, H, H_kv, T, S, D] = c.shape;
  std::mt19937 random(static_cast<unsigned>(T * 1000 + D));
  std::normal_distribution<double> normal;
  Buffer q(dtype, c.packed ? B * T * 3 * H * D : B * H * T * D), k(dtype, c.packed ? 0 : B * H_kv * S * D),
      v(dtype, c.packed ? 0 : B * H_kv * S * D), dout(dtype, B * H * T * D);
  for (Buffer* x : {&q, &k, &v, &dout}) {
    for (size_t i = 0; i < x->bytes.size() / x->size(); ++i) x->set(i, normal(random));
  }
  std::vector<double> dlse(B * H * T);
  for (double& x : dlse) x = static_cast<float>(normal(random));
  const Strides whole_q{0, H * T * D, T * D, D}, whole_k{0, H_kv * S * D, S * D, D};
  const Strides qs = c.packed ? Strides{0, T * 3 * H * D, D, 3 * H * D} : whole_q;
  const Strides ks = c.packed ? Strides{H * D, T * 3 * H * D, D, 3 * H * D} : whole_k;
  const Strides vs = c.packed ? Strides{2 * H * D, T * 3 * H * D, D, 3 * H * D} : whole_k;
  const Strides os{0, T * H * D, D, H * D};  // (B, T, H, D)
  Buffer& k_data = c.packed ? q : k;
  Buffer& v_data = c.packed ? q : v;
  const Truth truth = loops(c, q, qs, k_data, ks, v_data, vs, dout, dlse);

  const DType lse_type = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  std::vector<std::vector<char>> first;
  for (ParallelFor parallel_for : {ParallelFor{nullptr}, ParallelFor{one_by_one}, ParallelFor{three_threads}}) {
    Buffer out(dtype, B * H * T * D), lse(lse_type, B * H * T), dlse_data(lse_type, B * H * T);
    Buffer dq(dtype, q.bytes.size() / q.size()), dk(dtype, k.bytes.size() / k.size()),
        dv(dtype, v.bytes.size() / v.size());
    for (size_t i = 0; i < dlse.size(); ++i) dlse_data.set(i, dlse[i]);
    Buffer& dk_data = c.packed ? dq : dk;
    Buffer& dv_data = c.packed ? dq : dv;
    if (!attention_forward(dtype, c.shape, c.options, view(q, qs), view(k_data, ks), view(v_data, vs),
                           writable(out, os), lse.at(0), parallel_for) ||
        !attention_backward(dtype, c.shape, c.options, view(dout, whole_q), view(q, qs), view(k_data, ks),
                            view(v_data, vs), view(out, os), lse.at(0), dlse_data.at(0), writable(dq, qs),
                            writable(dk_data, ks), writable(dv_data, vs), parallel_for)) {
      std::printf("no memory\n");
      ++failures;
      return;
    }
    const std::vector<std::vector<char>> all = {out.bytes, lse.bytes, dq.bytes, dk.bytes, dv.bytes};
    if (first.empty()) {
      first = all;
      compare("O", c, dtype, gather(out, os, B, H, T, D), truth.out);
      compare("lse", c, lse_type, gather(lse, {0, H * T, T, 1}, B, H, T, 1), truth.lse);
      compare("dQ", c, dtype, gather(dq, qs, B, H, T, D), truth.dq);
      compare("dK", c, dtype, gather(dk_data, ks, B, H_kv, S, D), truth.dk);
      compare("dV", c, dtype, gather(dv_data, vs, B, H_kv, S, D), truth.dv);
    } else if (all != first && ++failures <= 20) {
      std::printf("other bits when the work is divided otherwise (T %ld D %ld)\n", static_cast<long>(T),
                  static_cast<long>(D));
    }
  }
}

// How the registers of the matrix unit are cut, which belongs to whoever cut them last; zeros where there is none.
struct alignas(64) Tiles {
  unsigned char bytes[64] = {};
};
#if defined(__x86_64__)
#define CHARGPT_ON_TILES __attribute__((target("amx-tile")))
#else
#define CHARGPT_ON_TILES
#endif
bool have_tiles() { return std::strcmp(attention_isa(DType::kBFloat16), "amx") == 0; }
CHARGPT_ON_TILES void cut([[maybe_unused]] const Tiles& tiles) {
#if defined(__x86_64__)
  if (have_tiles()) asm volatile("ldtilecfg %0" : : "m"(tiles));
#endif
}
CHARGPT_ON_TILES Tiles cut_now() {
  Tiles tiles;
#if defined(__x86_64__)
  if (have_tiles()) asm volatile("sttilecfg %0" : "=m"(tiles));
#endif
  return tiles;
}

AttentionOptions options(int64_t window, double dropout_p, double scale = 0.3) {
  return {.scale = scale, .window = window, .dropout = dropout_p > 0, .dropout_p = dropout_p,
          .seed = 0x299F31D0A4093822};
}

}  // namespace

int main() {
  std::vector<Case> cases;
  // On both sides of the tile of 64, and of the chunk of 256 keys between rescalings.
  for (int64_t T : {1, 2, 7, 63, 64, 65, 130}) cases.push_back({{2, 2, 2, T, T, 32}, false, options(0, 0)});
  cases.push_back({{1, 1, 1, 258, 258, 16}, false, options(0, 0)});
  cases.push_back({{1, 1, 1, 5, 600, 8}, false, options(0, 0)});
  // Widths that do not fill vectors or pairs, and more than the four vectors of the micro-kernel.
  for (int64_t D : {1, 8, 16, 31, 33, 64, 80, 129, 256}) cases.push_back({{1, 2, 1, 9, 70, D}, false, options(0, 0, 0.1)});
  cases.push_back({{1, 6, 2, 66, 100, 24}, false, options(0, 0)});
  cases.push_back({{1, 4, 1, 66, 140, 24}, false, options(1, 0)});
  cases.push_back({{1, 2, 2, 70, 350, 8}, false, options(17, 0)});
  cases.push_back({{1, 2, 2, 300, 300, 8}, false, options(70, 0.2)});
  cases.push_back({{2, 3, 3, 65, 65, 31}, true, options(0, 0.5)});
  cases.push_back({{20, 1, 1, 3, 5, 7}, false, options(0, 0.9)});
  cases.push_back({{2, 2, 2, 64, 64, 32}, true, options(9, 0)});
  cases.push_back({{1, 2, 1, 0, 3, 4}, false, options(0, 0)});
  cases.push_back({{0, 2, 2, 3, 3, 4}, false, options(0, 0)});
  Tiles others;
  others.bytes[0] = have_tiles();                            // the palette
  others.bytes[16] = others.bytes[48] = have_tiles() ? 4 : 0;  // bytes of a row, and rows, of the first register
  cut(others);
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat64}) {
    for (const Case& c : cases) check(c, dtype);
  }
  if (const Tiles left = cut_now(); std::memcmp(&left, &others, sizeof left) != 0) {
    std::printf("the matrix unit's registers are cut otherwise than before\n");
    ++failures;
  }
  std::printf("attention, %s: %zu cases x 3 dtypes, %d failures\n", attention_isa(DType::kBFloat16), cases.size(),
              failures);
  return failures == 0 ? 0 : 1;
}
