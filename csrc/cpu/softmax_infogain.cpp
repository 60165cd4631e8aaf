// softmax_infogain for one instruction set; compiled once for each.

#include "softmax_infogain.h"

#include "parallel.h"
#include "softmax_infogain_lanes.h"
#include "softmax_infogain_row.h"
#include "stream.h"

namespace lgd {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kGrain = 16384; // elements that are worth a thread

inline int64_t rows_per_thread(int64_t classes) { return kGrain / (classes + 1) + 1; }

// body(chunk) for every chunk of a row, on all threads or on this one.
template <typename Body>
void for_chunks(int64_t n_chunks, bool in_parallel, const Body& body) {
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      body(chunk);
    }
  };
  if (in_parallel) {
    parallel_for(0, n_chunks, 1, range);
  } else {
    range(0, n_chunks);
  }
}

// body(outer, inner) for every row; rows go to threads, or, where they are few and long, the chunks of each row do.
template <typename Acc, typename Body>
void for_rows(const SoftmaxInfogainInput<Acc>& in, const Body& body) {
  const int64_t n_rows = in.outer * in.inner;
  const bool split_rows = chunks_of(in.classes) > 1 && n_rows < 2 * num_threads();
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      body(i / in.inner, i % in.inner, split_rows);
    }
    fence_streams();
  };
  if (split_rows) {
    range(0, n_rows);
  } else {
    parallel_for(0, n_rows, rows_per_thread(in.classes), range);
  }
}

// Where this thread keeps the exponentials of the chunk it is at.
template <typename Acc>
Acc* exponentials_of(const SoftmaxInfogainInput<Acc>& in) {
  return scratch_of<Acc>(Scratch::Exponentials, in.classes < kChunk ? in.classes : kChunk);
}

// Loss, log-sum-exp, norm and gradient of single rows.
template <Base base, typename Acc>
struct RowKernel {
  const SoftmaxInfogainInput<Acc>& in;
  const SoftmaxInfogainOutput<Acc>& out;

  void operator()(int64_t outer, int64_t inner, bool in_parallel) const {
    const LabelledRow<base, Acc> row(in, outer, inner);
    if (done_early(outer, inner, row.counted)) {
      return;
    }
    const int64_t n_chunks = chunks_of(in.classes);
    auto* chunks = scratch_of<Sums<Acc>>(Scratch::Sums, n_chunks);
    for_chunks(n_chunks, in_parallel, [&](int64_t c) { chunks[c] = row.chunk_sums(c * kChunk, exponentials_of(in)); });
    const Sums<Acc> sums = row.combine(chunks, n_chunks);
    const Acc lse = row.log_sum_exp(sums);
    write_loss(row, sums, lse, outer, inner);
    if (out.grad.data == nullptr && out.norm.data == nullptr) {
      return;
    }
    for_chunks(n_chunks, in_parallel, [&](int64_t c) {
      if (n_chunks > 1) { // they were against the chunk's maximum, and another chunk's have replaced them
        row.exponentials(c * kChunk, sums.max, exponentials_of(in));
      }
      if (out.grad.data != nullptr) {
        write_gradient(row, c * kChunk, sums, lse, outer, inner);
      }
      chunks[c].squares = out.norm.data == nullptr ? Acc(0) : squares(row, c * kChunk, sums, lse);
    });
    if (out.norm.data != nullptr) {
      Acc total = 0;
      for (int64_t c = 0; c < n_chunks; ++c) {
        total += chunks[c].squares;
      }
      out.norm.at(outer, inner) = std::sqrt(total);
    }
  }

 private:
  Acc upstream_of_lse(int64_t outer, int64_t inner) const {
    return out.grad_lse.data == nullptr ? Acc(0) : out.grad_lse.at(outer, inner);
  }

  // Whether nothing is left to do: the gradient is there already, or the row is ignored and nobody asks for its lse.
  bool done_early(int64_t outer, int64_t inner, bool counted) const {
    const bool lse_unused = upstream_of_lse(outer, inner) == 0;
    if (out.made_for.data != nullptr && lse_unused &&
        out.grad_loss.at(outer, inner) == out.made_for.at(outer, inner)) {
      return true;
    }
    if (counted || !lse_unused || out.lse.data != nullptr) {
      return false;
    }
    if (out.loss.data != nullptr) {
      out.loss.at(outer, inner) = 0;
    }
    if (out.norm.data != nullptr) {
      out.norm.at(outer, inner) = 0;
    }
    if (out.grad.data != nullptr) {
      store_zeros<Acc>(writable_row_at(out.grad, outer, inner), in.classes);
    }
    return true;
  }

  void write_loss(
      const LabelledRow<base, Acc>& row, const Sums<Acc>& sums, Acc lse, int64_t outer, int64_t inner) const {
    if (out.lse.data != nullptr) {
      out.lse.at(outer, inner) = lse;
    }
    if (out.loss.data != nullptr) {
      const Acc penalty = in.z_loss == 0 ? Acc(0) : static_cast<Acc>(in.z_loss) * lse * lse;
      out.loss.at(outer, inner) = row.counted ? sums.mass * std::log(sums.exp) - sums.dot + penalty : Acc(0);
    }
  }

