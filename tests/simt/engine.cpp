#include "engine.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "fiber.h"

namespace simt {
namespace {

constexpr size_t kObserved = 64;  // atomics that a thread remembers until its next fence

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Block;

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  unsigned index = 0;
  State state = State::kDone;
  Place place;         // where it waits
  uint32_t mask = 0;   // of the warp operation it waits in
  uint64_t value = 0;  // what it gives
  std::array<uint64_t, kWarp> received{};
  std::array<char, 2> warp_barrier{};  // two in turn, as those of a block
  unsigned warp_barriers = 0;
  bool fenced = false;
  size_t observed_count = 0;
  std::array<void*, kObserved> observed{};
};

struct Shared {
  void* memory;
  size_t bytes;
};

struct Block {
  unsigned index = 0;
  unsigned threads = 0;
  unsigned at_barrier = 0;
  unsigned done = 0;
  std::vector<std::unique_ptr<Thread>> pool;  // the first `threads` of them
  std::map<const void*, Shared> shared;       // by tag
  const void* wanted = nullptr;               // a tag that a thread asks the host for memory for
  size_t wanted_bytes = 0;
  size_t wanted_alignment = 0;
  std::vector<unsigned> order;
  char* stacks = nullptr;
  size_t stack_count = 0;
  // The addresses are what ThreadSanitizer knows barriers by: two in turn, since a thread may come to the next one
  // while others have yet to leave this one, and must not seem ordered with them by it.
  std::array<char, 2> barrier{};
  unsigned barriers = 0;
};

std::mutex one_launch;
Options chosen = [] {
  Options options;
  if (const char* order = std::getenv("GRANET_SIMT_ORDER")) {
    const std::string name = order;
    if (name == "backward") options.order = Order::kBackward;
    if (name != "backward" && name != "forward") {
      options = {.order = Order::kShuffled, .seed = std::strtoull(order, nullptr, 10)};
    }
  }
  if (const char* resident = std::getenv("GRANET_SIMT_RESIDENT")) {
    options.resident = std::max(1U, static_cast<unsigned>(std::strtoul(resident, nullptr, 10)));
  }
  return options;
}();

Launch launch;
std::vector<std::unique_ptr<Block>> resident;
Thread* running = nullptr;
Fiber host;

// Ours and not the library's: of a template that is compiled with the sanitizer elsewhere, the linker may take that
// copy.
struct RandomBits {
  using result_type = uint64_t;
  static constexpr uint64_t min() { return 0; }
  static constexpr uint64_t max() { return std::numeric_limits<uint64_t>::max(); }

  uint64_t state = 0;
  uint64_t operator()() {  // splitmix64
    uint64_t bits = state += 0x9e3779b97f4a7c15;
    bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9;
    bits = (bits ^ bits >> 27) * 0x94d049bb133111eb;
    return bits ^ bits >> 31;
  }
};
RandomBits random_bits;
char launch_end = 0;
std::string fault;  // raised by a thread of the device

bool shuffles() { return chosen.order == Order::kShuffled; }

std::string text(Place place) {
  const std::string file = place.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line());
}

bool same(Place a, Place b) { return a.line() == b.line() && std::strcmp(a.file_name(), b.file_name()) == 0; }

void leave() {  // to the host, until somebody lets the thread go on; what was done is done when the launch ends
  thread_sanitizer_release(&launch_end);
  switch_fiber(running->fiber, host, /*ends=*/running->state == State::kDone);
}

[[noreturn]] void raise(const std::string& message) {
  fault =
      "block " + std::to_string(running->block->index) + ", thread " + std::to_string(running->index) + ": " + message;
  for (;;) leave();  // the host never comes back
}

void thread_main() {
  launch.body(launch.arguments);
  ++running->block->done;
  running->state = State::kDone;
  leave();
  std::abort();  // an ended thread does not go on
}

