// Attention of a decode step in one launch: head norms, clip and rotation of queries and keys, the new rows of the
// cache, scores, fp32 softmax and the weighted sum of values, with the context split over blocks.
//
//   block (split, key head, sequence):  positions [first, last) of one key head, for all T H / J query rows of it
//     1. new positions among its own: key and value into the cache, where it then reads them like all others
//     2. kRows query rows at a time: kStretch positions a turn with a running maximum (online softmax)
//     3. with several splits: the last block by ticket adds the parts in the order of the splits
//
// Positions are cut by the length alone, sums have a fixed order: results depend on numbers and sizes alone. Scores: a
// warp takes 8 positions, 4 lanes each, 4 channels a lane and load. Values: a thread owns two channels of the rows.
// Oracle: tests/runtime/kernels/test_cuda_attention.py.
#include "../few/reduce.cuh"
#include "decoder.cuh"
#include "stored.cuh"

namespace dbrxq {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 8;        // query rows in registers
constexpr int kStretch = 256;   // positions whose scores are in shared memory
constexpr int kLeastPart = 64;  // positions that are worth a block

struct Shared {
  float queries[kRows][kMostHead];
  float scores[kRows * kStretch];  // [kRows, kStretch]; then sums of thread groups; then weights of splits
  float vectors[kWarps][kMostHead];
  float factor[kRows], maximum[kRows], sum[kRows];
  int last;
};
static_assert(kStretch >= kMostSplits && kRows * kStretch >= 2 * kThreads * kRows, "scores have further uses");

// Positions [first, last) of a split, and how many splits have any.
struct Part {
  int first, last, used;
};
__device__ __forceinline__ Part part_of(int length, int splits, int split) {
  int size = (length + splits - 1) / splits;
  size = (size + kLeastPart - 1) / kLeastPart * kLeastPart;
  const int first = split * size, end = first + size;
  return {first, end < length ? end : length, (length + size - 1) / size};
}

// One head of a token by a warp: cut to -clip..clip, normed unless `norm` is null, rotated unless `cosines` is null,
// times `factor`, to `to` (shared).
__device__ void head_vector(const Attention& args, const float* from, const void* norm, const float* cosines,
                            const float* sines, float factor, float* to) {
  const int lane = threadIdx.x % 32, half = args.head_dim / 2;
  const auto cut = [&](float value) {
    value = value < -args.clip ? -args.clip : value;  // a NaN passes
    return value > args.clip ? args.clip : value;
  };
  float scale = 1.0f;
  if (norm) {
    float squares = 0.0f;
    for (int i = lane; i < args.head_dim; i += 32) squares += cut(from[i]) * cut(from[i]);
    scale = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(args.head_dim) + args.eps);
  }
  for (int i = lane; i < half; i += 32) {
    float low = cut(from[i]), high = cut(from[i + half]);
    if (norm) {
      low *= scale * load(norm, i, args.dtype);
      high *= scale * load(norm, i + half, args.dtype);
    }
    if (cosines) {
      const float rotated = low * cosines[i] - high * sines[i];
      high = high * cosines[i + half] + low * sines[i + half];
      low = rotated;
    }
    to[i] = low * factor;
    to[i + half] = high * factor;
  }
}

// A vector that this warp's lanes wrote to shared memory, into row `at` of the cache.
template <class Stored>
__device__ void store_row(const float* vector, int head_dim, int64_t at, void* rows, float* scales) {
  const int lane = threadIdx.x % 32, half = head_dim / 2;
  float factor = 1.0f;
  if constexpr (Stored::kScaled) {
    float largest = 0.0f;
    bool finite = true;
    for (int i = lane; i < half; i += 32) {
      const float low = fabsf(vector[i]), high = fabsf(vector[i + half]);
      largest = low > largest ? low : largest;
      largest = high > largest ? high : largest;
      finite = finite && low - low == 0.0f && high - high == 0.0f;
    }
    largest = warp_maximum(largest);
    finite = __ballot_sync(kEveryLane, finite) == kEveryLane;
    const float scale = finite ? largest / Stored::kMost : NAN;
    if (lane == 0) scales[at] = scale;
    factor = finite && scale > 0.0f ? 1.0f / scale : 0.0f;
  }
  for (int i = lane; i < half; i += 32) {  // what the lane itself wrote
    Stored::store(rows, at * head_dim + i, vector[i] * factor);
    Stored::store(rows, at * head_dim + i + half, vector[i + half] * factor);
  }
}

