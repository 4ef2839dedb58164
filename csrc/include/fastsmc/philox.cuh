// uniforms: counter-based random numbers, Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as
// 1, 2, 3"). A number depends on (seed, group, step, stream, particle) and on nothing else, so it does not change with
// batch position, other requests, the number of threads or the device.
//
//   key     = (low, high 32 bits of seed)
//   counter = (particle, step, group, stream)
//
// Test vector: key 0, counter 0 -> 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
#pragma once
#include <cstdint>

#include "hd.cuh"

namespace fastsmc {

struct Philox4 {
  uint32_t word[4];
};

FASTSMC_HD inline Philox4 philox4x32_10(Philox4 counter, uint32_t key0, uint32_t key1) {
  uint32_t* c = counter.word;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c[0];
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c[2];
    const uint32_t next0 = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ key0;
    const uint32_t next2 = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ key1;
    c[0] = next0;
    c[1] = static_cast<uint32_t>(p1);
    c[2] = next2;
    c[3] = static_cast<uint32_t>(p0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// 53 bits of two words as a double in [0, 1 - 2^-53]: exact, so never 1.
FASTSMC_HD inline double unit_double(uint32_t high, uint32_t low) {
  const uint64_t bits = (static_cast<uint64_t>(high) << 21) | (low >> 11);
  return static_cast<double>(bits) * 0x1p-53;
}

struct UniformKey {
  uint64_t seed;
  uint32_t group, step, stream;
};

FASTSMC_HD inline double uniform(const UniformKey& key, uint32_t particle) {
  const Philox4 r = philox4x32_10({{particle, key.step, key.group, key.stream}}, static_cast<uint32_t>(key.seed),
                                  static_cast<uint32_t>(key.seed >> 32));
  return unit_double(r.word[0], r.word[1]);
}

// Groups whose particles are laid flat: group g has the places [offsets[g], offsets[g + 1]). Without offsets there is
// one group, which has them all. Seed, group and step of group g are seeds[g], groups[g] and steps[g], or where an
// address is null what `common` says.
struct UniformGroups {
  UniformKey common;
  const int64_t *seeds, *groups, *steps, *offsets;
  int64_t n_groups;

  FASTSMC_HD UniformKey key(int64_t g) const {
    return {seeds ? static_cast<uint64_t>(seeds[g]) : common.seed,
            groups ? static_cast<uint32_t>(groups[g]) : common.group,
            steps ? static_cast<uint32_t>(steps[g]) : common.step, common.stream};
  }
  // The last group that does not begin behind a place: empty groups, which begin there too, come before it.
  FASTSMC_HD int64_t group_at(int64_t place) const {
    int64_t low = 0, high = n_groups;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (offsets[middle] <= place ? low : high) = middle;
    }
    return low;
  }
  FASTSMC_HD int64_t begin(int64_t g) const { return offsets ? offsets[g] : 0; }
};

}  // namespace fastsmc
