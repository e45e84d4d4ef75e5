// pybind11 only: check, unwrap, release the GIL, call lowbit.h. No torch header: tensors arrive as
// addresses, so one build works with every torch.
#include "bindings.h"

#include <omp.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cfloat>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>

#include "cpu.h"
#include "direct.h"
#include "lowbit.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace lowbit {

Format format_of(int index) {
  require(index >= 0 && index < kFormatCount,
          "format index " + std::to_string(index) + " is out of range");
  return static_cast<Format>(index);
}

Activation activation_of(int index) {
  require(index >= 0 && index < kActivationCount,
          "activation index " + std::to_string(index) + " is out of range");
  return static_cast<Activation>(index);
}

Weights make_weights(int format, int64_t n, int64_t k, int64_t group_size, Address packed,
                     Address scale, Address group_scale, Address group_zero, Address bias,
                     int epilogue) {
  require(n >= 0 && k >= 0, "negative size");
  require(group_size >= 0 && group_size % 32 == 0, "group_size must be 0 or a multiple of 32");
  require((group_size != 0) == (group_scale != 0), "group_size and group_scale go together");
  require(group_zero == 0 || group_scale != 0, "group_zero needs group_scale");
  require(group_size == 0 || k > 0, "groups need a k above 0");
  require(epilogue >= 0 && epilogue < kEpilogueCount,
          "epilogue index " + std::to_string(epilogue) + " is out of range");
  require(n == 0 || (scale != 0 && (packed != 0 || k == 0)), "the address of the weights is 0");
  return {format_of(format),
          n,
          k,
          group_size,
          reinterpret_cast<const uint8_t*>(packed),
          reinterpret_cast<const float*>(scale),
          reinterpret_cast<const uint16_t*>(group_scale),
          reinterpret_cast<const uint16_t*>(group_zero),
          reinterpret_cast<const float*>(bias),
          static_cast<Epilogue>(epilogue)};
}

