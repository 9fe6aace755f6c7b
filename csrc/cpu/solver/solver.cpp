// Instruction set dispatch of the solver, and the choice of a group's maximum.
#include "solver.h"

#include <algorithm>
#include <cmath>

#include "half.h"
#include "isa.h"
#include "solver_driver.h"

namespace dbrxq {
namespace solver {

const Kernels& kernels() {
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::avx512: return avx512_kernels();
    case Isa::avx2: return avx2_kernels();
#endif
    default: return scalar_kernels();
  }
}

void nominal_factors(int bits, float* factors) {
  // Few levels clip much: a 2-bit grid is best when its ends lie well inside of the extremes.
  static const double lowest[9] = {0, 0, 0.20, 0.25, 0.30, 0.40, 0.50, 0.65, 0.75};
  const double highest = 1.10;
  for (int i = 0; i < kNominals; ++i)
    factors[i] = static_cast<float>(lowest[bits] * std::pow(highest / lowest[bits], i / (kNominals - 1.0)));
}

float round_half(float x) { return half_to_float(float_to_half(x)); }

void load_weights(Tiles<float>& weights, const float* column_weights, int64_t n) {
  for (int64_t t = 0; t < tile_count(n); ++t) {
    if (column_weights)
      load_tile(weights[t], column_weights, 1, n, t);
    else
      for (int64_t i = 0; i < kTile; ++i) weights[t][i] = t * kTile + i < n ? 1.0f : 0.0f;
  }
}

// Where multipliers would be small subnormals, a few percent more or less change nothing, and the multiples of the
// smallest half are tried instead.
Maxima::Maxima(float largest) {
  for (int i = 0; i < kMaxima; ++i) {
    const float wanted = largest < 0x1p-12f
                             ? static_cast<float>(i + 1) * 0x1p-16f
                             : std::min(largest * static_cast<float>(0.70 + 0.45 * i / (kMaxima - 1)), kHalfMax);
    stored[i] = round_half(wanted);
    multiplier[i] = round_half(stored[i] * (1.0f / 256.0f));
  }
}

Maximum Maxima::best(const double* sums, int64_t tiles) const {
  int best = 0;
  double least = 0.0;
  for (int m = 0; m < kMaxima; ++m) {
    double sum = 0.0;
    for (int64_t t = 0; t < tiles; ++t) sum += sums[t * kMaxima + m];
    if (m == 0 || sum < least) {
      best = m;
      least = sum;
    }
  }
  return {stored[best], multiplier[best]};
}

}  // namespace solver
}  // namespace dbrxq
