// The C ABI of the CUDA library (dbrxq.h): which kernels run, in what grids, and where in the workspace they write.
//
// A plan is made twice by the same code: once on a null workspace to measure it, once to run.
#include <initializer_list>

#include "kernels.cuh"

namespace dbrxq {
namespace {

constexpr int kErrorBase = 1000;     // statuses above are 1000 + cudaError_t
constexpr int64_t kMaxRows = 65536;  // input channels; the format's permutations are 16-bit

int status_of(int error) { return error == 0 ? DBRXQ_OK : kErrorBase + error; }

// Hands out pieces of the workspace, each aligned to 256 bytes.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    const int64_t at = used;
    used += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return base ? reinterpret_cast<T*>(base + at) : nullptr;
  }
};

int parts_of(int dtype) { return dtype == DBRXQ_FLOAT32 ? 2 : 1; }

bool is_dtype(int dtype) { return dtype == DBRXQ_FLOAT16 || dtype == DBRXQ_BFLOAT16 || dtype == DBRXQ_FLOAT32; }

bool is_linear(const Linear& linear) {
  bool ordered = linear.first_unit[0] == 0 && linear.first_unit[6] == linear.units;
  for (int i = 0; i < 6; ++i) ordered = ordered && linear.first_unit[i] <= linear.first_unit[i + 1];
  return ordered && linear.k >= 1 && linear.k <= kMaxRows && linear.k % layout::kTailRows == 0 &&
         linear.units == unit_count(linear.k) && linear.n >= 1 && linear.n % layout::kColumnMultiple == 0 &&
         linear.out_features >= 1 && linear.out_features <= linear.n;
}

// Splits that give every multiprocessor its blocks, if there are input channels enough.
int choose_splits(int64_t blocks, int units, int least_units, int places) {
  const int64_t wanted = places / (blocks > 0 ? blocks : 1);
  const int64_t most = units / least_units;
  const int64_t splits = wanted < most ? wanted : most;
  return splits < 1 ? 1 : static_cast<int>(splits);
}

// Rows of a tile: as few as hold a typical load, 64 for the matrix-matrix kernel.
int tile_rows_for(int64_t rows) { return rows <= 8 ? 8 : rows <= 16 ? 16 : kGemmRows; }

// The grid of a product and what its splits need.
Grid plan_product(Matmul& product, Arena& arena, int64_t n, int units, int row_tiles, int tile_rows, bool gated,
                  int processors, int& ticket_count) {
  Grid grid{static_cast<int>(column_tiles(n)), row_tiles, 1};
  const bool many = tile_rows == kGemmRows;
  const int64_t blocks = static_cast<int64_t>(row_tiles) *
                         (many && !gated ? (grid.column_tiles + 1) / 2 : grid.column_tiles);
  // A block of gemv has 4 slices (gated: 2) of 4 units at least.
  grid.splits = choose_splits(blocks, units, many || gated ? 8 : 16, processors * blocks_together(tile_rows));
  product.splits = grid.splits;
  ticket_count = 0;
  if (grid.splits > 1) {
    ticket_count = many ? gemm_groups(gated, grid) : grid.column_tiles * row_tiles;
    product.partial =
        arena.take<float>(many ? gemm_partial_floats(gated, grid) : gemv_partial_floats(tile_rows, gated, grid));
    product.tickets = arena.take<int32_t>(ticket_count);
  }
  return grid;
}

int run_product(const Matmul& product, int tile_rows, bool gated, Grid grid, cudaStream_t stream) {
  return tile_rows == kGemmRows ? gemm(product, gated, grid, stream) : gemv(product, tile_rows, gated, grid, stream);
}

// ---- One linear -------------------------------------------------------------------------------------------------

struct LinearPlan {
  Prepare prepare = {};
  Matmul product = {};
  int tile_rows = 0;
  Grid grid = {};
};

