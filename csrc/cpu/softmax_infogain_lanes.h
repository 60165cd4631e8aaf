// softmax_infogain with one row per vector lane: for short rows, of which a vector would be mostly empty, and for rows
// whose classes are not contiguous but whose neighbours are (images, (N, C, H, W)). All reductions are vertical.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "parallel.h"
#include "rows.h"
#include "softmax_infogain.h"
#include "softmax_infogain_row.h"
#include "transpose.h"
#include "vec_math.h"

namespace lgd {
inline namespace CPU_CAPABILITY {

constexpr int64_t kShortRow = 64;        // contiguous rows up to this length go by lanes
constexpr int64_t kLongestColumn = 2048; // rows with another stride do up to this length: the tiles stay in L2
constexpr int64_t kColumnBlock = 16;     // classes added up before they join the total, for accuracy

// Depends on the shape and stride of a row alone, never on how many there are.
template <typename Acc>
inline bool goes_by_lanes(const SoftmaxInfogainInput<Acc>& in) {
  return in.classes > 0 && in.classes <= (in.logits.class_stride == 1 ? kShortRow : kLongestColumn);
}

// `active` rows of one tensor, one per lane, and their transfer from and to tiles with tile[c * V + lane].
template <typename Acc>
struct LaneRows {
  using Vec = Vectorized<Acc>;
  static constexpr int64_t V = Vec::size();
  Row first;           // the row of lane 0
  int64_t lane_stride; // in elements, between the rows of neighbouring lanes
  int64_t active;

  bool classes_contiguous() const { return first.dtype == dtype_of<Acc>() && first.stride == 1; }
  bool lanes_contiguous() const { return lane_stride == 1; }

  Row row(int64_t lane) const {
    return {first.data + lane * lane_stride * element_size(first.dtype), first.dtype, first.stride};
  }
  Acc* elements(int64_t lane, int64_t c) const {
    return reinterpret_cast<Acc*>(first.data) + (lane < active ? lane : 0) * lane_stride + c;
  }

  void set(int64_t lane, int64_t c, Acc value) const { store_row(&value, row(lane), c, 1); }

  void load(int64_t classes, Acc* tile) const {
    if (classes_contiguous()) {
      load_transposed(
          classes, tile, [&](int64_t lane, int64_t c, int64_t n) { return Vec::loadu(elements(lane, c), n); });
    } else if (lanes_contiguous()) {
      for (int64_t c = 0; c < classes; ++c) {
        load_piece({element(first, c), first.dtype, 1}, 0, active).store(tile + c * V);
      }
    } else {
      load_transposed(classes, tile, [&](int64_t lane, int64_t c, int64_t n) {
        const Row source = row(lane < active ? lane : 0);
        return load_piece({source.data, source.dtype, source.stride}, c, n);
      });
    }
  }

  void store(int64_t classes, const Acc* tile) const {
    if (classes_contiguous()) {
      store_transposed(
          classes, tile, [&](int64_t lane, int64_t c, int64_t n, Vec v) { v.store(elements(lane, c), n); });
    } else if (lanes_contiguous()) {
      for (int64_t c = 0; c < classes; ++c) {
        store_row(tile + c * V, {element(first, c), first.dtype, 1}, 0, active);
      }
    } else {
      store_transposed(classes, tile, [&](int64_t lane, int64_t c, int64_t n, Vec v) {
        Acc piece[V];
        v.store(piece);
        store_row(piece, row(lane), c, n);
      });
    }
  }

  // Up to V elements of a row of any dtype and stride, then zeros.
  static Vec load_piece(const ConstRow& row, int64_t begin, int64_t count) {
    Acc buffer[V];
    return Vec::loadu(load_row(row, begin, count, buffer), count);
  }

  // tile[c * V + lane] from load_one(lane, first class, number of classes).
  template <typename LoadOne>
  static void load_transposed(int64_t classes, Acc* tile, const LoadOne& load_one) {
    for (int64_t c = 0; c < classes; c += V) {
      const int64_t n = classes - c < V ? classes - c : V;
      transpose_tile<Acc>(
          n, [&](int lane) { return load_one(lane, c, n); },
          [&](int j, Vec column) { column.store(tile + (c + j) * V); });
    }
  }

 private:
  template <typename StoreOne>
  void store_transposed(int64_t classes, const Acc* tile, const StoreOne& store_one) const {
    for (int64_t c = 0; c < classes; c += V) {
      const int64_t n = classes - c < V ? classes - c : V;
      transpose_tile<Acc>(
          active, [&](int j) { return Vec::loadu(tile + (c + (j < n ? j : 0)) * V); },
          [&](int lane, Vec v) { store_one(lane, c, n, v); });
    }
  }
};

// A block of neighbouring rows, V to a group, in phases: between a group's load and its store lie some 300 cycles of
// latency, which only other groups can fill (950 -> 630 cycles for 16 rows of 10 classes, with what else was moved out
// of the chain).
template <Base base, typename Acc>
class LaneKernel {
 public:
  using Vec = Vectorized<Acc>;
  static constexpr int64_t V = Vec::size();
  static constexpr int64_t kMaxGroups = 8;
  static constexpr int64_t kMaxRows = kMaxGroups * V;

  // As many groups as keep their tiles in L1.
  static int64_t groups_for(int64_t classes) {
    const int64_t fitting = 24576 / (2 * classes * V * static_cast<int64_t>(sizeof(Acc)));
    return fitting < 1 ? 1 : fitting < kMaxGroups ? fitting : kMaxGroups;
  }

  LaneKernel(const SoftmaxInfogainInput<Acc>& in, const SoftmaxInfogainOutput<Acc>& out)
      : in(in),
        out(out),
        tile_size(in.classes * V),
        logits(scratch_of<Acc>(Scratch::Logits, groups_for(in.classes) * tile_size)),
        exponentials(scratch_of<Acc>(Scratch::Exponentials, groups_for(in.classes) * tile_size)),
        matrix(base == Base::Dense ? scratch_of<Acc>(Scratch::Matrix, groups_for(in.classes) * tile_size) : nullptr) {}

  // The rows (first_outer, first_inner) onwards: along the inner axis where there is one, else along the outer.
  void operator()(int64_t first_outer, int64_t first_inner, int64_t n_rows) {
    outer = first_outer;
    inner = first_inner;
    rows = n_rows;
    read_rows();
    if (out.made_for.data != nullptr && all_made()) {
      return;
    }
    for (int64_t first = 0; first < rows; first += V) {
      group_of(in.logits, first).load(in.classes, tile(logits, first));
      if constexpr (base == Base::Dense) {
        load_matrix(first);
      }
      sum(first);
    }
    add_entries();
    write_loss();
    if (out.norm.data != nullptr) {
      write_norm();
    }
    if (out.grad.data != nullptr) {
      write_gradient();
    }
  }

 private:
  // A per-row tensor along the block's rows.
  template <typename T>
  struct Along {
    T* data;
    int64_t stride;

    T& operator[](int64_t i) const { return data[i * stride]; }
  };

  template <typename T>
  Along<T> along(const PerRow<T>& values) const {
    if (values.data == nullptr) {
      return {nullptr, 0};
    }
    return {&values.at(outer, inner), in.inner == 1 ? values.outer_stride : values.inner_stride};
  }

  // The V rows from `first` on, or what is left of them.
  LaneRows<Acc> group_of(const Rows& tensor, int64_t first) const {
    const Row row =
        in.inner == 1 ? writable_row_at(tensor, outer + first, 0) : writable_row_at(tensor, outer, inner + first);
    return {row, in.inner == 1 ? tensor.outer_stride : tensor.inner_stride, rows - first < V ? rows - first : V};
  }

  // The tile of the group that row i belongs to, and where class k of row i lies in the tiles.
  Acc* tile(Acc* tiles, int64_t i) const { return tiles + i / V * tile_size; }
  int64_t place(uint64_t i, int64_t k) const { return i / V * tile_size + k * V + i % V; }

  // Labels, of which unusable ones become 0 and do not count, and upstream gradients.
  void read_rows() {
    const Along<const int64_t> labels = along(in.labels);
    all_counted = labels.stride == 1 ? read_labels<1>(labels) : read_labels<0>(labels);
    read(out.grad_loss, upstream);
    read(out.grad_lse, on_lse);
    for (int64_t i = 0; i < rows && !all_counted; ++i) {
      if (!counted[i]) {
        upstream[i] = 0;
        is_counted(in, in.inner == 1 ? outer + i : outer, in.inner == 1 ? 0 : inner + i, labels[i]); // reports
      }
    }
  }

  // Whether all count. fixed_stride: 1 where the labels lie side by side, which the compiler then vectorizes, else 0.
  template <int64_t fixed_stride>
  bool read_labels(Along<const int64_t> labels) {
    const int64_t ignored = in.ignore_index, stride = fixed_stride == 1 ? 1 : labels.stride;
    const uint64_t n_rows = in.infogain.n_rows;
    int64_t unusable = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t l = labels.data[i * stride];
      const bool usable = (l != ignored) & (static_cast<uint64_t>(l) < n_rows);
      label[i] = usable ? l : 0;
      counted[i] = usable;
      unusable += !usable;
    }
    return unusable == 0;
  }

  void read(const PerRow<const Acc>& source, Acc* values) const {
    const Along<const Acc> from = along(source);
    if (from.data != nullptr && from.stride == 0) {
      std::fill(values, values + rows, *from.data);
    }
    for (int64_t i = 0; i < rows && from.data != nullptr && from.stride != 0; ++i) {
      values[i] = from[i];
    }
  }

  bool all_made() const {
    const Along<const Acc> made_for = along(out.made_for), wanted = along(out.grad_loss);
    for (int64_t i = 0; i < rows; ++i) {
      if (on_lse[i] != 0 || !(wanted[i] == made_for[i])) {
        return false;
      }
    }
    return true;
  }

  void load_matrix(int64_t first) {
    LaneRows<Acc>::load_transposed(in.classes, tile(matrix, first), [&](int64_t lane, int64_t c, int64_t n) {
      return LaneRows<Acc>::load_piece(dense_row_of_h(in.infogain, label[first + lane]), c, n); // label 0 past the end
    });
  }

  // Maximum, exponentials and sums of the group.
  void sum(int64_t first) {
    const Acc *x = tile(logits, first), *h = tile(matrix, first);
    Acc* e = tile(exponentials, first);
    const Vec zero(Acc(0));
    Vec m0 = Vec::loadu(x), m1 = m0;
    for (int64_t c = 1; c + 1 < in.classes; c += 2) {
      m0 = at::vec::clamp_min(m0, Vec::loadu(x + c * V));
      m1 = at::vec::clamp_min(m1, Vec::loadu(x + (c + 1) * V));
    }
    const Vec m = at::vec::clamp_min(at::vec::clamp_min(m0, m1), Vec::loadu(x + (in.classes - 1) * V));
    Vec exp_total = zero, dot_total = zero, mass_total = zero, h_c = zero;
    for (int64_t begin = 0; begin < in.classes; begin += kColumnBlock) {
      const int64_t end = in.classes - begin < kColumnBlock ? in.classes : begin + kColumnBlock;
      Vec exp_sum = zero, dot_sum = zero, mass_sum = zero;
      for (int64_t c = begin; c < end; ++c) {
        if constexpr (base == Base::Dense) {
          h_c = Vec::loadu(h + c * V);
        }
        accumulate<base>(Vec::loadu(x + c * V) - m, h_c, exp_sum, dot_sum, mass_sum).store(e + c * V);
      }
      exp_total = exp_total + exp_sum;
      dot_total = dot_total + dot_sum;
      mass_total = mass_total + mass_sum;
    }
    if constexpr (base == Base::Constant) {
      dot_total = dot_total * Vec(background());
      mass_total = Vec(background()) * Vec(static_cast<Acc>(in.classes));
    }
    m.store(max + first);
    exp_total.store(exp + first);
    dot_total.store(dot + first);
    mass_total.store(mass + first);
    log_at_least_one(exp_total).store(log_sum + first);
  }

  Acc background() const { return static_cast<Acc>(in.infogain.background); }

  Acc base_at(int64_t i, int64_t k) const { return base == Base::Dense ? matrix[place(i, k)] : background(); }

  Entries<Acc> entries_of(int64_t i) const { return entries_of_h<Acc>(in.infogain, label[i], diagonal[i], label[i]); }

  // What the entries of H add to the sums of their rows.
  void add_entries() {
    if (in.infogain.crow != nullptr) {
      add_stored_values();
    } else if (in.infogain.diagonal != nullptr) {
      add_diagonal();
    }
    bool any_nan = false;
    for (int64_t i = 0; i < rows; ++i) {
      any_nan |= dot[i] != dot[i];
    }
    for (int64_t i = 0; i < rows && any_nan; ++i) {
      if (std::isnan(dot[i]) && counted[i] && !std::isnan(exp[i])) {
        dot[i] = careful_dot(i);
      }
    }
  }

  void add_diagonal() {
    const Along<const Acc> values{static_cast<const Acc*>(in.infogain.diagonal), in.infogain.diagonal_stride};
    Acc logit[kMaxRows], extra[kMaxRows];
    for (int64_t first = 0; first < rows; first += V) {
      const Acc *x = tile(logits, first), *h = tile(matrix, first);
      for (int64_t i = 0; i < V; ++i) { // label 0 past the end
        const int64_t l = label[first + i], at = l * V + i;
        logit[first + i] = x[at];
        extra[first + i] = values[l];
        diagonal[first + i] = values[l] + (base == Base::Dense ? h[at] : background());
      }
    }
    for (int64_t i = 0; i < rows; i += V) {
      const Vec d = Vec::loadu(logit + i) - Vec::loadu(max + i), more = Vec::loadu(extra + i);
      at::vec::fmadd(more, d, Vec::loadu(dot + i)).store(dot + i);
      (Vec::loadu(mass + i) + more).store(mass + i);
    }
  }

  void add_stored_values() {
    for (int64_t i = 0; i < rows; ++i) {
      const Entries<Acc> entries = entries_of(i);
      for (int64_t j = 0; j < entries.count; ++j) {
        const int64_t k = entries.col[j];
        const Acc extra = entries.value[j] - base_at(i, k);
        dot[i] += extra * (logits[place(i, k)] - max[i]);
        mass[i] += extra;
      }
    }
  }

  Acc careful_dot(int64_t i) const { // 0 * (-inf) has to be 0
    const Entries<Acc> entries = entries_of(i);
    Acc total = 0;
    int64_t next = 0;
    for (int64_t k = 0; k < in.classes; ++k) {
      const bool stored = next < entries.count && entries.col[next] == k;
      const Acc weight = stored ? entries.value[next++] : base_at(i, k);
      if (weight != 0) {
        total += weight * (logits[place(i, k)] - max[i]);
      }
    }
    return total;
  }

  Acc log_sum_exp(int64_t i) const {
    if (!std::isinf(max[i])) {
      return max[i] + log_sum[i];
    }
    for (int64_t k = 0; k < in.classes; ++k) {
      if (std::isnan(logits[place(i, k)])) {
        return std::numeric_limits<Acc>::quiet_NaN();
      }
    }
    return max[i];
  }

  // Writes loss and lse; leaves in `slope` the factor of p in dloss/dx.
  void write_loss() {
    Acc loss[kMaxRows];
    for (int64_t i = 0; i < rows; i += V) {
      const Vec m = Vec::loadu(mass + i);
      (m * Vec::loadu(log_sum + i) - Vec::loadu(dot + i)).store(loss + i);
      m.store(slope + i);
    }
    const Acc z = static_cast<Acc>(in.z_loss);
    const Along<Acc> losses = along(out.loss), lses = along(out.lse);
    for (int64_t i = 0; i < rows && (z != 0 || lses.data != nullptr); ++i) {
      const Acc lse = log_sum_exp(i);
      loss[i] += z == 0 ? Acc(0) : z * lse * lse;
      slope[i] += z == 0 ? Acc(0) : 2 * z * lse;
      if (lses.data != nullptr) {
        lses[i] = lse;
      }
    }
    for (int64_t i = 0; i < rows && losses.data != nullptr; ++i) {
      losses[i] = counted[i] ? loss[i] : Acc(0);
    }
  }

  // The group's logits become p_factor * exponentials - h_factor * H, the entries of H left out.
  void build_gradient(int64_t first, const Acc* p_factor, const Acc* h_factor) {
    const Vec p = Vec::loadu(p_factor + first), h = Vec::loadu(h_factor + first), minus_h = Vec(Acc(0)) - h;
    const Vec constant = h * Vec(-background());
    const Acc *e = tile(exponentials, first), *row = tile(matrix, first);
    Acc* g = tile(logits, first);
    for (int64_t c = 0; c < in.classes; ++c) {
      Vec value = Vec::loadu(e + c * V) * p;
      if constexpr (base == Base::Constant) {
        value = value + constant;
      }
      if constexpr (base == Base::Dense) {
        value = at::vec::fmadd(Vec::loadu(row + c * V), minus_h, value);
      }
      value.store(g + c * V);
    }
  }

  // set(row, class, element of the gradient) for every entry of H in the group's rows.
  template <typename Set>
  void for_entries(int64_t first, const Acc* p_factor, const Acc* h_factor, const Set& set) const {
    const int64_t end = rows - first < V ? rows : first + V;
    const Acc* e = tile(exponentials, first) - first;
    if (in.infogain.crow == nullptr && in.infogain.diagonal != nullptr) {
      for (int64_t i = first; i < end; ++i) {
        if (counted[i]) {
          set(i, label[i], p_factor[i] * e[label[i] * V + i] - h_factor[i] * diagonal[i]);
        }
      }
    }
    for (int64_t i = first; i < end && in.infogain.crow != nullptr; ++i) {
      const Entries<Acc> entries = entries_of(i);
      for (int64_t j = 0; j < entries.count && counted[i]; ++j) {
        const int64_t k = entries.col[j];
        set(i, k, p_factor[i] * e[k * V + i] - h_factor[i] * entries.value[j]);
      }
    }
  }

  void write_gradient() {
    Acc p_factor[kMaxRows];
    for (int64_t i = 0; i < rows; i += V) {
      const Vec on_p = at::vec::fmadd(Vec::loadu(upstream + i), Vec::loadu(slope + i), Vec::loadu(on_lse + i));
      (on_p / Vec::loadu(exp + i)).store(p_factor + i);
    }
    for (int64_t first = 0; first < rows; first += V) {
      build_gradient(first, p_factor, upstream);
      for (int64_t i = first; i < rows && i < first + V && !all_counted; ++i) {
        for (int64_t k = 0; k < in.classes && !counted[i]; ++k) { // without H, and no 0 * p: p may be NaN
          const int64_t at = place(i, k);
          logits[at] = on_lse[i] == 0 ? Acc(0) : on_lse[i] / exp[i] * exponentials[at];
        }
      }
      const LaneRows<Acc> group = group_of(out.grad, first);
      group.store(in.classes, tile(logits, first));
      // after the store, and not in the tile: the transpose would wait for each of these scalars to reach the cache
      if (group.classes_contiguous()) {
        Acc* g = group.elements(0, 0);
        for_entries(first, p_factor, upstream, [&, stride = group.lane_stride](int64_t i, int64_t k, Acc value) {
          g[(i - first) * stride + k] = value;
        });
      } else {
        for_entries(
            first, p_factor, upstream, [&](int64_t i, int64_t k, Acc value) { group.set(i - first, k, value); });
      }
    }
  }

  void write_norm() {
    Acc p_factor[kMaxRows], one[kMaxRows];
    for (int64_t i = 0; i < rows; ++i) {
      p_factor[i] = slope[i] / exp[i];
      one[i] = 1;
    }
    const Along<Acc> norms = along(out.norm);
    for (int64_t first = 0; first < rows; first += V) {
      build_gradient(first, p_factor, one);
      for_entries(first, p_factor, one, [&](int64_t i, int64_t k, Acc g) { logits[place(i, k)] = g; });
      const Acc* g = tile(logits, first);
      Vec total(Acc(0));
      for (int64_t begin = 0; begin < in.classes; begin += kColumnBlock) {
        const int64_t end = in.classes - begin < kColumnBlock ? in.classes : begin + kColumnBlock;
        Vec squares(Acc(0));
        for (int64_t c = begin; c < end; ++c) {
          squares = at::vec::fmadd(Vec::loadu(g + c * V), Vec::loadu(g + c * V), squares);
        }
        total = total + squares;
      }
      Acc norm[V];
      total.sqrt().store(norm);
      for (int64_t i = first; i < rows && i < first + V; ++i) {
        norms[i] = counted[i] ? norm[i - first] : Acc(0);
      }
    }
  }

  const SoftmaxInfogainInput<Acc>& in;
  const SoftmaxInfogainOutput<Acc>& out;
  int64_t tile_size;
  // tiles (C, V), one for each group
  Acc* logits; // later the gradient
  Acc* exponentials;
  Acc* matrix; // rows of H

  int64_t outer = 0, inner = 0, rows = 0; // the first row, and how many
  int64_t label[kMaxRows] = {};
  bool counted[kMaxRows] = {}, all_counted = false;
  Acc diagonal[kMaxRows] = {};                        // H[l, l] where H has a diagonal
  Acc upstream[kMaxRows] = {}, on_lse[kMaxRows] = {}; // upstream gradients of loss and lse
  Acc max[kMaxRows] = {}, exp[kMaxRows] = {}, dot[kMaxRows] = {}, mass[kMaxRows] = {}, log_sum[kMaxRows] = {};
  Acc slope[kMaxRows] = {};
};

template <Base base, typename Acc>
void run_by_lanes(const SoftmaxInfogainInput<Acc>& in, const SoftmaxInfogainOutput<Acc>& out) {
  const int64_t block = LaneKernel<base, Acc>::groups_for(in.classes) * Vectorized<Acc>::size();
  const int64_t length = in.inner == 1 ? in.outer : in.inner; // rows in a run whose neighbours share a stride
  const int64_t per_run = (length + block - 1) / block, runs = in.inner == 1 ? 1 : in.outer;
  const auto blocks = [&](int64_t begin, int64_t end) {
    LaneKernel<base, Acc> kernel(in, out);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start = i % per_run * block, n_rows = length - start < block ? length - start : block;
      kernel(in.inner == 1 ? start : i / per_run, in.inner == 1 ? 0 : start, n_rows);
    }
  };
  parallel_for(0, runs * per_run, kGrain / (in.classes * block) + 1, blocks);
}

} // namespace CPU_CAPABILITY
} // namespace lgd
