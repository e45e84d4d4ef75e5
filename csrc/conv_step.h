// The conv step of a program: a convolution (or a linear layer) from codes to codes or floats.
#pragma once

#include <memory>

#include "step.h"

namespace lowbit {

// What a conv step is made for: its values and where they lie.
struct ConvPlan {
  const Step& step;
  CodeValue x;
  CodeMap from;
  const CodeValue* to;  // null where the output is float
  CodeMap into;
  const CodeValue* residual;  // or null
  CodeMap added;
};

std::unique_ptr<Executor> make_conv(const Kernel& kernel, const ConvPlan& plan);

}  // namespace lowbit
