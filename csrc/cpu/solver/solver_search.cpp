// The scales of one group, and the errors of all groups of a matrix at several widths.
#include <algorithm>
#include <cstdint>

#include "buffer.h"
#include "dbrxq.h"
#include "guard.h"
#include "half.h"
#include "isa.h"
#include "solver_driver.h"

namespace dbrxq {
namespace solver {
namespace {

// Rows of a group of a row-major matrix of n columns, in tiles.
struct Group {
  Group(const float* x, int64_t rows, int64_t n) : tiles(tile_count(n)), rows(rows), x(tiles, rows) {
    for (int64_t t = 0; t < tiles; ++t) load_tile(this->x[t], x, rows, n, t);
  }

  int64_t tiles, rows;
  Tiles<float> x;
};

// A search over one group in one thread.
class Search {
 public:
  Search(int64_t tiles, const Tiles<float>& column_weights)
      : codes(tiles), column_weights_(column_weights), nominal_(tiles), sums_(tiles * kMaxima) {}

  void run(const Group& group, int bits, const float* row_weights) {
    const auto tile = [&](int64_t t) { return Tile{group.x[t], group.rows, bits, row_weights}; };
    float largest = 0.0f;
    for (int64_t t = 0; t < group.tiles; ++t) {
      kernels_.nominal_scales(tile(t), nominal_[t]);
      largest = std::max(largest, *std::max_element(nominal_[t], nominal_[t] + kTile));
    }

    maximum = {};
    if (largest > 0.0f) {
      const Maxima maxima(largest);
      for (int64_t t = 0; t < group.tiles; ++t)
        kernels_.maximum_errors(tile(t), nominal_[t], column_weights_[t], maxima.multiplier, sums_.get() + t * kMaxima);
      maximum = maxima.best(sums_.get(), group.tiles);
    }

    error = 0.0;
    for (int64_t t = 0; t < group.tiles; ++t) {
      alignas(64) float scales[kTile], errors[kTile];
      kernels_.choose_codes(tile(t), nominal_[t], maximum.multiplier, codes[t], scales, errors);
      double sum = 0.0;
      for (int64_t i = 0; i < kTile; ++i)
        sum += static_cast<double>(errors[i]) * static_cast<double>(column_weights_[t][i]);
      error += sum;
    }
  }

  // What the last run found.
  Tiles<uint8_t> codes;
  Maximum maximum;
  double error = 0.0;

 private:
  const Kernels& kernels_ = kernels();
  const Tiles<float>& column_weights_;
  Tiles<float> nominal_;
  Buffer<double> sums_;  // [tiles, kMaxima]
};

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
  return guarded([&] {
    const Group group(x, rows, n);
    Tiles<float> weights(group.tiles);
    load_weights(weights, column_weights, n);
    Search search(group.tiles, weights);
    search.run(group, bits, row_weights);
    *scale_max = float_to_half(search.maximum.stored);
    std::copy_n(search.codes[0], n, scale_codes);
    *error = search.error;
    return DBRXQ_OK;
  });
}

int dbrxq_error_table(const float* weight, int64_t k, int64_t n, const float* pivots, const float* column_weights,
                      const int64_t* widths, int64_t width_count, int64_t group_rows, double* errors) {
  if (k <= 0 || n <= 0 || group_rows <= 0) return DBRXQ_BAD_SHAPE;
  if (!std::all_of(widths, widths + width_count, legal_bits)) return DBRXQ_BAD_GROUPS;
  if (!isa_usable()) return DBRXQ_BAD_ISA;
  return guarded([&] {
    Tiles<float> weights(tile_count(n));
    load_weights(weights, column_weights, n);
    const int64_t groups = (k + group_rows - 1) / group_rows;
    parallel_tasks(groups, [&](int64_t g) {
      const int64_t start = g * group_rows;
      const Group group(weight + start * n, std::min(group_rows, k - start), n);
      Search search(group.tiles, weights);
      for (int64_t i = 0; i < width_count; ++i) {
        search.run(group, static_cast<int>(widths[i]), pivots + start);
        errors[i * groups + g] = search.error;
      }
    });
    return DBRXQ_OK;
  });
}
