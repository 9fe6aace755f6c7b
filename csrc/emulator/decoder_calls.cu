// Launches of cuda/decoder/decoder.cuh by number, for the tests: they are no part of the C ABI.
#include "decoder/decoder.cuh"

// `args`: an Attention for 0, a Sample for 1.
extern "C" __attribute__((visibility("default"))) int dbrxq_emulator_decoder(int call, const void* args) {
  using namespace dbrxq;
  if (call == 0) return attention(*static_cast<const Attention*>(args), nullptr);
  return sample(*static_cast<const Sample*>(args), nullptr);
}
