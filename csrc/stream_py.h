// Stream as Python sees it: torch tensors and numpy arrays, with no dispatcher on the way.
#pragma once

#include <pybind11/pybind11.h>

namespace fusedrnn {

void define_stream(pybind11::module_& m);

}  // namespace fusedrnn
