#include "cuda/kernels_inl.cuh"

template struct fusedrnn::Kernels<double>;
