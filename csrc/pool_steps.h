// Steps of a program that join the pixels of a window: the largest code, or the mean.
#pragma once

#include "code_steps.h"

namespace lowbit {

std::unique_ptr<Executor> make_pool(const Kernel& kernel, const StepPlan& plan);

}  // namespace lowbit
