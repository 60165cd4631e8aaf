// CUDA kernels on a CPU: every thread of a block is a fiber that runs until it has to wait for others. For tests only;
// csrc/cuda/primitives.cuh includes it where LGD_CUDA_ON_HOST is defined.
//
// Wrong use is reported with kernel, block and thread: a barrier that some threads skip, a shuffle or vote that names a
// lane which does not come, a caller that its own mask does not name. Shared memory starts as NaN and lies alone on the
// heap, so that AddressSanitizer sees an access beyond it; UBSan sees a 128-bit access that is not aligned. A missing
// barrier shows as a wrong result: a fiber runs alone until it waits, a warp until it waits for other warps, a block
// until it waits for other blocks; in order or, `reversed`, against it.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (::cuda_on_host::current->index)
#define blockIdx (::cuda_on_host::current->block->index)
#define blockDim (::cuda_on_host::current->block->shape)

namespace cuda_on_host {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Launch {
  int64_t blocks;
  int threads_x, threads_y, cluster;
  int64_t shared_bytes;
};

enum class Place { Running, Warp, BlockBarrier, ClusterBarrier, Finished };

struct Block {
  Index index, shape;
  int rank = 0; // in its cluster
  int64_t shared_bytes = 0;
  std::unique_ptr<char[]> shared;
  std::vector<Block>* cluster = nullptr;
  std::vector<struct Thread> threads;
  bool vote = false;               // what any thread brought to the last barrier
  std::vector<uint64_t> exchanged; // what every thread brought to its last shuffle or vote
};

struct Thread {
  Index index;
  int number = 0; // in its block
  Block* block = nullptr;
  Place place = Place::Running;
  unsigned mask = 0; // the lanes that have to come, where place is Warp
  uint64_t brought = 0;
  void* stack_pointer = nullptr;
  char* stack = nullptr;

  int lane() const { return number % 32; }
};

inline Thread* current = nullptr;
inline bool reversed = false;   // whether the last thread runs first
inline std::string failure;     // what the first kernel that went wrong did
inline std::string kernel_name; // of the launch that runs
inline int launches = 0;

// ---------------------------------------------------------------------------------------------------------------------
// Fibers
// ---------------------------------------------------------------------------------------------------------------------

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif

// Saves the registers that a call keeps, and continues where `to` was saved. x86-64, as the CPU kernels are.
extern "C" void cuda_on_host_switch(void** from, void* to);
asm(R"(
  .text
  .weak cuda_on_host_switch
cuda_on_host_switch:
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
)");

inline void* scheduler = nullptr; // its stack pointer while a fiber runs
inline const std::function<void()>* body = nullptr;

#ifdef __SANITIZE_ADDRESS__
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_size = 0;
#endif

// From the scheduler to `thread`, until that waits.
inline void resume(Thread& thread) {
  current = &thread;
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, thread.stack, kStack);
#endif
  cuda_on_host_switch(&scheduler, thread.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

// From the running thread to the scheduler.
inline void wait_at(Place place) {
  current->place = place;
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, scheduler_stack, scheduler_stack_size);
#endif
  cuda_on_host_switch(&current->stack_pointer, scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

inline void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  (*body)();
  wait_at(Place::Finished);
}

inline char* stack_of(size_t fiber) {
  static std::vector<char*> stacks;
  while (stacks.size() <= fiber) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    stacks.push_back(static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, flags, -1, 0)));
  }
  return stacks[fiber];
}

inline void start(Thread& thread, size_t fiber) {
  thread.stack = stack_of(fiber);
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(thread.stack, kStack); // a kernel that was given up leaves its frames there
#endif
  void** top = reinterpret_cast<void**>(thread.stack + kStack);
  *--top = nullptr; // where a return address would be
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) {
    *--top = nullptr; // the registers
  }
  thread.stack_pointer = top;
}

// ---------------------------------------------------------------------------------------------------------------------
// Reports
// ---------------------------------------------------------------------------------------------------------------------

