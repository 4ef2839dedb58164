// What bindings.cpp calls in cuda.cu, in extensions built with CUDA. Raw device pointers; shapes and dtypes are checked
// by fastsmc/ops, which also makes the device torch's current one. Nobody checks values: kernels skip what is not
// valid. Errors of the runtime are thrown.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "fastsmc/reindex.cuh"
#include "fastsmc/resample.cuh"

namespace fastsmc::cuda {

struct Place {
  int device;
  void* stream;  // cudaStream_t
};

// out: (n,). step is read from step_at, if that is not null, when the kernel runs.
void uniforms(Place place, double* out, int64_t n, uint64_t seed, uint32_t group, int64_t step, const int64_t* step_at,
              uint32_t stream);

// Bytes of device memory that resample() needs; 0 where shared memory is enough.
size_t resample_memory(int device, int64_t n);

void resample(Place place, const Resampling& first, int64_t groups, void* memory);

void reindex(Place place, const Reindexing& r, const std::vector<BlockCache>& caches);

}  // namespace fastsmc::cuda
