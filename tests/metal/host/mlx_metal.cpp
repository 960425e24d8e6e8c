// The lazy operation behind the stand-in for mx.fast.metal_kernel (mlx_metal.py): a primitive of MLX's
// own graph, for its CPU device, that calls back when it is evaluated. Compiled by the tests, against
// the headers of the MLX that they run with.
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <vector>

#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"
#include "mlx/stream.h"

namespace {

using namespace mlx::core;

/// An array when a kernel runs: its whole memory, and where it lies there.
struct Evaluated {
    void* memory;
    int64_t size;    // of the memory, in bytes
    int64_t offset;  // of the first element, in bytes
    const int64_t* strides;
    int32_t ndim;
    int32_t is_output;
};

/// `arrays`: the inputs, then the outputs.
using Run = void (*)(int64_t id, const Evaluated* arrays);

class MetalKernel : public Primitive {
public:
    MetalKernel(Stream stream, int64_t id, Run run) : Primitive(stream), id_(id), run_(run) {}

    void eval_cpu(const std::vector<array>& inputs, std::vector<array>& outputs) override {
        std::vector<array> kept = inputs;
        for (array& output : outputs) {
            output.set_data(allocator::malloc(output.nbytes()));
            kept.push_back(output);
        }
        // The stream runs later, in its order.
        cpu::get_command_encoder(stream()).dispatch(
            [kept, inputs = inputs.size(), id = id_, run = run_]() mutable {
                std::vector<Evaluated> arrays;
                for (size_t i = 0; i < kept.size(); ++i) {
                    array& own = kept[i];
                    char* memory = static_cast<char*>(own.buffer().raw_ptr());
                    arrays.push_back({memory, static_cast<int64_t>(own.buffer_size()),
                                      own.data<char>() - memory, own.strides().data(),
                                      static_cast<int32_t>(own.ndim()), i >= inputs});
                }
                run(id, arrays.data());
            });
    }
    void eval_gpu(const std::vector<array>& inputs, std::vector<array>& outputs) override {
        eval_cpu(inputs, outputs);
    }
    const char* name() const override { return "MetalKernel"; }

private:
    const int64_t id_;
    const Run run_;
};

}  // namespace

extern "C" {

/// As Python's of the same array, if the address is an array's.
uint64_t umfa_mlx_size(const void* address) { return static_cast<const array*>(address)->size(); }

/// Makes `outputs`, arrays that exist, the results of a kernel. `dtypes`: an array of each. `sizes`: all
/// dimensions, of which each output has `ndims`. Returns 0, or -1 with an error's text.
int umfa_mlx_metal_kernel(int64_t id, Run run, void** inputs, int input_count, void** outputs,
                          void** dtypes, const int* ndims, const int* sizes, int output_count,
                          char* error, int error_size) try {
    std::vector<array> from;
    for (int i = 0; i < input_count; ++i) from.push_back(*static_cast<array*>(inputs[i]));
    std::vector<Shape> shapes;
    std::vector<Dtype> types;
    for (int i = 0; i < output_count; ++i) {
        shapes.emplace_back(sizes, sizes + ndims[i]);
        sizes += ndims[i];
        types.push_back(static_cast<array*>(dtypes[i])->dtype());
    }
    const Stream stream = default_stream(default_device());
    const std::vector<array> made =
        array::make_arrays(shapes, types, std::make_shared<MetalKernel>(stream, id, run), from);
    for (int i = 0; i < output_count; ++i)
        *static_cast<array*>(outputs[i]) = made[static_cast<size_t>(i)];
    return 0;
} catch (const std::exception& caught) {
    std::strncpy(error, caught.what(), static_cast<size_t>(error_size) - 1);
    return -1;
}

}  // extern "C"