int plan_linear(const Linear& linear, int64_t tokens, int dtype, Arena& arena, LinearPlan& plan) {
  int processors;
  const int error = multiprocessors(&processors);
  if (error != 0) return status_of(error);
  const int parts = parts_of(dtype), units = static_cast<int>(linear.units);
  const int64_t rows = tokens * parts;
  plan.tile_rows = tile_rows_for(rows);
  const int row_tiles = static_cast<int>((rows + plan.tile_rows - 1) / plan.tile_rows);
  Matmul& product = plan.product;
  product.only = linear;
  const int64_t capacity = static_cast<int64_t>(row_tiles) * plan.tile_rows;
  product.x_stride = static_cast<int>(capacity * 4);
  product.rows = static_cast<int>(rows);
  product.parts = parts;
  product.dtype = dtype;
  product.width = linear.out_features;
  Prepare& prepare = plan.prepare;
  prepare.dtype = dtype;
  prepare.k = linear.k;
  prepare.units = units;
  prepare.parts = parts;
  prepare.only = linear;
  prepare.row_capacity = capacity;
  prepare.tokens = static_cast<int>(tokens);
  prepare.packed = arena.take<uint16_t>(capacity * units * layout::kUnitRows);
  prepare.row_scale = arena.take<float>(tokens);
  plan.grid =
      plan_product(product, arena, linear.n, units, row_tiles, plan.tile_rows, false, processors, prepare.ticket_count);
  prepare.tickets = product.tickets;
  product.x = prepare.packed;
  product.row_scale = prepare.row_scale;
  return DBRXQ_OK;
}

// ---- Few rows: one launch for everything (few/few.cuh) ----------------------------------------------------------

bool is_few(int64_t tokens, int64_t active, int dtype) {
  return tokens * parts_of(dtype) <= kFewRows && active <= kFewSlots && tokens * active <= kFewSlots;
}

FewInput input_of(const void* x, int64_t k, int64_t tokens, int dtype) {
  FewInput input = {};
  input.x = x;
  input.k = k;
  input.tokens = static_cast<int>(tokens);
  input.dtype = dtype;
  input.parts = parts_of(dtype);
  return input;
}

FewResult result_of(void* y, int64_t stride, int dtype) {
  FewResult result = {};
  result.y = y;
  result.stride = stride;
  result.dtype = dtype;
  return result;
}

// The workspace of few.cuh at the front of an arena.
int take_few_workspace(Arena& arena, void** workspace) {
  int64_t bytes;
  const int error = few_workspace(&bytes);
  *workspace = arena.take<char>(bytes);
  return status_of(error);
}

int run_few_linear(const Linear& linear, const void* x, int64_t tokens, int dtype, void* y, void* workspace,
                   cudaStream_t stream) {
  FewLinears args = {};
  args.input = input_of(x, linear.k, tokens, dtype);
  args.linears[0] = linear;
  args.results[0] = result_of(y, linear.out_features, dtype);
  args.count = 1;
  args.workspace = workspace;
  const int error = few_clear(workspace, stream);
  return status_of(error == 0 ? few_linears(args, stream) : error);
}

struct FewExpertsPlan {
  FewGateUp gate_up = {};
  FewDown down = {};
};

int plan_few_experts(const dbrxq_cuda_experts& block, int64_t tokens, int64_t active, int dtype, Arena& arena,
                     FewExpertsPlan& plan) {
  FewGateUp& gate_up = plan.gate_up;
  const int status = take_few_workspace(arena, &gate_up.workspace);
  gate_up.input = input_of(nullptr, block.hidden, tokens, dtype);
  gate_up.routing.index_bytes = sizeof(int64_t);
  gate_up.routing.tokens = static_cast<int>(tokens);
  gate_up.routing.active = static_cast<int>(active);
  gate_up.routing.experts = static_cast<int>(block.experts);
  gate_up.gate = block.gate;
  gate_up.up = block.up;
  gate_up.ffn = block.ffn;
  gate_up.activation = block.activation;
  gate_up.inner = arena.take<float>(tokens * active * block.ffn);
  gate_up.largest = arena.take<float>(tokens * active * column_tiles(block.ffn));
  FewDown& down = plan.down;
  down.routing = gate_up.routing;
  down.down = block.down;
  down.ffn = block.ffn;
  down.hidden = block.hidden;
  down.parts = parts_of(dtype);
  down.inner = gate_up.inner;
  down.largest = gate_up.largest;
  down.result = result_of(nullptr, block.hidden, dtype);
  down.workspace = gate_up.workspace;
  return status;
}

