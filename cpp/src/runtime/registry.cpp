// The table of backends; the build generates its entries.
#include "marlinq/registry.hpp"

#include <array>
#include <string>

#include "marlinq/version.hpp"
#include "marlinq_backend_list.hpp"  // generated: includes each backend, defines MARLINQ_BACKEND_LIST
#include "runtime/erased.hpp"

namespace marlinq {
namespace {

const auto& entries() {
  static const std::array table = {MARLINQ_BACKEND_LIST};
  return table;
}

}  // namespace

std::vector<BackendInfo> backends() {
  std::vector<BackendInfo> all;
  for (const BackendEntry& entry : entries()) all.push_back(entry.info());
  return all;
}

ContextHandle open_context(Device device, const ContextOptions& options) {
  std::string known;
  for (const BackendEntry& entry : entries()) {
    if (entry.runs(device.kind))
      return detail::guarded([&] { return entry.open(device, options); });
    known += (known.empty() ? "" : ", ") + std::string(entry.name);
  }
  throw Error(ErrorCode::kUnsupported, concat("device '", to_string(device),
                                              "': no backend of this build runs it (backends: ",
                                              known, "; built ", build_note(), ")"));
}

std::string_view build_note() noexcept { return MARLINQ_BUILD_NOTE; }

std::string_view version() noexcept { return MARLINQ_VERSION; }

}  // namespace marlinq
