#include "direct.h"

#include <structmember.h>

#include <climits>
#include <cstddef>
#include <cstring>
#include <exception>
#include <new>

#include "dlpack.h"
#include "parallel.h"

namespace lowbit {
namespace {

// --- What is needed of torch ---------------------------------------------------------------------

struct Torch {
  PyObject *tensor_type, *parameter_type, *float32, *get_num_threads, *questions;
  PyObject *new_empty, *new_empty_strided, *is_neg, *to;  // methods of Tensor
  decltype(ExchangeTable::view) view;
};
Torch torch{};  // set once, under the GIL; never released: torch is not unloaded

// Names of attributes and buffers, interned.
constexpr int kWeightTensors = 5, kTensors = 7;
struct Names {
  PyObject *buffers, *training, *requires_grad, *dtype, *version, *tensors[kTensors];
} names{};

bool intern(PyObject*& name, const char* text) {
  return (name = PyUnicode_InternFromString(text)) != nullptr;
}

bool intern_names() {
  return intern(names.buffers, "_buffers") && intern(names.training, "training") &&
         intern(names.requires_grad, "requires_grad") && intern(names.dtype, "dtype") &&
         intern(names.version, "_version") && intern(names.tensors[0], "weight_packed") &&
         intern(names.tensors[1], "weight_scale") &&
         intern(names.tensors[2], "weight_group_scale") &&
         intern(names.tensors[3], "weight_group_zero") && intern(names.tensors[4], "bias") &&
         intern(names.tensors[5], "activation_scale") &&
         intern(names.tensors[6], "activation_zero");
}

// An owned reference.
struct Owned {
  PyObject* object;

  explicit Owned(PyObject* o) : object(o) {}
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() { Py_XDECREF(object); }
  PyObject* release() {
    PyObject* o = object;
    object = nullptr;
    return o;
  }
};

// A question's answer: 1 or 0, or -1 with a Python error.
int is_true(PyObject* answer) {
  if (!answer) return -1;
  const int truth = PyObject_IsTrue(answer);
  Py_DECREF(answer);
  return truth;
}

int is_intercepted() {
  const Py_ssize_t count = PyTuple_GET_SIZE(torch.questions);
  for (Py_ssize_t i = 0; i < count; ++i)
    if (const int answer = is_true(PyObject_CallNoArgs(PyTuple_GET_ITEM(torch.questions, i))))
      return answer;
  return 0;
}

bool is_tensor(PyObject* o) {
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(o));
  return type == torch.tensor_type || type == torch.parameter_type;
}

// False, without an error, for a tensor without memory of its own (sparse, nested, ...).
bool read(PyObject* tensor, View& view) {
  if (torch.view(tensor, &view) != 0) {
    PyErr_Clear();
    return false;
  }
  view.data += view.byte_offset;
  return view.device_type == kCpu;
}

// --- The callable --------------------------------------------------------------------------------

// A tensor of the layer as it was checked.
struct Operand {
  PyObject* tensor;  // owned; None where there is none
  const char* data;
  int64_t count;
  DataType dtype;

