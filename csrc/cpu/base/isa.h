// Which instruction set the kernels run on: the best that the CPU has, or what DBRXQ_ISA or dbrxq_set_isa name.
#pragma once

namespace dbrxq {

enum class Isa { scalar, avx2, avx512 };

// False where the environment variable DBRXQ_ISA names a set that is unknown or missing here.
bool isa_usable();
Isa isa();

// Whether byte dot products may be used: always with avx512, and with avx2 where "avxvnni" is in use.
bool isa_has_vnni();

}  // namespace dbrxq
