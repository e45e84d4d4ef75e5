// What the files of the bindings share.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "lowbit.h"

namespace lowbit {

using Address = uintptr_t;

inline void require(bool condition, const std::string& message) {
  if (!condition) throw pybind11::value_error(message);
}

// Throw ValueError where a number or a combination is no weight's; addresses are trusted.
Weights make_weights(int format, int64_t n, int64_t k, int64_t group_size, Address packed,
                     Address scale, Address group_scale, Address group_zero, Address bias,
                     int epilogue);
Format format_of(int index);
Activation activation_of(int index);

void bind_program(pybind11::module_& m);

}  // namespace lowbit
