// PyTorch's thread pool for the kernels of cpu/.
#pragma once

#include <atomic>

#include <torch/csrc/stable/ops.h>

#include "cpu/parallel.h"

namespace granet {

class TorchThreads final : public cpu::Parallel {
 public:
  // Each of PyTorch's threads takes the next task until none is left; inside another parallel region one thread does
  // them all.
  void for_each(int64_t tasks, const std::function<void(int64_t)>& task) const override {
    const int64_t workers = threads() < tasks ? threads() : tasks;
    std::atomic<int64_t> next = 0;
    torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
      for (int64_t i = next++; i < tasks; i = next++) task(i);
    });
  }
  int64_t threads() const override { return torch::stable::get_num_threads(); }
};

}  // namespace granet
