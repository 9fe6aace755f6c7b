// The next token of each sequence from its logits, so that a step can follow a step without the host. A block is a row.
//
// Greedy: the largest logit, the first of equal ones. Else by chance, among the likeliest top_k tokens and the fewest of
// them that have top_p of their chance. Distances from the largest logit become whole numbers (2^-19 a step, up to 32),
// chances whole numbers of 2^-32 of the largest: sums of them are exact, so who adds first makes no difference.
// Both limits are found digit by digit: a histogram of a digit's values, of counts or of chances.
#include "../few/reduce.cuh"
#include "decoder.cuh"

namespace dbrxq {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kBins = 256;
constexpr int kDigits = 3;
constexpr int kFarthest = (1 << 24) - 1;
constexpr float kStepsPerUnit = 524288.0f;

using Count = unsigned long long;

struct Shared {
  Count bins[kBins];
  float box[kWarps];
  Count left;  // of the amount that is looked for
  int bin;
};

// One row of logits against its largest.
struct Chances {
  const float* logits;
  int64_t count;
  float largest, inverse;  // of the logits; of the temperature

  __device__ __forceinline__ float below(int64_t i) const {  // how far token i is below the largest, in units of chance
    const float difference = (largest - logits[i]) * inverse;
    return difference >= 0.0f ? difference : INFINITY;  // a NaN is no token
  }
  __device__ __forceinline__ int distance(int64_t i) const {
    const float steps = below(i) * kStepsPerUnit;
    return steps < static_cast<float>(kFarthest) ? static_cast<int>(steps) : kFarthest;
  }
  __device__ __forceinline__ Count chance(int64_t i) const {
    return static_cast<Count>(expf(-below(i)) * 4294967296.0f);
  }
};

// Finds the bin in which the sum of the bins, from the first on, comes to `amount`; leaves in `left` what is missing before
// it. All threads; the bins are theirs again afterwards.
__device__ void find_bin(Count amount, Shared& shared) {
  __syncthreads();
  if (threadIdx.x == 0) {
    int bin = 0;
    for (; bin < kBins - 1 && shared.bins[bin] < amount; ++bin) amount -= shared.bins[bin];
    shared.bin = bin;
    shared.left = amount;
  }
  __syncthreads();
}

__device__ __forceinline__ void clear_bins(Shared& shared) {
  for (int i = threadIdx.x; i < kBins; i += kThreads) shared.bins[i] = 0;
  __syncthreads();
}

// The least distance within which tokens up to `most` far come to `amount`, each for what `worth` says.
template <class Worth>
__device__ int limit_for(const Chances& row, Count amount, int most, Worth&& worth, Shared& shared) {
  int prefix = 0;
  for (int digit = kDigits - 1; digit >= 0; --digit) {
    clear_bins(shared);
    for (int64_t i = threadIdx.x; i < row.count; i += kThreads) {
      const int distance = row.distance(i);
      if (distance > most || (distance >> (8 * (digit + 1))) != prefix) continue;
      atomicAdd(shared.bins + (distance >> (8 * digit) & (kBins - 1)), worth(i));
    }
    find_bin(amount, shared);
    prefix = prefix << 8 | shared.bin;
    amount = shared.left;
    __syncthreads();
  }
  return prefix;
}

// The sum of the chances of tokens up to `most` far.
__device__ Count total_chance(const Chances& row, int most, Shared& shared) {
  clear_bins(shared);
  for (int64_t i = threadIdx.x; i < row.count; i += kThreads)
    if (row.distance(i) <= most) atomicAdd(shared.bins + threadIdx.x % kBins, row.chance(i));
  __syncthreads();
  Count sum = 0;
  for (int i = 0; i < kBins; ++i) sum += shared.bins[i];
  __syncthreads();
  return sum;
}

// A number that looks random, a different one for each seed, sequence and position (splitmix64 of them).
__device__ __forceinline__ Count scramble(Count value) {
  value += 0x9e3779b97f4a7c15ull;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9ull;
  value = (value ^ (value >> 27)) * 0x94d049bb133111ebull;
  return value ^ (value >> 31);
}

// The token at which the chances of those up to `most` far, added in the order of the vocabulary, exceed `target`.
__device__ int64_t token_at(const Chances& row, Count target, int most, Shared& shared) {
  int64_t begin = 0, size = row.count;
  while (size > 1) {
    const int64_t part = (size + kBins - 1) / kBins;
    clear_bins(shared);
    for (int64_t i = threadIdx.x; i < size && begin + i < row.count; i += kThreads)
      if (row.distance(begin + i) <= most) atomicAdd(shared.bins + i / part, row.chance(begin + i));
    find_bin(target + 1, shared);
    begin += shared.bin * part;
    target = shared.left - 1;
    size = part;
    __syncthreads();
  }
  return begin;
}

__device__ float largest_of(const float* logits, int64_t count, Shared& shared) {
  float largest = -INFINITY;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) largest = logits[i] > largest ? logits[i] : largest;
  return block_maximum(largest, shared.box);
}

