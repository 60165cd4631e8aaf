// The elements of one row in memory, and how the threads of a team share them out.
//
// A slice is what one thread works on. It hands out groups of W elements with classes k, k + step, ..., always the same
// ones: which they are depends on the number of classes and of threads, never on
// where the row lies.
#pragma once

#include "elements.cuh"

namespace lgd::gpu {

// The distance of neighbouring classes, known to the compiler: groups of neighbours are moved 128 bits at a time and
// have to lie at multiples of that.
struct Neighbours {
  constexpr operator int() const { return 1; }
};

// A row from class `first` on; `T` may be const.
template <typename T>
struct Strip {
  using Element = std::remove_const_t<T>;
  T* data;
  int64_t stride;
  int first = 0;

  LGD_DEVICE T& at(int k) const { return data[(k - first) * stride]; }

  template <typename Step, typename A, int W>
  LGD_DEVICE void read(int k, Step step, A (&x)[W]) const {
    if constexpr (std::is_same_v<Step, Neighbours>) {
      unpack<Element>(load<kWords<T, W>>(&at(k)), x);
    } else {
#pragma unroll
      for (int i = 0; i < W; ++i) {
        x[i] = number_from<A>(at(k + i * step));
      }
    }
  }

  template <typename Step, typename A, int W>
  LGD_DEVICE void write(int k, Step step, const A (&x)[W]) const {
    if constexpr (std::is_same_v<Step, Neighbours>) {
      store_once(&at(k), pack<Element>(x));
    } else {
#pragma unroll
      for (int i = 0; i < W; ++i) {
        at(k + i * step) = element_from<Element>(x[i]);
      }
    }
  }
};

// Where a thread stands among those that share classes first .. first + count - 1.
struct Share {
  int first, count, rank, size;

  LGD_DEVICE bool holds(int k) const { return k >= first && k < first + count; }

  // f(k) for every class of the thread, the slow and simple way.
  template <typename F>
  LGD_DEVICE void for_classes(const F& f) const {
    for (int k = first + rank; k < first + count; k += size) {
      f(k);
    }
  }
};

// In registers, as the 128-bit vectors that it was read in. The row begins and ends at a multiple of 128 bits.
template <typename T>
struct RegisterSlice {
  using Acc = Accumulated<T>;
  static constexpr bool on_chip = true;
  static constexpr int W = kPerVector<T>;
  Share share;
  Words<4> vectors[kVectors];

  // Of a row that is not wanted, zeros.
  LGD_DEVICE RegisterSlice(const T* row, const Share& share, bool wanted) : share(share) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) { // (kVectors, threads, W) classes
      if (wanted && has(i)) {
        vectors[i] = load_once(row + class_of(i));
      } else {
        vectors[i] = {};
      }
    }
  }

  template <typename F>
  LGD_DEVICE void for_groups(const F& f) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (has(i)) {
        Acc x[W];
        unpack<T>(vectors[i], x);
        f(class_of(i), Neighbours{}, x);
      }
    }
  }

 private:
  LGD_DEVICE int class_of(int i) const { return share.first + (i * share.size + share.rank) * W; }
  LGD_DEVICE bool has(int i) const { return (i * share.size + share.rank) * W < share.count; }
};

// In memory, shared or global. With `in_vectors` groups are 128 bits of neighbours; without, a thread's classes are
// `size` apart, so that neighbouring lanes have neighbours.
template <typename T, bool is_on_chip, bool may_have_vectors>
struct MemorySlice {
  using Acc = Accumulated<T>;
  static constexpr bool on_chip = is_on_chip;
  Share share;
  Strip<const T> strip;
  bool in_vectors;

  LGD_DEVICE MemorySlice(const Strip<const T>& strip, const Share& share, bool in_vectors = false)
      : share(share), strip(strip), in_vectors(in_vectors) {}

