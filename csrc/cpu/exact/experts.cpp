// The routed experts of one block in one call. Tokens are sorted by expert; each expert with tokens is a batch:
//
//   x [T, D] --gather, permute--> packed x of each batch
//     tasks (expert, band of F):  h = activation(x . gate) * (x . up), stored permuted for `down`
//     tasks (expert, band of D):  d [slot, D] = h . down
//   y [t] = sum over a of p[t, a] * d[slot(t, a)], in order of a
//
// Tasks split columns, never sums, so the result does not depend on the number of threads.
#include <algorithm>
#include <cstring>
#include <vector>

#include "buffer.h"
#include "dbrxq.h"
#include "guard.h"
#include "isa.h"
#include "linear.h"
#include "parallel.h"
#include "routing.h"

namespace dbrxq {
namespace {

// An expert that has tokens: its linears and its slots, a run of the rows sorted by expert.
struct Batch {
  LinearView gate, up, down;
  bool same_order;             // gate and up permute their inputs alike, so one packed copy serves both
  int64_t first, count;        // slots
  int64_t x_offset, h_offset;  // floats into the packed inputs and hidden states
};

// A stretch of columns of one batch.
struct Task {
  const Batch* batch;
  int64_t first, last;
};

struct Call {
  const float* x;
  const int64_t* index;  // [tokens, active]
  const float* weights;  // [tokens, active]
  int64_t tokens, hidden, active, experts;
  const dbrxq_linear *gate, *up, *down;
  int activation;
  float* y;
};

int open_batch(const Call& call, int64_t expert, Batch& batch) {
  int status = view_linear(call.gate[expert], batch.gate);
  if (status == DBRXQ_OK) status = view_linear(call.up[expert], batch.up);
  if (status == DBRXQ_OK) status = view_linear(call.down[expert], batch.down);
  if (status != DBRXQ_OK) return status;
  const int64_t ffn = batch.down.k;
  if (batch.gate.k != call.hidden || batch.up.k != call.hidden || batch.gate.out_features != ffn ||
      batch.up.out_features != ffn || batch.down.out_features != call.hidden)
    return DBRXQ_BAD_SHAPE;
  batch.same_order = batch.gate.invperm == batch.up.invperm ||
                     std::memcmp(batch.gate.invperm, batch.up.invperm, static_cast<size_t>(4 * call.hidden)) == 0;
  return DBRXQ_OK;
}

// Bands of `columns(batch)` columns; a band stays within its batch.
template <class Columns>
std::vector<Task> list_tasks(const std::vector<Batch>& batches, Columns columns) {
  std::vector<Task> tasks;
  const int64_t linears = static_cast<int64_t>(batches.size());
  for (const Batch& batch : batches) {
    const int64_t total = columns(batch), band = band_columns(batch.count, total, linears);
    for (int64_t first = 0; first < total; first += band)
      tasks.push_back({&batch, first, std::min(first + band, (total + 31) / 32 * 32)});
  }
  return tasks;
}

void pack_inputs(const Call& call, const std::vector<Batch>& batches, const int64_t* token_of, float* for_gate,
                 float* for_up) {
  struct Tile {
    const Batch* batch;
    int64_t slot;
  };
  std::vector<Tile> tiles;
  for (const Batch& batch : batches)
    for (int64_t slot = 0; slot < batch.count; slot += kTileTokens) tiles.push_back({&batch, slot});
  parallel_for(static_cast<int64_t>(tiles.size()), [&](int64_t i) {
    const Batch& batch = *tiles[static_cast<size_t>(i)].batch;
    const int64_t slot = tiles[static_cast<size_t>(i)].slot, left = batch.count - slot;
    const float* rows[kTileTokens] = {};
    for (int64_t m = 0; m < kTileTokens && m < left; ++m)
      rows[m] = call.x + token_of[batch.first + slot + m] * call.hidden;
    const int64_t offset = batch.x_offset + slot * call.hidden;
    pack_tile(batch.gate, rows, tile_tokens(left), for_gate + offset);
    if (!batch.same_order) pack_tile(batch.up, rows, tile_tokens(left), for_up + offset);
  });
}

// h = activation(gate) * up for a band, scattered to where `down` wants it (tiles as linear_view.h draws them).
void gate_and_up(const Call& call, const Task& task, const float* for_gate, const float* for_up, float* hidden) {
  const Batch& batch = *task.batch;
  const int64_t count = batch.count, columns = task.last - task.first, ffn = batch.down.k;
  const int64_t scratch = scratch_floats(count, columns);
  float* memory = thread_scratch(scratch + 2 * count * columns);
  float* gate = memory + scratch;
  float* up = gate + count * columns;
  const float* x = for_gate + batch.x_offset;
  kernels().multiply(batch.gate, x, count, task.first, task.last, gate, columns, memory);
  if (!batch.same_order) x = for_up + batch.x_offset;
  kernels().multiply(batch.up, x, count, task.first, task.last, up, columns, memory);
  const int64_t wanted = std::min(task.last, ffn);
  add_bias(batch.gate, task.first, wanted, count, gate, columns);
  add_bias(batch.up, task.first, wanted, count, up, columns);
  for (int64_t c = 0; c < wanted - task.first; ++c) {
    int32_t row;
    std::memcpy(&row, batch.down.invperm + 4 * (task.first + c), sizeof row);
    for (int64_t slot = 0; slot < count; slot += kTileTokens) {
      const int64_t left = count - slot, m = tile_tokens(left);
      float* to = hidden + batch.h_offset + slot * ffn + row * m;
      for (int64_t i = 0; i < m; ++i) {
        const int64_t at = (slot + i) * columns + c;
        to[i] = i < left ? activate(call.activation, gate[at]) * up[at] : 0.0f;
      }
    }
  }
}

void down(const Call& call, const Task& task, const float* hidden, float* outputs) {
  const Batch& batch = *task.batch;
  const int64_t columns = task.last - task.first, scratch = scratch_floats(batch.count, columns);
  float* memory = thread_scratch(scratch + batch.count * columns);
  float* sums = memory + scratch;
  kernels().multiply(batch.down, hidden + batch.h_offset, batch.count, task.first, task.last, sums, columns, memory);
  const int64_t wanted = std::min(task.last, call.hidden);
  add_bias(batch.down, task.first, wanted, batch.count, sums, columns);
  for (int64_t slot = 0; slot < batch.count; ++slot)
    std::memcpy(outputs + (batch.first + slot) * call.hidden + task.first, sums + slot * columns,
                sizeof(float) * static_cast<size_t>(wanted - task.first));
}

int run_pass(const Call& call) {
  const Routing routing = route(call.index, call.tokens, call.active, call.experts);
  std::vector<Batch> batches;
  int64_t x_floats = 0, h_floats = 0;
  bool same_order = true;
  for (int64_t e = 0; e < call.experts; ++e) {
    const int64_t first = routing.begin[static_cast<size_t>(e)];
    const int64_t count = routing.begin[static_cast<size_t>(e + 1)] - first;
    if (count == 0) continue;
    batches.emplace_back();
    Batch& batch = batches.back();
    const int status = open_batch(call, e, batch);
    if (status != DBRXQ_OK) return status;
    batch.first = first;
    batch.count = count;
    batch.x_offset = x_floats;
    batch.h_offset = h_floats;
    x_floats += packed_floats(count, call.hidden);
    h_floats += packed_floats(count, batch.down.k);
    same_order = same_order && batch.same_order;
  }

  Buffer<float> for_gate(x_floats), for_up(same_order ? 0 : x_floats), hidden(h_floats),
      outputs(routing.slots() * call.hidden);
  pack_inputs(call, batches, routing.token_of.data(), for_gate.get(), for_up.get());
  const auto first = list_tasks(batches, [](const Batch& batch) { return batch.down.k; });
  parallel_tasks(static_cast<int64_t>(first.size()), [&](int64_t i) {
    gate_and_up(call, first[static_cast<size_t>(i)], for_gate.get(), for_up.get(), hidden.get());
  });
  const auto second = list_tasks(batches, [&](const Batch&) { return call.hidden; });
  parallel_tasks(static_cast<int64_t>(second.size()),
                 [&](int64_t i) { down(call, second[static_cast<size_t>(i)], hidden.get(), outputs.get()); });
  parallel_for(call.tokens, [&](int64_t t) {
    combine_token(routing, call.weights, t, call.active, call.hidden, outputs.get(), call.y + t * call.hidden);
  });
  return DBRXQ_OK;
}

}  // namespace
}  // namespace dbrxq

