// The launches of cuda/few/few.cuh by number, for the tests: they are no part of the C ABI.
#include "few/few.cuh"

// `args`: FewLinears, FewGateUp or FewDown for 0, 1 and 2; for 3 the bytes of a workspace (out), for 4 a workspace to clear.
extern "C" __attribute__((visibility("default"))) int dbrxq_emulator_few(int call, void* args) {
  using namespace dbrxq;
  const cudaStream_t none = nullptr;
  if (call == 0) return few_linears(*static_cast<const FewLinears*>(args), none);
  if (call == 1) return few_gate_up(*static_cast<const FewGateUp*>(args), none);
  if (call == 2) return few_down(*static_cast<const FewDown*>(args), none);
  if (call == 3) return few_workspace(static_cast<int64_t*>(args));
  return few_clear(args, none);
}
