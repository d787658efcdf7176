// marlinq._core: the handles for Python. One bind function per subject.
#include <pybind11/pybind11.h>

#include "bindings/arrays.hpp"
#include "bindings/errors.hpp"
#include "bindings/objects.hpp"
#include "marlinq/registry.hpp"

PYBIND11_MODULE(_core, module) {
  using namespace marlinq::bindings;
  module.doc() =
      "The compiled core of marlinq. Use the marlinq package; this module's names may change.";
  module.attr("__version__") = std::string(marlinq::version());
  register_errors();
  bind_arrays(module);
  bind_context(module);
  bind_device_buffer(module);
  bind_schedules(module);
  bind_linear(module);
  bind_tuning(module);
  bind_expert_stack(module);
  bind_moe(module);
}
