// softmax_infogain: the kernels, one for each mode of softmax_infogain_config.h, and their launches.

#include "softmax_infogain.h"

#include <utility>

#include "softmax_infogain_row.cuh"

namespace lgd::gpu {
namespace {

// All kernels for up to kMostThreads say that one block on a multiprocessor is enough: without, ptxas 13.0 spills up to
// 172 bytes to get down to 64 registers.

// ---------------------------------------------------------------------------------------------------------------------
// Loss, log-sum-exp, norm and gradient
// ---------------------------------------------------------------------------------------------------------------------

template <typename Acc>
LGD_DEVICE int64_t rows_of(const SoftmaxInfogainInput<Acc>& in) {
  return in.outer * in.inner;
}

template <typename T, typename Acc>
LGD_DEVICE Strip<T> gradient_at(const SoftmaxInfogainOutput<Acc>& out, Position p) {
  return {row_at<T>(out.grad, p), out.grad.class_stride};
}

// The part of a row that this block of a cluster has, a multiple of 128 bits but for the last.
template <typename T>
LGD_DEVICE Share share_of_block(int classes, int blocks) {
  constexpr int W = kPerVector<T>;
  const int each = static_cast<int>(classes_of_block(classes, blocks, W));
  const int first = blocks > 1 ? each * cluster_rank() : 0;
  const int left = classes > first ? classes - first : 0;
  return {first, left < each ? left : each, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)};
}

template <typename Base, typename T, typename Acc>
__global__ void __launch_bounds__(kThreadsOfLanes) in_register_lanes(
    const __grid_constant__ SoftmaxInfogainInput<Acc> in, const __grid_constant__ SoftmaxInfogainOutput<Acc> out,
    int lanes) {
  const int64_t number = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / lanes;
  if (number >= rows_of(in)) {
    return;
  }
  const Position p = position_of(number, in.inner);
  if (is_done(out, p)) {
    return;
  }
  Lanes team(lanes);
  const LabelledRow<T> row(in, p);
  const Share share{0, in.classes, team.rank, team.size};
  const RegisterSlice<T> slice(row.logits.data, share, is_needed(row, out, p));
  finish_row<Base>(in, out, p, row, slice, team, gradient_at<T>(out, p));
}

template <typename Base, typename T, typename Acc>
__global__ void __launch_bounds__(kMostThreads, 1) in_register_block(
    const __grid_constant__ SoftmaxInfogainInput<Acc> in, const __grid_constant__ SoftmaxInfogainOutput<Acc> out,
    int blocks) {
  const Position p = position_of(blockIdx.x / blocks, in.inner);
  if (is_done(out, p)) {
    return;
  }
  Block<Acc> team(reinterpret_cast<Acc*>(shared_memory()), blocks);
  const LabelledRow<T> row(in, p);
  const RegisterSlice<T> slice(row.logits.data, share_of_block<T>(in.classes, blocks), is_needed(row, out, p));
  finish_row<Base>(in, out, p, row, slice, team, gradient_at<T>(out, p));
}

// A block has a tile of rows that lie one behind the other; the gradient takes the place of the logits.
template <typename Base, typename T, typename Acc>
__global__ void __launch_bounds__(kThreadsOfLanes) in_shared_lanes(
    const __grid_constant__ SoftmaxInfogainInput<Acc> in, const __grid_constant__ SoftmaxInfogainOutput<Acc> out,
    int lanes) {
  const int rows_of_tile = blockDim.x / lanes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * rows_of_tile, left = rows_of(in) - first;
  const int rows = left < rows_of_tile ? static_cast<int>(left) : rows_of_tile;
  const int own = threadIdx.x / lanes;
  const Position p = position_of(first + (own < rows ? own : 0), in.inner);
  if (!block_any(!is_done(out, p))) {
    return;
  }
  const T* source = row_at<const T>(in.logits, position_of(first, in.inner));
  T* const memory = reinterpret_cast<T*>(shared_memory());
  T* const tile = memory + lead_of(source); // (rows, C)
  copy_in(source, rows * in.classes, memory);
  block_sync();
  if (own < rows) {
    Lanes team(lanes);
    const LabelledRow<T> row(in, p);
    const Strip<T> values{tile + own * in.classes, 1};
    const Share share{0, in.classes, team.rank, team.size};
    const MemorySlice<T, true, false> slice({values.data, 1}, share);
    finish_row<Base>(in, out, p, row, slice, team, values);
  }
  block_sync();
  if (out.grad.data != nullptr) {
    copy_out(tile, rows * in.classes, row_at<T>(out.grad, position_of(first, in.inner)));
  }
}

template <typename Base, typename T, typename Acc>
__global__ void __launch_bounds__(kMostThreads, 1) in_shared_block(
    const __grid_constant__ SoftmaxInfogainInput<Acc> in, const __grid_constant__ SoftmaxInfogainOutput<Acc> out,
    int blocks) {
  const Position p = position_of(blockIdx.x / blocks, in.inner);
  if (is_done(out, p)) {
    return;
  }
  Block<Acc> team(reinterpret_cast<Acc*>(shared_memory()), blocks);
  const LabelledRow<T> row(in, p);
  const Share share = share_of_block<T>(in.classes, blocks);
  const T* source = row.logits.data + share.first;
  T* const memory = reinterpret_cast<T*>(shared_memory() + Block<Acc>::scratch_bytes(blockDim.x, blocks));
  T* const part = memory + lead_of(source); // (C / blocks,)
  copy_in(source, share.count, memory);
  block_sync();
  const MemorySlice<T, true, false> slice({part, 1, share.first}, share);
  const Strip<T> gradient = gradient_at<T>(out, p);
  finish_row<Base>(in, out, p, row, slice, team, Strip<T>{part, 1, share.first});
  block_sync();
  if (out.grad.data != nullptr) {
    copy_out(part, share.count, gradient.data + share.first);
  }
}

template <typename Base, typename T, typename Acc>
__global__ void __launch_bounds__(kMostThreads, 1) in_stream(
    const __grid_constant__ SoftmaxInfogainInput<Acc> in, const __grid_constant__ SoftmaxInfogainOutput<Acc> out,
    bool in_vectors) {
  const Position p = position_of(blockIdx.x, in.inner);
  if (is_done(out, p)) {
    return;
  }
  Block<Acc> team(reinterpret_cast<Acc*>(shared_memory()), 1);
  const LabelledRow<T> row(in, p);
  const MemorySlice<T, false, true> slice(row.logits, share_of_block<T>(in.classes, 1), in_vectors);
  finish_row<Base>(in, out, p, row, slice, team, gradient_at<T>(out, p));
}

// The row of a thread whose neighbours have neighbouring rows. Threads beyond the last row repeat it: they write the
// same bits to the same places.
template <typename Acc>
LGD_DEVICE Position position_in_columns(const SoftmaxInfogainInput<Acc>& in) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, last = rows_of(in) - 1;
  return position_of(number < last ? number : last, in.inner);
}

