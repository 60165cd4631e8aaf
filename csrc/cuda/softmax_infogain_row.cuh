// One row of softmax_infogain, for any slice and any team: its sums, its loss, its gradient.
#pragma once

#include "infogain.cuh"
#include "teams.cuh"

namespace lgd::gpu {

struct Position {
  int64_t outer, inner;
};

LGD_DEVICE Position position_of(int64_t row, int64_t inner) {
  return inner == 1 ? Position{row, 0} : Position{row / inner, row % inner};
}

template <typename T>
LGD_DEVICE T* row_at(const Rows& rows, Position p) {
  return static_cast<T*>(rows.data) + p.outer * rows.outer_stride + p.inner * rows.inner_stride;
}

template <typename A>
LGD_DEVICE A value_at(const PerRow<const A>& rows, Position p) { // 0 where there is none
  return rows.data == nullptr ? A(0) : rows.at(p.outer, p.inner);
}
template <typename A>
LGD_DEVICE void write_at(const PerRow<A>& rows, Position p, A value) {
  if (rows.data != nullptr) {
    rows.at(p.outer, p.inner) = value;
  }
}

// A row of logits with its label.
template <typename T>
struct LabelledRow {
  using Acc = Accumulated<T>;
  Strip<const T> logits;
  int64_t label;
  bool kept, counted; // not ignored; and with a usable label

  LGD_DEVICE LabelledRow(const SoftmaxInfogainInput<Acc>& in, Position p)
      : logits{row_at<const T>(in.logits, p), in.logits.class_stride}, label(in.labels.at(p.outer, p.inner)) {
    kept = label != in.ignore_index;
    counted = kept && label >= 0 && label < in.infogain.n_rows;
  }
  LGD_DEVICE Acc logit(int k) const { return number_from<Acc>(logits.at(k)); }
};

template <typename Acc>
LGD_DEVICE Acc finite_or_zero_shift(Acc max) { // exp(-inf - 0) is 0, exp(-inf + inf) would be NaN
  return max == -std::numeric_limits<Acc>::infinity() ? Acc(0) : max;
}

template <typename Acc, int W>
LGD_DEVICE Acc max_of(const Acc (&x)[W]) {
  Acc max = x[0];
#pragma unroll
  for (int i = 1; i < W; ++i) {
    max = larger_of(max, x[i]);
  }
  return max;
}

// What one thread adds up: of exp(x - shift), of H (x - shift) and of H, for the base of H without a constant factor.
template <typename Base, typename Acc>
struct PartialSums {
  Total<Acc> exp, dot, mass;

  template <typename Step, int W>
  LGD_DEVICE void add(const RowOfH<Base, Acc>& h, int k, Step step, const Acc (&x)[W], Acc shift) {
    Acc e[W], d[W], products[W], weights[W];
#pragma unroll
    for (int i = 0; i < W; ++i) {
      d[i] = x[i] - shift;
      e[i] = exp_of(d[i]);
    }
    exp.add(tree_sum(e));
    if constexpr (std::is_same_v<Base, Constant>) {
      dot.add(tree_sum(d));
      mass.add(Acc(W));
    }
    if constexpr (is_dense<Base>) {
      h.read_base(k, step, weights);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        products[i] = weights[i] * d[i];
      }
      dot.add(tree_sum(products));
      mass.add(tree_sum(weights));
    }
  }

  // As if the shift had been `new_shift` all along. An infinite maximum says that all exponentials so far are 0 or NaN.
  LGD_DEVICE void move(Acc max, Acc shift, Acc new_shift) {
    const Acc moved = shift - new_shift;
    const Acc factor = max == -std::numeric_limits<Acc>::infinity() ? Acc(1) : exp_of(moved);
    exp.sum *= factor;
    exp.dropped *= factor;
    if constexpr (!std::is_same_v<Base, Nothing>) {
      dot.add(mass.value() * moved);
    }
  }
};

// What is known of a row once it has been summed; the same in every thread of the team.
template <typename Acc>
struct Sums {
  Acc max, shift;
  Acc exp;  // sum of exp(x - shift); NaN for a row of only -inf
  Acc dot;  // sum of H (x - shift)
  Acc mass; // sum of H
  Acc log_sum, lse;
  Acc slope; // dloss/dx = slope * p - H
};

