// A checked view of one linear: what the kernels may rely on without looking again.
#pragma once
#include <cstdint>
#include <vector>

#include "dbrxq.h"

namespace dbrxq {

// A group: `rows` packed rows from `row`, whose words start at word row `word`; scale row `index`.
struct GroupSpan {
  int bits;
  int64_t index, row, rows, word;
};

struct LinearView {
  const char* words;      // uint32 [R, N]
  const char* scales;     // uint32 [G, N/8]
  const char* scale_max;  // half [G]
  const char* invperm;    // int32 [K]
  const char* bias;       // half [N] or null
  int64_t k, n, out_features;
  std::vector<GroupSpan> groups;
};

// Fills `spans` from a group table; returns a status.
int read_groups(const void* q_groups, int64_t groups, int64_t k, int64_t word_rows, std::vector<GroupSpan>& spans);

// Checks sizes, groups and permutation of `linear` and fills `view`; returns a status.
int view_linear(const dbrxq_linear& linear, LinearView& view);

// Activations in packed row order, for the matrix kernels: tiles of 8 tokens, [tile][K][M], tile t at offset
// 8 t K. All tiles have M = 8 but the last, whose M is tile_tokens(remaining); tokens beyond T are zeros.
//
//   tile 0:  | row 0: x_0 .. x_7 | row 1: x_0 .. x_7 | ...     so that a kernel broadcasts from one running pointer
constexpr int64_t kTileTokens = 8;
inline int64_t tile_tokens(int64_t remaining) { return remaining >= 5 ? 8 : remaining >= 3 ? 4 : remaining; }
inline int64_t packed_floats(int64_t tokens, int64_t k) {
  const int64_t full = tokens / kTileTokens * kTileTokens;
  return (full + tile_tokens(tokens - full)) * k;
}

// Packs one tile: rows[m] is token m's activations [K], null for padding.
void pack_tile(const LinearView& view, const float* const* rows, int64_t m, float* tile);

}  // namespace dbrxq