  bool is_same() const {
    View v;
    return tensor == Py_None || (read(tensor, v) && v.data == data && v.dtype == dtype &&
                                 numel(v) == count && is_contiguous(v));
  }
};

// How often a tensor was written to, as torch counts; -1 where it does not (inference tensors).
long version_of(PyObject* tensor) {
  if (tensor == Py_None) return -1;
  Owned count(PyObject_GetAttr(tensor, names.version));
  const long version = count.object ? PyLong_AsLong(count.object) : -1;
  PyErr_Clear();
  return version;
}

struct Direct {
  PyObject head;
  vectorcallfunc vectorcall;
  PyObject* settings;
  PyObject* out_features;
  Operand operands[kTensors];
  int tensors;                    // of them in use
  PyObject* static_bias;          // what weights.bias points to, or None: it is an operand
  long versions[kWeightTensors];  // of what the static bias is made of
  StaticActivation fixed;
  Weights weights;
  Activation activation;
  bool is_conv2d;
  DirectConv2d conv2d;
};

PyObject* decline() { Py_RETURN_NONE; }

const StaticActivation* fixed_of(const Direct& self) {
  return self.tensors == kTensors ? &self.fixed : nullptr;
}

template <class T>
bool holds(const Operand& operand, T value) {
  T found;
  std::memcpy(&found, operand.data, sizeof(found));
  return found == value;
}

// Whether the layer is what it was when it was checked.
bool is_same_layer(const Direct& self, PyObject* attributes) {
  PyObject* const buffers = PyDict_GetItemWithError(attributes, names.buffers);
  if (!buffers || !PyDict_Check(buffers)) return false;
  for (int i = 0; i < self.tensors; ++i)
    if (PyDict_GetItemWithError(buffers, names.tensors[i]) != self.operands[i].tensor ||
        !self.operands[i].is_same())
      return false;
  if (fixed_of(self) && !(holds(self.operands[5], self.fixed.scale) &&
                          holds(self.operands[6], int32_t{self.fixed.zero})))
    return false;
  if (self.static_bias != Py_None)
    for (int i = 0; i < kWeightTensors; ++i)
      if (version_of(self.operands[i].tensor) != self.versions[i]) return false;
  PyObject *name, *value;
  for (Py_ssize_t at = 0; PyDict_Next(self.settings, &at, &name, &value);)
    if (PyDict_GetItemWithError(attributes, name) != value) return false;
  return true;
}

// Less work than this is done before another thread could take the GIL and give it back.
constexpr int64_t kMacsWithGil = int64_t{1} << 17;

// `share`: what decides how many threads are woken. False: the work failed, and the error is
// Python's.
template <class Work>
bool run(int64_t macs, int64_t share, Work work) {
  int threads = 1;
  if (worthwhile_threads(INT_MAX, share) > 1) {
    Owned answer(PyObject_CallNoArgs(torch.get_num_threads));
    const long count = answer.object ? PyLong_AsLong(answer.object) : -1;
    if (PyErr_Occurred()) return false;
    threads = static_cast<int>(count < 1 ? 1 : count);
  }
  std::exception_ptr error;
  PyThreadState* const state = macs > kMacsWithGil ? PyEval_SaveThread() : nullptr;
  try {
    work(threads);
  } catch (...) {
    error = std::current_exception();
  }
  if (state) PyEval_RestoreThread(state);
  if (!error) return true;
  try {
    std::rethrow_exception(error);
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
  }
  return false;
}

template <size_t N>
struct Integers {
  PyObject* objects[N] = {};

