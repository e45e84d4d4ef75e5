// The shortest way from a layer in Python to its kernel: CPython's C API alone, no pybind11 and no
// torch header. Tensors are read through the DLPack exchange table that torch.Tensor offers.
#pragma once

#include <Python.h>

#include "lowbit.h"

namespace lowbit {

// A convolution's geometry; batch, height, width and out_* are those of each call.
struct DirectConv2d {
  Conv2dGeometry geometry;
  int64_t pad_bottom, pad_right;
};

// Takes what the calls need of torch: its classes, torch.float32, torch.get_num_threads, and
// functions without arguments of which each says whether something in this thread intercepts
// operators. Returns 1, or 0 where this torch has no exchange table, or -1 with a Python error.
int bind_torch(PyObject* tensor_type, PyObject* parameter_type, PyObject* float32,
               PyObject* get_num_threads, PyObject* questions);

// A callable (x, attributes) -> y or None, for checked weights in `tensors`: weight_packed,
// weight_scale, weight_group_scale, weight_group_zero, bias (None where there is none); with
// `fixed` activation_scale and activation_zero after them, and what static_bias made of the first
// five, or None: then weights.bias is there, and these may not have been written to since. It
// answers None, having done nothing, unless x is an ordinary floating-point tensor that lies as the
// kernel takes it, and the layer whose __dict__ is `attributes` is what it was: these tensors in
// its buffers, their memory where it was, and the values of the dict `settings` under their names,
// the same objects. Its method matches(attributes) tells the latter. `conv2d` is null for a Linear.
// Returns a new reference, or null with a Python error.
PyObject* make_direct(const Weights& weights, Activation activation, const StaticActivation* fixed,
                      PyObject* tensors, PyObject* settings, const DirectConv2d* conv2d);

}  // namespace lowbit
