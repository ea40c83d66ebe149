// The engine for any CPU: vectors of 4 floats, which are SSE2 on x86-64 and NEON (with its FMA) on AArch64.
#include "engine.h"
#include "target.h"
#define SF_NAME "portable"
#define SF_TABLE sf_kernels_portable
#define SF_LANES 4
#if defined(__aarch64__)
#define SF_HAS_FMA 1
#define SF_BLOCK 12
#define SF_OUTER 8
#else
#define SF_HAS_FMA 0
#define SF_BLOCK 6
#define SF_OUTER 4
#endif
#define SF_TILE 96
#include "tile.inl"