  // dloss/dx = slope * p - H for a row that counts.
  Acc slope(const Sums<Acc>& sums, Acc lse) const {
    return in.z_loss == 0 ? sums.mass : sums.mass + 2 * static_cast<Acc>(in.z_loss) * lse;
  }

  void write_gradient(
      const LabelledRow<base, Acc>& row, int64_t begin, const Sums<Acc>& sums, Acc lse, int64_t outer, int64_t inner)
      const {
    const Row target = writable_row_at(out.grad, outer, inner);
    const Acc on_lse = upstream_of_lse(outer, inner);
    if (!row.counted && on_lse == 0) {
      store_zeros<Acc>(target, in.classes); // not 0 * p: p may be NaN
      return;
    }
    const Acc upstream = row.counted ? out.grad_loss.at(outer, inner) : Acc(0);
    const Acc p_factor = ((row.counted ? upstream * slope(sums, lse) : Acc(0)) + on_lse) / sums.exp;
    const bool in_place = target.dtype == dtype_of<Acc>() && target.stride == 1;
    Acc* block = scratch_of<Acc>(Scratch::Gradient, kBlock);
    if (in_place && !out.stream_grad) {
      const auto place = [&](int64_t first) { return reinterpret_cast<Acc*>(element(target, first)); };
      row.gradient(begin, exponentials_of(in), p_factor, upstream, place, [](const Acc*, int64_t, int64_t) {});
    } else if (in_place) {
      row.gradient(
          begin, exponentials_of(in), p_factor, upstream, [&](int64_t) { return block; },
          [&](const Acc* g, int64_t first, int64_t count) {
            stream(g, count, reinterpret_cast<Acc*>(element(target, first)));
          });
    } else {
      row.gradient(
          begin, exponentials_of(in), p_factor, upstream, [&](int64_t) { return block; },
          [&](const Acc* g, int64_t first, int64_t count) { store_row(g, target, first, count); });
    }
  }

  // Sum of the squares of dloss/dx over a chunk.
  Acc squares(const LabelledRow<base, Acc>& row, int64_t begin, const Sums<Acc>& sums, Acc lse) const {
    if (!row.counted) {
      return 0;
    }
    Acc* block = scratch_of<Acc>(Scratch::Gradient, kBlock);
    Acc total = 0;
    row.gradient(
        begin, exponentials_of(in), slope(sums, lse) / sums.exp, Acc(1), [&](int64_t) { return block; },
        [&](const Acc* g, int64_t, int64_t count) { total += dot(g, g, count); });
    return total;
  }
};

