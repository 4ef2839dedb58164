// team: how a parallel algorithm is written once, for a block of threads, for a whole grid, and for the host.
//
// An algorithm is a sequence of phases. team.each(count, f) runs f(0) … f(count − 1), spread over the team's threads in
// no order at all, and ends with a barrier: what a phase wrote, the next one may read, and within a phase no call may
// read what another writes. Nothing of a call survives it but what it stored in arrays. So the host can run the very
// same phases as loops, also in a shuffled order, where a missing barrier shows as a wrong answer. Only what stands
// between two phases does not show there: every thread runs it, so it may read what the phase before wrote, but nothing
// that the next phase writes, and must store nothing.
//
// What a call is numbered by is a *lane*: a run of consecutive elements. Lanes are a function of the number of elements
// alone; so floating-point sums, formed per lane and then over lanes in order, are the same on a team of any kind.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#include <cooperative_groups.h>
#else
#include <algorithm>
#include <numeric>
#include <random>
#include <vector>
#endif

#include "hd.cuh"

namespace fastsmc {

using u64 = uint64_t;

#ifdef __CUDACC__
// The threads of one block.
struct BlockTeam {
  template <typename F>
  __device__ void each(int count, F f) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) f(i);
    __syncthreads();
  }
};

// All threads of a cooperative launch.
struct GridTeam {
  template <typename F>
  __device__ void each(int count, F f) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) f(i);
    cooperative_groups::this_grid().sync();
  }
};
#else
// The calling thread: the CPU backend.
struct OneThread {
  template <typename F>
  void each(int count, F f) {
    for (int i = 0; i < count; ++i) f(i);
  }
};

// `size` threads, run one after the other in an order that each phase draws anew: for tests.
struct ShuffledTeam {
  int size;
  std::mt19937_64 random;
  ShuffledTeam(int size, u64 seed) : size(size), random(seed) {}
  template <typename F>
  void each(int count, F f) {
    std::vector<int> threads(std::min(size, count));
    std::iota(threads.begin(), threads.end(), 0);
    std::shuffle(threads.begin(), threads.end(), random);
    for (const int thread : threads)
      for (int i = thread; i < count; i += size) f(i);
  }
};
#endif

// ++*p from any lane of a phase.
FASTSMC_HD inline void count_one(int64_t* p) {
#ifdef __CUDA_ARCH__
  atomicAdd(reinterpret_cast<unsigned long long*>(p), 1ull);
#else
  ++*p;
#endif
}

// How n elements are cut: lane l has elements [first(l), last(l)), groups of `span` lanes are summed by one thread.
// 1024 lanes up to 16,384 elements, which is what a block does.
struct Lanes {
  int64_t n;
  int length, count, span, groups;

  FASTSMC_HD explicit Lanes(int64_t n) : n(n) {
    length = n >= 16384 ? 16 : n > 1024 ? static_cast<int>((n + 1023) / 1024) : 1;
    count = static_cast<int>((n + length - 1) / length);
    span = count <= 1024 ? 32 : 256;
    groups = (count + span - 1) / span;
  }
  FASTSMC_HD int64_t first(int lane) const { return static_cast<int64_t>(lane) * length; }
  FASTSMC_HD int64_t last(int lane) const { return first(lane) + length < n ? first(lane) + length : n; }
  // Where a lane's value is in an array of size() values: a gap every 32, or all threads of `scan` would meet in one
  // bank of shared memory.
  FASTSMC_HD int at(int lane) const { return lane + lane / 32; }
  FASTSMC_HD int size() const { return at(count - 1) + 1; }
  // The most lanes that any number of elements up to n is cut into.
  FASTSMC_HD static int most(int64_t n) {
    return n <= 1024 ? static_cast<int>(n) : n <= 16384 ? 1024 : static_cast<int>((n + 15) / 16);
  }
};

// Exclusive prefix sums over lanes in two phases, after one that wrote values[at(lane)] for every lane:
//
//   team.each(lanes.groups, [&](int g) { scan.within(g); });      sums within each group, in place
//   team.each(lanes.groups + 1, [&](int g) { scan.across(g); });  sums over the groups before each one
//
// Then before(lane) is the sum over the lanes before, total() that of all.
struct Scan {
  Lanes lanes;
  u64* values;  // lanes.size()
  u64* groups;  // 2·lanes.groups + 1: totals of groups, then the sums before each

  FASTSMC_HD void within(int group) const {
    constexpr int kBatch = 8;  // loads in flight: the sums wait for each other, the loads need not
    const int begin = group * lanes.span, end = begin + lanes.span < lanes.count ? begin + lanes.span : lanes.count;
    u64 sum = 0, batch[kBatch];
    for (int lane = begin; lane < end; lane += kBatch) {
#pragma unroll
      for (int k = 0; k < kBatch; ++k) batch[k] = lane + k < end ? values[lanes.at(lane + k)] : 0;
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (lane + k < end) values[lanes.at(lane + k)] = sum;
        sum += batch[k];
      }
    }
    groups[group] = sum;
  }
  FASTSMC_HD void across(int group) const {
    u64 sum = 0;
    for (int g = 0; g < group; ++g) sum += groups[g];
    groups[lanes.groups + group] = sum;
  }
  FASTSMC_HD u64 before(int lane) const { return groups[lanes.groups + lane / lanes.span] + values[lanes.at(lane)]; }
  FASTSMC_HD u64 total() const { return groups[2 * lanes.groups]; }

  template <typename Team>
  FASTSMC_HD void run(Team& team) const {
    const Scan scan = *this;
    team.each(lanes.groups, [=](int group) { scan.within(group); });
    team.each(lanes.groups + 1, [=](int group) { scan.across(group); });
  }
};

}  // namespace fastsmc
