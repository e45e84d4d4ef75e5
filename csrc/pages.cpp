#include "pages.h"

#include "lowbit.h"

#ifdef __linux__
#include <sys/mman.h>

#include <cstdint>

#ifndef MADV_COLLAPSE  // of Linux 6.1, which headers may not know yet
#define MADV_COLLAPSE 25
#endif
#endif

namespace lowbit {

#ifdef __linux__

namespace {

// What is smaller is taken from memory that the allocator kept, and done before the kernel has
// answered.
constexpr size_t kLarge = size_t{16} << 20;
constexpr uintptr_t kHugePage = uintptr_t{2} << 20;

struct Pages {
  uintptr_t begin, end;
};

// The huge pages inside a range.
Pages whole_pages(const void* memory, size_t bytes) {
  const uintptr_t from = reinterpret_cast<uintptr_t>(memory);
  return {(from + kHugePage - 1) / kHugePage * kHugePage, (from + bytes) / kHugePage * kHugePage};
}

bool advise(const Pages& pages, int advice) {
  return madvise(reinterpret_cast<void*>(pages.begin), pages.end - pages.begin, advice) == 0;
}

bool is_new(uintptr_t page) {
  unsigned char resident = 1;
  return mincore(reinterpret_cast<void*>(page), 1, &resident) == 0 && !(resident & 1);
}

}  // namespace

size_t prefer_huge_pages(void* memory, size_t bytes) {
  if (bytes < kLarge) return 0;
  const Pages pages = whole_pages(memory, bytes);
  // The end of a heap that grew is new, its beginning may not be.
  if (!is_new(pages.begin) && !is_new(pages.end - kHugePage)) return 0;
  return advise(pages, MADV_HUGEPAGE) ? pages.end - pages.begin : 0;
}

size_t move_to_huge_pages(const void* memory, size_t bytes) {
  const Pages pages = whole_pages(memory, bytes);
  if (pages.begin >= pages.end) return 0;
  advise(pages, MADV_HUGEPAGE);  // an older kernel follows this in its own time
  return advise(pages, MADV_COLLAPSE) ? pages.end - pages.begin : 0;
}

#else

size_t prefer_huge_pages(void*, size_t) { return 0; }
size_t move_to_huge_pages(const void*, size_t) { return 0; }

#endif

}  // namespace lowbit
