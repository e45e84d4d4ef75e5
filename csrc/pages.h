// Where outputs lie: memory that is new comes from the system page by page, as it is written to.
#pragma once

#include <cstddef>

namespace lowbit {

// Asks for pages of 2 MB where a large range is about to be written and is not in memory yet: one
// fault in place of 512. Advice alone, to Linux; elsewhere, and where it is refused, nothing
// happens. Returns how many bytes it was given for.
size_t prefer_huge_pages(void* memory, size_t bytes);

}  // namespace lowbit
