#include "huge_pages.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace lgd {

#ifdef __linux__
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kWorthwhile = kHugePage / 2;
constexpr size_t kKept = size_t(256) << 20;

struct Block {
  void* data;
  size_t size; // a multiple of kHugePage, as is the address
};

// Freed blocks, the most recent last, at most kKept bytes of them.
class Pool {
 public:
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
    return map(size);
  }

  void give_back(Block block) {
    const std::lock_guard lock(mutex_);
    blocks_.push_back(block);
    kept_ += block.size;
    while (kept_ > kKept) {
      kept_ -= blocks_.front().size;
      munmap(blocks_.front().data, blocks_.front().size);
      blocks_.erase(blocks_.begin());
    }
  }

 private:
  static Block map(size_t size) {
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

  std::mutex mutex_;
  std::vector<Block> blocks_;
  size_t kept_ = 0;
};

Pool& pool() {
  static Pool* const instance = new Pool; // never destroyed: tensors may outlive static objects
  return *instance;
}

void free_block(void* context) {
  const Block* block = static_cast<Block*>(context);
  c10::profiledCPUMemoryReporter().Delete(block->data);
  pool().give_back(*block);
  delete block;
}

class HugePageAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const Block block = pool().take((bytes + kHugePage - 1) / kHugePage * kHugePage);
    c10::profiledCPUMemoryReporter().New(block.data, bytes);
    return {block.data, new Block(block), &free_block, at::Device(at::kCPU)};
  }

  void copy_data(void* destination, const void* source, size_t bytes) const override {
    std::memcpy(destination, source, bytes);
  }
};

} // namespace

at::Tensor empty_on_huge_pages(const at::Tensor& like) {
  if (like.nbytes() < kWorthwhile) {
    return at::empty_like(like);
  }
  static HugePageAllocator allocator;
  const at::Tensor layout = at::empty_like(like, like.options().device(at::kMeta)); // like may overlap or have gaps
  at::Tensor result = at::detail::empty_strided_generic(
      layout.sizes(), layout.strides(), &allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), like.scalar_type());
  const at::Context& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {
    result.fill_(std::numeric_limits<double>::quiet_NaN());
  }
  return result;
}

#else

at::Tensor empty_on_huge_pages(const at::Tensor& like) {
  return at::empty_like(like);
}

#endif

} // namespace lgd
