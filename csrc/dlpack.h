// Tensors by DLPack: its exchange table (version 1), as far as it is used, and what their strides
// mean.
#pragma once

#include <cstdint>

namespace lowbit {

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;

  bool operator==(const DataType& other) const {
    return code == other.code && bits == other.bits && lanes == other.lanes;
  }
};

constexpr DataType kFloat32{2, 32, 1}, kFloat16{2, 16, 1}, kBfloat16{4, 16, 1}, kFloat64{2, 64, 1};
constexpr DataType kInt32{0, 32, 1};
constexpr int32_t kCpu = 1;

struct View {
  char* data;
  int32_t device_type, device_id;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: contiguous
  uint64_t byte_offset;
};
static_assert(sizeof(void*) != 8 || sizeof(View) == 48, "DLTensor's layout");

struct Header {
  uint32_t major, minor;
  Header* older;
};

struct ExchangeTable {
  Header header;
  void* not_used[3];
  int (*view)(void* tensor, View* out);  // 0, or -1 with a Python error; borrows from the tensor
};

inline bool is_float(const DataType& t) {
  return t == kFloat32 || t == kBfloat16 || t == kFloat16 || t == kFloat64;
}

// Whether dimensions in the order of `order` (outermost first) lie one after the other.
inline bool is_dense(const View& v, const int* order) {
  if (!v.strides) return false;
  int64_t expected = 1;
  for (int i = v.ndim - 1; i >= 0; --i) {
    const int d = order ? order[i] : i;
    if (v.shape[d] != 1 && v.strides[d] != expected) return false;
    expected *= v.shape[d];
  }
  return true;
}

inline bool is_contiguous(const View& v) { return !v.strides || is_dense(v, nullptr); }

inline int64_t numel(const View& v) {
  uint64_t count = 1;  // of a tensor without elements the other sizes may overflow
  for (int i = 0; i < v.ndim; ++i) count *= static_cast<uint64_t>(v.shape[i]);
  return static_cast<int64_t>(count);
}

// c10's is_channels_last_strides_2d: strides that do not decide mean contiguous.
inline bool suggests_channels_last(const View& v) {
  if (!v.strides || v.strides[1] == 0) return false;
  int64_t least = 0;
  for (const int d : {1, 3, 2, 0}) {
    if (v.shape[d] == 0 || v.strides[d] < least || (d == 0 && least == v.strides[1])) return false;
    least = v.shape[d] > 1 ? v.strides[d] * v.shape[d] : v.strides[d];
  }
  return true;
}

}  // namespace lowbit
