// Context, the list of backends, routing.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include <memory>
#include <span>

#include "bindings/arrays.hpp"
#include "bindings/objects.hpp"
#include "core/concat.hpp"
#include "core/matrix_checks.hpp"
#include "core/refuse.hpp"
#include "core/routing.hpp"
#include "marlinq/error.hpp"
#include "marlinq/registry.hpp"
#include "marlinq/routing.hpp"

namespace py = pybind11;

namespace marlinq::bindings {
namespace {

py::typing::List<py::typing::Dict<py::str, py::object>> list_backends() {
  py::typing::List<py::typing::Dict<py::str, py::object>> all;
  for (const BackendInfo& backend : backends()) {
    py::list kernels;
    for (const KernelInfo& kernel : backend.kernels) {
      py::dict entry;
      entry["name"] = kernel.name;
      entry["requires"] = kernel.requires_features;
      entry["usable"] = kernel.usable;
      entry["chosen"] = kernel.chosen;
      kernels.append(entry);
    }
    py::dict entry;
    entry["name"] = backend.name;
    entry["devices"] = backend.devices;
    entry["hardware"] = backend.hardware;
    entry["compute"] = backend.compute;
    entry["kernels"] = kernels;
    all.append(entry);
  }
  return all;
}

template <class T>
std::span<const T> typed_span(const ConstArrayView& view, DType dtype, const char* name) {
  if (view.device.kind != DeviceKind::kCpu || view.dtype != dtype) {
    throw Error(ErrorCode::kInvalidArgument,
                concat(name, ": ", to_string(view.dtype), " on ", to_string(view.device),
                       ", expected ", to_string(dtype), " on cpu"));
  }
  check_alignment(view.data, dtype, name);
  return {static_cast<const T*>(view.data), static_cast<std::size_t>(view.size)};
}

void route_with(const ContextHandle& context, const py::object& logits, const py::object& ids,
                const py::object& weights, int top_k, const std::string& scoring, bool renormalise,
                const py::object& correction_bias, int num_groups, int top_groups, float scale) {
  const BorrowedArray in = borrow(logits, "logits", stream_of(context));
  const BorrowedArray out_ids = borrow(ids, "ids", stream_of(context));
  const BorrowedArray out_weights = borrow(weights, "weights", stream_of(context));
  RouteOptions options{.top_k = top_k,
                       .scoring = parse_scoring(scoring),
                       .renormalise = renormalise ? Renormalise::kYes : Renormalise::kNo,
                       .num_groups = num_groups,
                       .top_groups = top_groups,
                       .scale = scale};
  BorrowedArray bias;
  if (!correction_bias.is_none()) {
    bias = borrow(correction_bias, "correction_bias");
    options.correction_bias =
        typed_span<float>(as_flat(bias, "correction_bias"), DType::kFloat32, "correction_bias");
  }
  const ConstMatrixView logits_view = as_matrix(in, "logits");
  const MatrixView ids_view = as_output(out_ids, "ids");
  const MatrixView weights_view = as_output(out_weights, "weights");
  const py::gil_scoped_release release;
  context.route(logits_view, options, ids_view, weights_view);
}

void copy_between(const ContextHandle& context, const py::object& source,
                  const py::object& target) {
  const BorrowedArray from = borrow(source, "source", stream_of(context));
  const BorrowedArray to = borrow(target, "target", stream_of(context));
  const ConstMatrixView from_view = as_matrix(from, "source");
  const MatrixView to_view = as_output(to, "target");
  const py::gil_scoped_release release;
  context.copy(from_view, to_view);
}

using Ids = py::array_t<std::int32_t>;

py::typing::Tuple<Ids, Ids, py::int_> align(const py::object& topk_ids, int block_size,
                                            int num_experts, const py::object& expert_map) {
  const BorrowedArray ids = borrow(topk_ids, "topk_ids");
  BorrowedArray map;
  std::span<const std::int32_t> map_span;
  if (!expert_map.is_none()) {
    map = borrow(expert_map, "expert_map");
    map_span = typed_span<std::int32_t>(as_flat(map, "expert_map"), DType::kInt32, "expert_map");
  }
  const TokenTiles tiles =
      moe_align_block_size(as_matrix(ids, "topk_ids"), block_size, num_experts, map_span);
  const auto to_array = [](const std::vector<std::int32_t>& values) {
    return Ids(static_cast<py::ssize_t>(values.size()), values.data());
  };
  return py::make_tuple(to_array(tiles.sorted_token_ids), to_array(tiles.expert_ids),
                        tiles.num_tokens_past_padded);
}

ArrayView writable(const BorrowedArray& array, const char* name) {
  if (array.read_only)
    refuse_argument(concat(name, ": read-only, expected an array that can be written"));
  const ConstArrayView view = as_flat(array, name);
  return {.data = array.data, .dtype = view.dtype, .device = view.device, .size = view.size};
}

void align_into(const ContextHandle& context, const py::object& topk_ids,
                const py::object& sorted_token_ids, const py::object& expert_ids,
                const py::object& num_tokens_past_padded, int block_size, int num_experts,
                const py::object& expert_map) {
  const auto take = [&](const py::object& object, const char* name) {
    return borrow(object, name, stream_of(context));
  };
  const BorrowedArray ids = take(topk_ids, "topk_ids");
  const BorrowedArray tokens = take(sorted_token_ids, "sorted_token_ids");
  const BorrowedArray experts = take(expert_ids, "expert_ids");
  const BorrowedArray past = take(num_tokens_past_padded, "num_tokens_past_padded");
  BorrowedArray map;
  ConstArrayView map_view;
  if (!expert_map.is_none()) {
    map = take(expert_map, "expert_map");
    map_view = as_flat(map, "expert_map");
  }
  const ConstMatrixView ids_view = as_matrix(ids, "topk_ids");
  const ArrayView tokens_view = writable(tokens, "sorted_token_ids");
  const ArrayView experts_view = writable(experts, "expert_ids");
  const ArrayView past_view = writable(past, "num_tokens_past_padded");
  const py::gil_scoped_release release;
  context.moe_align_block_size(ids_view, block_size, num_experts, map_view, tokens_view,
                               experts_view, past_view);
}

std::int64_t most_aligned(std::int64_t ids, int block_size, int num_experts) {
  check_tile_size(block_size);
  check_num_experts(num_experts);
  return most_aligned_ids(ids, block_size, num_experts);
}

}  // namespace

void bind_context(py::module_& module) {
  py::class_<ContextHandle>(module, "Context",
                            R"(Device, threads and scratch; used by one thread at a time.

Args:
    device: "cpu", "cuda" or "cuda:N".
    threads: Host threads of a forward; 0 takes as many as the process may run on.
    stream: A CUDA stream as an integer, which must outlive the context; 0 is the default stream.

A context whose forwards were captured in a CUDA graph owns memory that the graph uses, and must outlive it.

Raises:
    UnsupportedError: If no backend of this build runs the device.
    DeviceError: If the device does not exist.)")
      .def(py::init([](const std::string& device, int threads, std::uintptr_t stream) {
             return open_context(parse_device(device),
                                 {.threads = threads, .stream = reinterpret_cast<void*>(stream)});
           }),
           py::arg("device") = "cpu", py::arg("threads") = 0, py::arg("stream") = 0)
      .def_property_readonly("device",
                             [](const ContextHandle& self) { return to_string(self.device()); })
      .def_property_readonly("backend",
                             [](const ContextHandle& self) { return std::string(self.backend()); })
      .def_property_readonly("threads", &ContextHandle::threads)
      .def_property_readonly(
          "stream",
          [](const ContextHandle& self) { return reinterpret_cast<std::uintptr_t>(self.stream()); },
          "The CUDA stream as an integer.")
      .def_property_readonly("scratch_allocations", &ContextHandle::scratch_allocations,
                             "How often the scratch has grown; a repeated size never changes it.")
      .def(
          "peak_rate",
          [](const ContextHandle& self, const std::string& compute, const std::string& kernel) {
            const LoadOptions options = make_options(compute, false, kernel);
            const py::gil_scoped_release release;
            return self.peak_rate(options);
          },
          py::kw_only(), py::arg("compute") = "auto", py::arg("kernel") = "",
          "Operations a second that the arithmetic of a layer cannot pass; 0 where it is not "
          "measured.")
      .def("pregrow_marlin_gather_scratch", &ContextHandle::pregrow_marlin_gather_scratch,
           py::arg("required_elements"),
           "Grows the scratch to m_total * (widest matmul input) elements; only ever grows.")
      .def_property_readonly("captured", &ContextHandle::captured,
                             "Whether work of this context was captured in a CUDA graph.")
      .def("copy", &copy_between, py::arg("source"), py::arg("target"),
           "Copies [..., cols] to the same shape and dtype, each in host memory or on the device.")
      .def("synchronise", &ContextHandle::synchronise, py::call_guard<py::gil_scoped_release>(),
           "Waits for the work of the context's stream.");

  module.def("backends", &list_backends,
             "The backends of this build: name, devices, hardware, compute, kernels.");
  module.def(
      "build_note", [] { return std::string(build_note()); },
      "Whether the CUDA backend was built, and by what or why not.");
  module.def("route", &route_with, py::arg("context"), py::arg("logits"), py::arg("ids"),
             py::arg("weights"), py::kw_only(), py::arg("top_k"), py::arg("scoring") = "softmax",
             py::arg("renormalise") = true, py::arg("correction_bias") = py::none(),
             py::arg("num_groups") = 1, py::arg("top_groups") = 1, py::arg("scale") = 1.0F,
             "Writes ids (i32 [T, top_k]) and weights (f32 [T, top_k]).");
  module.def("moe_align_block_size", &align, py::arg("topk_ids"), py::arg("block_size"),
             py::arg("num_experts"), py::arg("expert_map") = py::none(),
             "(sorted_token_ids i32, expert_ids i32, num_tokens_past_padded).");
  module.def("moe_align_block_size_into", &align_into, py::arg("context"), py::arg("topk_ids"),
             py::arg("sorted_token_ids"), py::arg("expert_ids"), py::arg("num_tokens_past_padded"),
             py::kw_only(), py::arg("block_size"), py::arg("num_experts"),
             py::arg("expert_map") = py::none(),
             "Writes the lists (i32) on the context's device, padded to their ends.");
  module.def("most_aligned_ids", &most_aligned, py::arg("ids"), py::arg("block_size"),
             py::arg("num_experts"),
             "How many entries sorted_token_ids needs for any routing of so many ids.");
}

}  // namespace marlinq::bindings
