// Memory that a thread keeps between calls, so that the hot path never allocates.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

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
  ~Scratch() { ::operator delete(block_, kAlignment); }

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
    ::operator delete(std::exchange(block_, nullptr), kAlignment);
    size_ = 0;
    block_ = static_cast<char*>(::operator new(bytes, kAlignment));
    size_ = bytes;
  }

  static constexpr std::align_val_t kAlignment{64};

  char* block_ = nullptr;
  size_t size_ = 0;
};

}  // namespace lowbit
