// decoupled_step_ for one instruction set; compiled once for each.
//
// Every phase is one parallel loop over all layers, so that the number of phases does not depend on the depth. A
// layer's delta, its gradients and the update of its weight follow its forward product at once, while they are in
// cache.

#include "decoupled_step.h"

#include "../common/optimizers.h"
#include "linear_tiles.h"

namespace lgd {
inline namespace CPU_CAPABILITY {
namespace {

// One step of the optimizer for `count` elements of a row of a parameter; the gradient is `scale` times what is given.
template <typename Acc>
void update(
    int64_t update_rule, const Parameter& p, int64_t row, int64_t column, int64_t count, const Acc* gradient,
    double scale) {
  using Vec = Vectorized<Acc>;
  const auto all = [](double number) { return Vec(static_cast<Acc>(number)); };
  const Update& u = p.update;
  const UpdateNumbers<Vec> numbers{all(u.lr),      all(u.momentum),     all(u.second_momentum),
                                   all(u.epsilon), all(u.l2),           all(u.decay),
                                   all(u.root),    all(1 - u.momentum), all(1 - u.second_momentum)};
  Acc* value = row_pointer<Acc>(p.value, row) + column;
  with_update_rule(update_rule, [&](auto rule) {
    using Rule = decltype(rule);
    Acc* first = Rule::has_first ? row_pointer<Acc>(p.first, row) + column : nullptr;
    Acc* second = Rule::has_second ? row_pointer<Acc>(p.second, row) + column : nullptr;
    for_vectors<Acc>(count, [&](int64_t i, int64_t n) {
      Vec w, m, v;
      if constexpr (Rule::has_value) {
        w = Vec::loadu(value + i, n);
      }
      if constexpr (Rule::has_first) {
        m = Vec::loadu(first + i, n);
      }
      if constexpr (Rule::has_second) {
        v = Vec::loadu(second + i, n);
      }
      Rule::step(numbers, Vec::loadu(gradient + i, n) * all(scale), w, m, v);
      if constexpr (Rule::has_value) {
        w.store(value + i, n);
      }
      if constexpr (Rule::has_first) {
        m.store(first + i, n);
      }
      if constexpr (Rule::has_second) {
        v.store(second + i, n);
      }
    });
  });
}

constexpr int64_t kSweepRows = 256; // samples that go through some layers together: of a copy of W^T for them, and
                                    // small enough that a layer's delta and q wait for its gradient in an L2 cache

// Consecutive layers that one thread takes.
struct Chunk {
  int64_t first, end;
};

template <typename Acc>
class Visit {
 public:
  explicit Visit(const DecoupledStep<Acc>& io)
      : io_(io),
        n_samples_(io.layers[0].linear.n_samples),
        n_ranges_(tiles_of(n_samples_, kSweepRows)),
        chunk_size_(tiles_of(io.n_layers, num_threads() == 1 ? 1 : tiles_of(4 * num_threads(), n_ranges_ + 1))),
        parts_(parts_of_equal_layers(io.n_layers)) {}

  void run() const {
    for (int64_t k = 0; k < io_.steps; ++k) {
      move_hidden(k > 0);
    }
    move_parameters(io_.steps > 0);
    for (int64_t t = 0; t < io_.n_layers; ++t) {
      io_.energy[t] = static_cast<Acc>(
          has_softmax(t) ? sum_of_losses() : energy_of_tiles(io_.layers[t].linear, io_.layers[t].tile_energy));
    }
  }

 private:
  bool has_softmax(int64_t t) const { return t == io_.n_layers - 1 && io_.head.logits.data != nullptr; }

  double sum_of_losses() const {
    double sum = 0;
    for (int64_t i = 0; i < n_samples_; ++i) {
      sum += static_cast<double>(io_.head.loss[i]);
    }
    return sum;
  }

  // -------------------------------------------------------------------------------------------------------------------
  // A step of z
  // -------------------------------------------------------------------------------------------------------------------

  // Judge all layers at the present z, and move every z. z_t is read by layer t - 1, whose target it is, and by layer
  // t: so it may move as soon as both are judged, while delta and q are in cache. Only where a chunk starts it has to
  // wait for the chunk below.
  void move_hidden(bool dual) const {
    const int64_t chunks = tiles_of(io_.n_layers, chunk_size_);
    parallel_for(0, chunks * n_ranges_, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t begin = i % n_ranges_ * kSweepRows, layer = i / n_ranges_ * chunk_size_;
        sweep(
            {layer, at_most(layer + chunk_size_, io_.n_layers)}, begin, at_most(begin + kSweepRows, n_samples_), dual);
      }
      release_multiplier();
    });
    for_parts_of_layers(
        chunks - 1, parts_of_equal_layers(chunks - 1), kRows, [&](int64_t) { return n_samples_; },
        [&](int64_t c, int64_t begin, int64_t end) {
          const StepLayer& layer = io_.layers[(c + 1) * chunk_size_];
          move_input(layer, layer.io, layer.q_of_input, begin, end);
        });
  }

  // The layers of a chunk for samples [begin, end), one after the other.
  void sweep(const Chunk& chunk, int64_t begin, int64_t end, bool dual) const {
    Matrix q_of_input;
    for (int64_t t = chunk.first; t < chunk.end; ++t) {
      const StepLayer& layer = io_.layers[t];
      ResidualIo io = layer.io;
      io.residual = {};
      if (t > chunk.first) { // all is used up here: nothing has to leave the cache
        io.delta = rows_in_scratch(Scratch::LayerDelta, begin, end, io.delta);
        io.q = t + 1 == chunk.end ? io.q : rows_in_scratch(t % 2 ? Scratch::OddQ : Scratch::EvenQ, begin, end, io.q);
      }
      judge_layer(t, io, dual, begin, end);
      if (t > chunk.first) {
        move_input(layer, io, q_of_input, begin, end);
      }
      q_of_input = io.q;
    }
  }

  // A matrix like `like` of which only these rows are there.
  static Matrix rows_in_scratch(Scratch slot, int64_t begin, int64_t end, const Matrix& like) {
    const int64_t row = like.stride * element_size(like.dtype);
    return {scratch_of<char>(slot, (end - begin) * row) - begin * row, like.dtype, like.stride};
  }

  // z -= step_size * dE/dz, or by way of its velocity.
  void move_input(
      const StepLayer& layer, const ResidualIo& io, const Matrix& q_of_input, int64_t begin, int64_t end) const {
    for_tiles_of_input_gradient<Acc>(
        layer.linear, io.delta, io.q, Acc(1), begin, end,
        [&](const Tile& tile, const auto& gradient) { move_tile(layer, q_of_input, tile, gradient); });
  }

  template <typename Gradient>
  void move_tile(const StepLayer& layer, const Matrix& q_of_input, const Tile& tile, const Gradient& gradient) const {
    using Vec = Vectorized<Acc>;
    const Vec minus_step(static_cast<Acc>(-io_.step_size)), momentum(static_cast<Acc>(io_.momentum));
    const auto of_target = read_tile<Acc>(q_of_input, tile, Scratch::Target);
    const auto z = read_tile<Acc>(layer.linear.z, tile, Scratch::SkipInput);
    const auto velocity = read_tile<Acc>(layer.velocity, tile, Scratch::Multiplier);
    const OutputTile<Acc> new_z(layer.linear.z, tile, Scratch::Residual),
        new_velocity(layer.velocity, tile, Scratch::Delta);
    for (int64_t i = 0; i < tile.rows; ++i) {
      const Acc *q_row = of_target.row(i), *z_row = z.row(i), *velocity_row = velocity.row(i);
      Acc *new_z_row = new_z.view.row(i), *new_velocity_row = new_velocity.view.row(i);
      for_vectors<Acc>(tile.columns, [&](int64_t j, int64_t n) {
        Vec v = Vec::loadu(q_row + j, n) + gradient(i, j, n);
        if (velocity_row != nullptr) {
          v = at::vec::fmadd(Vec::loadu(velocity_row + j, n), momentum, v);
          v.store(new_velocity_row + j, n);
        }
        at::vec::fmadd(v, minus_step, Vec::loadu(z_row + j, n)).store(new_z_row + j, n);
      });
    }
    new_z.finish();
    new_velocity.finish();
  }

  // -------------------------------------------------------------------------------------------------------------------
  // The step of the parameters
  // -------------------------------------------------------------------------------------------------------------------

  // Judge all layers at the final z, each with the step of its own parameters, which nobody else reads.
  void move_parameters(bool dual) const {
    for_parts_of_layers(
        io_.n_layers, parts_, kRows, [&](int64_t) { return n_samples_; },
        [&](int64_t t, int64_t begin, int64_t end) {
          ResidualIo io = io_.layers[t].io;
          io.q = {}; // of no use to the parameters
          if (parts_ == 1 && n_ranges_ == 1) {
            io.delta = rows_in_scratch(Scratch::LayerDelta, begin, end, io.delta);
          }
          judge_layer(t, io, dual, begin, end);
          if (parts_ == 1) {
            update_parameters(t, io.delta, 0, io_.layers[t].linear.d_out);
          }
        });
    if (parts_ > 1) {
      for_parts_of_layers(
          io_.n_layers, parts_, kPanel, [&](int64_t t) { return io_.layers[t].linear.d_out; },
          [&](int64_t t, int64_t begin, int64_t end) { update_parameters(t, io_.layers[t].io.delta, begin, end); });
    }
  }

  // One step of the optimizer for outputs [begin, end) of a layer, from the mean gradient over the samples.
  void update_parameters(int64_t t, const Matrix& delta, int64_t begin, int64_t end) const {
    const StepLayer& layer = io_.layers[t];
    const LinearLayer& l = layer.linear;
    const double per_sample = l.n_samples == 0 ? 0.0 : 1.0 / static_cast<double>(l.n_samples);
    for_panels_of_outputs<Acc>(
        l, delta, true, begin, end, [&](int64_t first, int64_t count, const Acc* products, const Acc* sums) {
          for (int64_t i = 0; i < count; ++i) {
            update(
                io_.update_rule, layer.weight, first + i, 0, l.d_in, products + i * l.d_in,
                per_sample * l.options.branch_scale);
          }
          if (layer.bias.value.data != nullptr) {
            update(io_.update_rule, layer.bias, 0, first, count, sums, per_sample);
          }
        });
  }

  // -------------------------------------------------------------------------------------------------------------------
  // One layer, samples [begin, end)
  // -------------------------------------------------------------------------------------------------------------------

  void judge_layer(int64_t t, ResidualIo io, bool dual, int64_t begin, int64_t end) const {
    LinearLayer l = io_.layers[t].linear;
    fill_operand<Acc>(l, begin, end);
    if (has_softmax(t)) {
      judge_by_softmax(l, io.delta, begin, end);
      return;
    }
    if (!dual) {
      l.options.dual_step = 0;
      io.new_multiplier = {};
    }
    const HiddenLoss loss = t == io_.n_layers - 1 ? HiddenLoss{} : io_.hidden_loss; // the head's is squared error
    judge<Acc>(l, io, loss, begin, end, io_.layers[t].tile_energy);
  }

  void judge_by_softmax(const LinearLayer& l, const Matrix& delta, int64_t begin, int64_t end) const {
    const Matrix& logits = io_.head.logits;
    for_tiles_of_logits<Acc>(l, begin, end, [&](const Tile& tile, const auto& of_tile) {
      for (int64_t i = 0; i < tile.rows; ++i) {
        Acc* row = row_pointer<Acc>(logits, tile.row + i) + tile.column;
        for_vectors<Acc>(tile.columns, [&](int64_t j, int64_t n) { of_tile(i, j, n).store(row + j, n); });
      }
    });
    const Acc one = 1;
    int64_t no_bad_label = 0;
    SoftmaxInfogainInput<Acc> rows = io_.head.rows;
    rows.outer = end - begin;
    rows.logits.data = row_pointer<Acc>(logits, begin);
    rows.labels.data += begin * rows.labels.outer_stride;
    rows.first_bad_label = &no_bad_label;
    SoftmaxInfogainOutput<Acc> made;
    made.loss = {io_.head.loss + begin, 1, 1};
    made.grad = {row_of(delta, begin).data, delta.dtype, delta.stride, 1, 1};
    made.grad_loss = {&one, 0, 0};
    softmax_infogain(rows, made);
  }

  const DecoupledStep<Acc>& io_;
  const int64_t n_samples_, n_ranges_, chunk_size_, parts_; // ranges of kSweepRows samples; layers of a chunk; parts
                                                            // of a layer
};

} // namespace

void decoupled_step(const DecoupledStep<float>& io) {
  Visit<float>(io).run();
}
void decoupled_step(const DecoupledStep<double>& io) {
  Visit<double>(io).run();
}

} // namespace CPU_CAPABILITY
} // namespace lgd
