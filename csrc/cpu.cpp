// The CPU backend: OpenMP loops over rows around the arithmetic of include/fastsmc. Raw pointers only; shapes, dtypes
// and index ranges were checked by fastsmc/ops. Functions return the first offending index, −1 when there is none.
//
// The OpenMP runtime is whichever the process has already loaded with global symbols: PyTorch's, as fastsmc.ops imports
// torch first. So torch.set_num_threads holds here too and no second thread pool appears.
#include "cpu.hpp"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "fastsmc/draw.cuh"
#include "fastsmc/philox.cuh"
#include "fastsmc/resample.cuh"

namespace fastsmc::cpu {

// Elements below which one thread is faster than waking the others.
constexpr int64_t kSerial = 1 << 16;

template <typename T>
const T* row_of(const Matrix& m, int64_t r) {
  return static_cast<const T*>(m.data) + (m.rows ? m.rows[r] : r) * m.stride;
}

// f(logit type, twist type) as null pointers of those types
template <typename F>
void dispatch(int logit_dtype, int psi_dtype, F f) {
  const auto with_psi = [&](auto* logit) {
    if (psi_dtype == kNone) f(logit, static_cast<NoTwist*>(nullptr));
    else if (psi_dtype == kFloat32) f(logit, static_cast<float*>(nullptr));
    else if (psi_dtype == kBFloat16) f(logit, static_cast<bf16*>(nullptr));
    else if (psi_dtype == kFloat16) f(logit, static_cast<fp16*>(nullptr));
    else throw std::invalid_argument("unknown dtype code " + std::to_string(psi_dtype));
  };
  if (logit_dtype == kFloat32) with_psi(static_cast<float*>(nullptr));
  else if (logit_dtype == kBFloat16) with_psi(static_cast<bf16*>(nullptr));
  else if (logit_dtype == kFloat16) with_psi(static_cast<fp16*>(nullptr));
  else throw std::invalid_argument("unknown dtype code " + std::to_string(logit_dtype));
}

void uniforms(double* out, int64_t n, uint64_t seed, uint32_t group, uint32_t step, uint32_t stream) {
  for (int64_t i = 0; i < n; ++i) out[i] = uniform(seed, group, step, stream, static_cast<uint32_t>(i));
}

// lse, lse_psi, max_psi: (n_rows,); tile_mass: (n_rows, n_tiles)
void weigh(const Matrix& logits, const Matrix& psi, int64_t n_rows, int64_t vocab, double temperature, double* lse,
           double* lse_psi, double* tile_mass, float* max_psi) {
  const int64_t n_tiles = (vocab + kTile - 1) / kTile;
  const float scale = logit_scale(temperature);
  dispatch(logits.dtype, psi.dtype, [&](auto* logit, auto* twist) {
    using Logit = std::remove_pointer_t<decltype(logit)>;
    using Psi = std::remove_pointer_t<decltype(twist)>;
#pragma omp parallel if (n_rows * vocab > kSerial)
    {
      std::vector<float> base_max(n_tiles), psi_max(n_tiles);
      std::vector<double> base_mass(n_tiles);
#pragma omp for schedule(dynamic, 4)  // cores may be shared with others
      for (int64_t r = 0; r < n_rows; ++r)
        weigh_row(row_of<Logit>(logits, r), row_of<Psi>(psi, r), vocab, scale, base_max.data(), base_mass.data(),
                  psi_max.data(), lse + r, lse_psi + r, tile_mass + r * n_tiles, max_psi + r);
    }
  });
}

// Draw j: weighed row rows[j], uniform u[j]. tokens, log_prob, log_psi: (n_draws,).
void draw(const Matrix& logits, const Matrix& psi, int64_t vocab, double temperature, const double* lse,
          const double* tile_mass, const int64_t* rows, const double* u, int64_t n_draws, int64_t* tokens,
          double* log_prob, double* log_psi) {
  const int64_t n_tiles = (vocab + kTile - 1) / kTile;
  const float scale = logit_scale(temperature);
  dispatch(logits.dtype, psi.dtype, [&](auto* logit, auto* twist) {
    using Logit = std::remove_pointer_t<decltype(logit)>;
    using Psi = std::remove_pointer_t<decltype(twist)>;
#pragma omp parallel for schedule(static) if (n_draws * kTile > kSerial)
    for (int64_t j = 0; j < n_draws; ++j) {
      const int64_t r = rows[j];
      const Logit* row = row_of<Logit>(logits, r);
      const Psi* twists = row_of<Psi>(psi, r);
      const int64_t token = draw_row(row, twists, vocab, scale, tile_mass + r * n_tiles, u[j]);
      tokens[j] = token;
      log_prob[j] = log_psi[j] = std::numeric_limits<double>::quiet_NaN();
      if (token == kNoToken) continue;
      log_prob[j] = static_cast<double>(load(row, token)) * scale * kLog2 - lse[r];
      log_psi[j] = load(twists, token);
    }
  });
}

using Offspring = void (*)(const u64*, int64_t, u64, const double*, u64*, int64_t*);
struct Scheme {
  const char* name;
  Offspring offspring;
};
// A sixth scheme: a function in resample.cuh, a line here, and one each in reference.py and ops/_torch.py.
constexpr Scheme kSchemes[] = {{"systematic", systematic},
                               {"stratified", stratified},
                               {"multinomial", multinomial},
                               {"residual", residual},
                               {"ssp", ssp}};

// First index that is NaN or +inf, else −1.
int64_t bad_log_weight(const double* log_weights, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (!(log_weights[i] < std::numeric_limits<double>::infinity())) return i;
  return -1;
}

// counts: (n,), from integer weights
void offspring(const std::string& scheme, const uint64_t* q, const double* u, int64_t n, int64_t* counts) {
  const auto entry = std::find_if(std::begin(kSchemes), std::end(kSchemes), [&](auto& s) { return scheme == s.name; });
  if (entry == std::end(kSchemes)) throw std::invalid_argument("unknown scheme " + scheme);
  std::vector<u64> scratch(n);
  entry->offspring(q, n, std::accumulate(q, q + n, u64{0}), u, scratch.data(), counts);
}

// ancestors, counts, rank: (n,). Log weights are free of NaN and +inf, and not all −inf.
void resample(const double* log_weights, const double* u, int64_t n, const std::string& scheme, bool sorted,
              int64_t* ancestors, int64_t* counts, int64_t* rank) {
  std::vector<u64> q(n);
  const double max = *std::max_element(log_weights, log_weights + n);
  for (int64_t i = 0; i < n; ++i) q[i] = fixed_point_weight(log_weights[i], max);
  offspring(scheme, q.data(), u, n, counts);
  (sorted ? ancestors_sorted : ancestors_inplace)(counts, n, ancestors, rank);
}

// First index outside [0, 1), NaN included, else −1.
int64_t bad_uniform(const double* u, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (!(u[i] >= 0.0 && u[i] < 1.0)) return i;
  return -1;
}

// (Σw)²/Σw² and log mean w; (0, −inf) when all log weights are −inf.
void ess_log_mean(const double* log_weights, int64_t n, double* ess, double* log_mean) {
  const double max = *std::max_element(log_weights, log_weights + n);
  *ess = 0.0;
  *log_mean = max;
  if (!(max > -std::numeric_limits<double>::infinity())) return;
  double sum = 0.0, squares = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double w = std::exp(log_weights[i] - max);
    sum += w;
    squares += w * w;
  }
  *ess = sum * sum / squares;
  *log_mean = max + std::log(sum / static_cast<double>(n));
}

