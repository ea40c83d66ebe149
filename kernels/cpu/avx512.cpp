// The engine for CPUs with AVX-512: 32 registers of 16 floats.
#include "engine.h"
#include "target.h"
#if defined(__x86_64__)
#define SF_NAME "avx512"
#define SF_TABLE sf_kernels_avx512
#define SF_LANES 16
#define SF_HAS_FMA 1
#define SF_BLOCK 14
#define SF_OUTER 11
#define SF_TILE 98
// Registers as wide as the vectors need a target; a flag for the whole file would let the linker keep this copy of a
// shared inline function for every CPU.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#include "tile.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
