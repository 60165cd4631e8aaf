#include "parallel.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <vector>

namespace lgd {

namespace {

struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

} // namespace

// Every thread has a share of its own, which it takes in 16 blocks, so that neighbours stay in its cache from one loop
// to the next (6.5 -> 6.2 ms for a visit of 32 layers of 128 units); then it helps the others with theirs: with two
// equal halves the slower CPU would decide.
void parallel_for_erased(
    int64_t begin, int64_t end, int64_t grain, void (*body)(const void*, int64_t, int64_t), const void* context) {
  const int64_t count = end - begin;
  const int64_t threads = std::min<int64_t>(num_threads(), (count + grain - 1) / grain);
  if (threads <= 1) {
    if (count > 0) {
      body(context, begin, end);
    }
    return;
  }
  const int64_t block = std::max(grain, (count + 16 * threads - 1) / (16 * threads));
  std::vector<Share> shares(threads);
  for (int64_t t = 0; t < threads; ++t) {
    shares[t].next = begin + t * count / threads;
    shares[t].end = begin + (t + 1) * count / threads;
  }
  at::parallel_for(0, threads, 1, [&](int64_t own, int64_t) {
    for (int64_t i = 0; i < threads; ++i) {
      Share& share = shares[(own + i) % threads];
      for (int64_t first = share.next.fetch_add(block); first < share.end; first = share.next.fetch_add(block)) {
        body(context, first, std::min(first + block, share.end));
      }
    }
  });
}

int num_threads() {
  return at::in_parallel_region() ? 1 : at::get_num_threads();
}

namespace {

constexpr size_t kAlignment = 64;

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(data); }
};

} // namespace

void* scratch(Scratch slot, size_t bytes) {
  thread_local Buffer buffers[static_cast<int>(Scratch::Count)];
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (buffer.bytes < bytes) {
    std::free(buffer.data);
    buffer.bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    buffer.data = std::aligned_alloc(kAlignment, buffer.bytes);
    if (buffer.data == nullptr) {
      buffer.bytes = 0;
      throw std::bad_alloc();
    }
  }
  return buffer.data;
}

} // namespace lgd