// ---- The experts of a block -------------------------------------------------------------------------------------

using Experts = dbrxq_cuda_experts;

struct ExpertsPlan {
  Route route = {};
  Prepare prepare_x = {}, prepare_inner = {};
  Matmul gate_up = {}, down = {};
  int tile_rows = 0;
  Grid grid_gate_up = {}, grid_down = {};
  Combine combine = {};
};

int plan_experts(const Experts& block, int64_t tokens, int64_t active, int dtype, Arena& arena, ExpertsPlan& plan) {
  int processors;
  const int error = multiprocessors(&processors);
  if (error != 0) return status_of(error);
  const int parts = parts_of(dtype), slots = static_cast<int>(tokens * active);
  const int experts = static_cast<int>(block.experts);
  // The mean of rows an expert, and half as much again: few experts then need a second tile.
  plan.tile_rows = tile_rows_for((3 * static_cast<int64_t>(slots) * parts / experts + 1) / 2);
  const int tile_tokens = plan.tile_rows / parts;
  const int used = experts < slots ? experts : slots;  // experts with tokens, at most
  const int row_tiles = (slots + used * (tile_tokens - 1)) / tile_tokens;
  const int64_t rows = static_cast<int64_t>(row_tiles) * tile_tokens, capacity = rows * parts;
  const int units_x = unit_count(block.hidden), units_inner = unit_count(block.ffn);

  Route& route = plan.route;
  route.slots = slots;
  route.experts = experts;
  route.tile_tokens = tile_tokens;
  route.parts = parts;
  route.row_tiles = row_tiles;
  route.tile_expert = arena.take<int32_t>(row_tiles);
  route.tile_rows = arena.take<int32_t>(row_tiles);
  route.row_slot = arena.take<int32_t>(rows);
  route.slot_row = arena.take<int32_t>(slots);

  const auto prepare_for = [&](Prepare& prepare, int64_t k, int units, int matrices) {
    prepare.k = k;
    prepare.units = units;
    prepare.parts = parts;
    prepare.tile_expert = route.tile_expert;
    prepare.row_slot = route.row_slot;
    prepare.tile_tokens = tile_tokens;
    prepare.row_capacity = capacity;
    prepare.tokens = static_cast<int>(rows);
    prepare.packed = arena.take<uint16_t>(matrices * capacity * units * layout::kUnitRows);
    prepare.row_scale = arena.take<float>(rows);
  };
  prepare_for(plan.prepare_x, block.hidden, units_x, 2);
  plan.prepare_x.dtype = dtype;
  plan.prepare_x.first = block.gate;
  plan.prepare_x.second = block.up;
  plan.prepare_x.slots_a_source = static_cast<int>(active);
  prepare_for(plan.prepare_inner, block.ffn, units_inner, 1);
  plan.prepare_inner.dtype = DBRXQ_FLOAT32;
  plan.prepare_inner.first = block.down;
  float* inner = arena.take<float>(rows * block.ffn);
  float* outputs = arena.take<float>(rows * block.hidden);
  plan.prepare_inner.x = inner;

  const auto product_of = [&](Matmul& product, Prepare& prepare, float* y, int64_t width, bool gated) {
    product.tile_expert = route.tile_expert;
    product.tile_rows = route.tile_rows;
    product.x = prepare.packed;
    product.row_scale = prepare.row_scale;
    product.x_stride = static_cast<int>(capacity * 4);
    product.parts = parts;
    product.activation = block.activation;
    product.dtype = DBRXQ_FLOAT32;
    product.y = y;
    product.width = width;
    const Grid grid = plan_product(product, arena, width, prepare.units, row_tiles, plan.tile_rows, gated, processors,
                                   prepare.ticket_count);
    prepare.tickets = product.tickets;
    return grid;
  };
  plan.gate_up.first = block.gate;
  plan.gate_up.second = block.up;
  plan.grid_gate_up = product_of(plan.gate_up, plan.prepare_x, inner, block.ffn, true);
  plan.down.first = block.down;
  plan.grid_down = product_of(plan.down, plan.prepare_inner, outputs, block.hidden, false);

  plan.combine.outputs = outputs;
  plan.combine.slot_row = route.slot_row;
  plan.combine.tokens = tokens;
  plan.combine.active = active;
  plan.combine.hidden = block.hidden;
  plan.combine.dtype = dtype;
  return DBRXQ_OK;
}

