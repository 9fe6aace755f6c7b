// The kernels of few.cuh: one walk over the work of a launch, three ways to list it and to finish its groups.
//
// A block takes its share of the words (work.cuh) piece by piece. Its warps divide a piece by equal words; each gathers
// activations for its next units (rows.cuh) while words are on their way into registers, decodes and multiplies them on
// the tensor cores (decode.cuh). The four sums are added in the order of the warps into the panel of the group.
#include "kernels.cuh"
#include "stream.cuh"
#include "tasks.cuh"

namespace dbrxq {
namespace {

constexpr int kColumns = tile::kColumns;

// A warp's sums of the rows in use into its box [rows, kBoxStride], four columns at a time.
__device__ __forceinline__ void store_box(const Sums<1>& sums, int rows, float* box) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (2 * q + j >= rows) continue;
    float* to = box + (2 * q + j) * kBoxStride + tile::kLaneColumns * g;
#pragma unroll
    for (int s = 0; s < tile::kSubtiles; ++s)
      *reinterpret_cast<uint4*>(to + tile::kSubtileColumns * s) =
          make_uint4(bits_of(sums[s][0][0][j]), bits_of(sums[s][0][0][2 + j]), bits_of(sums[s][1][0][j]),
                     bits_of(sums[s][1][0][2 + j]));
  }
}

// What the share has of piece `index` of the group, added to its panel. All threads of the block.
template <bool Folded, class Task, class S>
__device__ void add_piece(const Task& args, int index, S& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tile = shared.group.tile;
  const Piece& piece = shared.work.pieces[shared.group.item.first_piece + index];
  const int from = shared.group.from - piece.offset, to = shared.group.to - piece.offset;
  const int begin = from > 0 ? from : 0, words = (to < piece.words ? to : piece.words) - begin;
  if (words <= 0) return;
  __syncthreads();  // nobody reads the piece before
  if (threadIdx.x == 0) {
    copy_linear(args, piece.linear, index, shared.linear);
    shared.tokens_in_use = piece.rows;
  }
  set_rows(args, piece, shared);
  __syncthreads();
  const Linear& linear = shared.linear;
  const FewInput input = input_of(args);
  if (lane < tile::kWidthCount) {
    const Slice slice = {unit_at_word(linear.first_unit, begin + words * warp / kFewWarps),
                         unit_at_word(linear.first_unit, begin + words * (warp + 1) / kFewWarps)};
    shared.warps[warp].ranges[lane] = range_of(linear.first_unit, slice, lane);
  }
  if (lane == 0) shared.warps[warp].stride = staged_stride(piece.rows * input.parts);
  warp_barrier();
  const int reads = reading_lane(lane, lanes_in_tile(linear.n, tile));
  const Lane reader = {static_cast<const uint4*>(linear.words) + static_cast<int64_t>(tile) * 32 + reads,
                       static_cast<int>(linear.n / 4), tile * 8 + reads / 4};
  Sums<1> sums = {};
  stream_widths<0, Folded>(input, reader, shared, sums);
  __syncthreads();  // the boxes lie where the activations were
  store_box(sums, piece.rows * input.parts, shared.box[warp]);
  __syncthreads();
  for (int r = 0; r < piece.rows; ++r) {
    float sum = 0.0f, second = 0.0f;
#pragma unroll
    for (int w = 0; w < kFewWarps; ++w) {
      const float* at = shared.box[w] + r * input.parts * kBoxStride + threadIdx.x;
      sum += at[0];
      if (input.parts == 2) second += at[kBoxStride];
    }
    if (input.parts == 2) sum += kSecondPart * second;
    const Target target = target_of(args, shared.work, piece, index, r);
    shared.panels[target.panel][target.row][threadIdx.x] += target.factor * (sum * shared.rows[r].back);
  }
}

struct Places {
  int32_t* tickets;  // [blocks], zero between launches
  float* partial;    // [blocks, 2, panels, 8, 128]
};

// The parts of the group into its panels, if this block is the last to come.
template <int Panels, class S>
__device__ bool is_whole(const Places& places, int rows, S& shared) {
  constexpr int kPanel = kFewRows * kColumns;
  const Group& group = shared.group;
  const int count = group.count, first = group.first, block = static_cast<int>(blockIdx.x);
  if (count == 1) return true;
  const auto part = [&](int of) {  // in the first block's second place, where it ends in the group
    const int64_t place = 2 * of + (of == first ? group.place : 0);
    return places.partial + place * Panels * kPanel + threadIdx.x;
  };
  float* own = part(block);
#pragma unroll
  for (int p = 0; p < Panels; ++p)
    for (int r = 0; r < rows; ++r) own[p * kPanel + r * kColumns] = shared.panels[p][r][threadIdx.x];
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.last = atomicAdd(places.tickets + first, 1) == count - 1;
    if (shared.last) places.tickets[first] = 0;
  }
  __syncthreads();
  if (!shared.last) return false;
  __threadfence();
  const float* begins = part(first);
  const float* second = part(first + 1);
