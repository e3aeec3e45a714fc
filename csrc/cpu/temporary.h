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

}  // namespace ik
