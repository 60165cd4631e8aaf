#include "parallel.h"

#include <ATen/Parallel.h>

#include <cstdlib>
#include <new>

namespace lgd {

void parallel_for_erased(
    int64_t begin, int64_t end, int64_t grain, void (*body)(const void*, int64_t, int64_t), const void* context) {
  at::parallel_for(begin, end, grain, [=](int64_t b, int64_t e) { body(context, b, e); });
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
