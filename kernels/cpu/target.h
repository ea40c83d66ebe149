// Words that hide what compilers spell differently.
#pragma once
#define SF_INLINE static inline __attribute__((always_inline))
#define SF_NOINLINE static __attribute__((noinline))
#if defined(__clang__)
#define SF_UNROLL _Pragma("clang loop unroll(full)")
#else
#define SF_UNROLL _Pragma("GCC unroll 32")
#endif