int check_experts(const Experts& block, int64_t tokens, int64_t active, int dtype) {
  if (tokens < 0 || active < 1 || !is_dtype(dtype) || block.experts < 1 || block.experts > 1024) return DBRXQ_BAD_SHAPE;
  for (int64_t channels : {block.hidden, block.ffn})
    if (channels < 1 || channels > kMaxRows || channels % layout::kTailRows != 0) return DBRXQ_BAD_SHAPE;
  if (block.activation < DBRXQ_SILU || block.activation > DBRXQ_RELU) return DBRXQ_BAD_ACTIVATION;
  return active * (tokens < kPassTokens ? tokens : kPassTokens) > (1 << 20) ? DBRXQ_BAD_SHAPE : DBRXQ_OK;
}

int run_experts(const Experts& block, const char* x, const int64_t* top_k_index, const float* top_k_weights,
                int64_t tokens, int64_t active, int dtype, char* y, char* workspace, cudaStream_t stream) {
  Arena arena{workspace};
  if (is_few(tokens, active, dtype)) {
    FewExpertsPlan plan;
    const int status = plan_few_experts(block, tokens, active, dtype, arena, plan);
    if (status != DBRXQ_OK) return status;
    plan.gate_up.input.x = x;
    plan.gate_up.routing.top_k_index = plan.down.routing.top_k_index = top_k_index;
    plan.down.routing.top_k_weights = top_k_weights;
    plan.down.result.y = y;
    int error = few_clear(plan.gate_up.workspace, stream);
    if (error == 0) error = few_gate_up(plan.gate_up, stream);
    if (error == 0) error = few_down(plan.down, stream);
    return status_of(error);
  }
  ExpertsPlan plan;
  const int status = plan_experts(block, tokens, active, dtype, arena, plan);
  if (status != DBRXQ_OK) return status;
  plan.route.top_k_index = top_k_index;
  plan.prepare_x.x = x;
  plan.combine.top_k_weights = top_k_weights;
  plan.combine.y = y;
  int error = route(plan.route, stream);
  if (error == 0) error = prepare(plan.prepare_x, stream);
  if (error == 0) error = run_product(plan.gate_up, plan.tile_rows, true, plan.grid_gate_up, stream);
  if (error == 0) error = prepare(plan.prepare_inner, stream);
  if (error == 0) error = run_product(plan.down, plan.tile_rows, false, plan.grid_down, stream);
  if (error == 0) error = combine(plan.combine, stream);
  return status_of(error);
}

}  // namespace
}  // namespace dbrxq

using namespace dbrxq;

int dbrxq_cuda_abi_version(void) { return DBRXQ_ABI_VERSION; }

const char* dbrxq_cuda_status_text(int status) {
  if (status == DBRXQ_OK) return "no error";
  if (status == DBRXQ_BAD_SHAPE) return "a size is negative, too large, or not the multiple it must be";
  if (status == DBRXQ_BAD_ACTIVATION) return "no such activation";
#if defined(__CUDACC__)
  if (status >= kErrorBase) return cudaGetErrorString(static_cast<cudaError_t>(status - kErrorBase));
#endif
  return "unknown status";
}

int dbrxq_cuda_repack(const dbrxq_cuda_linear* linear, const void* q_weight, void* words, void* stream) {
  if (!is_linear(*linear)) return DBRXQ_BAD_SHAPE;
  return status_of(repack(*linear, static_cast<const uint32_t*>(q_weight), static_cast<uint32_t*>(words),
                          static_cast<cudaStream_t>(stream)));
}

int dbrxq_cuda_unpack(const dbrxq_cuda_linear* linear, void* q_weight, void* stream) {
  if (!is_linear(*linear)) return DBRXQ_BAD_SHAPE;
  return status_of(unpack(*linear, static_cast<const uint32_t*>(linear->words), static_cast<uint32_t*>(q_weight),
                          static_cast<cudaStream_t>(stream)));
}

