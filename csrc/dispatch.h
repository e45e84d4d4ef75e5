// Which kernel runs: the first row of isas.inc that the CPU supports, at or below LOWBIT_MAX_ISA.
#pragma once

#include "kernel.h"

namespace lowbit {

const Kernel&
kernel();  // throws std::invalid_argument where LOWBIT_MAX_ISA is unknown or unsupported

}  // namespace lowbit
