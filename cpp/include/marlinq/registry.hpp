// The backends of this build, and the way to a context.
#pragma once

#include <string>
#include <vector>

#include "marlinq/export.hpp"
#include "marlinq/handle.hpp"
#include "marlinq/types.hpp"

namespace marlinq {

struct KernelInfo {
  std::string name;               // what LoadOptions::kernel takes
  std::string requires_features;  // what the hardware must offer, for people
  bool usable = false;            // this machine can run it
  bool chosen = false;            // what an empty LoadOptions::kernel gets
};

struct BackendInfo {
  std::string name;
  std::vector<std::string> devices;  // those present, as parse_device reads them
  std::string hardware;              // what was found, for people
  std::vector<KernelInfo> kernels;
  std::vector<std::string> compute;  // names that LoadOptions::compute takes
};

/// Every backend of this build, whether or not its device is present.
MARLINQ_API std::vector<BackendInfo> backends();

struct ContextOptions {
  int threads = 0;         // host threads; 0: as many as the process may run on
  void* stream = nullptr;  // a CUDA stream for CUDA devices; not owned
};

/// Throws `device` where the device does not exist, `unsupported` where no backend of this build
/// runs it.
MARLINQ_API ContextHandle open_context(Device device, const ContextOptions& options = {});

/// Whether the library was built with the CUDA backend, by which compiler for which architectures, or
/// why not; a line for people.
MARLINQ_API std::string_view build_note() noexcept;

/// The version of the library that is running.
MARLINQ_API std::string_view version() noexcept;

}  // namespace marlinq
