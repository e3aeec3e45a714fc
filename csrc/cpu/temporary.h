// Memory for tensors that live within one call of an op.
#pragma once

#include <utility>

#include "cpu/tensors.h"

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
  using Block = std::pair<void*, int64_t>;

  static IdleMappings& of_this_thread() {
    static thread_local IdleMappings idle;
    return idle;
  }

#if defined(__linux__) && defined(MADV_HUGEPAGE)
  ~IdleMappings() {
    for (const Block& block : blocks_) unmap(block);
  }

  // nullptr where there is none.
  Block take(int64_t bytes) {
    for (size_t i = 0; i < blocks_.size(); ++i) {
      const Block block = blocks_[i];
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

  void give(const Block& block) {
    blocks_.push_back(block);
    int64_t total = 0;
    for (const Block& each : blocks_) total += each.second;
    while (total > 2 * largest) {
      total -= blocks_.front().second;
      unmap(blocks_.front());
      blocks_.erase(blocks_.begin());
    }
  }

 private:
  static void unmap(const Block& block) { (void)munmap(block.first, static_cast<size_t>(block.second)); }
  std::vector<Block> blocks_;
#else
  Block take(int64_t) { return {nullptr, 0}; }
  void give(const Block&) {}
#endif
};

// A dense tensor to be written in full, contiguous or channels_last. Nobody may keep it beyond this object.
class Temporary {
 public:
  Temporary(const Tensor& like, const std::vector<int64_t>& size, bool channels_last, ScalarType dtype) {
    int64_t bytes = dtype_bytes(dtype_code(dtype));
    for (const int64_t extent : size) bytes *= extent;
    if (bytes >= IdleMappings::smallest && bytes < IdleMappings::largest) {
      block_ = IdleMappings::of_this_thread().take(bytes);
    }
    tensor_ = block_.first == nullptr
                  ? empty_image(like, size, channels_last, dtype)
                  : torch::stable::from_blob(block_.first, size, dense_strides(size, channels_last),
                                             like.device(), dtype);
  }
  ~Temporary() {
    if (block_.first != nullptr) IdleMappings::of_this_thread().give(block_);
  }
  Temporary(const Temporary&) = delete;
  Temporary& operator=(const Temporary&) = delete;
  const Tensor& tensor() const { return tensor_; }

 private:
  IdleMappings::Block block_{nullptr, 0};
  Tensor tensor_;
};

}  // namespace ik
