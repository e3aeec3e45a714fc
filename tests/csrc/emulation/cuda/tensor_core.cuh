// Stands in for csrc/cuda/tensor_core.cuh: every instruction by its description in the PTX manual, on the
// fibers of simt.h. Sums are cut off as pessimistically as any documented tensor core does.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "cuda/cuda_utils.cuh"
#include "cuda/vector.cuh"

#define IK_DYNAMIC_SHARED(name) alignas(16) static char name[227 * 1024]

namespace simt {

// What the lanes of a warp show each other; of every word its one or two elements.
struct WarpBoard {
  const char* rows[32];
  double a[32][4][2];
  double b[32][2][2];
};

inline WarpBoard& board() {
  static WarpBoard boards[32];
  return boards[Block::running().thread() / 32];
}

struct Copy {
  char* to;
  const void* from;
  size_t bytes;
  int group;
};

struct Copies {
  std::vector<Copy> waiting;
  int groups = 0;
};

inline Copies& copies() {
  static Copies threads[1024];
  return threads[Block::running().thread()];
}

inline void warp_barrier() { Block::running().exchange(0, 0); }

// c + sum of products: every term cut to a multiple of 2^-24 of the largest (25 bits), as is the result to 24
// bits. Compiled without optimisation and called for every element: hence the bits instead of frexp and
// trunc.
inline float cut_sum(float c, const double* products, int count) {
  double largest = std::fabs(static_cast<double>(c));
  double plain = c;
  for (int i = 0; i < count; ++i) {
    const double size = std::fabs(products[i]);
    if (size > largest) largest = size;
    plain += products[i];
  }
  if (!std::isfinite(plain) || largest == 0) return static_cast<float>(plain);
  uint64_t bits;
  std::memcpy(&bits, &largest, 8);
  bits = (bits >> 52) << 52;  // the power of two below the largest
  double unit;
  std::memcpy(&unit, &bits, 8);
  unit *= 0x1p-24;
  const double scale = 1.0 / unit;
  int64_t sum = static_cast<int64_t>(c * scale);
  for (int i = 0; i < count; ++i) sum += static_cast<int64_t>(products[i] * scale);
  const double cut = static_cast<double>(sum) * unit;
  const float rounded = static_cast<float>(cut);
  return std::fabs(static_cast<double>(rounded)) > std::fabs(cut) ? std::nextafterf(rounded, 0.0f) : rounded;
}

}  // namespace simt

namespace ik::cuda {

// Copies happen as late as allowed, in the wait that asks for them; until then the memory holds NaN.
inline void copy_async(void* shared, const void* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    __builtin_trap();  // as the GPU would
  }
  std::memset(shared, 0xff, 16);
  simt::Copies& copies = simt::copies();
  copies.waiting.push_back({static_cast<char*>(shared), global, static_cast<size_t>(bytes), copies.groups});
}

inline void commit_copies() { ++simt::copies().groups; }

template <int kPending>
void wait_for_copies() {
  simt::Copies& copies = simt::copies();
  std::vector<simt::Copy> later;
  for (const simt::Copy& copy : copies.waiting) {
    if (copy.group + kPending >= copies.groups) {
      later.push_back(copy);
      continue;
    }
    std::memset(copy.to, 0, 16);
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
  copies.waiting.swap(later);
}

template <bool kTransposed>
void load_matrices(const char* row, uint32_t (&words)[4]) {
  simt::WarpBoard& board = simt::board();
  const size_t lane = simt::Block::running().thread() % 32;
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) __builtin_trap();
  board.rows[lane] = row;
  simt::warp_barrier();
  for (size_t matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (size_t k = 0; k < 2; ++k) {
      const size_t i = lane / 4;
      const size_t j = 2 * (lane % 4) + k;
      const size_t line = kTransposed ? j : i;
      const size_t column = kTransposed ? i : j;
      std::memcpy(&pair[k], board.rows[8 * matrix + line] + 2 * column, 2);
    }
    std::memcpy(&words[matrix], pair, 4);
  }
  simt::warp_barrier();
}

// The elements of a word, one of TF32 or two of a half type.
template <typename T>
void elements(uint32_t word, double (&values)[2]) {
  if constexpr (std::is_same_v<T, float>) {
    values[0] = bits_to_float(word & 0xffffe000u);  // the hardware ignores the bits TF32 has not
  } else {
    for (int k = 0; k < 2; ++k) {
      values[k] = static_cast<float>(T(static_cast<uint16_t>(word >> (16 * k)), T::from_bits()));
    }
  }
}

template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
  constexpr int kHalf = 4 * kPerWord;  // depth of one word of all four lanes of a group
  simt::WarpBoard& board = simt::board();
  const int lane = static_cast<int>(simt::Block::running().thread() % 32);
  for (int i = 0; i < 4; ++i) elements<T>(a[i], board.a[lane][i]);
  elements<T>(b0, board.b[lane][0]);
  elements<T>(b1, board.b[lane][1]);
  simt::warp_barrier();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8;
    const int column = lane % 4 * 2 + i % 2;
    for (int half = 0; half < 2; ++half) {
      double products[kHalf];
      for (int k = 0; k < kHalf; ++k) {
        products[k] = board.a[row % 8 * 4 + k / kPerWord][row / 8 + 2 * half][k % kPerWord] *
                      board.b[column * 4 + k / kPerWord][half][k % kPerWord];
      }
      c[i] = simt::cut_sum(c[i], products, kHalf);
    }
  }
  simt::warp_barrier();
}

inline uint32_t round_tf32(float value) {
  if (std::isnan(value)) return 0x7fffffffu;
  return (float_to_bits(value) + 0x1000u) & 0xffffe000u;
}

inline void store_pair(float* address, float first, float second) {
  if (reinterpret_cast<uintptr_t>(address) % 8 != 0) __builtin_trap();
  address[0] = first;
  address[1] = second;
}

template <typename... Parameters, typename... Arguments>
void launch_shared(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, int,
                   const DeviceScope& device, const Arguments&... arguments) {
  launch(kernel, blocks, threads, device, arguments...);
}

}  // namespace ik::cuda
