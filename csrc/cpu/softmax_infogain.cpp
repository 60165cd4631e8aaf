// softmax_infogain for one instruction set; compiled once for each.

#include "softmax_infogain.h"

#include "parallel.h"
#include "softmax_infogain_lanes.h"
#include "softmax_infogain_row.h"
#include "stream.h"

namespace lgd {
inline namespace CPU_CAPABILITY {
namespace {

// body(chunk, workspace) for every chunk of a row: on all threads, or on this one with its `own` workspace.
template <typename Acc, typename Body>
void for_chunks(int64_t classes, bool in_parallel, Workspace<Acc>& own, const Body& body) {
  const int64_t n_chunks = chunks_of(classes);
  if (!in_parallel) {
    for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
      body(chunk, own);
    }
    return;
  }
  parallel_for(0, n_chunks, 1, [&](int64_t begin, int64_t end) {
    Workspace<Acc> work(classes);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      body(chunk, work);
    }
    fence_streams();
  });
}

// kernel(outer, inner, in_parallel, workspace) for every row. Rows go to threads, or, where they are few and long, the
// chunks of each row do.
template <typename Acc, typename Kernel>
void for_rows(const SoftmaxInfogainInput<Acc>& in, const Kernel& kernel) {
  const int64_t n_rows = in.outer * in.inner;
  const bool split_rows = chunks_of(in.classes) > 1 && n_rows < 2 * num_threads();
  const auto range = [&](int64_t begin, int64_t end) {
    Workspace<Acc> work(in.classes);
    int64_t outer = begin / in.inner, inner = begin % in.inner;
    for (int64_t i = begin; i < end; ++i) {
      kernel(outer, inner, split_rows, work);
      if (++inner == in.inner) {
        inner = 0;
        ++outer;
      }
    }
    fence_streams();
  };
  if (split_rows) {
    range(0, n_rows);
  } else {
    parallel_for(0, n_rows, kGrain / (in.classes + 1) + 1, range);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Loss, log-sum-exp, norm and gradient
// ---------------------------------------------------------------------------------------------------------------------

template <Base base, typename Acc>
class RowKernel {
 public:
  RowKernel(const SoftmaxInfogainInput<Acc>& in, const SoftmaxInfogainOutput<Acc>& out) : in(in), out(out) {}

  void operator()(int64_t outer, int64_t inner, bool in_parallel, Workspace<Acc>& work) const {
    const Row_ row(in, outer, inner);
    if (done_early(row, outer, inner)) {
      return;
    }
    const int64_t n_chunks = chunks_of(in.classes);
    Sums<Acc> only_chunk;
    Sums<Acc>* chunks = n_chunks <= 1 ? &only_chunk : scratch_of<Sums<Acc>>(Scratch::Sums, n_chunks);
    const Ahead ahead = n_chunks == 1 ? ahead_of(row, outer, inner) : Ahead{};
    for_chunks(in.classes, in_parallel, work, [&](int64_t c, const Workspace<Acc>& w) {
      row.chunk_sums(c * kChunk, w, ahead, chunks[c]);
    });
    Sums<Acc> sums;
    row.combine(chunks, n_chunks, work, sums);
    const Summed summed = summarize(row, sums);
    write_loss(row, summed, outer, inner);
    if (out.norm.data != nullptr) {
      write_norm(row, summed, chunks, in_parallel, work, outer, inner);
    }
    if (out.grad.data == nullptr) {
      return;
    }
    const Acc* next_row =
        in.logits.dtype == dtype_of<Acc>() ? reinterpret_cast<const Acc*>(ahead.logits.data) : nullptr;
    for_chunks(in.classes, in_parallel, work, [&](int64_t c, Workspace<Acc>& w) {
      if (n_chunks > 1) { // they were against the chunk's maximum, and another chunk's have replaced them
        row.exponentials(c * kChunk, summed.sums.max, w);
      }
      write_gradient(row, summed, c * kChunk, w, next_row, outer, inner);
    });
  }

 private:
  using Row_ = LabelledRow<base, Acc>;

  // What is known of a row once it has been summed.
  struct Summed {
    const Sums<Acc>& sums;
    Acc log_sum, lse;
    Acc slope; // dloss/dx = slope * p - H
  };

  Acc upstream_of_lse(int64_t outer, int64_t inner) const {
    return out.grad_lse.data == nullptr ? Acc(0) : out.grad_lse.at(outer, inner);
  }

  // Whether nothing is left to do: the gradient is there already, or the row is ignored and nobody asks for its lse.
  bool done_early(const Row_& row, int64_t outer, int64_t inner) const {
    const bool lse_unused = upstream_of_lse(outer, inner) == 0;
    if (out.made_for.data != nullptr && lse_unused && out.grad_loss.at(outer, inner) == out.made_for.at(outer, inner)) {
      return true;
    }
    if (row.counted || !lse_unused || out.lse.data != nullptr) {
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

  // Whether the gradient of rows that count goes around the cache.
  bool streams() const { return out.stream_grad && out.grad.dtype == dtype_of<Acc>() && out.grad.class_stride == 1; }

  // The row of logits that this thread comes to next, where rows lie one behind the other, and this row's gradient. Of
  // that row only the first half where the gradient is streamed: MaxAlong fetches the other.
  Ahead ahead_of(const Row_& row, int64_t outer, int64_t inner) const {
    Ahead ahead;
    if (in.inner == 1 && in.logits.class_stride == 1 && outer + 1 < in.outer) {
      const int64_t size = element_size(in.logits.dtype);
      const char* next = row.x.data + in.logits.outer_stride * size;
      ahead.logits = {next, next + (streams() ? in.classes / 2 : in.classes) * size, size};
      ahead.matrix = next_matrix_row(outer);
    }
    if (out.grad.data != nullptr && out.grad.class_stride == 1 && !out.stream_grad) {
      const int64_t size = element_size(out.grad.dtype);
      const char* gradient = writable_row_at(out.grad, outer, inner).data;
      ahead.gradient = {gradient, gradient + in.classes * size, size};
    }
    return ahead;
  }

  Ahead::Stream next_matrix_row(int64_t outer) const {
    const InfogainView& h = in.infogain;
    const int64_t label = in.labels.at(outer + 1, 0);
    if (base != Base::Dense || h.matrix_class_stride != 1 || label < 0 || label >= h.n_rows) {
      return {};
    }
    const int64_t size = element_size(h.matrix_dtype);
    const char* next = static_cast<const char*>(h.matrix) + label * h.matrix_row_stride * size;
    return {next, next + in.classes * size, size};
  }

  Summed summarize(const Row_& row, const Sums<Acc>& sums) const {
    const Acc log_sum = std::log(sums.exp), lse = row.log_sum_exp(sums, log_sum), z = static_cast<Acc>(in.z_loss);
    return {sums, log_sum, lse, row.counted ? sums.mass + (z == 0 ? Acc(0) : 2 * z * lse) : Acc(0)};
  }

  void write_loss(const Row_& row, const Summed& s, int64_t outer, int64_t inner) const {
    if (out.lse.data != nullptr) {
      out.lse.at(outer, inner) = s.lse;
    }
    if (out.loss.data != nullptr) {
      const Acc z = static_cast<Acc>(in.z_loss), penalty = z == 0 ? Acc(0) : z * s.lse * s.lse;
      out.loss.at(outer, inner) = row.counted ? s.sums.mass * s.log_sum - s.sums.dot + penalty : Acc(0);
    }
  }

  void write_gradient(
      const Row_& row, const Summed& s, int64_t begin, Workspace<Acc>& work, const Acc* next_row, int64_t outer,
      int64_t inner) const {
    const Row target = writable_row_at(out.grad, outer, inner);
    const Acc on_lse = upstream_of_lse(outer, inner);
    if (!row.counted && on_lse == 0) {
      store_zeros<Acc>(target, in.classes); // not 0 * p: p may be NaN
      return;
    }
    const Acc upstream = row.counted ? out.grad_loss.at(outer, inner) : Acc(0);
    const Acc p_factor = (upstream * s.slope + on_lse) / s.sums.exp;
    const auto address = [&](int64_t first) { return reinterpret_cast<Acc*>(element(target, first)); };
    const auto in_block = [&](int64_t) { return work.gradient; };
    if (target.dtype != dtype_of<Acc>() || target.stride != 1) {
      row.gradient(begin, p_factor, upstream, work, in_block, [&](const Acc* g, int64_t first, int64_t count) {
        store_row(g, target, first, count);
      });
    } else if (streams() && row.counted) {
      row.stream(begin, p_factor, upstream, work, address(begin), next_row);
    } else {
      row.gradient(begin, p_factor, upstream, work, address, [](const Acc*, int64_t, int64_t) {});
    }
  }

  void write_norm(
      const Row_& row, const Summed& summed, Sums<Acc>* chunks, bool in_parallel, Workspace<Acc>& work, int64_t outer,
      int64_t inner) const {
    for_chunks(in.classes, in_parallel, work, [&](int64_t c, const Workspace<Acc>& w) {
      if (in.classes > kChunk) {
        row.exponentials(c * kChunk, summed.sums.max, w);
      }
      chunks[c].squares = squares(row, summed, c * kChunk, w);
    });
    Acc total = 0;
    for (int64_t c = 0; c < chunks_of(in.classes); ++c) {
      total += chunks[c].squares;
    }
    out.norm.at(outer, inner) = std::sqrt(total);
  }

  // Sum of the squares of dloss/dx over a chunk.
  Acc squares(const Row_& row, const Summed& s, int64_t begin, const Workspace<Acc>& work) const {
    if (!row.counted) {
      return 0;
    }
    Acc total = 0;
    row.gradient(
        begin, s.slope / s.sums.exp, Acc(1), work, [&](int64_t) { return work.gradient; },
        [&](const Acc* g, int64_t, int64_t count) { total += dot(g, g, count); });
    return total;
  }

  const SoftmaxInfogainInput<Acc>& in;
  const SoftmaxInfogainOutput<Acc>& out;
};

template <Base base, typename Acc>
void run(const SoftmaxInfogainInput<Acc>& in, const SoftmaxInfogainOutput<Acc>& out) {
  if (goes_by_lanes(in)) {
    run_by_lanes<base>(in, out);
  } else {
    for_rows(in, RowKernel<base, Acc>(in, out));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Double backward: p (c (v - t) + 2 z a t) with t = <p, v>, c = a (s_l + 2 z lse) + b; a, b the upstream gradients
// ---------------------------------------------------------------------------------------------------------------------

template <Base base, typename Acc>
struct DoubleBackwardKernel {
  using Row_ = LabelledRow<base, Acc>;

  const SoftmaxInfogainInput<Acc>& in;
  const SoftmaxInfogainDoubleBackward<Acc>& io;

  void operator()(int64_t outer, int64_t inner, bool in_parallel, Workspace<Acc>& work) const {
    const Row_ row(in, outer, inner);
    const ConstRow v = row_at(io.grad_grad, outer, inner);
    const int64_t n_chunks = chunks_of(in.classes);
    auto* chunks = scratch_of<Sums<Acc>>(Scratch::Sums, n_chunks);
    for_chunks(in.classes, in_parallel, work, [&](int64_t c, const Workspace<Acc>& w) {
      row.chunk_sums(c * kChunk, w, Ahead{}, chunks[c]);
    });
    Sums<Acc> sums;
    row.combine(chunks, n_chunks, work, sums);

    for_chunks(in.classes, in_parallel, work, [&](int64_t c, const Workspace<Acc>& w) {
      const int64_t count = chunk_size(in.classes, c * kChunk);
      const Acc* values = vector(v, c);
      chunks[c].exp = dot(exponentials(row, c, sums, w), values, count);
      chunks[c].dot = row.dot_with_base(c * kChunk, values, w);
    });
    Acc mean_v = 0, h_v = entries_dot(row, v);
    for (int64_t c = 0; c < n_chunks; ++c) {
      mean_v += chunks[c].exp / sums.exp;
      h_v += chunks[c].dot;
    }

    const Acc z = static_cast<Acc>(in.z_loss), lse = row.log_sum_exp(sums, std::log(sums.exp));
    const Acc upstream = row.counted ? io.grad_loss.at(outer, inner) : Acc(0);
    const Acc slope = row.counted ? sums.mass + (z == 0 ? Acc(0) : 2 * z * lse) : Acc(0);
    const Acc on_lse = io.grad_lse.data == nullptr ? Acc(0) : io.grad_lse.at(outer, inner);
    io.grad_grad_loss.at(outer, inner) = row.counted ? slope * mean_v - h_v : Acc(0);
    io.grad_grad_lse.at(outer, inner) = mean_v;

    const Acc factor = (upstream * slope + on_lse) / sums.exp, rest = 2 * z * upstream * mean_v / sums.exp;
    const Row target = writable_row_at(io.grad_logits, outer, inner);
    if (!row.counted && on_lse == 0) {
      store_zeros<Acc>(target, in.classes); // not 0 * p: p may be NaN
      return;
    }
    for_chunks(in.classes, in_parallel, work, [&](int64_t c, const Workspace<Acc>& w) {
      const int64_t begin = c * kChunk, count = chunk_size(in.classes, begin);
      const Acc* e = exponentials(row, c, sums, w);
      const Acc* values = vector(v, c);
      for (int64_t first = 0; first < count; first += kBlock) {
        const int64_t n = count - first < kBlock ? count - first : kBlock;
        for (int64_t i = 0; i < n; ++i) {
          w.gradient[i] = e[first + i] * (factor * (values[first + i] - mean_v) + rest);
        }
        store_row(w.gradient, target, begin + first, n);
      }
    });
  }

 private:
  // The chunk's exp(x - max), which are still there where the row has no other chunk.
  const Acc* exponentials(const Row_& row, int64_t chunk, const Sums<Acc>& sums, const Workspace<Acc>& work) const {
    if (in.classes > kChunk) {
      row.exponentials(chunk * kChunk, sums.max, work);
    }
    return work.exponentials;
  }

  const Acc* vector(const ConstRow& v, int64_t chunk) const {
    const int64_t count = chunk_size(in.classes, chunk * kChunk);
    return load_row(v, chunk * kChunk, count, scratch_of<Acc>(Scratch::Vector, count));
  }

  // What the entries of H add to <H, v>.
  Acc entries_dot(const Row_& row, const ConstRow& v) const {
    Acc total = 0;
    for (int64_t i = 0; row.counted && i < row.entries.count; ++i) {
      const int64_t k = row.entries.col[i];
      Acc buffer = 0;
      total += (row.entries.value[i] - row.base_at(k)) * *load_row(v, k, 1, &buffer);
    }
    return total;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Gradient of a dense H: -a log p added to the row of the label, in the order of the rows
// ---------------------------------------------------------------------------------------------------------------------

template <typename Acc>
void backward_matrix(const SoftmaxInfogainInput<Acc>& in, const SoftmaxInfogainBackwardMatrix<Acc>& io) {
  const auto sum_row = [&](int64_t outer, int64_t inner, bool in_parallel, Workspace<Acc>& work) {
    const LabelledRow<Base::Zero, Acc> row(in, outer, inner);
    const int64_t n_chunks = chunks_of(in.classes);
    auto* chunks = scratch_of<Sums<Acc>>(Scratch::Sums, n_chunks);
    for_chunks(in.classes, in_parallel, work, [&](int64_t c, const Workspace<Acc>& w) {
      row.chunk_sums(c * kChunk, w, Ahead{}, chunks[c]);
    });
    Sums<Acc> sums;
    row.combine(chunks, n_chunks, work, sums);
    io.max[outer * in.inner + inner] = sums.max;
    io.log_sum[outer * in.inner + inner] = std::log(sums.exp);
  };
  for_rows(in, sum_row);
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

#define LGD_DEFINE_SOFTMAX_INFOGAIN(Acc)                                                                          \
  void softmax_infogain(const SoftmaxInfogainInput<Acc>& in, const SoftmaxInfogainOutput<Acc>& out) {             \
    with_base(in.infogain, [&](auto base) { run<decltype(base)::value>(in, out); });                              \
  }                                                                                                               \
  void softmax_infogain_double_backward(                                                                          \
      const SoftmaxInfogainInput<Acc>& in, const SoftmaxInfogainDoubleBackward<Acc>& io) {                        \
    with_base(                                                                                                    \
        in.infogain, [&](auto base) { for_rows(in, DoubleBackwardKernel<decltype(base)::value, Acc>{in, io}); }); \
  }                                                                                                               \
  void softmax_infogain_backward_matrix(                                                                          \
      const SoftmaxInfogainInput<Acc>& in, const SoftmaxInfogainBackwardMatrix<Acc>& io) {                        \
    backward_matrix(in, io);                                                                                      \
  }

LGD_DEFINE_SOFTMAX_INFOGAIN(float)
LGD_DEFINE_SOFTMAX_INFOGAIN(double)

} // namespace CPU_CAPABILITY
} // namespace lgd