template <typename Base, typename T, typename Acc>
__global__ void __launch_bounds__(kMostThreads, 1) in_columns(
    const __grid_constant__ SoftmaxInfogainInput<Acc> in, const __grid_constant__ SoftmaxInfogainOutput<Acc> out) {
  const Position p = position_in_columns(in);
  if (!block_any(!is_done(out, p))) {
    return;
  }
  Column<Acc> team(reinterpret_cast<Acc*>(shared_memory()));
  const LabelledRow<T> row(in, p);
  const MemorySlice<T, false, false> slice(row.logits, {0, in.classes, team.rank, team.size});
  finish_row<Base>(in, out, p, row, slice, team, gradient_at<T>(out, p));
}

// ---------------------------------------------------------------------------------------------------------------------
// Double backward: p (c (v - t) + 2 z a t) with t = <p, v>, c = a (s_l + 2 z lse) + b; a, b the upstream gradients
// ---------------------------------------------------------------------------------------------------------------------

template <typename Base, typename T, typename Slice, typename Team, typename Acc>
LGD_DEVICE void second_derivative(
    const SoftmaxInfogainInput<Acc>& in, const SoftmaxInfogainDoubleBackward<Acc>& io, Position p,
    const LabelledRow<T>& row, const Slice& slice, Team& team) {
  const RowOfH<Base, Acc> h(in.infogain, row.label, row.counted);
  const Sums<Acc> sums = sum_row<Base>(row, h, in.z_loss, slice, team);
  const Strip<const T> v = {row_at<const T>(io.grad_grad, p), io.grad_grad.class_stride};

  Total<Acc> p_v, h_v; // of exp(x - shift) v and of H v
  slice.for_groups([&]<int W>(int k, auto step, const Acc(&x)[W]) {
    Acc values[W], weights[W], e_values[W];
    v.read(k, step, values);
    h.read_base(k, step, weights);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      e_values[i] = exp_of(x[i] - sums.shift) * values[i];
      weights[i] *= values[i];
    }
    p_v.add(tree_sum(e_values));
    h_v.add(tree_sum(weights));
  });
  for_entries(h, slice.share, [&](int k, Acc, Acc extra) { h_v.add(extra * number_from<Acc>(v.at(k))); });
  Acc reduced[2] = {p_v.value(), h_v.value()};
  team.reduce(reduced, Sum{});
  const Acc mean_v = reduced[0] / sums.exp;

  const Acc upstream = row.counted ? value_at(io.grad_loss, p) : Acc(0), on_lse = value_at(io.grad_lse, p);
  if (slice.share.rank == 0) {
    write_at(io.grad_grad_loss, p, row.counted ? sums.slope * mean_v - reduced[1] : Acc(0));
    write_at(io.grad_grad_lse, p, mean_v);
  }
  const Acc factor = (upstream * sums.slope + on_lse) / sums.exp;
  const Acc rest = 2 * in.z_loss * upstream * mean_v / sums.exp;
  const bool zero = !row.counted && on_lse == 0; // not 0 * p: p may be NaN
  const Strip<T> target = {row_at<T>(io.grad_logits, p), io.grad_logits.class_stride};
  slice.for_groups([&]<int W>(int k, auto step, const Acc(&x)[W]) {
    Acc values[W], result[W];
    v.read(k, step, values);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      result[i] = zero ? Acc(0) : exp_of(x[i] - sums.shift) * (factor * (values[i] - mean_v) + rest);
    }
    target.write(k, step, result);
  });
}

