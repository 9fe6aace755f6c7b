// All layers of a decoder for a few new tokens, in one call: between linears only a few thousand numbers change hands,
// which takes less time than finding an operator does.
//
//   x --norm--> qkv --(clip, head norms, rotate)--> queries; keys and values join the cache
//     --attention, stretches of kStretch positions of each key head--> --output--> added to x
//   x --norm--> gate, up --silu product--> down, or router and experts --> added to x
//
// Stretches are cut the same way for any number of threads, and added in order.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "buffer.h"
#include "dbrxq.h"
#include "decoder_kernels.h"
#include "guard.h"
#include "isa.h"
#include "repacked.h"
#include "routing.h"

namespace dbrxq {

const DecoderKernels& decoder_kernels() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return kAvx512Decoder;
  if (isa() == Isa::avx2) return kAvx2Decoder;
#endif
  return kScalarDecoder;
}

namespace {

constexpr int64_t kStretch = 256;  // positions whose keys and values stay in the second-level cache
constexpr int64_t kLargestHead = 1024;
constexpr int64_t kParallelProducts = 1 << 17;  // attention with fewer is done before a thread has woken

// One call, and its working memory [rows of all sequences' tokens].
struct Step {
  const dbrxq_decoder& decoder;
  const DecoderKernels& kernels;
  int64_t sequences, tokens, past;
  const float *cosines, *sines;
  float* x = nullptr;         // [rows, D]
  float* normed = nullptr;    // [rows, D]
  float* qkv = nullptr;       // [rows, (H + 2 J) head_dim]
  float* queries = nullptr;   // [sequences, J, tokens, H / J, head_dim]
  float* attended = nullptr;  // [rows, H head_dim]
  float* added = nullptr;     // [rows, D]

  int64_t rows() const { return sequences * tokens; }
  int64_t group() const { return decoder.heads / decoder.key_heads; }
  int64_t element() const { return decoder.dtype == DBRXQ_FLOAT32 ? 4 : 2; }
  int64_t head_row(int64_t row, int64_t key_head) const {  // first of the group's rows in `queries`
    return ((row / tokens * decoder.key_heads + key_head) * tokens + row % tokens) * group();
  }
};

// Memory of the calling thread that outlives the call.
struct Scratch {
  Buffer<float> step, mlp, stretches;
};
thread_local Scratch scratch;

int check_linear(const void* packed, int64_t k, int64_t n) {
  PackedView view;
  const int status = packed ? view_packed(packed, view) : static_cast<int>(DBRXQ_BAD_SHAPE);
  if (status != DBRXQ_OK) return status;
  return view.header->k == k && (n == 0 || view.header->out_features == n) ? DBRXQ_OK : DBRXQ_BAD_SHAPE;
}

int64_t ffn(const dbrxq_decoder_layer& layer) { return static_cast<const PackedHeader*>(layer.mlp[2])->k; }

int check(const dbrxq_decoder& d, const dbrxq_decoder_cache* cache, int64_t sequences, int64_t tokens, int64_t past) {
  if (d.layer_count < 0 || d.hidden < 1 || d.head_dim < 1 || d.head_dim % 16 || d.head_dim > kLargestHead ||
      d.key_heads < 1 || d.heads < 1 || d.heads % d.key_heads || d.dtype < DBRXQ_FLOAT16 || d.dtype > DBRXQ_FLOAT32 ||
      sequences < 0 || tokens < 0 || past < 0 || (d.activation_bits != 8 && d.activation_bits != 16))
    return DBRXQ_BAD_SHAPE;
  if (d.activation < DBRXQ_SILU || d.activation > DBRXQ_RELU) return DBRXQ_BAD_ACTIVATION;
  for (int64_t i = 0; i < d.layer_count; ++i) {
    const dbrxq_decoder_layer& layer = d.layers[i];
    if (cache[i].capacity < past + tokens) return DBRXQ_BAD_SHAPE;
    int status = check_linear(layer.output, d.heads * d.head_dim, d.hidden);
    for (int part = 0; part < 3 && status == DBRXQ_OK; ++part)
      status = check_linear(layer.qkv[part], d.hidden, (part ? d.key_heads : d.heads) * d.head_dim);
    if (layer.experts) {
      if (layer.active < 1 || layer.active > layer.expert_count || !layer.router) return DBRXQ_BAD_SHAPE;
    } else {
      if (status == DBRXQ_OK)
        status = layer.mlp[2] ? check_linear(layer.mlp[2], ffn(layer), d.hidden) : DBRXQ_BAD_SHAPE;
      for (int part = 0; part < 2 && status == DBRXQ_OK; ++part)
        status = check_linear(layer.mlp[part], d.hidden, ffn(layer));
    }
    if (status != DBRXQ_OK) return status;
  }
  return DBRXQ_OK;
}

void normalise_rows(const Step& step, const void* weight, float* to) {
  const dbrxq_decoder& d = step.decoder;
  for (int64_t row = 0; row < step.rows(); ++row)
    step.kernels.normalise(step.x + row * d.hidden, weight, d.dtype, d.hidden, d.eps, d.layer_norm != 0,
                           to + row * d.hidden);
}

void add_rows(const Step& step) {
  for (int64_t i = 0; i < step.rows() * step.decoder.hidden; ++i) step.x[i] += step.added[i];
}

// x * cos + rotate_half(x) * sin, of one head.
void rotate(const float* x, const float* cosines, const float* sines, int64_t head_dim, float factor, float* to) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    to[i] = (x[i] * cosines[i] - x[i + half] * sines[i]) * factor;
    to[i + half] = (x[i + half] * cosines[i + half] + x[i] * sines[i + half]) * factor;
  }
}

