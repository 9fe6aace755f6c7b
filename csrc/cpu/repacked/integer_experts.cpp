// The routed experts of one block over repacked linears, in one call. Tokens are sorted by expert; each expert with
// tokens is a batch:
//
//   x [T, D] --gather, permute, round--> integers of each batch
//     tasks (expert, bands of F):  h [slot, F] = activation(x . gate) * (x . up)
//   h --permute, round--> integers of each batch
//     tasks (expert, bands of D):  d [slot, D] = h . down
//   y [t] = sum over a of p[t, a] * d[slot(t, a)], in order of a
//
// Tasks split columns, never sums, so the result does not depend on the number of threads.
//
// Batches whose linears lie in a mapped file are computed some at a time, while the next ones are read from the disk.
#include <algorithm>
#include <cstring>
#include <span>
#include <vector>

#include "buffer.h"
#include "dbrxq.h"
#include "guard.h"
#include "integer.h"
#include "isa.h"
#include "parallel.h"
#include "routing.h"

namespace dbrxq {
namespace {

constexpr int64_t kAheadBytes = int64_t{256} << 20;  // of mapped linears that are computed while as many are read

// An expert that has tokens: its linears, its slots, its quantized inputs and hidden states.
struct Batch {
  PackedView gate, up, down;
  bool same_order;  // gate and up permute and cut their inputs alike, so one quantized copy serves both
  int64_t first, count;
  Quantized for_gate, for_up, hidden;

