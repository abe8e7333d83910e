// How a kernel uses threads without knowing whose they are: PyTorch's in the extension, std::thread in the C++ tests.
#pragma once

#include <cstdint>
#include <functional>

namespace granet::cpu {

class Parallel {
 public:
  virtual ~Parallel() = default;

  // task(i) once for every i in [0, tasks): in any order, at once on several threads, and done on return. Tasks are
  // handed out one by one, so they may differ in length; one should last some 10 microseconds or more. They must not
  // throw. What a kernel computes may depend on `tasks`, never on the number of threads.
  virtual void for_each(int64_t tasks, const std::function<void(int64_t)>& task) const = 0;

  // How many tasks may run at once.
  virtual int64_t threads() const = 0;
};

class Serial final : public Parallel {
 public:
  void for_each(int64_t tasks, const std::function<void(int64_t)>& task) const override {
    for (int64_t i = 0; i < tasks; ++i) task(i);
  }
  int64_t threads() const override { return 1; }
};

}  // namespace granet::cpu
