// The solver's kernels for AVX2; empty where the compiler has no such instructions.
#ifdef __AVX2__
#define DBRXQ_SOLVER_VARIANT avx2
#include "solver_impl.h"

const dbrxq::solver::Kernels& dbrxq::solver::avx2_kernels() { return avx2::kKernels; }
#endif