// The new keys and values of a block's positions.
template <class Stored>
__device__ void append(const Attention& args, const dbrxq_cuda_cache& cache, int64_t cache_head, int past,
                       const Part& part, float* vector) {
  const int sequence = blockIdx.z, key_head = blockIdx.y, hd = args.head_dim;
  const int begin = part.first > past ? part.first : past;
  for (int i = threadIdx.x / 32; i < 2 * (part.last - begin); i += kWarps) {
    const int position = begin + i / 2;
    const int64_t row = static_cast<int64_t>(sequence) * args.tokens + position - past;
    const int64_t from = (row * args.key_heads + key_head) * hd;
    const int64_t at = cache_head * cache.capacity + position, turn = static_cast<int64_t>(position) * hd;
    if (i % 2 == 0) {
      head_vector(args, args.keys + from, args.key_norm, args.cosines + turn, args.sines + turn, 1.0f, vector);
      store_row<Stored>(vector, hd, at, cache.keys, cache.key_scales);
    } else {
      head_vector(args, args.values + from, nullptr, nullptr, nullptr, 1.0f, vector);
      store_row<Stored>(vector, hd, at, cache.values, cache.value_scales);
    }
  }
}

// What a block needs to look at its positions with `rows` query rows.
struct View {
  const void* keys;
  const void* values;
  const float* key_scales;
  const float* value_scales;
  int head_dim, rows;
  int visible[kRows];  // positions that a row may see
};

// scores[i][p - begin] of positions [begin, end).
template <class Stored>
__device__ __forceinline__ void score(const View& view, int begin, int end, Shared& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quarter = lane % 4;
  for (int base = begin + 8 * warp; base < end; base += 8 * kWarps) {
    const int own = base + lane / 4, p = own < end ? own : end - 1;
    float sums[kRows] = {};
    for (int c = 4 * quarter; c < view.head_dim; c += 16) {
      const Float4 key = Stored::load4(view.keys, static_cast<int64_t>(p) * view.head_dim + c);
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        if (i < view.rows) {
          const float* query = shared.queries[i] + c;
#pragma unroll
          for (int k = 0; k < 4; ++k) sums[i] += query[k] * key.at[k];
        }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      sums[i] += __shfl_xor_sync(kEveryLane, sums[i], 1);
      sums[i] += __shfl_xor_sync(kEveryLane, sums[i], 2);
      if (quarter != i % 4 || own >= end || i >= view.rows) continue;
      if constexpr (Stored::kScaled) sums[i] *= view.key_scales[p];
      shared.scores[i * kStretch + p - begin] = p < view.visible[i] ? sums[i] : -INFINITY;
    }
  }
}

// Scores of the warp's rows to weights against the running maximum; `factor` takes sums of before to the new one.
__device__ __forceinline__ void soften(int rows, int count, float (&maximum)[kRows / kWarps],
                                       float (&sum)[kRows / kWarps], Shared& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kRows / kWarps; ++n) {
    const int i = warp + kWarps * n;
    if (i >= rows) break;
    float* scores = shared.scores + i * kStretch;
    float most = maximum[n], total = 0.0f;
    for (int p = lane; p < count; p += 32) most = scores[p] > most ? scores[p] : most;
    most = warp_maximum(most);
    for (int p = lane; p < count; p += 32) {
      scores[p] = scores[p] == -INFINITY ? 0.0f : expf(scores[p] - most);
      total += scores[p];
    }
    const float factor = maximum[n] == -INFINITY ? 0.0f : expf(maximum[n] - most);
    maximum[n] = most;
    sum[n] = sum[n] * factor + warp_sum(total);
    if (lane == 0) shared.factor[i] = factor;
  }
}

