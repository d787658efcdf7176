// Error as Python exceptions.
#pragma once

namespace marlinq::bindings {

/// Translates marlinq::Error into the classes of marlinq.errors from now on.
void register_errors();

}  // namespace marlinq::bindings