void start_block(Block& block, unsigned index) {
  block.index = index;
  block.threads = launch.threads;
  block.at_barrier = block.done = 0;
  while (block.pool.size() < block.threads) block.pool.push_back(std::make_unique<Thread>());
  if (block.stack_count < block.threads) {
    delete_stacks(block.stacks, block.stack_count);
    block.stacks = static_cast<char*>(new_stacks(block.threads));
    block.stack_count = block.threads;
  }
  for (unsigned i = 0; i < block.threads; ++i) {
    Thread& thread = *block.pool[i];
    thread.block = &block;
    thread.index = i;
    thread.state = State::kReady;
    thread.fenced = false;
    thread.observed_count = 0;
    start_fiber(thread.fiber, block.stacks + i * stack_bytes(), &thread_main);
  }
  block.order.resize(block.threads);
  for (unsigned i = 0; i < block.threads; ++i) {
    block.order[i] = chosen.order == Order::kBackward ? block.threads - 1 - i : i;
  }
  if (shuffles()) std::shuffle(block.order.begin(), block.order.end(), random_bits);
}

void end_block(Block& block) {
  for (const auto& [tag, shared] : block.shared) delete_memory(shared.memory, shared.bytes);
  block.shared.clear();
  for (unsigned i = 0; i < block.threads; ++i) end_fiber(block.pool[i]->fiber);
  block.threads = 0;
#if defined(GRANET_SIMT_TSAN)
  delete_stacks(block.stacks, block.stack_count);
  block.stacks = nullptr;
  block.stack_count = 0;
#endif
}

// Where the threads of a block are, for a message: "96 wait at select.cu:12 (syncthreads)".
std::string whereabouts(const Block& block) {
  std::map<std::string, unsigned> places;
  for (unsigned i = 0; i < block.threads; ++i) {
    const Thread& thread = *block.pool[i];
    if (thread.state == State::kDone) ++places["have ended"];
    if (thread.state == State::kAtBarrier) ++places["wait in __syncthreads at " + text(thread.place)];
    if (thread.state == State::kInWarp) {
      char mask[16];
      std::snprintf(mask, sizeof mask, "%08x", thread.mask);
      ++places["wait for the warp's threads " + std::string(mask) + " at " + text(thread.place)];
    }
  }
  std::string result;
  for (const auto& [place, count] : places) {
    result += (result.empty() ? "" : "; ") + std::to_string(count) + " " + place;
  }
  return "block " + std::to_string(block.index) + ": its threads wait for one another: " + result;
}

// By the host, before any of the block's threads: for ThreadSanitizer memory belongs first to who allocated it.
void provide_shared(Block& block) {
  if (block.wanted == nullptr) return;
  void* memory = new_memory(block.wanted_bytes, block.wanted_alignment);
  std::memset(memory, 0xcd, block.wanted_bytes);  // garbage: what a thread reads it must have set
  block.shared[block.wanted] = {memory, block.wanted_bytes};
  block.wanted = nullptr;
  thread_sanitizer_release(&block.shared);
}

// Let each thread that can go on do so once; whether any could.
bool advance(Block& block) {
  bool any = false;
  for (const unsigned i : block.order) {
    Thread& thread = *block.pool[i];
    if (thread.state != State::kReady) continue;
    any = true;
    running = &thread;
    do {
      provide_shared(block);
      switch_fiber(host, thread.fiber, /*ends=*/false);
    } while (block.wanted != nullptr);
    running = nullptr;
    if (!fault.empty()) throw Fault(fault);
  }
  return any;
}

void run_blocks() {
  std::vector<unsigned> waiting(launch.blocks);  // the last one starts first
  for (unsigned i = 0; i < launch.blocks; ++i) {
    waiting[i] = chosen.order == Order::kBackward ? i : launch.blocks - 1 - i;
  }
  if (shuffles()) std::shuffle(waiting.begin(), waiting.end(), random_bits);
  const size_t places = std::min<size_t>(chosen.resident, launch.blocks);
  while (resident.size() < places) resident.push_back(std::make_unique<Block>());
  size_t active = 0;
  do {
    active = 0;
    for (size_t i = 0; i < places; ++i) {
      Block& block = *resident[i];
      if (block.threads == 0) {
        if (waiting.empty()) continue;
        start_block(block, waiting.back());
        waiting.pop_back();
      }
      ++active;
      if (!advance(block)) throw Fault(whereabouts(block));
      if (block.done == block.threads) end_block(block);
    }
  } while (active != 0);
}

}  // namespace

Options options() { return chosen; }

void set_options(const Options& options) {
  const std::lock_guard lock(one_launch);
  chosen = options;
  chosen.resident = std::max(chosen.resident, 1U);
}

