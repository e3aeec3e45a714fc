// Helpers for files compiled once per instruction set. No templates of the standard library that hold code: a
// copy compiled for AVX-512 could be the one that is linked for every instruction set.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "cpu/isa/vec.h"

namespace ik::IK_ISA {
namespace {

// A core alone keeps too few reads in flight to use the memory. Prefetching into the second-level cache, half
// a page ahead, raised two streams of reads from 21 to 28 GB/s on two Zen 4 cores; into the first level it
// gained nothing.
template <typename S>
IK_INLINE void prefetch(const S* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + 2048, 0, 2);
}

// For stores around the cache of whole vectors.
IK_INLINE bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

// Orders them before whatever tells other threads that the work is done.
IK_INLINE void end_stream(bool stream) {
#if defined(IK_ISA_AVX)
  if (stream) _mm_sfence();
#else
  (void)stream;
#endif
}

IK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// 64-byte aligned scratch memory of one kernel call.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(nullptr) { resize(size); }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  // Only of one that is empty.
  void resize(int64_t size) {
    if (size > 0 && posix_memalign(&data_, 64, static_cast<size_t>(size) * sizeof(T)) != 0) std::abort();
  }
  T* get() { return static_cast<T*>(data_); }

 private:
  void* data_;
};

}  // namespace
}  // namespace ik::IK_ISA
