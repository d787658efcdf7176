// Every schedule of the sm80 kernels: plans.cuh says how they are timed.
#include "plans.cuh"

int main(int argc, char** argv) { return marlinq::bench::run_plans(argc, argv, "sm80"); }
