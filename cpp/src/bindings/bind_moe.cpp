// MoeBlock.
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "bindings/arrays.hpp"
#include "bindings/objects.hpp"
#include "bindings/timing.hpp"
#include "core/concat.hpp"
#include "core/elements.hpp"
#include "core/refuse.hpp"
#include "marlinq/error.hpp"
#include "marlinq/handle.hpp"

namespace py = pybind11;

namespace marlinq::bindings {
namespace {

RouterWeight parse_router_weight(const std::string& text) {
  if (text == "output") return RouterWeight::kOnOutput;
  if (text == "input") return RouterWeight::kOnInput;
  throw Error(ErrorCode::kInvalidArgument,
              concat("router_weight: '", text, "', expected 'output' or 'input'"));
}

std::vector<float> read_gate(const py::object& object) {
  if (object.is_none()) return {};
  const BorrowedArray array = borrow(object, "shared_gate");
  const ConstArrayView view = as_flat(array, "shared_gate");
  if (!is_floating(view.dtype) || view.device.kind != DeviceKind::kCpu) {
    throw Error(ErrorCode::kInvalidArgument,
                concat("shared_gate: ", to_string(view.dtype), " on ", to_string(view.device),
                       ", expected floating point on cpu"));
  }
  std::vector<float> gate(static_cast<std::size_t>(view.size));
  for (std::size_t i = 0; i < gate.size(); ++i)
    gate[i] = read_float(view.data, view.dtype, static_cast<std::int64_t>(i));
  return gate;
}

MoeBlockHandle make_block(const ContextHandle& context, const ExpertStackHandle& gate_up,
                          const ExpertStackHandle& down, const std::string& activation,
                          const std::string& router_weight,
                          const std::optional<LinearHandle>& shared_gate_up,
                          const std::optional<LinearHandle>& shared_down,
                          const py::object& shared_gate) {
  return context.make_moe_block({.gate_up = gate_up,
                                 .down = down,
                                 .activation = parse_activation(activation),
                                 .router_weight = parse_router_weight(router_weight),
                                 .shared_gate_up = shared_gate_up,
                                 .shared_down = shared_down,
                                 .shared_gate = read_gate(shared_gate)});
}

void forward(const MoeBlockHandle& self, const ContextHandle& context, const py::object& x,
             const py::object& topk_ids, const py::object& topk_weights, const py::object& out,
             const py::object& shared_output, const py::object& residual) {
  CallArrays arrays(context);
  const MoeInput input{.x = arrays.matrix(x, "x"),
                       .topk_ids = arrays.matrix(topk_ids, "topk_ids"),
                       .topk_weights = arrays.matrix(topk_weights, "topk_weights"),
                       .shared_output = arrays.optional_matrix(shared_output, "shared_output"),
                       .residual = arrays.optional_matrix(residual, "residual")};
  const MatrixView result = arrays.output(out, "out");
  const bool copied = arrays.copied();
  const py::gil_scoped_release release;
  if (copied) {
    self.forward_host(context, input, result);
  } else {
    self.forward(context, input, result);
  }
}

double time_blocks(const ContextHandle& context, const std::vector<MoeBlockHandle>& blocks,
                   const py::object& x, const std::vector<py::object>& topk_ids,
                   const py::object& topk_weights, const py::object& out, std::int64_t first,
                   std::int64_t count) {
  if (topk_ids.empty()) refuse_argument("time_blocks: no topk_ids, expected at least one array");
  CallArrays arrays(context);
  MoeInput input;
  input.x = arrays.matrix(x, "x");
  input.topk_weights = arrays.matrix(topk_weights, "topk_weights");
  std::vector<ConstMatrixView> routings;
  for (const py::object& ids : topk_ids) routings.push_back(arrays.matrix(ids, "topk_ids"));
  const MatrixView result = arrays.output(out, "out");
  return time_in_turn("time_blocks", context, blocks, first, count,
                      [&](const MoeBlockHandle& block, std::int64_t i) {
                        input.topk_ids = routings[static_cast<std::size_t>(i) % routings.size()];
                        block.forward(context, input, result);
                      });
}

}  // namespace

void bind_moe(py::module_& module) {
  py::class_<MoeBlockHandle>(module, "MoeBlock",
                             "A mixture-of-experts block over two expert stacks; immutable.")
      .def(py::init(&make_block), py::arg("context"), py::arg("gate_up"), py::arg("down"),
           py::kw_only(), py::arg("activation") = "silu", py::arg("router_weight") = "output",
           py::arg("shared_gate_up") = py::none(), py::arg("shared_down") = py::none(),
           py::arg("shared_gate") = py::none())
      .def_property_readonly("hidden_size", &MoeBlockHandle::hidden_size)
      .def_property_readonly("num_experts", &MoeBlockHandle::num_experts)
      .def_property_readonly("backend",
                             [](const MoeBlockHandle& self) { return std::string(self.backend()); })
      .def("forward", &forward, py::arg("context"), py::arg("x"), py::arg("topk_ids"),
           py::arg("topk_weights"), py::arg("out"), py::arg("shared_output") = py::none(),
           py::arg("residual") = py::none());

  module.def(
      "check_block_options",
      [](const std::string& activation, const std::string& router_weight) {
        parse_activation(activation);
        parse_router_weight(router_weight);
      },
      py::arg("activation"), py::arg("router_weight"),
      "Refuses names that MoeBlock does not take.");
  module.def("time_blocks", &time_blocks, py::arg("context"), py::arg("blocks"), py::arg("x"),
             py::arg("topk_ids"), py::arg("topk_weights"), py::arg("out"), py::kw_only(),
             py::arg("first"), py::arg("count"),
             "As time_forwards, through the blocks and the arrays of topk_ids in turn.");
}

}  // namespace marlinq::bindings
