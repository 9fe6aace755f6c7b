// Driver of the solver: instruction set dispatch, tiling, threads, and the choice of each group's maximum.
#include "solver.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#include "dbrxq.h"
#include "half.h"
#include "isa.h"
#include "parallel.h"

namespace dbrxq {
namespace solver {

void nominal_factors(int bits, float* factors) {
  // Few levels clip much: a 2-bit grid is best when its ends lie well inside of the extremes.
  static const double lowest[9] = {0, 0, 0.20, 0.25, 0.30, 0.40, 0.50, 0.65, 0.75};
  const double highest = 1.10;
  for (int i = 0; i < kNominals; ++i)
    factors[i] = static_cast<float>(lowest[bits] * std::pow(highest / lowest[bits], i / (kNominals - 1.0)));
}

namespace {

const Kernels& kernels() {
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::avx512: return avx512_kernels();
    case Isa::avx2: return avx2_kernels();
#endif
    default: return scalar_kernels();
  }
}

// Nearest half of a float, as a float.
float round_half(float x) { return half_to_float(float_to_half(x)); }

// Floats on a cache line boundary; not initialised.
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<float*>(::operator new(static_cast<size_t>(count) * 4 + 64, std::align_val_t{64}))) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
  float* operator+(int64_t offset) const { return data_ + offset; }

 private:
  float* data_;
};

// Rows of one tile out of a row-major matrix of `n` columns, zeros beyond them.
void load_tile(float* tile, const float* matrix, int64_t rows, int64_t n, int64_t column) {
  const int64_t width = std::min(kTile, n - column);
  for (int64_t r = 0; r < rows; ++r, tile += kTile) {
    std::memcpy(tile, matrix + r * n + column, static_cast<size_t>(width) * 4);
    if (width < kTile) std::memset(tile + width, 0, static_cast<size_t>(kTile - width) * 4);
  }
}

template <typename T>
void store_tile(T* matrix, const T* tile, int64_t rows, int64_t n, int64_t column) {
  const size_t width = static_cast<size_t>(std::min(kTile, n - column)) * sizeof(T);
  for (int64_t r = 0; r < rows; ++r, tile += kTile) std::memcpy(matrix + r * n + column, tile, width);
}

// Weights of the columns, one tile after another, zero beyond N; `column_weights` null means 1 everywhere.
std::vector<float> tiled_weights(const float* column_weights, int64_t n, int64_t tiles) {
  std::vector<float> weights(static_cast<size_t>(tiles * kTile), 0.0f);
  for (int64_t i = 0; i < n; ++i) weights[static_cast<size_t>(i)] = column_weights ? column_weights[i] : 1.0f;
  return weights;
}

// Candidates for a group's maximum, each as the half value multiplier = half(maximum / 256) that dequantization
// starts from, and the half value maximum that is stored.
struct Maxima {
  float maximum[kMaxima];
  float multiplier[kMaxima];
};

// `largest` is the largest nominal scale of the group. Where multipliers would be small subnormals, a few percent
// more or less change nothing, and the multiples of the smallest half are tried instead.
Maxima candidate_maxima(float largest) {
  Maxima maxima;
  for (int i = 0; i < kMaxima; ++i) {
    const float maximum = largest < 0x1p-12f
                              ? static_cast<float>(i + 1) * 0x1p-16f
                              : std::min(largest * static_cast<float>(0.70 + 0.45 * i / (kMaxima - 1)), kHalfMax);
    maxima.maximum[i] = round_half(maximum);
    maxima.multiplier[i] = round_half(maxima.maximum[i] * (1.0f / 256.0f));
  }
  return maxima;
}

// Which candidate has the least error; `sums` holds kMaxima sums for each tile, added in tile order.
int best_maximum(const std::vector<double>& sums, int64_t tiles) {
  int best = 0;
  double least = 0.0;
  for (int m = 0; m < kMaxima; ++m) {
    double sum = 0.0;
    for (int64_t t = 0; t < tiles; ++t) sum += sums[static_cast<size_t>(t * kMaxima + m)];
    if (m == 0 || sum < least) {
      best = m;
      least = sum;
    }
  }
  return best;
}

