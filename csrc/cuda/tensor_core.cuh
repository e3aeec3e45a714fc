// Tensor-core and asynchronous-copy instructions of compute capability 8.0 and later, and launches with more
// than 48 KB of shared memory. The tests replace this one file to run the kernels on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/stable/macros.h>

#include "cuda/cuda_utils.cuh"
#include "cuda/vector.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "TORCH_CUDA_ARCH_LIST: gram, style and feature_distance need compute capability 8.0 or later"
#endif

#define IK_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]

namespace ik::cuda {

IK_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts a copy of the first `bytes` of 16 bytes, zeros behind them; both addresses aligned to 16. L2 fetches
// whole lines: the other half of a 128-byte line is the next stage's.
IK_DEVICE void copy_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}

IK_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of this thread's latest groups of copies are unfinished.
template <int kPending>
IK_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements whose rows of 16 bytes start at the addresses of lanes 8 m .. 8 m +
// 7; lane l gets elements (l / 4, 2 (l % 4) and the next) of each, of its transpose with kTransposed.
template <bool kTransposed>
IK_DEVICE void load_matrices(const char* row, uint32_t (&words)[4]) {
  const uint32_t address = shared_address(row);
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  }
}

// c += a b for a 16 x 8 tile over 32 bytes of both operands: 16 elements of a half type, 8 of TF32.
template <typename T>
IK_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, Half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Rounded to the 11 significant bits of TF32, as float bits. The conversion leaves anything in the other 13.
IK_DEVICE uint32_t round_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits & 0xffffe000u;
}

IK_DEVICE void store_pair(float* address, float first, float second) {
  asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(address), "f"(first), "f"(second) : "memory");
}

template <typename... Parameters, typename... Arguments>
void launch_shared(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, int shared_bytes,
                   const DeviceScope& device, const Arguments&... arguments) {
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  kernel<<<blocks, threads, static_cast<size_t>(shared_bytes), device.stream()>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace ik::cuda
