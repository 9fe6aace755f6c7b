#include "dbrxq.h"

int dbrxq_abi_version(void) { return DBRXQ_ABI_VERSION; }