// A search over one group in one thread; the tiles of `x` lie one after another.
struct Search {
  explicit Search(int64_t tiles)
      : nominal(tiles * kTile),
        scales(tiles * kTile),
        errors(tiles * kTile),
        codes(static_cast<size_t>(tiles * kTile)),
        sums(static_cast<size_t>(tiles * kMaxima)) {}

  Buffer nominal, scales, errors;
  std::vector<uint8_t> codes;
  std::vector<double> sums;
  float maximum = 0.0f;
  double error = 0.0;

  void run(const float* x, int64_t rows, int64_t tiles, int bits, const float* row_weights,
           const std::vector<float>& column_weights) {
    const Kernels& k = kernels();
    float largest = 0.0f;
    for (int64_t t = 0; t < tiles; ++t) {
      k.nominal_scales({x + t * rows * kTile, rows, bits, row_weights}, nominal + t * kTile);
      for (int64_t i = 0; i < kTile; ++i) largest = std::max(largest, (nominal + t * kTile)[i]);
    }
    float multiplier = 0.0f;
    maximum = 0.0f;
    if (largest > 0.0f) {
      const Maxima maxima = candidate_maxima(largest);
      for (int64_t t = 0; t < tiles; ++t)
        k.maximum_errors({x + t * rows * kTile, rows, bits, row_weights}, nominal + t * kTile,
                         &column_weights[static_cast<size_t>(t * kTile)], maxima.multiplier,
                         &sums[static_cast<size_t>(t * kMaxima)]);
      const int best = best_maximum(sums, tiles);
      maximum = maxima.maximum[best];
      multiplier = maxima.multiplier[best];
    }
    error = 0.0;
    for (int64_t t = 0; t < tiles; ++t) {
      k.choose_codes({x + t * rows * kTile, rows, bits, row_weights}, nominal + t * kTile, multiplier,
                     &codes[static_cast<size_t>(t * kTile)], scales + t * kTile, errors + t * kTile);
      double sum = 0.0;
      for (int64_t i = 0; i < kTile; ++i)
        sum += static_cast<double>((errors + t * kTile)[i]) *
               static_cast<double>(column_weights[static_cast<size_t>(t * kTile + i)]);
      error += sum;
    }
  }
};

// Tries the stored scales one step from the ones chosen by searching paths with each. `scratch` holds four matrices of
// `matrix` floats.
void refine_with_paths(const Kernels& k, const Tile& targets, const Feedback& within, float multiplier, float* scratch,
                       int64_t matrix, uint8_t* codes, uint8_t* scale_codes, float* scales) {
  uint8_t start[kTile];
  alignas(64) float least[kTile], trial[kTile], loss[kTile];
  std::memcpy(start, scale_codes, sizeof start);
  for (const int step : {0, -1, 1}) {
    uint8_t tried[kTile];
    for (int64_t i = 0; i < kTile; ++i) {
      tried[i] = static_cast<uint8_t>(std::clamp(start[i] + step, 0, 15));
      const float s = static_cast<float>(tried[i]) + 1.0f;
      trial[i] = round_half((s * s) * multiplier);
    }
    k.search_paths(targets, within, trial, scratch, scratch + matrix, codes, scratch + 2 * matrix, loss);
    for (int64_t i = 0; i < kTile; ++i) {
      if (step != 0 && !(loss[i] < least[i])) continue;
      least[i] = loss[i];
      scales[i] = trial[i];
      scale_codes[i] = tried[i];
    }
  }
}

// Widths that a byte holds; which of them a file may have is the format's business.
bool legal_bits(int64_t bits) { return bits >= 2 && bits <= 8; }

}  // namespace
}  // namespace solver
}  // namespace dbrxq

using namespace dbrxq;
using namespace dbrxq::solver;

