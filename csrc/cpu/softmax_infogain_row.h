// One row of softmax_infogain at a time: the passes over its elements, and a row of logits with its row of H.
//
// Three passes while the row is in cache: its maximum m; the sums of exp(x - m), H (x - m) and H; the gradient from the
// exponentials. Rows of more than kChunk classes are summed chunk by chunk, each against its own maximum, and the
// partial sums are combined in order. The chunks depend on the number of classes alone, so that a row's bits depend
// neither on the other rows nor on the threads.
#pragma once

#include <ATen/cpu/vec/functional_base.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "infogain.h"
#include "parallel.h"
#include "rows.h"
#include "softmax_infogain.h"
#include "softmax_infogain_gradient.h"
#include "vec_math.h"

namespace lgd {
inline namespace CPU_CAPABILITY {

constexpr int64_t kChunk = 32768; // classes summed at once: exponentials and logits of a chunk fit a 256 KB L2 cache
constexpr int64_t kGrain = 16384; // elements that are worth a thread
constexpr int64_t kBlock = 2048;  // classes whose gradient is built in L1 before it is written

inline int64_t chunks_of(int64_t classes) {
  return (classes + kChunk - 1) / kChunk;
}
inline int64_t chunk_size(int64_t classes, int64_t begin) {
  return classes - begin < kChunk ? classes - begin : kChunk;
}

// The calling thread's buffers, fetched once for many rows, and what one row's last pass found out about the next.
template <typename Acc>
struct Workspace {
  Acc *logits, *matrix, *exponentials, *gradient;
  const Acc* next_row = nullptr; // whose largest element is next_max
  Acc next_max = 0;

  explicit Workspace(int64_t classes)
      : logits(scratch_of<Acc>(Scratch::Logits, chunk_size(classes, 0))),
        matrix(scratch_of<Acc>(Scratch::Matrix, chunk_size(classes, 0))),
        exponentials(scratch_of<Acc>(Scratch::Exponentials, chunk_size(classes, 0))),
        gradient(scratch_of<Acc>(Scratch::Gradient, kBlock)) {}
};

// Memory that will be needed after the present pass, to be fetched while it computes: the next row of logits and of H,
// and the row that the gradient goes to. 4.6 -> 3.9 ms at (8192, 1000) on one thread; H's share is 2.17 -> 2.07 ms on
// two, and more where neighbours crowd the last-level cache (3.26 -> 3.02).
struct Ahead {
  struct Stream {
    const char *data = nullptr, *end = nullptr; // data >= end: nothing to fetch
    int64_t element_size = 0;

    // The memory of the next two vectors of n elements.
    template <bool for_writing>
    inline void fetch_two(int64_t n) {
      if (data < end) {
        __builtin_prefetch(data, for_writing);
        __builtin_prefetch(data + n * element_size, for_writing);
        data += 2 * n * element_size;
      }
    }
  };
  Stream logits, matrix, gradient;
};

// Passed on by reference only: a copy, made in larger pieces than the numbers were written in, would wait for all
// stores before it, and the streamed ones are slow (9 % of the samples at (8192, 1000), in a variant since dropped).
template <typename Acc>
struct Sums {
  Acc max = 0;     // what the logits were shifted by
  Acc exp = 0;     // sum of exp(x - max)
  Acc dot = 0;     // sum of H (x - max)
  Acc mass = 0;    // sum of H
  Acc squares = 0; // of the gradient, where its norm is wanted
};

// ---------------------------------------------------------------------------------------------------------------------
// Passes over contiguous elements
// ---------------------------------------------------------------------------------------------------------------------

// Largest element; a NaN may go unnoticed, the sums will not overlook it. (MaxAlong gives the same one.)
template <typename Acc>
inline Acc max_of(const Acc* x, int64_t count) {
  using Vec = Vectorized<Acc>;
  constexpr int64_t V = Vec::size();
  const Vec lowest(-std::numeric_limits<Acc>::infinity());
  Vec m0 = lowest, m1 = lowest, m2 = lowest, m3 = lowest;
  int64_t i = 0;
  for (; i + 4 * V <= count; i += 4 * V) {
    m0 = at::vec::clamp_min(m0, Vec::loadu(x + i));
    m1 = at::vec::clamp_min(m1, Vec::loadu(x + i + V));
    m2 = at::vec::clamp_min(m2, Vec::loadu(x + i + 2 * V));
    m3 = at::vec::clamp_min(m3, Vec::loadu(x + i + 3 * V));
  }
  for (; i + V <= count; i += V) {
    m0 = at::vec::clamp_min(m0, Vec::loadu(x + i));
  }
  if (i < count) {
    m1 = at::vec::clamp_min(m1, first_lanes(count - i, Vec::loadu(x + i, count - i), lowest));
  }
  return max_of_lanes(at::vec::clamp_min(at::vec::clamp_min(m0, m1), at::vec::clamp_min(m2, m3)));
}

// One vector of the second pass: exponentials to `e`, everything else into the accumulators.
template <Base base, typename Acc>
inline Vectorized<Acc> accumulate(
    Vectorized<Acc> d, Vectorized<Acc> h, Vectorized<Acc>& exp, Vectorized<Acc>& dot, Vectorized<Acc>& mass) {
  const Vectorized<Acc> e = exp_nonpositive(d);
  exp = exp + e;
  if constexpr (base == Base::Constant) {
    dot = dot + d;
  }
  if constexpr (base == Base::Dense) {
    dot = at::vec::fmadd(h, d, dot);
    mass = mass + h;
  }
  return e;
}

// exponentials[i] = exp(x[i] - shift), and the sums. For Base::Constant, dot and mass leave the constant out.
template <Base base, typename Acc>
inline void sum_exponentials(
    const Acc* x, const Acc* h, int64_t count, Acc shift, Acc* exponentials, Ahead ahead, Sums<Acc>& sums) {
  using Vec = Vectorized<Acc>;
  constexpr int64_t V = Vec::size();
  const Vec zero(Acc(0)), s(shift);
  Vec exp0 = zero, exp1 = zero, dot0 = zero, dot1 = zero, mass0 = zero, mass1 = zero, h0, h1;
  int64_t i = 0;
  for (; i + 2 * V <= count; i += 2 * V) {
    if constexpr (base == Base::Dense) {
      h0 = Vec::loadu(h + i);
      h1 = Vec::loadu(h + i + V);
    }
    ahead.logits.fetch_two<false>(V);
    ahead.gradient.fetch_two<true>(V);
    if constexpr (base == Base::Dense) {
      ahead.matrix.fetch_two<false>(V);
    }
    accumulate<base>(Vec::loadu(x + i) - s, h0, exp0, dot0, mass0).store(exponentials + i);
    accumulate<base>(Vec::loadu(x + i + V) - s, h1, exp1, dot1, mass1).store(exponentials + i + V);
  }
  for (; i < count; i += V) {
    const int64_t n = count - i < V ? count - i : V;
    const Vec d = first_lanes(n, Vec::loadu(x + i, n) - s, zero);
    if constexpr (base == Base::Dense) {
      h0 = Vec::loadu(h + i, n); // 0 beyond the end
    }
    Vec exp = zero;
    accumulate<base>(d, h0, exp, dot0, mass0).store(exponentials + i, n);
    exp0 = exp0 + first_lanes(n, exp, zero);
  }
  sums.max = shift;
  sums.exp = sum_of_lanes(exp0 + exp1);
  sums.dot = base == Base::Zero ? Acc(0) : sum_of_lanes(dot0 + dot1);
  sums.mass = base == Base::Dense      ? sum_of_lanes(mass0 + mass1)
              : base == Base::Constant ? static_cast<Acc>(count)
                                       : Acc(0);
}

template <typename Acc>
inline Acc dot(const Acc* a, const Acc* b, int64_t count) {
  using Vec = Vectorized<Acc>;
  constexpr int64_t V = Vec::size();
  Vec total(Acc(0));
  int64_t i = 0;
  for (; i + V <= count; i += V) {
    total = at::vec::fmadd(Vec::loadu(a + i), Vec::loadu(b + i), total);
  }
  if (i < count) {
    total = at::vec::fmadd(Vec::loadu(a + i, count - i), Vec::loadu(b + i, count - i), total);
  }
  return sum_of_lanes(total);
}

template <typename Acc>
inline Acc sum(const Acc* a, int64_t count) {
  using Vec = Vectorized<Acc>;
  constexpr int64_t V = Vec::size();
  Vec total(Acc(0));
  for (int64_t i = 0; i < count; i += V) {
    total = total + Vec::loadu(a + i, count - i < V ? count - i : V);
  }
  return sum_of_lanes(total);
}

// ---------------------------------------------------------------------------------------------------------------------
// One row at a time
// ---------------------------------------------------------------------------------------------------------------------

inline ConstRow row_at(const Rows& rows, int64_t outer, int64_t inner) {
  const int64_t offset = outer * rows.outer_stride + inner * rows.inner_stride;
  return {static_cast<const char*>(rows.data) + offset * element_size(rows.dtype), rows.dtype, rows.class_stride};
}

inline Row writable_row_at(const Rows& rows, int64_t outer, int64_t inner) {
  const ConstRow row = row_at(rows, outer, inner);
  return {const_cast<char*>(row.data), row.dtype, row.stride};
}

// Keeps the smallest position of all threads.
inline void report_bad_label(int64_t* first, int64_t position) {
  int64_t seen = __atomic_load_n(first, __ATOMIC_RELAXED);
  while (position < seen &&
         !__atomic_compare_exchange_n(first, &seen, position, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

// Whether the row counts, that is, has a usable label and not the ignored one; reports a label out of range.
template <typename Acc>
inline bool is_counted(const SoftmaxInfogainInput<Acc>& in, int64_t outer, int64_t inner, int64_t label) {
  if (label == in.ignore_index) {
    return false;
  }
  if (label < 0 || label >= in.infogain.n_rows) {
    report_bad_label(in.first_bad_label, outer * in.inner + inner);
    return false;
  }
  return true;
}

// A row of logits with its row of H; what the passes below share.
template <Base base, typename Acc>
struct LabelledRow {
  ConstRow x;
  int64_t classes, label;
  bool counted;
  ConstRow dense_h;
  Acc background, own_value = 0;
  Entries<Acc> entries;

  LabelledRow(const SoftmaxInfogainInput<Acc>& in, int64_t outer, int64_t inner)
      : x(row_at(in.logits, outer, inner)),
        classes(in.classes),
        label(in.labels.at(outer, inner)),
        counted(is_counted(in, outer, inner, label)),
        background(static_cast<Acc>(in.infogain.background)) {
    if (counted) {
      if constexpr (base == Base::Dense) {
        dense_h = dense_row_of_h(in.infogain, label);
      }
      if (in.infogain.diagonal != nullptr) {
        own_value = base_at(label) + static_cast<const Acc*>(in.infogain.diagonal)[label * in.infogain.diagonal_stride];
      }
      entries = entries_of_h(in.infogain, label, own_value, label);
    }
  }
  LabelledRow(const LabelledRow&) = delete; // entries may point into the row itself

  const Acc* dense(int64_t begin, int64_t count, const Workspace<Acc>& work) const {
    return base == Base::Dense && counted ? load_row(dense_h, begin, count, work.matrix) : nullptr;
  }

  Acc logit(int64_t k) const {
    Acc buffer = 0;
    return *load_row(x, k, 1, &buffer);
  }

  Acc base_at(int64_t k) const {
    if constexpr (base == Base::Dense) {
      Acc buffer = 0;
      return *load_row(dense_h, k, 1, &buffer);
    }
    return base == Base::Constant ? background : Acc(0);
  }

  // work.exponentials = exp(x - shift) for the chunk at `begin`.
  void exponentials(int64_t begin, Acc shift, const Workspace<Acc>& work) const {
    const int64_t count = chunk_size(classes, begin);
    const Acc* values = load_row(x, begin, count, work.logits);
    Sums<Acc> unused;
    sum_exponentials<Base::Zero>(
        values, static_cast<const Acc*>(nullptr), count, shift, work.exponentials, Ahead{}, unused);
  }

  // <H, v> over the chunk at `begin`, for v = values; entries left out.
  Acc dot_with_base(int64_t begin, const Acc* values, const Workspace<Acc>& work) const {
    const int64_t count = chunk_size(classes, begin);
    if (!counted || base == Base::Zero) {
      return 0;
    }
    return base == Base::Dense ? dot(dense(begin, count, work), values, count) : background * sum(values, count);
  }

  // The sums of the chunk at `begin`; work.exponentials are then those of the chunk against its own maximum.
  void chunk_sums(int64_t begin, const Workspace<Acc>& work, const Ahead& ahead, Sums<Acc>& sums) const {
    const int64_t count = chunk_size(classes, begin);
    const Acc* values = load_row(x, begin, count, work.logits);
    const Acc max = values == work.next_row ? work.next_max : max_of(values, count);
    const Acc shift = max == -std::numeric_limits<Acc>::infinity() ? Acc(0) : max; // exp(-inf - 0) = 0, not NaN
    const Acc* h = dense(begin, count, work);
    if (counted) {
      sum_exponentials<base>(values, h, count, shift, work.exponentials, ahead, sums);
    } else {
      sum_exponentials<Base::Zero>(values, h, count, shift, work.exponentials, ahead, sums);
    }
  }

  // The sums of the whole row from those of its chunks. A row of only -inf gives max = -inf and exp = NaN.
  void combine(const Sums<Acc>* chunks, int64_t n_chunks, const Workspace<Acc>& work, Sums<Acc>& row) const {
    row.max = -std::numeric_limits<Acc>::infinity();
    bool any = false;
    for (int64_t c = 0; c < n_chunks; ++c) {
      if (chunks[c].exp != 0) {
        row.max = chunks[c].max > row.max ? chunks[c].max : row.max;
        any = true;
      }
    }
    if (!any) {
      row.exp = row.dot = std::numeric_limits<Acc>::quiet_NaN();
      return;
    }
    for (int64_t c = 0; c < n_chunks; ++c) {
      const Acc moved = chunks[c].max - row.max;
      if (chunks[c].exp != 0) {
        row.exp += moved == 0 ? chunks[c].exp : chunks[c].exp * std::exp(moved);
      }
      row.dot += chunks[c].dot + chunks[c].mass * moved;
      row.mass += chunks[c].mass;
    }
    if (counted) {
      add_background_and_entries(row, work);
    }
  }

  void add_background_and_entries(Sums<Acc>& row, const Workspace<Acc>& work) const {
    if constexpr (base == Base::Constant) {
      row.dot *= background;
      row.mass *= background;
    }
    for (int64_t i = 0; i < entries.count; ++i) {
      const int64_t k = entries.col[i];
      const Acc extra = entries.value[i] - base_at(k);
      row.dot += extra * (logit(k) - row.max);
      row.mass += extra;
    }
    if (std::isnan(row.dot) && !std::isnan(row.exp)) {
      row.dot = careful_dot(row.max, work); // 0 * (-inf) has to be 0
    }
  }

  Acc careful_dot(Acc max, const Workspace<Acc>& work) const {
    Acc dot = 0;
    int64_t next = 0;
    for (int64_t begin = 0; begin < classes; begin += kChunk) {
      const int64_t count = chunk_size(classes, begin);
      const Acc* values = load_row(x, begin, count, work.logits);
      const Acc* row = dense(begin, count, work);
      for (int64_t k = begin; k < begin + count; ++k) {
        Acc weight = base == Base::Dense ? row[k - begin] : base == Base::Constant ? background : Acc(0);
        if (next < entries.count && entries.col[next] == k) {
          weight = entries.value[next++];
        }
        if (weight != 0) {
          dot += weight * (values[k - begin] - max);
        }
      }
    }
    return dot;
  }

  Acc log_sum_exp(const Sums<Acc>& sums, Acc log_sum) const {
    if (!std::isinf(sums.max)) {
      return sums.max + log_sum;
    }
    for (int64_t k = 0; k < classes; ++k) {
      if (std::isnan(logit(k))) {
        return std::numeric_limits<Acc>::quiet_NaN();
      }
    }
    return sums.max;
  }

  // Builds p_factor * work.exponentials - h_factor * H for the chunk at `begin`, in blocks of which `sink` gets
  // (values, first class, count). `place` gives each block the memory to be built in.
  template <typename Place, typename Sink>
  void gradient(
      int64_t begin, Acc p_factor, Acc h_factor, const Workspace<Acc>& work, const Place& place,
      const Sink& sink) const {
    const int64_t end = begin + chunk_size(classes, begin);
    const Acc* row = dense(begin, end - begin, work);
    int64_t next = 0;
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t count = end - first < kBlock ? end - first : kBlock;
      const Acc* e = work.exponentials + (first - begin);
      Acc* g = place(first);
      if (!counted) {
        GradientVectors<Base::Zero, Acc>(e, nullptr, 0, p_factor, h_factor).store(count, g);
      } else {
        const Acc* h = row == nullptr ? row : row + (first - begin);
        GradientVectors<base, Acc>(e, h, background, p_factor, h_factor).store(count, g);
        for (; next < entries.count && entries.col[next] < first + count; ++next) {
          const int64_t k = entries.col[next] - first;
          if (k >= 0) {
            g[k] = p_factor * e[k] - h_factor * entries.value[next];
          }
        }
      }
      sink(g, first, count);
    }
  }

  // The same for a row that counts, from registers to `target` around the cache. Finds the largest element of the next
  // row on the way; of whatever, if there is none.
  void stream(int64_t begin, Acc p_factor, Acc h_factor, Workspace<Acc>& work, Acc* target, const Acc* next_row) const {
    const int64_t count = chunk_size(classes, begin);
    const Acc* h = dense(begin, count, work);
    const GradientVectors<base, Acc> vectors(work.exponentials, h, background, p_factor, h_factor);
    MaxAlong<Acc> next = next_row == nullptr ? MaxAlong<Acc>(work.exponentials, 0) : MaxAlong<Acc>(next_row, count / 2);
    stream_gradient(vectors, p_factor, h_factor, entries, begin, count, target, next);
    work.next_row = next_row;
    work.next_max = next.result();
  }
};

} // namespace CPU_CAPABILITY
} // namespace lgd
