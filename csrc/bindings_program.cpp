// pybind11 of programs: dictionaries to steps, as bindings.cpp.
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "bindings.h"
#include "program.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace lowbit {
namespace {

using Pair = std::array<int64_t, 2>;
using Port = std::tuple<Address, bool>;

// The keys of a step; what is missing or of another type is a ValueError that says where.
class Fields {
 public:
  Fields(const py::dict& fields, size_t index)
      : fields_(fields), where_("step " + std::to_string(index)) {
    op_ = get<std::string>("op");
    where_ += " (" + op_ + ")";
  }

  const std::string& op() const { return op_; }
  const std::string& where() const { return where_; }
  bool has(const char* key) const { return fields_.contains(key) && !fields_[key].is_none(); }

  template <class T>
  T get(const char* key) const {
    require(has(key), where_ + ": '" + key + "' is missing");
    return cast<T>(fields_[key], key);
  }
  template <class T>
  T get(const char* key, T otherwise) const {
    return has(key) ? cast<T>(fields_[key], key) : otherwise;
  }

 private:
  template <class T, class Object>
  T cast(const Object& object, const char* key) const {
    try {
      return py::cast<T>(py::object(object));
    } catch (const py::cast_error&) {
      throw py::value_error(where_ + ": '" + key + "' is of the wrong kind");
    }
  }

