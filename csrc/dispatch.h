// Which compiled copy of the row kernels this processor runs.
#pragma once

#include <vector>

#include "d2_cpu.h"

namespace r2d2 {

// The copies that run here, the best first; the portable one is always last.
const std::vector<const Kernels*>& runnable_kernels();

const Kernels& best_kernels();

// Use the copy of that name from now on (tests and benchmarks); false if there is none that runs here.
bool use_kernels(const char* name);

}  // namespace r2d2
