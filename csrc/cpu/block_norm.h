// The addition to the residual stream, its dropout and the norm, for one instruction set; included by block_kernel.h.
//
//   forward   s = x + dropout(y) is written while s and s^2 are added up. LayerNorm sweeps once more for the squares of
//             what differs from the mean. The last sweep scales; a row is in L1 from the second on (4 KiB at C = 1024 in
//             float32).
//   backward  with g = dn weight and c = s - mean: the first sweep adds up g and c g, and the gradients of weight and
//             bias; the second writes dx = dsum + r (g - mean(g)) - c r^3 mean(c g), without mean(g) for RMSNorm.
// Dropout's random bits are made anew in the backward, from a row's and a channel's number: nothing is stored.

namespace chargpt::cpu::CHARGPT_ISA {
namespace {

// What dropout makes of the channels of one run: 0 or 1 / (1 - p) for each.
template <class Real>
struct Factors {
  Real values[kRun * kLanes<Real>];
};

template <class Real>
void draw_factors(const Dropout& dropout, int64_t row, int64_t first, int64_t count, Factors<Real>& factors) {
  constexpr int kCounters = 8 * kLanes<uint64_t>;
  uint32_t halves[kRun * kLanes<Real> + kCounters];
  random_halves(dropout.seed, static_cast<uint32_t>(row >> 32), static_cast<uint32_t>(row),
                static_cast<uint32_t>(first), static_cast<int>(count), halves);
  const auto threshold = static_cast<uint32_t>(dropout.p * kDropoutUnit);
  const Real kept = static_cast<Real>(1 / (1 - dropout.p));
  for (int64_t i = 0; i < count; ++i) factors.values[i] = halves[i] < threshold ? Real{0} : kept;
}

template <class V>
CHARGPT_INLINE V dropped(V v, V factor) {
  return factor == 0 ? V{} : v * factor;
}

template <class X>
struct Sums {
  Vec<Wide<X>> values{}, squares{};
};

template <class X, class Y>
CHARGPT_INLINE void add_step(const X* x, const Y* y, const Wide<X>* factors, X* sum, Sums<X>& sums, int n) {
  Vec<Wide<X>> s = read(y, n);
  if (factors != nullptr) s = dropped(s, read(factors, n));
  if (x != nullptr) s = read(x, n) + s;
  s = rounded<X>(s);
  write(sum, s, n);
  sums.values += s;
  sums.squares += s * s;
}

template <class X>
CHARGPT_INLINE void sums_step(const X* x, Sums<X>& sums, int n) {
  const Vec<Wide<X>> s = read(x, n);
  sums.values += s;
  sums.squares += s * s;
}

template <class X>
CHARGPT_INLINE void centred_square_step(const X* x, Wide<X> mean, Vec<Wide<X>>& squares, int n) {
  Vec<Wide<X>> c = read(x, n) - mean;
  if (n < kLanes<Wide<X>>) c = iota<Wide<X>>() < n ? c : Vec<Wide<X>>{};
  squares += c * c;
}

template <class X, class N>
CHARGPT_INLINE void scale_step(const X* s, const Wide<X>* weight, const Wide<X>* bias, N* normed, Wide<X> mean,
                               Wide<X> r, int n) {
  Vec<Wide<X>> v = (read(s, n) - mean) * r;
  if (weight != nullptr) v = v * read(weight, n);
  if (bias != nullptr) v = v + read(bias, n);
  write(normed, v, n);
}

template <class X>
Wide<X> centred_squares(const X* s, int64_t C, Wide<X> mean) {
  using Real = Wide<X>;
  constexpr int kL = kLanes<Real>;
  Vec<Real> total{};
  for (int64_t run = 0; run < C; run += kRun * kL) {
    Vec<Real> squares{};
    CHARGPT_SWEEP(kL, run, std::min(run + kRun * kL, C), centred_square_step(s + i, mean, squares, n))
    total += squares;
  }
  return sum_of<Real>(total);
}

template <class X, class Y, class N>
void add_norm_rows(const AddNorm& call, int64_t begin, int64_t end) {
  using Real = Wide<X>;
  constexpr int kL = kLanes<Real>;
  const int64_t C = call.C;
  const Real *weight = static_cast<const Real*>(call.weight), *bias = static_cast<const Real*>(call.bias);
  Factors<Real> factors;
  for (int64_t row = begin; row < end; ++row) {
    const X* x = call.x.data == nullptr ? nullptr : row_of<const X>(call.x, row);
    const Y* y = call.y.data == nullptr ? nullptr : row_of<const Y>(call.y, row);
    X* sum = static_cast<X*>(call.sum) + row * C;
    Sums<X> total;
    for (int64_t run = 0; run < C; run += kRun * kL) {
      const int64_t stop = std::min(run + kRun * kL, C);
      Sums<X> sums;
      if (y == nullptr) {
        CHARGPT_SWEEP(kL, run, stop, sums_step(x + i, sums, n))
      } else if (!call.dropout.on) {
        CHARGPT_SWEEP(kL, run, stop, add_step<X>(x + i, y + i, nullptr, sum + i, sums, n))
      } else {
        draw_factors(call.dropout, row, run, stop - run, factors);
        const Real* f = factors.values - run;
        if (x != nullptr) {
          CHARGPT_SWEEP(kL, run, stop, add_step(x + i, y + i, f + i, sum + i, sums, n))
        } else {
          CHARGPT_SWEEP(kL, run, stop, (add_step<X>(nullptr, y + i, f + i, sum + i, sums, n)))
        }
      }
      total.values += sums.values;
      total.squares += sums.squares;
    }
    if (call.norm == Norm::kNone) continue;
    const X* s = y == nullptr ? x : sum;
    const bool centre = call.norm == Norm::kLayer;
    const Real mean = centre ? sum_of<Real>(total.values) / static_cast<Real>(C) : 0;
    const Real squares = centre ? centred_squares(s, C, mean) : sum_of<Real>(total.squares);
    const Real r = reciprocal_root_mean(squares, C, centre ? kLayerEps : kRmsEps);
    static_cast<Real*>(call.mean)[row] = mean;
    static_cast<Real*>(call.rstd)[row] = r;
    N* normed = static_cast<N*>(call.normed) + row * C;
    if (weight == nullptr) {
      CHARGPT_SWEEP(kL, 0, C, (scale_step<X>(s + i, nullptr, nullptr, normed + i, mean, r, n)))
    } else if (bias == nullptr) {
      CHARGPT_SWEEP(kL, 0, C, (scale_step<X>(s + i, weight + i, nullptr, normed + i, mean, r, n)))
    } else {
      CHARGPT_SWEEP(kL, 0, C, scale_step(s + i, weight + i, bias + i, normed + i, mean, r, n))
    }
  }
}

template <class X>
struct Dots {
  Vec<Wide<X>> gradients{}, dots{};
};

template <class X, class N>
CHARGPT_INLINE void dots_step(const X* s, const N* dnormed, const Wide<X>* weight, Wide<X>* dweight, Wide<X>* dbias,
                              Wide<X> mean, Wide<X> r, Dots<X>& dots, int n) {
  const Vec<Wide<X>> given = read(dnormed, n), c = read(s, n) - mean;
  Vec<Wide<X>> g = given;
  if (weight != nullptr) {
    g = g * read(weight, n);
    write(dweight, read(dweight, n) + given * (c * r), n);
  }
  if (dbias != nullptr) write(dbias, read(dbias, n) + given, n);
  dots.gradients += g;
  dots.dots += c * g;  // beyond n g is 0
}

template <class X, class Y, class N>
struct Gradients {
  const X* s;
  const N* dnormed;  // nullptr: zero
  const X* dsum;     // nullptr: zero
  const Wide<X>* weight;
  X* dx;  // nullptr: not wanted
  Y* dy;  // nullptr: not wanted
  Wide<X> mean, r, shrink, centre;
};

template <class X, class Y, class N>
CHARGPT_INLINE void dx_step(const Gradients<X, Y, N>& g, const Wide<X>* factors, int64_t i, int n) {
  Vec<Wide<X>> d{};
  if (g.dnormed != nullptr) {
    Vec<Wide<X>> dn = read(g.dnormed + i, n);
    if (g.weight != nullptr) dn = dn * read(g.weight + i, n);
    d = dn * g.r - (read(g.s + i, n) - g.mean) * g.shrink - g.centre;
  }
  if (g.dsum != nullptr) d += read(g.dsum + i, n);
  if (g.dx != nullptr) write(g.dx + i, d, n);
  if (g.dy == nullptr) return;
  write(g.dy + i, factors == nullptr ? d : dropped(d, read(factors, n)), n);
}

// One block of rows, whose gradients of weight and bias become one row of the call's.
template <class X, class Y, class N>
void add_norm_backward_block(const AddNormBackward& call, int64_t block) {
  using Real = Wide<X>;
  constexpr int kL = kLanes<Real>;
  const int64_t C = call.C;
  const Real* weight = static_cast<const Real*>(call.weight);
  Real* dweight = call.dweight == nullptr ? nullptr : static_cast<Real*>(call.dweight) + block * C;
  Real* dbias = call.dbias == nullptr ? nullptr : static_cast<Real*>(call.dbias) + block * C;
  if (dweight != nullptr) std::fill_n(dweight, C, Real{0});
  if (dbias != nullptr) std::fill_n(dbias, C, Real{0});
  Factors<Real> factors;
  const int64_t stop = std::min((block + 1) * call.block, call.rows);
  for (int64_t row = block * call.block; row < stop; ++row) {
    Gradients<X, Y, N> g{.s = row_of<const X>(call.sum, row),
                         .dnormed = call.dnormed.data == nullptr ? nullptr : row_of<const N>(call.dnormed, row),
                         .dsum = call.dsum.data == nullptr ? nullptr : row_of<const X>(call.dsum, row),
                         .weight = weight,
                         .dx = call.dx == nullptr ? nullptr : static_cast<X*>(call.dx) + row * C,
                         .dy = call.dy == nullptr ? nullptr : static_cast<Y*>(call.dy) + row * C,
                         .mean = 0,
                         .r = 0,
                         .shrink = 0,
                         .centre = 0};
    if (g.dnormed != nullptr) {
      g.mean = static_cast<const Real*>(call.mean)[row];
      g.r = static_cast<const Real*>(call.rstd)[row];
      Dots<X> total;
      for (int64_t run = 0; run < C; run += kRun * kL) {
        const int64_t last_of_run = std::min(run + kRun * kL, C);
        Dots<X> dots;
        if (weight == nullptr) {
          CHARGPT_SWEEP(kL, run, last_of_run,
                        dots_step<X>(g.s + i, g.dnormed + i, nullptr, nullptr, nullptr, g.mean, g.r, dots, n))
        } else if (dbias == nullptr) {
          CHARGPT_SWEEP(kL, run, last_of_run,
                        dots_step<X>(g.s + i, g.dnormed + i, weight + i, dweight + i, nullptr, g.mean, g.r, dots, n))
        } else {
          CHARGPT_SWEEP(kL, run, last_of_run,
                        dots_step(g.s + i, g.dnormed + i, weight + i, dweight + i, dbias + i, g.mean, g.r, dots, n))
        }
        total.gradients += dots.gradients;
        total.dots += dots.dots;
      }
      g.shrink = sum_of<Real>(total.dots) / static_cast<Real>(C) * g.r * g.r * g.r;
      if (call.norm == Norm::kLayer) g.centre = sum_of<Real>(total.gradients) / static_cast<Real>(C) * g.r;
    }
    if (!call.dropout.on) {
      CHARGPT_SWEEP(kL, 0, C, dx_step(g, nullptr, i, n))
      continue;
    }
    for (int64_t run = 0; run < C; run += kRun * kL) {
      const int64_t last_of_run = std::min(run + kRun * kL, C);
      draw_factors(call.dropout, row, run, last_of_run - run, factors);
      const Real* f = factors.values - run;
      CHARGPT_SWEEP(kL, run, last_of_run, dx_step(g, f + i, i, n))
    }
  }
}

template <class X, class Y, class N>
void add_norm_backward_blocks(const AddNormBackward& call, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) add_norm_backward_block<X, Y, N>(call, block);
}

// Calls rows<X, Y, N> for the dtypes of a call.
#define CHARGPT_FOR_TYPES(rows, call, begin, end)                                                          \
  if (call.x_type == DType::kFloat64) return rows<double, double, double>(call, begin, end);               \
  if (call.x_type == DType::kBFloat16) return rows<uint16_t, uint16_t, uint16_t>(call, begin, end);        \
  const bool half_y = call.y_type == DType::kBFloat16, half_n = call.normed_type == DType::kBFloat16;      \
  if (half_y && half_n) return rows<float, uint16_t, uint16_t>(call, begin, end);                          \
  if (half_y) return rows<float, uint16_t, float>(call, begin, end);                                       \
  if (half_n) return rows<float, float, uint16_t>(call, begin, end);                                       \
  return rows<float, float, float>(call, begin, end)

void add_norm(const AddNorm& call, int64_t begin, int64_t end) {
  CHARGPT_FOR_TYPES(add_norm_rows, call, begin, end);
}

void add_norm_backward(const AddNormBackward& call, int64_t begin, int64_t end) {
  CHARGPT_FOR_TYPES(add_norm_backward_blocks, call, begin, end);
}

#undef CHARGPT_FOR_TYPES

}  // namespace
}  // namespace chargpt::cpu::CHARGPT_ISA
