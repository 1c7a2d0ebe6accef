#include "cuda/persistent_inl.cuh"

template struct fusedrnn::PersistentBackward<float>;