// Adds the weighted values of positions [begin, end) to a thread's two channels.
template <class Stored>
__device__ __forceinline__ void weigh(const View& view, int begin, int end, const Shared& shared,
                                      float (&sums)[kRows][2]) {
  const int pairs = view.head_dim / 2, groups = kThreads / pairs;
  const int group = threadIdx.x / pairs, pair = threadIdx.x % pairs;
#pragma unroll
  for (int i = 0; i < kRows; ++i)
    if (i < view.rows) {
      sums[i][0] *= shared.factor[i];
      sums[i][1] *= shared.factor[i];
    }
  if (group >= groups) return;
#pragma unroll 4
  for (int p = begin + group; p < end; p += groups) {
    Float2 value = Stored::load2(view.values, static_cast<int64_t>(p) * view.head_dim + 2 * pair);
    if constexpr (Stored::kScaled) {
      value.at[0] *= view.value_scales[p];
      value.at[1] *= view.value_scales[p];
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (i < view.rows) {
        const float weight = shared.scores[i * kStretch + p - begin];
        sums[i][0] += weight * value.at[0];
        sums[i][1] += weight * value.at[1];
      }
  }
}

// Where row `row` of a key head goes in `attended`.
__device__ __forceinline__ float* attended_row(const Attention& args, int row) {
  const int group = args.heads / args.key_heads;
  const int64_t token = static_cast<int64_t>(blockIdx.z) * args.tokens + row / group;
  return args.attended + (token * args.heads + blockIdx.y * group + row % group) * args.head_dim;
}

// Adds the parts of all `used` splits, kRows rows at a time.
__device__ void add_parts(const Attention& args, const float* parts, int rows, int used, Shared& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = args.head_dim + 2;
  const auto part = [&](int split, int row) { return parts + (static_cast<int64_t>(split) * rows + row) * width; };
  for (int first = 0; first < rows; first += kRows) {
    const int count = rows - first < kRows ? rows - first : kRows;
    for (int i = warp; i < count; i += kWarps) {
      float* weights = shared.scores + i * kStretch;
      float most = -INFINITY, total = 0.0f;
      for (int s = lane; s < used; s += 32) {
        weights[s] = load_shared_result(part(s, first + i) + args.head_dim);
        most = weights[s] > most ? weights[s] : most;
      }
      most = warp_maximum(most);
      for (int s = lane; s < used; s += 32) {
        weights[s] = weights[s] == -INFINITY ? 0.0f : expf(weights[s] - most);
        total += weights[s] * load_shared_result(part(s, first + i) + args.head_dim + 1);
      }
      total = warp_sum(total);
      for (int s = lane; s < used; s += 32) weights[s] /= total;
    }
    __syncthreads();
    for (int at = threadIdx.x; at < count * args.head_dim; at += kThreads) {
      const int i = at / args.head_dim, channel = at % args.head_dim;
      float sum = 0.0f;
#pragma unroll 4
      for (int s = 0; s < used; ++s)
        sum += shared.scores[i * kStretch + s] * load_shared_result(part(s, first + i) + channel);
      attended_row(args, first + i)[channel] = sum;
    }
    __syncthreads();
  }
}

template <class Stored>
__global__ void __launch_bounds__(kThreads) attention_kernel(Attention args) {
  DBRXQ_SHARED(Shared, shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int split = blockIdx.x, key_head = blockIdx.y, sequence = blockIdx.z, hd = args.head_dim;
  const dbrxq_cuda_cache cache = *args.cache;
  const int past = args.past[sequence], length = past + args.tokens;
  if (past < 0 || length > cache.capacity) return;  // the host has seen to it; never write beyond the cache
  const Part part = part_of(length, args.splits, split);
  if (split >= part.used) return;
  const int64_t cache_head = static_cast<int64_t>(sequence) * args.key_heads + key_head;

  append<Stored>(args, cache, cache_head, past, part, shared.vectors[warp]);
  __syncthreads();  // the cache's new rows are there for the block

  const int group = args.heads / args.key_heads, rows = args.tokens * group;
  const int64_t first_row = cache_head * cache.capacity;
  View view;
  view.keys = static_cast<const char*>(cache.keys) + first_row * hd * Stored::kBytes;
  view.values = static_cast<const char*>(cache.values) + first_row * hd * Stored::kBytes;
  view.key_scales = Stored::kScaled ? cache.key_scales + first_row : nullptr;
  view.value_scales = Stored::kScaled ? cache.value_scales + first_row : nullptr;
  view.head_dim = hd;
  float* parts = args.partial + cache_head * args.splits * rows * (hd + 2);
  for (int first = 0; first < rows; first += kRows) {
    view.rows = rows - first < kRows ? rows - first : kRows;
#pragma unroll
    for (int i = 0; i < kRows; ++i) view.visible[i] = past + (first + i) / group + 1;
    for (int i = warp; i < view.rows; i += kWarps) {
      const int token = (first + i) / group, head = key_head * group + (first + i) % group;
      const int64_t row = static_cast<int64_t>(sequence) * args.tokens + token, turn = (past + token) * hd;
      head_vector(args, args.queries + (row * args.heads + head) * hd, args.query_norm, args.cosines + turn,
                  args.sines + turn, args.scale, shared.queries[i]);
    }
    float maximum[kRows / kWarps], sum[kRows / kWarps] = {}, sums[kRows][2] = {};
    for (float& each : maximum) each = -INFINITY;
    __syncthreads();
    for (int begin = part.first; begin < part.last; begin += kStretch) {
      const int end = begin + kStretch < part.last ? begin + kStretch : part.last;
      score<Stored>(view, begin, end, shared);
      __syncthreads();
      soften(view.rows, end - begin, maximum, sum, shared);
      __syncthreads();
      weigh<Stored>(view, begin, end, shared, sums);
      __syncthreads();
    }
#pragma unroll
    for (int n = 0; n < kRows / kWarps; ++n)
      if (lane == 0 && warp + kWarps * n < view.rows) {
        shared.maximum[warp + kWarps * n] = maximum[n];
        shared.sum[warp + kWarps * n] = sum[n];
      }
    const int pairs = hd / 2, groups = kThreads / pairs;
    const int own = threadIdx.x / pairs, pair = threadIdx.x % pairs;
    if (own < groups)
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        for (int k = 0; k < 2; ++k) shared.scores[(own * kRows + i) * hd + 2 * pair + k] = sums[i][k];
    __syncthreads();
    for (int at = threadIdx.x; at < view.rows * hd; at += kThreads) {
      const int i = at / hd, channel = at % hd;
      float out = 0.0f;
      for (int g = 0; g < groups; ++g) out += shared.scores[(g * kRows + i) * hd + channel];
      if (part.used == 1) {
        attended_row(args, first + i)[channel] = out / shared.sum[i];
      } else {
        float* to = parts + (static_cast<int64_t>(split) * rows + first + i) * (hd + 2);
        to[channel] = out;
        if (channel == 0) {
          to[hd] = shared.maximum[i];
          to[hd + 1] = shared.sum[i];
        }
      }
    }
    __syncthreads();
  }
  if (part.used == 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) shared.last = atomicAdd(args.tickets + cache_head, 1) == part.used - 1;
  __syncthreads();
  if (!shared.last) return;
  __threadfence();
  if (threadIdx.x == 0) args.tickets[cache_head] = 0;
  add_parts(args, parts, rows, part.used, shared);
}

template <class Stored>
int launch_attention(const Attention& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.splits), static_cast<unsigned>(args.key_heads),
                  static_cast<unsigned>(args.sequences));
  return launch(attention_kernel<Stored>, grid, kThreads, stream, args);
}

}  // namespace

int attention(const Attention& args, cudaStream_t stream) {
  if (args.cache_bits == 8) return launch_attention<StoredByte>(args, stream);
  if (args.dtype == DBRXQ_FLOAT32) return launch_attention<StoredFloat>(args, stream);
  if (args.dtype == DBRXQ_FLOAT16) return launch_attention<StoredHalf>(args, stream);
  return launch_attention<StoredBfloat>(args, stream);
}

int64_t attention_partial_floats(const Attention& args) {
  if (args.splits == 1) return 0;
  return static_cast<int64_t>(args.sequences) * args.splits * args.tokens * args.heads * (args.head_dim + 2);
}

}  // namespace dbrxq
