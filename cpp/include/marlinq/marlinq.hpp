// Everything that a user of the handles needs.
#pragma once

#include "marlinq/backend.hpp"
#include "marlinq/error.hpp"
#include "marlinq/gptq.hpp"
#include "marlinq/handle.hpp"
#include "marlinq/linear.hpp"
#include "marlinq/load_options.hpp"
#include "marlinq/moe_block.hpp"
#include "marlinq/registry.hpp"
#include "marlinq/routing.hpp"
#include "marlinq/schedules.hpp"
#include "marlinq/types.hpp"
#include "marlinq/version.hpp"
