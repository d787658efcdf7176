// Schedules, tune.
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/arrays.hpp"
#include "bindings/objects.hpp"
#include "marlinq/handle.hpp"
#include "marlinq/schedules.hpp"

namespace py = pybind11;

namespace marlinq::bindings {
namespace {

py::typing::List<py::typing::Dict<py::str, py::object>> tune(const ContextHandle& context,
                                                             const LinearHandle& linear,
                                                             const std::vector<std::int64_t>& rows,
                                                             const std::string& dtype) {
  std::vector<TunedSchedule> tuned;
  {
    const DType type = named_dtype(dtype);
    const py::gil_scoped_release release;
    tuned = context.tune(linear, rows, type);
  }
  py::typing::List<py::typing::Dict<py::str, py::object>> all;
  for (const TunedSchedule& found : tuned) {
    const ScheduleEntry& entry = found.entry;
    py::typing::Dict<py::str, py::object> one;
    one["device"] = entry.device;
    one["kernel"] = entry.kernel;
    one["bits"] = entry.bits;
    one["group_size"] = entry.group_size;
    one["n"] = entry.n;
    one["k"] = entry.k;
    one["first_rows"] = entry.first_rows;
    one["last_rows"] = entry.last_rows;
    one["schedule"] = entry.schedule;
    one["us"] = found.us;
    one["estimated_us"] = found.estimated_us;
    one["text"] = entry.schedule.empty() ? std::string() : to_text({&entry, 1});
    all.append(one);
  }
  return all;
}

}  // namespace

void bind_schedules(py::module_& module) {
  py::class_<PySchedules>(module, "Schedules",
                          "Measured schedules: a line for each kind of layer, GPU and rows.")
      .def(py::init([](const std::string& text) {
             return PySchedules{std::make_shared<const Schedules>(parse_schedules(text))};
           }),
           py::arg("text"))
      .def("__len__", [](const PySchedules& self) { return self.entries->size(); })
      .def_property_readonly("text",
                             [](const PySchedules& self) { return to_text(*self.entries); });
}

void bind_tuning(py::module_& module) {
  module.def("tune", &tune, py::arg("context"), py::arg("linear"), py::arg("rows"),
             py::arg("dtype") = "float16",
             "The quickest schedule of a layer for each of these numbers of rows, and its time.");
}

}  // namespace marlinq::bindings