namespace {

using Codes = py::array_t<uint8_t, py::array::c_style>;

template <class List>
std::string joined(const List& names) {
  std::string s;
  for (const auto& name : names) s += (s.empty() ? "" : ", ") + std::string(name);
  return s;
}

Format format_named(const std::string& name) {
  std::vector<std::string> names;
  for (int i = 0; i < kFormatCount; ++i) {
    if (name == kFormats[i].name) return static_cast<Format>(i);
    names.emplace_back(kFormats[i].name);
  }
  throw py::value_error("format '" + name + "' is unknown; use one of: " + joined(names));
}

Activation activation_named(const std::string& name) {
  for (int i = 0; i < kActivationCount; ++i)
    if (name == kActivations[i]) return static_cast<Activation>(i);
  throw py::value_error("activation '" + name +
                        "' is unknown; use one of: " + joined(kActivations));
}

// Parameters that do not depend on the input; a scale of 0: there are none.
std::optional<StaticActivation> fixed_of(Activation activation, float scale, int zero) {
  if (scale == 0.0f && zero == 0) return std::nullopt;
  require(scale >= FLT_MIN && scale <= 1.0f / FLT_MIN,
          "activation scale " + std::to_string(scale) +
              " is not positive, or too small or too large to divide by");
  require(activation == Activation::int8 ? zero >= -128 && zero <= 127 : zero == 0,
          "activation zero point " + std::to_string(zero) +
              (activation == Activation::int8 ? " is not in -128..127"
                                              : " must be 0: the activation has none"));
  return StaticActivation{scale, zero};
}

const StaticActivation* pointer(const std::optional<StaticActivation>& fixed) {
  return fixed ? &*fixed : nullptr;
}

void call_linear(Address x, int64_t m, Address y, int format, int activation, int64_t n, int64_t k,
                 int64_t group_size, Address packed, Address scale, Address group_scale,
                 Address group_zero, Address bias, int threads, int epilogue,
                 float activation_scale, int activation_zero) {
  const Weights w = make_weights(format, n, k, group_size, packed, scale, group_scale, group_zero,
                                 bias, epilogue);
  const Activation a = activation_of(activation);
  require(m >= 0 && threads >= 1, "m >= 0 and threads >= 1 are required");
  require((x != 0 || m * k == 0) && (y != 0 || m * n == 0), "the address of x or y is 0");
  const auto fixed = fixed_of(a, activation_scale, activation_zero);
  py::gil_scoped_release release;
  linear(reinterpret_cast<const float*>(x), m, w, a, reinterpret_cast<float*>(y), threads,
         pointer(fixed));
}

py::object owned(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

bool call_bind_torch(const py::object& tensor_type, const py::object& parameter_type,
                     const py::object& float32, const py::object& get_num_threads,
                     const py::tuple& questions) {
  const int bound = bind_torch(tensor_type.ptr(), parameter_type.ptr(), float32.ptr(),
                               get_num_threads.ptr(), questions.ptr());
  if (bound < 0) throw py::error_already_set();
  return bound == 1;
}

py::object direct_linear(const py::tuple& tensors, const py::dict& settings, int format,
                         int activation, int64_t n, int64_t k, int64_t group_size, Address packed,
                         Address scale, Address group_scale, Address group_zero, Address bias,
                         int epilogue, float activation_scale, int activation_zero) {
  const Weights w = make_weights(format, n, k, group_size, packed, scale, group_scale, group_zero,
                                 bias, epilogue);
  const Activation a = activation_of(activation);
  const auto fixed = fixed_of(a, activation_scale, activation_zero);
  return owned(make_direct(w, a, pointer(fixed), tensors.ptr(), settings.ptr(), nullptr));
}

constexpr size_t kGeometrySize = 16;

Conv2dGeometry make_geometry(const std::vector<int64_t>& v, bool x_channels_last,
                             bool y_channels_last) {
  require(v.size() == kGeometrySize, "geometry has " + std::to_string(kGeometrySize) + " numbers");
  const Conv2dGeometry g{v[0],
                         v[1],
                         v[2],
                         v[3],
                         v[4],
                         v[5],
                         v[6],
                         v[7],
                         v[8],
                         v[9],
                         v[10],
                         v[11],
                         v[12],
                         v[13],
                         v[14],
                         v[15],
                         x_channels_last,
                         y_channels_last};
  for (size_t i = 0; i < 7; ++i) require(v[i] >= 0, "geometry: negative size");
  require(g.kernel_h > 0 && g.kernel_w > 0 && g.stride_h > 0 && g.stride_w > 0 &&
              g.dilation_h > 0 && g.dilation_w > 0,
          "geometry: kernel, stride and dilation must be positive");
  require(g.pad_top >= 0 && g.pad_left >= 0, "geometry: negative padding");
  require(g.groups > 0 && g.channels % g.groups == 0 && g.out_channels % g.groups == 0,
          "geometry: groups must divide the channels");
  require(!g.depthwise() || g.kernel_h * g.kernel_w <= kChunk,
          "geometry: too many taps for a depthwise convolution");
  return g;
}

void call_conv2d(Address x, Address y, const std::vector<int64_t>& geometry, int format,
                 int activation, int64_t group_size, Address packed, Address scale,
                 Address group_scale, Address group_zero, Address bias, int threads,
                 bool x_channels_last, bool y_channels_last, int epilogue, float activation_scale,
                 int activation_zero) {
  const Conv2dGeometry g = make_geometry(geometry, x_channels_last, y_channels_last);
  const Weights w =
      make_weights(format, g.out_channels, conv2d_depth(format_of(format), g), group_size, packed,
                   scale, group_scale, group_zero, bias, epilogue);
  const Activation a = activation_of(activation);
  require(threads >= 1, "threads >= 1 is required");
  const int64_t inputs = g.batch * g.height * g.width * g.channels;
  require((x != 0 || inputs == 0) &&
              (y != 0 || g.batch * g.out_height * g.out_width * g.out_channels == 0),
          "the address of x or y is 0");
  const auto fixed = fixed_of(a, activation_scale, activation_zero);
  py::gil_scoped_release release;
  conv2d(reinterpret_cast<const float*>(x), g, w, a, reinterpret_cast<float*>(y), threads,
         pointer(fixed));
}

py::object direct_conv2d(const py::tuple& tensors, const py::dict& settings,
                         const std::vector<int64_t>& geometry, int64_t pad_bottom,
                         int64_t pad_right, int format, int activation, int64_t group_size,
                         Address packed, Address scale, Address group_scale, Address group_zero,
                         Address bias, int epilogue, float activation_scale, int activation_zero) {
  require(pad_bottom >= 0 && pad_right >= 0, "negative padding");
  const DirectConv2d c{make_geometry(geometry, true, true), pad_bottom, pad_right};
  const Weights w =
      make_weights(format, c.geometry.out_channels, conv2d_depth(format_of(format), c.geometry),
                   group_size, packed, scale, group_scale, group_zero, bias, epilogue);
  const Activation a = activation_of(activation);
  const auto fixed = fixed_of(a, activation_scale, activation_zero);
  return owned(make_direct(w, a, pointer(fixed), tensors.ptr(), settings.ptr(), &c));
}

void linear_static_bias(Address out, float activation_scale, int activation_zero, int threads,
                        int format, int activation, int64_t n, int64_t k, int64_t group_size,
                        Address packed, Address scale, Address group_scale, Address group_zero,
                        Address bias) {
  const Weights w =
      make_weights(format, n, k, group_size, packed, scale, group_scale, group_zero, bias, 0);
  const auto fixed = fixed_of(activation_of(activation), activation_scale, activation_zero);
  require(fixed.has_value() && threads >= 1, "an activation scale and threads >= 1 are required");
  require(out != 0 || n == 0, "the address of the output is 0");
  py::gil_scoped_release release;
  static_bias(w, *fixed, reinterpret_cast<float*>(out), threads);
}

void conv2d_static_bias(Address out, float activation_scale, int activation_zero, int threads,
                        const std::vector<int64_t>& geometry, int format, int activation,
                        int64_t group_size, Address packed, Address scale, Address group_scale,
                        Address group_zero, Address bias) {
  const Conv2dGeometry g = make_geometry(geometry, true, true);
  const Weights w = make_weights(format, g.out_channels, conv2d_depth(format_of(format), g),
                                 group_size, packed, scale, group_scale, group_zero, bias, 0);
  const auto fixed = fixed_of(activation_of(activation), activation_scale, activation_zero);
  require(fixed.has_value() && threads >= 1, "an activation scale and threads >= 1 are required");
  require(out != 0 || g.out_channels == 0, "the address of the output is 0");
  py::gil_scoped_release release;
  static_bias(w, g, *fixed, reinterpret_cast<float*>(out), threads);
}

Codes call_pack(const Codes& codes, const std::string& format_name) {
  const Format format = format_named(format_name);
  require(codes.ndim() == 2,
          "codes must be a matrix [N, K], not of " + std::to_string(codes.ndim()) + " dimensions");
  const int64_t n = codes.shape(0), k = codes.shape(1);
  const int limit = 1 << traits(format).bits;
  const uint8_t* c = codes.data();
  const uint8_t* const wrong =
      std::find_if(c, c + n * k, [limit](uint8_t code) { return code >= limit; });
  if (wrong != c + n * k)
    throw py::value_error("code " + std::to_string(*wrong) + " does not fit " + format_name +
                          "; codes are 0.." + std::to_string(limit - 1));
  Codes packed({packed_panels(n), packed_steps(format, k), int64_t{kVectorBytes}});
  pack(c, n, k, format, packed.mutable_data());
  return packed;
}

void check_packed(const Codes& packed, Format format, int64_t n, int64_t k) {
  require(n >= 0 && k >= 0, "n and k must not be negative");
  const std::string want = "[" + std::to_string(packed_panels(n)) + ", " +
                           std::to_string(packed_steps(format, k)) + ", " +
                           std::to_string(kVectorBytes) + "]";
  require(packed.ndim() == 3 && packed.shape(0) == packed_panels(n) &&
              packed.shape(1) == packed_steps(format, k) && packed.shape(2) == kVectorBytes,
          "packed weights of " + std::to_string(n) + " x " + std::to_string(k) +
              " must have the shape " + want);
}

Codes call_unpack(const Codes& packed, const std::string& format_name, int64_t n, int64_t k) {
  const Format format = format_named(format_name);
  check_packed(packed, format, n, k);
  Codes codes({n, k});
  unpack(packed.data(), n, k, format, codes.mutable_data());
  return codes;
}

bool call_padding_is_zero(const Codes& packed, const std::string& format_name, int64_t n,
                          int64_t k) {
  const Format format = format_named(format_name);
  check_packed(packed, format, n, k);
  return padding_is_zero(packed.data(), n, k, format);
}

void call_fit_scales(Address x, Address mask, int64_t units, int64_t masks, int64_t length,
                     Address scale, int format, int low, int high, Address out, int threads) {
  const Format f = format_of(format);
  require(units >= 0 && masks >= 1 && length >= 0 && threads >= 1,
          "units, length >= 0 and masks, threads >= 1 are required");
  require(units == 0 || (scale && out && ((x && mask) || length == 0)), "an address is 0");
  py::gil_scoped_release release;
  fit_scales(reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(mask), units, masks,
             length, reinterpret_cast<const float*>(scale), f, low, high,
             reinterpret_cast<float*>(out), threads);
}

py::dict features() {
  py::dict d;
  for (int i = 0; i < kFeatureCount; ++i) d[kFeatureNames[i]] = (cpu_features() >> i & 1) != 0;
  return d;
}

py::list isa_list() {
  py::list out;
  for (const IsaInfo& info : isas()) {
    py::dict kernels;
    for (const auto& [label, format, activation] :
         {std::tuple{"w8a8", Format::int8, Activation::int8},
          {"w4a8", Format::int4, Activation::int8},
          {"w2a8", Format::int2, Activation::int8},
          {"w1a8", Format::binary, Activation::int8},
          {"w1a1", Format::binary, Activation::binary}})
      kernels[label] = kernel_name(info.name, format, activation);
    out.append(py::dict("name"_a = info.name, "usable"_a = info.usable, "kernels"_a = kernels));
  }
  return out;
}

py::dict build_info() {
#if defined(__clang__)
  const std::string compiler = "clang " __clang_version__;
#else
  const std::string compiler = "gcc " __VERSION__;
#endif
  return py::dict("compiler"_a = compiler, "build_type"_a = LOWBIT_BUILD_TYPE,
                  "version"_a = LOWBIT_VERSION, "baseline"_a = LOWBIT_BASELINE,
                  "openmp"_a = _OPENMP);
}

}  // namespace
}  // namespace lowbit

