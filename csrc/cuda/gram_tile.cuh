// Products of matrix tiles on tensor cores with the accuracy of fp32 sums: staging in shared memory,
// fragments, warps.
//
// Operands are tiles of rows x depth, the product sums over the depth: C[i][j] = sum_k A[i][k] B[j][k].
// Memory holds them with the depth contiguous ("direct": pixels of NCHW for a Gram matrix) or the rows
// ("transposed"); neither is transposed in memory, the fragment loads do it. A stage is 64 bytes of depth. A
// warp makes 32 x 32 of the product.
//
// Half types are exact on tensor cores. An fp32 value x is split into big = tf32(x) and small = tf32(x -
// big), and big big + big small + small big leaves a relative error of about 2^-22 a product; where torch's
// setting allows TF32, big big is all. Tensor cores cut off the bits of a sum that do not fit instead of
// rounding, which over thousands of pixels of one sign adds up to a bias: every short chain of products
// starts from zero and is added to the sum in an ordinary fp32 register.
//
// Small is NaN for Inf, and Inf times a small of 0 is NaN, too: with an Inf among the operands a sum is NaN
// even where its big products alone are Inf, as they should be. A block that finds NaN in its sums makes
// those anew without small parts of Inf. Finite operands pay for one look at the sums; a check at every
// product would take 8 instructions for 3 of the tensor core.
#pragma once

#include "cuda/sums.cuh"
#include "cuda/tensor_core.cuh"

namespace ik::cuda {

constexpr int kStageBytes = 64;
constexpr int kStepBytes = 32;  // of one mma
constexpr int kSteps = kStageBytes / kStepBytes;
constexpr int kWarpRows = 32;  // of the product, and as many columns

template <typename T>
constexpr int kDepth = kStageBytes / static_cast<int>(sizeof(T));

// 16 bytes moved as one access.
struct alignas(16) Words {
  uint32_t word[4];
};

template <typename T>
constexpr int kPiece = 16 / static_cast<int>(sizeof(T));

// Lines of a tile in shared memory. The padding puts the rows that one fragment load touches into different
// banks.
template <typename T, int kRows, bool kTransposedRows>
struct TileShape {
  static constexpr bool kTransposed = kTransposedRows;
  static constexpr int kLines = kTransposed ? kDepth<T> : kRows;
  static constexpr int kLength = kTransposed ? kRows : kDepth<T>;
  static constexpr int kPadding = kTransposed && sizeof(T) == 4 ? 32 : 16;
  static constexpr int kPitch = kLength * static_cast<int>(sizeof(T)) + kPadding;
  static constexpr int kBytes = kLines * kPitch;
};

// Copies lines of `length` elements, `stride` apart, to a tile; zeros beyond `lines` and `length`. `aligned`:
// every line starts at a multiple of 16 bytes. Else the elements go one by one, and at once.
template <typename T, typename Shape, int kThreadCount>
IK_DEVICE void load_tile(char* tile, const T* source, int64_t stride, int lines, int length, bool aligned) {
  constexpr int kPieces = Shape::kLength / kPiece<T>;
  constexpr int kHop = kThreadCount / kPieces;  // lines in one round of all threads
  static_assert(kThreadCount % kPieces == 0 && Shape::kLines % kHop == 0, "whole rounds of all threads");
  const int first = static_cast<int>(threadIdx.x) / kPieces;
  const int x = static_cast<int>(threadIdx.x) % kPieces * kPiece<T>;
  const int rest = length - x;
  const int valid = rest < 0 ? 0 : (rest < kPiece<T> ? rest : kPiece<T>);
  char* to = tile + first * Shape::kPitch + x * static_cast<int>(sizeof(T));
  const T* from = source + first * stride + x;
  if (aligned) {
#pragma unroll
    for (int i = 0; i < Shape::kLines / kHop; ++i) {
      const int bytes = first + i * kHop < lines ? valid * static_cast<int>(sizeof(T)) : 0;
      copy_async(to + i * kHop * Shape::kPitch, bytes > 0 ? from + i * kHop * stride : source, bytes);
    }
  } else {
#pragma unroll 1
    for (int line = first; line < Shape::kLines; line += kHop) {
      Pack<T, kPiece<T>> pack;
      load_pack_each(from, line < lines ? valid : 0, pack);
      *reinterpret_cast<Words*>(to) = Words{{pack.words[0], pack.words[1], pack.words[2], pack.words[3]}};
      from += kHop * stride;
      to += kHop * Shape::kPitch;
    }
  }
}

// Fragment of 16 rows and one step of depth. Lane l = 4 g + t gets the 4 bytes of depth at 4 t of rows g and
// g + 8, then the same 16 bytes further on: the order of the A operand. As B operand it is two tiles of 8
// columns, words {0, 2} and {1, 3}.
template <typename T, typename Shape>
IK_DEVICE void load_fragment(const char* tile, int row, int step, uint32_t (&words)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if constexpr (!Shape::kTransposed) {
    load_matrices<false>(tile + (row + lane % 16) * Shape::kPitch + step * kStepBytes + lane / 16 * 16,
                         words);
  } else if constexpr (sizeof(T) == 2) {
    const int line = step * 16 + lane / 16 * 8 + lane % 8;
    load_matrices<true>(tile + line * Shape::kPitch + (row + lane / 8 % 2 * 8) * 2, words);
  } else {
    const char* first = tile + (step * 8 + lane % 4) * Shape::kPitch + (row + lane / 4) * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = *reinterpret_cast<const uint32_t*>(first + i / 2 * 4 * Shape::kPitch + i % 2 * 32);
    }
  }
}

