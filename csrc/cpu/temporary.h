// Memory for tensors that live within one call of an op.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/output.h"

namespace ik {

// Mappings of this thread that nobody uses, at most 64 MiB.
//
// glibc serves blocks below 32 MiB from its heap, hands the top of the heap back to the system as soon as it
// can and faults in every page again: with temporaries of 16 MiB one layer took 20 000 page faults a step, 30
// ms of 100. Blocks below 4 MiB stay in the heap, those from 32 MiB on are mapped one by one whoever asks for
// them.
class IdleMappings {
 public:
  static constexpr int64_t smallest = kLargeBlock;
  static constexpr int64_t largest = int64_t(32) << 20;

  ~IdleMappings();
  // nullptr where there is none.
  std::pair<void*, int64_t> take(int64_t bytes);
  void give(std::pair<void*, int64_t> block);
  static IdleMappings& of_this_thread();

 private:
  std::vector<std::pair<void*, int64_t>> blocks_;
};

// A dense tensor to be written in full, contiguous or channels_last. Nobody may keep it beyond this object.
class Temporary {
 public:
  Temporary(const Tensor& like, const std::vector<int64_t>& size, bool channels_last, ScalarType dtype);
  ~Temporary();
  Temporary(const Temporary&) = delete;
  Temporary& operator=(const Temporary&) = delete;
  const Tensor& tensor() const { return tensor_; }

 private:
  std::pair<void*, int64_t> block_{nullptr, 0};
  Tensor tensor_;
};

#if defined(__linux__) && defined(MADV_HUGEPAGE)

inline IdleMappings::~IdleMappings() {
  for (const auto& block : blocks_) (void)munmap(block.first, static_cast<size_t>(block.second));
}

inline std::pair<void*, int64_t> IdleMappings::take(int64_t bytes) {
  for (size_t i = 0; i < blocks_.size(); ++i) {
    const auto block = blocks_[i];
    if (bytes <= block.second && block.second <= 2 * bytes) {
      blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(i));
      return block;
    }
  }
  void* data =
      mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return {nullptr, 0};
  ask_for_huge_pages(data, bytes);
  return {data, bytes};
}

inline void IdleMappings::give(std::pair<void*, int64_t> block) {
  blocks_.push_back(block);
  int64_t total = 0;
  for (const auto& each : blocks_) total += each.second;
  while (total > 2 * largest) {
    total -= blocks_.front().second;
    (void)munmap(blocks_.front().first, static_cast<size_t>(blocks_.front().second));
    blocks_.erase(blocks_.begin());
  }
}

#else

inline IdleMappings::~IdleMappings() {}
inline std::pair<void*, int64_t> IdleMappings::take(int64_t) { return {nullptr, 0}; }
inline void IdleMappings::give(std::pair<void*, int64_t>) {}

#endif

inline IdleMappings& IdleMappings::of_this_thread() {
  static thread_local IdleMappings idle;
  return idle;
}

inline Temporary::Temporary(const Tensor& like, const std::vector<int64_t>& size, bool channels_last,
                            ScalarType dtype) {
  int64_t bytes = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  for (const int64_t extent : size) bytes *= extent;
  if (bytes >= IdleMappings::smallest && bytes < IdleMappings::largest) {
    block_ = IdleMappings::of_this_thread().take(bytes);
  }
  tensor_ = block_.first == nullptr
                ? empty_image(like, size, channels_last, dtype)
                : torch::stable::from_blob(block_.first, size, dense_strides(size, channels_last),
                                           like.device(), dtype);
}

inline Temporary::~Temporary() {
  if (block_.first != nullptr) IdleMappings::of_this_thread().give(block_);
}

}  // namespace ik
