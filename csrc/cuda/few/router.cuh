// The router of a block of experts without a launch of its own: the product before the block leaves, for each column tile
// of its result x, what those columns add to the logits; the blocks of the gate and up product add that up and choose.
//
//   logit_e = sum over columns of (x - mean) * factor * norm * weight_e
//           = factor * (sum over tiles of [sum of x norm weight_e] - mean * sum over tiles of [sum of norm weight_e])
//
// Sums have a fixed order, so all blocks choose alike.
#pragma once
#include "rows.cuh"

namespace dbrxq {

// What the columns of a tile add to the logits; panel [tokens, 128] has x, 0 beyond the last column. All threads of the
// block; the caller brings the barriers before and after.
__device__ inline void leave_logits(const FewRouter& router, int64_t columns, int tokens, int tile,
                                    const float (*panel)[tile::kColumns]) {
  constexpr int kEach = tile::kColumns / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t tiles = column_tiles(columns), first = static_cast<int64_t>(tile) * tile::kColumns + lane;
  float gains[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j)
    gains[j] = first + 32 * j < columns ? load(router.norm, first + 32 * j, router.dtype) : 0.0f;
  for (int e = warp; e < router.experts; e += kFewWarps) {
    float weights[kEach], constant = 0.0f;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t column = first + 32 * j;
      weights[j] = column < columns ? gains[j] * load(router.weight, e * columns + column, router.dtype) : 0.0f;
      constant += weights[j];
    }
    for (int t = 0; t < tokens; ++t) {
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kEach; ++j) sum += weights[j] * panel[t][32 * j + lane];
      sum = warp_sum(sum);
      if (lane == 0) router.partial[(t * tiles + tile) * router.experts + e] = sum;
    }
    constant = warp_sum(constant);
    if (lane == 0) router.constants[static_cast<int64_t>(tile) * router.experts + e] = constant;
  }
}

// The likeliest experts of a token, the first of equal ones, and their weights, from `chances`: its logits, in shared
// memory. By a warp. experts_chosen (shared) and, unless null, index and weights: [active].
__device__ inline void choose(const FewRouter& router, int active, float* chances, int* experts_chosen, int64_t* index,
                              float* weights) {
  const int lane = threadIdx.x % 32;
  float most = -INFINITY;
  for (int e = lane; e < router.experts; e += 32) most = chances[e] > most ? chances[e] : most;
  most = warp_maximum(most);
  float sum = 0.0f;
  for (int e = lane; e < router.experts; e += 32) sum += chances[e] = expf(chances[e] - most);
  sum = warp_sum(sum);
  const bool plain = router.expert_norm == 0.0f || router.expert_norm == 1.0f;
  float norm = 0.0f;
  for (int a = 0; a < active; ++a) {
    float best = -INFINITY;
    int where = 0;
    for (int e = lane; e < router.experts; e += 32)  // lanes take out what they have chosen themselves
      if (chances[e] > best) {
        best = chances[e];
        where = e;
      }
    const float winner = warp_maximum(best);
    const int chosen = static_cast<int>(-warp_maximum(best == winner ? -static_cast<float>(where) : -INFINITY));
    if (chosen % 32 == lane) chances[chosen] = -1.0f;
    const float weight = winner / sum;
    norm += plain ? weight : powf(weight, router.expert_norm);
    if (lane != 0) continue;
    experts_chosen[a] = chosen;
    if (index) index[a] = chosen;
    if (weights) weights[a] = weight;
  }
  if (router.expert_norm == 0.0f || lane != 0 || !weights) return;
  if (!plain) norm = powf(norm, 1.0f / router.expert_norm);
  for (int a = 0; a < active; ++a) weights[a] /= norm;
}

// The experts of all tokens into `chosen` [tokens, active] (shared); by block 0 also into memory. All threads of the
// block, `chances` is kMostExperts floats of the warp's own in shared memory; ends with a barrier.
__device__ inline void choose_all(const FewRouter& router, const FewRouting& routing, int64_t columns, const Row* rows,
                                  float* chances, int* chosen) {
  const int lane = threadIdx.x % 32;
  const int64_t tiles = column_tiles(columns);
  for (int t = threadIdx.x / 32; t < routing.tokens; t += kFewWarps) {
    const Row row = rows[t];
    for (int e = lane; e < router.experts; e += 32) {
      float sum = 0.0f, constant = 0.0f;
#pragma unroll 8
      for (int64_t tile = 0; tile < tiles; ++tile) sum += router.partial[(t * tiles + tile) * router.experts + e];
      if (router.layer_norm)
#pragma unroll 8
        for (int64_t tile = 0; tile < tiles; ++tile) constant += router.constants[tile * router.experts + e];
      chances[e] = row.times * row.back * (sum - row.minus * constant);  // powers of two in both go against each other
    }
    const int slot = t * routing.active;
    const bool first = blockIdx.x == 0;
    choose(router, routing.active, chances, chosen + slot, first ? router.index + slot : nullptr,
           first ? router.weights + slot : nullptr);
  }
  __syncthreads();
}

}  // namespace dbrxq