// The first token that has the largest logit; 0 if none is a number.
__device__ int64_t greedy(const float* logits, int64_t count, float largest, Shared& shared) {
  float first = -INFINITY;  // minus the index: exact below 2^24
  for (int64_t i = threadIdx.x; i < count; i += kThreads)
    if (logits[i] == largest && -static_cast<float>(i) > first) first = -static_cast<float>(i);
  first = block_maximum(first, shared.box);
  return first == -INFINITY ? 0 : static_cast<int64_t>(-first);
}

__device__ int64_t by_chance(const Chances& row, const dbrxq_cuda_sampling& how, Count random, Shared& shared) {
  int most = kFarthest;
  if (how.top_k > 0 && how.top_k < row.count)
    most = limit_for(row, static_cast<Count>(how.top_k), most, [](int64_t) { return Count(1); }, shared);
  Count total = total_chance(row, most, shared);
  if (how.top_p < 1.0f) {
    const Count wanted = static_cast<Count>(static_cast<double>(how.top_p) * static_cast<double>(total));
    most = limit_for(row, wanted > 0 ? wanted : 1, most, [&](int64_t i) { return row.chance(i); }, shared);
    total = total_chance(row, most, shared);
  }
  const double share = static_cast<double>(random >> 11) / 9007199254740992.0;
  const Count target = static_cast<Count>(share * static_cast<double>(total));
  return token_at(row, target < total ? target : total - 1, most, shared);
}

__global__ void __launch_bounds__(kThreads) sample_kernel(Sample args) {
  DBRXQ_SHARED(Shared, shared);
  const int sequence = blockIdx.x;
  const float* logits = args.logits + sequence * args.vocabulary;
  const dbrxq_cuda_sampling how = *args.sampling;
  const int past = args.past[sequence];
  const float largest = largest_of(logits, args.vocabulary, shared);
  int64_t token;
  if (how.temperature > 0.0f && largest - largest == 0.0f) {
    const Chances row = {logits, args.vocabulary, largest, 1.0f / how.temperature};
    const Count place = static_cast<Count>(past) << 8 | static_cast<Count>(sequence);
    token = by_chance(row, how, scramble(scramble(how.seed) ^ place), shared);
  } else {
    token = greedy(logits, args.vocabulary, largest, shared);
  }
  __syncthreads();  // all have read `past`
  if (threadIdx.x != 0) return;
  args.tokens[sequence] = token;
  args.past[sequence] = past + 1;
  const int made = args.made[sequence];
  if (made < args.room) {
    args.generated[sequence * args.room + made] = token;
    args.made[sequence] = made + 1;
  }
}

}  // namespace

int sample(const Sample& args, cudaStream_t stream) {
  return launch(sample_kernel, dim3(static_cast<unsigned>(args.sequences)), kThreads, stream, args);
}

}  // namespace dbrxq
