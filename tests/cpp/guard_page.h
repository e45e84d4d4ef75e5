// Buffers whose neighbours cannot be touched: reading or writing one byte outside of them faults.
//
// Memory is [guard page][data pages][guard page]. A buffer lies against one of the two guards, so
// every test runs twice: at Edge::kEnd an access past the last byte faults at once, at Edge::kBegin
// one before the first byte. What is left of the data pages on the other side holds a pattern,
// which `intact` compares: a write there is found too.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace lowbit::test {

enum class Edge { kBegin, kEnd };

template <class T>
class GuardedBuffer {
 public:
  // Uninitialised elements are `fill` bytes, so that what a kernel forgets to write is visible.
  GuardedBuffer(size_t count, Edge edge, uint8_t fill = 0xA5) : count_(count), fill_(fill) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    data_bytes_ = (bytes() + page - 1) / page * page;
    mapped_bytes_ = data_bytes_ + 2 * page;
    void* p = mmap(nullptr, mapped_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    mapping_ = static_cast<uint8_t*>(p);
    data_ = mapping_ + page;
    if (data_bytes_ != 0 && mprotect(data_, data_bytes_, PROT_READ | PROT_WRITE) != 0) {
      munmap(mapping_, mapped_bytes_);
      throw std::bad_alloc();
    }
    std::memset(data_, fill_, data_bytes_);
    first_ = edge == Edge::kBegin ? data_ : data_ + data_bytes_ - bytes();
  }

  GuardedBuffer(const std::vector<T>& values, Edge edge) : GuardedBuffer(values.size(), edge) {
    if (!values.empty()) std::memcpy(first_, values.data(), bytes());
  }

  GuardedBuffer(const GuardedBuffer&) = delete;
  GuardedBuffer& operator=(const GuardedBuffer&) = delete;
  ~GuardedBuffer() { munmap(mapping_, mapped_bytes_); }

  // Multiples of sizeof(T) from a page boundary: aligned like T, and no more than that at kEnd.
  T* data() { return reinterpret_cast<T*>(first_); }
  const T* data() const { return reinterpret_cast<const T*>(first_); }
  size_t size() const { return count_; }

  // Null for an empty optional operand, as the library expects it.
  const T* data_or_null() const { return count_ == 0 ? nullptr : data(); }

  // Whether the bytes between the buffer and the farther guard still hold the pattern.
  bool intact() const {
    for (const uint8_t* p = data_; p < data_ + data_bytes_; ++p)
      if ((p < first_ || p >= first_ + bytes()) && *p != fill_) return false;
    return true;
  }

 private:
  size_t bytes() const { return count_ * sizeof(T); }

  size_t count_;
  uint8_t fill_;
  size_t data_bytes_ = 0, mapped_bytes_ = 0;
  uint8_t* mapping_ = nullptr;
  uint8_t* data_ = nullptr;
  uint8_t* first_ = nullptr;
};

}  // namespace lowbit::test
