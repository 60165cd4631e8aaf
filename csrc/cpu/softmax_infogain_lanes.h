// softmax_infogain with one row per vector lane: for short rows, of which a vector would be mostly empty, and for rows
// whose classes are not contiguous but whose neighbours are (images, (N, C, H, W)). All reductions are vertical.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "parallel.h"
#include "rows.h"
#include "softmax_infogain.h"
#include "softmax_infogain_row.h"
#include "transpose.h"
#include "vec_math.h"

namespace lgd {
inline namespace CPU_CAPABILITY {

constexpr int64_t kShortRow = 64;      // contiguous rows up to this length go by lanes
constexpr int64_t kLongestColumn = 2048; // rows with another stride do up to this length: the tiles stay in L2

// Depends on the shape and stride of a row alone, never on how many there are.
template <typename Acc>
inline bool goes_by_lanes(const SoftmaxInfogainInput<Acc>& in) {
  return in.classes > 0 && in.classes <= (in.logits.class_stride == 1 ? kShortRow : kLongestColumn);
}

// `active` rows of one tensor, one per lane.
template <typename Acc>
struct LaneRows {
  static constexpr int64_t V = Vectorized<Acc>::size();
  ConstRow first;      // the row of lane 0
  int64_t lane_stride; // in elements, between the rows of neighbouring lanes
  int64_t active;

  const char* lane(int64_t i) const { return first.data + i * lane_stride * element_size(first.dtype); }

  // tile[c * V + lane] for all classes; lanes beyond the active ones get some finite or loaded value.
  void load(int64_t classes, Acc* tile) const {
    if (lane_stride == 1 && first.stride != 1) {
      for (int64_t c = 0; c < classes; ++c) {
        load_lanes(c, tile + c * V);
      }
      return;
    }
    Acc square[V * V] __attribute__((aligned(64))) = {};
    for (int64_t c = 0; c < classes; c += V) {
      const int64_t n = classes - c < V ? classes - c : V;
      for (int64_t i = 0; i < active; ++i) {
        load_piece({lane(i), first.dtype, first.stride}, c, n, square + i * V);
      }
      transpose_tile(square);
      std::memcpy(tile + c * V, square, n * V * sizeof(Acc));
    }
  }

  void store(int64_t classes, const Acc* tile) const {
    const auto row = [&](int64_t i) { return Row{const_cast<char*>(lane(i)), first.dtype, first.stride}; };
    if (lane_stride == 1 && first.stride != 1) {
      for (int64_t c = 0; c < classes; ++c) {
        const Row across{element(row(0), c), first.dtype, 1};
        store_piece(tile + c * V, across, 0, active);
      }
      return;
    }
    Acc square[V * V] __attribute__((aligned(64)));
    for (int64_t c = 0; c < classes; c += V) {
      const int64_t n = classes - c < V ? classes - c : V;
      std::memcpy(square, tile + c * V, n * V * sizeof(Acc));
      transpose_tile(square);
      for (int64_t i = 0; i < active; ++i) {
        store_piece(square + i * V, row(i), c, n);
      }
    }
  }

  // Up to V elements of a row.
  static void load_piece(const ConstRow& row, int64_t begin, int64_t count, Acc* target) {
    const Acc* source = load_row(row, begin, count, target);
    if (source != target) {
      Vectorized<Acc>::loadu(source, count).store(target);
    }
  }

  static void store_piece(const Acc* source, const Row& row, int64_t begin, int64_t count) {
    if (row.dtype == dtype_of<Acc>() && row.stride == 1) {
      Vectorized<Acc>::loadu(source).store(reinterpret_cast<Acc*>(row.data) + begin, count);
    } else {
      store_row(source, row, begin, count);
    }
  }

 private:
  void load_lanes(int64_t c, Acc* target) const {
    load_piece({first.data + c * first.stride * element_size(first.dtype), first.dtype, 1}, 0, active, target);
  }
};

// V neighbouring rows.
template <Base base, typename Acc>
struct LaneKernel {
  using Vec = Vectorized<Acc>;
  static constexpr int64_t V = Vec::size();

  const SoftmaxInfogainInput<Acc>& in;
  const SoftmaxInfogainOutput<Acc>& out;
  Acc* x;           // (C, V) logits, later the gradient
  Acc* exponential; // (C, V)
  Acc* matrix;      // (C, V) rows of H

  LaneKernel(const SoftmaxInfogainInput<Acc>& in, const SoftmaxInfogainOutput<Acc>& out)
      : in(in),
        out(out),
        x(scratch_of<Acc>(Scratch::Logits, in.classes * V)),
        exponential(scratch_of<Acc>(Scratch::Exponentials, in.classes * V)),
        matrix(base == Base::Dense ? scratch_of<Acc>(Scratch::Matrix, in.classes * V) : nullptr) {}

  // The rows (outer, inner) onwards: along the inner axis where there is one, else along the outer.
  void operator()(int64_t outer, int64_t inner, int64_t active) {
    Lanes lanes(in, out, outer, inner, active);
    for (int64_t i = 0; i < active; ++i) {
      lanes.read(i);
    }
    if (out.made_for.data != nullptr && lanes.all_made()) {
      return;
    }
    lanes.rows_of(in.logits).load(in.classes, x);
    if constexpr (base == Base::Dense) {
      load_matrix(lanes);
    }
    sum(lanes);
    for (int64_t i = 0; i < active; ++i) {
      add_entries(lanes, i);
    }
    finish(lanes);
    if (out.norm.data != nullptr) {
      write_norm(lanes);
    }
    if (out.grad.data != nullptr) {
      gradient(lanes, lanes.p_factor, lanes.h_factor);
      lanes.rows_of(out.grad).store(in.classes, x);
    }
  }

 private:
  // What is known of each lane's row.
  struct Lanes {
    const SoftmaxInfogainInput<Acc>& in;
    const SoftmaxInfogainOutput<Acc>& out;
    int64_t outer, inner, active;
    int64_t label[V];
    bool counted[V];
    RowOfH<Acc> h[V];
    Acc max[V], exp[V], dot[V], mass[V], log_sum[V];
    Acc upstream[V] = {}, on_lse[V] = {}, slope[V] = {}, p_factor[V] = {}, h_factor[V] = {};

    Lanes(
        const SoftmaxInfogainInput<Acc>& in, const SoftmaxInfogainOutput<Acc>& out, int64_t outer, int64_t inner,
        int64_t active)
        : in(in), out(out), outer(outer), inner(inner), active(active) {}

    template <typename T>
    T& at(const PerRow<T>& values, int64_t i) const {
      return in.inner == 1 ? values.at(outer + i, 0) : values.at(outer, inner + i);
    }

    LaneRows<Acc> rows_of(const Rows& rows) const {
      return {row_at(rows, outer, inner), in.inner == 1 ? rows.outer_stride : rows.inner_stride, active};
    }

    void read(int64_t i) {
      label[i] = at(in.labels, i);
      counted[i] = in.inner == 1 ? is_counted(in, outer + i, 0, label[i]) : is_counted(in, outer, inner + i, label[i]);
      if (counted[i]) {
        row_of_h(in.infogain, label[i], h[i]);
      }
      upstream[i] = counted[i] && out.grad_loss.data != nullptr ? at(out.grad_loss, i) : Acc(0);
      on_lse[i] = out.grad_lse.data != nullptr ? at(out.grad_lse, i) : Acc(0);
    }

    bool all_made() const {
      for (int64_t i = 0; i < active; ++i) {
        if (on_lse[i] != 0 || !(at(out.grad_loss, i) == at(out.made_for, i))) {
          return false;
        }
      }
      return true;
    }
  };

  void load_matrix(const Lanes& lanes) {
    Acc square[V * V] __attribute__((aligned(64))) = {};
    for (int64_t c = 0; c < in.classes; c += V) {
      const int64_t n = in.classes - c < V ? in.classes - c : V;
      for (int64_t i = 0; i < lanes.active; ++i) {
        if (lanes.counted[i]) {
          LaneRows<Acc>::load_piece(lanes.h[i].dense, c, n, square + i * V);
        }
      }
      transpose_tile(square);
      std::memcpy(matrix + c * V, square, n * V * sizeof(Acc));
    }
  }

  // Maximum, sums and exponentials of all lanes.
  void sum(Lanes& lanes) {
    Vec max = Vec::loadu(x);
    for (int64_t c = 1; c < in.classes; ++c) {
      max = at::vec::clamp_min(max, Vec::loadu(x + c * V));
    }
    const Vec zero(Acc(0));
    Vec exp = zero, dot = zero, mass = zero, h = zero;
    for (int64_t c = 0; c < in.classes; ++c) {
      if constexpr (base == Base::Dense) {
        h = Vec::loadu(matrix + c * V);
      }
      accumulate<base>(Vec::loadu(x + c * V) - max, h, exp, dot, mass).store(exponential + c * V);
    }
    if constexpr (base == Base::Constant) {
      dot = dot * Vec(static_cast<Acc>(in.infogain.background));
      mass = Vec(static_cast<Acc>(in.infogain.background) * in.classes);
    }
    max.store(lanes.max);
    exp.store(lanes.exp);
    dot.store(lanes.dot);
    mass.store(lanes.mass);
    log_at_least_one(exp).store(lanes.log_sum);
  }

  Acc base_at(const Lanes& lanes, int64_t i, int64_t k) const {
    return base == Base::Dense ? matrix[k * V + i] : base == Base::Constant ? lanes.h[i].background : Acc(0);
  }

  void add_entries(Lanes& lanes, int64_t i) const {
    if (!lanes.counted[i]) {
      return;
    }
    const Entries<Acc>& entries = lanes.h[i].entries;
    for (int64_t j = 0; j < entries.count; ++j) {
      const int64_t k = entries.col[j];
      const Acc extra = entries.value[j] - base_at(lanes, i, k);
      lanes.dot[i] += extra * (x[k * V + i] - lanes.max[i]);
      lanes.mass[i] += extra;
    }
    if (std::isnan(lanes.dot[i]) && !std::isnan(lanes.exp[i])) {
      lanes.dot[i] = careful_dot(lanes, i);
    }
  }

  Acc careful_dot(const Lanes& lanes, int64_t i) const { // 0 * (-inf) has to be 0
    const Entries<Acc>& entries = lanes.h[i].entries;
    Acc dot = 0;
    int64_t next = 0;
    for (int64_t k = 0; k < in.classes; ++k) {
      const bool stored = next < entries.count && entries.col[next] == k;
      const Acc weight = stored ? entries.value[next++] : base_at(lanes, i, k);
      if (weight != 0) {
        dot += weight * (x[k * V + i] - lanes.max[i]);
      }
    }
    return dot;
  }

  Acc log_sum_exp(const Lanes& lanes, int64_t i) const {
    if (!std::isinf(lanes.max[i])) {
      return lanes.max[i] + lanes.log_sum[i];
    }
    for (int64_t k = 0; k < in.classes; ++k) {
      if (std::isnan(x[k * V + i])) {
        return std::numeric_limits<Acc>::quiet_NaN();
      }
    }
    return lanes.max[i];
  }

  // Writes loss and lse, and finds the factors of the gradient.
  void finish(Lanes& lanes) {
    const Acc z = static_cast<Acc>(in.z_loss);
    for (int64_t i = 0; i < lanes.active; ++i) {
      const bool counted = lanes.counted[i];
      const Acc lse = log_sum_exp(lanes, i);
      if (out.lse.data != nullptr) {
        lanes.at(out.lse, i) = lse;
      }
      if (out.loss.data != nullptr) {
        const Acc penalty = z == 0 ? Acc(0) : z * lse * lse;
        lanes.at(out.loss, i) = counted ? lanes.mass[i] * lanes.log_sum[i] - lanes.dot[i] + penalty : Acc(0);
      }
      lanes.slope[i] = counted ? lanes.mass[i] + (z == 0 ? Acc(0) : 2 * z * lse) : Acc(0);
      lanes.h_factor[i] = lanes.upstream[i];
      lanes.p_factor[i] = (lanes.upstream[i] * lanes.slope[i] + lanes.on_lse[i]) / lanes.exp[i];
    }
  }

  // x = p_factor * exponential - h_factor * H, and 0 where neither the loss nor the lse of a row counts.
  void gradient(const Lanes& lanes, const Acc* p_factor, const Acc* h_factor) {
    const Vec p = Vec::loadu(p_factor), h = Vec::loadu(h_factor);
    const Vec constant = h * Vec(static_cast<Acc>(-in.infogain.background)), minus_h = Vec(Acc(0)) - h;
    for (int64_t c = 0; c < in.classes; ++c) {
      Vec g = Vec::loadu(exponential + c * V) * p;
      if constexpr (base == Base::Constant) {
        g = g + constant;
      }
      if constexpr (base == Base::Dense) {
        g = at::vec::fmadd(Vec::loadu(matrix + c * V), minus_h, g);
      }
      g.store(x + c * V);
    }
    for (int64_t i = 0; i < lanes.active; ++i) {
      const Entries<Acc>& entries = lanes.h[i].entries;
      for (int64_t j = 0; lanes.counted[i] && j < entries.count; ++j) {
        const int64_t at = entries.col[j] * V + i;
        x[at] = p_factor[i] * exponential[at] - h_factor[i] * entries.value[j];
      }
      for (int64_t c = 0; !lanes.counted[i] && lanes.on_lse[i] == 0 && c < in.classes; ++c) {
        x[c * V + i] = 0;
      }
    }
  }

  void write_norm(Lanes& lanes) {
    Acc p_factor[V] = {}, h_factor[V] = {};
    for (int64_t i = 0; i < lanes.active; ++i) {
      p_factor[i] = lanes.slope[i] / lanes.exp[i];
      h_factor[i] = lanes.counted[i] ? Acc(1) : Acc(0);
    }
    gradient(lanes, p_factor, h_factor);
    Vec squares(Acc(0));
    for (int64_t c = 0; c < in.classes; ++c) {
      const Vec g = Vec::loadu(x + c * V);
      squares = at::vec::fmadd(g, g, squares);
    }
    Acc total[V];
    squares.store(total);
    for (int64_t i = 0; i < lanes.active; ++i) {
      lanes.at(out.norm, i) = lanes.counted[i] ? std::sqrt(total[i]) : Acc(0);
    }
  }
};

template <Base base, typename Acc>
void run_by_lanes(const SoftmaxInfogainInput<Acc>& in, const SoftmaxInfogainOutput<Acc>& out) {
  constexpr int64_t V = Vectorized<Acc>::size();
  const int64_t length = in.inner == 1 ? in.outer : in.inner; // rows in a run whose neighbours share a stride
  const int64_t per_run = (length + V - 1) / V, runs = in.inner == 1 ? 1 : in.outer;
  const auto groups = [&](int64_t begin, int64_t end) {
    LaneKernel<base, Acc> kernel(in, out);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t start = group % per_run * V, active = length - start < V ? length - start : V;
      kernel(in.inner == 1 ? start : group / per_run, in.inner == 1 ? 0 : start, active);
    }
  };
  parallel_for(0, runs * per_run, 16384 / (in.classes * V) + 1, groups);
}

} // namespace CPU_CAPABILITY
} // namespace lgd
