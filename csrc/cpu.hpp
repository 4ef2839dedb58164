// What bindings.cpp calls in cpu.cpp. Raw pointers; shapes, dtypes and index ranges are checked by fastsmc/ops.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "fastsmc/attend.cuh"
#include "fastsmc/intervene.cuh"
#include "fastsmc/philox.cuh"
#include "fastsmc/reindex.cuh"
#include "fastsmc/resample.cuh"
#include "fastsmc/weigh.cuh"

namespace fastsmc::cpu {

// dtype codes as in fastsmc/ops/_tensors.py; kInt32 holds mask words
enum DType { kNone = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3, kInt32 = 4 };

// A matrix with unit column stride. `rows` maps an output row to a row of it: null is the identity, −1 stands for no
// row.
struct Matrix {
  const void* data;
  int64_t stride;
  int dtype;
  const int64_t* rows;
};

// Temperatures of output rows: rows[r], or one for all where that is null.
struct Temperature {
  double all;
  const double* rows;
  double at(int64_t r) const { return rows ? rows[r] : all; }
};

// The temperatures of `weigh` and `draw`: T, and T/α of a power α; whether there is one.
struct Powered {
  Temperature base, powered;
  bool powers;
  Scale scale(int64_t r) const { return {logit_scale(base.at(r)), logit_scale(powered.at(r))}; }
};

void uniforms(double* out, int64_t n, const UniformGroups& of);

// Without psi, mask and power lse_psi would equal lse, and is not written.
void weigh(const Matrix& logits, const Matrix& psi, const Matrix& mask, int64_t n_rows, int64_t vocab,
           const Powered& temperature, double* lse, double* lse_psi, double* tile_mass, float* max_psi);

void draw(const Matrix& logits, const Matrix& psi, const Matrix& mask, int64_t vocab, const Powered& temperature,
          const double* lse, const double* tile_mass, const int64_t* rows, const double* u, int64_t n_draws,
          int64_t* tokens, double* log_prob, double* log_psi);

// What redraw, redraw_logits and gumbel are about: output row r compares row r of logits, where mask allows, with row r
// of factual, whose token is tokens[factual.rows[r]].
struct Contrast {
  Matrix logits, factual, mask;
  const int64_t* tokens;
  int64_t n_rows, vocab;
  Temperature temperature, factual_temperature;
};

// u: (n_rows, 2)
void redraw(const Contrast& of, const double* u, int64_t* tokens, double* stay, double* log_prob, double* log_kernel);

// out: (n_rows, vocab)
void redraw_logits(const Contrast& of, float* out);

// Keys of the noise of output row r, (n_rows,) each.
struct NoiseKeys {
  const int64_t *seeds, *groups, *steps, *particles;
};

// lse: of factual rows, as weigh gives it, per output row
void gumbel(const Contrast& of, const double* lse, const NoiseKeys& keys, int64_t* tokens);

int64_t bad_log_weight(const double* log_weights, int64_t n);
int64_t bad_uniform(const double* u, int64_t n);
int64_t bad_temperature(const double* temperature, const int64_t* logit_rows, int64_t n);
int64_t bad_threshold(const double* thresholds, int64_t n);
int64_t bad_index(const int64_t* index, int64_t n, int64_t low, int64_t high, const int64_t* where);
int64_t bad_position(const int32_t* positions, int64_t n, int64_t most);
int64_t bad_offset(const int64_t* offsets, int64_t groups, int64_t n);
int64_t bad_slot(const int64_t* slots, const int64_t* offsets, int64_t groups);
int64_t bad_size(const int64_t* offsets, int64_t groups, int64_t largest);

void resample(const ResamplingGroups& all);

void ess_log_mean(const double* log_weights, int64_t n, double* ess, double* log_mean);

int64_t not_in_place(const int64_t* ancestors, int64_t n);

// First row whose copy would leave a cache or copy a block onto itself, else −1.
int64_t bad_tail(const Reindexing& r, const std::vector<BlockCache>& caches);

void reindex(const Reindexing& r, const std::vector<BlockCache>& caches);

// What `settle` gives, n elements each; see fastsmc/ops/settle.py.
struct Histories {
  int64_t *ancestors, *slots, *tokens, *rows;
  bool *present, *copied;
};

void settle(const int64_t* slots, const int64_t* tokens, const bool* wanted, const int64_t* offsets, int64_t groups,
            const Histories& out);

// x: (n_rows, of.width), rows x_stride elements apart; source: (n_rows, of.source_width); both of one dtype.
void intervene(void* x, int64_t x_stride, const void* source, int64_t source_stride, int dtype, const int64_t* slots,
               int64_t n_rows, const Intervention& of);

// For tests: run what the device runs, thread by thread, in an order drawn from `seed`.
void emulate_resample(const ResamplingGroups& all, int threads, uint64_t seed);
void emulate_reindex(const Reindexing& r, const std::vector<BlockCache>& caches, int parts, int threads,
                     uint64_t seed);

std::vector<Node> plan(const Table& table, int32_t* order);

// query, out: (R, n_heads, D), rows `query_stride` and `out_stride` elements apart; all of one dtype, as the caches.
// length: of each row, where the table has no lengths
void attend(const void* query, int64_t query_stride, void* out, int64_t out_stride, int dtype, int64_t n_heads,
            int64_t n_key_heads, const PagedKV& kv, const Table& table, int64_t length, const int32_t* order,
            const Node* nodes, int64_t n_nodes, double scale);

}  // namespace fastsmc::cpu
