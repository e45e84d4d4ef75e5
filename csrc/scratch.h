// Memory that a thread keeps between calls, so that the hot path never allocates.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace lowbit {

// A piece of a block: where its address goes, how many elements it has.
template <class T>
struct Piece {
  T*& pointer;
  int64_t count;

  size_t bytes() const { return (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64; }
};

template <class T>
Piece<T> piece(T*& pointer, int64_t count) {
  return {pointer, count};
}

// One growing block, cut into pieces that are 64-byte aligned. Cutting it again takes the pieces
// back.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(block_); }

  // Pieces of no elements get null. Throws std::bad_alloc.
  template <class... T>
  void cut(Piece<T>... pieces) {
    reserve((pieces.bytes() + ...));
    char* next = block_;
    const auto place = [&next](auto piece) {
      piece.pointer = piece.count ? reinterpret_cast<decltype(piece.pointer + 0)>(next) : nullptr;
      next += piece.bytes();
    };
    (place(pieces), ...);
  }

 private:
  void reserve(size_t bytes) {
    if (bytes <= size_) return;
    std::free(block_);
    size_ = 0;
    block_ = static_cast<char*>(std::aligned_alloc(64, bytes));
    if (!block_) throw std::bad_alloc();
    size_ = bytes;
  }

  char* block_ = nullptr;
  size_t size_ = 0;
};

}  // namespace lowbit
