// Activations for the products: gathered into packed order, in halves, a token's exponents moved into half's range.
//
//   packed[m][unit][row][r] = half(x[token][permutation_m[32 unit + r]] * 2^e),   row_scale[token] = 2^-e
//
// so that a product's lane reads the 8 rows it owns as one 16-byte load (tile_layout.h). fp16 is taken as it is
// (e = 0). For bf16 and fp32 the token's largest magnitude goes to [2^14, 2^15): a bf16 loses nothing that is larger
// than 2^-38 of that. fp32 takes two rows a token, the second with what the first left, times 2^11: 22 bits.
// A block owns one token, kChunk packed rows and one matrix; each block finds the largest magnitude for itself.
#include "activation.cuh"
#include "few/reduce.cuh"
#include "kernels.cuh"

namespace dbrxq {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 1024;

__global__ void __launch_bounds__(kThreads) prepare_kernel(Prepare args) {
  struct Shared {
    float largest[kThreads / 32];
  };
  DBRXQ_SHARED(Shared, shared);

  const int token = blockIdx.x, chunk = blockIdx.y, matrix = blockIdx.z;
  if (token == 0 && chunk == 0 && matrix == 0)
    for (int i = threadIdx.x; i < args.ticket_count; i += kThreads) args.tickets[i] = 0;
  int64_t source = token;
  if (args.row_slot) {
    const int slot = args.row_slot[token];
    if (slot < 0) return;
    if (args.slots_a_source) source = slot / args.slots_a_source;
  }
  const void* permutation = args.only.permutation;
  if (args.tile_expert) {
    const int expert = args.tile_expert[token / args.tile_tokens];
    permutation = (matrix ? args.second : args.first)[expert].permutation;
  }

  float factor = 1.0f;
  if (args.dtype != DBRXQ_FLOAT16) {
    float largest = 0.0f;
    for (int64_t i = threadIdx.x; i < args.k; i += kThreads) {
      const float magnitude = fabsf(load(args.x, source * args.k + i, args.dtype));
      largest = magnitude > largest ? magnitude : largest;  // passes over NaNs, which stay what they are below
    }
    largest = block_maximum(largest, shared.largest);
    const int e = exponent_to_half_range(largest);
    factor = power_of_two(e);
    if (chunk == 0 && matrix == 0 && threadIdx.x == 0) args.row_scale[token] = power_of_two(-e);
  } else if (chunk == 0 && matrix == 0 && threadIdx.x == 0) {
    args.row_scale[token] = 1.0f;
  }

  const int rows = args.units * layout::kUnitRows, next = (chunk + 1) * kChunk, end = next < rows ? next : rows;
  for (int i = chunk * kChunk + threadIdx.x; i < end; i += kThreads) {
    const int channel = static_cast<const int32_t*>(permutation)[i];
    const float value = channel < 0 ? 0.0f : factor * load(args.x, source * args.k + channel, args.dtype);
    const uint16_t first = to_half(value);
    uint16_t* to = args.packed +
                   ((static_cast<int64_t>(matrix) * args.units + i / layout::kUnitRows) * args.row_capacity +
                    static_cast<int64_t>(token) * args.parts) *
                       layout::kUnitRows +
                   i % layout::kUnitRows;
    to[0] = first;
    if (args.parts == 2) to[layout::kUnitRows] = second_half(value, first);
  }
}

}  // namespace

int prepare(const Prepare& args, cudaStream_t stream) {
  const int chunks = (args.units * layout::kUnitRows + kChunk - 1) / kChunk;
  return launch(prepare_kernel, dim3(args.tokens, chunks, args.second ? 2 : 1), kThreads, stream, args);
}

}  // namespace dbrxq
