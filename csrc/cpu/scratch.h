// Memory for the length of a call, or of a task, that its thread keeps for the next one: selections over 25 million
// weights met 600 to 1400 page faults a call, which more threads do not shorten, and now meet none.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>
#include <numeric>
#include <type_traits>
#include <vector>

namespace granet::cpu {

// Grows to what the largest call took; of that only pages which were once written take up memory.
class Scratch {
 public:
  // The calling thread's own; freed when the thread ends.
  static Scratch& of_thread() {
    thread_local Scratch scratch;
    return scratch;
  }

  // Not initialised, at the start of a cache line; valid until release().
  template <typename T>
  T* take(size_t count) {
    static_assert(std::is_trivially_copyable_v<T> && alignof(T) <= kAlignment);
    const size_t bytes = (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    if (blocks_.empty() || blocks_.back().size - used_ < bytes) add(bytes);
    void* result = blocks_.back().bytes.get() + used_;
    used_ += bytes;
    return static_cast<T*>(result);
  }

  // Takes everything back, into a single block.
  void release() {
    if (blocks_.size() > 1) {
      const size_t total = std::accumulate(blocks_.begin(), blocks_.end(), size_t{0},
                                           [](size_t sum, const Block& block) { return sum + block.size; });
      blocks_.clear();
      add(total);
    }
    used_ = 0;
  }

 private:
  static constexpr size_t kAlignment = 64;

  struct Free {
    void operator()(std::byte* bytes) const { ::operator delete(bytes, std::align_val_t{kAlignment}); }
  };
  struct Block {
    std::unique_ptr<std::byte[], Free> bytes;
    size_t size;
  };

  void add(size_t bytes) {
    auto* memory = static_cast<std::byte*>(::operator new(bytes, std::align_val_t{kAlignment}));
    blocks_.push_back({std::unique_ptr<std::byte[], Free>(memory), bytes});
    used_ = 0;
  }

  std::vector<Block> blocks_;
  size_t used_ = 0;  // of the last block
};

// The calling thread's scratch memory, taken back at the end of the scope. Scopes do not nest.
class ScratchScope {
 public:
  ScratchScope() = default;
  ScratchScope(const ScratchScope&) = delete;
  ScratchScope& operator=(const ScratchScope&) = delete;
  ~ScratchScope() { scratch_.release(); }

  Scratch& operator*() const { return scratch_; }

 private:
  Scratch& scratch_ = Scratch::of_thread();
};

}  // namespace granet::cpu