inline std::string name_of(const Thread& thread) {
  return "block " + std::to_string(thread.block->index.x) + ", thread (" + std::to_string(thread.index.x) + ", " +
         std::to_string(thread.index.y) + ")";
}

inline std::string place_of(const Thread& thread) {
  switch (thread.place) {
    case Place::Running:
      return "runs";
    case Place::Warp:
      return "is at a shuffle or vote of other lanes";
    case Place::BlockBarrier:
      return "is at a block barrier";
    case Place::ClusterBarrier:
      return "is at a cluster barrier";
    case Place::Finished:
      return "has finished";
  }
  return "";
}

inline void report(const std::string& what) {
  if (failure.empty()) {
    failure = kernel_name + ": " + what;
  }
}

// Reports what the running thread did, and gives the kernel up.
[[noreturn]] inline void give_up(const std::string& what) {
  report(name_of(*current) + ": " + what);
  wait_at(Place::Finished);
  __builtin_unreachable();
}

// ---------------------------------------------------------------------------------------------------------------------
// What a kernel calls
// ---------------------------------------------------------------------------------------------------------------------

inline char* shared_memory() {
  return current->block->shared.get();
}

inline void block_sync() {
  wait_at(Place::BlockBarrier);
}

inline bool block_any(bool mine) {
  current->brought = mine;
  wait_at(Place::BlockBarrier);
  return current->block->vote;
}

inline int cluster_rank() {
  return current->block->rank;
}

inline void cluster_sync() {
  wait_at(Place::ClusterBarrier);
}

template <typename A>
A* cluster_pointer(A* address, int rank) {
  const int64_t offset = reinterpret_cast<char*>(address) - shared_memory();
  if (offset < 0 || offset >= current->block->shared_bytes) {
    give_up("a cluster address of what is not its shared memory");
  }
  if (rank < 0 || rank >= static_cast<int>(current->block->cluster->size())) {
    give_up("a cluster address in block " + std::to_string(rank) + " of a smaller cluster");
  }
  return reinterpret_cast<A*>((*current->block->cluster)[rank].shared.get() + offset);
}

inline void meet(unsigned mask, uint64_t brought) {
  if ((mask >> current->lane() & 1) == 0) {
    give_up("calls a shuffle or vote whose mask does not name it");
  }
  current->mask = mask;
  current->brought = brought;
  wait_at(Place::Warp);
}

inline const uint64_t* exchanged_in_warp() {
  return current->block->exchanged.data() + current->number / 32 * 32;
}

template <typename A>
A shuffle_xor(unsigned mask, A value, int offset) {
  const int source = current->lane() ^ offset;
  if ((mask >> source & 1) == 0) {
    give_up("a shuffle reads lane " + std::to_string(source) + ", which its mask does not name");
  }
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(A));
  meet(mask, bits);
  std::memcpy(&value, exchanged_in_warp() + source, sizeof(A));
  return value;
}

inline unsigned ballot(unsigned mask, bool mine) {
  meet(mask, mine);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    votes |= (mask >> lane & 1) != 0 ? static_cast<unsigned>(exchanged_in_warp()[lane]) << lane : 0;
  }
  return votes;
}

inline int lowest_bit(unsigned votes) {
  return std::countr_zero(votes);
}

inline void warp_sync(unsigned mask) {
  meet(mask, 0);
}

// What every lane has, an even number of words; all lanes of the warp have to come.
template <int N>
void gather(const uint32_t (&own)[N], uint32_t (&all)[32][N]) {
  for (int i = 0; i < N; i += 2) {
    meet(0xffffffffu, own[i] | static_cast<uint64_t>(own[i + 1]) << 32);
    for (int lane = 0; lane < 32; ++lane) {
      all[lane][i] = static_cast<uint32_t>(exchanged_in_warp()[lane]);
      all[lane][i + 1] = static_cast<uint32_t>(exchanged_in_warp()[lane] >> 32);
    }
  }
}

