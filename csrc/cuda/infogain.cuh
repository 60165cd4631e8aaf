// One row of the label-similarity matrix H: a base, and entries that take its place.
#pragma once

#include "softmax_infogain.h"
#include "strips.cuh"

namespace lgd::gpu {

// The base, what H is outside its diagonal and its stored values, as a type: Nothing, Constant, or for a dense one the
// type of the matrix's elements. (With a switch over that type in the inner loop no two loads of H were in flight.)
struct Nothing {};
struct Constant {};
template <typename Base>
constexpr bool is_dense = !std::is_same_v<Base, Nothing> && !std::is_same_v<Base, Constant>;

// Row `label` of H; zeros for a row that is not counted, whose label may be anything.
template <typename Base, typename Acc>
class RowOfH {
 public:
  Acc background = 0;

  LGD_DEVICE RowOfH(const InfogainView& h, int64_t label, bool counted) : label_(static_cast<int>(label)) {
    if (!counted) {
      return;
    }
    if constexpr (std::is_same_v<Base, Constant>) {
      background = *static_cast<const Acc*>(h.background);
    }
    if constexpr (is_dense<Base>) {
      dense_ = {static_cast<const Base*>(h.matrix) + label * h.matrix_row_stride, h.matrix_class_stride};
    }
    if (h.crow != nullptr) {
      const int64_t begin = h.crow[label];
      col_ = h.col + begin;
      value_ = static_cast<const Acc*>(h.values) + begin;
      stored_ = static_cast<int>(h.crow[label + 1] - begin);
    }
    const bool identity = std::is_same_v<Base, Nothing> && h.crow == nullptr && h.diagonal == nullptr;
    if (identity || (h.diagonal != nullptr && find(label_) == stored_)) {
      own_ = 1;
      own_value_ = identity ? Acc(1) : base_at(label_) + static_cast<const Acc*>(h.diagonal)[label * h.diagonal_stride];
    }
  }

  // Entries: the stored values, then the diagonal.
  LGD_DEVICE int entries() const { return stored_ + own_; }
  LGD_DEVICE int column(int entry) const { return entry < stored_ ? static_cast<int>(col_[entry]) : label_; }
  LGD_DEVICE Acc value(int entry) const { return entry < stored_ ? value_[entry] : own_value_; }

  LGD_DEVICE Acc base_at(int k) const {
    Acc h[1];
    read_base(k, 1, h);
    return h[0];
  }

  LGD_DEVICE Acc at(int k) const {
    const int entry = find(k);
    return entry < stored_ ? value_[entry] : own_ == 1 && k == label_ ? own_value_ : base_at(k);
  }

  // The base of classes k, k + step, ...
  template <typename Step, int W>
  LGD_DEVICE void read_base(int k, Step step, Acc (&h)[W]) const {
    if constexpr (is_dense<Base>) {
      if (dense_.data != nullptr) {
        dense_.read(k, step, h);
      } else {
        fill(h, 0);
      }
    } else {
      fill(h, std::is_same_v<Base, Constant> ? background : Acc(0));
    }
  }

 private:
  // The stored entry of class k, or stored_ if there is none.
  LGD_DEVICE int find(int k) const {
    int begin = 0, end = stored_;
    while (begin < end) {
      const int middle = (begin + end) / 2;
      if (col_[middle] < k) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    return begin < stored_ && col_[begin] == k ? begin : stored_;
  }

  template <int W>
  static LGD_DEVICE void fill(Acc (&h)[W], Acc value) {
#pragma unroll
    for (int i = 0; i < W; ++i) {
      h[i] = value;
    }
  }

  Strip<const std::conditional_t<is_dense<Base>, Base, float>> dense_ = {nullptr, 0};
  const int64_t* col_ = nullptr;
  const Acc* value_ = nullptr;
  int label_, stored_ = 0, own_ = 0;
  Acc own_value_ = 0;
};

} // namespace lgd::gpu
