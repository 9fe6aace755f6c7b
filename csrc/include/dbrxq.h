// The whole C ABI of the native kernels: plain pointers, 64-bit sizes, an int status. No torch, no exceptions.
#pragma once
#include <stdint.h>

#define DBRXQ_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

// Version of this interface; the Python side refuses a library that reports another one.
#define DBRXQ_ABI_VERSION 1
DBRXQ_API int dbrxq_abi_version(void);

// Threads that the kernels may use, all callers together; by default all hardware threads.
DBRXQ_API void dbrxq_set_threads(int count);
DBRXQ_API int dbrxq_threads(void);

#ifdef __cplusplus
}
#endif