int dbrxq_cuda_reconstruct(const dbrxq_cuda_linear* linear, void* weight, void* stream) {
  if (!is_linear(*linear)) return DBRXQ_BAD_SHAPE;
  return status_of(reconstruct(*linear, static_cast<uint16_t*>(weight), static_cast<cudaStream_t>(stream)));
}

int dbrxq_cuda_linear_workspace(const dbrxq_cuda_linear* linear, int64_t tokens, int dtype, int64_t* bytes) {
  if (!is_linear(*linear) || tokens < 0 || tokens > (1 << 24) || !is_dtype(dtype)) return DBRXQ_BAD_SHAPE;
  Arena arena{nullptr};
  LinearPlan plan;
  void* few;
  const int status = is_few(tokens, 1, dtype) ? take_few_workspace(arena, &few)
                                              : plan_linear(*linear, tokens, dtype, arena, plan);
  *bytes = arena.used;
  return status;
}

int dbrxq_cuda_linear_forward(const dbrxq_cuda_linear* linear, const void* x, int64_t tokens, int dtype, void* y,
                              void* workspace, void* stream) {
  if (!is_linear(*linear) || tokens < 0 || tokens > (1 << 24) || !is_dtype(dtype)) return DBRXQ_BAD_SHAPE;
  if (tokens == 0) return DBRXQ_OK;
  if (is_few(tokens, 1, dtype))
    return run_few_linear(*linear, x, tokens, dtype, y, workspace, static_cast<cudaStream_t>(stream));
  Arena arena{static_cast<char*>(workspace)};
  LinearPlan plan;
  const int status = plan_linear(*linear, tokens, dtype, arena, plan);
  if (status != DBRXQ_OK) return status;
  plan.prepare.x = x;
  plan.product.y = y;
  int error = prepare(plan.prepare, static_cast<cudaStream_t>(stream));
  if (error == 0)
    error = run_product(plan.product, plan.tile_rows, false, plan.grid, static_cast<cudaStream_t>(stream));
  return status_of(error);
}

int dbrxq_cuda_experts_workspace(const dbrxq_cuda_experts* block, int64_t tokens, int64_t active, int dtype,
                                 int64_t* bytes) {
  const int bad = check_experts(*block, tokens, active, dtype);
  if (bad != DBRXQ_OK) return bad;
  // The last pass may have fewer tokens and, with other tiles, need more than a full one.
  *bytes = 0;
  for (int64_t pass : {tokens < kPassTokens ? tokens : kPassTokens, tokens % kPassTokens}) {
    if (pass == 0) continue;
    Arena arena{nullptr};
    ExpertsPlan plan;
    FewExpertsPlan few;
    const int status = is_few(pass, active, dtype) ? plan_few_experts(*block, pass, active, dtype, arena, few)
                                                   : plan_experts(*block, pass, active, dtype, arena, plan);
    if (status != DBRXQ_OK) return status;
    if (arena.used > *bytes) *bytes = arena.used;
  }
  return DBRXQ_OK;
}

int dbrxq_cuda_experts_forward(const dbrxq_cuda_experts* block, const void* x, const int64_t* top_k_index,
                               const float* top_k_weights, int64_t tokens, int64_t active, int dtype, void* y,
                               void* workspace, void* stream) {
  const int bad = check_experts(*block, tokens, active, dtype);
  if (bad != DBRXQ_OK) return bad;
  const int64_t row_bytes = block->hidden * (dtype == DBRXQ_FLOAT32 ? 4 : 2);
  for (int64_t t = 0; t < tokens; t += kPassTokens) {
    const int64_t pass = tokens - t < kPassTokens ? tokens - t : kPassTokens;
    const int status = run_experts(*block, static_cast<const char*>(x) + t * row_bytes, top_k_index + t * active,
                                   top_k_weights + t * active, pass, active, dtype,
                                   static_cast<char*>(y) + t * row_bytes, static_cast<char*>(workspace),
                                   static_cast<cudaStream_t>(stream));
    if (status != DBRXQ_OK) return status;
  }
  return DBRXQ_OK;
}
