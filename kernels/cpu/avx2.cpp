// The engine for CPUs with AVX2 and FMA: 16 registers of 8 floats.
#include "engine.h"
#include "target.h"
#if defined(__x86_64__)
#define SF_NAME "avx2"
#define SF_TABLE sf_kernels_avx2
#define SF_LANES 8
#define SF_HAS_FMA 1
#define SF_BLOCK 6
#define SF_OUTER 6
#define SF_TILE 96
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "tile.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
