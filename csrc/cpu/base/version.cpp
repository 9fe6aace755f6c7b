// The ABI version, which a caller checks first.
#include "dbrxq.h"

int dbrxq_abi_version(void) { return DBRXQ_ABI_VERSION; }
