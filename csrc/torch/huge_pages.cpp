#include "huge_pages.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#ifdef __linux__
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace lgd {

#ifdef __linux__
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kWorthwhile = kHugePage / 2;
constexpr size_t kKept = size_t(256) << 20;

struct Block {
  void* data;  // at the start of a huge page
  size_t size; // a multiple of kPage
};

// `size` bytes on huge pages, but for the last ones, which fill none.
Block map_block(size_t size) {
  const size_t reserved = size + kHugePage;
  void* mapped = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TORCH_CHECK_WITH(OutOfMemoryError, mapped != MAP_FAILED, "cannot allocate ", size, " bytes for a gradient");
  const uintptr_t begin = reinterpret_cast<uintptr_t>(mapped), data = (begin + kHugePage - 1) / kHugePage * kHugePage;
  if (data > begin) {
    munmap(mapped, data - begin);
  }
  if (begin + reserved > data + size) {
    munmap(reinterpret_cast<void*>(data + size), begin + reserved - data - size);
  }
  madvise(reinterpret_cast<void*>(data), size, MADV_HUGEPAGE); // advice: failure changes nothing
  return {reinterpret_cast<void*>(data), size};
}

// Freed blocks, the most recent last, at most kKept bytes of them.
class Pool {
 public:
  static Pool& instance() {
    static Pool* const pool = [] { // never destroyed: tensors may outlive static objects
      auto* made = new Pool;
      made->blocks_.reserve(kKept / kWorthwhile + 1); // so that a deleter never has to allocate
      // a child of fork must not inherit the lock in the hands of a thread that it does not have
      pthread_atfork(
          [] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); }, [] { instance().mutex_.unlock(); });
      return made;
    }();
    return *pool;
  }

  // A kept block that fits, or a new one.
  Block take(size_t size) {
    {
      const std::lock_guard lock(mutex_);
      for (auto block = blocks_.rbegin(); block != blocks_.rend(); ++block) {
        if (size <= block->size && block->size <= size + size / 8) {
          const Block found = *block;
          blocks_.erase(std::next(block).base());
          kept_ -= found.size;
          return found;
        }
      }
    }
    return map_block(size);
  }

  void give_back(Block block) {
    if (block.size > kKept) {
      munmap(block.data, block.size);
      return;
    }
    keep(block);
    while (const std::optional<Block> oldest = take_if_too_much()) {
      munmap(oldest->data, oldest->size); // outside the lock: it may take long
    }
  }

 private:
  void keep(Block block) {
    const std::lock_guard lock(mutex_);
    blocks_.push_back(block);
    kept_ += block.size;
  }

  std::optional<Block> take_if_too_much() {
    const std::lock_guard lock(mutex_);
    if (kept_ <= kKept) {
      return std::nullopt;
    }
    const Block oldest = blocks_.front();
    blocks_.erase(blocks_.begin());
    kept_ -= oldest.size;
    return oldest;
  }

  std::mutex mutex_;
  std::vector<Block> blocks_;
  size_t kept_ = 0;
};

void free_block(void* context) {
  const std::unique_ptr<Block> block(static_cast<Block*>(context));
  c10::profiledCPUMemoryReporter().Delete(block->data);
  Pool::instance().give_back(*block);
}

class HugePageAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    auto block = std::make_unique<Block>();
    *block = Pool::instance().take((bytes + kPage - 1) / kPage * kPage);
    void* const data = block->data;
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, block.release(), &free_block, at::Device(at::kCPU)};
  }

  void copy_data(void* destination, const void* source, size_t bytes) const override {
    std::memcpy(destination, source, bytes);
  }
};

// A tensor with the shape, strides and dtype of `layout`, which has no memory.
at::Tensor on_huge_pages(const at::Tensor& layout) {
  static HugePageAllocator allocator;
  at::Tensor result = at::detail::empty_strided_generic(
      layout.sizes(), layout.strides(), &allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), layout.scalar_type());
  const at::Context& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {
    result.fill_(std::numeric_limits<double>::quiet_NaN());
  }
  return result;
}

} // namespace

at::Tensor empty_on_huge_pages(const at::Tensor& like) {
  if (like.nbytes() < kWorthwhile) {
    return at::empty_like(like);
  }
  return on_huge_pages(at::empty_like(like, like.options().device(at::kMeta))); // like may overlap or have gaps
}

at::Tensor empty_on_huge_pages(at::IntArrayRef shape, at::ScalarType dtype) {
  double bytes = static_cast<double>(c10::elementSize(dtype)); // which cannot overflow
  for (const int64_t size : shape) {
    bytes *= static_cast<double>(size);
  }
  if (bytes < static_cast<double>(kWorthwhile)) {
    return at::empty(shape, dtype);
  }
  return on_huge_pages(at::empty(shape, at::TensorOptions(dtype).device(at::kMeta)));
}

#else

at::Tensor empty_on_huge_pages(const at::Tensor& like) {
  return at::empty_like(like);
}

at::Tensor empty_on_huge_pages(at::IntArrayRef shape, at::ScalarType dtype) {
  return at::empty(shape, dtype);
}

#endif

} // namespace lgd
