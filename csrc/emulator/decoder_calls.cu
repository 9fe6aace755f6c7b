// The launches of cuda/decoder/decoder.cuh by number, for the tests: they are no part of the C ABI.
#include "decoder/decoder.cuh"

// `args`: Attention for 0 and Router for 1.
extern "C" __attribute__((visibility("default"))) int dbrxq_emulator_decoder(int call, void* args) {
  using namespace dbrxq;
  if (call == 0) return attention(*static_cast<const Attention*>(args), nullptr);
  return choose_experts(*static_cast<const Router*>(args), nullptr);
}
