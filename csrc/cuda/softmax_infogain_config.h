// How a launch of softmax_infogain is cut into blocks: one struct, returned by one pure function.
#pragma once

#include <algorithm>
#include <cstdint>

namespace lgd::gpu {

// Where a row is while it is summed and turned into its gradient.
enum class Mode : int {
  RegisterLanes, // in the registers of up to 32 lanes of a warp
  RegisterBlock, // in the registers of a block, or of a cluster of blocks
  SharedLanes,   // among its neighbours in shared memory; up to 32 lanes
  SharedBlock,   // in the shared memory of a block, or of a cluster of blocks
  Stream,        // in global memory, read twice by a block
  Columns,       // in global memory, read twice; neighbouring lanes have neighbouring rows
};

// What the choice depends on. Not on the number of rows: a row's bits must not.
struct RowShape {
  int64_t classes = 0;
  int element_size = 0;
  bool side_by_side = false;   // the classes of a row: stride 1
  bool aligned = false;        // every row begins and ends at a multiple of 16 bytes
  bool packed = false;         // each row begins where the one before it ends
  int compute_capability = 80; // 80, 90, ...
};

struct Configuration {
  Mode mode = Mode::Stream;
  int lanes = 32;    // threads for one row; in a block, for the *Lanes modes; warps in the class direction for Columns
  int threads = 128; // of a block
  int cluster = 1;   // blocks for one row
};

constexpr int kVectorBytes = 16;
constexpr int kVectors = 8; // that a thread keeps in registers, and that it has in flight: 128 bytes

constexpr int64_t divided_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
constexpr int power_of_two_from(int64_t x) { // the smallest that is not below x
  int p = 1;
  while (p < x) {
    p *= 2;
  }
  return p;
}
constexpr int whole_warps(int64_t threads) {
  return static_cast<int>(divided_up(threads, 32) * 32);
}

constexpr int64_t kBytesOfLanes = 32 * kVectors * kVectorBytes; // what the lanes of a warp hold: 4 KB
constexpr int64_t kBytesOfBlock = 32 << 10; // of a row, before it is given to a cluster: leaves room for other blocks
// Of one block, beside its scratch: what every chip from sm_80 on has, some of them 99 KB and no more.
constexpr int64_t kMostInShared = 94 << 10;
constexpr int64_t kMostInRegisters = 512 * kVectors * kVectorBytes; // of one block: 64 KB
constexpr int kMostBlocks = 8;                                      // of a cluster that runs everywhere

constexpr int kThreadsOfLanes = 128; // of a block, in the *Lanes modes
constexpr int kThreadsOfMatrix = 256;
constexpr int kMostThreads = 512; // of the others: 128 registers for each

constexpr Configuration stream_configuration(const RowShape& row) {
  const int64_t bytes = row.classes * row.element_size;
  return {Mode::Stream, 0, std::clamp(whole_warps(divided_up(bytes, 4 * kVectorBytes)), 32, kMostThreads), 1};
}

// One warp in the class direction for every 32 classes; then as many rows as make the block 128 threads.
constexpr Configuration columns_configuration(const RowShape& row) {
  const int warps = std::min(power_of_two_from(divided_up(row.classes, 32)), 16);
  return {Mode::Columns, warps, std::max(128, 32 * warps), 1};
}

constexpr int blocks_for(int64_t bytes, int compute_capability) {
  return compute_capability < 90 ? 1 : std::min(power_of_two_from(divided_up(bytes, kBytesOfBlock)), kMostBlocks);
}

constexpr Configuration configure(const RowShape& row) {
  if (!row.side_by_side) {
    return columns_configuration(row);
  }
  if (row.element_size == 8) { // float64 is for checking derivatives: four kernels less to compile for every H
    return stream_configuration(row);
  }
  const int64_t bytes = row.classes * row.element_size;
  const int blocks = blocks_for(bytes, row.compute_capability);
  const int64_t bytes_of_block = divided_up(bytes, blocks);
  if (row.aligned) {
    if (bytes <= kBytesOfLanes) {
      return {Mode::RegisterLanes, std::min(power_of_two_from(bytes / kVectorBytes), 32), kThreadsOfLanes, 1};
    }
    if (bytes_of_block <= kMostInRegisters) {
      const int64_t vectors = divided_up(bytes_of_block, kVectorBytes);
      return {Mode::RegisterBlock, 0, whole_warps(divided_up(vectors, kVectors)), blocks};
    }
  } else {
    if (row.packed && bytes <= 2 * kBytesOfLanes) { // 1, 2, 4, ... lanes for up to 8, 16, 32, ... classes
      return {Mode::SharedLanes, std::min(power_of_two_from(divided_up(row.classes, 8)), 32), kThreadsOfLanes, 1};
    }
    if (bytes > kBytesOfLanes && bytes_of_block <= kMostInShared) {
      return {Mode::SharedBlock, 0, std::min(whole_warps(divided_up(bytes_of_block, 64)), kMostThreads), blocks};
    }
  }
  return stream_configuration(row);
}

// The classes of a row that a block of its cluster has: whole vectors, but for the last block's.
constexpr int64_t classes_of_block(int64_t classes, int cluster, int per_vector) {
  return divided_up(classes, static_cast<int64_t>(cluster) * per_vector) * per_vector;
}

// Whether a configuration can serve a row.
constexpr bool fits(const Configuration& c, const RowShape& row) {
  const int64_t bytes_of_block =
      classes_of_block(row.classes, c.cluster, kVectorBytes / row.element_size) * row.element_size;
  const bool on_chip = row.element_size < 8 && row.side_by_side;
  if (c.threads > (c.mode == Mode::RegisterLanes || c.mode == Mode::SharedLanes ? kThreadsOfLanes : kMostThreads)) {
    return false;
  }
  switch (c.mode) {
    case Mode::RegisterLanes:
      return on_chip && row.aligned && row.classes * row.element_size <= c.lanes * kVectors * kVectorBytes;
    case Mode::RegisterBlock:
      return on_chip && row.aligned && bytes_of_block <= c.threads * kVectors * kVectorBytes;
    case Mode::SharedLanes:
      return on_chip && row.packed && c.threads / c.lanes * row.classes * row.element_size <= kMostInShared;
    case Mode::SharedBlock:
      return on_chip && bytes_of_block <= kMostInShared;
    case Mode::Stream:
      return row.side_by_side;
    case Mode::Columns:
      return true;
  }
  return false;
}

} // namespace lgd::gpu