  int64_t mapped_bytes() const {
    int64_t bytes = 0;
    for (const PackedView* view : {&gate, &up, &down}) bytes += view->header->mapped ? view->header->body_bytes : 0;
    return bytes;
  }
};

using Batches = std::span<const Batch>;

struct Task {
  const Batch* batch;
  int64_t first, last;  // bands
};

// A tile of one batch's slots.
struct Tile {
  const Batch* batch;
  int64_t index;
};

struct Call {
  const void* const* packed;  // gate, up, down of E experts each
  int64_t experts;
  int activation_bits;
  const float* x;
  const int64_t* index;
  const float* weights;
  int64_t tokens, hidden, active;
  int activation;
  float* y;
};

// Memory of the calling thread that outlives the call.
struct Scratch {
  Buffer<int32_t> quantized;
  Buffer<float> hidden, outputs;
};

int open_batch(const Call& call, int64_t expert, Batch& batch) {
  int status = view_packed(call.packed[expert], batch.gate);
  if (status == DBRXQ_OK) status = view_packed(call.packed[call.experts + expert], batch.up);
  if (status == DBRXQ_OK) status = view_packed(call.packed[2 * call.experts + expert], batch.down);
  if (status != DBRXQ_OK) return status;
  const PackedHeader &gate = *batch.gate.header, &up = *batch.up.header, &down = *batch.down.header;
  if (gate.k != call.hidden || up.k != call.hidden || gate.out_features != down.k || up.out_features != down.k ||
      down.out_features != call.hidden)
    return DBRXQ_BAD_SHAPE;
  batch.same_order = gate.order == up.order;
  return DBRXQ_OK;
}

// Tasks of one linear of every batch, or of two alike, over its first `columns` columns.
std::vector<Task> list_tasks(Batches batches, PackedView Batch::* linear, int64_t columns) {
  std::vector<Task> tasks;
  const int64_t total = (columns + bands::kColumns - 1) / bands::kColumns;
  int64_t all = static_cast<int64_t>(batches.size()) * total;
  for (const Batch& batch : batches) {
    for (int64_t first = 0, last; first < total; first = last) {
      last = std::min(first + band_run(batch.*linear, batch.count, all), total);
      tasks.push_back({&batch, first, last});
      all -= last - first;
    }
  }
  return tasks;
}

// One after the other where that is less work than waking a thread.
template <class Body>
void for_tiles(const std::vector<Tile>& tiles, const Body& body) {
  const auto count = static_cast<int64_t>(tiles.size());
  if (count == 1) return body(tiles[0]);
  parallel_for(count, [&](int64_t i) { body(tiles[static_cast<size_t>(i)]); });
}

void gate_and_up(const Call& call, const Task& task, float* hidden) {
  const Batch& batch = *task.batch;
  const int64_t bands = task.last - task.first, padded = batch.hidden.padded();
  const int64_t floats = bands * padded * bands::kColumns;
  float* gate = thread_scratch(2 * floats);
  float* up = gate + floats;
  multiply_bands(batch.gate, call.activation_bits, batch.for_gate, task.first, task.last, gate);
  multiply_bands(batch.up, call.activation_bits, batch.same_order ? batch.for_gate : batch.for_up, task.first,
                 task.last, up);
  const int64_t ffn = batch.down.header->k;
  for (int64_t band = task.first; band < task.last; ++band) {
    const int64_t column = band * bands::kColumns, width = std::min<int64_t>(bands::kColumns, ffn - column);
    for (int64_t slot = 0; slot < batch.count; ++slot) {
      const int64_t at = ((band - task.first) * padded + slot) * bands::kColumns;
      float* to = hidden + (batch.first + slot) * ffn + column;
      for (int64_t c = 0; c < width; ++c) to[c] = activate(call.activation, gate[at + c]) * up[at + c];
    }
  }
}

void down(const Call& call, const Task& task, float* outputs) {
  const Batch& batch = *task.batch;
  const int64_t bands = task.last - task.first, padded = batch.hidden.padded();
  const int64_t floats = bands * padded * bands::kColumns;
  float* sums = thread_scratch(floats);
  multiply_bands(batch.down, call.activation_bits, batch.hidden, task.first, task.last, sums);
  for (int64_t band = task.first; band < task.last; ++band) {
    const int64_t column = band * bands::kColumns, width = std::min<int64_t>(bands::kColumns, call.hidden - column);
    for (int64_t slot = 0; slot < batch.count; ++slot)
      std::memcpy(outputs + (batch.first + slot) * call.hidden + column,
                  sums + ((band - task.first) * padded + slot) * bands::kColumns,
                  sizeof(float) * static_cast<size_t>(width));
  }
}

// As many batches from the front as are computed together: all of them where nothing is mapped.
size_t together(Batches batches) {
  int64_t bytes = 0;
  for (size_t i = 0; i < batches.size(); ++i) {
    bytes += batches[i].mapped_bytes();
    if (i && bytes > kAheadBytes) return i;
  }
  return batches.size();
}

void read_all_ahead(Batches batches) {
  for (const Batch& batch : batches)
    for (const PackedView* view : {&batch.gate, &batch.up, &batch.down}) read_ahead(*view);
}

int check_bodies(Batches batches) {
  for (const Batch& batch : batches)
    for (const PackedView* view : {&batch.gate, &batch.up, &batch.down}) {
      const int status = check_body(*view);
      if (status != DBRXQ_OK) return status;
    }
  return DBRXQ_OK;
}

// The outputs of the slots of some batches.
void run_batches(const Call& call, const Routing& routing, Batches batches, float* hidden, float* outputs) {
  std::vector<Tile> tiles;
  for (const Batch& batch : batches)
    for (int64_t i = 0; i < batch.hidden.tiles(); ++i) tiles.push_back({&batch, i});
  const int64_t ffn = batches[0].down.header->k;

  for_tiles(tiles, [&](const Tile& tile) {
    const Batch& batch = *tile.batch;
    const float* rows[kLargestTile] = {};
    const int64_t width = batch.hidden.width;
    for (int64_t m = 0, slot = tile.index * width; m < width && slot < batch.count; ++m, ++slot)
      rows[m] = call.x + routing.token_of[static_cast<size_t>(batch.first + slot)] * call.hidden;
    quantize_tile(batch.gate, call.activation_bits, batch.for_gate, tile.index, rows);
    if (!batch.same_order) quantize_tile(batch.up, call.activation_bits, batch.for_up, tile.index, rows);
  });
  const auto first = list_tasks(batches, &Batch::gate, ffn);
  parallel_tasks(static_cast<int64_t>(first.size()),
                 [&](int64_t i) { gate_and_up(call, first[static_cast<size_t>(i)], hidden); });
  for_tiles(tiles, [&](const Tile& tile) {
    const Batch& batch = *tile.batch;
    const float* rows[kLargestTile] = {};
    const int64_t width = batch.hidden.width;
    for (int64_t m = 0, slot = tile.index * width; m < width && slot < batch.count; ++m, ++slot)
      rows[m] = hidden + (batch.first + slot) * ffn;
    quantize_tile(batch.down, call.activation_bits, batch.hidden, tile.index, rows);
  });
  const auto second = list_tasks(batches, &Batch::down, call.hidden);
  parallel_tasks(static_cast<int64_t>(second.size()),
                 [&](int64_t i) { down(call, second[static_cast<size_t>(i)], outputs); });
}

int run_pass(const Call& call) {
  thread_local Scratch scratch;
  const Routing routing = route(call.index, call.tokens, call.active, call.experts);
  std::vector<Batch> batches;
  int64_t words = 0, ffn = 0;
  for (int64_t e = 0; e < call.experts; ++e) {
    const int64_t first = routing.begin[static_cast<size_t>(e)];
    const int64_t count = routing.begin[static_cast<size_t>(e + 1)] - first;
    if (count == 0) continue;
    Batch batch;
    const int status = open_batch(call, e, batch);
    if (status != DBRXQ_OK) return status;
    if (ffn && ffn != batch.down.header->k) return DBRXQ_BAD_SHAPE;
    ffn = batch.down.header->k;
    batch.first = first;
    batch.count = count;
    batch.for_gate = batch.for_up = batch.hidden = Quantized(count);
    words += batch.for_gate.words(*batch.gate.header) + batch.hidden.words(*batch.down.header) +
             (batch.same_order ? 0 : batch.for_up.words(*batch.up.header));
    batches.push_back(batch);
  }
  int32_t* at = scratch.quantized.reserve(words);
  for (Batch& batch : batches) {
    const auto take = [&](Quantized& q, const PackedView& view) {
      q.memory = at;
      at += q.words(*view.header);
    };
    take(batch.for_gate, batch.gate);
    if (!batch.same_order) take(batch.for_up, batch.up);
    take(batch.hidden, batch.down);
  }
  float* hidden = scratch.hidden.reserve(routing.slots() * ffn);
  float* outputs = scratch.outputs.reserve(routing.slots() * call.hidden);

  Batches left = batches;
  size_t count = together(left);
  read_all_ahead(left.first(count));
  while (!left.empty()) {
    const Batches now = left.first(count);
    left = left.subspan(count);
    count = together(left);
    read_all_ahead(left.first(count));
    const int status = check_bodies(now);
    if (status != DBRXQ_OK) return status;
    run_batches(call, routing, now, hidden, outputs);
  }
  const auto combine = [&](int64_t t) {
    combine_token(routing, call.weights, t, call.active, call.hidden, outputs, call.y + t * call.hidden);
  };
  if (call.tokens == 1)
    combine(0);
  else
    parallel_for(call.tokens, combine);
  return DBRXQ_OK;
}

}  // namespace
}  // namespace dbrxq

