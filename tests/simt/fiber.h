// Threads of execution that take turns on one thread of the system, and what sanitizers are told of them.
#pragma once

#include <cstddef>

namespace simt {

struct Fiber {
  void* stack = nullptr;  // its memory; of the host's it is the system's
  size_t stack_bytes = 0;
  void* stack_pointer = nullptr;
  void* asan_stack = nullptr;
  void* tsan_fiber = nullptr;
};

void adopt_host(Fiber& host);  // the thread of the system that runs now
// Give a fiber a stack of stack_bytes(), on which it begins when it is switched to; `main` must not return.
void start_fiber(Fiber& fiber, void* stack, void (*main)());
void end_fiber(Fiber& fiber);  // it will not be switched to again
void switch_fiber(Fiber& from, Fiber& to, bool ends);

// Stacks, one behind the other. For ThreadSanitizer those of a block must be new ones: see new_memory.
size_t stack_bytes();
void* new_stacks(size_t count);
void delete_stacks(void* stacks, size_t count);

// Fresh memory, exactly so large where AddressSanitizer looks. For ThreadSanitizer it comes from the system, which
// makes it forget who used these addresses before: to free memory would be a race with whoever was not ordered with the
// host.
void* new_memory(size_t bytes, size_t alignment);
void delete_memory(void* memory, size_t bytes);

// Without the sanitizer they do nothing.
void thread_sanitizer_release(void* address);
void thread_sanitizer_acquire(void* address);

}  // namespace simt
