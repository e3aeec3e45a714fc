#include "cpu/isa.h"

#if defined(IK_ISA_GENERIC)

#include "cpu/temporary.h"

namespace ik {

#if defined(__linux__) && defined(MADV_HUGEPAGE)

IdleMappings::~IdleMappings() {
  for (const auto& block : blocks_) (void)munmap(block.first, static_cast<size_t>(block.second));
}

std::pair<void*, int64_t> IdleMappings::take(int64_t bytes) {
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

void IdleMappings::give(std::pair<void*, int64_t> block) {
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

IdleMappings::~IdleMappings() {}
std::pair<void*, int64_t> IdleMappings::take(int64_t) { return {nullptr, 0}; }
void IdleMappings::give(std::pair<void*, int64_t>) {}

#endif

IdleMappings& IdleMappings::of_this_thread() {
  static thread_local IdleMappings idle;
  return idle;
}

Temporary::Temporary(const Tensor& like, const std::vector<int64_t>& size, bool channels_last,
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

Temporary::~Temporary() {
  if (block_.first != nullptr) IdleMappings::of_this_thread().give(block_);
}

}  // namespace ik

#endif
