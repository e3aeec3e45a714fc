// Runs CUDA kernels on the CPU: every thread of a block is a fiber that runs until it has to wait for others.
//
// What it proves: indices, tails, shuffles, barriers, reductions and numerics of the kernel source as it
// stands, and (vector.cuh traps) the alignment of vector accesses. What it cannot: races between threads that
// do not wait for each other, approximate instructions, speed.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// One block runs at a time.
#define __shared__ static

namespace simt {

struct Index {
  unsigned x;
};

class Block {
 public:
  static constexpr int kWarp = 32;

  explicit Block(int threads) : fibers_(threads), warps_(threads / kWarp) {
    for (Fiber& fiber : fibers_) fiber.stack.reset(new char[kStack]);
  }

  void run(const std::function<void()>& body) {
    body_ = &body;
    running_ = this;
    alive_ = static_cast<int>(fibers_.size());
    for (size_t i = 0; i < fibers_.size(); ++i) start(i);
    while (alive_ > 0) {
      progress_ = false;
      for (current_ = 0; current_ < fibers_.size(); ++current_) {
        if (!fibers_[current_].done) resume(fibers_[current_]);
      }
      if (!progress_) fail("a barrier or shuffle is not reached by all its threads");
    }
  }

  static Block& running() { return *running_; }
  size_t thread() const { return current_; }

  void barrier() { wait(block_, alive_); }

  // A barrier that tells whether any thread's value is true.
  bool any(bool value) {
    vote_ = vote_ || value;
    if (block_.arrived + 1 == alive_) {
      outcome_ = vote_;
      vote_ = false;
    }
    barrier();
    return outcome_;
  }

  int lane() const { return static_cast<int>(current_ % kWarp); }

  // The value of thread `lane` of this warp.
  uint64_t exchange(uint64_t value, int lane) {
    Fiber& fiber = fibers_[current_];
    // Two slots: a lane may reach its next shuffle before its partner has read this one.
    const int slot = fiber.shuffles++ % 2;
    fiber.slots[slot] = value;
    wait(warps_[current_ / kWarp], kWarp);
    return fibers_[current_ / kWarp * kWarp + static_cast<size_t>(lane)].slots[slot];
  }

 private:
  static constexpr size_t kStack = 64 * 1024;

  struct Fiber {
    ucontext_t context;  // of the entry
    jmp_buf jump;        // afterwards: no system call in a switch
    std::unique_ptr<char[]> stack;
    bool started = false;
    bool done = true;
    int shuffles = 0;
    uint64_t slots[2];
  };
  struct Gate {
    int arrived = 0;
    int round = 0;
  };

  static void enter() {
    Block& block = running();
    (*block.body_)();
    block.fibers_[block.current_].done = true;
    block.progress_ = true;
    --block.alive_;
    _longjmp(block.scheduler_, 1);
  }

  void resume(Fiber& fiber) {
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.jump, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }

  void yield() {
    if (_setjmp(fibers_[current_].jump) == 0) _longjmp(scheduler_, 1);
  }

  void start(size_t i) {
    Fiber& fiber = fibers_[i];
    fiber.started = false;
    fiber.done = false;
    fiber.shuffles = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::enter, 0);
  }

  void wait(Gate& gate, int expected) {
    const int round = gate.round;
    progress_ = true;
    if (++gate.arrived == expected) {
      gate.arrived = 0;
      ++gate.round;
    }
    while (gate.round == round) yield();
    progress_ = true;
  }

  [[noreturn]] static void fail(const char* message) {
    std::fprintf(stderr, "simt: %s\n", message);
    std::abort();
  }

  static inline Block* running_ = nullptr;
  std::vector<Fiber> fibers_;
  std::vector<Gate> warps_;
  Gate block_;
  jmp_buf scheduler_;
  const std::function<void()>* body_ = nullptr;
  size_t current_ = 0;
  int alive_ = 0;
  bool progress_ = false;
  bool vote_ = false;
  bool outcome_ = false;
};

// Read as variables by the kernels; reading is a call, as all fibers share one set of globals.
inline unsigned block_index = 0;
inline unsigned block_count = 0;

template <typename T>
T shuffle(T value, int lane) {
  uint64_t bits = 0;
  static_assert(sizeof(T) <= sizeof(bits), "shuffles move at most 8 bytes here");
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = Block::running().exchange(bits, lane);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

// The lane `step` further, this one where the warp ends before.
inline int neighbor(int step) {
  const int lane = Block::running().lane();
  return lane + step >= 0 && lane + step < Block::kWarp ? lane + step : lane;
}

template <typename Kernel>
void launch(unsigned blocks, unsigned threads, const Kernel& kernel) {
  // Kept: the pages of a thousand stacks cost more than most kernels.
  static std::map<unsigned, Block> blocks_by_size;
  Block& block = blocks_by_size.try_emplace(threads, static_cast<int>(threads)).first->second;
  const std::function<void()> body = kernel;
  block_count = blocks;
  for (block_index = 0; block_index < blocks; ++block_index) block.run(body);
}

}  // namespace simt

#define threadIdx (simt::Index{static_cast<unsigned>(simt::Block::running().thread())})
#define blockIdx (simt::Index{simt::block_index})
#define gridDim (simt::Index{simt::block_count})
#define __syncthreads() simt::Block::running().barrier()
#define __syncthreads_or(value) simt::Block::running().any(value)
#define __shfl_sync(mask, value, lane) simt::shuffle(value, (lane) % 32)
#define __shfl_xor_sync(mask, value, step) simt::shuffle(value, simt::Block::running().lane() ^ (step))
#define __shfl_up_sync(mask, value, step) simt::shuffle(value, simt::neighbor(-(step)))
#define __shfl_down_sync(mask, value, step) simt::shuffle(value, simt::neighbor(step))
