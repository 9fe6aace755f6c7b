// Vectors of the solver's kernels and the roundings that they share, for the instruction set being compiled.
#pragma once
#include <cmath>
#include <cstring>

#include "solver.h"

#ifndef DBRXQ_SOLVER_VARIANT
#error "define DBRXQ_SOLVER_VARIANT, the namespace of the instruction set, before including the solver's kernels"
#endif

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

// Vectors wider than the registers are returned by static functions only.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace dbrxq {
namespace solver {
namespace DBRXQ_SOLVER_VARIANT {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr __mmask16 kAll = 0xffff;  // the unmasked intrinsics make GCC 12 warn of an uninitialized operand
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kVectors = kTile / kLanes;
static_assert(kTile % kLanes == 0, "a tile is whole vectors");

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));

static inline Floats splat(float x) { return x - Floats{}; }

static inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

// min(a, b) is a < b ? a : b, as the instructions have it; with finite operands that is plain minimum.
static inline Floats min(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_min_ps(kAll, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (Floats)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}

static inline Floats max(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_max_ps(kAll, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (Floats)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

static inline Floats square_root(Floats v) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_sqrt_ps(kAll, (__m512)v);
#elif defined(__AVX2__)
  return (Floats)_mm256_sqrt_ps((__m256)v);
#elif defined(__SSE2__)
  return (Floats)_mm_sqrt_ps((__m128)v);
#else
  for (int i = 0; i < kLanes; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// Nearest integer, ties to even, for |v| < 2^22: the addition leaves no bit below the units. Never gives -0.
static inline Floats round_integer(Floats v) {
  const float magic = 12582912.0f;  // 1.5 * 2^23
  return (v + magic) - magic;
}

static inline Floats select(Ints mask, Floats yes, Floats no) {
  return (Floats)((mask & (Ints)yes) | (~mask & (Ints)no));
}

static inline Floats floor_integer(Floats v) {
  const Floats nearest = round_integer(v);
  return nearest - select(nearest > v, splat(1.0f), Floats{});
}

// Nearest half, ties to even. From 2^-14 on a half keeps 11 significant bits: add just under half a unit and cut
// 13 bits off. Below, halves are multiples of 2^-24, the unit of floats in [0.5, 1).
template <typename Vector, typename Integers>
static inline Vector round_to_half(const Vector& v) {
  const Integers bits = (Integers)v;
  const Integers magnitude = bits & INT32_MAX;
  const Integers normal = (magnitude + 0xfff + ((magnitude >> 13) & 1)) & ~0x1fff;
  const Integers small = (Integers)(((Vector)magnitude + 0.5f) - 0.5f);
  const Integers is_small = magnitude < 0x38800000;  // 2^-14
  return (Vector)((is_small & small) | (~is_small & normal) | (bits & INT32_MIN));
}

static inline Floats round_to_half(Floats v) { return round_to_half<Floats, Ints>(v); }

// 1 / scale, and 0 for scales too small for any half: everything then rounds to code 0.
static inline Floats inverse_scale(Floats scale) {
  const Ints usable = scale >= 0x1p-26f;
  return select(usable, 1.0f / select(usable, scale, splat(1.0f)), Floats{});
}

// Largest code whose value a half can hold.
static inline Floats greatest_code(Floats scale) {
  return floor_integer(min(kHalfMax / max(scale, splat(0x1p-24f)), splat(1024.0f)));
}

}  // namespace DBRXQ_SOLVER_VARIANT
}  // namespace solver
}  // namespace dbrxq
