// The bind functions, and what more than one of them needs.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/typing.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "marlinq/gptq.hpp"
#include "marlinq/linear.hpp"
#include "marlinq/load_options.hpp"
#include "marlinq/schedules.hpp"

namespace marlinq::bindings {

void bind_context(pybind11::module_& module);
void bind_schedules(pybind11::module_& module);  // before those that take them
void bind_linear(pybind11::module_& module);
void bind_tuning(pybind11::module_& module);
void bind_expert_stack(pybind11::module_& module);
void bind_moe(pybind11::module_& module);

/// A module of a checkpoint with the Python objects that own its tensors.
struct PyModule {
  GptqModule module;
  std::vector<pybind11::object> owners;
};

/// Measured schedules, shared by the layers that are loaded with them.
struct PySchedules {
  std::shared_ptr<const Schedules> entries;
};

/// Reads bits, group_size, k, zero_points, labelled and symmetry. Throws invalid_argument.
GptqSpec make_spec(int bits, std::int64_t group_size, std::int64_t k,
                   const std::string& zero_points, const std::string& labelled,
                   const std::string& symmetry);

LoadOptions make_options(const std::string& compute, bool batch_invariant,
                         const std::string& kernel);

/// The modules of one layer; their tensors stay borrowed. `owners` then keeps them alive, whatever becomes
/// of the Python list while the GIL is released.
GptqTensors make_layer(const std::vector<const PyModule*>& modules,
                       std::vector<pybind11::object>& owners);

pybind11::typing::Dict<pybind11::str, pybind11::object> to_dict(const Description& description);

}  // namespace marlinq::bindings
