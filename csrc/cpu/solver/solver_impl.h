// Kernels of the solver for one instruction set; included by solver_{scalar,avx2,avx512}.cpp only, each of which
// names its namespace in DBRXQ_SOLVER_VARIANT.
//
// Quantizing row c of a linear W [K, N] against H = U diag(pivots) U^T (U unit upper triangular):
//
//     target_c = W_c + sum over j < c of U[j, c] * E_j,   E = W - Q,   loss = sum of pivot_c * |target_c - Q_c|^2
//
// A column is independent of the others, so one vector lane is one column and lanes never mix. No fused
// multiply-add (-ffp-contract=off) and no lane-count-dependent sums: every instruction set gives the same bits, and
// so does the plain torch in quantize/solve/grid.py and quantize/solve/ldlq.py, which spells out the same operations in the same
// order. Tested by tests/quantize/solve/test_grid.py and tests/quantize/solve/test_ldlq.py.
#pragma once
#include "solver_paths.h"
#include "solver_simd.h"

namespace dbrxq {
namespace solver {
namespace DBRXQ_SOLVER_VARIANT {

// Weighted squared error of one vector of columns on C grids at once, rows in order.
template <int C>
static inline void grid_errors(const Tile& tile, int64_t column, const Floats* scale, Floats* error) {
  const float half_range = static_cast<float>(1 << (tile.bits - 1));
  const Floats low = splat(-half_range), high = splat(half_range - 1.0f);
  Floats inverse[C], sum[C];
  for (int c = 0; c < C; ++c) {
    inverse[c] = inverse_scale(scale[c]);
    sum[c] = Floats{};
  }
  const float* x = tile.x + column;
  for (int64_t r = 0; r < tile.rows; ++r, x += kTile) {
    const Floats value = load(x);
    const Floats weight = splat(tile.row_weights[r]);
    for (int c = 0; c < C; ++c) {
      const Floats code = round_integer(min(max(value * inverse[c], low), high));
      const Floats miss = value - code * scale[c];
      sum[c] += (miss * miss) * weight;
    }
  }
  for (int c = 0; c < C; ++c) error[c] = sum[c];
}

static void feedback(float* target, int64_t rows, const float* errors, int64_t from, const float* coefficients,
                     int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, target += kTile, coefficients += stride) {
    Floats sum[kVectors];
    for (int v = 0; v < kVectors; ++v) sum[v] = load(target + v * kLanes);
    for (int64_t j = 0; j < from; ++j) {
      const Floats coefficient = splat(coefficients[j]);
      for (int v = 0; v < kVectors; ++v) sum[v] += load(errors + j * kTile + v * kLanes) * coefficient;
    }
    for (int v = 0; v < kVectors; ++v) store(target + v * kLanes, sum[v]);
  }
}

static void nominal_scales(const Tile& tile, float* nominal) {
  constexpr int kAtOnce = 4;
  static_assert(kNominals % kAtOnce == 0, "clip factors are tried four at a time");
  float factors[kNominals];
  nominal_factors(tile.bits, factors);
  const float half_range = static_cast<float>(1 << (tile.bits - 1));
  for (int64_t column = 0; column < kTile; column += kLanes) {
    Floats low = Floats{}, high = Floats{};
    for (int64_t r = 0; r < tile.rows; ++r) {
      const Floats value = load(tile.x + r * kTile + column);
      low = min(low, value);
      high = max(high, value);
    }
    // The scale at which the extremes are half a step outside of the outermost codes.
    const Floats base = max(high / (half_range - 0.5f), -low / (half_range + 0.5f));
    Floats best = Floats{}, best_error = Floats{};
    for (int i = 0; i < kNominals; i += kAtOnce) {
      Floats scale[kAtOnce], error[kAtOnce];
      for (int c = 0; c < kAtOnce; ++c) scale[c] = min(base * factors[i + c], splat(kHalfMax));
      grid_errors<kAtOnce>(tile, column, scale, error);
      for (int c = 0; c < kAtOnce; ++c) {
        const Ints better = i + c == 0 ? Ints{} - 1 : error[c] < best_error;
        best = select(better, scale[c], best);
        best_error = select(better, error[c], best_error);
      }
    }
    store(nominal + column, best);
  }
}

// The largest s in 1..16 whose stored scale s^2 * multiplier does not exceed the nominal scale (1 if none).
static inline Floats code_below(Floats nominal, float multiplier) {
  if (multiplier == 0.0f) return splat(1.0f);
  const Floats root = square_root(nominal / multiplier);
  return floor_integer(min(max(root, splat(1.0f)), splat(16.0f)));
}

static inline Floats stored_scale(Floats s, float multiplier) { return round_to_half((s * s) * multiplier); }

static void maximum_errors(const Tile& tile, const float* nominal, const float* column_weights,
                           const float* multipliers, double* sums) {
  constexpr int kAtOnce = 2;
  static_assert(kMaxima % kAtOnce == 0, "maxima are tried two at a time");
  float least[kMaxima][kTile];
  for (int64_t column = 0; column < kTile; column += kLanes) {
    const Floats wanted = load(nominal + column);
    for (int m = 0; m < kMaxima; m += kAtOnce) {
      Floats scale[2 * kAtOnce], error[2 * kAtOnce];
      for (int c = 0; c < kAtOnce; ++c) {
        const Floats s = code_below(wanted, multipliers[m + c]);
        scale[2 * c] = stored_scale(s, multipliers[m + c]);
        scale[2 * c + 1] = stored_scale(min(s + 1.0f, splat(16.0f)), multipliers[m + c]);
      }
      grid_errors<2 * kAtOnce>(tile, column, scale, error);
      for (int c = 0; c < kAtOnce; ++c) store(&least[m + c][column], min(error[2 * c], error[2 * c + 1]));
    }
  }
  for (int m = 0; m < kMaxima; ++m) sums[m] = 0.0;
  for (int64_t column = 0; column < kTile; ++column)
    for (int m = 0; m < kMaxima; ++m)
      sums[m] += static_cast<double>(least[m][column]) * static_cast<double>(column_weights[column]);
}

static void choose_codes(const Tile& tile, const float* nominal, float multiplier, uint8_t* scale_codes, float* scales,
                         float* errors) {
  constexpr int kNear = 4;
  for (int64_t column = 0; column < kTile; column += kLanes) {
    const Floats wanted = load(nominal + column);
    const Floats below = code_below(wanted, multiplier);
    Floats s[kNear], scale[kNear], error[kNear];
    for (int c = 0; c < kNear; ++c) {
      s[c] = min(max(below + static_cast<float>(c - 1), splat(1.0f)), splat(16.0f));
      scale[c] = stored_scale(s[c], multiplier);
    }
    grid_errors<kNear>(tile, column, scale, error);
    Floats best = s[0], best_scale = scale[0], best_error = error[0];
    for (int c = 1; c < kNear; ++c) {
      const Ints better = error[c] < best_error;
      best = select(better, s[c], best);
      best_scale = select(better, scale[c], best_scale);
      best_error = select(better, error[c], best_error);
    }
    const Ints empty = wanted == 0.0f;  // an all-zero column: any scale will do, and it gets code 0
    best = select(empty, splat(1.0f), best);
    best_scale = select(empty, stored_scale(splat(1.0f), multiplier), best_scale);
    store(scales + column, best_scale);
    store(errors + column, best_error);
    for (int i = 0; i < kLanes; ++i) scale_codes[column + i] = static_cast<uint8_t>(best[i] - 1.0f);
  }
}

// Rounds the group row by row, each target to its nearest grid value. Without kKeep only errors and loss come out.
template <bool kKeep>
static void sweep(const Tile& targets, const Feedback& within, const float* scales, float* errors, uint8_t* codes,
                  float* values, float* loss) {
  const float half_range = static_cast<float>(1 << (targets.bits - 1));
  Floats scale[kVectors], inverse[kVectors], low[kVectors], high[kVectors], total[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    scale[v] = load(scales + v * kLanes);
    inverse[v] = inverse_scale(scale[v]);
    const Floats reach = greatest_code(scale[v]);
    low[v] = max(splat(-half_range), -reach);
    high[v] = min(splat(half_range - 1.0f), reach);
    total[v] = Floats{};
  }
  for (int64_t r = 0; r < targets.rows; ++r) {
    const float* incoming = within.incoming + r * within.stride;
    Floats target[kVectors];
    for (int v = 0; v < kVectors; ++v) target[v] = load(targets.x + r * kTile + v * kLanes);
    for (int64_t j = 0; j < r; ++j) {
      const Floats coefficient = splat(incoming[j]);
      for (int v = 0; v < kVectors; ++v) target[v] += load(errors + j * kTile + v * kLanes) * coefficient;
    }
    const Floats pivot = splat(targets.row_weights[r]);
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = r * kTile + v * kLanes;
      const Floats code = round_integer(min(max(target[v] * inverse[v], low[v]), high[v]));
      const Floats value = round_to_half(code * scale[v]);
      const Floats miss = target[v] - value;
      total[v] += (miss * miss) * pivot;
      store(errors + at, load(within.weight + at) - value);
      if (kKeep) {
        const Floats stored = code + half_range;
        for (int i = 0; i < kLanes; ++i) codes[at + i] = static_cast<uint8_t>(stored[i]);
        store(values + at, value);
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) store(loss + v * kLanes, total[v]);
}

static void refine_codes(const Tile& targets, const Feedback& within, float multiplier, float* scratch,
                         uint8_t* scale_codes, float* scales) {
  static const float kSteps[] = {0.0f, -1.0f, 1.0f, -2.0f, 2.0f};
  float start[kTile], least[kTile], trial[kTile], loss[kTile];
  for (int64_t i = 0; i < kTile; ++i) start[i] = static_cast<float>(scale_codes[i]) + 1.0f;
  for (const float step : kSteps) {
    for (int64_t column = 0; column < kTile; column += kLanes) {
      const Floats s = min(max(load(start + column) + step, splat(1.0f)), splat(16.0f));
      store(trial + column, stored_scale(s, multiplier));
    }
    sweep<false>(targets, within, trial, scratch, nullptr, nullptr, loss);
    for (int64_t i = 0; i < kTile; ++i) {
      if (step != 0.0f && !(loss[i] < least[i])) continue;
      least[i] = loss[i];
      scales[i] = trial[i];
      const float s = start[i] + step;
      scale_codes[i] = static_cast<uint8_t>((s < 1.0f ? 1.0f : s > 16.0f ? 16.0f : s) - 1.0f);
    }
  }
}

static const Kernels kKernels = {feedback,     nominal_scales, maximum_errors, choose_codes,
                                 refine_codes, sweep<true>,    search_paths};

}  // namespace DBRXQ_SOLVER_VARIANT
}  // namespace solver
}  // namespace dbrxq
