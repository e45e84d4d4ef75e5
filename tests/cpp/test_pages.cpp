// Huge pages: inside the range alone, outputs' for new memory alone, and they change no byte.
#include <doctest/doctest.h>

#include "lowbit.h"
#include "pages.h"

using namespace lowbit;

#ifdef __linux__
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>

namespace {

constexpr size_t kMega = size_t{1} << 20;

struct Mapping {
  explicit Mapping(size_t size) : bytes(size) {
    memory = static_cast<char*>(
        mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    REQUIRE(memory != MAP_FAILED);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() { munmap(memory, bytes); }

  char* memory;
  const size_t bytes;
};

// Bytes of [begin, end) whose mapping has the flag "hg" in /proc/self/smaps; -1: it has no flags.
int64_t advised(const void* begin, const void* end) {
  std::ifstream file("/proc/self/smaps");
  std::string line;
  uintptr_t from = 0, to = 0;
  int64_t total = 0;
  bool known = false;
  while (std::getline(file, line)) {
    std::istringstream words(line);
    std::string word;
    words >> word;
    if (word.find('-') != std::string::npos && word.back() != ':') {
      char dash;
      std::istringstream range(word);
      range >> std::hex >> from >> dash >> to;
    }
    if (word != "VmFlags:") continue;
    known = true;
    while (words >> word)
      if (word == "hg") {
        const uintptr_t low = std::max(from, reinterpret_cast<uintptr_t>(begin)),
                        high = std::min(to, reinterpret_cast<uintptr_t>(end));
        if (low < high) total += static_cast<int64_t>(high - low);
      }
  }
  return known ? total : -1;
}

}  // namespace

TEST_CASE("new memory gets the advice, inside the range alone") {
  const Mapping map(64 * kMega);
  char* const begin = map.memory + 3 * kMega + 64;
  const size_t bytes = 40 * kMega + 4096;
  const auto given = static_cast<int64_t>(prefer_huge_pages(begin, bytes));
  if (given == 0) return;  // a kernel without huge pages
  CHECK(given % static_cast<int64_t>(2 * kMega) == 0);
  CHECK(given > static_cast<int64_t>(bytes - 4 * kMega));
  if (const int64_t inside = advised(begin, begin + bytes); inside >= 0) CHECK(inside == given);
  CHECK(advised(map.memory, begin) <= 0);
  CHECK(advised(begin + bytes, map.memory + map.bytes) <= 0);
}

TEST_CASE("memory that is there gets none, and keeps its bytes") {
  const Mapping map(32 * kMega);
  for (size_t i = 0; i < map.bytes; i += 4096) map.memory[i] = static_cast<char>(i / 4096 % 127);
  CHECK(prefer_huge_pages(map.memory, map.bytes) == 0);
  CHECK(advised(map.memory, map.memory + map.bytes) <= 0);
  size_t kept = 0;
  for (size_t i = 0; i < map.bytes; i += 4096)
    kept += map.memory[i] == static_cast<char>(i / 4096 % 127);
  CHECK(kept == map.bytes / 4096);
}

TEST_CASE("memory of which the end alone is new gets it") {
  const Mapping map(32 * kMega);
  for (size_t i = 0; i < map.bytes / 2; i += 4096) map.memory[i] = 7;
  prefer_huge_pages(map.memory, map.bytes);
  size_t kept = 0;
  for (size_t i = 0; i < map.bytes; i += 4096) kept += map.memory[i] == (i < map.bytes / 2 ? 7 : 0);
  CHECK(kept == map.bytes / 4096);
}

TEST_CASE("what is small is left alone") {
  const Mapping map(4 * kMega);
  CHECK(prefer_huge_pages(map.memory, map.bytes) == 0);
  CHECK(prefer_huge_pages(nullptr, 0) == 0);
}

TEST_CASE("what is moved keeps its bytes and its place") {
  const Mapping map(16 * kMega);
  const auto byte = [](size_t i) { return static_cast<char>(i * 2654435761u >> 24); };
  for (size_t i = 0; i < map.bytes; ++i) map.memory[i] = byte(i);
  const char* const begin = map.memory + kMega + 64;
  const size_t bytes = 11 * kMega;
  const size_t moved = move_to_huge_pages(begin, bytes);
  CHECK(moved % (2 * kMega) == 0);
  CHECK(moved <= bytes);
  if (moved > 0) CHECK(moved > bytes - 4 * kMega);
  CHECK(move_to_huge_pages(begin, bytes) == moved);
  CHECK(advised(map.memory, begin) <= 0);
  CHECK(advised(begin + bytes, map.memory + map.bytes) <= 0);
  size_t kept = 0;
  for (size_t i = 0; i < map.bytes; ++i) kept += map.memory[i] == byte(i);
  CHECK(kept == map.bytes);
}

TEST_CASE("what holds no whole page is not moved") {
  const Mapping map(4 * kMega);
  CHECK(move_to_huge_pages(map.memory, kMega) == 0);
  CHECK(move_to_huge_pages(nullptr, 0) == 0);
}

#else

TEST_CASE("elsewhere nothing happens") {
  CHECK(prefer_huge_pages(nullptr, 0) == 0);
  CHECK(move_to_huge_pages(nullptr, 0) == 0);
}

#endif
