// The loops of decoder_kernels.h, written once in the compiler's own vector types and compiled by
// decoder_{scalar,avx2,avx512}.cpp. The includer defines kLanes, `total` (the sum of a vector's lanes) and
// `load_half` first. Everything sits in an unnamed namespace and uses no inline function of the standard library: code
// compiled for AVX-512 must never be the copy that the linker keeps for everyone.
//
// Sums run over kLanes partial sums, so their last bits differ between instruction sets; never between threads.

namespace dbrxq {
namespace {

static_assert(16 % kLanes == 0, "head dimensions are multiples of 16");

typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Short __attribute__((vector_size(2 * kLanes)));

inline F splat(float value) { return value - F{}; }
inline F load_float(const float* from) {
  F value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}
inline void store_float(float* to, F value) { __builtin_memcpy(to, &value, sizeof value); }

// A stored type: `load` a vector from element `at`, `get` and `put` one element.
struct Float {
  static F load(const void* from, int64_t at) { return load_float(static_cast<const float*>(from) + at); }
  static float get(const void* from, int64_t at) { return static_cast<const float*>(from)[at]; }
  static void put(void* to, int64_t at, float value) { static_cast<float*>(to)[at] = value; }
};
struct Bfloat {
  static F load(const void* from, int64_t at) {
    Short bits;
    __builtin_memcpy(&bits, static_cast<const uint16_t*>(from) + at, sizeof bits);
    return reinterpret_cast<F>(__builtin_convertvector(bits, U) << 16);
  }
  static float get(const void* from, int64_t at) {
    return bits_to_float(static_cast<uint32_t>(static_cast<const uint16_t*>(from)[at]) << 16);
  }
  static void put(void* to, int64_t at, float value) {
    const uint32_t bits = float_to_bits(value);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = nan ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u);
    static_cast<uint16_t*>(to)[at] = static_cast<uint16_t>(rounded >> 16);
  }
};
struct Half {
  static F load(const void* from, int64_t at) { return load_half(static_cast<const uint16_t*>(from) + at); }
  static float get(const void* from, int64_t at) { return half_to_float(static_cast<const uint16_t*>(from)[at]); }
  static void put(void* to, int64_t at, float value) { static_cast<uint16_t*>(to)[at] = float_to_half(value); }
};

// Calls body(Stored{}) with the type that `dtype` names.
template <class Body>
inline void with_type(int dtype, Body&& body) {
  if (dtype == DBRXQ_FLOAT32) return body(Float{});
  if (dtype == DBRXQ_BFLOAT16) return body(Bfloat{});
  body(Half{});
}

// exp by 2^n * p(r), r in [-ln 2 / 2, ln 2 / 2], p the Taylor polynomial of degree 7: relative error below 2e-7.
// Arguments are clamped to where the result is a normal number; a NaN stays one.
inline F exponential(F x) {
  x = x < splat(-87.0f) ? splat(-87.0f) : x;
  x = x > splat(88.0f) ? splat(88.0f) : x;
  const F shifted = x * splat(1.44269504f) + splat(12582912.0f);  // 1.5 * 2^23: n ends up in the low bits
  const F n = shifted - splat(12582912.0f);
  const F r = (x - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
  F p = splat(1.0f / 5040);
  p = p * r + splat(1.0f / 720);
  p = p * r + splat(1.0f / 120);
  p = p * r + splat(1.0f / 24);
  p = p * r + splat(1.0f / 6);
  p = p * r + splat(0.5f);
  p = p * r + splat(1.0f);
  p = p * r + splat(1.0f);
  const U scale = (reinterpret_cast<U>(shifted) << 23) + 0x3f800000u;  // 2^n
  return p * reinterpret_cast<F>(scale);
}

// scores[r * stride + p] = query r . key p, of Rows rows and Positions positions.
template <int Rows, int Positions, class Stored>
inline void dots(const float* queries, const void* keys, int64_t head_dim, int64_t position, float* scores,
                 int64_t stride) {
  F sums[Rows][Positions] = {};
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    F key[Positions];
#pragma GCC unroll 8
    for (int p = 0; p < Positions; ++p) key[p] = Stored::load(keys, (position + p) * head_dim + d);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const F query = load_float(queries + r * head_dim + d);
#pragma GCC unroll 8
      for (int p = 0; p < Positions; ++p) sums[r][p] += query * key[p];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < Positions; ++p) scores[r * stride + p] = total(sums[r][p]);
}

template <int Rows, class Stored>
void score_rows(const AttentionTask& task, int64_t row, int64_t stride) {
  const float* queries = task.queries + row * task.head_dim;
  float* scores = task.scores + row * stride;
  int64_t p = task.first;
  for (; p + 2 <= task.last; p += 2)
    dots<Rows, 2, Stored>(queries, task.keys, task.head_dim, p, scores + (p - task.first), stride);
  if (p < task.last) dots<Rows, 1, Stored>(queries, task.keys, task.head_dim, p, scores + (p - task.first), stride);
}

// out[r, d..] = sum over p of weights[r * stride + p] * values[p, d..], of Rows rows and Vectors vectors.
template <int Rows, int Vectors, class Stored>
inline void weigh(const AttentionTask& task, int64_t row, int64_t d, int64_t stride) {
  const float* weights = task.scores + row * stride;
  F sums[Rows][Vectors] = {};
  for (int64_t p = task.first; p < task.last; ++p) {
    F value[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) value[v] = Stored::load(task.values, p * task.head_dim + d + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const F weight = splat(weights[r * stride + p - task.first]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sums[r][v] += weight * value[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) store_float(task.out + (row + r) * task.head_dim + d + v * kLanes, sums[r][v]);
}

template <int Rows, class Stored>
void weigh_rows(const AttentionTask& task, int64_t row, int64_t stride) {
  constexpr int wide = kLanes == 16 ? 4 : 2;  // sums of 4 rows and a row of values: 20 registers of 32, 10 of 16
  int64_t d = 0;
  for (; d + wide * kLanes <= task.head_dim; d += wide * kLanes) weigh<Rows, wide, Stored>(task, row, d, stride);
  for (; d < task.head_dim; d += kLanes) weigh<Rows, 1, Stored>(task, row, d, stride);
}

// Calls body<rows>(row) with up to four rows at a time.
#define DBRXQ_ROWS(body, stored)                                              \
  for (int64_t row = 0; row < task.rows; row += 4) switch (task.rows - row) { \
      case 1: body<1, stored>(task, row, stride); break;                      \
      case 2: body<2, stored>(task, row, stride); break;                      \
      case 3: body<3, stored>(task, row, stride); break;                      \
      default: body<4, stored>(task, row, stride);                            \
    }

// Scores of one row to weights; zeros from what it may not see up to the end of the row.
void soften(const AttentionTask& task, int64_t row, float* scores, int64_t stride) {
  const float infinity = __builtin_inff();
  int64_t seen = task.visible[row] - task.first;
  seen = seen < 0 ? 0 : seen > task.last - task.first ? task.last - task.first : seen;
  for (int64_t p = seen; p < stride; ++p) scores[p] = -infinity;
  F most = splat(-infinity);
  for (int64_t p = 0; p < seen; p += kLanes) {
    const F score = load_float(scores + p);
    most = score > most ? score : most;
  }
  float maximum = -infinity;
  for (int i = 0; i < kLanes; ++i) maximum = most[i] > maximum ? most[i] : maximum;
  F sums = {};
  for (int64_t p = 0; p < seen; p += kLanes) {
    const F weight = exponential(load_float(scores + p) - splat(maximum));
    store_float(scores + p, weight);
    if (p + kLanes <= seen) sums += weight;
  }
  for (int64_t p = seen; p < stride; ++p) scores[p] = 0.0f;
  float sum = total(sums);
  for (int64_t p = seen / kLanes * kLanes; p < seen; ++p) sum += scores[p];
  task.maximum[row] = maximum;
  task.sum[row] = sum;
}

void attend(const AttentionTask& task) {
  const int64_t stride = (task.last - task.first + kScoreMultiple - 1) / kScoreMultiple * kScoreMultiple;
  with_type(task.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    DBRXQ_ROWS(score_rows, Stored)
    for (int64_t row = 0; row < task.rows; ++row) soften(task, row, task.scores + row * stride, stride);
    DBRXQ_ROWS(weigh_rows, Stored)
  });
}
#undef DBRXQ_ROWS

template <class Stored>
float dot_of(const float* x, const void* weight, int64_t n) {
  F sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sums[v] += load_float(x + i + v * kLanes) * Stored::load(weight, i + v * kLanes);
  float sum = total((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; ++i) sum += x[i] * Stored::get(weight, i);
  return sum;
}

float dot(const float* x, const void* weight, int dtype, int64_t n) {
  float sum = 0.0f;
  with_type(dtype, [&](auto stored) { sum = dot_of<decltype(stored)>(x, weight, n); });
  return sum;
}

// Sum of (x - mean)^2.
float squares(const float* x, int64_t n, float mean) {
  F sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const F centred = load_float(x + i + v * kLanes) - splat(mean);
      sums[v] += centred * centred;
    }
  float sum = total(sums[0] + sums[1]);
  for (; i < n; ++i) sum += (x[i] - mean) * (x[i] - mean);
  return sum;
}

float sum_of(const float* x, int64_t n) {
  F sums = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sums += load_float(x + i);
  float sum = total(sums);
  for (; i < n; ++i) sum += x[i];
  return sum;
}

void normalise(const float* x, const void* weight, int dtype, int64_t n, float eps, bool centred, float* y) {
  const auto count = static_cast<float>(n);
  const float mean = centred ? sum_of(x, n) / count : 0.0f;
  const float factor = 1.0f / __builtin_sqrtf(squares(x, n, mean) / count + eps);
  with_type(dtype, [&](auto stored) {
    using Stored = decltype(stored);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      store_float(y + i, (load_float(x + i) - splat(mean)) * splat(factor) * Stored::load(weight, i));
    for (; i < n; ++i) y[i] = (x[i] - mean) * factor * Stored::get(weight, i);
  });
}

void silu_product(float* gate, const float* up, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F value = load_float(gate + i);
    store_float(gate + i, value / (splat(1.0f) + exponential(-value)) * load_float(up + i));
  }
  if (i == n) return;
  float rest[kLanes] = {};
  for (int64_t j = i; j < n; ++j) rest[j - i] = gate[j];
  const F value = load_float(rest);
  store_float(rest, value / (splat(1.0f) + exponential(-value)));
  for (int64_t j = i; j < n; ++j) gate[j] = rest[j - i] * up[j];
}

void store(const float* x, int dtype, int64_t n, void* to) {
  with_type(dtype, [&](auto stored) {
    for (int64_t i = 0; i < n; ++i) decltype(stored)::put(to, i, x[i]);
  });
}

}  // namespace
}  // namespace dbrxq