void run(const Launch& wanted) {
  const std::lock_guard lock(one_launch);
  launch = wanted;
  random_bits.state = chosen.seed;
  adopt_host(host);
  try {
    run_blocks();
  } catch (...) {
    fault.clear();
    running = nullptr;
    thread_sanitizer_acquire(&launch_end);
    for (const auto& block : resident) end_block(*block);
    throw;
  }
  thread_sanitizer_acquire(&launch_end);
}

void fail(const std::string& message) { raise(message); }

unsigned thread_index() { return running->index; }
unsigned block_index() { return running->block->index; }
unsigned block_size() { return launch.threads; }
unsigned grid_size() { return launch.blocks; }

void sync_threads(Place place) {
  Thread& thread = *running;
  Block& block = *thread.block;
  char* barrier = &block.barrier[block.barriers % 2];
  thread_sanitizer_release(barrier);
  thread.place = place;
  thread.state = State::kAtBarrier;
  if (++block.at_barrier == block.threads) {
    for (unsigned i = 0; i < block.threads; ++i) {
      if (!same(block.pool[i]->place, place)) {
        raise("__syncthreads at " + text(place) + ", while others are in the one at " + text(block.pool[i]->place));
      }
      block.pool[i]->state = State::kReady;
    }
    block.at_barrier = 0;
    ++block.barriers;
  }
  leave();
  thread_sanitizer_acquire(barrier);
}

const uint64_t* exchange(uint32_t mask, uint64_t value, Place place) {
  Thread& thread = *running;
  Block& block = *thread.block;
  const unsigned first = thread.index / kWarp * kWarp;
  if ((mask >> (thread.index - first) & 1) == 0) raise("the mask at " + text(place) + " leaves out its own thread");
  thread.place = place;
  thread.mask = mask;
  thread.value = value;
  thread.state = State::kInWarp;
  std::array<uint64_t, kWarp> values{};
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    if (first + lane >= block.threads) raise("the mask at " + text(place) + " has threads that the block has not");
    const Thread& other = *block.pool[first + lane];
    if (other.state != State::kInWarp || other.mask != mask || !same(other.place, place)) {
      leave();
      return thread.received.data();
    }
    values[lane] = other.value;
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    Thread& other = *block.pool[first + lane];
    other.received = values;
    other.state = State::kReady;
  }
  leave();
  return thread.received.data();
}

void sync_warp(uint32_t mask, Place place) {
  Thread& thread = *running;
  char* own = &thread.warp_barrier[thread.warp_barriers++ % 2];
  thread_sanitizer_release(own);
  const uint64_t* barriers = exchange(mask, reinterpret_cast<uintptr_t>(own), place);
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) != 0) thread_sanitizer_acquire(reinterpret_cast<void*>(barriers[lane]));
  }
}

// As in C++: what was written before a fence is seen by whoever, after an atomic access of his that reads a later one
// of ours, makes a fence.
void fence() {
  Thread& thread = *running;
  for (size_t i = 0; i < thread.observed_count; ++i) thread_sanitizer_acquire(thread.observed[i]);
  thread.fenced = true;
}

void before_atomic(void* address) {
  Thread& thread = *running;
  if (shuffles() && random_bits() % 8 == 0) leave();
  if (thread.fenced) thread_sanitizer_release(address);
}

void after_atomic(void* address) {
  Thread& thread = *running;
  for (size_t i = 0; i < thread.observed_count; ++i) {
    if (thread.observed[i] == address) return;
  }
  thread.observed[thread.observed_count % kObserved] = address;  // the oldest goes
  thread.observed_count = std::min(thread.observed_count + 1, kObserved);
}

void* shared_memory(const void* tag, size_t bytes, size_t alignment) {
  Block& block = *running->block;
  if (!block.shared.contains(tag)) {
    block.wanted = tag;
    block.wanted_bytes = bytes;
    block.wanted_alignment = alignment;
    leave();
  }
  thread_sanitizer_acquire(&block.shared);
  return block.shared.find(tag)->second.memory;
}

void* dynamic_shared_memory() {
  static const char tag = 0;
  if (launch.dynamic_shared == 0) raise("dynamic shared memory, of which the launch gives none");
  return shared_memory(&tag, launch.dynamic_shared, 16);
}

}  // namespace simt
