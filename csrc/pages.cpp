#include "pages.h"

#ifdef __linux__
#include <sys/mman.h>

#include <cstdint>
#endif

namespace lowbit {

#ifdef __linux__

namespace {

// What is smaller is taken from memory that the allocator kept, and done before the kernel has
// answered.
constexpr size_t kLarge = size_t{16} << 20;
constexpr uintptr_t kHugePage = uintptr_t{2} << 20;

bool is_new(uintptr_t page) {
  unsigned char resident = 1;
  return mincore(reinterpret_cast<void*>(page), 1, &resident) == 0 && !(resident & 1);
}

}  // namespace

size_t prefer_huge_pages(void* memory, size_t bytes) {
  if (bytes < kLarge) return 0;
  const uintptr_t from = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (from + kHugePage - 1) / kHugePage * kHugePage,
                  end = (from + bytes) / kHugePage * kHugePage;
  // The end of a heap that grew is new, its beginning may not be.
  if (!is_new(begin) && !is_new(end - kHugePage)) return 0;
  return madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) ? 0 : end - begin;
}

#else

size_t prefer_huge_pages(void*, size_t) { return 0; }

#endif

}  // namespace lowbit
