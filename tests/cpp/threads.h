// Threads for the C++ tests, so that they need neither torch nor OpenMP, and ThreadSanitizer sees every one of them.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace granet::cpu {

class StdThreads final : public Parallel {
 public:
  explicit StdThreads(int64_t threads) : threads_(threads) {}

  void for_each(int64_t tasks, const std::function<void(int64_t)>& task) const override {
    std::atomic<int64_t> next = 0;
    const auto work = [&] {
      for (int64_t i = next++; i < tasks; i = next++) task(i);
    };
    std::vector<std::thread> others;
    for (int64_t i = 1; i < threads_ && i < tasks; ++i) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
  }
  int64_t threads() const override { return threads_; }

 private:
  int64_t threads_;
};

}  // namespace granet::cpu
