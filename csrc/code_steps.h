// Steps of a program that compute pixel by pixel or move codes: all but convolutions and pools.
#pragma once

#include <memory>

#include "step.h"

namespace lowbit {

// A step with its values and where they lie.
struct StepPlan {
  const Step& step;
  std::vector<CodeValue> from;
  std::vector<CodeMap> from_maps;
  CodeValue to;  // not of dequantize
  CodeMap to_map;
};

std::unique_ptr<Executor> make_code_step(const Kernel& kernel, const StepPlan& plan);

// The 256 codes that `to` has for those of `from`.
std::vector<int8_t> conversion_table(const Kernel& kernel, const CodeValue& from,
                                     const CodeValue& to);

}  // namespace lowbit
