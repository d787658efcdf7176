// Symbol visibility of the shared library.
#pragma once

#if defined(__GNUC__) || defined(__clang__)
#define MARLINQ_API __attribute__((visibility("default")))
#else
#define MARLINQ_API
#endif
