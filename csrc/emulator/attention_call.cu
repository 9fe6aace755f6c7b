// The attention of cuda/decoder/decoder.cuh by a name, for the tests: it is no part of the C ABI.
#include "decoder/decoder.cuh"

// `args`: an Attention.
extern "C" __attribute__((visibility("default"))) int dbrxq_emulator_attention(const void* args) {
  return dbrxq::attention(*static_cast<const dbrxq::Attention*>(args), nullptr);
}