// One token's queries to step.queries, its key and value to the cache.
void place_token(const Step& step, const dbrxq_decoder_layer& layer, const dbrxq_decoder_cache& cache, int64_t row) {
  const dbrxq_decoder& d = step.decoder;
  const int64_t hd = d.head_dim, width = (d.heads + 2 * d.key_heads) * hd;
  float* query = step.qkv + row * width;
  if (std::isfinite(d.clip))
    for (int64_t i = 0; i < width; ++i) query[i] = std::min(std::max(query[i], -d.clip), d.clip);
  float* key = query + d.heads * hd;
  const float* value = key + d.key_heads * hd;
  const int64_t sequence = row / step.tokens, token = row % step.tokens;
  const float *cosines = step.cosines + token * hd, *sines = step.sines + token * hd;
  for (int64_t head = 0; head < d.heads; ++head) {
    float* from = query + head * hd;
    if (layer.query_norm) step.kernels.normalise(from, layer.query_norm, d.dtype, hd, d.eps, false, from);
    const int64_t to = step.head_row(row, head / step.group()) + head % step.group();
    rotate(from, cosines, sines, hd, d.scale, step.queries + to * hd);
  }
  float rotated[kLargestHead];
  for (int64_t head = 0; head < d.key_heads; ++head) {
    float* from = key + head * hd;
    if (layer.key_norm) step.kernels.normalise(from, layer.key_norm, d.dtype, hd, d.eps, false, from);
    rotate(from, cosines, sines, hd, 1.0f, rotated);
    const int64_t at = ((sequence * d.key_heads + head) * cache.capacity + step.past + token) * hd * step.element();
    step.kernels.store(rotated, d.dtype, hd, static_cast<char*>(cache.keys) + at);
    step.kernels.store(value + head * hd, d.dtype, hd, static_cast<char*>(cache.values) + at);
  }
}