PYBIND11_MODULE(_core, m) {
  using namespace lowbit;
  if (const std::string missing = missing_baseline(); !missing.empty())
    throw py::import_error("this build of lowbit needs a CPU with " + std::string(LOWBIT_BASELINE) +
                           "; this one lacks: " + missing +
                           ". Install a build with a lower LOWBIT_CPU_BASELINE.");
  try {
    isa();  // a bad LOWBIT_MAX_ISA must be heard at once
  } catch (const std::invalid_argument& e) {
    throw py::import_error(e.what());
  }
  py::dict formats;
  for (const FormatTraits& f : kFormats) formats[f.name] = py::make_tuple(f.bits, f.mul, f.add);
  m.attr("FORMATS") = formats;
  py::tuple activations(kActivationCount);
  for (int i = 0; i < kActivationCount; ++i) activations[static_cast<size_t>(i)] = kActivations[i];
  m.attr("ACTIVATIONS") = activations;
  py::tuple epilogues(kEpilogueCount);
  for (int i = 0; i < kEpilogueCount; ++i) epilogues[static_cast<size_t>(i)] = kEpilogues[i];
  m.attr("EPILOGUES") = epilogues;
  m.attr("LAYOUT_VERSION") = kLayoutVersion;

  m.def("cpu_features", &features);
  m.def("isas", &isa_list);
  m.def("isa", &isa);
  m.def("set_isa", &set_isa, "name"_a);
  m.def(
      "kernel_name",
      [](const std::string& format, const std::string& activation) {
        return kernel_name(format_named(format), activation_named(activation));
      },
      "format"_a, "activation"_a);
  m.def("build_info", &build_info);
  // Not its address, which would have to be known when the extension is loaded.
  m.def("openmp_threads", [] { return omp_get_max_threads(); });

  m.def("pack", &call_pack, "codes"_a.noconvert(), "format"_a);
  m.def("unpack", &call_unpack, "packed"_a.noconvert(), "format"_a, "n"_a, "k"_a);
  m.def("padding_is_zero", &call_padding_is_zero, "packed"_a.noconvert(), "format"_a, "n"_a, "k"_a);
  m.def(
      "tap_channels",
      [](const std::string& format, int64_t channels) {
        return tap_channels(format_named(format), channels);
      },
      "format"_a, "channels_per_group"_a);
  m.def("conv2d_blocks", &conv2d_blocks, "out_channels"_a, "groups"_a);

  m.def(
      "move_to_huge_pages",
      [](uintptr_t memory, size_t bytes) {
        py::gil_scoped_release release;
        return move_to_huge_pages(reinterpret_cast<const void*>(memory), bytes);
      },
      "memory"_a, "bytes"_a);

  m.def("linear", &call_linear, "x"_a, "m"_a, "y"_a, "format"_a, "activation"_a, "n"_a, "k"_a,
        "group_size"_a, "packed"_a, "scale"_a, "group_scale"_a, "group_zero"_a, "bias"_a,
        "threads"_a, "epilogue"_a = 0, "activation_scale"_a = 0.0f, "activation_zero"_a = 0);
  m.def("conv2d", &call_conv2d, "x"_a, "y"_a, "geometry"_a, "format"_a, "activation"_a,
        "group_size"_a, "packed"_a, "scale"_a, "group_scale"_a, "group_zero"_a, "bias"_a,
        "threads"_a, "x_channels_last"_a = true, "y_channels_last"_a = true, "epilogue"_a = 0,
        "activation_scale"_a = 0.0f, "activation_zero"_a = 0);
  m.def("linear_static_bias", &linear_static_bias, "out"_a, "activation_scale"_a,
        "activation_zero"_a, "threads"_a, "format"_a, "activation"_a, "n"_a, "k"_a, "group_size"_a,
        "packed"_a, "scale"_a, "group_scale"_a, "group_zero"_a, "bias"_a);
  m.def("conv2d_static_bias", &conv2d_static_bias, "out"_a, "activation_scale"_a,
        "activation_zero"_a, "threads"_a, "geometry"_a, "format"_a, "activation"_a, "group_size"_a,
        "packed"_a, "scale"_a, "group_scale"_a, "group_zero"_a, "bias"_a);

  m.def("bind_torch", &call_bind_torch, "tensor_type"_a, "parameter_type"_a, "float32"_a,
        "get_num_threads"_a, "questions"_a);
  m.def("direct_linear", &direct_linear, "tensors"_a, "settings"_a, "format"_a, "activation"_a,
        "n"_a, "k"_a, "group_size"_a, "packed"_a, "scale"_a, "group_scale"_a, "group_zero"_a,
        "bias"_a, "epilogue"_a = 0, "activation_scale"_a = 0.0f, "activation_zero"_a = 0);
  m.def("direct_conv2d", &direct_conv2d, "tensors"_a, "settings"_a, "geometry"_a, "pad_bottom"_a,
        "pad_right"_a, "format"_a, "activation"_a, "group_size"_a, "packed"_a, "scale"_a,
        "group_scale"_a, "group_zero"_a, "bias"_a, "epilogue"_a = 0, "activation_scale"_a = 0.0f,
        "activation_zero"_a = 0);

  m.def("fit_scales", &call_fit_scales, "x"_a, "mask"_a, "units"_a, "masks"_a, "length"_a,
        "scale"_a, "format"_a, "low"_a, "high"_a, "out"_a, "threads"_a);

  bind_program(m);

  m.def("probe", &probe, "what"_a, "seconds"_a, py::call_guard<py::gil_scoped_release>());
  m.def("read_bandwidth", &read_bandwidth, "bytes"_a, "threads"_a, "seconds"_a,
        py::call_guard<py::gil_scoped_release>());
}
