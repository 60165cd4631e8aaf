// How a layer of decoupled_linear is cut into blocks: pure functions of its shape.
#pragma once

#include <algorithm>
#include <cstdint>

namespace lgd::gpu {

constexpr int kMostWidth = 128; // of d_in and d_out
constexpr int kLinearThreads = 256;
constexpr int kLinearWarps = kLinearThreads / 32;
constexpr int kMostChunks = 16; // of samples, whose parts of a weight's gradient are added up by a launch of its own

// A product is made in tiles of so many samples and columns, for operands of 2, 4 or 8 bytes. The resident weights then
// take 35 KB at most and all of it 70 KB, which every chip from sm_80 on has, and some of them twice.
constexpr int rows_of_tile(int operand_size) {
  return operand_size == 2 ? 64 : 32;
}
constexpr int columns_of_tile(int operand_size) {
  return 256 / operand_size;
}

// Operands in shared memory: columns filled up with zeros, and rows an odd number of 16 bytes apart, so that eight rows
// of 16 bytes lie in different banks.
constexpr int padded(int width) {
  return (width + 15) / 16 * 16;
}
constexpr int stride_of_tile(int width, int element_size) {
  return padded(width) + 16 / element_size;
}

struct LinearShape {
  int64_t n_samples = 0;
  int d_in = 0, d_out = 0;
  int operand_size = 0;
  int accumulated_size = 0;
};

constexpr int64_t tiles_of(int64_t size, int64_t tile) {
  return (size + tile - 1) / tile;
}

// Forward: a block has a tile (rows, columns) of the raw logits.
struct ForwardCut {
  int64_t row_tiles = 0;
  int panels = 0; // of d_out
  int width = 0;  // of a panel in shared memory
  int stride = 0; // of rows of operands there
  int weight_bytes = 0, tile_bytes = 0;
};

constexpr ForwardCut forward_cut(const LinearShape& s) {
  const int rows = rows_of_tile(s.operand_size), columns = columns_of_tile(s.operand_size);
  ForwardCut cut;
  cut.row_tiles = tiles_of(s.n_samples, rows);
  cut.panels = static_cast<int>(tiles_of(s.d_out, columns));
  cut.width = std::min(padded(s.d_out), columns);
  cut.stride = stride_of_tile(s.d_in, s.operand_size);
  cut.weight_bytes = cut.width * cut.stride * s.operand_size;
  const int of_logits = rows * stride_of_tile(cut.width, s.accumulated_size) * s.accumulated_size;
  cut.tile_bytes = std::max(rows * cut.stride * s.operand_size, of_logits); // the logits take the place of z
  return cut;
}

// Backward: a block has a panel of the inputs, for the row tiles of a chunk of the samples.
struct BackwardCut {
  int64_t row_tiles = 0, tiles_of_chunk = 0, chunks = 0;
  int panels = 0; // of d_in
  int width = 0;  // of a panel in shared memory
  int stride = 0, stride_of_delta = 0;
  int weight_bytes = 0, delta_bytes = 0, tile_bytes = 0; // tile: of delta and z together
};

// A gradient of the weight wants long chunks, that of z many: at least 4 tiles where both are made, and at most
// kMostChunks chunks. There is always a block: without samples the gradient of the weight is 0.
constexpr BackwardCut backward_cut(const LinearShape& s, bool need_weight) {
  const int rows = rows_of_tile(s.operand_size), columns = columns_of_tile(s.operand_size);
  BackwardCut cut;
  cut.row_tiles = tiles_of(s.n_samples, rows);
  cut.tiles_of_chunk = need_weight ? std::max<int64_t>(tiles_of(cut.row_tiles, kMostChunks), 4) : 1;
  cut.chunks = std::max<int64_t>(tiles_of(cut.row_tiles, cut.tiles_of_chunk), 1);
  cut.panels = static_cast<int>(std::max<int64_t>(tiles_of(s.d_in, columns), 1));
  cut.width = std::min(padded(s.d_in), columns);
  cut.stride = stride_of_tile(cut.width, s.operand_size);
  cut.stride_of_delta = stride_of_tile(s.d_out, s.operand_size);
  cut.weight_bytes = padded(s.d_out) * cut.stride * s.operand_size;
  cut.delta_bytes = rows * cut.stride_of_delta * s.operand_size;
  const int of_products = rows * stride_of_tile(cut.width, s.accumulated_size) * s.accumulated_size;
  cut.tile_bytes = std::max(cut.delta_bytes + rows * cut.stride * s.operand_size, of_products);
  return cut;
}

} // namespace lgd::gpu
