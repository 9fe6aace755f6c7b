// Activations of the experts, and bfloat16.
#pragma once
#include "dbrxq.h"
#include "device.cuh"

namespace dbrxq {

__device__ __forceinline__ float activate(float x, int activation) {
  if (activation == DBRXQ_SILU) return x / (1.0f + expf(-x));
  if (activation == DBRXQ_GELU) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
  if (activation == DBRXQ_GELU_TANH)
    return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
  return x > 0.0f || x != x ? x : 0.0f;  // DBRXQ_RELU
}

// Rounded to nearest even; a NaN stays one.
__device__ __forceinline__ uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
__device__ __forceinline__ float from_bfloat16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

}  // namespace dbrxq
