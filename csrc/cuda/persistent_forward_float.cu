#include "cuda/persistent_inl.cuh"

template struct fusedrnn::PersistentForward<float>;
