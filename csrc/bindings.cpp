// fastsmc._C: pybind11 bindings. Addresses travel as integers, a matrix as (address, row stride in elements, dtype
// code, address of its row index or 0). The GIL is released while the work runs. Only fastsmc/ops calls this module.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "cpu.hpp"

namespace py = pybind11;
using namespace fastsmc;

namespace {

using Address = uintptr_t;
using MatrixArgs = std::tuple<Address, int64_t, int, Address>;
using CacheArgs = std::tuple<Address, int64_t, int64_t>;  // address, block stride in bytes, blocks

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

cpu::Matrix matrix(const MatrixArgs& m) {
  return {at<void>(std::get<0>(m)), std::get<1>(m), std::get<2>(m), at<int64_t>(std::get<3>(m))};
}

using TableArgs = std::tuple<Address, int64_t, int64_t, int64_t>;  // address, row stride, rows, columns

cpu::Table table_of(const TableArgs& t) {
  return {at<int32_t>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("TILE") = kTile;

  m.def("uniforms", [](Address out, int64_t n, uint64_t seed, uint32_t group, uint32_t step, uint32_t stream) {
    py::gil_scoped_release release;
    cpu::uniforms(at<double>(out), n, seed, group, step, stream);
  });

  m.def("weigh", [](const MatrixArgs& logits, const MatrixArgs& psi, int64_t n_rows, int64_t vocab, double temperature,
                    Address lse, Address lse_psi, Address tile_mass, Address max_psi) {
    py::gil_scoped_release release;
    cpu::weigh(matrix(logits), matrix(psi), n_rows, vocab, temperature, at<double>(lse), at<double>(lse_psi),
               at<double>(tile_mass), at<float>(max_psi));
  });

  m.def("draw", [](const MatrixArgs& logits, const MatrixArgs& psi, int64_t vocab, double temperature, Address lse,
                   Address tile_mass, Address rows, Address u, int64_t n_draws, Address tokens, Address log_prob,
                   Address log_psi) {
    py::gil_scoped_release release;
    cpu::draw(matrix(logits), matrix(psi), vocab, temperature, at<double>(lse), at<double>(tile_mass),
              at<int64_t>(rows), at<double>(u), n_draws, at<int64_t>(tokens), at<double>(log_prob),
              at<double>(log_psi));
  });

  m.def("bad_log_weight", [](Address lw, int64_t n) { return cpu::bad_log_weight(at<double>(lw), n); });
  m.def("bad_uniform", [](Address u, int64_t n) { return cpu::bad_uniform(at<double>(u), n); });

  m.def("offspring", [](const std::string& scheme, Address q, Address u, int64_t n, Address counts) {
    py::gil_scoped_release release;
    cpu::offspring(scheme, at<uint64_t>(q), at<double>(u), n, at<int64_t>(counts));
  });

  m.def("resample", [](Address log_weights, Address u, int64_t n, const std::string& scheme, bool sorted,
                       Address ancestors, Address counts, Address rank) {
    py::gil_scoped_release release;
    cpu::resample(at<double>(log_weights), at<double>(u), n, scheme, sorted, at<int64_t>(ancestors),
                  at<int64_t>(counts), at<int64_t>(rank));
  });

  m.def("ess_log_mean", [](Address log_weights, int64_t n) {
    double ess, log_mean;
    cpu::ess_log_mean(at<double>(log_weights), n, &ess, &log_mean);
    return std::make_tuple(ess, log_mean);
  });

  m.def("not_in_place", [](Address ancestors, int64_t n) { return cpu::not_in_place(at<int64_t>(ancestors), n); });

  // spans: for each cache a list of (offset, size) in bytes
  m.def("reindex", [](Address table, int64_t stride, Address ancestors, int64_t n, int64_t n_shared, int64_t tail,
                      Address active, const std::vector<CacheArgs>& caches,
                      const std::vector<std::vector<std::pair<int64_t, int64_t>>>& spans) {
    py::gil_scoped_release release;
    std::vector<BlockCache> blocks;
    for (const auto& [base, step, n_blocks] : caches) blocks.push_back({at<char>(base), step, n_blocks});
    std::vector<std::vector<Span>> pieces(spans.size());
    for (size_t c = 0; c < spans.size(); ++c)
      for (const auto& [offset, size] : spans[c]) pieces[c].push_back({offset, size});
    return cpu::reindex(at<int32_t>(table), stride, at<int64_t>(ancestors), n, n_shared, tail, at<bool>(active), blocks,
                        pieces);
  });

  m.attr("BF16_PAIRS") = std::is_same_v<NarrowMath, PairMath>;

  // nodes of a table: a list of (row_begin, row_end, column_begin, column_end) one after the other; fills order (R,)
  m.def("plan", [](const TableArgs& table, Address order) {
    std::vector<int32_t> flat;
    for (const Node& n : cpu::plan(table_of(table), at<int32_t>(order)))
      flat.insert(flat.end(), {n.row_begin, n.row_end, n.column_begin, n.column_end});
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
