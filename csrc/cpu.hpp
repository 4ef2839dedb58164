// What bindings.cpp calls in cpu.cpp. Raw pointers; shapes, dtypes and index ranges are checked by fastsmc/ops.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "fastsmc/reindex.cuh"
#include "fastsmc/weigh.cuh"

namespace fastsmc::cpu {

// dtype codes as in fastsmc/ops/_tensors.py; kInt32 holds mask words
enum DType { kNone = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3, kInt32 = 4 };

// A matrix with unit column stride; `rows` maps an output row to a row of it, null for the identity, −1 for no row.
struct Matrix {
  const void* data;
  int64_t stride;
  int dtype;
  const int64_t* rows;
};

void uniforms(double* out, int64_t n, uint64_t seed, uint32_t group, uint32_t step, uint32_t stream);

// lse_psi is not written where it would be lse: without psi and mask
void weigh(const Matrix& logits, const Matrix& psi, const Matrix& mask, int64_t n_rows, int64_t vocab,
           double temperature, double* lse, double* lse_psi, double* tile_mass, float* max_psi);

void draw(const Matrix& logits, const Matrix& psi, const Matrix& mask, int64_t vocab, double temperature,
          const double* lse, const double* tile_mass, const int64_t* rows, const double* u, int64_t n_draws,
          int64_t* tokens, double* log_prob, double* log_psi);

int64_t bad_log_weight(const double* log_weights, int64_t n);
int64_t bad_uniform(const double* u, int64_t n);

void offspring(const std::string& scheme, const uint64_t* q, const double* u, int64_t n, int64_t* counts);

void resample(const double* log_weights, const double* u, int64_t n, const std::string& scheme, bool sorted,
              int64_t* ancestors, int64_t* counts, int64_t* rank);

void ess_log_mean(const double* log_weights, int64_t n, double* ess, double* log_mean);

int64_t not_in_place(const int64_t* ancestors, int64_t n);

int64_t reindex(int32_t* table, int64_t stride, const int64_t* ancestors, int64_t n, int64_t n_shared, int64_t tail,
                const bool* active, const std::vector<BlockCache>& caches,
                const std::vector<std::vector<Span>>& spans);

}  // namespace fastsmc::cpu
