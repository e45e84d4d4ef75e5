// Opens the unnamed namespace of one ISA's file. table.inl closes it.
#include "../formats.h"
#include "../kernel.h"

namespace lowbit {
namespace {

template <int N>
struct IntConstant {
  static constexpr int value = N;
};
