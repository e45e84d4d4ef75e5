// Memory that a thread keeps between calls, so that the hot path never allocates.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace lowbit {

// One growing block, 64-byte aligned. take() hands out pieces in order; reserve() all of them
// before.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(block_); }

  static constexpr size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }

  // Forgets the pieces and makes room for `bytes` (a sum of padded() sizes). Throws std::bad_alloc.
  void reserve(size_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    std::free(block_);
    size_ = 0;
    block_ = static_cast<char*>(std::aligned_alloc(64, padded(bytes)));
    if (!block_) throw std::bad_alloc();
    size_ = padded(bytes);
  }

  template <class T>
  T* take(int64_t count) {
    char* p = block_ + used_;
    used_ += padded(static_cast<size_t>(count) * sizeof(T));
    return reinterpret_cast<T*>(p);
  }

  template <class T>
  static size_t bytes(int64_t count) {
    return padded(static_cast<size_t>(count) * sizeof(T));
  }

 private:
  char* block_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

}  // namespace lowbit
