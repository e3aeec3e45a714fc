// Qualifiers that let one function serve g++ and nvcc.
#pragma once

// Internal linkage and forced inlining: each file of csrc/cpu/isa is compiled once per instruction set, and a
// shared out-of-line copy could be the AVX-512 one on a machine without AVX-512.
#if defined(__CUDACC__)
#define IK_HD static __host__ __device__ __forceinline__
#else
#define IK_HD static inline __attribute__((always_inline))
#endif
