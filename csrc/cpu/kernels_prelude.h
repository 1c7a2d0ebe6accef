// Every header from outside an instruction set's namespace that the *_inl.h files need: included
// before a target region opens, so that nothing inside them is compiled for that set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
  #include <immintrin.h>
#endif

#include "cpu/isa.h"
#include "cpu/team.h"
#include "cpu/walk.h"
#include "recurrence.h"
#include "tangents.h"
