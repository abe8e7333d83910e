#include "fiber.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(GRANET_SIMT_TSAN)  // given, because this file is compiled without the sanitizer
#include <sanitizer/tsan_interface.h>
#endif

namespace simt {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 512 * 1024;
#else
constexpr size_t kStackBytes = 128 * 1024;  // of addresses; memory is given where it is touched
#endif

constexpr size_t kGuardBytes = 4096;

constexpr int kMapFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

void* map_memory(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, kMapFlags, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return memory;
}

void (*fiber_main)() = nullptr;
#if defined(__SANITIZE_ADDRESS__)
Fiber* came_from = nullptr;
Fiber* went_to = nullptr;
#endif

void arrived() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(went_to->asan_stack, &bottom, &bytes);
  if (came_from->stack == nullptr) {
    came_from->stack = const_cast<void*>(bottom);
    came_from->stack_bytes = bytes;
  }
#endif
}

[[noreturn]] void begin() {
  arrived();
  fiber_main();
  __builtin_trap();
}

}  // namespace

#if defined(__x86_64__)

// Saves what a called function must preserve, on the stack, and returns on the other stack.
extern "C" void granet_simt_switch(void** from, void* to);
asm(R"(
.text
.type granet_simt_switch, @function
granet_simt_switch:
  .cfi_startproc
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .cfi_endproc
.size granet_simt_switch, .-granet_simt_switch
)");

constexpr size_t kSaved = 7;  // six registers and where to return

void* first_stack_pointer(void* stack, size_t bytes) {
  auto top = reinterpret_cast<uintptr_t>(stack) + bytes;
  top = top / 16 * 16 - sizeof(void*);  // as a call leaves it
  auto* words = reinterpret_cast<void**>(top) - kSaved;
  for (size_t i = 0; i < kSaved + 1; ++i) words[i] = nullptr;
  words[kSaved - 1] = reinterpret_cast<void*>(&begin);
  return words;
}

#elif defined(__aarch64__)

extern "C" void granet_simt_switch(void** from, void* to);
asm(R"(
.text
.type granet_simt_switch, %function
granet_simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size granet_simt_switch, .-granet_simt_switch
)");

void* first_stack_pointer(void* stack, size_t bytes) {
  const auto top = (reinterpret_cast<uintptr_t>(stack) + bytes) / 16 * 16;
  auto* words = reinterpret_cast<void**>(top - 160);
  for (size_t i = 0; i < 20; ++i) words[i] = nullptr;
  words[11] = reinterpret_cast<void*>(&begin);  // x30, the link register
  return words;
}

#else
#error "fibers: expected x86-64 or AArch64"
#endif

void adopt_host(Fiber& host) {
  // Its stack is learnt by the first fiber that comes from it: each launch may be another thread's.
  host.stack = nullptr;
  host.stack_bytes = 0;
#if defined(GRANET_SIMT_TSAN)
  host.tsan_fiber = __tsan_get_current_fiber();
#endif
}

size_t stack_bytes() { return kStackBytes; }

void* new_stacks(size_t count) {
#if defined(GRANET_SIMT_TSAN)
  // Not by mmap, for which the sanitizer writes four times as much shadow; to touch it is enough.
  const long address = syscall(SYS_mmap, nullptr, count * kStackBytes, PROT_READ | PROT_WRITE, kMapFlags, -1, 0);
  if (address == -1) throw std::bad_alloc();
  return reinterpret_cast<void*>(address);
#else
  void* stacks = map_memory(count * kStackBytes);
  for (size_t i = 0; i < count; ++i) {
    mprotect(static_cast<char*>(stacks) + i * kStackBytes, kGuardBytes, PROT_NONE);  // who needs more is stopped
  }
  return stacks;
#endif
}

void delete_stacks(void* stacks, size_t count) {
  if (stacks != nullptr) munmap(stacks, count * kStackBytes);
}

void start_fiber(Fiber& fiber, void* stack, void (*main)()) {
  fiber_main = main;
  fiber.stack = stack;
  fiber.stack_bytes = kStackBytes;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(static_cast<char*>(fiber.stack) + kGuardBytes, fiber.stack_bytes - kGuardBytes);
  fiber.asan_stack = nullptr;
#endif
#if defined(GRANET_SIMT_TSAN)
  fiber.tsan_fiber = __tsan_create_fiber(0);
#endif
  fiber.stack_pointer = first_stack_pointer(fiber.stack, fiber.stack_bytes);
}

void end_fiber([[maybe_unused]] Fiber& fiber) {
#if defined(GRANET_SIMT_TSAN)
  if (fiber.tsan_fiber != nullptr) __tsan_destroy_fiber(fiber.tsan_fiber);
  fiber.tsan_fiber = nullptr;
#endif
}

void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool ends) {
#if defined(__SANITIZE_ADDRESS__)
  came_from = &from;
  went_to = &to;
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.asan_stack, to.stack, to.stack_bytes);
#endif
#if defined(GRANET_SIMT_TSAN)
  __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  granet_simt_switch(&from.stack_pointer, to.stack_pointer);
  arrived();
}

#if defined(GRANET_SIMT_TSAN)
void* new_memory(size_t bytes, size_t) { return map_memory(bytes); }
void delete_memory(void* memory, size_t bytes) { munmap(memory, bytes); }
void thread_sanitizer_release(void* address) { __tsan_release(address); }
void thread_sanitizer_acquire(void* address) { __tsan_acquire(address); }
#else
void* new_memory(size_t bytes, size_t alignment) {
  void* memory = nullptr;
  if (posix_memalign(&memory, std::max(alignment, sizeof(void*)), bytes) != 0) throw std::bad_alloc();
  return memory;
}
void delete_memory(void* memory, size_t) { std::free(memory); }
void thread_sanitizer_release(void*) {}
void thread_sanitizer_acquire(void*) {}
#endif

}  // namespace simt
