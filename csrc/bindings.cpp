// fastsmc._C: pybind11 bindings. Addresses travel as integers, a matrix as (address, row stride in elements, dtype
// code, address of its row index or 0). The GIL is released while the work runs. Only fastsmc/ops calls this module.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu.hpp"
#include "cuda.hpp"

namespace py = pybind11;
using namespace fastsmc;

namespace {

using Address = uintptr_t;
using MatrixArgs = std::tuple<Address, int64_t, int, Address>;
// address, block stride in bytes, blocks, pieces, bytes per piece, bytes per slot
using CacheArgs = std::tuple<Address, int64_t, int64_t, int64_t, int64_t, int64_t>;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

cpu::Matrix matrix(const MatrixArgs& m) {
  return {at<void>(std::get<0>(m)), std::get<1>(m), std::get<2>(m), at<int64_t>(std::get<3>(m))};
}

// T for all, T of each row or 0; the same of T/α; whether there is a power α
using PowerArgs = std::tuple<double, Address, double, Address, bool>;

cpu::Powered powered(const PowerArgs& args) {
  const auto& [all, rows, powered_all, powered_rows, powers] = args;
  return {{all, at<double>(rows)}, {powered_all, at<double>(powered_rows)}, powers};
}

// logits, factual, mask; tokens; rows, vocab; temperature, temperatures, and those of factual
using ContrastArgs = std::tuple<MatrixArgs, MatrixArgs, MatrixArgs, Address, int64_t, int64_t, double, Address, double,
                                Address>;

cpu::Contrast contrast(const ContrastArgs& args) {
  const auto& [logits, factual, mask, tokens, n_rows, vocab, t, temperatures, factual_t, factual_temperatures] = args;
  return {matrix(logits), matrix(factual), matrix(mask), at<int64_t>(tokens), n_rows, vocab,
          {t, at<double>(temperatures)}, {factual_t, at<double>(factual_temperatures)}};
}

// for all groups: seed, group, step, stream; addresses or 0: seeds, groups, steps, offsets; groups
using UniformArgs = std::tuple<uint64_t, uint32_t, uint32_t, uint32_t, Address, Address, Address, Address, int64_t>;

UniformGroups uniform_groups(const UniformArgs& args) {
  return std::apply(
      [](uint64_t seed, uint32_t group, uint32_t step, uint32_t stream, Address seeds, Address groups, Address steps,
         Address offsets, int64_t n_groups) {
        return UniformGroups{{seed, group, step, stream}, at<int64_t>(seeds), at<int64_t>(groups), at<int64_t>(steps),
                             at<int64_t>(offsets), n_groups};
      },
      args);
}

// log_weights, uniforms, ancestors, counts, rank, ess, log_mean, resampled; thresholds, offsets, or 0
using ResampleArgs = std::array<Address, 10>;
// groups, particles in all of them, particles in the largest
using ResampleSizes = std::array<int64_t, 3>;

ResamplingGroups resampling(const ResampleArgs& a, const ResampleSizes& sizes, const std::string& scheme,
                            double threshold) {
  const auto name = std::find(std::begin(kSchemeNames), std::end(kSchemeNames), scheme);
  if (name == std::end(kSchemeNames)) throw std::invalid_argument("unknown scheme " + scheme);
  const Resampling first{at<double>(a[0]), at<double>(a[1]), sizes[2], static_cast<Scheme>(name - kSchemeNames),
                         threshold, at<int64_t>(a[2]), at<int64_t>(a[3]), at<int64_t>(a[4]), at<double>(a[5]),
                         at<double>(a[6]), at<bool>(a[7])};
  return {first, sizes[0], sizes[1], at<int64_t>(a[9]), at<double>(a[8])};
}

// table, row stride, columns; ancestors, rows; position, its address or 0, address of one per row or 0; block size;
// genealogy, steps, step, its address or 0
using ReindexArgs = std::tuple<Address, int64_t, int64_t, Address, int64_t, int64_t, Address, Address, int64_t, Address,
                               int64_t, int64_t, Address>;

Reindexing reindexing(const ReindexArgs& args) {
  return std::apply(
      [](Address table, int64_t stride, int64_t columns, Address ancestors, int64_t n, int64_t position,
         Address position_at, Address positions, int64_t block_size, Address genealogy, int64_t steps, int64_t step,
         Address step_at) {
        return Reindexing{at<int32_t>(table), stride, columns, at<int64_t>(ancestors), n, position,
                          at<int64_t>(position_at), at<int32_t>(positions), block_size, at<int32_t>(genealogy), steps,
                          step, at<int64_t>(step_at)};
      },
      args);
}

std::vector<BlockCache> block_caches(const std::vector<CacheArgs>& args) {
  std::vector<BlockCache> caches;
  for (const auto& [base, stride, n_blocks, pieces, piece_size, slot_size] : args) {
    const uint64_t all = base | stride | piece_size | slot_size | 16;
    caches.push_back({at<char>(base), stride, n_blocks, pieces, piece_size, slot_size, static_cast<int>(all & -all)});
  }
  return caches;
}

// address, row stride, rows, columns; address of lengths or 0, block size
using TableArgs = std::tuple<Address, int64_t, int64_t, int64_t, Address, int64_t>;

Table table_of(const TableArgs& args) {
  const auto& [table, stride, rows, columns, lengths, block_size] = args;
  return {at<int32_t>(table), stride, rows, columns, at<int32_t>(lengths), block_size};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("TILE") = kTile;

  m.def("uniforms", [](Address out, int64_t n, const UniformArgs& args) {
    py::gil_scoped_release release;
    cpu::uniforms(at<double>(out), n, uniform_groups(args));
  });

  m.def("weigh", [](const MatrixArgs& logits, const MatrixArgs& psi, const MatrixArgs& mask, int64_t n_rows,
                    int64_t vocab, const PowerArgs& temperature, Address lse, Address lse_psi, Address tile_mass,
                    Address max_psi) {
    py::gil_scoped_release release;
    cpu::weigh(matrix(logits), matrix(psi), matrix(mask), n_rows, vocab, powered(temperature), at<double>(lse),
               at<double>(lse_psi), at<double>(tile_mass), at<float>(max_psi));
  });

  m.def("draw", [](const MatrixArgs& logits, const MatrixArgs& psi, const MatrixArgs& mask, int64_t vocab,
                   const PowerArgs& temperature, Address lse, Address tile_mass, Address rows, Address u,
                   int64_t n_draws, Address tokens, Address log_prob, Address log_psi) {
    py::gil_scoped_release release;
    cpu::draw(matrix(logits), matrix(psi), matrix(mask), vocab, powered(temperature), at<double>(lse),
              at<double>(tile_mass), at<int64_t>(rows), at<double>(u), n_draws, at<int64_t>(tokens),
              at<double>(log_prob), at<double>(log_psi));
  });

  m.def("redraw", [](const ContrastArgs& args, Address u, Address tokens, Address stay, Address log_prob,
                     Address log_kernel) {
    py::gil_scoped_release release;
    cpu::redraw(contrast(args), at<double>(u), at<int64_t>(tokens), at<double>(stay), at<double>(log_prob),
                at<double>(log_kernel));
  });
  m.def("redraw_logits", [](const ContrastArgs& args, Address out) {
    py::gil_scoped_release release;
    cpu::redraw_logits(contrast(args), at<float>(out));
  });
  // keys: seeds, groups, steps, particles
  m.def("gumbel", [](const ContrastArgs& args, Address lse, const std::array<Address, 4>& keys, Address tokens) {
    py::gil_scoped_release release;
    cpu::gumbel(contrast(args), at<double>(lse),
                {at<int64_t>(keys[0]), at<int64_t>(keys[1]), at<int64_t>(keys[2]), at<int64_t>(keys[3])},
                at<int64_t>(tokens));
  });
  // rows: x, its row stride, source, its row stride, dtype code; map: H, K, offsets, down, up, shift, finite or 0
  m.def("intervene", [](const std::tuple<Address, int64_t, Address, int64_t, int>& rows, Address slots, int64_t n_rows,
                        const std::tuple<int64_t, int64_t, Address, Address, Address, Address, Address>& map) {
    const auto& [x, x_stride, source, source_stride, dtype] = rows;
    const auto& [width, source_width, offsets, down, up, shift, finite] = map;
    py::gil_scoped_release release;
    cpu::intervene(at<void>(x), x_stride, at<void>(source), source_stride, dtype, at<int64_t>(slots), n_rows,
                   {width, source_width, at<int64_t>(offsets), at<float>(down), at<float>(up), at<float>(shift),
                    at<bool>(finite)});
  });

  m.def("bad_log_weight", [](Address lw, int64_t n) { return cpu::bad_log_weight(at<double>(lw), n); });
  m.def("bad_uniform", [](Address u, int64_t n) { return cpu::bad_uniform(at<double>(u), n); });
  m.def("bad_temperature", [](Address temperatures, Address logit_rows, int64_t n) {
    return cpu::bad_temperature(at<double>(temperatures), at<int64_t>(logit_rows), n);
  });
  m.def("bad_offset", [](Address offsets, int64_t groups, int64_t n) {
    return cpu::bad_offset(at<int64_t>(offsets), groups, n);
  });

  m.def("bad_threshold", [](Address thresholds, int64_t n) { return cpu::bad_threshold(at<double>(thresholds), n); });
  m.def("bad_index", [](Address index, int64_t n, int64_t low, int64_t high, Address where) {
    return cpu::bad_index(at<int64_t>(index), n, low, high, at<int64_t>(where));
  });
  m.def("bad_position", [](Address positions, int64_t n, int64_t most) {
    return cpu::bad_position(at<int32_t>(positions), n, most);
  });
  m.def("bad_slot", [](Address slots, Address offsets, int64_t groups) {
    return cpu::bad_slot(at<int64_t>(slots), at<int64_t>(offsets), groups);
  });
  m.def("bad_size", [](Address offsets, int64_t groups, int64_t largest) {
    return cpu::bad_size(at<int64_t>(offsets), groups, largest);
  });

  // ancestors, slots, tokens, rows, present, copied
  m.def("settle", [](Address slots, Address tokens, Address wanted, Address offsets, int64_t groups,
                     const std::array<Address, 6>& out) {
    cpu::settle(at<int64_t>(slots), at<int64_t>(tokens), at<bool>(wanted), at<int64_t>(offsets), groups,
                {at<int64_t>(out[0]), at<int64_t>(out[1]), at<int64_t>(out[2]), at<int64_t>(out[3]), at<bool>(out[4]),
                 at<bool>(out[5])});
  });

  m.def("resample", [](const ResampleArgs& a, const ResampleSizes& sizes, const std::string& scheme,
                       double threshold) {
    const ResamplingGroups all = resampling(a, sizes, scheme, threshold);
    py::gil_scoped_release release;
    cpu::resample(all);
  });
  m.def("emulate_resample", [](const ResampleArgs& a, const ResampleSizes& sizes, const std::string& scheme,
                               double threshold, int threads, uint64_t seed) {
    const ResamplingGroups all = resampling(a, sizes, scheme, threshold);
    py::gil_scoped_release release;
    cpu::emulate_resample(all, threads, seed);
  });

  m.def("ssp", [](Address part, Address u, int64_t n, Address counts) {  // part: integer weights, overwritten
    u64* q = at<u64>(part);
    ssp(q, n, std::accumulate(q, q + n, u64{0}), at<double>(u), at<int64_t>(counts));
  });

  m.def("ess_log_mean", [](Address log_weights, int64_t n) {
    double ess, log_mean;
    cpu::ess_log_mean(at<double>(log_weights), n, &ess, &log_mean);
    return std::make_tuple(ess, log_mean);
  });

  m.def("not_in_place", [](Address ancestors, int64_t n) { return cpu::not_in_place(at<int64_t>(ancestors), n); });

  m.def("bad_tail", [](const ReindexArgs& args, const std::vector<CacheArgs>& caches) {
    return cpu::bad_tail(reindexing(args), block_caches(caches));
  });
  m.def("reindex", [](const ReindexArgs& args, const std::vector<CacheArgs>& caches) {
    py::gil_scoped_release release;
    cpu::reindex(reindexing(args), block_caches(caches));
  });
  m.def("emulate_reindex", [](const ReindexArgs& args, const std::vector<CacheArgs>& caches, int parts, int threads,
                              uint64_t seed) {
    py::gil_scoped_release release;
    cpu::emulate_reindex(reindexing(args), block_caches(caches), parts, threads, seed);
  });

#ifdef FASTSMC_CUDA_ARCHS
  m.attr("cuda_archs") = py::make_tuple(FASTSMC_CUDA_ARCHS);

  // Each launches one kernel (or a few) on `stream` of device `device` and waits for nothing.
  m.def("cuda_uniforms", [](int device, Address stream, Address out, int64_t n, const UniformArgs& args) {
    py::gil_scoped_release release;
    cuda::uniforms({device, at<void>(stream)}, at<double>(out), n, uniform_groups(args));
  });
  // Bytes of device memory that cuda_resample wants as `memory` for groups of at most n particles.
  m.def("cuda_resample_memory", [](int device, int64_t n) { return cuda::resample_memory(device, n); });
  m.def("cuda_resample", [](int device, Address stream, const ResampleArgs& a, const ResampleSizes& sizes,
                            const std::string& scheme, double threshold, Address memory) {
    const ResamplingGroups all = resampling(a, sizes, scheme, threshold);
    py::gil_scoped_release release;
    cuda::resample({device, at<void>(stream)}, all, at<void>(memory));
  });
  m.def("cuda_reindex", [](int device, Address stream, const ReindexArgs& args, const std::vector<CacheArgs>& caches) {
    py::gil_scoped_release release;
    cuda::reindex({device, at<void>(stream)}, reindexing(args), block_caches(caches));
  });
#else
  m.attr("cuda_archs") = py::make_tuple();
#endif

  m.attr("BF16_MATH") = may_use_tiles() ? "tiles" : std::is_same_v<NarrowMath, PairMath> ? "pairs" : "floats";

  // nodes of a table: a list of (row_begin, row_end, column_begin, column_end) one after the other; fills order (R,)
  m.def("plan", [](const TableArgs& table, Address order) {
    std::vector<int32_t> flat;
    for (const Node& n : cpu::plan(table_of(table), at<int32_t>(order)))
      flat.insert(flat.end(), {n.row_begin, n.row_end, n.column_begin, n.column_end});
    return py::array_t<int32_t>(static_cast<py::ssize_t>(flat.size()), flat.data());
  });

  // what each group would read alone: (nodes, columns) one after the other; offsets (G + 1,) of rows
  m.def("count_reads", [](const TableArgs& table, Address order, Address offsets, int64_t n_groups) {
    std::vector<int32_t> flat;
    for (const Reads& r : count_reads(table_of(table), at<int32_t>(order), at<int32_t>(offsets), n_groups))
      flat.insert(flat.end(), {static_cast<int32_t>(r.nodes), static_cast<int32_t>(r.columns)});
    return py::array_t<int32_t>(static_cast<py::ssize_t>(flat.size()), flat.data());
  });

  // kv: key and value address, block and head stride in elements, block size, head dim, layout
  m.def("attend", [](Address query, int64_t query_stride, Address out, int64_t out_stride, int dtype, int64_t n_heads,
                     int64_t n_key_heads,
                     const std::tuple<Address, Address, int64_t, int64_t, int64_t, int64_t, int>& kv,
                     const TableArgs& table, int64_t length, Address order, Address nodes, int64_t n_nodes,
                     double scale) {
    py::gil_scoped_release release;
    const auto& [key, value, block_stride, head_stride, block_size, head_dim, layout] = kv;
    cpu::attend(at<void>(query), query_stride, at<void>(out), out_stride, dtype, n_heads, n_key_heads,
                {at<void>(key), at<void>(value), block_stride, head_stride, block_size, head_dim, layout},
                table_of(table), length, at<int32_t>(order), at<Node>(nodes), n_nodes, scale);
  });
}