IK_DEVICE bool is_nan(float value) { return value != value; }
IK_DEVICE bool is_finite(float value) { return fabsf(value) <= 3.402823466e38f; }

// The parts of fp32 operands that are multiplied: big with big alone, or all but small with small. Half types
// have one part; see Low for those of a factor.
enum class Products : int { big, all };

template <Products kProducts>
using Constant = std::integral_constant<Products, kProducts>;

// Replaces fp32 words by their big parts.
template <Products kProducts>
IK_DEVICE void split_tf32(uint32_t (&words)[4], [[maybe_unused]] uint32_t (&small)[4]) {
  constexpr float kLargest = 0x1.ffcp127f;  // of TF32; finite values above it round to Inf
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float value = bits_to_float(words[i]);
    if constexpr (kProducts == Products::all) {
      // Finite values above the largest become Inf and -Inf, whose sum is NaN and is made anew.
      words[i] = round_tf32(value);
      small[i] = round_tf32(value - bits_to_float(words[i]));
    } else {
      words[i] = fabsf(value) > kLargest ? words[i] & 0xffffe000u : round_tf32(value);
    }
  }
}

// Where the low parts of B come from: nowhere (B has none, or is rounded already), split off in registers
// (fp32), or tiles of their own behind B's.
enum class Low : int { none, split, tiles };

// Parts that an fp32 operand in memory is split into: 22 bits of its 24 with TF32 and half, all with
// bfloat16.
template <typename T>
constexpr int kParts = std::is_same_v<T, BFloat16> ? 3 : 2;

using WarpSums = float[2][4][4];  // [rows / 16][columns / 8][mma accumulator]

IK_DEVICE bool has_nan(const WarpSums& sums) {
  bool result = false;
#pragma unroll
  for (int i = 0; i < 32; ++i) result = result || is_nan(sums[i / 16][i / 4 % 4][i % 4]);
  return result;
}

// Adds one stage of A[a_row ..][k] B[b_row ..][k], 32 x 32, to the sums of this warp.
template <typename T, typename ShapeA, typename ShapeB, Products kProducts, Low kLow>
IK_DEVICE void multiply_stage(const char* a, int a_row, const char* b, int b_row, WarpSums& sums) {
  constexpr bool kFull = sizeof(T) == 4;
  constexpr bool kSplit = kFull && kProducts == Products::all;
  constexpr bool kLowOfB = kLow == Low::tiles || (kLow == Low::split && kSplit);
  constexpr int kLows = kLow == Low::tiles ? kParts<T> - 1 : 1;
  // Without splitting two steps are 2 mma instructions; with it one step is already up to 3.
  constexpr int kChain = kFull ? 1 : kSteps;
// fp32: one step at a time, as the fragments of two do not fit in 128 registers.
#pragma unroll 1
  for (int first = 0; first < kSteps; first += kChain) {
    uint32_t a_words[kChain][2][4];
    [[maybe_unused]] uint32_t a_small[kChain][2][4];
#pragma unroll
    for (int s = 0; s < kChain; ++s) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        load_fragment<T, ShapeA>(a, a_row + 16 * m, first + s, a_words[s][m]);
        if constexpr (kFull) split_tf32<kProducts>(a_words[s][m], a_small[s][m]);
      }
    }
    // 16 columns at a time: fewer registers than all 32.
#pragma unroll
    for (int columns = 0; columns < 2; ++columns) {
      uint32_t b_words[kChain][4];
      [[maybe_unused]] uint32_t b_small[kChain][kLows][4];
#pragma unroll
      for (int s = 0; s < kChain; ++s) {
        load_fragment<T, ShapeB>(b, b_row + 16 * columns, first + s, b_words[s]);
        if constexpr (kLow == Low::split) split_tf32<kProducts>(b_words[s], b_small[s][0]);
        if constexpr (kLow == Low::tiles) {
#pragma unroll
          for (int low = 0; low < kLows; ++low) {
            load_fragment<T, ShapeB>(b + (low + 1) * ShapeB::kBytes, b_row + 16 * columns, first + s,
                                     b_small[s][low]);
          }
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float chain[4] = {};
#pragma unroll
          for (int s = 0; s < kChain; ++s) {
            // Small terms first: what is cut off depends on the largest term so far.
            if constexpr (kSplit) multiply_add<T>(chain, a_small[s][m], b_words[s][i], b_words[s][i + 2]);
            if constexpr (kLowOfB) {
#pragma unroll
              for (int low = kLows - 1; low >= 0; --low) {
                multiply_add<T>(chain, a_words[s][m], b_small[s][low][i], b_small[s][low][i + 2]);
              }
            }
            multiply_add<T>(chain, a_words[s][m], b_words[s][i], b_words[s][i + 2]);
          }
#pragma unroll
          for (int k = 0; k < 4; ++k) sums[m][2 * columns + i][k] += chain[k];
        }
      }
    }
  }
}

// Row and column, within the warp's 32 x 32, of the first of the two neighbours in accumulators 2 `pair` and
// the next.
IK_DEVICE int sum_row(int m, int pair) {
  return 16 * m + 8 * pair + static_cast<int>(threadIdx.x) % kWarp / 4;
}
IK_DEVICE int sum_column(int n) { return 8 * n + static_cast<int>(threadIdx.x) % 4 * 2; }

}  // namespace ik::cuda
