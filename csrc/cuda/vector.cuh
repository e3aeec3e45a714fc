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

template <typename T>
struct Type {
  using type = T;
};

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

// One load. Data that the kernel itself may overwrite must not take the read-only path.
template <int kBytes, bool kReadOnly>
IK_DEVICE void load_words(const void* address, uint32_t* words) {
  static_assert(kBytes == 16 || kBytes == 8 || kBytes == 4, "one load instruction");
#if defined(__CUDA_ARCH__)
  using Word = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, uint32_t>>;
  const Word* from = static_cast<const Word*>(address);
  const Word value = kReadOnly ? __ldg(from) : *from;
  memcpy(words, &value, kBytes);
#else
  if (reinterpret_cast<uintptr_t>(address) % kBytes != 0) __builtin_trap();  // as the GPU would
  memcpy(words, address, kBytes);
#endif
}

// One pack if `wanted`, else zeros. The address must be aligned to the pack, to 16 bytes for larger ones.
template <bool kReadOnly = true, typename T, int E>
IK_DEVICE void load_pack_if(bool wanted, const T* address, Pack<T, E>& pack) {
  constexpr int kBytes = Pack<T, E>::kBytes;
  constexpr int kPiece = kBytes < 16 ? kBytes : 16;
#pragma unroll
  for (int i = 0; i < Pack<T, E>::kWords; ++i) pack.words[i] = 0;
  if (!wanted) return;
#pragma unroll
  for (int i = 0; i < kBytes / kPiece; ++i) {
    const char* piece = reinterpret_cast<const char*>(address) + kPiece * i;
    load_words<kPiece, kReadOnly>(piece, pack.words + kPiece / 4 * i);
  }
}

// The bits of one element.
template <typename T>
IK_DEVICE uint32_t element_bits(const T* address) {
  if constexpr (sizeof(T) == 4) {
    return *reinterpret_cast<const uint32_t*>(address);
  } else {
    return *reinterpret_cast<const uint16_t*>(address);
  }
}

// The first `valid` elements one by one, `stride` elements apart, zeros after them: any alignment.
template <typename T, int E>
IK_DEVICE void load_pack_each(const T* address, int valid, Pack<T, E>& pack, int64_t stride = 1) {
#pragma unroll
  for (int i = 0; i < Pack<T, E>::kWords; ++i) pack.words[i] = 0;
#pragma unroll
  for (int k = 0; k < E; ++k) {
    constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
    if (k >= valid) continue;
    pack.words[k / kPerWord] |= element_bits(address + k * stride) << (32 / kPerWord * (k % kPerWord));
  }
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

// Stores the first `valid` of E values, `stride` elements apart; `aligned` promises a pack-aligned address,
// stride 1 and valid == E or 0. Default cache policy: the consumer of a gradient or a map is usually the next
// kernel and finds it in L2.
template <typename T, int E>
IK_DEVICE void store_values(T* address, const float (&values)[E], int valid, bool aligned,
                            int64_t stride = 1) {
  Pack<T, E> pack;
  pack_values(values, pack);
  if (aligned) {
    if (valid > 0) store_words<Pack<T, E>::kBytes>(address, pack.words);
    return;
  }
#pragma unroll
  for (int k = 0; k < E; ++k) {
    if (k >= valid) continue;
    if constexpr (sizeof(T) == 4) {
      reinterpret_cast<uint32_t*>(address)[k * stride] = pack.words[k];
    } else {
      const uint32_t bits = pack.words[k / 2] >> (16 * (k % 2));
      reinterpret_cast<uint16_t*>(address)[k * stride] = static_cast<uint16_t>(bits);
    }
  }
}

}  // namespace ik::cuda