#pragma unroll
  for (int p = 0; p < Panels; ++p)
    for (int r = 0; r < rows; ++r) {
      const int at = p * kPanel + r * kColumns;
      float sum = load_shared_result(begins + at);
#pragma unroll 4
      for (int b = 1; b < count; ++b)  // loads of several blocks are under way
        sum += load_shared_result(second + static_cast<int64_t>(2 * (b - 1)) * Panels * kPanel + at);
      shared.panels[p][r][threadIdx.x] = sum;
    }
  return true;
}

template <int Panels, class S>
__device__ __forceinline__ void clear_panels(int rows, S& shared) {
#pragma unroll
  for (int p = 0; p < Panels; ++p)
    for (int r = 0; r < rows; ++r) shared.panels[p][r][threadIdx.x] = 0.0f;
}

template <class Task, bool Folded>
__global__ void __launch_bounds__(kFewThreads, blocks_together(kFewRows)) few_kernel(Task args, Places places) {
  DBRXQ_SHARED(FewShared<kPanels<Task>>, shared);
  measure_tokens(args, shared);
  choose_experts(args, shared);
  list_work(args, shared.work);
  if (shared.work.total == 0) {  // no expert at all
    const Item none = {0, 0, 0, 0, 0};
    for (int tile = blockIdx.x; tile < shared.work.items[0].tiles; tile += gridDim.x) {
      clear_panels<kPanels<Task>>(panel_rows(args, shared.work, none), shared);
      finish(args, none, tile, shared);
    }
    return;
  }
  const auto shares = [&]() { return Shares{shared.work.total, blocks_for(shared.work.total, gridDim.x)}; };
  const int block = static_cast<int>(blockIdx.x);
  if (block >= shares().blocks) return;
  if (threadIdx.x == 0)
    find_group(shared.work, shares(), shares().begin(block), shares().begin(block + 1), shared.group);
  __syncthreads();
  while (shared.group.from < shared.group.to) {
    clear_panels<kPanels<Task>>(panel_rows(args, shared.work, shared.group.item), shared);
    for (int p = 0; p < shared.group.item.pieces; ++p) add_piece<Folded>(args, p, shared);
    if (is_whole<kPanels<Task>>(places, panel_rows(args, shared.work, shared.group.item), shared))
      finish(args, shared.group.item, shared.group.tile, shared);
    __syncthreads();  // nobody reads the group
    if (threadIdx.x == 0)
      find_group(shared.work, shares(), shared.group.begin + shared.group.to, shares().begin(block + 1), shared.group);
    __syncthreads();
  }
}

// ---- Launches ---------------------------------------------------------------------------------------------------

int places_at_once(int* blocks) {
  const int error = multiprocessors(blocks);
  *blocks *= blocks_together(kFewRows);
  return error;
}

int64_t ticket_bytes(int blocks) { return (blocks * static_cast<int64_t>(sizeof(int32_t)) + 255) / 256 * 256; }

// most: bound of the work, in word rows of a column tile.
template <class Task>
int launch_few(const Task& args, int folded, int64_t most, cudaStream_t stream) {
  int blocks;
  const int error = places_at_once(&blocks);
  if (error != 0) return error;
  char* workspace = static_cast<char*>(args.workspace);
  const Places places = {reinterpret_cast<int32_t*>(workspace),
                         reinterpret_cast<float*>(workspace + ticket_bytes(blocks))};
  const dim3 grid(static_cast<unsigned>(blocks_for(most, blocks)));
  if (folded) return launch(few_kernel<Task, true>, grid, kFewThreads, stream, args, places);
  return launch(few_kernel<Task, false>, grid, kFewThreads, stream, args, places);
}

// Experts may have any widths: 8 bits bound them.
int64_t most_words(const FewRouting& routing, int64_t k, int64_t n) {
  return column_tiles(n) * routing.tokens * routing.active * unit_count(k) * 8;
}

}  // namespace

int few_linears(const FewLinears& args, cudaStream_t stream) {
  int64_t words = 0;
  for (int i = 0; i < args.count; ++i) words += column_tiles(args.linears[i].n) * word_rows(args.linears[i].first_unit);
  return launch_few(args, args.input.folded, words, stream);
}

int few_gate_up(const FewGateUp& args, cudaStream_t stream) {
  return launch_few(args, args.input.folded, 2 * most_words(args.routing, args.input.k, args.ffn), stream);
}

int few_down(const FewDown& args, cudaStream_t stream) {
  return launch_few(args, args.folded, most_words(args.routing, args.ffn, args.hidden), stream);
}

int few_workspace(int64_t* bytes) {
  int blocks;
  const int error = places_at_once(&blocks);
  *bytes = ticket_bytes(blocks) + static_cast<int64_t>(blocks) * 2 * 2 * kFewRows * kColumns * sizeof(float);
  return error;
}

int few_clear(void* workspace, cudaStream_t stream) {
  int blocks;
  const int error = places_at_once(&blocks);
  return error ? error : clear_memory(workspace, ticket_bytes(blocks), stream);
}

}  // namespace dbrxq