template <typename Base, typename T, typename Acc>
__global__ void __launch_bounds__(kMostThreads, 1) double_backward_in_stream(
    const __grid_constant__ SoftmaxInfogainInput<Acc> in, const __grid_constant__ SoftmaxInfogainDoubleBackward<Acc> io,
    bool in_vectors) {
  const Position p = position_of(blockIdx.x, in.inner);
  Block<Acc> team(reinterpret_cast<Acc*>(shared_memory()), 1);
  const LabelledRow<T> row(in, p);
  const MemorySlice<T, false, true> slice(row.logits, share_of_block<T>(in.classes, 1), in_vectors);
  second_derivative<Base>(in, io, p, row, slice, team);
}

template <typename Base, typename T, typename Acc>
__global__ void __launch_bounds__(kMostThreads, 1) double_backward_in_columns(
    const __grid_constant__ SoftmaxInfogainInput<Acc> in,
    const __grid_constant__ SoftmaxInfogainDoubleBackward<Acc> io) {
  const Position p = position_in_columns(in);
  Column<Acc> team(reinterpret_cast<Acc*>(shared_memory()));
  const LabelledRow<T> row(in, p);
  const MemorySlice<T, false, false> slice(row.logits, {0, in.classes, team.rank, team.size});
  second_derivative<Base>(in, io, p, row, slice, team);
}

// ---------------------------------------------------------------------------------------------------------------------
// Gradient of a dense H: -a log p, summed over the rows with the label. A block has one row of H and 32 of its classes;
// each of its warps looks through a part of the labels and adds up the rows that it finds, in order.
// ---------------------------------------------------------------------------------------------------------------------