// The row's largest element, and the thread's partial sums against it.
template <typename Base, typename Slice, typename Team, typename Acc>
LGD_DEVICE Acc sum_groups(const Slice& slice, Team& team, const RowOfH<Base, Acc>& h, PartialSums<Base, Acc>& sums) {
  Acc max[1] = {-std::numeric_limits<Acc>::infinity()};
  if constexpr (Slice::on_chip) { // look twice
    slice.for_groups([&](int, auto, const auto& x) { max[0] = larger_of(max[0], max_of(x)); });
    team.reduce(max, Max{});
    const Acc shift = finite_or_zero_shift(max[0]);
    slice.for_groups([&](int k, auto step, const auto& x) { sums.add(h, k, step, x, shift); });
  } else { // look once: the sums follow the largest element so far
    Acc own = max[0];
    slice.for_groups([&](int k, auto step, const auto& x) {
      const Acc top = max_of(x);
      if (top > own) {
        sums.move(own, finite_or_zero_shift(own), top);
        own = top;
      }
      sums.add(h, k, step, x, finite_or_zero_shift(own));
    });
    max[0] = own;
    team.reduce(max, Max{});
    sums.move(own, finite_or_zero_shift(own), finite_or_zero_shift(max[0]));
  }
  return max[0];
}

// The entries of H that this thread looks after, (class, its value, what it adds to the base).
template <typename Base, typename Acc, typename F>
LGD_DEVICE void for_entries(const RowOfH<Base, Acc>& h, const Share& share, const F& f) {
  for (int i = share.rank; i < h.entries(); i += share.size) {
    const int k = h.column(i);
    if (share.holds(k)) {
      f(k, h.value(i), h.value(i) - h.base_at(k));
    }
  }
}

// Sum over all classes of f(k), in the slow and simple way.
template <typename Acc, typename Slice, typename Team, typename F>
LGD_DEVICE Acc sum_classes(const Slice& slice, Team& team, const F& f) {
  Total<Acc> total;
  slice.share.for_classes([&](int k) { total.add(f(k)); });
  Acc sum[1] = {total.value()};
  team.reduce(sum, Sum{});
  return sum[0];
}

template <typename Base, typename T, typename Slice, typename Team, typename Acc>
LGD_DEVICE Sums<Acc> sum_row(
    const LabelledRow<T>& row, const RowOfH<Base, Acc>& h, Acc z_loss, const Slice& slice, Team& team) {
  PartialSums<Base, Acc> partial;
  Sums<Acc> sums;
  sums.max = sum_groups<Base>(slice, team, h, partial);
  sums.shift = finite_or_zero_shift(sums.max);
  const Acc factor = std::is_same_v<Base, Constant> ? h.background : Acc(1);
  Acc reduced[3] = {partial.exp.value(), factor * partial.dot.value(), factor * partial.mass.value()};
  for_entries(h, slice.share, [&](int k, Acc, Acc extra) {
    reduced[1] += extra * (row.logit(k) - sums.shift);
    reduced[2] += extra;
  });
  team.reduce(reduced, Sum{});
  const Acc nan = std::numeric_limits<Acc>::quiet_NaN();
  sums.exp = reduced[0] == 0 ? nan : reduced[0];
  sums.dot = reduced[0] == 0 ? nan : reduced[1];
  sums.mass = reduced[2];

  const bool careful = row.counted && is_nan(sums.dot) && !is_nan(sums.exp);
  if (team.any(careful)) { // 0 * (-inf) has to be 0
    const Acc dot = sum_classes<Acc>(slice, team, [&](int k) {
      const Acc weight = h.at(k);
      return weight == 0 ? Acc(0) : weight * (row.logit(k) - sums.shift);
    });
    sums.dot = careful ? dot : sums.dot;
  }
  sums.log_sum = log_of(sums.exp);
  sums.lse = sums.max + sums.log_sum;
  const bool infinite = sums.max - sums.max != 0;
  if (team.any(infinite)) { // or the maximum has overlooked NaN
    const Acc nans = sum_classes<Acc>(slice, team, [&](int k) { return is_nan(row.logit(k)) ? Acc(1) : Acc(0); });
    sums.lse = !infinite ? sums.lse : nans > 0 ? nan : sums.max;
  }
  sums.slope = row.counted ? sums.mass + (z_loss == 0 ? Acc(0) : 2 * z_loss * sums.lse) : Acc(0);
  return sums;
}