  ~Integers() {
    for (PyObject* o : objects) Py_XDECREF(o);
  }
};

PyObject* linear_call(const Direct& self, PyObject* x, const View& in) {
  constexpr int kMostDimensions = 8;
  const Weights& w = self.weights;
  if (in.ndim < 1 || in.ndim > kMostDimensions || in.shape[in.ndim - 1] != w.k ||
      !is_contiguous(in))
    return decline();
  const int64_t m = numel(in) / w.k;
  if (m == 0) return decline();

  Integers<kMostDimensions> sizes;
  PyObject* arguments[1 + kMostDimensions] = {x};
  for (int i = 0; i + 1 < in.ndim; ++i)
    if (!(arguments[1 + i] = sizes.objects[i] = PyLong_FromLongLong(in.shape[i]))) return nullptr;
  arguments[in.ndim] = self.out_features;
  const auto count = static_cast<size_t>(in.ndim) + 1;
  Owned y(PyObject_Vectorcall(torch.new_empty, arguments, count, nullptr));
  View out;
  if (!y.object) return nullptr;
  if (!is_tensor(y.object) || !read(y.object, out)) return decline();
  const bool done = run(m * w.n * w.k, linear_work(m, w), [&](int threads) {
    linear(reinterpret_cast<const float*>(in.data), m, w, self.activation,
           reinterpret_cast<float*>(out.data), threads, fixed_of(self));
  });
  return done ? y.release() : nullptr;
}

// A new tensor of x's kind, [n, c, h, w], dense.
PyObject* new_image(PyObject* x, const Conv2dGeometry& g) {
  const int64_t n = g.batch, c = g.out_channels, h = g.out_height, w = g.out_width;
  if (g.y_channels_last) {
    Owned shape(Py_BuildValue("(LLLL)", n, c, h, w));
    Owned strides(Py_BuildValue("(LLLL)", h * w * c, int64_t{1}, w * c, c));
    if (!shape.object || !strides.object) return nullptr;
    PyObject* arguments[] = {x, shape.object, strides.object};
    return PyObject_Vectorcall(torch.new_empty_strided, arguments, 3, nullptr);
  }
  const int64_t values[] = {n, c, h, w};
  Integers<4> sizes;
  PyObject* arguments[5] = {x};
  for (int i = 0; i < 4; ++i) {
    if (!(sizes.objects[i] = PyLong_FromLongLong(values[i]))) return nullptr;
    arguments[1 + i] = sizes.objects[i];
  }
  return PyObject_Vectorcall(torch.new_empty, arguments, 5, nullptr);
}

// `given` decides the memory format of the output: x before it was converted.
PyObject* conv2d_call(const Direct& self, PyObject* x, const View& in, const View& given) {
  Conv2dGeometry g = self.conv2d.geometry;
  if (in.ndim != 4 || in.shape[1] != g.channels || numel(in) == 0) return decline();
  g.batch = in.shape[0];
  g.height = in.shape[2];
  g.width = in.shape[3];
  const int64_t down =
      g.height + g.pad_top + self.conv2d.pad_bottom - 1 - g.dilation_h * (g.kernel_h - 1);
  const int64_t across =
      g.width + g.pad_left + self.conv2d.pad_right - 1 - g.dilation_w * (g.kernel_w - 1);
  if (down < 0 || across < 0) return decline();
  g.out_height = down / g.stride_h + 1;
  g.out_width = across / g.stride_w + 1;
  constexpr int kNhwc[] = {0, 2, 3, 1};
  g.x_channels_last = !is_contiguous(in);
  if (g.x_channels_last && !is_dense(in, kNhwc)) return decline();
  g.y_channels_last = suggests_channels_last(given);

  Owned y(new_image(x, g));
  View out;
  if (!y.object) return nullptr;
  if (!is_tensor(y.object) || !read(y.object, out)) return decline();
  const Weights& w = self.weights;
  const int64_t macs = g.batch * g.out_height * g.out_width * w.n * w.k;
  const bool done = run(macs, macs, [&](int threads) {
    conv2d(reinterpret_cast<const float*>(in.data), g, w, self.activation,
           reinterpret_cast<float*>(out.data), threads, fixed_of(self));
  });
  return done ? y.release() : nullptr;
}

PyObject* convert(PyObject* x, PyObject* dtype) {
  PyObject* arguments[] = {x, dtype};
  return PyObject_Vectorcall(torch.to, arguments, 2, nullptr);
}

PyObject* float32_call(const Direct& self, PyObject* x, const View& in, const View& given) {
  return self.is_conv2d ? conv2d_call(self, x, in, given) : linear_call(self, x, in);
}

// Through float32 and back, for the other dtypes.
PyObject* converted_call(const Direct& self, PyObject* x, const View& given) {
  Owned dtype(PyObject_GetAttr(x, names.dtype));
  Owned x32(convert(x, torch.float32));
  View in;
  if (!dtype.object || !x32.object) return nullptr;
  if (!is_tensor(x32.object) || !read(x32.object, in)) return decline();
  Owned y(float32_call(self, x32.object, in, given));
  if (!y.object || y.object == Py_None) return y.release();
  return convert(y.object, dtype.object);
}

PyObject* direct_call(PyObject* object, PyObject* const* arguments, size_t flags,
                      PyObject* keywords) {
  const Direct& self = *reinterpret_cast<const Direct*>(object);
  if (PyVectorcall_NARGS(flags) != 2 || keywords || !PyDict_Check(arguments[1])) {
    PyErr_SetString(PyExc_TypeError, "takes a tensor and the __dict__ of a layer");
    return nullptr;
  }
  PyObject *const x = arguments[0], *const attributes = arguments[1];
  View in;
  if (!is_tensor(x) || !read(x, in) || !is_float(in.dtype) || !in.data) return decline();
  if (const int intercepted = is_intercepted()) return intercepted < 0 ? nullptr : decline();
  if (!is_same_layer(self, attributes)) return decline();
  if (PyDict_GetItemWithError(attributes, names.training) != Py_False)
    if (const int wanted = is_true(PyObject_GetAttr(x, names.requires_grad)))
      return wanted < 0 ? nullptr : decline();
  if (const int negated = is_true(PyObject_CallOneArg(torch.is_neg, x)))
    return negated < 0 ? nullptr : decline();
  return in.dtype == kFloat32 ? float32_call(self, x, in, in) : converted_call(self, x, in);
}

PyObject* direct_matches(PyObject* object, PyObject* attributes) {
  if (!PyDict_Check(attributes)) {
    PyErr_SetString(PyExc_TypeError, "takes the __dict__ of a layer");
    return nullptr;
  }
  return PyBool_FromLong(is_same_layer(*reinterpret_cast<const Direct*>(object), attributes));
}

int direct_traverse(PyObject* object, visitproc visit, void* arg) {
  Direct* const self = reinterpret_cast<Direct*>(object);
  Py_VISIT(Py_TYPE(object));
  Py_VISIT(self->settings);
  Py_VISIT(self->static_bias);
  for (Operand& operand : self->operands) Py_VISIT(operand.tensor);
  return 0;
}

void direct_dealloc(PyObject* object) {
  Direct* const self = reinterpret_cast<Direct*>(object);
  PyTypeObject* const type = Py_TYPE(object);
  PyObject_GC_UnTrack(object);
  Py_XDECREF(self->settings);
  Py_XDECREF(self->out_features);
  Py_XDECREF(self->static_bias);
  for (Operand& operand : self->operands) Py_XDECREF(operand.tensor);
  type->tp_free(object);
  Py_DECREF(type);
}

PyTypeObject* direct_type() {
  static PyMemberDef members[] = {
      {"__vectorcalloffset__", T_PYSSIZET, offsetof(Direct, vectorcall), READONLY, nullptr},
      {nullptr, 0, 0, 0, nullptr}};
  static PyMethodDef methods[] = {
      {"matches", direct_matches, METH_O, "Whether a layer is what it was, by its __dict__."},
      {nullptr, nullptr, 0, nullptr}};
  static PyType_Slot slots[] = {{Py_tp_methods, methods},
                                {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
                                {Py_tp_members, members},
                                {Py_tp_traverse, reinterpret_cast<void*>(direct_traverse)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(direct_dealloc)},
                                {0, nullptr}};
  static PyType_Spec spec = {"lowbit._core.Direct", sizeof(Direct), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL |
                                 Py_TPFLAGS_DISALLOW_INSTANTIATION,
                             slots};
  static PyObject* type = nullptr;
  if (!type) type = PyType_FromSpec(&spec);
  return reinterpret_cast<PyTypeObject*>(type);
}

}  // namespace

int bind_torch(PyObject* tensor_type, PyObject* parameter_type, PyObject* float32,
               PyObject* get_num_threads, PyObject* questions) {
  Owned capsule(PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__"));
  if (!capsule.object) {
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
    PyErr_Clear();
    return 0;
  }
  auto* header =
      PyCapsule_IsValid(capsule.object, "dlpack_exchange_api")
          ? static_cast<Header*>(PyCapsule_GetPointer(capsule.object, "dlpack_exchange_api"))
          : nullptr;
  while (header && header->major != 1) header = header->older;
  if (!header || !reinterpret_cast<ExchangeTable*>(header)->view) return 0;
  if (!PyTuple_Check(questions)) {
    PyErr_SetString(PyExc_TypeError, "questions are a tuple of functions");
    return -1;
  }
  Torch bound{tensor_type,
              parameter_type,
              float32,
              get_num_threads,
              questions,
              PyObject_GetAttrString(tensor_type, "new_empty"),
              PyObject_GetAttrString(tensor_type, "new_empty_strided"),
              PyObject_GetAttrString(tensor_type, "is_neg"),
              PyObject_GetAttrString(tensor_type, "to"),
              reinterpret_cast<ExchangeTable*>(header)->view};
  if (!bound.new_empty || !bound.new_empty_strided || !bound.is_neg || !bound.to || !intern_names())
    return -1;
  for (PyObject* kept : {tensor_type, parameter_type, float32, get_num_threads, questions})
    Py_INCREF(kept);
  torch = bound;
  return 1;
}

PyObject* make_direct(const Weights& weights, Activation activation, const StaticActivation* fixed,
                      PyObject* tensors, PyObject* settings, const DirectConv2d* conv2d) {
  const int count = fixed ? kTensors : kWeightTensors;
  if (!torch.view || !PyTuple_Check(tensors) ||
      PyTuple_GET_SIZE(tensors) != count + (fixed ? 1 : 0) || weights.n == 0 || weights.k == 0) {
    PyErr_SetString(PyExc_ValueError, "needs torch's exchange table and the tensors of a layer");
    return nullptr;
  }
  PyTypeObject* const type = direct_type();
  if (!type) return nullptr;
  PyObject* const object = type->tp_alloc(type, 0);  // zeroed
  if (!object) return nullptr;
  Direct* const self = reinterpret_cast<Direct*>(object);
  Owned owner(object);
  self->vectorcall = direct_call;
  self->weights = weights;
  self->activation = activation;
  self->is_conv2d = conv2d != nullptr;
  if (conv2d) self->conv2d = *conv2d;
  if (!(self->settings = PyDict_Copy(settings))) return nullptr;
  if (!(self->out_features = PyLong_FromLongLong(weights.n))) return nullptr;
  self->static_bias = fixed ? PyTuple_GET_ITEM(tensors, kTensors) : Py_None;
  Py_INCREF(self->static_bias);
  const bool own_bias = self->static_bias != Py_None;
  const void* const addresses[kWeightTensors] = {weights.packed, weights.scale, weights.group_scale,
                                                 weights.group_zero, weights.bias};
  self->tensors = count;
  if (fixed) self->fixed = *fixed;
  for (int i = 0; i < count; ++i) {
    PyObject* const tensor = PyTuple_GET_ITEM(tensors, i);
    Operand& operand = self->operands[i];
    Py_INCREF(tensor);
    operand.tensor = tensor;
    View v{};
    if (tensor != Py_None && !(is_tensor(tensor) && read(tensor, v) && is_contiguous(v)))
      v.data = nullptr;
    operand.data = v.data;
    operand.count = numel(v);
    operand.dtype = v.dtype;
    bool right = i >= kWeightTensors || (i == 4 && own_bias) || operand.data == addresses[i];
    if (i == 5) right = operand.data && v.dtype == kFloat32 && holds(operand, fixed->scale);
    if (i == 6) right = operand.data && v.dtype == kInt32 && holds(operand, int32_t{fixed->zero});
    if (!right) {
      PyErr_SetString(PyExc_ValueError, "a tensor is not at the address of its operand");
      return nullptr;
    }
    if (i < kWeightTensors) self->versions[i] = own_bias ? version_of(tensor) : -1;
  }
  if (own_bias) {
    View v{};
    const bool right = is_tensor(self->static_bias) && read(self->static_bias, v);
    if (!right || v.data != reinterpret_cast<const char*>(weights.bias)) {
      PyErr_SetString(PyExc_ValueError, "the bias is not at the address of its operand");
      return nullptr;
    }
  }
  return owner.release();
}

}  // namespace lowbit
