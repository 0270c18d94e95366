// The CUDA ops as Python sees them; called by the module that holds them.
#pragma once

#include <pybind11/pybind11.h>

namespace sdw {

void bind_cuda(pybind11::module_& m);

}  // namespace sdw
