// The one place where the version is written; the build and the Python package read it from here.
#pragma once

#define MARLINQ_VERSION "0.1.0"
