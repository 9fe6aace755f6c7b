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

// Word rows [begin, end) of piece `index` of a group, in column tile `tile`, added to its panel. All threads of the block.
template <class Task, class S>
__device__ void add_piece(const Task& args, const Item& item, int index, int tile, int begin, int end, S& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Piece piece = shared.work.pieces[item.first_piece + index];
  __syncthreads();  // nobody reads the piece before
  if (threadIdx.x == 0) copy_linear(args, piece.linear, index, shared.linear);
  set_rows(args, piece, shared);
  __syncthreads();
  const Linear& linear = shared.linear;
  const FewInput input = input_of(args);
  if (lane < tile::kWidthCount) {
    const int words = end - begin;
    const Slice slice = {unit_at_word(linear.first_unit, begin + words * warp / kFewWarps),
                         unit_at_word(linear.first_unit, begin + words * (warp + 1) / kFewWarps)};
    shared.ranges[warp][lane] = range_of(linear.first_unit, slice, lane);
  }
  warp_barrier();
  const int rows = piece.rows * input.parts, reads = reading_lane(lane, lanes_in_tile(linear.n, tile));
  const Lane from = {static_cast<const uint4*>(linear.words) + static_cast<int64_t>(tile) * 32 + reads,
                     static_cast<int>(linear.n / 4),
                     static_cast<const uint2*>(linear.scale_codes) + static_cast<int64_t>(tile) * 8 + reads / 4,
                     static_cast<const uint32_t*>(linear.unit_scale),
                     static_cast<const int32_t*>(linear.permutation),
                     piece.rows,
                     rows,
                     lane / 4 < rows ? lane / 4 : rows - 1,
                     shared.rows,
                     shared.staged[warp]};
  Sums<1> sums = {};
  stream_widths<0>(input, from, shared.ranges[warp], sums);
  __syncthreads();  // the boxes lie where the activations were
  store_box(sums, rows, shared.box[warp]);
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

// The parts of a group that begins at `begin` into its panels, if this block is the last to come.
template <int Panels, class S>
__device__ bool is_whole(const Places& places, const Shares& shares, int64_t begin, int64_t end, int rows, S& shared) {
  constexpr int kPanel = kFewRows * kColumns;
  const int first = shares.block_at(begin), count = shares.block_at(end - 1) - first + 1;
  if (count == 1) return true;
  const auto part = [&](int block) {  // of a block's two places the second where it ends in the group
    const int place = shares.begin(block) < begin ? 1 : 0;
    return places.partial + static_cast<int64_t>(2 * block + place) * Panels * kPanel + threadIdx.x;
  };
  float* own = part(blockIdx.x);
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
  const float* goes_on = places.partial + static_cast<int64_t>(2 * first) * Panels * kPanel + threadIdx.x;
#pragma unroll
  for (int p = 0; p < Panels; ++p)
    for (int r = 0; r < rows; ++r) {
      const int at = p * kPanel + r * kColumns;
      float sum = load_shared_result(begins + at);
#pragma unroll 4
      for (int b = 1; b < count; ++b)  // loads of several blocks are under way
        sum += load_shared_result(goes_on + static_cast<int64_t>(2 * b) * Panels * kPanel + at);
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

template <class Task>
__global__ void __launch_bounds__(kFewThreads, blocks_together(kFewRows)) few_kernel(Task args, Places places) {
  DBRXQ_SHARED(FewShared<kPanels<Task>>, shared);
  measure_tokens(args, shared);
  choose_experts(args, shared);
  list_work(args, shared.work);
  const Shares shares = {shared.work.total, blocks_for(shared.work.total, static_cast<int>(gridDim.x))};
  const int block = static_cast<int>(blockIdx.x);
  if (shares.total == 0) {  // no expert at all
    const Item none = {0, 0, 0, 0, 0};
    const int rows = panel_rows(args, shared.work, none);
    for (int tile = block; tile < shared.work.items[0].tiles; tile += gridDim.x) {
      clear_panels<kPanels<Task>>(rows, shared);
      finish(args, none, tile, shared);
    }
    return;
  }
  if (block >= shares.blocks) return;
  const int64_t end = shares.begin(block + 1);
  int number = 0;
  for (int64_t at = shares.begin(block); at < end;) {
    while (number + 1 < shared.work.item_count && at >= shared.work.items[number + 1].start) ++number;
    const Item item = shared.work.items[number];
    const int tile = static_cast<int>((at - item.start) / item.words);
    const int64_t begin = item.start + static_cast<int64_t>(tile) * item.words;
    const int from = static_cast<int>(at - begin),
              to = static_cast<int>(end - begin < item.words ? end - begin : item.words);
    const int rows = panel_rows(args, shared.work, item);
    clear_panels<kPanels<Task>>(rows, shared);
    for (int p = 0; p < item.pieces; ++p) {
      const Piece& piece = shared.work.pieces[item.first_piece + p];
      const int first = from > piece.offset ? from - piece.offset : 0;
      const int last = to - piece.offset < piece.words ? to - piece.offset : piece.words;
      if (first < last) add_piece(args, item, p, tile, first, last, shared);
    }
    if (is_whole<kPanels<Task>>(places, shares, begin, begin + item.words, rows, shared))
      finish(args, item, tile, shared);
    at = begin + to;
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
int launch_few(const Task& args, int64_t most, cudaStream_t stream) {
  int blocks;
  const int error = places_at_once(&blocks);
  if (error != 0) return error;
  char* workspace = static_cast<char*>(args.workspace);
  const Places places = {reinterpret_cast<int32_t*>(workspace),
                         reinterpret_cast<float*>(workspace + ticket_bytes(blocks))};
  const dim3 grid(static_cast<unsigned>(blocks_for(most, blocks)));
  return launch(few_kernel<Task>, grid, kFewThreads, stream, args, places);
}

// Experts may have any widths: 8 bits bound them.
int64_t most_words(const FewRouting& routing, int64_t k, int64_t n) {
  return column_tiles(n) * routing.tokens * routing.active * unit_count(k) * 8;
}

}  // namespace

int few_linears(const FewLinears& args, cudaStream_t stream) {
  int64_t words = 0;
  for (int i = 0; i < args.count; ++i) words += column_tiles(args.linears[i].n) * word_rows(args.linears[i].first_unit);
  return launch_few(args, words, stream);
}

int few_gate_up(const FewGateUp& args, cudaStream_t stream) {
  return launch_few(args, 2 * most_words(args.routing, args.input.k, args.ffn), stream);
}

int few_down(const FewDown& args, cudaStream_t stream) {
  return launch_few(args, most_words(args.routing, args.ffn, args.hidden), stream);
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