int dbrxq_experts_forward(const float* x, const int64_t* top_k_index, const float* top_k_weights, int64_t tokens,
                          int64_t hidden, int64_t active, int64_t experts, const dbrxq_linear* gate,
                          const dbrxq_linear* up, const dbrxq_linear* down, int activation, float* y) {
  return dbrxq::guarded([&] {
    if (!dbrxq::isa_usable()) return static_cast<int>(DBRXQ_BAD_ISA);
    if (tokens < 0 || hidden < 1 || active < 0 || experts < 1) return static_cast<int>(DBRXQ_BAD_SHAPE);
    if (activation < DBRXQ_SILU || activation > DBRXQ_RELU) return static_cast<int>(DBRXQ_BAD_ACTIVATION);
    for (int64_t i = 0; i < tokens * active; ++i)
      if (top_k_index[i] < 0 || top_k_index[i] > experts) return static_cast<int>(DBRXQ_BAD_EXPERT);
    for (int64_t t = 0; t < tokens; t += dbrxq::kPassTokens) {
      const int64_t count = std::min(dbrxq::kPassTokens, tokens - t);
      const int status = dbrxq::run_pass({x + t * hidden, top_k_index + t * active, top_k_weights + t * active, count,
                                          hidden, active, experts, gate, up, down, activation, y + t * hidden});
      if (status != DBRXQ_OK) return status;
    }
    return static_cast<int>(DBRXQ_OK);
  });
}
