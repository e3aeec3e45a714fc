// Output tensors of the CPU ops.
#pragma once

#include <cstdint>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/op_args.h"

namespace ik {

// Freed blocks of this size usually go back to the system (glibc maps those from 32 MiB on anew, and trims
// its heap), so that each step faults in all the pages of its outputs: for 64 MiB 25 to 40 ms, of a backward
// that computes for 18. With pages of 2 MiB the faults are 1/512 as many and the time is a quarter.
constexpr int64_t kLargeBlock = int64_t(4) << 20;

// Gradients of more bytes than this leave the cache anyway: written around it they spare the read for
// ownership.
constexpr int64_t kStreamBytes = int64_t(16) << 20;

static inline void ask_for_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kLargeBlock) return;
  constexpr uintptr_t page = uintptr_t(2) << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  // Advice: where it is refused, pages stay small.
  if (end > first) (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

// An image that is about to be written in full.
static inline Tensor empty_output(const Tensor& like, const std::vector<int64_t>& size, bool channels_last,
                                  ScalarType dtype) {
  Tensor out = empty_image(like, size, channels_last, dtype);
  ask_for_huge_pages(out.mutable_data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
  return out;
}

}  // namespace ik
