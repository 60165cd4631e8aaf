// Tiles of matrices as arrays of the accumulation type, and back.
#pragma once

#include <cstdint>

#include "layers.h"
#include "parallel.h"
#include "rows.h"

namespace lgd {
inline namespace CPU_CAPABILITY {

struct Tile {
  int64_t row, rows, column, columns;
};

inline int64_t at_most(int64_t size, int64_t limit) {
  return size < limit ? size : limit;
}

// How many tiles of `size` cover `count` items.
inline int64_t tiles_of(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}

template <typename Acc>
inline Acc* row_pointer(const Matrix& matrix, int64_t row) {
  return static_cast<Acc*>(matrix.data) + row * matrix.stride;
}

inline Row row_of(const Matrix& matrix, int64_t row) {
  return {static_cast<char*>(matrix.data) + row * matrix.stride * element_size(matrix.dtype), matrix.dtype, 1};
}

inline ConstRow const_row_of(const Matrix& matrix, int64_t row) {
  const Row it = row_of(matrix, row);
  return {it.data, it.dtype, it.stride};
}

// The elements of a tile, or null if there are none.
template <typename Acc>
struct TileView {
  Acc* data = nullptr;
  int64_t stride = 0;

  Acc* row(int64_t i) const { return data == nullptr ? nullptr : data + i * stride; }
};

// An input's tile: in place, or converted in a buffer of `slot`.
template <typename Acc>
inline TileView<const Acc> read_tile(const Matrix& matrix, const Tile& tile, Scratch slot) {
  if (matrix.data == nullptr) {
    return {};
  }
  if (matrix.dtype == dtype_of<Acc>()) {
    return {row_pointer<Acc>(matrix, tile.row) + tile.column, matrix.stride};
  }
  Acc* buffer = scratch_of<Acc>(slot, tile.rows * tile.columns);
  for (int64_t i = 0; i < tile.rows; ++i) {
    load_row(const_row_of(matrix, tile.row + i), tile.column, tile.columns, buffer + i * tile.columns);
  }
  return {buffer, tile.columns};
}

// Where an output's tile is to be put: in place, or in a buffer of `slot` from which `finish` converts it.
template <typename Acc>
class OutputTile {
 public:
  TileView<Acc> view;

  OutputTile(const Matrix& matrix, const Tile& tile, Scratch slot) : matrix_(matrix), tile_(tile) {
    if (matrix.data == nullptr) {
      return;
    }
    in_place_ = matrix.dtype == dtype_of<Acc>();
    view = in_place_ ? TileView<Acc>{row_pointer<Acc>(matrix, tile.row) + tile.column, matrix.stride}
                     : TileView<Acc>{scratch_of<Acc>(slot, tile.rows * tile.columns), tile.columns};
  }

  void finish() const {
    for (int64_t i = 0; !in_place_ && i < tile_.rows; ++i) {
      store_row<Acc>(view.row(i), row_of(matrix_, tile_.row + i), tile_.column, tile_.columns);
    }
  }

 private:
  const Matrix& matrix_;
  const Tile& tile_;
  bool in_place_ = true;
};

// f(i, n) for the vectors of `count` elements that start at i: n is their number, a constant but for the last one.
template <typename Acc, typename F>
inline void for_vectors(int64_t count, const F& f) {
  constexpr int64_t V = Vectorized<Acc>::size();
  int64_t i = 0;
  for (; i + V <= count; i += V) {
    f(i, V);
  }
  if (i < count) {
    f(i, count - i);
  }
}

} // namespace CPU_CAPABILITY
} // namespace lgd