template <Base base, typename Acc>
void run(const SoftmaxInfogainInput<Acc>& in, const SoftmaxInfogainOutput<Acc>& out) {
  if (goes_by_lanes(in)) {
    run_by_lanes<base>(in, out);
  } else {
    for_rows(in, RowKernel<base, Acc>{in, out});
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Double backward: p (c (v - t) + 2 z a t) with t = <p, v>, c = a (s_l + 2 z lse) + b; a, b the upstream gradients
// ---------------------------------------------------------------------------------------------------------------------

template <Base base, typename Acc>
struct DoubleBackwardKernel {
  const SoftmaxInfogainInput<Acc>& in;
  const SoftmaxInfogainDoubleBackward<Acc>& io;

  void operator()(int64_t outer, int64_t inner, bool in_parallel) const {
    const LabelledRow<base, Acc> row(in, outer, inner);
    const ConstRow v = row_at(io.grad_grad, outer, inner);
    const int64_t n_chunks = chunks_of(in.classes);
    auto* chunks = scratch_of<Sums<Acc>>(Scratch::Sums, n_chunks);
    for_chunks(n_chunks, in_parallel, [&](int64_t c) { chunks[c] = row.chunk_sums(c * kChunk, exponentials_of(in)); });
    const Sums<Acc> sums = row.combine(chunks, n_chunks);

    for_chunks(n_chunks, in_parallel, [&](int64_t c) { // <exp, v> in `exp`, <H, v> in `dot`
      const int64_t begin = c * kChunk, count = chunk_size(in.classes, begin);
      const Acc* e = exponentials(row, c, sums);
      const Acc* values = vector(v, begin, count);
      chunks[c].exp = dot(e, values, count);
      chunks[c].dot = row.dot_with_base(begin, values);
    });
    Acc mean_v = 0, h_v = 0;
    for (int64_t c = 0; c < n_chunks; ++c) {
      mean_v += chunks[c].exp;
      h_v += chunks[c].dot;
    }
    mean_v /= sums.exp;
    if (row.counted) {
      for (int64_t i = 0; i < row.h.entries.count; ++i) {
        const int64_t k = row.h.entries.col[i];
        Acc buffer;
        h_v += (row.h.entries.value[i] - row.base_at(k)) * *load_row(v, k, 1, &buffer);
      }
    }

    const Acc z = static_cast<Acc>(in.z_loss), lse = row.log_sum_exp(sums);
    const Acc upstream = row.counted ? io.grad_loss.at(outer, inner) : Acc(0);
    const Acc slope = row.counted ? sums.mass + (z == 0 ? Acc(0) : 2 * z * lse) : Acc(0);
    const Acc on_lse = io.grad_lse.data == nullptr ? Acc(0) : io.grad_lse.at(outer, inner);
    io.grad_grad_loss.at(outer, inner) = row.counted ? slope * mean_v - h_v : Acc(0);
    io.grad_grad_lse.at(outer, inner) = mean_v;

    const Acc c_over_sum = (upstream * slope + on_lse) / sums.exp, rest = 2 * z * upstream * mean_v / sums.exp;
    const Row target = writable_row_at(io.grad_logits, outer, inner);
    for_chunks(n_chunks, in_parallel, [&](int64_t c) {
      const int64_t begin = c * kChunk, count = chunk_size(in.classes, begin);
      const Acc* e = exponentials(row, c, sums);
      const Acc* values = vector(v, begin, count);
      Acc* block = scratch_of<Acc>(Scratch::Gradient, kBlock);
      for (int64_t first = 0; first < count; first += kBlock) {
        const int64_t n = count - first < kBlock ? count - first : kBlock;
        for (int64_t i = 0; i < n; ++i) {
          block[i] = e[first + i] * (c_over_sum * (values[first + i] - mean_v) + rest);
        }
        store_row(block, target, begin + first, n);
      }
    });
  }

 private:
  const Acc* exponentials(const LabelledRow<base, Acc>& row, int64_t chunk, const Sums<Acc>& sums) const {
    Acc* result = exponentials_of(in);
    if (in.classes > kChunk) { // another chunk's have replaced them
      row.exponentials(chunk * kChunk, sums.max, result);
    }
    return result;
  }

  static const Acc* vector(const ConstRow& v, int64_t begin, int64_t count) {
    return load_row(v, begin, count, scratch_of<Acc>(Scratch::Vector, count));
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Gradient of a dense H: -a log p added to the row of the label, in the order of the rows
// ---------------------------------------------------------------------------------------------------------------------

template <typename Acc>
void backward_matrix(const SoftmaxInfogainInput<Acc>& in, const SoftmaxInfogainBackwardMatrix<Acc>& io) {
  for_rows(in, [&](int64_t outer, int64_t inner, bool in_parallel) {
    const LabelledRow<Base::Zero, Acc> row(in, outer, inner);
    const int64_t n_chunks = chunks_of(in.classes);
    auto* chunks = scratch_of<Sums<Acc>>(Scratch::Sums, n_chunks);
    for_chunks(n_chunks, in_parallel, [&](int64_t c) { chunks[c] = row.chunk_sums(c * kChunk, exponentials_of(in)); });
    const Sums<Acc> sums = row.combine(chunks, n_chunks);
    io.max[outer * in.inner + inner] = sums.max;
    io.log_sum[outer * in.inner + inner] = std::log(sums.exp);
  });
  const int64_t n_rows = in.outer * in.inner;
  const auto columns = [&](int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    for (int64_t i = 0; i < n_rows; ++i) {
      const int64_t outer = i / in.inner, inner = i % in.inner, label = in.labels.at(outer, inner);
      if (label == in.ignore_index || label < 0 || label >= in.infogain.n_rows) {
        continue;
      }
      const Acc* x = load_row(row_at(in.logits, outer, inner), begin, count, scratch_of<Acc>(Scratch::Logits, count));
      const Acc upstream = io.grad_loss.at(outer, inner), max = io.max[i], log_sum = io.log_sum[i];
      Acc* target = io.result + label * in.classes + begin;
      for (int64_t k = 0; k < count; ++k) { // in two steps, so that a common offset of the logits cancels exactly
        target[k] -= upstream * ((x[k] - max) - log_sum);
      }
    }
  };
  // One thread sums a column over all rows in order, so that the result does not depend on the threads.
  parallel_for(0, in.classes, kGrain / (n_rows + 1) + 64, columns);
}

} // namespace

#define LGD_DEFINE_SOFTMAX_INFOGAIN(Acc)                                                                                \
  void softmax_infogain(const SoftmaxInfogainInput<Acc>& in, const SoftmaxInfogainOutput<Acc>& out) {                   \
    with_base(in.infogain, [&](auto base) { run<decltype(base)::value>(in, out); });                                    \
  }                                                                                                                     \
  void softmax_infogain_double_backward(                                                                                \
      const SoftmaxInfogainInput<Acc>& in, const SoftmaxInfogainDoubleBackward<Acc>& io) {                              \
    with_base(in.infogain, [&](auto base) { for_rows(in, DoubleBackwardKernel<decltype(base)::value, Acc>{in, io}); }); \
  }                                                                                                                     \
  void softmax_infogain_backward_matrix(                                                                                \
      const SoftmaxInfogainInput<Acc>& in, const SoftmaxInfogainBackwardMatrix<Acc>& io) {                              \
    backward_matrix(in, io);                                                                                            \
  }

LGD_DEFINE_SOFTMAX_INFOGAIN(float)
LGD_DEFINE_SOFTMAX_INFOGAIN(double)

} // namespace CPU_CAPABILITY
} // namespace lgd
