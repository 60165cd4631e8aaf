// Threads that work on one row together: how they reduce, and how they wait for each other.
//
// Of every team, `rank` and `size` count the threads that share the part of the row that is in one block. `reduce`
// gives every thread the same bits. `any` says whether a thing holds for some row whose threads have to take the same
// branches, because they meet at the same barriers.
#pragma once

#include "primitives.cuh"

namespace lgd::gpu {

struct Sum {
  static constexpr double neutral = 0;
  template <typename A>
  LGD_DEVICE A operator()(A a, A b) const {
    return a + b;
  }
};
struct Max {
  static constexpr double neutral = -std::numeric_limits<double>::infinity();
  template <typename A>
  LGD_DEVICE A operator()(A a, A b) const {
    return larger_of(a, b);
  }
};

constexpr int kMostReduced = 3; // numbers at a time

// Neighbouring lanes of a warp, a power of two of them.
struct Lanes {
  int rank, size;
  unsigned mask;

  LGD_DEVICE explicit Lanes(int size) : size(size) {
    const int lane = threadIdx.x % kWarp;
    rank = lane % size;
    mask = kAllLanes >> (kWarp - size) << (lane - rank);
  }
  template <typename A, int N, typename Op>
  LGD_DEVICE void reduce(A (&values)[N], Op op) const {
    for (int offset = size / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        values[n] = op(values[n], shuffle_xor(mask, values[n], offset));
      }
    }
  }
  LGD_DEVICE bool any(bool mine) const { return mine; }
  LGD_DEVICE void sync() const { warp_sync(mask); }
};

// All threads of a block, or of a cluster of blocks that hold a part of the row each.
template <typename A>
class Block {
 public:
  int rank, size, blocks;

  // scratch: shared memory of scratch_bytes
  LGD_DEVICE Block(A* scratch, int blocks) : rank(threadIdx.x), size(blockDim.x), blocks(blocks), scratch_(scratch) {
    if (blocks > 1) {
      cluster_sync(); // the other blocks run: their shared memory may be written to
    }
  }
  static constexpr int64_t scratch_bytes(int threads, int blocks) {
    const int64_t bytes = 2 * kMostReduced * sizeof(A) * blocks * (threads / kWarp);
    return (bytes + 15) / 16 * 16; // 128-bit vectors may lie behind it
  }

  template <int N, typename Op>
  LGD_DEVICE void reduce(A (&values)[N], Op op) {
    static_assert(N <= kMostReduced);
    const Lanes warp(kWarp);
    const int warps = size / kWarp, slots = warps * blocks;
    A* turn = scratch_ + turn_ * kMostReduced * slots; // [N][slots], not the ones that may still be read
    turn_ ^= 1;
    warp.reduce(values, op);
    if (warp.rank < blocks) { // lane b tells block b
      A* slot = turn + (blocks > 1 ? cluster_rank() : 0) * warps + rank / kWarp;
      slot = blocks > 1 ? cluster_pointer(slot, warp.rank) : slot;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        slot[n * slots] = values[n];
      }
    }
    sync_all();
#pragma unroll
    for (int n = 0; n < N; ++n) {
      values[n] = static_cast<A>(Op::neutral);
      for (int slot = warp.rank; slot < slots; slot += kWarp) {
        values[n] = op(values[n], turn[n * slots + slot]);
      }
    }
    warp.reduce(values, op);
  }
  LGD_DEVICE bool any(bool mine) const { return mine; }
  LGD_DEVICE void sync() const { block_sync(); }

 private:
  LGD_DEVICE void sync_all() const {
    if (blocks > 1) {
      cluster_sync();
    } else {
      block_sync();
    }
  }

  A* scratch_;
  int turn_ = 0;
};

// The threads of a block with the same threadIdx.x; each x has a row of its own.
template <typename A>
class Column {
 public:
  int rank, size;

  LGD_DEVICE explicit Column(A* scratch) : rank(threadIdx.y), size(blockDim.y), scratch_(scratch) {}
  static constexpr int64_t scratch_bytes(int threads) { return 2 * kMostReduced * sizeof(A) * threads; }

  template <int N, typename Op>
  LGD_DEVICE void reduce(A (&values)[N], Op op) {
    static_assert(N <= kMostReduced);
    const int rows = blockDim.x, threads = rows * size;
    A* turn = scratch_ + turn_ * kMostReduced * threads; // [N][size][rows]
    turn_ ^= 1;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      turn[n * threads + rank * rows + threadIdx.x] = values[n];
    }
    block_sync();
#pragma unroll
    for (int n = 0; n < N; ++n) {
      values[n] = turn[n * threads + threadIdx.x];
      for (int other = 1; other < size; ++other) {
        values[n] = op(values[n], turn[n * threads + other * rows + threadIdx.x]);
      }
    }
  }
  LGD_DEVICE bool any(bool mine) const { return block_any(mine); }
  LGD_DEVICE void sync() const { block_sync(); }

 private:
  A* scratch_;
  int turn_ = 0;
};

} // namespace lgd::gpu