// Where the row of every lane begins, 16 bytes in shared memory.
inline void gather_rows(const void* own, const uint16_t* (&all)[32]) {
  const int64_t offset = static_cast<const char*>(own) - shared_memory();
  if (offset < 0 || offset % 16 != 0 || offset + 16 > current->block->shared_bytes) {
    give_up("loads a row of a matrix at byte " + std::to_string(offset) + " of its shared memory");
  }
  meet(0xffffffffu, reinterpret_cast<uint64_t>(own));
  std::memcpy(all, exchanged_in_warp(), sizeof(all));
}

// ---------------------------------------------------------------------------------------------------------------------
// The scheduler: lets every thread run until it waits, and releases those whose partners have all come
// ---------------------------------------------------------------------------------------------------------------------

// Where a lane of the mask is that has not come to the same call, or null if all have.
inline const Thread* missing_lane(const Thread& thread) {
  static const Thread nobody;
  const int first = thread.number / 32 * 32;
  for (int lane = 0; lane < 32; ++lane) {
    if ((thread.mask >> lane & 1) == 0) {
      continue;
    }
    if (first + lane >= static_cast<int>(thread.block->threads.size())) {
      return &nobody;
    }
    const Thread& other = thread.block->threads[first + lane];
    if (other.place != Place::Warp || other.mask != thread.mask) {
      return &other;
    }
  }
  return nullptr;
}

inline bool release_lanes(Thread& thread) {
  if (thread.place != Place::Warp || missing_lane(thread) != nullptr) {
    return false;
  }
  const int first = thread.number / 32 * 32;
  const unsigned mask = thread.mask;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) != 0) {
      Thread& other = thread.block->threads[first + lane];
      thread.block->exchanged[first + lane] = other.brought;
      other.place = Place::Running;
    }
  }
  return true;
}

inline bool all_at(const Block& block, Place place) {
  for (const Thread& thread : block.threads) {
    if (thread.place != place) {
      return false;
    }
  }
  return true;
}

inline bool release_block(Block& block, Place place) {
  if (!all_at(block, place)) {
    return false;
  }
  block.vote = false;
  for (Thread& thread : block.threads) {
    block.vote = block.vote || thread.brought != 0;
    thread.brought = 0;
    thread.place = Place::Running;
  }
  return true;
}

inline bool release_cluster(std::vector<Block>& cluster) {
  for (const Block& block : cluster) {
    if (!all_at(block, Place::ClusterBarrier)) {
      return false;
    }
  }
  for (Block& block : cluster) {
    release_block(block, Place::ClusterBarrier);
  }
  return true;
}

// Lets a warp run until all its threads wait for other warps or have finished.
inline void run_warp(Block& block, int warp) {
  const int first = warp * 32, end = std::min(first + 32, static_cast<int>(block.threads.size()));
  for (bool progress = true; progress;) {
    progress = false;
    for (int i = first; i < end && failure.empty(); ++i) {
      Thread& thread = block.threads[reversed ? first + end - 1 - i : i];
      if (thread.place == Place::Running) {
        resume(thread);
        progress = true;
      }
    }
    for (int i = first; i < end && failure.empty(); ++i) {
      progress = release_lanes(block.threads[i]) || progress;
    }
  }
}

// Lets a block run until all its threads wait for other blocks or have finished. Each warp runs as far ahead of the
// others as it can, so that a barrier that is missing shows; of a cluster, each block.
inline void run_block(Block& block) {
  const int warps = static_cast<int>(block.threads.size() + 31) / 32;
  do {
    for (int warp = 0; warp < warps; ++warp) {
      run_warp(block, reversed ? warps - 1 - warp : warp);
    }
  } while (failure.empty() && release_block(block, Place::BlockBarrier));
}

