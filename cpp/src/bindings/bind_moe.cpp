// MoeBlock.
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "bindings/arrays.hpp"
#include "bindings/objects.hpp"
#include "core/concat.hpp"
#include "core/elements.hpp"
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
             const py::object& shared_output) {
  const BorrowedArray in = borrow(x, "x", stream_of(context));
  const BorrowedArray ids = borrow(topk_ids, "topk_ids", stream_of(context));
  const BorrowedArray weights = borrow(topk_weights, "topk_weights", stream_of(context));
  const BorrowedArray result = borrow(out, "out", stream_of(context));
  BorrowedArray shared;
  MoeInput input{.x = as_matrix(in, "x"),
                 .topk_ids = as_matrix(ids, "topk_ids"),
                 .topk_weights = as_matrix(weights, "topk_weights"),
                 .shared_output = std::nullopt};
  if (!shared_output.is_none()) {
    shared = borrow(shared_output, "shared_output", stream_of(context));
    input.shared_output = as_matrix(shared, "shared_output");
  }
  const MatrixView out_view = as_output(result, "out");
  const py::gil_scoped_release release;
  self.forward(context, input, out_view);
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
           py::arg("topk_weights"), py::arg("out"), py::arg("shared_output") = py::none());
}

}  // namespace marlinq::bindings
