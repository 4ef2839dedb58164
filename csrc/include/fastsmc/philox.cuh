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

FASTSMC_HD inline double uniform(uint64_t seed, uint32_t group, uint32_t step, uint32_t stream, uint32_t particle) {
  const Philox4 r = philox4x32_10({{particle, step, group, stream}}, static_cast<uint32_t>(seed),
                                  static_cast<uint32_t>(seed >> 32));
  return unit_double(r.word[0], r.word[1]);
}

}  // namespace fastsmc
