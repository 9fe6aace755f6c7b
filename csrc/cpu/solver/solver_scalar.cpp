// The solver's kernels for any CPU (on x86-64: SSE2).
#define DBRXQ_SOLVER_VARIANT scalar
#include "solver_impl.h"

const dbrxq::solver::Kernels& dbrxq::solver::scalar_kernels() { return scalar::kKernels; }
