// The CUDA backend: kernels around the algorithms of include/fastsmc, and their launchers. Nothing here waits for the
// device or allocates, so every launcher may be captured in a CUDA graph. The runtime is linked statically: the module
// can be imported without a driver, and only its calls then fail.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda.hpp"
#include "fastsmc/philox.cuh"

namespace fastsmc::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it has been reported, the next call starts clean
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error) + " (error " +
                           std::to_string(static_cast<int>(error)) + ")");
}

// Makes a device current for the static runtime; the caller has made it torch's current one.
void use(int device) { check(cudaSetDevice(device), "cudaSetDevice"); }

int attribute(cudaDeviceAttr which, int device) {
  int value;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

template <typename Kernel, typename... Args>
void launch(const char* name, Kernel kernel, dim3 grid, int threads, size_t shared, Place place, Args... args) {
  void* pointers[] = {&args...};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(threads), pointers, shared,
                         static_cast<cudaStream_t>(place.stream)),
        name);
}

}  // namespace

// -- uniforms ---------------------------------------------------------------------------------------------------------
__global__ void uniforms_kernel(double* out, int64_t n, UniformGroups of) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i >= n) return;
  const int64_t g = of.group_at(i);
  out[i] = uniform(of.key(g), static_cast<uint32_t>(i - of.begin(g)));
}

void uniforms(Place place, double* out, int64_t n, const UniformGroups& of) {
  constexpr int kThreads = 128;
  use(place.device);
  if (n == 0 || of.n_groups == 0) return;
  launch("uniforms", uniforms_kernel, dim3(static_cast<unsigned>((n + kThreads - 1) / kThreads)), kThreads, 0, place,
         out, n, of);
}

// -- resample ---------------------------------------------------------------------------------------------------------
constexpr int64_t kMostInBlock = 16384;  // a group of more particles takes the whole grid
// 1024 threads would have 64 registers each, and spill. Results do not depend on how many threads there are.
constexpr int kBlockThreads = 512, kGridThreads = 256;

// One block per group.
__global__ void __launch_bounds__(kBlockThreads, 1) resample_block_kernel(ResamplingGroups all) {
  extern __shared__ u64 memory[];
  BlockTeam team;
  resample(team, all.group(blockIdx.x), memory);
}

// All blocks of a cooperative launch, one group after the other.
__global__ void __launch_bounds__(kGridThreads, 1) resample_grid_kernel(ResamplingGroups all, u64* memory) {
  GridTeam team;
  for (int64_t g = 0; g < all.groups; ++g) resample(team, all.group(g), memory);
}

namespace {
size_t resample_bytes(int64_t n) { return sizeof(u64) * ResampleScratch::words(n); }

bool fits_block(int device, int64_t n) {
  return n <= kMostInBlock &&
         resample_bytes(n) <= static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
}
}  // namespace

size_t resample_memory(int device, int64_t n) { return fits_block(device, n) ? 0 : resample_bytes(n); }

void resample(Place place, const ResamplingGroups& all, void* memory) {
  use(place.device);
  const int64_t n = all.first.n;
  const int lanes = all.offsets ? Lanes::most(n) : Lanes(n).count;
  if (fits_block(place.device, n)) {
    // the same for every group size: other threads may be launching, too
    const int most = std::min(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, place.device),
                              static_cast<int>(resample_bytes(kMostInBlock)));
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(resample_block_kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, most),
          "resample: shared memory");
    launch("resample", resample_block_kernel, dim3(static_cast<unsigned>(all.groups)),
           std::min(kBlockThreads, (lanes + 31) / 32 * 32), resample_bytes(n), place, all);
    return;
  }
  int per_processor;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, resample_grid_kernel, kGridThreads, 0),
        "resample: occupancy");
  const int blocks = std::min(per_processor * attribute(cudaDevAttrMultiProcessorCount, place.device),
                              (lanes + kGridThreads - 1) / kGridThreads);
  ResamplingGroups parameters = all;
  void* pointers[] = {&parameters, &memory};
  check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(resample_grid_kernel), dim3(blocks),
                                    dim3(kGridThreads), pointers, 0, static_cast<cudaStream_t>(place.stream)),
        "resample");
}

// -- reindex ----------------------------------------------------------------------------------------------------------
// Caches travel as kernel parameters, which hold 32 KiB: nothing need be copied to the device, and a captured graph
// keeps its own. There are two sizes because a launch pays for all of its parameters, used or not.
constexpr int kFewCaches = 64, kMostCaches = 512;
template <int most>
struct Caches {
  BlockCache cache[most];
};

constexpr int kCopyThreads = 256;

// Block (x, y): row x, caches y, y + gridDim.y, …
template <int most>
__global__ void __launch_bounds__(kCopyThreads)
    reindex_kernel(Reindexing r, const __grid_constant__ Caches<most> caches, int n_caches) {
  reindex_row(r, caches.cache, n_caches, blockIdx.x, blockIdx.y, gridDim.y, threadIdx.x, blockDim.x);
}

template <int most>
void launch_reindex(Place place, const Reindexing& r, const std::vector<BlockCache>& caches) {
  Caches<most> parameters{};
  std::copy(caches.begin(), caches.end(), parameters.cache);
  const int n_caches = static_cast<int>(caches.size());
  // Enough blocks to fill the device when few rows move, few enough that rows that stay cost little.
  const int64_t enough = 32 * attribute(cudaDevAttrMultiProcessorCount, place.device);
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(n_caches, (enough + r.n - 1) / r.n));
  launch("reindex", reindex_kernel<most>, dim3(static_cast<unsigned>(r.n), static_cast<unsigned>(parts)), kCopyThreads,
         0, place, r, parameters, n_caches);
}

void reindex(Place place, const Reindexing& r, const std::vector<BlockCache>& caches) {
  if (caches.size() > kMostCaches)
    throw std::invalid_argument("caches: " + std::to_string(caches.size()) + " tensors, at most " +
                                std::to_string(kMostCaches) + " are supported");
  use(place.device);
  if (r.n == 0) return;
  if (caches.size() <= kFewCaches) launch_reindex<kFewCaches>(place, r, caches);
  else launch_reindex<kMostCaches>(place, r, caches);
}

}  // namespace fastsmc::cuda
