// The types that keys and values are stored in: loads of a few neighbours as floats, and stores.
//
// A row is the head_dim channels of one position; rows and channels are multiples of 16, so loads are aligned.
#pragma once
#include "../activation.cuh"

namespace dbrxq {

struct Float4 {
  float at[4];
};
struct Float2 {
  float at[2];
};

// Two bytes a value; `Own` has `convert` and `store`.
template <class Own>
struct Stored16 {
  static constexpr bool kScaled = false;
  static constexpr int kBytes = 2;
  static __device__ __forceinline__ Float2 pair(uint32_t word) {
    return {{Own::convert(static_cast<uint16_t>(word & 0xffffu)), Own::convert(static_cast<uint16_t>(word >> 16))}};
  }
  static __device__ __forceinline__ Float4 load4(const void* from, int64_t index) {
    const uint2 words = static_cast<const uint2*>(from)[index / 4];
    const Float2 low = pair(words.x), high = pair(words.y);
    return {{low.at[0], low.at[1], high.at[0], high.at[1]}};
  }
  static __device__ __forceinline__ Float2 load2(const void* from, int64_t index) {
    return pair(static_cast<const uint32_t*>(from)[index / 2]);
  }
};
struct StoredHalf : Stored16<StoredHalf> {
  static __device__ __forceinline__ float convert(uint16_t bits) { return from_half(bits); }
  static __device__ __forceinline__ void store(void* to, int64_t index, float value) {
    static_cast<uint16_t*>(to)[index] = to_half(value);
  }
};
struct StoredBfloat : Stored16<StoredBfloat> {
  static __device__ __forceinline__ float convert(uint16_t bits) { return from_bfloat16(bits); }
  static __device__ __forceinline__ void store(void* to, int64_t index, float value) {
    static_cast<uint16_t*>(to)[index] = to_bfloat16(value);
  }
};

struct StoredFloat {
  static constexpr bool kScaled = false;
  static constexpr int kBytes = 4;
  static __device__ __forceinline__ Float4 load4(const void* from, int64_t index) {
    const uint4 words = static_cast<const uint4*>(from)[index / 4];
    return {{float_of(words.x), float_of(words.y), float_of(words.z), float_of(words.w)}};
  }
  static __device__ __forceinline__ Float2 load2(const void* from, int64_t index) {
    const uint2 words = static_cast<const uint2*>(from)[index / 2];
    return {{float_of(words.x), float_of(words.y)}};
  }
  static __device__ __forceinline__ void store(void* to, int64_t index, float value) {
    static_cast<float*>(to)[index] = value;
  }
};

// Whole numbers -127..127, to be multiplied by a scale a row: the largest magnitude of it over 127.
struct StoredByte {
  static constexpr bool kScaled = true;
  static constexpr int kBytes = 1;
  static constexpr float kMost = 127.0f;
  static __device__ __forceinline__ float byte(uint32_t word, int index) {
    return static_cast<float>(static_cast<int8_t>(static_cast<uint8_t>(word >> (8 * index))));
  }
  static __device__ __forceinline__ Float4 load4(const void* from, int64_t index) {
    const uint32_t word = static_cast<const uint32_t*>(from)[index / 4];
    return {{byte(word, 0), byte(word, 1), byte(word, 2), byte(word, 3)}};
  }
  static __device__ __forceinline__ Float2 load2(const void* from, int64_t index) {
    const uint32_t word = static_cast<const uint16_t*>(from)[index / 2];
    return {{byte(word, 0), byte(word, 1)}};
  }
  // `value` is divided by the row's scale already; what is not finite becomes 0, and its row's scale says so.
  static __device__ __forceinline__ void store(void* to, int64_t index, float value) {
    const float near = rintf(value);
    static_cast<int8_t*>(to)[index] = static_cast<int8_t>(near >= -kMost && near <= kMost ? static_cast<int>(near) : 0);
  }
};

}  // namespace dbrxq
