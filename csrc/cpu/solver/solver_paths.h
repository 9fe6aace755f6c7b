// Rounding the rows of a group along several paths. Included by solver_impl.h.
#pragma once
#include "solver_simd.h"

namespace dbrxq {
namespace solver {
namespace DBRXQ_SOLVER_VARIANT {

// A lane is a path, and a path is a choice of codes for the rows so far of one column. Each row continues every path
// with its target's nearest and second nearest code, and of the 2 * kPaths continuations the kPaths with the least
// loss live on: the M-algorithm of sequential decoding (Anderson and Mohan 1984); one path would be a plain sweep.
constexpr int kPaths = 8;
typedef float Paths __attribute__((vector_size(kPaths * 4)));
typedef int32_t PathInts __attribute__((vector_size(kPaths * 4)));

static inline PathInts choose(const PathInts& mask, const PathInts& yes, const PathInts& no) {
  return (mask & yes) | (~mask & no);
}

static inline Paths choose(const PathInts& mask, const Paths& yes, const Paths& no) {
  return (Paths)choose(mask, (PathInts)yes, (PathInts)no);
}

// One layer of a sorting network: lanes whose numbers differ by the bit kDistance compare their keys; `upper` marks
// the lanes that get the larger one.
template <int kDistance>
static inline PathInts exchange(const PathInts& keys, const PathInts& upper) {
  const PathInts lanes = {0, 1, 2, 3, 4, 5, 6, 7};
  const PathInts partner = __builtin_shuffle(keys, lanes ^ kDistance);
  const PathInts less = keys < partner ? keys : partner;
  const PathInts more = keys < partner ? partner : keys;
  return choose(upper, more, less);
}

// Sorts lanes that rise and then fall.
static inline PathInts merge_ascending(const PathInts& rising_falling) {
  PathInts keys = exchange<4>(rising_falling, PathInts{0, 0, 0, 0, -1, -1, -1, -1});
  keys = exchange<2>(keys, PathInts{0, 0, -1, -1, 0, 0, -1, -1});
  return exchange<1>(keys, PathInts{0, -1, 0, -1, 0, -1, 0, -1});
}

static inline PathInts sort_ascending(const PathInts& unsorted) {  // bitonic
  PathInts keys = exchange<1>(unsorted, PathInts{0, -1, -1, 0, 0, -1, -1, 0});
  keys = exchange<2>(keys, PathInts{0, 0, -1, -1, -1, -1, 0, 0});
  keys = exchange<1>(keys, PathInts{0, -1, 0, -1, -1, 0, -1, 0});
  return merge_ascending(keys);
}

static inline Paths load_paths(const float* p) {
  Paths v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// One column's paths on their way down the rows.
struct PathSearch {
  float scale, inverse, low, high;
  Paths total;       // loss of each path
  Paths error;       // of the row just rounded, for each path
  PathInts parent;   // path before that row which each path continues
  float* pending;    // [rows, kPaths] targets with the feedback of the rows so far
  float* codes;      // [rows, kPaths] for the way back
  int32_t* parents;  // [rows, kPaths]
};

// Rounds a row: every path is continued in two ways, and the best live on.
static inline void continue_paths(PathSearch& search, int64_t r, float pivot, float weight) {
  const Paths zero = Paths{};
  const Paths target = load_paths(search.pending + r * kPaths);
  const Paths exact = target * search.inverse;
  const Paths bounded = exact < search.low ? search.low - zero : exact > search.high ? search.high - zero : exact;
  const float magic = 12582912.0f;  // as in round_integer
  const Paths nearest = (bounded + magic) - magic;
  const Paths beyond = nearest + (exact > nearest ? zero + 1.0f : zero - 1.0f);
  const PathInts possible = (beyond >= search.low) & (beyond <= search.high) & (zero + search.scale > 0.0f);
  const Paths second = choose(possible, beyond, nearest);
  const Paths nearest_value = round_to_half<Paths, PathInts>(nearest * search.scale);
  const Paths second_value = round_to_half<Paths, PathInts>(second * search.scale);
  const Paths nearest_miss = target - nearest_value, second_miss = target - second_value;
  const Paths nearest_total = search.total + (nearest_miss * nearest_miss) * pivot;
  const Paths second_total = choose(possible, search.total + (second_miss * second_miss) * pivot, zero + HUGE_VALF);

  // A key is a loss, whose bits are in the order of its value as it is never negative, with the number of the
  // continuation in place of the last four bits: no two keys are equal.
  const PathInts lanes = {0, 1, 2, 3, 4, 5, 6, 7};
  const PathInts keys = sort_ascending(((PathInts)nearest_total & ~15) | lanes);
  const PathInts others = sort_ascending(((PathInts)second_total & ~15) | (lanes + kPaths));
  const PathInts falling = __builtin_shuffle(others, 7 - lanes);
  const PathInts best = merge_ascending(keys < falling ? keys : falling);
  const PathInts parent = best & (kPaths - 1);
  const PathInts is_second = (best & kPaths) != 0;
  const auto follow = [&](const Paths& first, const Paths& other) {
    return choose(is_second, __builtin_shuffle(other, parent), __builtin_shuffle(first, parent));
  };
  search.total = follow(nearest_total, second_total);
  search.error = weight - follow(nearest_value, second_value);
  search.parent = parent;
  const Paths code = follow(nearest, second);
  std::memcpy(search.codes + r * kPaths, &code, sizeof code);
  std::memcpy(search.parents + r * kPaths, &parent, sizeof parent);
}

static void search_paths(const Tile& targets, const Feedback& within, const float* scales, float* scratch,
                         float* errors, uint8_t* codes, float* values, float* loss) {
  constexpr int kTogether = 2;  // columns that hide each other's latency
  static_assert(kTogether * 3 * kPaths <= kTile && kTile % kTogether == 0, "scratch is a tile");
  const float half_range = static_cast<float>(1 << (targets.bits - 1));
  const int64_t rows = targets.rows;
  PathSearch searches[kTogether];
  for (PathSearch& search : searches) {
    search.pending = scratch;
    search.codes = scratch + rows * kPaths;
    search.parents = reinterpret_cast<int32_t*>(scratch + 2 * rows * kPaths);
    scratch += 3 * rows * kPaths;
  }
  for (int64_t column = 0; column < kTile; column += kTogether) {
    for (int i = 0; i < kTogether; ++i) {
      PathSearch& search = searches[i];
      search.scale = scales[column + i];
      search.inverse = inverse_scale(splat(search.scale))[0];
      const float reach = greatest_code(splat(search.scale))[0];
      search.low = -half_range > -reach ? -half_range : -reach;
      search.high = half_range - 1.0f < reach ? half_range - 1.0f : reach;
      const float never = HUGE_VALF;
      search.total = Paths{0.0f, never, never, never, never, never, never, never};  // at first there is one path
      for (int64_t r = 0; r < rows; ++r)
        for (int k = 0; k < kPaths; ++k) search.pending[r * kPaths + k] = targets.x[r * kTile + column + i];
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int i = 0; i < kTogether; ++i)
        continue_paths(searches[i], r, targets.row_weights[r], within.weight[r * kTile + column + i]);
      const float* outgoing = within.outgoing + r * rows;
      for (int64_t c = r + 1; c < rows; ++c)
        for (int i = 0; i < kTogether; ++i) {
          float* pending = searches[i].pending + c * kPaths;
          const Paths next = __builtin_shuffle(load_paths(pending), searches[i].parent) +
                             searches[i].error * outgoing[c];
          std::memcpy(pending, &next, sizeof next);
        }
    }
    for (int i = 0; i < kTogether; ++i) {
      const PathSearch& search = searches[i];
      loss[column + i] = search.total[0];
      int32_t path = 0;
      for (int64_t r = rows - 1; r >= 0; --r) {
        const int64_t at = r * kTile + column + i;
        values[at] = search.codes[r * kPaths + path];
        path = search.parents[r * kPaths + path];
      }
    }
  }
  for (int64_t at = 0; at < rows * kTile; at += kLanes) {
    const Floats code = load(values + at), stored = code + half_range;
    for (int i = 0; i < kLanes; ++i) codes[at + i] = static_cast<uint8_t>(stored[i]);
    const Floats value = round_to_half(code * load(scales + at % kTile));
    store(values + at, value);
    store(errors + at, load(within.weight + at) - value);
  }
}

}  // namespace DBRXQ_SOLVER_VARIANT
}  // namespace solver
}  // namespace dbrxq