int dbrxq_search_group(const float* x, int64_t rows, int64_t n, int bits, const float* row_weights,
                       const float* column_weights, uint16_t* scale_max, uint8_t* scale_codes, double* error) {
  if (rows <= 0 || n <= 0) return DBRXQ_BAD_SHAPE;
  if (!legal_bits(bits)) return DBRXQ_BAD_GROUPS;
  if (!isa_usable()) return DBRXQ_BAD_ISA;
  try {
    const int64_t tiles = (n + kTile - 1) / kTile;
    const Buffer tiled(tiles * rows * kTile);
    for (int64_t t = 0; t < tiles; ++t) load_tile(tiled + t * rows * kTile, x, rows, n, t * kTile);
    Search search(tiles);
    search.run(tiled + 0, rows, tiles, bits, row_weights, tiled_weights(column_weights, n, tiles));
    *scale_max = float_to_half(search.maximum);
    std::copy_n(search.codes.begin(), n, scale_codes);
    *error = search.error;
  } catch (const std::bad_alloc&) {
    return DBRXQ_NO_MEMORY;
  }
  return DBRXQ_OK;
}

int dbrxq_error_table(const float* weight, int64_t k, int64_t n, const float* pivots, const float* column_weights,
                      const int64_t* widths, int64_t width_count, int64_t group_rows, double* errors) {
  if (k <= 0 || n <= 0 || group_rows <= 0) return DBRXQ_BAD_SHAPE;
  for (int64_t i = 0; i < width_count; ++i)
    if (!legal_bits(widths[i])) return DBRXQ_BAD_GROUPS;
  if (!isa_usable()) return DBRXQ_BAD_ISA;
  const int64_t groups = (k + group_rows - 1) / group_rows, tiles = (n + kTile - 1) / kTile;
  try {
    const std::vector<float> weights = tiled_weights(column_weights, n, tiles);
    std::vector<char> failed(static_cast<size_t>(groups), 0);
    parallel_for(groups, [&](int64_t g) {
      try {
        const int64_t start = g * group_rows, rows = std::min(group_rows, k - start);
        const Buffer tiled(tiles * rows * kTile);
        for (int64_t t = 0; t < tiles; ++t) load_tile(tiled + t * rows * kTile, weight + start * n, rows, n, t * kTile);
        Search search(tiles);
        for (int64_t i = 0; i < width_count; ++i) {
          search.run(tiled + 0, rows, tiles, static_cast<int>(widths[i]), pivots + start, weights);
          errors[i * groups + g] = search.error;
        }
      } catch (const std::bad_alloc&) {
        failed[static_cast<size_t>(g)] = 1;  // an exception must not leave a thread of the pool
      }
    });
    if (std::count(failed.begin(), failed.end(), 1)) return DBRXQ_NO_MEMORY;
  } catch (const std::bad_alloc&) {
    return DBRXQ_NO_MEMORY;
  }
  return DBRXQ_OK;
}

