// What both implementations of a block of experts share: which tokens go to which expert, and the activation.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

#include "dbrxq.h"

namespace dbrxq {

// Tokens of one pass: bounds the intermediate states to kPassTokens * A rows.
constexpr int64_t kPassTokens = 512;

inline float activate(int activation, float v) {
  switch (activation) {
    case DBRXQ_SILU: return v / (1.0f + std::exp(-v));
    case DBRXQ_GELU: return 0.5f * v * (1.0f + std::erf(v * 0.70710678118654752f));
    case DBRXQ_GELU_TANH: return 0.5f * v * (1.0f + std::tanh(0.79788456080286536f * (v + 0.044715f * v * v * v)));
    default: return v > 0.0f ? v : 0.0f;
  }
}

// The (token, a) pairs of a pass sorted by expert, in token order within one. Slot s is the s-th pair.
struct Routing {
  std::vector<int64_t> begin;     // [E + 1], first slot of each expert
  std::vector<int64_t> token_of;  // [slots]
  std::vector<int64_t> slot_of;   // [tokens * active], -1 where there is no expert

  int64_t slots() const { return begin.back(); }
};

// index [tokens, active], every entry 0..experts (`experts` itself means none).
inline Routing route(const int64_t* index, int64_t tokens, int64_t active, int64_t experts) {
  const auto pairs = static_cast<size_t>(tokens * active);
  Routing routing{std::vector<int64_t>(static_cast<size_t>(experts + 1), 0), {}, std::vector<int64_t>(pairs, -1)};
  for (size_t i = 0; i < pairs; ++i)
    if (index[i] < experts) ++routing.begin[static_cast<size_t>(index[i] + 1)];
  for (size_t e = 1; e < routing.begin.size(); ++e) routing.begin[e] += routing.begin[e - 1];
  std::vector<int64_t> next(routing.begin);
  routing.token_of.resize(static_cast<size_t>(routing.slots()));
  for (size_t i = 0; i < pairs; ++i) {
    if (index[i] >= experts) continue;
    const int64_t slot = next[static_cast<size_t>(index[i])]++;
    routing.token_of[static_cast<size_t>(slot)] = static_cast<int64_t>(i) / active;
    routing.slot_of[i] = slot;
  }
  return routing;
}

// y [hidden] of token t: the sum over a of weights[t, a] * outputs[slot], in order of a.
inline void combine_token(const Routing& routing, const float* weights, int64_t t, int64_t active, int64_t hidden,
                          const float* outputs, float* y) {
  for (int64_t c = 0; c < hidden; ++c) y[c] = 0.0f;
  for (int64_t a = t * active; a < (t + 1) * active; ++a) {
    const int64_t slot = routing.slot_of[static_cast<size_t>(a)];
    if (slot < 0) continue;
    const float* from = outputs + slot * hidden;
    const float p = weights[a];
    for (int64_t c = 0; c < hidden; ++c) y[c] += p * from[c];
  }
}

}  // namespace dbrxq
