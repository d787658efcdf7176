// Runs a GPTQ layer of 8 inputs and 2 outputs on a GPU, on a stream and in memory of the program.
#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <marlinq/marlinq.hpp>

int main() {
  try {
    // The codes 8 + weight of 8 input rows, 4 bits each, row 0 lowest: weights 1 to 7 and 8 - 8 = 0
    // in column 0, the same in column 1, whose scale is twice as large. No qzeros: zero point 8.
    const std::array<std::int32_t, 2> qweight = {static_cast<std::int32_t>(0x8FEDCBA9U),
                                                 static_cast<std::int32_t>(0x8FEDCBA9U)};
    const std::array<float, 2> scales = {1.0F, 2.0F};
    const std::array<float, 2> bias = {8.0F, 16.0F};

    marlinq::GptqModule module;
    module.name = "example";
    module.qweight = {qweight.data(), sizeof qweight, marlinq::DType::kInt32, {1, 2}, 2};
    module.scales = {scales.data(), sizeof scales, marlinq::DType::kFloat32, {1, 2}, 2};
    module.bias = {bias.data(), sizeof bias, marlinq::DType::kFloat32, {2, 0}, 1};

    const marlinq::Device device = marlinq::parse_device("cuda");
    cudaStream_t stream = nullptr;
    cudaStreamCreate(&stream);  // marlinq reports a missing device, with its reason, below
    const marlinq::ContextHandle context = marlinq::open_context(device, {.stream = stream});
    const marlinq::LinearHandle linear =
        context.load_gptq(module, {.bits = 4, .group_size = -1, .k = 8});

    const std::array<float, 8> x = {1, 1, 1, 1, 1, 1, 1, 1};  // rounded to float16 by the kernel
    std::array<float, 2> y = {};
    void* there = nullptr;
    if (cudaMalloc(&there, sizeof x + sizeof y) != cudaSuccess) return 1;
    void* result = static_cast<char*>(there) + sizeof x;
    cudaMemcpyAsync(there, x.data(), sizeof x, cudaMemcpyHostToDevice, stream);
    const marlinq::DType type = marlinq::DType::kFloat32;
    linear.forward(context, {.data = there, .dtype = type, .device = device, .rows = 1, .cols = 8},
                   {.data = result, .dtype = type, .device = device, .rows = 1, .cols = 2}, 1);
    cudaMemcpyAsync(y.data(), result, sizeof y, cudaMemcpyDeviceToHost, stream);
    if (cudaStreamSynchronize(stream) != cudaSuccess) return 1;

    const marlinq::Description description = linear.describe();
    std::printf("marlinq %s on %s, kernel %s\n", MARLINQ_VERSION, description.device.c_str(),
                description.kernel.c_str());
    std::printf("y = %g %g\n", static_cast<double>(y[0]), static_cast<double>(y[1]));
    cudaFree(there);
  } catch (const marlinq::Error& error) {
    std::fprintf(stderr, "%s: %s\n", marlinq::to_string(error.code()).data(), error.what());
    return 1;
  }
  return 0;
}
