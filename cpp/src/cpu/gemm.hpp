// The product of row groups with their experts: prepares x, splits the work over threads, stores
// the output.
#pragma once

#include "cpu/context.hpp"
#include "cpu/packed.hpp"

namespace marlinq::cpu {

/// Multiplies the row groups that `state.groups` and `state.rows` list. Views have been checked.
void run_row_groups(ContextState& state, const PackedExperts& packed, const ConstMatrixView& input,
                    const MatrixView& output);

}  // namespace marlinq::cpu