int dbrxq_solve_block(const float* weight, int64_t rows, int64_t n, const float* coefficients, const float* pivots,
                      const float* column_weights, const int64_t* group_bits, const int64_t* group_rows, int64_t groups,
                      int effort, float* errors, uint8_t* codes, uint8_t* scale_codes, uint16_t* scale_max,
                      uint16_t* dequantized, double* loss) {
  if (rows <= 0 || n <= 0 || groups <= 0 || effort < DBRXQ_FAST || effort > DBRXQ_BEST) return DBRXQ_BAD_SHAPE;
  int64_t covered = 0;
  for (int64_t g = 0; g < groups; ++g) {
    if (!legal_bits(group_bits[g]) || group_rows[g] <= 0) return DBRXQ_BAD_GROUPS;
    covered += group_rows[g];
  }
  if (covered != rows) return DBRXQ_BAD_GROUPS;
  if (!isa_usable()) return DBRXQ_BAD_ISA;
  const int64_t longest = *std::max_element(group_rows, group_rows + groups);
  const int64_t tiles = (n + kTile - 1) / kTile;
  const Kernels& k = kernels();
  try {
    // A tile keeps its rows for the whole call: targets first, errors once they are rounded.
    const Buffer tiled(tiles * rows * kTile), nominal(tiles * kTile);
    const int64_t matrices = effort == DBRXQ_BEST ? 6 : 3;  // [longest, kTile] of workspace for each tile
    const Buffer workspace(tiles * longest * kTile * matrices), outgoing(longest * longest);
    std::vector<uint8_t> tile_codes(static_cast<size_t>(2 * tiles * longest * kTile));
    std::vector<double> sums(static_cast<size_t>(tiles * kMaxima)), losses(static_cast<size_t>(tiles * kTile), 0.0);
    std::vector<float> largest(static_cast<size_t>(tiles));
    const std::vector<float> weights = tiled_weights(column_weights, n, tiles);

    const auto begin_group = [&](int64_t t, int64_t g, int64_t start) {
      float* tile = tiled + t * rows * kTile;
      float* group = tile + start * kTile;
      k.feedback(group, group_rows[g], tile, start, coefficients + start * rows, rows);
      float* wanted = nominal + t * kTile;
      k.nominal_scales({group, group_rows[g], static_cast<int>(group_bits[g]), pivots + start}, wanted);
      largest[static_cast<size_t>(t)] = *std::max_element(wanted, wanted + kTile);
    };

    parallel_for(tiles, [&](int64_t t) {
      load_tile(tiled + t * rows * kTile, errors, rows, n, t * kTile);
      begin_group(t, 0, 0);
    });
    for (int64_t g = 0, start = 0; g < groups; start += group_rows[g], ++g) {
      const int64_t count = group_rows[g];
      const int bits = static_cast<int>(group_bits[g]);
      const float top = *std::max_element(largest.begin(), largest.end());
      float maximum = 0.0f, multiplier = 0.0f;
      if (top > 0.0f) {
        const Maxima maxima = candidate_maxima(top);
        parallel_for(tiles, [&](int64_t t) {
          k.maximum_errors({tiled + (t * rows + start) * kTile, count, bits, pivots + start}, nominal + t * kTile,
                           &weights[static_cast<size_t>(t * kTile)], maxima.multiplier,
                           &sums[static_cast<size_t>(t * kMaxima)]);
        });
        const int best = best_maximum(sums, tiles);
        maximum = maxima.maximum[best];
        multiplier = maxima.multiplier[best];
      }
      scale_max[g] = float_to_half(maximum);
      for (int64_t j = 0; j < count; ++j)
        for (int64_t r = j + 1; r < count; ++r)
          (outgoing + j * count)[r] = coefficients[(start + r) * rows + start + j];
      parallel_for(tiles, [&](int64_t t) {
        float* group = tiled + (t * rows + start) * kTile;
        float* weight_tile = workspace + t * longest * kTile * matrices;
        float* values = weight_tile + longest * kTile;
        float* scratch = values + longest * kTile;
        uint8_t* rounded = &tile_codes[static_cast<size_t>(2 * t * longest * kTile)];
        uint8_t chosen[kTile];
        alignas(64) float scales[kTile], tile_loss[kTile];
        load_tile(weight_tile, weight + start * n, count, n, t * kTile);
        const Tile targets = {group, count, bits, pivots + start};
        const Feedback within = {weight_tile, coefficients + start * rows + start, rows, outgoing + 0};
        k.choose_codes(targets, nominal + t * kTile, multiplier, chosen, scales, tile_loss);
        if (effort == DBRXQ_FAST) {
          k.round_rows(targets, within, scales, group, rounded, values, tile_loss);
        } else {
          k.refine_codes(targets, within, multiplier, scratch, chosen, scales);
          if (effort == DBRXQ_BEST)
            refine_with_paths(k, targets, within, multiplier, scratch, longest * kTile, rounded + longest * kTile,
                              chosen, scales);
          k.search_paths(targets, within, scales, scratch, group, rounded, values, tile_loss);
        }
        for (int64_t i = 0; i < kTile; ++i) losses[static_cast<size_t>(t * kTile + i)] += tile_loss[i];
        store_tile(scale_codes + g * n, chosen, 1, n, t * kTile);
        store_tile(codes + start * n, rounded, count, n, t * kTile);
        store_tile(errors + start * n, group, count, n, t * kTile);
        const int64_t width = std::min(kTile, n - t * kTile);
        for (int64_t r = 0; r < count; ++r)
          for (int64_t i = 0; i < width; ++i)
            dequantized[(start + r) * n + t * kTile + i] = float_to_half(values[r * kTile + i]);
        if (g + 1 < groups) begin_group(t, g + 1, start + count);
      });
    }
    for (int64_t i = 0; i < n; ++i) loss[i] += losses[static_cast<size_t>(i)];
  } catch (const std::bad_alloc&) {
    return DBRXQ_NO_MEMORY;
  }
  return DBRXQ_OK;
}