int dbrxq_repacked_experts(const void* const* packed, int64_t experts, int activation_bits, const float* x,
                           const int64_t* top_k_index, const float* top_k_weights, int64_t tokens, int64_t hidden,
                           int64_t active, int activation, float* y) {
  return dbrxq::guarded([&] {
    if (!dbrxq::isa_usable()) return static_cast<int>(DBRXQ_BAD_ISA);
    if (tokens < 0 || hidden < 1 || active < 0 || experts < 1 || (activation_bits != 8 && activation_bits != 16))
      return static_cast<int>(DBRXQ_BAD_SHAPE);
    if (activation < DBRXQ_SILU || activation > DBRXQ_RELU) return static_cast<int>(DBRXQ_BAD_ACTIVATION);
    for (int64_t i = 0; i < tokens * active; ++i)
      if (top_k_index[i] < 0 || top_k_index[i] > experts) return static_cast<int>(DBRXQ_BAD_EXPERT);
    for (int64_t t = 0; t < tokens; t += dbrxq::kPassTokens) {
      const int64_t count = std::min(dbrxq::kPassTokens, tokens - t);
      const int status =
          dbrxq::run_pass({packed, experts, activation_bits, x + t * hidden, top_k_index + t * active,
                           top_k_weights + t * active, count, hidden, active, activation, y + t * hidden});
      if (status != DBRXQ_OK) return status;
    }
    return static_cast<int>(DBRXQ_OK);
  });
}
