// What bindings.cpp calls in cuda.cu, in extensions built with CUDA. Raw device pointers; shapes and dtypes are checked
// by fastsmc/ops, which also makes the device torch's current one. Nobody checks values: kernels skip what is not
// valid. Errors of the runtime are thrown.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "fastsmc/philox.cuh"
#include "fastsmc/reindex.cuh"
#include "fastsmc/resample.cuh"

namespace fastsmc::cuda {

struct Place {
  int device;
  void* stream;  // cudaStream_t
};

// out: (n,). What `of` has addresses of is read when the kernel runs.
void uniforms(Place place, double* out, int64_t n, const UniformGroups& of);

// Bytes of device memory that resample() needs for groups of at most n particles; 0 where shared memory is enough.
size_t resample_memory(int device, int64_t n);

void resample(Place place, const ResamplingGroups& all, void* memory);

void reindex(Place place, const Reindexing& r, const std::vector<BlockCache>& caches);

}  // namespace fastsmc::cuda
