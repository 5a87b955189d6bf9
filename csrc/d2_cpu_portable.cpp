// The row kernels for one instruction set; setup.py gives this file its compiler flags.
#include "d2_cpu_kernels.h"

const r2d2::Kernels r2d2::kPortable{"portable", r2d2::step_rows, r2d2::predict_row};