template <typename T, typename Acc>
__global__ void __launch_bounds__(kThreadsOfMatrix) gradient_of_matrix(
    const __grid_constant__ SoftmaxInfogainInput<Acc> in,
    const __grid_constant__ SoftmaxInfogainBackwardMatrix<Acc> io) {
  const int tiles = (in.classes + kWarp - 1) / kWarp;
  const int64_t label = blockIdx.x / tiles;
  const int lane = threadIdx.x, k = static_cast<int>(blockIdx.x % tiles) * kWarp + lane;
  const int64_t steps = (rows_of(in) + kWarp - 1) / kWarp, each = (steps + blockDim.y - 1) / blockDim.y * kWarp;
  const int64_t begin = threadIdx.y * each, end = begin + each < rows_of(in) ? begin + each : rows_of(in);
  Total<Acc> total;
  for (int64_t row = begin; row < end; row += kWarp) {
    bool mine = false;
    if (row + lane < end) {
      const Position p = position_of(row + lane, in.inner);
      const int64_t found = in.labels.at(p.outer, p.inner);
      mine = found == label && found != in.ignore_index;
    }
    for (unsigned votes = ballot(kAllLanes, mine); votes != 0; votes &= votes - 1) {
      const Position p = position_of(row + lowest_bit(votes), in.inner);
      if (k < in.classes) { // in two steps, so that a common offset of the logits cancels exactly
        const Acc x = number_from<Acc>(row_at<const T>(in.logits, p)[k * in.logits.class_stride]);
        total.add(-value_at(io.grad_loss, p) * ((x - value_at(io.max, p)) - value_at(io.log_sum, p)));
      }
    }
  }
  Acc* const totals = reinterpret_cast<Acc*>(shared_memory()); // (warps, 32)
  totals[threadIdx.y * kWarp + lane] = total.value();
  block_sync();
  if (threadIdx.y == 0 && k < in.classes) {
    Acc sum = 0;
    for (unsigned warp = 0; warp < blockDim.y; ++warp) {
      sum += totals[warp * kWarp + lane];
    }
    io.result[label * in.classes + k] = sum;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launches
// ---------------------------------------------------------------------------------------------------------------------

constexpr int kInvalidValue = 1; // cudaErrorInvalidValue

// f(base) for the base of H.
template <typename Acc, typename F>
int with_base(const InfogainView& h, const F& f) {
  if (h.matrix == nullptr) {
    return h.background == nullptr ? f(Nothing{}) : f(Constant{});
  }
  if constexpr (std::is_same_v<Acc, float>) {
    if (h.matrix_dtype == DType::BFloat16) {
      return f(BFloat16{});
    }
  }
  return f(Acc{});
}

// f(base, T{}) for an input.
template <typename Acc, typename F>
int with_types(const SoftmaxInfogainInput<Acc>& in, const F& f) {
  return with_base<Acc>(in.infogain, [&](auto base) {
    return with_element<Acc>(in.logits.dtype, [&](auto element) { return f(base, element); });
  });
}

template <typename View>
void swap_axes(View& view) {
  std::swap(view.outer_stride, view.inner_stride);
}

// Makes the inner axis the one along which neighbouring rows are closer to each other.
template <typename Acc, typename... Views>
void put_neighbours_inside(SoftmaxInfogainInput<Acc>& in, Views&... views) {
  if (in.inner == 1 || (in.outer > 1 && in.logits.outer_stride < in.logits.inner_stride)) {
    std::swap(in.outer, in.inner);
    swap_axes(in.logits);
    swap_axes(in.labels);
    (swap_axes(views), ...);
  }
}

template <typename Acc>
Grid grid_of_columns(const SoftmaxInfogainInput<Acc>& in, const Configuration& c) {
  const int rows = c.threads / c.lanes;
  return {divided_up(in.outer * in.inner, rows), rows, c.lanes, 1, Column<Acc>::scratch_bytes(c.threads)};
}

template <typename Acc>
Grid grid_of_blocks(const SoftmaxInfogainInput<Acc>& in, const Configuration& c) {
  return {in.outer * in.inner * c.cluster, c.threads, 1, c.cluster, Block<Acc>::scratch_bytes(c.threads, c.cluster)};
}

// Shared memory for elements and the empty space before them.
template <typename T>
int64_t bytes_for(int64_t elements) {
  return divided_up(elements * static_cast<int64_t>(sizeof(T)), kVectorBytes) * kVectorBytes + kVectorBytes;
}

bool whole_vectors(int64_t elements, DType dtype) {
  return elements * element_size(dtype) % kVectorBytes == 0;
}

// Whether all rows begin at a multiple of 128 bits, with the classes side by side.
template <typename Acc>
bool is_aligned(const SoftmaxInfogainInput<Acc>& in, const Rows& x) {
  return x.class_stride == 1 && reinterpret_cast<uintptr_t>(x.data) % kVectorBytes == 0 &&
         (in.outer == 1 || whole_vectors(x.outer_stride, x.dtype)) &&
         (in.inner == 1 || whole_vectors(x.inner_stride, x.dtype));
}

bool is_aligned(const InfogainView& h) {
  return h.matrix_class_stride == 1 && reinterpret_cast<uintptr_t>(h.matrix) % kVectorBytes == 0 &&
         whole_vectors(h.matrix_row_stride, h.matrix_dtype);
}

template <typename Acc>
bool is_packed(const SoftmaxInfogainInput<Acc>& in, const Rows& x) {
  return in.inner == 1 ? x.outer_stride == in.classes
                       : x.inner_stride == in.classes && x.outer_stride == in.inner * in.classes;
}

// Of the logits together with the gradient.
template <typename Acc>
RowShape shape_of(const SoftmaxInfogainInput<Acc>& in, const Rows& grad, int compute_capability) {
  const auto both = [&](const auto& f) { return f(in.logits) && (grad.data == nullptr || f(grad)); };
  RowShape shape;
  shape.classes = in.classes;
  shape.element_size = static_cast<int>(element_size(in.logits.dtype));
  shape.side_by_side = in.classes == 1 || both([](const Rows& x) { return x.class_stride == 1; });
  shape.aligned = whole_vectors(in.classes, in.logits.dtype) &&
                  both([&](const Rows& x) { return is_aligned(in, x); }) &&
                  (in.infogain.matrix == nullptr || is_aligned(in.infogain));
  shape.packed = both([&](const Rows& x) { return is_packed(in, x); });
  shape.compute_capability = compute_capability;
  return shape;
}

template <typename Base, typename T, typename Acc>
int launch_on_chip(
    const SoftmaxInfogainInput<Acc>& in, const SoftmaxInfogainOutput<Acc>& out, const Configuration& c, void* stream) {
  if constexpr (sizeof(T) < 8) {
    const int64_t rows = in.outer * in.inner, tile = c.lanes > 0 ? c.threads / c.lanes : 1;
    Grid grid = grid_of_blocks(in, c);
    switch (c.mode) {
      case Mode::RegisterLanes:
        grid = {divided_up(rows, tile), c.threads};
        return launch<in_register_lanes<Base, T, Acc>>(grid, stream, in, out, c.lanes);
      case Mode::SharedLanes:
        grid = {divided_up(rows, tile), c.threads, 1, 1, bytes_for<T>(tile * in.classes)};
        return launch<in_shared_lanes<Base, T, Acc>>(grid, stream, in, out, c.lanes);
      case Mode::RegisterBlock:
        return launch<in_register_block<Base, T, Acc>>(grid, stream, in, out, c.cluster);
      case Mode::SharedBlock:
        grid.shared_bytes += bytes_for<T>(classes_of_block(in.classes, c.cluster, kPerVector<T>));
        return launch<in_shared_block<Base, T, Acc>>(grid, stream, in, out, c.cluster);
      default:
        break;
    }
  }
  return kInvalidValue;
}

} // namespace

template <typename Acc>
Configuration configuration_of(const SoftmaxInfogainInput<Acc>& in, const Rows& grad, int compute_capability) {
  return configure(shape_of(in, grad, compute_capability));
}

template <typename Acc>
int softmax_infogain(
    SoftmaxInfogainInput<Acc> in, SoftmaxInfogainOutput<Acc> out, const Configuration& c, void* stream) {
  if (c.mode == Mode::Columns) {
    put_neighbours_inside(
        in, out.loss, out.lse, out.norm, out.max, out.log_sum, out.grad, out.grad_loss, out.grad_lse, out.made_for);
  }
  const RowShape shape = shape_of(in, out.grad, 0);
  if (!fits(c, shape)) {
    return kInvalidValue;
  }
  return with_types(in, [&](auto base, auto element) -> int {
    using Base = decltype(base);
    using T = decltype(element);
    if (c.mode == Mode::Stream) {
      return launch<in_stream<Base, T, Acc>>(grid_of_blocks(in, c), stream, in, out, shape.aligned);
    }
    if (c.mode == Mode::Columns) {
      return launch<in_columns<Base, T, Acc>>(grid_of_columns(in, c), stream, in, out);
    }
    return launch_on_chip<Base, T>(in, out, c, stream);
  });
}

template <typename Acc>
int softmax_infogain_double_backward(
    SoftmaxInfogainInput<Acc> in, SoftmaxInfogainDoubleBackward<Acc> io, const Configuration& c, void* stream) {
  if (c.mode == Mode::Columns) {
    put_neighbours_inside(
        in, io.grad_loss, io.grad_lse, io.grad_grad, io.grad_logits, io.grad_grad_loss, io.grad_grad_lse);
  }
  return with_types(in, [&](auto base, auto element) -> int {
    using Base = decltype(base);
    using T = decltype(element);
    if (c.mode == Mode::Columns) {
      return launch<double_backward_in_columns<Base, T, Acc>>(grid_of_columns(in, c), stream, in, io);
    }
    const RowShape shape = shape_of(in, io.grad_logits, 0);
    const bool aligned = shape.aligned && is_aligned(in, io.grad_grad);
    const Grid grid = grid_of_blocks(in, stream_configuration(shape));
    return launch<double_backward_in_stream<Base, T, Acc>>(grid, stream, in, io, aligned);
  });
}

template <typename Acc>
int softmax_infogain_backward_matrix(
    const SoftmaxInfogainInput<Acc>& in, const SoftmaxInfogainBackwardMatrix<Acc>& io, void* stream) {
  return with_types(in, [&](auto base, auto element) -> int {
    using T = decltype(element);
    if constexpr (std::is_same_v<decltype(base), Nothing>) { // the loss does not matter here, so H has no part
      constexpr int warps = kThreadsOfMatrix / kWarp;
      const Grid grid = {
          in.infogain.n_rows * divided_up(in.classes, kWarp), kWarp, warps, 1,
          static_cast<int64_t>(kThreadsOfMatrix * sizeof(Acc))};
      return launch<gradient_of_matrix<T, Acc>>(grid, stream, in, io);
    }
    return kInvalidValue;
  });
}

#define LGD_INSTANTIATE(Acc)                                                                                         \
  template Configuration configuration_of(const SoftmaxInfogainInput<Acc>&, const Rows&, int);                       \
  template int softmax_infogain(SoftmaxInfogainInput<Acc>, SoftmaxInfogainOutput<Acc>, const Configuration&, void*); \
  template int softmax_infogain_double_backward(                                                                     \
      SoftmaxInfogainInput<Acc>, SoftmaxInfogainDoubleBackward<Acc>, const Configuration&, void*);                   \
  template int softmax_infogain_backward_matrix(                                                                     \
      const SoftmaxInfogainInput<Acc>&, const SoftmaxInfogainBackwardMatrix<Acc>&, void*);

LGD_INSTANTIATE(float)
LGD_INSTANTIATE(double)

} // namespace lgd::gpu
