// Vector loads and stores of E consecutive elements with conversion to and from fp32.
//
// Plain device code: no torch, no CUDA runtime. tests/csrc/ compiles it with g++ as well, which is why the
// few places that need a GPU instruction ask for __CUDA_ARCH__.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#define IK_DEVICE static __device__ __forceinline__
// A large argument of a kernel that is indexed where it lies.
#if defined(__CUDACC__)
#define IK_GRID_CONSTANT __grid_constant__
#else
#define IK_GRID_CONSTANT
#endif

namespace ik::cuda {

using Half = c10::Half;
using BFloat16 = c10::BFloat16;

// E elements of T as they lie in memory, in registers. `words` needs compile-time indices everywhere.
template <typename T, int E>
struct Pack {
  static constexpr int kBytes = E * static_cast<int>(sizeof(T));
  static constexpr int kWords = kBytes / 4;
  static_assert(kBytes % 4 == 0, "a pack is made of 32-bit words");
  uint32_t words[kWords];
};

IK_DEVICE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

IK_DEVICE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// One load of read-only data. `kOnce` keeps it out of L1, for data no other load of the kernel touches; L2
// keeps its normal policy, since the next op often reads the same images.
template <int kBytes, bool kOnce>
IK_DEVICE void load_words(const void* address, uint32_t* words) {
  static_assert(kBytes == 16 || kBytes == 8 || kBytes == 4, "one load instruction");
#if defined(__CUDA_ARCH__)
  if constexpr (kBytes == 16 && kOnce) {
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
        : "l"(address));
  } else if constexpr (kBytes == 16) {
    const uint4 value = __ldg(static_cast<const uint4*>(address));
    words[0] = value.x;
    words[1] = value.y;
    words[2] = value.z;
    words[3] = value.w;
  } else if constexpr (kBytes == 8 && kOnce) {
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
        : "=r"(words[0]), "=r"(words[1])
        : "l"(address));
  } else if constexpr (kBytes == 8) {
    const uint2 value = __ldg(static_cast<const uint2*>(address));
    words[0] = value.x;
    words[1] = value.y;
  } else {
    asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(words[0]) : "l"(address));
  }
#else
  if (reinterpret_cast<uintptr_t>(address) % kBytes != 0) __builtin_trap();  // as the GPU would
  memcpy(words, address, kBytes);
#endif
}

// One pack if `wanted`, else zeros. The address must be aligned to the pack, to 16 bytes for larger ones,
// whose pieces share 32-byte sectors and therefore want L1.
template <typename T, int E>
IK_DEVICE void load_pack_if(bool wanted, const T* address, Pack<T, E>& pack) {
  constexpr int kBytes = Pack<T, E>::kBytes;
  constexpr int kPiece = kBytes < 16 ? kBytes : 16;
#pragma unroll
  for (int i = 0; i < Pack<T, E>::kWords; ++i) pack.words[i] = 0;
  if (!wanted) return;
#pragma unroll
  for (int i = 0; i < kBytes / kPiece; ++i) {
    const char* piece = reinterpret_cast<const char*>(address) + kPiece * i;
    load_words<kPiece, kBytes <= 16>(piece, pack.words + kPiece / 4 * i);
  }
}

// The first `valid` elements one by one, element k at address[offset[k]], zeros after them: any alignment.
template <typename T, int E>
IK_DEVICE void load_pack_each(const T* address, const int (&offset)[E], int valid, Pack<T, E>& pack) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "pixel values");
#pragma unroll
  for (int i = 0; i < Pack<T, E>::kWords; ++i) pack.words[i] = 0;
#pragma unroll
  for (int k = 0; k < E; ++k) {
    if (k >= valid) continue;
    if constexpr (sizeof(T) == 4) {
      pack.words[k] = reinterpret_cast<const uint32_t*>(address)[offset[k]];
    } else {
      const uint32_t bits = reinterpret_cast<const uint16_t*>(address)[offset[k]];
      pack.words[k / 2] |= bits << (16 * (k % 2));
    }
  }
}

