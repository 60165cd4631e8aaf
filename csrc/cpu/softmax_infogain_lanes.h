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
#include "stream.h"
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

// Neighbouring rows of one tensor, V to a group, and their transfer from and to tiles: element c of row i lies at
// tiles[i / V * (classes * V) + c * V + i % V].
template <typename Acc>
struct LaneRows {
  using Vec = Vectorized<Acc>;
  static constexpr int64_t V = Vec::size();
  Row first;       // the first row
  int64_t stride;  // in elements, between neighbouring rows
  int64_t count;   // of the rows
  int64_t classes; // of one row

  Row row(int64_t i) const { return {first.data + i * stride * element_size(first.dtype), first.dtype, first.stride}; }
  void set(int64_t i, int64_t c, Acc value) const { store_row(&value, row(i), c, 1); }

  void load(Acc* tiles) const {
    if (by_class()) {
      for_groups_of_classes([&](int64_t c, int64_t start, int64_t n) {
        Acc buffer[V];
        const ConstRow source = {element(first, c), first.dtype, 1};
        Vec::loadu(load_row(source, start, n, buffer), n).store(tiles + start * classes + c * V);
      });
      return;
    }
    const Acc* base = own_rows();
    int64_t step = stride;
    if (base == nullptr) {
      Acc* all = scratch_of<Acc>(Scratch::Gradient, count * classes);
      for (int64_t i = 0; i < rows_at_once(); ++i) {
        load_row<Acc>({row(i).data, first.dtype, first.stride}, 0, classes_at_once(), all + i * classes);
      }
      base = all;
      step = classes;
    }
    for (int64_t start = 0; start < count; start += V) {
      const Acc* group = base + start * step;
      load_group(classes, in_group(start), tiles + start * classes, [group, step](int64_t lane, int64_t c, Acc*) {
        return group + lane * step + c;
      });
    }
  }

  void store(const Acc* tiles, bool around_the_cache) const {
    if (by_class()) {
      const bool streams = around_the_cache && first.dtype == dtype_of<Acc>();
      for_groups_of_classes([&](int64_t c, int64_t start, int64_t n) {
        const Row along = {element(first, c), first.dtype, 1};
        const Acc* values = tiles + start * classes + c * V;
        Acc* target = reinterpret_cast<Acc*>(element(along, start));
        if (streams && n == V && reinterpret_cast<uintptr_t>(target) % sizeof(Vec) == 0) {
          stream_vector(target, Vec::loadu(values));
        } else {
          store_row(values, along, start, n);
        }
      });
      return;
    }
    if (Acc* own = own_rows(); own != nullptr) {
      store_rows(tiles, own, stride);
      return;
    }
    Acc* all = scratch_of<Acc>(Scratch::Gradient, count * classes);
    store_rows(tiles, all, classes);
    for (int64_t i = 0; i < rows_at_once(); ++i) {
      store_row(all + i * classes, row(i), 0, classes_at_once());
    }
  }

  // tile[c * V + lane] for a group of n rows, repeating the first, from source(row, class, buffer): a pointer to the
  // elements of the row from this class on, which the source may put into the buffer.
  template <typename Source>
  static void load_group(int64_t classes, int64_t n, Acc* tile, const Source& source) {
    Acc buffers[V][kPiece];
    if (classes < kPiece) {
      for (int64_t lane = 0; lane < V; ++lane) {
        const Acc* from = source(lane < n ? lane : 0, 0, buffers[lane]);
        for (int64_t c = 0; c < classes; ++c) {
          tile[c * V + lane] = from[c];
        }
      }
      return;
    }
    for_pieces(classes, [&](int64_t c) {
      if (n == V) {
        Pieces<Acc>::load([&](int lane) { return source(lane, c, buffers[lane]); }, tile + c * V);
      } else {
        Pieces<Acc>::load([&](int lane) { return source(lane < n ? lane : 0, c, buffers[lane]); }, tile + c * V);
      }
    });
  }

  // How many elements `source` above has to provide.
  static int64_t piece_of(int64_t classes) { return classes < kPiece ? classes : kPiece; }

 private:
  static constexpr int64_t kPiece = Pieces<Acc>::kClasses;

