// The solver's kernels for AVX-512; empty where the compiler has no such instructions.
#ifdef __AVX512F__
#define DBRXQ_SOLVER_VARIANT avx512
#include "solver_impl.h"

const dbrxq::solver::Kernels& dbrxq::solver::avx512_kernels() { return avx512::kKernels; }
#endif
