// PyTorch's thread pool for the kernels of cpu/.
#pragma once

#include <atomic>

#include <torch/csrc/stable/ops.h>

#include "cpu/parallel.h"

namespace granet {

class TorchThreads final : public cpu::Parallel {
 public:
  // For work that takes one thread about so long. What is short is done by the calling thread: to wait for another
  // costs some 10 microseconds, and milliseconds where something else keeps its core busy.
  explicit TorchThreads(double nanoseconds) : alone_(nanoseconds < kShort) {}

  // Each of PyTorch's threads takes the next task until none is left; inside another parallel region one thread does
  // them all.
  void for_each(int64_t tasks, const std::function<void(int64_t)>& task) const override {
    const int64_t workers = threads() < tasks ? threads() : tasks;
    std::atomic<int64_t> next = 0;
    torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
      for (int64_t i = next++; i < tasks; i = next++) task(i);
    });
  }
  int64_t threads() const override { return alone_ ? 1 : torch::stable::get_num_threads(); }

 private:
  static constexpr double kShort = 100'000;

  bool alone_;
};

}  // namespace granet
