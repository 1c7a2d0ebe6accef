#include "cuda/one_cta_inl.cuh"

template struct fusedrnn::OneCtaKernels<float>;