// step.attended from the queries and the cache.
void attend(const Step& step, const dbrxq_decoder_cache& cache) {
  const dbrxq_decoder& d = step.decoder;
  const int64_t length = step.past + step.tokens, stretches = (length + kStretch - 1) / kStretch;
  const int64_t rows = step.tokens * step.group(), hd = d.head_dim, heads = step.sequences * d.key_heads;
  const int64_t floats = rows * (kStretch + hd + 2);  // of one stretch: scores, out, maximum, sum
  float* memory = scratch.stretches.reserve(heads * stretches * floats);
  std::vector<int64_t> visible(static_cast<size_t>(rows));
  for (int64_t r = 0; r < rows; ++r) visible[static_cast<size_t>(r)] = step.past + r / step.group() + 1;

  const auto stretch = [&](int64_t i) {
    const int64_t head = i / stretches, first = i % stretches * kStretch;
    const int64_t offset = head * cache.capacity * hd * step.element();
    float* scores = memory + i * floats;
    float* out = scores + rows * kStretch;
    step.kernels.attend({static_cast<const char*>(cache.keys) + offset, static_cast<const char*>(cache.values) + offset,
                         d.dtype, hd, first, std::min(first + kStretch, length), step.queries + head * rows * hd,
                         visible.data(), rows, scores, out, out + rows * hd, out + rows * hd + rows});
  };
  const int64_t tasks = heads * stretches;
  if (tasks * rows * std::min(length, kStretch) * hd < kParallelProducts)
    for (int64_t i = 0; i < tasks; ++i) stretch(i);
  else
    parallel_tasks(tasks, stretch);

  for (int64_t head = 0; head < heads; ++head)
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = head / d.key_heads * step.tokens + r / step.group();
      const int64_t query_head = head % d.key_heads * step.group() + r % step.group();
      float* to = step.attended + (row * d.heads + query_head) * hd;
      const auto part = [&](int64_t s) { return memory + (head * stretches + s) * floats + rows * kStretch; };
      float maximum = -std::numeric_limits<float>::infinity(), sum = 0.0f;
      for (int64_t s = 0; s < stretches; ++s) maximum = std::max(maximum, part(s)[rows * hd + r]);
      std::fill(to, to + hd, 0.0f);
      for (int64_t s = 0; s < stretches; ++s) {
        const float* out = part(s);
        const float weight = stretches == 1 ? 1.0f : std::exp(out[rows * hd + r] - maximum);
        sum += weight * out[rows * hd + rows + r];
        for (int64_t i = 0; i < hd; ++i) to[i] += weight * out[r * hd + i];
      }
      const float factor = 1.0f / sum;
      for (int64_t i = 0; i < hd; ++i) to[i] *= factor;
    }
}

int dense(const Step& step, const dbrxq_decoder_layer& layer) {
  const dbrxq_decoder& d = step.decoder;
  const int64_t width = ffn(layer), rows = step.rows();
  float* both = scratch.mlp.reserve(3 * rows * width);
  float* product = both + 2 * rows * width;
  const int status = dbrxq_repacked_linear(layer.mlp, 2, d.activation_bits, step.normed, rows, both);
  if (status != DBRXQ_OK) return status;
  for (int64_t row = 0; row < rows; ++row) {
    float *gate = both + 2 * row * width, *to = product + row * width;
    if (d.activation == DBRXQ_SILU) {
      step.kernels.silu_product(gate, gate + width, width);
      std::memcpy(to, gate, sizeof(float) * static_cast<size_t>(width));
    } else {
      for (int64_t i = 0; i < width; ++i) to[i] = activate(d.activation, gate[i]) * gate[width + i];
    }
  }
  return dbrxq_repacked_linear(&layer.mlp[2], 1, d.activation_bits, product, rows, step.added);
}

// The experts of one row, the likeliest first, and their weights.
void choose(const Step& step, const dbrxq_decoder_layer& layer, int64_t row, std::vector<float>& chances,
            int64_t* index, float* weights) {
  const dbrxq_decoder& d = step.decoder;
  float maximum = -std::numeric_limits<float>::infinity(), sum = 0.0f;
  for (int64_t e = 0; e < layer.expert_count; ++e) {
    const char* weight = static_cast<const char*>(layer.router) + e * d.hidden * step.element();
    float& chance = chances[static_cast<size_t>(e)];
    chance = step.kernels.dot(step.normed + row * d.hidden, weight, d.dtype, d.hidden);
    maximum = std::max(maximum, chance);
  }
  for (float& chance : chances) sum += chance = std::exp(chance - maximum);
  for (float& chance : chances) chance /= sum;
  for (int64_t a = 0; a < layer.active; ++a) {
    const auto best = std::max_element(chances.begin(), chances.end());
    index[a] = best - chances.begin();
    weights[a] = *best;
    *best = -1.0f;
  }
  if (layer.expert_norm == 0.0f) return;
  float norm = 0.0f;
  if (layer.expert_norm == 1.0f) {
    for (int64_t a = 0; a < layer.active; ++a) norm += weights[a];
  } else {
    for (int64_t a = 0; a < layer.active; ++a) norm += std::pow(weights[a], layer.expert_norm);
    norm = std::pow(norm, 1.0f / layer.expert_norm);
  }
  for (int64_t a = 0; a < layer.active; ++a) weights[a] /= norm;
}

