// Runs CUDA kernels on the host, one thread of the device after another; see simt.h.
//
// A thread of the device is a fiber: it runs until it waits for others, then the next one runs. So a launch is
// repeatable, and a barrier that some thread never reaches is found at once, as nothing can go on. ThreadSanitizer is
// told of each fiber as of a thread, ordered with others by barriers alone: it sees races within a block and between
// blocks whatever the order they happened to run in. Nothing here may be compiled with -fsanitize=thread, for which
// the fibers' own book-keeping would be races.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>

namespace simt {

// What a kernel did wrong: a barrier that not all threads reach, for example.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr uint32_t kWarp = 32;
constexpr uint32_t kMostThreads = 1024;     // of a block
constexpr size_t kMostShared = 227 * 1024;  // bytes of a block, on compute capability 9.0
constexpr unsigned kMostBlocks = 2147483647;

// In which order threads, and blocks, take turns. Results must not depend on it.
enum class Order { kForward, kBackward, kShuffled };

struct Options {
  Order order = Order::kForward;
  uint64_t seed = 1;
  unsigned resident = 2;  // blocks that take turns; the next one starts when one of them has ended
};

// What further launches do. At first: GRANET_SIMT_ORDER (forward, backward or a seed), GRANET_SIMT_RESIDENT.
Options options();
void set_options(const Options& options);

struct Launch {
  unsigned blocks;
  unsigned threads;
  size_t dynamic_shared;
  void (*body)(const void* arguments);
  const void* arguments;
};

void run(const Launch& launch);  // throws Fault

// Of the running thread.
unsigned thread_index();
unsigned block_index();
unsigned block_size();
unsigned grid_size();

using Place = std::source_location;

[[noreturn]] void fail(const std::string& message);  // ends the launch with a Fault
void sync_threads(Place place);
// All threads of the warp that are in `mask` give a value and get the 32 of the warp; 0 for those outside.
const uint64_t* exchange(uint32_t mask, uint64_t value, Place place);
void sync_warp(uint32_t mask, Place place);
void fence();

// Memory of the block that all its threads share, one for each tag; filled with garbage.
void* shared_memory(const void* tag, size_t bytes, size_t alignment);
void* dynamic_shared_memory();

// Around every atomic access: fences order what they order, and other threads may go first.
void before_atomic(void* address);
void after_atomic(void* address);

}  // namespace simt