  template <typename F>
  LGD_DEVICE void for_groups(const F& f) const {
    if constexpr (may_have_vectors) {
      if (in_vectors) {
        for_vectors(f);
        return;
      }
    }
    constexpr int W = 4;
    const int end = share.first + share.count;
    int k = share.first + share.rank;
    for (; k + (W - 1) * share.size < end; k += W * share.size) {
      Acc x[W];
      strip.read(k, share.size, x);
      f(k, share.size, x);
    }
    for (; k < end; k += share.size) {
      Acc x[1];
      strip.read(k, share.size, x);
      f(k, share.size, x);
    }
  }

 private:
  template <typename F>
  LGD_DEVICE void for_vectors(const F& f) const {
    constexpr int W = kPerVector<T>, in_flight = 4;
    const int end = share.first + share.count, stride = share.size * W;
    for (int k = share.first + share.rank * W; k < end; k += in_flight * stride) {
      Words<4> vectors[in_flight];
#pragma unroll
      for (int i = 0; i < in_flight; ++i) {
        if (k + i * stride < end) {
          vectors[i] = load<4>(&strip.at(k + i * stride));
        }
      }
#pragma unroll
      for (int i = 0; i < in_flight; ++i) {
        if (k + i * stride < end) {
          Acc x[W];
          unpack<T>(vectors[i], x);
          f(k + i * stride, Neighbours{}, x);
        }
      }
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Between global and shared memory. In shared memory a piece lies as far from a multiple of 128 bits as in global
// memory, so that all but its ragged ends are moved 128 bits at a time.
// ---------------------------------------------------------------------------------------------------------------------

template <typename T>
LGD_DEVICE int lead_of(const T* address) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(address) % 16 / sizeof(T));
}

// vector(e) for the first element of every whole vector of a piece, element(e) for what is left, shared out among the
// threads of the block.
template <typename T, typename OnVectors, typename OnElement>
LGD_DEVICE void for_window(int lead, int count, const OnVectors& vectors, const OnElement& element) {
  constexpr int W = kPerVector<T>;
  const int head = count < (W - lead) % W ? count : (W - lead) % W, whole = (count - head) / W;
  vectors(head, whole);
  for (int e = threadIdx.x; e < head; e += blockDim.x) {
    element(e);
  }
  for (int e = head + whole * W + threadIdx.x; e < count; e += blockDim.x) {
    element(e);
  }
}

// shared[lead_of(source) + e] = source[e]
template <typename T>
LGD_DEVICE void copy_in(const T* source, int count, T* shared) {
  constexpr int W = kPerVector<T>, in_flight = 4;
  T* target = shared + lead_of(source);
  for_window<T>(
      lead_of(source), count,
      [&](int head, int whole) {
        const int threads = blockDim.x;
        for (int v = threadIdx.x; v < whole; v += in_flight * threads) {
          Words<4> moved[in_flight];
#pragma unroll
          for (int i = 0; i < in_flight; ++i) {
            if (v + i * threads < whole) {
              moved[i] = load_once(source + head + (v + i * threads) * W);
            }
          }
#pragma unroll
          for (int i = 0; i < in_flight; ++i) {
            if (v + i * threads < whole) {
              *reinterpret_cast<Words<4>*>(target + head + (v + i * threads) * W) = moved[i];
            }
          }
        }
      },
      [&](int e) { target[e] = source[e]; });
}

// target[e] = source[e] for a piece in shared memory
template <typename T>
LGD_DEVICE void copy_out(const T* source, int count, T* target) {
  constexpr int W = kPerVector<T>;
  if (lead_of(source) != lead_of(target)) {
    for (int e = threadIdx.x; e < count; e += blockDim.x) {
      target[e] = source[e];
    }
    return;
  }
  for_window<T>(
      lead_of(target), count,
      [&](int head, int whole) {
        for (int v = threadIdx.x; v < whole; v += blockDim.x) {
          store_once(target + head + v * W, load<4>(source + head + v * W));
        }
      },
      [&](int e) { target[e] = source[e]; });
}

} // namespace lgd::gpu
