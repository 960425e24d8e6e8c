// A call in an XLA program: its options are attributes, and its tensors buffers.
#pragma once

#include <string_view>

#include "python/record.h"
#include "python/xla_abi.h"

namespace umfa::python {

/// The attributes of a handler, by name. Whatever is not there or of another type is an error.
class XlaAttributes {
public:
    explicit XlaAttributes(const xla::Attributes& attributes) : attributes_(attributes) {}

    std::string_view text(std::string_view name) const;
    bool flag(std::string_view name) const;
    /// The options that they say, with `also` more attributes that are none.
    Options options(std::initializer_list<std::string_view> also) const;

private:
    const xla::Attributes& attributes_;
};

/// The request on buffers, in the order of options.given.
AttentionRequest make_request(const Options& options, xla::Buffer* const* buffers);

/// Throws `Error` where umfa has no such dtype.
TensorView view_of(const xla::Buffer& buffer, std::string_view function, std::string_view name);

/// The parts of a text between separators; none of an empty one.
std::vector<std::string> parts_of(std::string_view text, char separator = ',');

}  // namespace umfa::python
