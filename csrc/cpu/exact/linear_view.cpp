// A caller's linear, checked before anything reads it.
#include "linear_view.h"

#include <cstring>

#include "layout.h"

namespace dbrxq {
namespace {

int32_t load_int32(const char* from, int64_t index) {
  int32_t value;
  std::memcpy(&value, from + 4 * index, sizeof value);
  return value;
}

}  // namespace

int read_groups(const void* q_groups, int64_t groups, int64_t k, int64_t word_rows, std::vector<GroupSpan>& spans) {
  if (groups < 1 || k < 1 || word_rows < 1) return DBRXQ_BAD_SHAPE;
  spans.clear();
  spans.reserve(static_cast<size_t>(groups));
  int64_t row = 0;
  int previous = 8;
  for (int64_t g = 0; g < groups; ++g) {
    int16_t entry[4] = {0, 0, 0, 0};  // this group's and, where there is one, the next group's
    const bool last = g == groups - 1;
    std::memcpy(entry, static_cast<const char*>(q_groups) + 4 * g, last ? 4 : 8);
    const int bits = entry[0];
    const int64_t word = entry[1], end = last ? word_rows : entry[3];
    if (!layout::is_width(bits) || bits > previous || (g == 0 && word != 0) || end <= word) return DBRXQ_BAD_GROUPS;
    if ((end - word) * 32 % bits != 0) return DBRXQ_BAD_GROUPS;
    const int64_t rows = (end - word) * 32 / bits;
    const int multiple = last && bits == 2 ? layout::kTailRows : layout::kUnitRows;
    if (rows % multiple != 0) return DBRXQ_BAD_GROUPS;
    spans.push_back({bits, g, row, rows, word});
    row += rows;
    previous = bits;
  }
  return row == k ? DBRXQ_OK : DBRXQ_BAD_GROUPS;
}

int view_linear(const dbrxq_linear& linear, LinearView& view) {
  if (linear.n < 1 || linear.n % layout::kColumnMultiple != 0) return DBRXQ_BAD_SHAPE;
  if (linear.out_features < 1 || linear.out_features > linear.n) return DBRXQ_BAD_SHAPE;
  const int status = read_groups(linear.q_groups, linear.groups, linear.k, linear.word_rows, view.groups);
  if (status != DBRXQ_OK) return status;
  view.words = static_cast<const char*>(linear.q_weight);
  view.scales = static_cast<const char*>(linear.q_scale);
  view.scale_max = static_cast<const char*>(linear.q_scale_max);
  view.invperm = static_cast<const char*>(linear.q_invperm);
  view.bias = static_cast<const char*>(linear.bias);
  view.k = linear.k;
  view.n = linear.n;
  view.out_features = linear.out_features;
  std::vector<bool> seen(static_cast<size_t>(view.k), false);
  for (int64_t j = 0; j < view.k; ++j) {
    const int32_t row = load_int32(view.invperm, j);
    if (row < 0 || row >= view.k || seen[static_cast<size_t>(row)]) return DBRXQ_BAD_PERMUTATION;
    seen[static_cast<size_t>(row)] = true;
  }
  return DBRXQ_OK;
}

void pack_tile(const LinearView& view, const float* const* rows, int64_t m, float* tile) {
  if (m == 1) {
    for (int64_t j = 0; j < view.k; ++j) tile[load_int32(view.invperm, j)] = rows[0][j];
    return;
  }
  for (int64_t j = 0; j < view.k; ++j) {
    float* to = tile + load_int32(view.invperm, j) * m;
    for (int64_t i = 0; i < m; ++i) to[i] = rows[i] ? rows[i][j] : 0.0f;
  }
}

}  // namespace dbrxq