template <typename Base, typename T, typename Slice, typename Team, typename Acc>
LGD_DEVICE Acc
norm_of(const LabelledRow<T>& row, const RowOfH<Base, Acc>& h, const Sums<Acc>& sums, const Slice& slice, Team& team) {
  const Acc squares = sum_classes<Acc>(slice, team, [&](int k) {
    const Acc g = sums.slope / sums.exp * exp_of(row.logit(k) - sums.shift) - h.at(k);
    return g * g;
  });
  return row.counted ? square_root(squares) : Acc(0);
}

// target = p_factor * exp(x - shift) - h_factor * H, or 0.
template <typename Base, typename T, typename Slice, typename Team, typename Acc>
LGD_DEVICE void write_gradient(
    const LabelledRow<T>& row, const RowOfH<Base, Acc>& h, Acc shift, Acc p_factor, Acc h_factor, bool zero,
    const Slice& slice, Team& team, const Strip<T>& target) {
  slice.for_groups([&]<int W>(int k, auto step, const Acc(&x)[W]) {
    Acc g[W];
    h.read_base(k, step, g);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      g[i] = zero ? Acc(0) : exp_of(x[i] - shift) * p_factor - h_factor * g[i]; // not 0 * p: p may be NaN
    }
    target.write(k, step, g);
  });
  team.sync(); // an entry may be another thread's class
  for_entries(h, slice.share, [&](int k, Acc value, Acc) {
    target.at(k) = element_from<T>(exp_of(row.logit(k) - shift) * p_factor - h_factor * value);
  });
}

// Whether the gradient that is there is the one that is wanted.
template <typename Acc>
LGD_DEVICE bool is_done(const SoftmaxInfogainOutput<Acc>& out, Position p) {
  return out.made_for.data != nullptr && value_at(out.grad_lse, p) == 0 &&
         value_at(out.grad_loss, p) == value_at(out.made_for, p);
}

// Whether the logits of the row are needed.
template <typename T, typename Acc>
LGD_DEVICE bool is_needed(const LabelledRow<T>& row, const SoftmaxInfogainOutput<Acc>& out, Position p) {
  return row.counted || out.lse.data != nullptr || out.max.data != nullptr || value_at(out.grad_lse, p) != 0;
}

// Everything that is wanted of a row; the gradient goes to `target`.
template <typename Base, typename T, typename Slice, typename Team, typename Acc>
LGD_DEVICE void finish_row(
    const SoftmaxInfogainInput<Acc>& in, const SoftmaxInfogainOutput<Acc>& out, Position p, const LabelledRow<T>& row,
    const Slice& slice, Team& team, const Strip<T>& target) {
  const RowOfH<Base, Acc> h(in.infogain, row.label, row.counted);
  const Sums<Acc> sums = sum_row<Base>(row, h, in.z_loss, slice, team);
  const Acc norm = out.norm.data == nullptr ? Acc(0) : norm_of(row, h, sums, slice, team);
  if (slice.share.rank == 0 && slice.share.first == 0) {
    const Acc penalty = in.z_loss == 0 ? Acc(0) : in.z_loss * sums.lse * sums.lse;
    const Acc without = row.kept ? std::numeric_limits<Acc>::quiet_NaN() : Acc(0);
    write_at(out.loss, p, row.counted ? sums.mass * sums.log_sum - sums.dot + penalty : without);
    write_at(out.lse, p, sums.lse);
    write_at(out.max, p, sums.max);
    write_at(out.log_sum, p, sums.log_sum);
    write_at(out.norm, p, norm);
  }
  if (out.grad.data != nullptr) {
    const Acc upstream = row.counted ? value_at(out.grad_loss, p) : Acc(0), on_lse = value_at(out.grad_lse, p);
    const Acc p_factor = (upstream * sums.slope + on_lse) / sums.exp;
    write_gradient(row, h, sums.shift, p_factor, upstream, !row.counted && on_lse == 0, slice, team, target);
  }
}

} // namespace lgd::gpu
