// Pieces of kernels that walk over runs of elements: partial vectors, conversion through a buffer, streaming.
#pragma once

#include "cpu/convert.h"
#include "cpu/scratch.h"
#include "cpu/vec.h"

namespace ik {
namespace IK_ISA {

// dst[repeat * i + c] = src[i], i < n.
template <typename T>
static void repeat_each(const T* src, int64_t n, int64_t repeat, T* dst) {
  if (repeat == 3) return triple(src, n, dst);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t c = 0; c < repeat; ++c) *dst++ = src[i];
  }
}

// Calls f(i, count) for runs of at most one vector.
template <typename V, typename F>
IK_INLINE void for_each_vector(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) f(i, V::lanes);
  if (i < n) f(i, static_cast<int>(n - i));
}

// The first `count` elements, 0 behind them.
template <typename V, typename T>
IK_INLINE V load_part(const T* p, int count) {
  if (count == V::lanes) return V::load(p);
#if defined(IK_ISA_AVX512) || defined(IK_ISA_AVX2)
  if constexpr (sizeof(T) == 4) return load_first(p, count);
#endif
  T part[V::lanes] = {};
  for (int i = 0; i < count; ++i) part[i] = p[i];
  return V::load(part);
}
template <typename V, typename T>
IK_INLINE void store_part(V x, T* p, int count) {
  if (count == V::lanes) return x.store(p);
#if defined(IK_ISA_AVX512) || defined(IK_ISA_AVX2)
  if constexpr (sizeof(T) == 4) return store_first(x, p, count);
#endif
  T part[V::lanes];
  x.store(part);
  for (int i = 0; i < count; ++i) p[i] = part[i];
}

// `n` elements at `offset` of `data`, in place when stored as T, else converted into `buffer`.
template <typename T>
static const T* fetch_run(const void* data, Dtype dtype, int64_t offset, int64_t n, T* buffer) {
  if (dtype == kNative<T>) return static_cast<const T*>(data) + offset;
  convert_to(dtype, static_cast<const char*>(data) + offset * dtype_bytes(dtype), n, buffer);
  return buffer;
}

// As a streaming store wants its address.
IK_INLINE bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

// After the last streaming store of a thread.
IK_INLINE void end_stream(bool streamed) {
#if defined(IK_ISA_AVX512) || defined(IK_ISA_AVX2)
  if (streamed) _mm_sfence();
#else
  (void)streamed;
#endif
}

}  // namespace IK_ISA
}  // namespace ik
