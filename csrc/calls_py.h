// The everyday calls as Python makes them.
#pragma once

#include <pybind11/pybind11.h>

namespace fusedrnn {

void define_calls(pybind11::module_& m);

}  // namespace fusedrnn
