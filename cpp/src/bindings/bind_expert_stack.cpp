// ExpertStack, load_gptq_stacked.
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/arrays.hpp"
#include "bindings/objects.hpp"
#include "core/host_ids.hpp"
#include "core/matrix_checks.hpp"
#include "marlinq/handle.hpp"

namespace py = pybind11;

namespace marlinq::bindings {
namespace {

using Dispatch = std::tuple<std::int32_t, std::int64_t, std::int64_t, std::int64_t>;

ExpertStackHandle load(const ContextHandle& context,
                       const std::vector<std::vector<const PyModule*>>& experts, int bits,
                       std::int64_t group_size, std::int64_t k, const std::string& zero_points,
                       const std::string& labelled, const std::string& symmetry,
                       const std::string& compute, bool batch_invariant,
                       const std::string& kernel) {
  std::vector<py::object> owners;
  std::vector<GptqTensors> layers;
  layers.reserve(experts.size());
  for (const auto& expert : experts) layers.push_back(make_layer(expert, owners));
  const GptqSpec spec = make_spec(bits, group_size, k, zero_points, labelled, symmetry);
  const LoadOptions options = make_options(compute, batch_invariant, kernel);
  const py::gil_scoped_release release;
  return context.load_gptq_stacked(layers, spec, options);
}

void batched(const ExpertStackHandle& self, const ContextHandle& context, const py::object& x,
             const std::vector<Dispatch>& dispatches, const py::object& out) {
  CallArrays arrays(context);
  const ConstMatrixView in = arrays.matrix(x, "x");
  const MatrixView result = arrays.output(out, "out");
  const bool copied = arrays.copied();
  std::vector<ExpertDispatch> list;
  list.reserve(dispatches.size());
  for (const auto& [expert, input_row, output_row, rows] : dispatches) {
    list.push_back(
        {.expert = expert, .input_row = input_row, .output_row = output_row, .rows = rows});
  }
  const py::gil_scoped_release release;
  if (copied) {
    self.gemm_phase_batched_host(context, in, list, result);
  } else {
    self.gemm_phase_batched(context, in, list, result);
  }
}

void fused(const ExpertStackHandle& self, const ContextHandle& context, const py::object& x,
           const py::object& sorted_token_ids, const py::object& expert_ids,
           const py::object& num_tokens_past_padded, const py::object& out, int block_size,
           int top_k, std::int64_t num_tokens, const py::object& topk_weights,
           std::optional<std::int64_t> entries) {
  CallArrays arrays(context);
  const ConstMatrixView in = arrays.matrix(x, "x");
  const MatrixView result = arrays.output(out, "out");
  const FusedTiles tiles{
      .sorted_token_ids = arrays.flat(sorted_token_ids, "sorted_token_ids"),
      .expert_ids = arrays.flat(expert_ids, "expert_ids"),
      .num_tokens_past_padded = arrays.flat(num_tokens_past_padded, "num_tokens_past_padded"),
      .block_size = block_size,
      .top_k = top_k,
      .num_tokens = num_tokens,
      .topk_weights = arrays.optional_flat(topk_weights, "topk_weights")};
  const bool copied = arrays.copied();
  if (entries) {
    check_tile_size(block_size);
    check_tile_entries(*entries, tiles);
  }
  const py::gil_scoped_release release;
  if (copied) {
    self.gemm_phase_fused_host(context, in, tiles, result);
  } else {
    self.gemm_phase_fused(context, in, tiles, result);
  }
}

}  // namespace

void bind_expert_stack(py::module_& module) {
  py::class_<ExpertStackHandle>(module, "ExpertStack",
                                "The weights of all experts of one projection; immutable.")
      .def_property_readonly("num_experts", &ExpertStackHandle::num_experts)
      .def_property_readonly("k", &ExpertStackHandle::k)
      .def_property_readonly("n_per_expert", &ExpertStackHandle::n_per_expert)
      .def_property_readonly(
          "backend", [](const ExpertStackHandle& self) { return std::string(self.backend()); })
      .def("describe", [](const ExpertStackHandle& self) { return to_dict(self.describe()); })
      .def("expert", &ExpertStackHandle::expert, py::arg("index"),
           "A view of one expert, without a copy.")
      .def("gemm_phase_batched", &batched, py::arg("context"), py::arg("x"), py::arg("dispatches"),
           py::arg("out"), "Dispatches are (expert, input_row, output_row, rows), in any order.")
      .def(
          "gemm_phase_fused", &fused, py::arg("context"), py::arg("x"), py::arg("sorted_token_ids"),
          py::arg("expert_ids"), py::arg("num_tokens_past_padded"), py::arg("out"), py::kw_only(),
          py::arg("block_size"), py::arg("top_k"), py::arg("num_tokens"),
          py::arg("topk_weights") = py::none(), py::arg("entries") = py::none(),
          "Tiles as moe_align_block_size makes them; entries is what num_tokens_past_padded holds, "
          "where the caller knows it, and is checked.");

  module.def(
      "load_gptq_stacked", &load, py::arg("context"), py::arg("experts"), py::kw_only(),
      py::arg("bits") = 4, py::arg("group_size") = 128, py::arg("k") = 0,
      py::arg("zero_points") = "auto", py::arg("labelled") = "auto",
      py::arg("symmetry") = "unknown", py::arg("compute") = "auto",
      py::arg("batch_invariant") = false, py::arg("kernel") = "",
      "Loads one layer per expert, all of one shape; modules of an expert are fused along N.");
}

}  // namespace marlinq::bindings
