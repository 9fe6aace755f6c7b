// All layers of a decoder for a few new tokens, enqueued by one call (dbrxq_cuda_decode in dbrxq.h).
//
//   tokens --embed--> x
//   each layer:  x --norm, products--> queries, keys, values --attention.cu--> attended --product--> added to x
//                x --norm, products of the experts that the router chooses--> added to x
//   x --norm--> states;  x --norm, product--> logits --sample.cu--> the next step's tokens
#include "decoder.cuh"
#include "graph.cuh"
#include "products.cuh"

namespace dbrxq {
namespace {

bool is_float(int dtype) { return dtype >= DBRXQ_FLOAT16 && dtype <= DBRXQ_FLOAT32; }

bool is_linear_of(const dbrxq_cuda_linear* linear, int64_t k, int64_t n) {
  return linear && linear->k == k && linear->out_features == n;
}

int check(const Decoder& d, int64_t sequences, int64_t tokens) {
  if (d.layer_count < 0 || d.hidden < 1 || d.vocabulary < 1 || d.head_dim < 16 || d.head_dim % 16 ||
      d.head_dim > kMostHead || d.key_heads < 1 || d.heads < 1 || d.heads % d.key_heads || !is_float(d.dtype) ||
      (d.cache_bits != 8 && d.cache_bits != 16) || sequences < 1 || tokens < 1 || sequences > kMostRows ||
      sequences * tokens > kMostRows)
    return DBRXQ_BAD_SHAPE;
  for (int64_t i = 0; i < d.layer_count; ++i) {
    const Layer& layer = d.layers[i];
    for (int part = 0; part < 3; ++part)
      if (!is_linear_of(layer.qkv[part], d.hidden, (part ? d.key_heads : d.heads) * d.head_dim)) return DBRXQ_BAD_SHAPE;
    if (!is_linear_of(layer.output, d.heads * d.head_dim, d.hidden) || !layer.experts ||
        layer.experts->hidden != d.hidden || layer.experts->experts < 1 || layer.experts->experts > kMostExperts)
      return DBRXQ_BAD_SHAPE;
    if (layer.router ? layer.active < 1 || layer.active > layer.experts->experts || layer.active > kFewSlots
                     : layer.experts->experts != 1)
      return DBRXQ_BAD_SHAPE;
  }
  return DBRXQ_OK;
}

// Blocks that share a context: as many as fill the device twice, since a short one leaves most without work.
int choose_splits(int64_t heads, int processors) {
  const int64_t wanted = (2 * processors + heads - 1) / heads;
  return static_cast<int>(wanted < kMostSplits ? wanted : kMostSplits);
}

// A step of one shape: where everything is in its workspace, and what is enqueued.
class Step {
 public:
  Step(const Decoder& decoder, int64_t sequences, int64_t tokens, int processors, Arena& arena)
      : decoder_(decoder),
        rows_(static_cast<int>(sequences * tokens)),
        // These and those of the products come first and are as many for all shapes, which can so share a workspace.
        tickets_(arena.take<int32_t>(kMostRows * decoder.key_heads)),
        products_(decoder, rows_, arena) {
    const int64_t wide = decoder.heads * decoder.head_dim, narrow = decoder.key_heads * decoder.head_dim;
    attention_.sequences = static_cast<int>(sequences);
    attention_.tokens = static_cast<int>(tokens);
    attention_.heads = static_cast<int>(decoder.heads);
    attention_.key_heads = static_cast<int>(decoder.key_heads);
    attention_.head_dim = static_cast<int>(decoder.head_dim);
    attention_.dtype = decoder.dtype;
    attention_.cache_bits = decoder.cache_bits;
    attention_.splits = choose_splits(sequences * decoder.key_heads, processors);
    attention_.scale = decoder.scale;
    attention_.clip = decoder.clip;
    attention_.eps = decoder.eps;
    attention_.cosines = decoder.cosines;
    attention_.sines = decoder.sines;
    attention_.tickets = tickets_;
    attention_.attended = arena.take<float>(rows_ * wide);
    attention_.partial = arena.take<float>(attention_partial_floats(attention_));
    x_ = arena.take<float>(rows_ * decoder.hidden);
    for (int i = 0; i < 3; ++i) outputs_[i] = arena.take<float>(rows_ * (i ? narrow : wide));
    attention_.queries = outputs_[0];
    attention_.keys = outputs_[1];
    attention_.values = outputs_[2];
  }

