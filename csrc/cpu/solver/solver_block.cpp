// Rounding a block of whole groups: group after group, the tiles of its columns in parallel.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "buffer.h"
#include "dbrxq.h"
#include "guard.h"
#include "half.h"
#include "isa.h"
#include "parallel.h"
#include "solver_driver.h"

namespace dbrxq {
namespace solver {
namespace {

// The arguments of dbrxq_solve_block.
struct Block {
  const float* weight;
  int64_t rows, n;
  const float *coefficients, *pivots, *column_weights;
  const int64_t *group_bits, *group_rows;
  int64_t groups;
  int effort;
  float* errors;
  uint8_t *codes, *scale_codes;
  uint16_t *scale_max, *dequantized;
  double* loss;
};

int check(const Block& block) {
  if (block.rows <= 0 || block.n <= 0 || block.groups <= 0) return DBRXQ_BAD_SHAPE;
  if (block.effort < DBRXQ_FAST || block.effort > DBRXQ_BEST) return DBRXQ_BAD_SHAPE;
  int64_t covered = 0;
  for (int64_t g = 0; g < block.groups; ++g) {
    if (!legal_bits(block.group_bits[g]) || block.group_rows[g] <= 0) return DBRXQ_BAD_GROUPS;
    covered += block.group_rows[g];
  }
  return covered == block.rows ? DBRXQ_OK : DBRXQ_BAD_GROUPS;
}

// Rows start .. start + rows - 1 of the block.
struct Group {
  int64_t index, start, rows;
  int bits;
};

std::vector<Group> list_groups(const Block& block) {
  std::vector<Group> groups;
  for (int64_t g = 0, start = 0; g < block.groups; start += block.group_rows[g++])
    groups.push_back({g, start, block.group_rows[g], static_cast<int>(block.group_bits[g])});
  return groups;
}

class BlockSolver {
 public:
  explicit BlockSolver(const Block& block)
      : block_(block),
        groups_(list_groups(block)),
        longest_(*std::max_element(block.group_rows, block.group_rows + block.groups)),
        tiles_(tile_count(block.n)),
        targets_(tiles_, block.rows),
        nominal_(tiles_),
        column_weights_(tiles_),
        floats_(tiles_, 5 * longest_),
        codes_(tiles_, 2 * longest_),
        losses_(tiles_),
        sums_(tiles_ * kMaxima),
        outgoing_(longest_ * longest_) {
    load_weights(column_weights_, block.column_weights, block.n);
    std::fill(losses_[0], losses_[tiles_], 0.0);
  }

  void run() {
    parallel_for(tiles_, [&](int64_t t) {
      load_tile(targets_[t], block_.errors, block_.rows, block_.n, t);
      begin_group(groups_[0], t);
    });
    for (const Group& group : groups_) {
      const Maximum maximum = choose_maximum(group);
      block_.scale_max[group.index] = float_to_half(maximum.stored);
      transpose_coefficients(group);
      const Group* next = &group == &groups_.back() ? nullptr : &group + 1;
      parallel_for(tiles_, [&](int64_t t) {
        round_group(group, t, maximum.multiplier);
        if (next) begin_group(*next, t);
      });
    }
    for (int64_t i = 0; i < block_.n; ++i) block_.loss[i] += losses_[0][i];
  }

 private:
  // Of one tile, [longest, kTile] each; those for trials are touched with DBRXQ_BEST only.
  struct Workspace {
    float *weight, *values, *scratch, *trial_errors, *trial_values;
    uint8_t *codes, *trial_codes;
  };

  // Scales of a tile's columns, as codes and as half values.
  struct Scales {
    uint8_t codes[kTile];
    alignas(64) float values[kTile];
  };

  // A tile keeps its rows for the whole call: targets first, errors once they are rounded.
  float* rows_of(const Group& group, int64_t t) { return targets_[t] + group.start * kTile; }
  Tile tile(const Group& group, int64_t t) {
    return {rows_of(group, t), group.rows, group.bits, block_.pivots + group.start};
  }

  Workspace workspace(int64_t t) {
    const int64_t size = longest_ * kTile;
    float* at = floats_[t];
    return {.weight = at,
            .values = at + size,
            .scratch = at + 2 * size,
            .trial_errors = at + 3 * size,
            .trial_values = at + 4 * size,
            .codes = codes_[t],
            .trial_codes = codes_[t] + size};
  }

  // Adds the errors of the rows above to a group's targets, and looks for the scales that fit them best.
  void begin_group(const Group& group, int64_t t) {
    kernels_.feedback(rows_of(group, t), group.rows, targets_[t], group.start,
                      block_.coefficients + group.start * block_.rows, block_.rows);
    kernels_.nominal_scales(tile(group, t), nominal_[t]);
  }

  Maximum choose_maximum(const Group& group) {
    const float largest = *std::max_element(nominal_[0], nominal_[tiles_]);
    if (!(largest > 0.0f)) return {};
    const Maxima maxima(largest);
    parallel_for(tiles_, [&](int64_t t) {
      kernels_.maximum_errors(tile(group, t), nominal_[t], column_weights_[t], maxima.multiplier,
                              sums_.get() + t * kMaxima);
    });
    return maxima.best(sums_.get(), tiles_);
  }