int64_t not_in_place(const int64_t* ancestors, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (!in_place(ancestors, n, i)) return i;
  return -1;
}

// Checks all tail blocks, then writes. Returns the number of rows whose tail block was copied, or −1 − i for the first
// row i whose copy would leave a cache or copy a block onto itself; then nothing was written. tail < 0: no copies.
int64_t reindex(int32_t* table, int64_t stride, const int64_t* ancestors, int64_t n, int64_t n_shared, int64_t tail,
                const bool* active, const std::vector<BlockCache>& caches,
                const std::vector<std::vector<Span>>& spans) {
  int64_t n_blocks = std::numeric_limits<int64_t>::max();
  for (const BlockCache& cache : caches) n_blocks = std::min(n_blocks, cache.n_blocks);
  std::vector<int64_t> moved, from, to;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t a = ancestors[i];
    if (a == i) continue;
    moved.push_back(i);
    if (tail < 0 || (active && !active[a])) continue;
    const int64_t source = table[a * stride + tail], target = table[i * stride + tail];
    if (source < 0 || source >= n_blocks || target < 0 || target >= n_blocks || source == target) return -1 - i;
    from.push_back(source);
    to.push_back(target);
  }
  const int64_t n_moved = moved.size(), n_copies = from.size(), n_caches = caches.size();
  for (int64_t m = 0; m < n_moved; ++m) share_row(table, stride, ancestors[moved[m]], moved[m], n_shared);
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t c = 0; c < n_caches; ++c)
    for (int64_t m = 0; m < n_copies; ++m)
      copy_block(caches[c], from[m], to[m], spans[c].data(), static_cast<int64_t>(spans[c].size()));
  return n_copies;
}

std::vector<Node> plan(const Table& table, int32_t* order) {
  return plan_nodes(table.blocks, table.stride, table.n_rows, table.n_columns, order);
}

// A task holds so many queries that packing a span of keys is little beside multiplying it, and its queries and outputs
// stay in the second-level cache: elements of a task's queries.
constexpr int64_t kTaskElements = 512 * 64;

void attend(const void* query, int64_t query_stride, void* out, int64_t out_stride, int dtype, int64_t n_heads,
            int64_t n_key_heads, const PagedKV& kv, const Table& table, int64_t length, const int32_t* order,
            const Node* nodes, int64_t n_nodes, double scale) {
  const int64_t group = n_heads / n_key_heads, threads = omp_get_max_threads();
  const int64_t fair = (2 * threads + n_key_heads - 1) / n_key_heads;  // two tasks a thread
  const int64_t small = (table.n_rows * group * kv.head_dim + kTaskElements - 1) / kTaskElements;
  const int64_t runs = std::min(table.n_rows, std::max(fair, small));
  const float scale2 = static_cast<float>(scale / kLog2);
  const auto task = [&](auto math, auto* typed, int64_t head, int64_t run) {
    using T = std::remove_pointer_t<decltype(typed)>;
    attend_task<decltype(math)>(static_cast<const T*>(query), query_stride, static_cast<T*>(out), out_stride, kv,
                                table.blocks, table.stride, length, order, nodes, n_nodes, table.n_rows * run / runs,
                                table.n_rows * (run + 1) / runs, head, group, scale2);
  };
#pragma omp parallel for collapse(2) schedule(dynamic, 1)
  for (int64_t head = 0; head < n_key_heads; ++head)
    for (int64_t run = 0; run < runs; ++run) {
      if (dtype == kFloat32) task(FloatMath{}, static_cast<float*>(nullptr), head, run);
      else if (dtype == kFloat16) task(FloatMath{}, static_cast<fp16*>(nullptr), head, run);
      else task(NarrowMath{}, static_cast<bf16*>(nullptr), head, run);
    }
}

}  // namespace fastsmc::cpu
