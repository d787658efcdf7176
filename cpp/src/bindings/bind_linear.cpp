// Module, Linear, load_gptq, validate.
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>

#include "bindings/arrays.hpp"
#include "bindings/objects.hpp"
#include "bindings/timing.hpp"
#include "core/concat.hpp"
#include "core/zero_point_names.hpp"
#include "marlinq/error.hpp"
#include "marlinq/handle.hpp"

namespace py = pybind11;

namespace marlinq::bindings {
namespace {

ZeroPoints parse_zero_points(const char* what, const std::string& text) {
  if (text == "auto") return ZeroPoints::kAuto;
  if (text == "v1") return ZeroPoints::kV1;
  if (text == "v2") return ZeroPoints::kV2;
  throw Error(ErrorCode::kInvalidArgument,
              concat(what, ": '", text, "', expected 'auto', 'v1' or 'v2'"));
}

Symmetry parse_symmetry(const std::string& text) {
  if (text == "unknown") return Symmetry::kUnknown;
  if (text == "symmetric") return Symmetry::kSymmetric;
  if (text == "asymmetric") return Symmetry::kAsymmetric;
  throw Error(ErrorCode::kInvalidArgument,
              concat("symmetry: '", text, "', expected 'unknown', 'symmetric' or 'asymmetric'"));
}

PyModule make_module(std::string name, const py::object& qweight, const py::object& scales,
                     const py::object& qzeros, const py::object& g_idx, const py::object& bias) {
  PyModule module;
  module.module.name = std::move(name);
  const auto take = [&](const py::object& object, const char* tensor) {
    const std::string& prefix = module.module.name;
    OwnedTensor owned =
        to_tensor(object, prefix.empty() ? std::string(tensor) : concat(prefix, ".", tensor));
    if (owned.owner) module.owners.push_back(std::move(owned.owner));
    return owned.tensor;
  };
  module.module.qweight = take(qweight, "qweight");
  module.module.scales = take(scales, "scales");
  module.module.qzeros = take(qzeros, "qzeros");
  module.module.g_idx = take(g_idx, "g_idx");
  module.module.bias = take(bias, "bias");
  return module;
}

py::typing::Dict<py::str, py::object> check(const std::vector<const PyModule*>& modules, int bits,
                                            std::int64_t group_size, std::int64_t k,
                                            const std::string& zero_points,
                                            const std::string& labelled,
                                            const std::string& symmetry) {
  std::vector<py::object> owners;
  const GptqTensors layer = make_layer(modules, owners);
  const GptqSpec spec = make_spec(bits, group_size, k, zero_points, labelled, symmetry);
  GptqWeights weights;
  {
    const py::gil_scoped_release release;
    weights = validate(layer, spec);
  }
  bool symmetric = true;
  bool act_order = false;
  std::size_t bytes = 0;
  for (const ValidatedModule& module : weights.modules) {
    symmetric = symmetric && module.symmetric;
    act_order = act_order || module.act_order;
    bytes += module.bytes;
  }
  py::typing::Dict<py::str, py::object> result;
  result["k"] = weights.k;
  result["n"] = weights.n;
  result["group_size"] = weights.group_size;
  result["groups"] = weights.groups;
  result["symmetric"] = symmetric;
  result["act_order"] = act_order;
  result["zero_points"] = zero_point_names(weights);
  result["bytes"] = bytes;
  result["warnings"] = weights.warnings;
  return result;
}

LinearHandle load(const ContextHandle& context, const std::vector<const PyModule*>& modules,
                  int bits, std::int64_t group_size, std::int64_t k, const std::string& zero_points,
                  const std::string& labelled, const std::string& symmetry,
                  const std::string& compute, bool batch_invariant, const std::string& kernel,
                  const std::optional<PySchedules>& schedules) {
  std::vector<py::object> owners;
  const GptqTensors layer = make_layer(modules, owners);
  const GptqSpec spec = make_spec(bits, group_size, k, zero_points, labelled, symmetry);
  LoadOptions options = make_options(compute, batch_invariant, kernel);
  if (schedules) options.schedules = schedules->entries;
  const py::gil_scoped_release release;
  return context.load_gptq(layer, spec, options);
}

void check_rows_of_output(const ConstMatrixView& in, const MatrixView& out) {
  if (out.rows != in.rows) {
    throw Error(ErrorCode::kInvalidArgument,
                concat("out: ", out.rows, " rows, expected ", in.rows));
  }
}

void forward(const LinearHandle& self, const ContextHandle& context, const py::object& x,
             const py::object& out) {
  CallArrays arrays(context);
  const ConstMatrixView in = arrays.matrix(x, "x");
  const MatrixView result = arrays.output(out, "out");
  check_rows_of_output(in, result);
  const bool copied = arrays.copied();
  const py::gil_scoped_release release;
  if (copied) {
    self.forward_host(context, in, result, in.rows);
  } else {
    self.forward(context, in, result, in.rows);
  }
}

double time_forwards(const ContextHandle& context, const std::vector<LinearHandle>& layers,
                     const py::object& x, const py::object& out, std::int64_t first,
                     std::int64_t count) {
  CallArrays arrays(context);
  const ConstMatrixView in = arrays.matrix(x, "x");
  const MatrixView result = arrays.output(out, "out");
  check_rows_of_output(in, result);
  return time_in_turn("time_forwards", context, layers, first, count,
                      [&](const LinearHandle& layer, std::int64_t) {
                        layer.forward(context, in, result, in.rows);
                      });
}

}  // namespace

GptqSpec make_spec(int bits, std::int64_t group_size, std::int64_t k,
                   const std::string& zero_points, const std::string& labelled,
                   const std::string& symmetry) {
  return {.bits = bits,
          .group_size = group_size,
          .k = k,
          .n = 0,
          .zero_points = parse_zero_points("zero_points", zero_points),
          .labelled = parse_zero_points("labelled", labelled),
          .symmetry = parse_symmetry(symmetry)};
}

LoadOptions make_options(const std::string& compute, bool batch_invariant,
                         const std::string& kernel) {
  return {.compute = parse_compute(compute),
          .batch_invariance =
              batch_invariant ? BatchInvariance::kRequired : BatchInvariance::kNotRequired,
          .kernel = kernel};
}

GptqTensors make_layer(const std::vector<const PyModule*>& modules,
                       std::vector<py::object>& owners) {
  GptqTensors layer;
  for (const PyModule* module : modules) {
    if (module == nullptr) {
      throw Error(ErrorCode::kInvalidArgument, "modules: an entry is None, expected a Module");
    }
    layer.modules.push_back(module->module);
    owners.insert(owners.end(), module->owners.begin(), module->owners.end());
  }
  return layer;
}

py::typing::Dict<py::str, py::object> to_dict(const Description& d) {
  py::typing::Dict<py::str, py::object> result;
  result["backend"] = d.backend;
  result["device"] = d.device;
  result["arch"] = d.arch;
  result["kernel"] = d.kernel;
  result["compute"] = d.compute;
  result["schedule"] = d.schedule;
  result["bits"] = d.bits;
  result["group_size"] = d.group_size;
  result["k"] = d.k;
  result["n"] = d.n;
  result["k_padded"] = d.k_padded;
  result["n_padded"] = d.n_padded;
  result["num_experts"] = d.num_experts;
  result["fused"] = d.fused;
  result["symmetric"] = d.symmetric;
  result["act_order"] = d.act_order;
  result["bias"] = d.bias;
  result["batch_invariant"] = d.batch_invariant;
  result["zero_points"] = d.zero_points;
  result["scale_dtype"] = d.scale_dtype;
  result["packed_bytes"] = d.packed_bytes;
  result["checkpoint_bytes"] = d.checkpoint_bytes;
  result["warnings"] = d.warnings;
  return result;
}

void bind_linear(py::module_& module) {
  py::class_<PyModule>(module, "Module", R"(The tensors of one quantised module, borrowed.

Each tensor is a HostTensor or anything that HostTensor takes.)")
      .def(py::init(&make_module), py::arg("name"), py::arg("qweight"), py::arg("scales"),
           py::arg("qzeros") = py::none(), py::arg("g_idx") = py::none(),
           py::arg("bias") = py::none());

  py::class_<LinearHandle>(module, "Linear",
                           "A loaded linear layer; immutable, shared by any number of contexts.")
      .def_property_readonly("in_features", &LinearHandle::in_features)
      .def_property_readonly("out_features", &LinearHandle::out_features)
      .def_property_readonly("backend",
                             [](const LinearHandle& self) { return std::string(self.backend()); })
      .def("describe", [](const LinearHandle& self) { return to_dict(self.describe()); })
      .def(
          "forward", &forward, py::arg("context"), py::arg("x"), py::arg("out"),
          "Writes x [..., K] times the weight into out [..., N]; numpy arrays may be of a layer on "
          "any device.");

  module.def("load_gptq", &load, py::arg("context"), py::arg("modules"), py::kw_only(),
             py::arg("bits") = 4, py::arg("group_size") = 128, py::arg("k") = 0,
             py::arg("zero_points") = "auto", py::arg("labelled") = "auto",
             py::arg("symmetry") = "unknown", py::arg("compute") = "auto",
             py::arg("batch_invariant") = false, py::arg("kernel") = "",
             py::arg("schedules") = py::none(),
             "Loads one layer; several modules are fused along N.");
  module.def("time_forwards", &time_forwards, py::arg("context"), py::arg("layers"), py::arg("x"),
             py::arg("out"), py::kw_only(), py::arg("first"), py::arg("count"),
             "Seconds of `count` forwards without a wait between them, through the layers in turn "
             "from `first` on.");
  module.def("validate", &check, py::arg("modules"), py::kw_only(), py::arg("bits") = 4,
             py::arg("group_size") = 128, py::arg("k") = 0, py::arg("zero_points") = "auto",
             py::arg("labelled") = "auto", py::arg("symmetry") = "unknown",
             "Checks a layer without loading it and tells what it is.");
}

}  // namespace marlinq::bindings