  // outgoing[j, r] = coefficients[r, j] of the group's own rows.
  void transpose_coefficients(const Group& group) {
    for (int64_t j = 0; j < group.rows; ++j)
      for (int64_t r = j + 1; r < group.rows; ++r)
        outgoing_.get()[j * group.rows + r] = block_.coefficients[(group.start + r) * block_.rows + group.start + j];
  }

  // Targets to codes; leaves the errors in their place.
  void round_group(const Group& group, int64_t t, float multiplier) {
    const Workspace work = workspace(t);
    load_tile(work.weight, block_.weight + group.start * block_.n, group.rows, block_.n, t);
    const Tile targets = tile(group, t);
    const float* incoming = block_.coefficients + group.start * block_.rows + group.start;
    const Feedback within = {work.weight, incoming, block_.rows, outgoing_.get()};
    float* errors = rows_of(group, t);
    Scales scales;
    alignas(64) float loss[kTile];

    kernels_.choose_codes(targets, nominal_[t], multiplier, scales.codes, scales.values, loss);
    if (block_.effort == DBRXQ_FAST) {
      kernels_.round_rows(targets, within, scales.values, errors, work.codes, work.values, loss);
    } else {
      kernels_.refine_codes(targets, within, multiplier, work.scratch, scales.codes, scales.values);
      if (block_.effort == DBRXQ_BEST) refine_with_paths(targets, within, multiplier, work, scales);
      kernels_.search_paths(targets, within, scales.values, work.scratch, errors, work.codes, work.values, loss);
    }
    for (int64_t i = 0; i < kTile; ++i) losses_[t][i] += loss[i];
    write_out(group, t, scales.codes, work);
  }

  // Tries the stored scales one step from the ones chosen by searching paths with each.
  void refine_with_paths(const Tile& targets, const Feedback& within, float multiplier, const Workspace& work,
                         Scales& scales) {
    const Scales start = scales;
    Scales trial;
    alignas(64) float least[kTile], loss[kTile];
    for (const int step : {0, -1, 1}) {
      for (int64_t i = 0; i < kTile; ++i) {
        trial.codes[i] = static_cast<uint8_t>(std::clamp(start.codes[i] + step, 0, 15));
        const float s = static_cast<float>(trial.codes[i]) + 1.0f;
        trial.values[i] = round_half((s * s) * multiplier);
      }
      kernels_.search_paths(targets, within, trial.values, work.scratch, work.trial_errors, work.trial_codes,
                            work.trial_values, loss);
      for (int64_t i = 0; i < kTile; ++i) {
        if (step != 0 && !(loss[i] < least[i])) continue;
        least[i] = loss[i];
        scales.values[i] = trial.values[i];
        scales.codes[i] = trial.codes[i];
      }
    }
  }

  void write_out(const Group& group, int64_t t, const uint8_t* scale_codes, const Workspace& work) {
    const int64_t n = block_.n, first = group.start * n;
    store_tile(block_.scale_codes + group.index * n, scale_codes, 1, n, t);
    store_tile(block_.codes + first, work.codes, group.rows, n, t);
    store_tile(block_.errors + first, rows_of(group, t), group.rows, n, t);
    store_tile(block_.dequantized + first, work.values, group.rows, n, t, float_to_half);
  }

  const Block& block_;
  const Kernels& kernels_ = kernels();
  const std::vector<Group> groups_;
  const int64_t longest_, tiles_;
  Tiles<float> targets_, nominal_, column_weights_;
  Tiles<float> floats_;   // of the workspaces
  Tiles<uint8_t> codes_;  // likewise
  Tiles<double> losses_;
  Buffer<double> sums_;     // [tiles, kMaxima]
  Buffer<float> outgoing_;  // [rows, rows] of the group at hand
};

}  // namespace
}  // namespace solver
}  // namespace dbrxq

int dbrxq_solve_block(const float* weight, int64_t rows, int64_t n, const float* coefficients, const float* pivots,
                      const float* column_weights, const int64_t* group_bits, const int64_t* group_rows, int64_t groups,
                      int effort, float* errors, uint8_t* codes, uint8_t* scale_codes, uint16_t* scale_max,
                      uint16_t* dequantized, double* loss) {
  const dbrxq::solver::Block block = {.weight = weight,
                                      .rows = rows,
                                      .n = n,
                                      .coefficients = coefficients,
                                      .pivots = pivots,
                                      .column_weights = column_weights,
                                      .group_bits = group_bits,
                                      .group_rows = group_rows,
                                      .groups = groups,
                                      .effort = effort,
                                      .errors = errors,
                                      .codes = codes,
                                      .scale_codes = scale_codes,
                                      .scale_max = scale_max,
                                      .dequantized = dequantized,
                                      .loss = loss};
  const int status = dbrxq::solver::check(block);
  if (status != DBRXQ_OK) return status;
  if (!dbrxq::isa_usable()) return DBRXQ_BAD_ISA;
  return dbrxq::guarded([&] {
    dbrxq::solver::BlockSolver(block).run();
    return DBRXQ_OK;
  });
}