// Where threads wait for what never comes, says so for the first of them.
inline void report_stuck(const std::vector<Block>& cluster) {
  for (const Block& block : cluster) {
    for (const Thread& thread : block.threads) {
      if (thread.place == Place::Warp) {
        const Thread& other = *missing_lane(thread);
        const std::string who = other.block == nullptr ? "a lane that does not exist" : name_of(other);
        report(
            name_of(thread) + " waits at a shuffle or vote for " + who +
            (other.block == nullptr ? "" : ", which " + place_of(other)));
      }
    }
  }
  for (const Block& block : cluster) {
    for (const Thread& thread : block.threads) {
      for (const Block& others : cluster) {
        for (const Thread& other : others.threads) {
          if (thread.place != Place::Finished && other.place != thread.place) {
            report(
                name_of(thread) + " " + place_of(thread) + " that " + name_of(other) + " skips: it " + place_of(other));
          }
        }
      }
    }
  }
}

inline std::vector<Block> make_cluster(const Launch& launch, int64_t first) {
  std::vector<Block> cluster(launch.cluster);
  const int threads = launch.threads_x * launch.threads_y;
  for (int rank = 0; rank < launch.cluster; ++rank) {
    Block& block = cluster[rank];
    block.index.x = static_cast<unsigned>(first + rank);
    block.shape = {static_cast<unsigned>(launch.threads_x), static_cast<unsigned>(launch.threads_y), 1};
    block.rank = rank;
    block.shared_bytes = launch.shared_bytes;
    block.shared = std::make_unique<char[]>(launch.shared_bytes);
    std::memset(block.shared.get(), 0xff, launch.shared_bytes); // NaN in every floating-point type
    block.threads.resize(threads);
    block.exchanged.resize((threads + 31) / 32 * 32);
  }
  return cluster;
}

inline void run_cluster(std::vector<Block>& cluster) {
  size_t fiber = 0;
  for (Block& block : cluster) {
    block.cluster = &cluster;
    for (size_t i = 0; i < block.threads.size(); ++i) {
      Thread& thread = block.threads[i];
      thread.number = static_cast<int>(i);
      thread.block = &block;
      thread.index = {static_cast<unsigned>(i) % block.shape.x, static_cast<unsigned>(i) / block.shape.x, 0};
      start(thread, fiber++);
    }
  }
  do {
    for (size_t i = 0; i < cluster.size(); ++i) {
      run_block(cluster[reversed ? cluster.size() - 1 - i : i]);
    }
  } while (failure.empty() && release_cluster(cluster));
  report_stuck(cluster);
}

inline std::string why_not(const Launch& launch) {
  const int threads = launch.threads_x * launch.threads_y;
  if (launch.blocks < 1 || launch.blocks > INT32_MAX || launch.blocks % launch.cluster != 0) {
    return "a grid of " + std::to_string(launch.blocks) + " blocks";
  }
  if (threads < 1 || threads > 1024) {
    return "a block of " + std::to_string(threads) + " threads";
  }
  if (launch.cluster < 1 || launch.cluster > 8) {
    return "a cluster of " + std::to_string(launch.cluster) + " blocks";
  }
  if (launch.shared_bytes > 227 * 1024) {
    return std::to_string(launch.shared_bytes) + " bytes of shared memory";
  }
  return "";
}

// Runs a kernel, `call`, on every thread; 0, or 1 if it went wrong, and then `failure` says how.
inline int run(const char* signature, const Launch& launch, const std::function<void()>& call) {
  const std::string text = signature;
  const size_t begin = text.find("kernel = ");
  kernel_name = begin == std::string::npos ? text : text.substr(begin + 9, text.find(';', begin) - begin - 9);
  if (const std::string reason = why_not(launch); !reason.empty()) {
    report(reason);
  }
  body = &call;
  ++launches;
  for (int64_t first = 0; first < launch.blocks && failure.empty(); first += launch.cluster) {
    std::vector<Block> cluster = make_cluster(launch, first);
    run_cluster(cluster);
  }
  return failure.empty() ? 0 : 1;
}

} // namespace cuda_on_host
