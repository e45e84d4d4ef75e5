// Where the values of a program lie: their borders, their pitch, and memory that those share which
// do not live at the same time.
#pragma once

#include "step.h"

namespace lowbit {

// Places every value; returns the bytes of all.
int64_t plan_arena(const std::vector<CodeValue>& values, const std::vector<Step>& steps,
                   std::vector<CodeMap>& maps);

}  // namespace lowbit