  // Images: neighbouring rows side by side, and one class after the other far away.
  bool by_class() const { return stride == 1 && first.stride != 1; }
  // Where the rows can be read and written in place, the first one; else nullptr.
  Acc* own_rows() const {
    return first.dtype == dtype_of<Acc>() && first.stride == 1 ? reinterpret_cast<Acc*>(first.data) : nullptr;
  }
  // Rows of another type are converted one by one, or, where they lie one behind the other, all at once.
  bool packed() const { return first.stride == 1 && stride == classes; }
  int64_t rows_at_once() const { return packed() ? 1 : count; }
  int64_t classes_at_once() const { return packed() ? count * classes : classes; }

  int64_t in_group(int64_t start) const { return count - start < V ? count - start : V; }

  // f(class, first row, number of rows), class by class over all groups: group by group would visit a page for every V
  // elements.
  template <typename F>
  void for_groups_of_classes(const F& f) const {
    for (int64_t c = 0; c < classes; ++c) {
      for (int64_t start = 0; start < count; start += V) {
        f(c, start, in_group(start));
      }
    }
  }

  // f(first class) for pieces that cover the classes; the last one overlaps its neighbour rather than end beyond them.
  template <typename F>
  static void for_pieces(int64_t classes, const F& f) {
    for (int64_t c = 0; c < classes; c += kPiece) {
      f(c + kPiece <= classes ? c : classes - kPiece);
    }
  }