int sparse(const Step& step, const dbrxq_decoder_layer& layer) {
  const dbrxq_decoder& d = step.decoder;
  const auto pairs = static_cast<size_t>(step.rows() * layer.active);
  std::vector<int64_t> index(pairs);
  std::vector<float> weights(pairs), chances(static_cast<size_t>(layer.expert_count));
  for (int64_t row = 0; row < step.rows(); ++row)
    choose(step, layer, row, chances, index.data() + row * layer.active, weights.data() + row * layer.active);
  return dbrxq_repacked_experts(layer.experts, layer.expert_count, d.activation_bits, step.normed, index.data(),
                                weights.data(), step.rows(), d.hidden, layer.active, d.activation, step.added);
}

int run_layer(const Step& step, const dbrxq_decoder_layer& layer, const dbrxq_decoder_cache& cache) {
  const dbrxq_decoder& d = step.decoder;
  normalise_rows(step, layer.attention_norm, step.normed);
  int status = dbrxq_repacked_linear(layer.qkv, 3, d.activation_bits, step.normed, step.rows(), step.qkv);
  if (status != DBRXQ_OK) return status;
  for (int64_t row = 0; row < step.rows(); ++row) place_token(step, layer, cache, row);
  attend(step, cache);
  status = dbrxq_repacked_linear(&layer.output, 1, d.activation_bits, step.attended, step.rows(), step.added);
  if (status != DBRXQ_OK) return status;
  add_rows(step);
  normalise_rows(step, layer.mlp_norm, step.normed);
  status = layer.experts ? sparse(step, layer) : dense(step, layer);
  if (status == DBRXQ_OK) add_rows(step);
  return status;
}

int decode(const dbrxq_decoder& d, const dbrxq_decoder_cache* cache, int64_t sequences, int64_t tokens, int64_t past,
           const float* cosines, const float* sines, const float* x, float* y) {
  int status = check(d, cache, sequences, tokens, past);
  const int64_t rows = sequences * tokens, attention = d.heads * d.head_dim;
  if (status != DBRXQ_OK || rows == 0) return status;
  const int64_t width = attention + 2 * d.key_heads * d.head_dim;
  float* memory = scratch.step.reserve(rows * (3 * d.hidden + width + 2 * attention));
  const auto take = [&](int64_t floats) {
    float* taken = memory;
    memory += rows * floats;
    return taken;
  };
  Step step{d, decoder_kernels(), sequences, tokens, past, cosines, sines};
  step.x = take(d.hidden);
  step.normed = take(d.hidden);
  step.qkv = take(width);
  step.queries = take(attention);
  step.attended = take(attention);
  step.added = take(d.hidden);
  std::memcpy(step.x, x, sizeof(float) * static_cast<size_t>(rows * d.hidden));
  for (int64_t i = 0; i < d.layer_count && status == DBRXQ_OK; ++i) status = run_layer(step, d.layers[i], cache[i]);
  if (status == DBRXQ_OK) normalise_rows(step, d.final_norm, y);
  return status;
}

}  // namespace
}  // namespace dbrxq

int dbrxq_decode(const dbrxq_decoder* decoder, const dbrxq_decoder_cache* cache, int64_t sequences, int64_t tokens,
                 int64_t past, const float* cosines, const float* sines, const float* x, float* y) {
  return dbrxq::guarded([&] {
    if (!dbrxq::isa_usable()) return static_cast<int>(DBRXQ_BAD_ISA);
    return dbrxq::decode(*decoder, cache, sequences, tokens, past, cosines, sines, x, y);
  });
}
