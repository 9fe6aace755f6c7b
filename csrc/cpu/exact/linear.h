// What a linear on its own and the linears of experts share.
#pragma once
#include <cstdint>

#include "kernels.h"
#include "linear_view.h"

namespace dbrxq {

// Columns of one task, a multiple of 32, when `linears` of `columns` columns are handed out together.
int64_t band_columns(int64_t tokens, int64_t columns, int64_t linears);

// sums[t * stride + c - first] += bias[c] for c in [first, last).
void add_bias(const LinearView& view, int64_t first, int64_t last, int64_t tokens, float* sums, int64_t stride);

}  // namespace dbrxq