  const py::dict fields_;
  std::string where_, op_;
};

std::vector<int8_t> codes_of(const std::string& bytes) { return {bytes.begin(), bytes.end()}; }

void set_window(const Fields& f, Conv2dGeometry& g) {
  const Pair kernel = f.get<Pair>("kernel"), stride = f.get<Pair>("stride"),
             padding = f.get<Pair>("padding"), dilation = f.get<Pair>("dilation", {1, 1});
  g.kernel_h = kernel[0], g.kernel_w = kernel[1];
  g.stride_h = stride[0], g.stride_w = stride[1];
  g.pad_top = padding[0], g.pad_left = padding[1];
  g.dilation_h = dilation[0], g.dilation_w = dilation[1];
}

Epilogue epilogue_of(const Fields& f) {
  const auto name = f.get<std::string>("epilogue", "none");
  for (int i = 0; i < kEpilogueCount; ++i)
    if (name == kEpilogues[i]) return static_cast<Epilogue>(i);
  throw py::value_error(f.where() + ": epilogue '" + name + "' is unknown");
}

void set_conv(const Fields& f, const std::vector<CodeValue>& values, Step& step) {
  const auto v = f.get<std::array<int64_t, 10>>("geometry");
  Conv2dGeometry& g = step.geometry;
  g = {};
  g.batch = 1;
  g.out_channels = v[0];
  g.kernel_h = v[1], g.kernel_w = v[2], g.stride_h = v[3], g.stride_w = v[4];
  g.pad_top = v[5], g.pad_left = v[6], g.dilation_h = v[7], g.dilation_w = v[8];
  g.groups = v[9];
  require(g.groups >= 1, f.where() + ": groups must be positive");
  const auto value = [&](int i) -> const CodeValue& {
    require(i >= 0 && static_cast<size_t>(i) < values.size(),
            f.where() + ": there is no value " + std::to_string(i));
    return values[static_cast<size_t>(i)];
  };
  const CodeValue& x = value(step.from[0]);
  g.channels = x.channels, g.height = x.height, g.width = x.width;
  g.out_height = step.to >= 0 ? value(step.to).height : f.get<int64_t>("out_height");
  g.out_width = step.to >= 0 ? value(step.to).width : f.get<int64_t>("out_width");

  const auto w = f.get<std::array<uintptr_t, 8>>("weight");
  const auto epilogue = f.has("table") ? Epilogue::none : epilogue_of(f);
  require(w[0] < kFormatCount && w[1] < kActivationCount && w[2] < (1u << 30),
          f.where() + ": the weight has an unknown format, activation or group_size");
  const Format format = format_of(static_cast<int>(w[0]));
  require(g.channels >= 1 && g.kernel_h >= 1 && g.kernel_w >= 1 && g.kernel_h <= kChunk &&
              g.kernel_w <= kChunk && g.out_channels >= 1 && g.channels % g.groups == 0 &&
              g.out_channels % g.groups == 0,
          f.where() + ": the geometry is impossible");
  step.activation = activation_of(static_cast<int>(w[1]));
  step.weights = make_weights(static_cast<int>(w[0]), g.out_channels, conv2d_depth(format, g),
                              static_cast<int64_t>(w[2]), w[3], w[4], w[5], w[6], w[7],
                              static_cast<int>(epilogue));
  step.residual = f.get("residual", -1);
  if (!f.has("table")) return;
  const auto [inverse, first, codes] = f.get<std::tuple<float, int, py::bytes>>("table");
  step.has_table = true;
  step.table_inverse = inverse;
  step.table_first = first;
  step.table = codes_of(codes);
}

Step make_step(const py::dict& fields, size_t index, const std::vector<CodeValue>& values) {
  const Fields f(fields, index);
  Step step;
  int op = 0;
  while (op < kStepOpCount && f.op() != kStepOps[op]) ++op;
  require(op < kStepOpCount, f.where() + ": this operation is unknown");
  step.op = static_cast<StepOp>(op);
  step.to = f.get("to", -1);
  if (step.op == StepOp::quantize)
    step.port = f.get<int64_t>("input");
  else
    step.port = f.get<int64_t>("output", -1);
  if (step.op == StepOp::add || step.op == StepOp::mul)
    step.from = {f.get<int>("a"), f.get<int>("b")};
  else if (step.op == StepOp::concat)
    step.from = f.get<std::vector<int>>("xs");
  else if (step.op != StepOp::quantize)
    step.from = {f.get<int>("x")};
  switch (step.op) {
    case StepOp::conv:
      set_conv(f, values, step);
      break;
    case StepOp::add:
      step.weights.epilogue = epilogue_of(f);
      break;
    case StepOp::lut:
      step.table = codes_of(f.get<py::bytes>("table"));
      break;
    case StepOp::max_pool:
    case StepOp::avg_pool:
      set_window(f, step.geometry);
      step.include_pad = f.get("include_pad", true);
      break;
    case StepOp::pad:
      step.top = f.get<int64_t>("top"), step.left = f.get<int64_t>("left");
      step.code = f.get<int>("code");
      break;
    default:
      break;
  }
  return step;
}

using Values = std::vector<std::tuple<int64_t, int64_t, int64_t, float, int>>;

std::unique_ptr<Program> make_program(const Values& values, const std::vector<py::dict>& steps) {
  std::vector<CodeValue> v;
  for (const auto& [channels, height, width, scale, zero] : values)
    v.push_back({channels, height, width, scale, zero});
  std::vector<Step> s;
  for (size_t i = 0; i < steps.size(); ++i) s.push_back(make_step(steps[i], i, v));
  return std::make_unique<Program>(std::move(v), std::move(s));
}

// Runs a program; `seconds` as of Program::run.
void run(const Program& program, const std::vector<Port>& inputs, const std::vector<Port>& outputs,
         int64_t batch, int threads, double* seconds) {
  const auto images = [&](const std::vector<Port>& ports, int64_t want, const char* what) {
    require(static_cast<int64_t>(ports.size()) == want, "the program has " + std::to_string(want) +
                                                            " " + what + ", not " +
                                                            std::to_string(ports.size()));
    std::vector<FloatImages> out;
    for (const auto& [address, channels_last] : ports) {
      require(address != 0 || batch == 0, std::string("an address of the ") + what + " is 0");
      out.push_back({reinterpret_cast<float*>(address), channels_last});
    }
    return out;
  };
  require(batch >= 0 && threads >= 1, "batch >= 0 and threads >= 1 are required");
  const std::vector<FloatImages> in = images(inputs, program.inputs(), "inputs"),
                                 out = images(outputs, program.outputs(), "outputs");
  py::gil_scoped_release release;
  program.run(in.data(), out.data(), batch, threads, seconds);
}

py::list profile(const Program& program, const std::vector<Port>& inputs,
                 const std::vector<Port>& outputs, int64_t batch, int threads) {
  std::vector<double> seconds(program.steps().size(), 0.0);
  run(program, inputs, outputs, batch, threads, seconds.data());
  py::list times;
  for (size_t i = 0; i < seconds.size(); ++i)
    times.append(py::make_tuple(kStepOps[static_cast<int>(program.steps()[i].op)], seconds[i]));
  return times;
}

}  // namespace

void bind_program(py::module_& m) {
  py::class_<Program>(m, "Program")
      .def(py::init(&make_program), "values"_a, "steps"_a)
      .def(
          "run",
          [](const Program& p, const std::vector<Port>& inputs, const std::vector<Port>& outputs,
             int64_t batch, int threads) { run(p, inputs, outputs, batch, threads, nullptr); },
          "inputs"_a, "outputs"_a, "batch"_a, "threads"_a)
      .def("profile", &profile, "inputs"_a, "outputs"_a, "batch"_a, "threads"_a)
      .def_property_readonly("arena_bytes", &Program::arena_bytes);
}

}  // namespace lowbit