  int run(const dbrxq_cuda_step& step, cudaStream_t stream) const {
    const Decoder& d = decoder_;
    int error = embed({step.tokens, d.embedding, d.dtype, d.vocabulary, d.hidden, rows_, x_}, stream);
    for (int64_t i = 0; i < d.layer_count && !error; ++i)
      error = run_layer(d.layers[i], step.cache + i, step.past, stream);
    if (!error && step.states)
      error = normalise({x_, norm(d.final_norm), d.hidden, rows_, d.dtype, step.states}, stream);
    if (error || !step.sampling) return status_of(error);
    error = products_.head(x_, step.logits, stream);
    if (!error)
      error = sample({step.logits, step.sampling, d.vocabulary, rows_, step.tokens, step.past, step.generated,
                      step.made, step.room},
                     stream);
    return status_of(error);
  }

 private:
  Norm norm(const void* weight) const { return {weight, decoder_.dtype, decoder_.layer_norm, decoder_.eps}; }

  int run_layer(const Layer& layer, const dbrxq_cuda_cache* cache, const int32_t* past, cudaStream_t stream) const {
    int error = products_.qkv(layer, x_, outputs_, stream);
    if (error) return error;
    Attention attention = attention_;
    attention.query_norm = layer.query_norm;
    attention.key_norm = layer.key_norm;
    attention.cache = cache;
    attention.past = past;
    error = dbrxq::attention(attention, stream);
    if (!error) error = products_.output(layer, attention.attended, x_, stream);
    return error ? error : products_.experts(layer, x_, stream);
  }

  const Decoder& decoder_;
  int rows_;
  int32_t* tickets_;
  Products products_;
  Attention attention_ = {};
  float *x_, *outputs_[3];
};

// Calls body(step, bytes of its workspace).
template <class Body>
int with_step(const Decoder& decoder, int64_t sequences, int64_t tokens, void* workspace, Body&& body) {
  int status = check(decoder, sequences, tokens), processors = 0;
  if (status == DBRXQ_OK) status = status_of(multiprocessors(&processors));
  if (status != DBRXQ_OK) return status;
  Arena arena{static_cast<char*>(workspace)};
  const Step step(decoder, sequences, tokens, processors, arena);
  return body(step, arena.used);
}

}  // namespace
}  // namespace dbrxq

using namespace dbrxq;

int dbrxq_cuda_decode_workspace(const dbrxq_cuda_decoder* decoder, int64_t sequences, int64_t tokens, int64_t* bytes) {
  return with_step(*decoder, sequences, tokens, nullptr, [&](const Step&, int64_t used) {
    *bytes = used;
    return static_cast<int>(DBRXQ_OK);
  });
}

int dbrxq_cuda_decode(const dbrxq_cuda_decoder* decoder, const dbrxq_cuda_step* step, void* stream) {
  if (step->sampling && (step->new_tokens != 1 || decoder->vocabulary >= 1 << 24 ||
                         !is_linear_of(decoder->head, decoder->hidden, decoder->vocabulary)))
    return DBRXQ_BAD_SHAPE;
  return with_step(*decoder, step->sequences, step->new_tokens, step->workspace,
                   [&](const Step& own, int64_t) { return own.run(*step, static_cast<cudaStream_t>(stream)); });
}

int dbrxq_cuda_decode_capture(const dbrxq_cuda_decoder* decoder, const dbrxq_cuda_step* step, void** graph) {
  return capture([&](cudaStream_t stream) { return dbrxq_cuda_decode(decoder, step, stream); }, graph);
}

int dbrxq_cuda_graph_launch(void* graph, void* stream) {
  return status_of(
      static_cast<int>(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), static_cast<cudaStream_t>(stream))));
}

int dbrxq_cuda_graph_free(void* graph) {
  return status_of(static_cast<int>(cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph))));
}
