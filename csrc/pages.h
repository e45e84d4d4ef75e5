// Pages of 2 MB for what is large. Outputs: memory that is new comes from the system page by page, as
// it is written to. Weights: what reads them from memory waits for the addresses of their pages.
#pragma once

#include <cstddef>

namespace lowbit {

// Asks for pages of 2 MB where a large range is about to be written and is not in memory yet: one
// fault in place of 512. Advice alone, to Linux; elsewhere, and where it is refused, nothing
// happens. Returns how many bytes it was given for.
size_t prefer_huge_pages(void* memory, size_t bytes);

// Moves what a range holds to such pages, as many as lie in it whole; no byte and no address of it
// changes. Takes the time of some two copies. Returns how many bytes lie in them now; 0 where Linux
// refuses.
size_t move_to_huge_pages(const void* memory, size_t bytes);

}  // namespace lowbit