template <typename T, int E>
IK_DEVICE void load_pack_scalar(const T* address, int valid, Pack<T, E>& pack) {
  int offset[E];
#pragma unroll
  for (int k = 0; k < E; ++k) offset[k] = k;
  load_pack_each(address, offset, valid, pack);
}

template <typename T, int E>
IK_DEVICE void unpack(const Pack<T, E>& pack, float (&values)[E]) {
#pragma unroll
  for (int k = 0; k < E; ++k) {
    if constexpr (std::is_same_v<T, float>) {
      values[k] = bits_to_float(pack.words[k]);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      const uint32_t word = pack.words[k / 2];
      values[k] = bits_to_float(k % 2 == 0 ? word << 16 : word & 0xffff0000u);
    } else if constexpr (std::is_same_v<T, Half>) {
      const auto bits = static_cast<uint16_t>(pack.words[k / 2] >> (16 * (k % 2)));
      values[k] = static_cast<float>(Half(bits, Half::from_bits()));
    } else {
      static_assert(std::is_same_v<T, uint8_t>, "unknown element type");
      values[k] = static_cast<float>((pack.words[k / 4] >> (8 * (k % 4))) & 0xffu);
    }
  }
}

// Two values rounded to nearest even, the first in the low half. One instruction for two on the GPU.
template <typename T>
IK_DEVICE uint32_t round_pair(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  if constexpr (std::is_same_v<T, BFloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, &pair, 4);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, &pair, 4);
  }
  return word;
#else
  return static_cast<uint32_t>(T(low).x) | static_cast<uint32_t>(T(high).x) << 16;
#endif
}

template <typename T, int E>
IK_DEVICE void pack_values(const float (&values)[E], Pack<T, E>& pack) {
#pragma unroll
  for (int i = 0; i < Pack<T, E>::kWords; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      pack.words[i] = float_to_bits(values[i]);
    } else {
      pack.words[i] = round_pair<T>(values[2 * i], values[2 * i + 1]);
    }
  }
}

// One store. The compiler takes a plain one apart where the values come out of branches.
template <int kBytes>
IK_DEVICE void store_words(void* address, const uint32_t* words) {
  static_assert(kBytes == 16 || kBytes == 8, "one store instruction");
#if defined(__CUDA_ARCH__)
  if constexpr (kBytes == 16) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(words[0]), "r"(words[1]),
                 "r"(words[2]), "r"(words[3])
                 : "memory");
  } else {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(words[0]), "r"(words[1]) : "memory");
  }
#else
  if (reinterpret_cast<uintptr_t>(address) % kBytes != 0) __builtin_trap();  // as the GPU would
  memcpy(address, words, kBytes);
#endif
}

// Stores the first `valid` of E values; `aligned` promises a pack-aligned address and valid == E or 0.
// Default cache policy: the consumer of a gradient or a map is usually the next kernel and finds it in L2.
template <typename T, int E>
IK_DEVICE void store_values(T* address, const float (&values)[E], int valid, bool aligned) {
  Pack<T, E> pack;
  pack_values(values, pack);
  if (aligned) {
    if (valid == 0) return;
#if defined(__CUDA_ARCH__)
    if constexpr (Pack<T, E>::kBytes == 16) {
      *reinterpret_cast<uint4*>(address) =
          make_uint4(pack.words[0], pack.words[1], pack.words[2], pack.words[3]);
    } else {
      static_assert(Pack<T, E>::kBytes == 8, "one store instruction");
      *reinterpret_cast<uint2*>(address) = make_uint2(pack.words[0], pack.words[1]);
    }
#else
    if (reinterpret_cast<uintptr_t>(address) % sizeof(pack.words) != 0) __builtin_trap();
    memcpy(address, pack.words, sizeof(pack.words));
#endif
    return;
  }
#pragma unroll
  for (int k = 0; k < E; ++k) {
    if (k >= valid) continue;
    if constexpr (sizeof(T) == 4) {
      reinterpret_cast<uint32_t*>(address)[k] = pack.words[k];
    } else {
      reinterpret_cast<uint16_t*>(address)[k] = static_cast<uint16_t>(pack.words[k / 2] >> (16 * (k % 2)));
    }
  }
}

}  // namespace ik::cuda
