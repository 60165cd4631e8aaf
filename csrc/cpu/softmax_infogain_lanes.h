// softmax_infogain with one row per vector lane: for short rows, of which a vector would be mostly empty, and for rows
// whose classes are not contiguous but whose neighbours are (images, (N, C, H, W)). All reductions are vertical.
#pragma once

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
constexpr int64_t kColumnBlock = 64;     // classes added up before they join the total, for accuracy

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

  Row row(int64_t lane) const { return {first.data + lane * lane_stride * element_size(first.dtype), first.dtype, first.stride}; }
  Acc* elements(int64_t lane, int64_t c) const {
    return reinterpret_cast<Acc*>(first.data) + (lane < active ? lane : 0) * lane_stride + c;
  }

  void load(int64_t classes, Acc* tile) const {
    if (classes_contiguous()) {
      load_transposed(classes, tile, [&](int64_t lane, int64_t c, int64_t n) { return Vec::loadu(elements(lane, c), n); });
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

// V neighbouring rows.
template <Base base, typename Acc>
class LaneKernel {
 public:
  using Vec = Vectorized<Acc>;
  static constexpr int64_t V = Vec::size();

  LaneKernel(const SoftmaxInfogainInput<Acc>& in, const SoftmaxInfogainOutput<Acc>& out)
      : in(in),
        out(out),
        x(scratch_of<Acc>(Scratch::Logits, in.classes * V)),
        exponential(scratch_of<Acc>(Scratch::Exponentials, in.classes * V)),
        matrix(base == Base::Dense ? scratch_of<Acc>(Scratch::Matrix, in.classes * V) : nullptr) {}

  // The rows (outer, inner) onwards: along the inner axis where there is one, else along the outer.
  void operator()(int64_t first_outer, int64_t first_inner, int64_t n_rows) {
    outer = first_outer;
    inner = first_inner;
    active = n_rows;
    read_rows();
    if (out.made_for.data != nullptr && all_made()) {
      return;
    }
    rows_of(in.logits).load(in.classes, x);
    if constexpr (base == Base::Dense) {
      load_matrix();
    }
    sum();
    if (in.infogain.crow != nullptr) {
      add_stored_values();
    } else if (in.infogain.diagonal != nullptr) {
      add_diagonal();
    }
    for (int64_t i = 0; i < active; ++i) {
      if (dot[i] != dot[i] && counted[i] && !std::isnan(exp[i])) {
        dot[i] = careful_dot(i);
      }
    }
    write_loss();
    if (out.norm.data != nullptr) {
      write_norm();
    }
    if (out.grad.data != nullptr) {
      write_gradient();
    }
  }

 private:
  template <typename T>
  T& at(const PerRow<T>& values, int64_t i) const {
    return in.inner == 1 ? values.at(outer + i, 0) : values.at(outer, inner + i);
  }

  LaneRows<Acc> rows_of(const Rows& rows) const {
    return {writable_row_at(rows, outer, inner), in.inner == 1 ? rows.outer_stride : rows.inner_stride, active};
  }

  // Labels, of which unusable ones become 0 and do not count, and upstream gradients.
  void read_rows() {
    all_counted = true;
    for (int64_t i = 0; i < active; ++i) {
      const int64_t l = at(in.labels, i);
      counted[i] = l != in.ignore_index && l >= 0 && l < in.infogain.n_rows;
      label[i] = counted[i] ? l : 0;
      all_counted &= counted[i];
    }
    for (int64_t i = 0; i < active && out.grad_loss.data != nullptr; ++i) {
      upstream[i] = at(out.grad_loss, i);
    }
    for (int64_t i = 0; i < active && out.grad_lse.data != nullptr; ++i) {
      on_lse[i] = at(out.grad_lse, i);
    }
    for (int64_t i = 0; i < active && !all_counted; ++i) {
      if (!counted[i]) {
        upstream[i] = 0;
        is_counted(in, in.inner == 1 ? outer + i : outer, in.inner == 1 ? 0 : inner + i, at(in.labels, i)); // reports
      }
    }
  }

  bool all_made() const {
    for (int64_t i = 0; i < active; ++i) {
      if (on_lse[i] != 0 || !(at(out.grad_loss, i) == at(out.made_for, i))) {
        return false;
      }
    }
    return true;
  }

  void load_matrix() {
    LaneRows<Acc>::load_transposed(in.classes, matrix, [&](int64_t lane, int64_t c, int64_t n) {
      return LaneRows<Acc>::load_piece(dense_row_of_h(in.infogain, label[lane < active ? lane : 0]), c, n);
    });
  }

  // Maximum, exponentials and sums of all lanes.
  void sum() {
    Vec m = Vec::loadu(x);
    for (int64_t c = 1; c < in.classes; ++c) {
      m = at::vec::clamp_min(m, Vec::loadu(x + c * V));
    }
    const Vec zero(Acc(0));
    Vec exp_total = zero, dot_total = zero, mass_total = zero, h = zero;
    for (int64_t first = 0; first < in.classes; first += kColumnBlock) {
      const int64_t end = in.classes - first < kColumnBlock ? in.classes : first + kColumnBlock;
      Vec e = zero, d = zero, w = zero;
      for (int64_t c = first; c < end; ++c) {
        if constexpr (base == Base::Dense) {
          h = Vec::loadu(matrix + c * V);
        }
        accumulate<base>(Vec::loadu(x + c * V) - m, h, e, d, w).store(exponential + c * V);
      }
      exp_total = exp_total + e;
      dot_total = dot_total + d;
      mass_total = mass_total + w;
    }
    if constexpr (base == Base::Constant) {
      const Vec background(static_cast<Acc>(in.infogain.background));
      dot_total = dot_total * background;
      mass_total = background * Vec(static_cast<Acc>(in.classes));
    }
    m.store(max);
    exp_total.store(exp);
    dot_total.store(dot);
    mass_total.store(mass);
    log_at_least_one(exp_total).store(log_sum);
  }

  Acc base_at(int64_t i, int64_t k) const {
    return base == Base::Dense ? matrix[k * V + i] : static_cast<Acc>(in.infogain.background);
  }

  // H[l, l] of each lane's label, in `diagonal`.
  void add_diagonal() {
    const Acc* values = static_cast<const Acc*>(in.infogain.diagonal);
    Acc extra[V] = {}, logit[V] = {};
    for (int64_t i = 0; i < active; ++i) {
      extra[i] = values[label[i] * in.infogain.diagonal_stride];
      logit[i] = x[label[i] * V + i];
      diagonal[i] = extra[i] + base_at(i, label[i]);
    }
    for (int64_t i = 0; i < V; ++i) {
      dot[i] += extra[i] * (logit[i] - max[i]);
      mass[i] += extra[i];
    }
  }

  Entries<Acc> entries_of(int64_t i) const {
    return entries_of_h<Acc>(in.infogain, label[i], diagonal[i], label[i]);
  }

  void add_stored_values() {
    for (int64_t i = 0; i < active; ++i) {
      const Entries<Acc> entries = entries_of(i);
      for (int64_t j = 0; j < entries.count; ++j) {
        const int64_t k = entries.col[j];
        const Acc extra = entries.value[j] - base_at(i, k);
        dot[i] += extra * (x[k * V + i] - max[i]);
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
        total += weight * (x[k * V + i] - max[i]);
      }
    }
    return total;
  }

  Acc log_sum_exp(int64_t i) const {
    if (!std::isinf(max[i])) {
      return max[i] + log_sum[i];
    }
    for (int64_t k = 0; k < in.classes; ++k) {
      if (std::isnan(x[k * V + i])) {
        return std::numeric_limits<Acc>::quiet_NaN();
      }
    }
    return max[i];
  }

  // Writes loss and lse; leaves in `slope` the factor of p in dloss/dx.
  void write_loss() {
    Acc loss[V];
    for (int64_t i = 0; i < V; ++i) {
      loss[i] = mass[i] * log_sum[i] - dot[i];
      slope[i] = mass[i];
    }
    const Acc z = static_cast<Acc>(in.z_loss);
    for (int64_t i = 0; i < active && (z != 0 || out.lse.data != nullptr); ++i) {
      const Acc lse = log_sum_exp(i);
      loss[i] += z == 0 ? Acc(0) : z * lse * lse;
      slope[i] += z == 0 ? Acc(0) : 2 * z * lse;
      if (out.lse.data != nullptr) {
        at(out.lse, i) = lse;
      }
    }
    for (int64_t i = 0; i < active && out.loss.data != nullptr; ++i) {
      at(out.loss, i) = counted[i] ? loss[i] : Acc(0);
    }
  }

  // x = p_factor * exponential - h_factor * H.
  void build_gradient(Vec p_factor, Vec h_factor) {
    const Vec constant = h_factor * Vec(static_cast<Acc>(-in.infogain.background)), minus_h = Vec(Acc(0)) - h_factor;
    for (int64_t c = 0; c < in.classes; ++c) {
      Vec g = Vec::loadu(exponential + c * V) * p_factor;
      if constexpr (base == Base::Constant) {
        g = g + constant;
      }
      if constexpr (base == Base::Dense) {
        g = at::vec::fmadd(Vec::loadu(matrix + c * V), minus_h, g);
      }
      g.store(x + c * V);
    }
    Acc p[V], h[V];
    p_factor.store(p);
    h_factor.store(h);
    if (in.infogain.crow == nullptr && in.infogain.diagonal != nullptr) {
      for (int64_t i = 0; i < active; ++i) {
        const int64_t place = label[i] * V + i;
        x[place] = p[i] * exponential[place] - h[i] * diagonal[i];
      }
    }
    for (int64_t i = 0; i < active && in.infogain.crow != nullptr; ++i) {
      const Entries<Acc> entries = entries_of(i);
      for (int64_t j = 0; j < entries.count; ++j) {
        const int64_t place = entries.col[j] * V + i;
        x[place] = p[i] * exponential[place] - h[i] * entries.value[j];
      }
    }
  }

  void write_gradient() {
    const Vec up = Vec::loadu(upstream);
    build_gradient(at::vec::fmadd(up, Vec::loadu(slope), Vec::loadu(on_lse)) / Vec::loadu(exp), up);
    for (int64_t i = 0; i < active && !all_counted; ++i) {
      for (int64_t c = 0; c < in.classes && !counted[i]; ++c) { // without H, and no 0 * p: p may be NaN
        x[c * V + i] = on_lse[i] == 0 ? Acc(0) : on_lse[i] / exp[i] * exponential[c * V + i];
      }
    }
    rows_of(out.grad).store(in.classes, x);
  }

  void write_norm() {
    build_gradient(Vec::loadu(slope) / Vec::loadu(exp), Vec(Acc(1))); // a row that does not count is dealt with below
    Vec total(Acc(0));
    for (int64_t first = 0; first < in.classes; first += kColumnBlock) {
      const int64_t end = in.classes - first < kColumnBlock ? in.classes : first + kColumnBlock;
      Vec squares(Acc(0));
      for (int64_t c = first; c < end; ++c) {
        const Vec g = Vec::loadu(x + c * V);
        squares = at::vec::fmadd(g, g, squares);
      }
      total = total + squares;
    }
    Acc norm[V];
    total.sqrt().store(norm);
    for (int64_t i = 0; i < active; ++i) {
      at(out.norm, i) = counted[i] ? norm[i] : Acc(0);
    }
  }

  const SoftmaxInfogainInput<Acc>& in;
  const SoftmaxInfogainOutput<Acc>& out;
  Acc* x;           // (C, V) logits, later the gradient
  Acc* exponential; // (C, V)
  Acc* matrix;      // (C, V) rows of H

  int64_t outer = 0, inner = 0, active = 0; // the first row, and how many
  int64_t label[V] = {};
  bool counted[V] = {}, all_counted = false;
  Acc diagonal[V] = {}; // H[l, l] where H has a diagonal
  Acc upstream[V] = {}, on_lse[V] = {}; // upstream gradients of loss and lse
  Acc max[V], exp[V], dot[V], mass[V], log_sum[V], slope[V] = {};
};

template <Base base, typename Acc>
void run_by_lanes(const SoftmaxInfogainInput<Acc>& in, const SoftmaxInfogainOutput<Acc>& out) {
  constexpr int64_t V = Vectorized<Acc>::size();
  const int64_t length = in.inner == 1 ? in.outer : in.inner; // rows in a run whose neighbours share a stride
  const int64_t per_run = (length + V - 1) / V, runs = in.inner == 1 ? 1 : in.outer;
  const auto groups = [&](int64_t begin, int64_t end) {
    LaneKernel<base, Acc> kernel(in, out);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t start = group % per_run * V, n_rows = length - start < V ? length - start : V;
      kernel(in.inner == 1 ? start : group / per_run, in.inner == 1 ? 0 : start, n_rows);
    }
  };
  parallel_for(0, runs * per_run, kGrain / (in.classes * V) + 1, groups);
}

} // namespace CPU_CAPABILITY
} // namespace lgd
