#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu.h"
#include "lowbit.h"

namespace lowbit {

#define LOWBIT_ISA(name, arch, features, flags) extern const Kernel kKernel_##name;
#include "built_isas.inc"
#undef LOWBIT_ISA

namespace {

struct Row {
  const char* name;
  uint32_t features;
  const Kernel* kernel;

  bool usable() const { return (cpu_features() & features) == features; }
};

const Row kRows[] = {
#define LOWBIT_ISA(name, arch, features, flags) {#name, features, &kKernel_##name},
#include "built_isas.inc"
#undef LOWBIT_ISA
};

// Names that are not built in here but exist elsewhere still get a precise message.
const char* const kKnown[] = {
#define LOWBIT_ISA(name, arch, features, flags) #name,
#include "isas.inc"
#undef LOWBIT_ISA
};

std::string names(bool usable_only) {
  std::string s;
  for (const Row& row : kRows)
    if (!usable_only || row.usable()) s += (s.empty() ? "" : ", ") + std::string(row.name);
  return s;
}

const Row& find(const std::string& name, const std::string& origin) {
  for (const Row& row : kRows) {
    if (name != row.name) continue;
    if (row.usable()) return row;
    throw std::invalid_argument(origin + " '" + name +
                                "' is not supported by this CPU; usable here: " + names(true));
  }
  for (const char* known : kKnown)
    if (name == known)
      throw std::invalid_argument(origin + " '" + name +
                                  "' is not built into this extension; built in: " + names(false));
  throw std::invalid_argument(origin + " '" + name + "' is unknown; usable here: " + names(true));
}

const Row* first() {
  if (const char* max = std::getenv("LOWBIT_MAX_ISA"); max && *max)
    return &find(max, "LOWBIT_MAX_ISA");
  for (const Row& row : kRows)
    if (row.usable()) return &row;
  throw std::invalid_argument("no kernel in this extension runs on this CPU; built in: " +
                              names(false));
}

std::atomic<const Row*>& chosen() {
  static std::atomic<const Row*> row{first()};
  return row;
}

std::string name_of(const Kernel& k, Format format, Activation activation) {
  const FormatTraits& t = traits(format);
  const bool xnor = t.bits == 1 && activation == Activation::binary;
  const std::string tile = std::to_string(k.mr) + "x" + std::to_string(k.nr);
  const std::string op = xnor ? "xnor_w1a1"
                              : "gemm_w" + std::to_string(t.bits) + "a" +
                                    (activation == Activation::int16 ? "16" : "8");
  return op + "_" + tile + "_" + k.name;
}

}  // namespace

const Kernel& kernel() { return *chosen().load(std::memory_order_acquire)->kernel; }

std::vector<IsaInfo> isas() {
  std::vector<IsaInfo> out;
  for (const Row& row : kRows) out.push_back({row.name, row.usable()});
  return out;
}

std::string isa() { return chosen().load()->name; }

void set_isa(const std::string& name) { chosen().store(&find(name, "isa")); }

std::string kernel_name(Format format, Activation activation) {
  return name_of(kernel(), format, activation);
}

std::string kernel_name(const std::string& isa, Format format, Activation activation) {
  for (const Row& row : kRows)
    if (isa == row.name) return name_of(*row.kernel, format, activation);
  throw std::invalid_argument("isa '" + isa + "' is unknown; built in: " + names(false));
}

}  // namespace lowbit