  void store_rows(const Acc* tiles, Acc* base, int64_t step) const {
    for (int64_t start = 0; start < count; start += V) {
      const int64_t n = in_group(start);
      const Acc* tile = tiles + start * classes;
      Acc* group = base + start * step;
      if (classes < kPiece) {
        for (int64_t lane = 0; lane < n; ++lane) {
          for (int64_t c = 0; c < classes; ++c) {
            group[lane * step + c] = tile[c * V + lane];
          }
        }
        continue;
      }
      for_pieces(classes, [=](int64_t c) {
        if (n == V) {
          Pieces<Acc>::store(tile + c * V, [=](int lane) { return group + lane * step + c; });
        } else {
          Acc nowhere[kPiece];
          Pieces<Acc>::store(
              tile + c * V, [=, &nowhere](int lane) { return lane < n ? group + lane * step + c : nowhere; });
        }
      });
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
    rows_of(in.logits).load(logits);
    for (int64_t first = 0; first < rows; first += V) {
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

  LaneRows<Acc> rows_of(const Rows& tensor) const {
    const int64_t stride = in.inner == 1 ? tensor.outer_stride : tensor.inner_stride;
    return {writable_row_at(tensor, outer, inner), stride, rows, in.classes};
  }

  // The tile of the group that row i belongs to, and where class k of row i lies in the tiles.
  Acc* tile(Acc* tiles, int64_t i) const { return tiles + i / V * tile_size; }
  int64_t place(uint64_t i, int64_t k) const { return i / V * tile_size + k * V + i % V; }

  // Labels and upstream gradients.
  void read_rows() {
    const Along<const int64_t> labels = along(in.labels);
    all_counted = labels.stride == 1 ? read_labels<1>(labels) : read_labels<0>(labels);
    read(out.grad_loss, upstream);
    read(out.grad_lse, on_lse);
    for (int64_t i = 0; i < rows && !all_counted; ++i) {
      if (!counted(i)) {
        upstream[i] = 0;
        is_counted(in, in.inner == 1 ? outer + i : outer, in.inner == 1 ? 0 : inner + i, labels[i]); // reports
      }
    }
  }

  // Whether all count. fixed_stride: 1 where the labels lie side by side, which the compiler then vectorizes, else 0.
  template <int64_t fixed_stride>
  bool read_labels(Along<const int64_t> labels) {
    const int64_t ignored = in.ignore_index, stride = fixed_stride ? 1 : labels.stride;
    const uint64_t n_rows = in.infogain.n_rows;
    int64_t all = 0;
    for (int64_t i = 0; i < rows; ++i) { // without a branch, which would keep the compiler from vectorizing
      const int64_t l = labels.data[i * stride];
      const int64_t l_or_minus_1 = l | -static_cast<int64_t>((l == ignored) | (static_cast<uint64_t>(l) >= n_rows));
      label_or_minus_1[i] = l_or_minus_1;
      lane_label[i] = static_cast<Acc>(l_or_minus_1);
      all |= l_or_minus_1;
    }
    return all >= 0;
  }

  bool counted(int64_t i) const { return label_or_minus_1[i] >= 0; }
  int64_t label(int64_t i) const { return counted(i) ? label_or_minus_1[i] : 0; }

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
    const int64_t n = rows - first < V ? rows - first : V;
    LaneRows<Acc>::load_group(in.classes, n, tile(matrix, first), [&](int64_t lane, int64_t c, Acc* buffer) {
      const ConstRow row = dense_row_of_h(in.infogain, label(first + lane));
      return load_row(row, c, LaneRows<Acc>::piece_of(in.classes), buffer);
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

  Entries<Acc> stored_values_of(int64_t i) const {
    return in.infogain.crow == nullptr ? Entries<Acc>{} : stored_values_of_h<Acc>(in.infogain, label(i));
  }

  // What the entries of H add to the sums of their rows.
  void add_entries() {
    if (in.infogain.crow != nullptr) {
      add_stored_values();
    } else if (has_only_a_diagonal()) {
      add_diagonal();
    }
    Vec not_finite(Acc(0)); // NaN - NaN and inf - inf are NaN
    for (int64_t i = 0; i < rows; i += V) {
      not_finite = not_finite + (Vec::loadu(dot + i) - Vec::loadu(dot + i));
    }
    const bool all_finite = sum_of_lanes(not_finite) == 0;
    for (int64_t i = 0; i < rows && !all_finite; ++i) {
      if (std::isnan(dot[i]) && counted(i) && !std::isnan(exp[i])) {
        dot[i] = careful_dot(i);
      }
    }
  }

  void add_diagonal() {
    const Along<const Acc> values{static_cast<const Acc*>(in.infogain.diagonal), in.infogain.diagonal_stride};
    for (int64_t first = 0; first < rows; first += V) {
      Vec more(values[0]);
      if (values.stride != 0) {
        Acc extra[V];
        for (int64_t i = 0; i < V; ++i) {
          extra[i] = values[label(first + i)];
        }
        more = Vec::loadu(extra);
      }
      const Vec zero(Acc(0));
      Vec logit = zero, h = base == Base::Dense ? zero : Vec(background());
      for_classes(first, [&](int64_t c, Vec labels, Vec this_class) {
        logit = logit + where_equal(labels, this_class, Vec::loadu(tile(logits, first) + c * V), zero);
        if constexpr (base == Base::Dense) {
          h = h + where_equal(labels, this_class, Vec::loadu(tile(matrix, first) + c * V), zero);
        }
      });
      (h + more).store(diagonal + first);
      at::vec::fmadd(more, logit - Vec::loadu(max + first), Vec::loadu(dot + first)).store(dot + first);
      (Vec::loadu(mass + first) + more).store(mass + first);
    }
  }

  // f(class, labels of the group's rows, the class as a vector), for all classes. Comparing each of them with the
  // labels takes the place of 16 scalar steps, which go to each label's place (69 cycles for the sums and 80 for the
  // gradient of 16 rows of 10; together with the loads and stores in pieces, 0.35 -> 0.24 ms at (65536, 10)).
  template <typename F>
  void for_classes(int64_t first, const F& f) const {
    const Vec labels = Vec::loadu(lane_label + first), one(Acc(1));
    Vec this_class(Acc(0));
    for (int64_t c = 0; c < in.classes; ++c, this_class = this_class + one) {
      f(c, labels, this_class);
    }
  }

  void add_stored_values() {
    for (int64_t i = 0; i < rows; ++i) {
      const Entries<Acc> entries = stored_values_of(i);
      for (int64_t j = 0; j < entries.count; ++j) {
        const int64_t k = entries.col[j];
        const Acc extra = entries.value[j] - base_at(i, k);
        dot[i] += extra * (logits[place(i, k)] - max[i]);
        mass[i] += extra;
      }
    }
  }

  Acc careful_dot(int64_t i) const { // 0 * (-inf) has to be 0
    const Entries<Acc> entries = stored_values_of(i);
    Acc total = 0;
    int64_t next = 0;
    for (int64_t k = 0; k < in.classes; ++k) {
      const bool stored = next < entries.count && entries.col[next] == k;
      const bool on_diagonal = has_only_a_diagonal() && k == label(i);
      const Acc weight = stored ? entries.value[next++] : on_diagonal ? diagonal[i] : base_at(i, k);
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
    const Vec zero(Acc(0));
    for (int64_t i = 0; i < rows && losses.data != nullptr; i += V) {
      const Vec counting = where_equal(Vec::loadu(lane_label + i), Vec(Acc(-1)), zero, Vec::loadu(loss + i));
      const int64_t n = rows - i < V ? rows - i : V;
      if (losses.stride == 1) {
        counting.store(&losses[i], n);
        continue;
      }
      counting.store(loss + i);
      for (int64_t j = i; j < i + n; ++j) {
        losses[j] = loss[j];
      }
    }
  }

  bool has_only_a_diagonal() const { return in.infogain.crow == nullptr && in.infogain.diagonal != nullptr; }

  // The group's logits become p_factor * exponentials - h_factor * H, the stored values of H left out.
  void build_gradient(int64_t first, const Acc* p_factor, const Acc* h_factor) {
    const Vec p = Vec::loadu(p_factor + first), h = Vec::loadu(h_factor + first), h_background = h * Vec(background());
    const Acc *e = tile(exponentials, first), *row = tile(matrix, first);
    Acc* g = tile(logits, first);
    const auto set = [&](int64_t c, Vec h_times_H) {
      at::vec::fmsub(Vec::loadu(e + c * V), p, h_times_H).store(g + c * V);
    };
    const auto h_times_base = [&](int64_t c) {
      return base == Base::Dense ? h * Vec::loadu(row + c * V) : h_background;
    };
    if (!has_only_a_diagonal()) {
      for (int64_t c = 0; c < in.classes; ++c) {
        set(c, h_times_base(c));
      }
      return;
    }
    const Vec h_times_diagonal = h * Vec::loadu(diagonal + first);
    for_classes(first, [&](int64_t c, Vec labels, Vec this_class) {
      set(c, where_equal(labels, this_class, h_times_diagonal, h_times_base(c)));
    });
  }

  // set(row, class, element of the gradient) for every stored value of H in the block's rows.
  template <typename Set>
  void for_stored_values(const Acc* p_factor, const Acc* h_factor, const Set& set) const {
    for (int64_t i = 0; i < rows && in.infogain.crow != nullptr; ++i) {
      const Entries<Acc> entries = stored_values_of(i);
      for (int64_t j = 0; j < entries.count && counted(i); ++j) {
        const int64_t k = entries.col[j];
        set(i, k, p_factor[i] * exponentials[place(i, k)] - h_factor[i] * entries.value[j]);
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
    }
    for (int64_t i = 0; i < rows && !all_counted; ++i) {
      for (int64_t k = 0; k < in.classes && !counted(i); ++k) { // without H, and no 0 * p: p may be NaN
        const int64_t at = place(i, k);
        logits[at] = on_lse[i] == 0 ? Acc(0) : on_lse[i] / exp[i] * exponentials[at];
      }
    }
    const LaneRows<Acc> target = rows_of(out.grad);
    target.store(logits, out.stream_grad);
    // after the store, and not in the tiles: the transpose would wait for each of these scalars to reach the cache
    for_stored_values(p_factor, upstream, [&](int64_t i, int64_t k, Acc value) { target.set(i, k, value); });
  }

  void write_norm() {
    Acc p_factor[kMaxRows], one[kMaxRows];
    for (int64_t i = 0; i < rows; ++i) {
      p_factor[i] = slope[i] / exp[i];
      one[i] = 1;
    }
    for (int64_t first = 0; first < rows; first += V) {
      build_gradient(first, p_factor, one);
    }
    for_stored_values(p_factor, one, [&](int64_t i, int64_t k, Acc g) { logits[place(i, k)] = g; });
    const Along<Acc> norms = along(out.norm);
    for (int64_t first = 0; first < rows; first += V) {
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
        norms[i] = counted(i) ? norm[i - first] : Acc(0);
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

  int64_t outer = 0, inner = 0, rows = 0;  // the first row, and how many
  int64_t label_or_minus_1[kMaxRows] = {}; // -1 where the row does not count
  Acc lane_label[kMaxRows] = {}; // to be compared with classes; a row of H may have too large a number for a float
  bool all_counted = false;
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
    fence_streams();
  };
  parallel_for(0, runs * per_run, kGrain / (in.classes * block) + 1, blocks);
}

} // namespace CPU_CAPABILITY
} // namespace lgd
