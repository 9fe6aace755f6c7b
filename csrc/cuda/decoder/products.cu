// The products of a step as launches of few/few.cuh.
#include "products.cuh"

namespace dbrxq {
namespace {

// Experts of a token, a dense layer's only one included.
int64_t active_of(const Layer& layer) { return layer.router ? layer.active : 1; }

FewResult result_of(float* y, int64_t stride, int first, bool added) {
  float* at = y + first * stride;
  return {at, added ? at : nullptr, stride, stride, DBRXQ_FLOAT32, DBRXQ_FLOAT32};
}

}  // namespace

Products::Products(const Decoder& decoder, int rows, Arena& arena)
    : decoder_(decoder), rows_(rows), parts_(decoder.dtype == DBRXQ_FLOAT32 ? 2 : 1) {
  int64_t ffn = 1, tiles = 1, most_active = 1, experts = 1, bytes = 0;
  for (int64_t i = 0; i < decoder.layer_count; ++i) {
    const Layer& layer = decoder.layers[i];
    const int64_t width = active_of(layer) * layer.experts->ffn;
    const int64_t columns = active_of(layer) * column_tiles(layer.experts->ffn);
    ffn = width > ffn ? width : ffn;
    tiles = columns > tiles ? columns : tiles;
    most_active = active_of(layer) > most_active ? active_of(layer) : most_active;
    experts = layer.experts->experts > experts ? layer.experts->experts : experts;
  }
  few_workspace(&bytes);
  workspace_ = arena.take<char>(bytes);
  inner_ = arena.take<float>(rows * ffn);
  largest_ = arena.take<float>(rows * tiles);
  partial_ = arena.take<float>(rows * column_tiles(decoder.hidden) * experts);
  constants_ = arena.take<float>(column_tiles(decoder.hidden) * experts);
  index_ = arena.take<int64_t>(rows * most_active);
  weights_ = arena.take<float>(rows * most_active);
}

FewInput Products::input(const float* x, int64_t k, int first, int rows, const void* norm) const {
  return {x + first * k, k,       rows, DBRXQ_FLOAT32, parts_, decoder_.dtype, norm, decoder_.layer_norm,
          decoder_.eps,  folded()};
}

// Of a launch whose first row is `first`.
FewRouter Products::router(const Layer& layer, int first) const {
  if (!layer.router) return {};
  const int64_t experts = layer.experts->experts, slot = first * layer.active;
  return {layer.router,
          layer.mlp_norm,
          decoder_.dtype,
          decoder_.layer_norm,
          static_cast<int>(experts),
          layer.expert_norm,
          partial_ + first * column_tiles(decoder_.hidden) * experts,
          constants_,
          index_ + slot,
          weights_ + slot};
}

template <class Body>
int Products::by_launches(int64_t active, Body&& body) const {
  const int by_rows = kFewRows / parts_, by_slots = static_cast<int>(kFewSlots / active);
  const int most = by_rows < by_slots ? by_rows : by_slots;
  int error = 0;
  for (int first = 0; first < rows_ && error == 0; first += most)
    error = body(first, rows_ - first < most ? rows_ - first : most);
  return error;
}

int Products::qkv(const Layer& layer, const float* x, float* const (&outputs)[3], cudaStream_t stream) const {
  return by_launches(1, [&](int first, int rows) {
    FewLinears args = {};
    args.input = input(x, decoder_.hidden, first, rows, layer.attention_norm);
    for (int i = 0; i < 3; ++i) {
      args.linears[i] = *layer.qkv[i];
      args.results[i] = result_of(outputs[i], layer.qkv[i]->out_features, first, false);
    }
    args.count = 3;
    args.workspace = workspace_;
    return few_linears(args, stream);
  });
}

int Products::head(const float* x, float* logits, cudaStream_t stream) const {
  return by_launches(1, [&](int first, int rows) {
    FewLinears args = {};
    args.input = input(x, decoder_.hidden, first, rows, decoder_.final_norm);
    args.linears[0] = *decoder_.head;
    args.results[0] = result_of(logits, decoder_.vocabulary, first, false);
    args.count = 1;
    args.workspace = workspace_;
    return few_linears(args, stream);
  });
}

int Products::output(const Layer& layer, const float* attended, float* x, cudaStream_t stream) const {
  return by_launches(1, [&](int first, int rows) {
    FewLinears args = {};
    args.input = input(attended, layer.output->k, first, rows, nullptr);
    args.linears[0] = *layer.output;
    args.results[0] = result_of(x, decoder_.hidden, first, true);
    args.count = 1;
    args.workspace = workspace_;
    args.router = router(layer, first);
    return few_linears(args, stream);
  });
}

int Products::experts(const Layer& layer, float* x, cudaStream_t stream) const {
  const dbrxq_cuda_experts& block = *layer.experts;
  const int64_t active = active_of(layer);
  return by_launches(active, [&](int first, int rows) {
    const FewRouter router = this->router(layer, first);
    FewGateUp gate_up = {};
    gate_up.input = input(x, decoder_.hidden, first, rows, layer.mlp_norm);
    gate_up.routing = {router.index, router.weights,           sizeof(int64_t),
                       rows,         static_cast<int>(active), static_cast<int>(block.experts)};
    gate_up.router = router;
    gate_up.gate = block.gate;
    gate_up.up = block.up;
    gate_up.ffn = block.ffn;
    gate_up.activation = block.activation;
    gate_up.inner = inner_;
    gate_up.largest = largest_;
    gate_up.workspace = workspace_;
    FewDown down = {};
    down.routing = gate_up.routing;
    down.down = block.down;
    down.ffn = block.ffn;
    down.hidden = decoder_.hidden;
    down.parts = parts_;
    down.folded = folded();
    down.inner = inner_;
    down.largest = largest_;
    down.result = result_of(x, decoder_.hidden, first, true);
    down.workspace = workspace_;
    const int error = few_gate_up(gate_up, stream);
    return error ? error : few_down(down, stream);
  });
}

}  // namespace dbrxq
