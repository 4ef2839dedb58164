// FASTSMC_HD marks what runs on host and device: the arithmetic that g++ builds into the CPU path and nvcc into the
// GPU's.
#pragma once

#ifdef __CUDACC__
#define FASTSMC_HD __host__ __device__
#else
#define FASTSMC_HD
#endif
