#include "cuda/persistent_inl.cuh"

template struct fusedrnn::PersistentBackward<fusedrnn::BFloat16>;
