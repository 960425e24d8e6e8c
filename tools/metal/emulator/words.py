"""Every word that the Metal language or its library has taken, by what taking it again does.

Sources (facts only, no text was taken):

* Metal Shading Language Specification: 1.4 (C++14 and its restrictions), 2 (types), 4 (address
  spaces), 5 (functions, attributes, arguments), 6 (library), and the chapters on tensors of 4.0.
* C++14, N4431, 2.5 (alternative tokens), 2.11 (keywords), 2.10 (reserved identifiers); C++20's new
  keywords, which a later standard brings along.
* naga's list for Metal: gfx-rs/wgpu, naga/src/back/msl/keywords.rs.
* SPIRV-Cross: KhronosGroup/SPIRV-Cross, spirv_msl.cpp, the reserved keywords and illegal function
  names of ``CompilerMSL``; its issue 517 shows ``xcrun metal`` refusing ``float4 fragment;``.
* A clang with a Metal front end, which lists keywords, predefined macros and object types as
  measured with Apple's compiler: kagurasumusun/llvm-project, clang/include/clang/Basic,
  TokenKinds.def, MetalMacros.def, MetalBuiltinObjects.def.
* The stand-in headers in ``include/``: a test sees that each name they declare is here.
"""

from __future__ import annotations


def word_set(text: str) -> frozenset[str]:
    """The words of a text, to write long lists as one."""
    return frozenset(text.split())


# ------------------------------------------------------------------------------------- keywords

CPP_KEYWORDS = word_set(
    """
    alignas alignof asm auto bool break case catch char char16_t char32_t class const constexpr
    const_cast continue decltype default delete do double dynamic_cast else enum explicit export
    extern false float for friend goto if inline int long mutable namespace new noexcept nullptr
    operator private protected public register reinterpret_cast return short signed sizeof static
    static_assert static_cast struct switch template this thread_local throw true try typedef typeid
    typename union unsigned using virtual void volatile wchar_t while
    """
)
ALTERNATIVE_TOKENS = word_set("and and_eq bitand bitor compl not not_eq or or_eq xor xor_eq")
# Of functions, of memories, and the types that are built into the compiler.
METAL_KEYWORDS = word_set(
    """
    kernel vertex fragment
    device constant thread threadgroup threadgroup_imageblock ray_data object_data
    half bfloat restrict typeof
    """
)
KEYWORDS = CPP_KEYWORDS | ALTERNATIVE_TOKENS | METAL_KEYWORDS
"""Never a name, in no scope."""

# --------------------------------------------------------------------------------- words to come

# Attributes that begin a function and are spelled as keywords too since Metal 3 or 4, the words of
# Metal 4, and the keywords of C++17 and C++20. As names they compile today, or with some compilers.
COMING_WORDS = word_set(
    """
    mesh object visible stitchable intersection tile tensor compute
    char8_t co_await co_return co_yield concept consteval constinit requires import module
    """
)
"""Names today, and no longer with a later standard: not in our own text."""

# --------------------------------------------------------------------------------------- macros

_LIMITS = [
    *(
        f"{t}_{m}"
        for t in ("CHAR", "SCHAR", "SHRT", "INT", "LONG", "LLONG")
        for m in ("MAX", "MIN")
    ),
    *(f"{t}_MAX" for t in ("UCHAR", "USHRT", "UINT", "ULONG", "ULLONG")),
    *(
        f"{t}_{m}"
        for t in ("FLT", "HALF", "DBL", "BFLT")
        for m in (
            *("DIG", "MANT_DIG", "MAX_10_EXP", "MAX_EXP", "MIN_10_EXP", "MIN_EXP", "RADIX"),
            *("MAX", "MIN", "EPSILON", "DECIMAL_DIG", "TRUE_MIN"),
        )
    ),
]
_CONSTANTS = [
    f"M_{name}{suffix}"
    for name in (
        *("E", "LOG2E", "LOG10E", "LN2", "LN10", "PI", "PI_2", "PI_4", "1_PI", "2_PI"),
        *("2_SQRTPI", "SQRT2", "SQRT1_2"),
    )
    for suffix in ("", "_F", "_H", "_BF")
]
MACROS = (
    word_set(
        """
        CHAR_BIT FP_ILOGB0 FP_ILOGBNAN INFINITY NAN MAXFLOAT MAXHALF MAXBFLOAT MAXDOUBLE
        HUGE_VAL HUGE_VALF HUGE_VALH HUGE_VALBF NULL assert
        VARIABLE_TRACEPOINT STATIC_DATA_TRACEPOINT STATIC_DATA_TRACEPOINT_V
        METAL_ALIGN METAL_ARG_UNIFORM METAL_ASM METAL_COMPATIBLE_COMPARE_EXCHANGE_ORDERS METAL_CONST
        METAL_CONST_ARG METAL_DEPRECATED METAL_ENABLE_IF METAL_EXPLICIT METAL_FUNC METAL_IMPLICIT
        METAL_INTERNAL METAL_NON_NULL_RETURN METAL_NORETURN METAL_NOTHROW METAL_PURE
        METAL_UNAVAILABLE METAL_VALID_COMPARE_EXCHANGE_FAILURE_ORDER METAL_VALID_LEVEL_ARG
        METAL_VALID_LOAD_ORDER METAL_VALID_LOD_ARG METAL_VALID_RENDER_TARGET METAL_VALID_STORE_ORDER
        METAL_ZERO_ARG
        """
    )
    | frozenset(_LIMITS)
    | frozenset(_CONSTANTS)
)
"""Macros of Metal's headers: a name that is one of them is replaced before the compiler reads it.
Those with two underscores, as __METAL_VERSION__, are reserved anyway."""

# ---------------------------------------------------------------------------------------- types

ELEMENTS = (
    *("bool", "char", "uchar", "short", "ushort", "int", "uint", "long", "ulong", "half"),
    *("bfloat", "float", "llong", "ullong", "double", "size_t", "ptrdiff_t"),
)
_VECTORS = [f"{e}{n}" for e in ELEMENTS[:-2] for n in (2, 3, 4, 8, 16)]
_MATRICES = [
    f"{p}{e}{c}x{r}"
    for p in ("", "packed_")
    for e in ("float", "half", "bfloat", "double")
    for c in (2, 3, 4)
    for r in (2, 3, 4)
]
_TEXTURES = [
    *(f"texture{d}" for d in ("1d", "1d_array", "2d", "2d_array", "3d", "cube", "cube_array")),
    *("texture2d_ms", "texture2d_ms_array", "texture_buffer"),
    *(f"depth{d}" for d in ("2d", "2d_array", "cube", "cube_array", "2d_ms", "2d_ms_array")),
]
GLOBAL_TYPES = (
    word_set(
        """
        uchar ushort uint ulong llong ullong size_t ptrdiff_t intptr_t uintptr_t
        int8_t uint8_t int16_t uint16_t int32_t uint32_t int64_t uint64_t
        quad complex imaginary as_type
        """
    )
    | frozenset(_VECTORS)
    | frozenset(f"packed_{v}" for v in _VECTORS)
    | frozenset(_MATRICES)
)
"""Types that <metal_types> declares in the global namespace."""

LIBRARY_TYPES = word_set(
    """
        metal fast precise raytracing interpolation
        vec packed_vec matrix packed_matrix array array_ref uniform extents dextents
        atomic atomic_bool atomic_int atomic_uint atomic_long atomic_ulong atomic_float
        memory_order thread_scope mem_flags memory_coherence access
        simdgroup_matrix simdgroup_half8x8 simdgroup_float8x8 simdgroup_bfloat8x8 simd_vote
        quad_vote simdgroup_future simdgroup_event threadgroup_event
        sampler coord address filter mag_filter min_filter mip_filter compare_func border_color
        s_address t_address r_address lod_clamp max_anisotropy reduction component
        bias level gradient2d gradientcube gradient3d min_lod_clamp lod_options
        imageblock imageblock_layout_explicit imageblock_layout_implicit patch_control_point
        interpolant vertex_value mesh_grid_properties topology rounding_mode
        command_buffer render_command compute_command render_pipeline_state compute_pipeline_state
        depth_stencil_state primitive_type cull_mode winding depth_clip_mode triangle_fill_mode
        visible_function_table intersection_function_table function_handle
        acceleration_structure instance_acceleration_structure primitive_acceleration_structure
        intersector intersection_query intersection_result intersection_params ray
        triangle_data world_space_data instancing primitive_motion instance_motion user_data_buffer
        curve_data extended_limits max_levels intersection_function_buffer
        tensor_handle tensor_offset tensor_inline tensor_thread cooperative_tensor tensor_ops
        numeric_limits os_log log_type
        integral_constant true_type false_type bool_constant enable_if enable_if_t conditional
        conditional_t is_same is_same_v is_void is_integral is_integral_v is_floating_point
        is_floating_point_v is_arithmetic is_arithmetic_v is_array is_enum is_union is_class
        is_function is_pointer is_reference is_lvalue_reference is_rvalue_reference is_fundamental
        is_object is_scalar is_compound is_const is_volatile is_signed is_unsigned is_unsigned_v
        is_signed_v is_convertible is_base_of is_constructible is_empty is_final is_pod is_trivial
        is_trivially_copyable is_vector is_matrix is_null_pointer is_null_pointer_v is_polymorphic
        is_abstract is_standard_layout is_literal_type is_member_pointer
        is_member_object_pointer is_member_function_pointer is_default_constructible
        is_copy_constructible is_move_constructible is_assignable is_destructible
        add_const add_cv add_volatile add_pointer add_lvalue_reference add_rvalue_reference
        remove_const remove_const_t remove_cv remove_cv_t remove_volatile remove_volatile_t
        remove_pointer remove_pointer_t remove_reference remove_reference_t remove_extent
        remove_all_extents make_signed make_signed_t make_unsigned make_unsigned_t make_scalar
        make_scalar_t make_vector decay decay_t common_type common_type_t underlying_type
        underlying_type_t result_of alignment_of alignment_of_v rank rank_v extent extent_v
        aligned_storage integer_sequence index_sequence make_integer_sequence make_index_sequence
        conjunction conjunction_v disjunction disjunction_v negation negation_v vec_elements
        """
) | frozenset(_TEXTURES)
"""Types, type traits and namespaces of namespace metal."""

ENUMERATORS = word_set(
    """
    memory_order_relaxed memory_order_acquire memory_order_release memory_order_acq_rel
    memory_order_seq_cst thread_scope_thread thread_scope_simdgroup thread_scope_threadgroup
    thread_scope_device mem_none mem_device mem_threadgroup mem_texture mem_threadgroup_imageblock
    mem_object_data
    """
)
TYPES = GLOBAL_TYPES | LIBRARY_TYPES | ENUMERATORS
"""Names of types, namespaces and enumerators: what hides one makes a text that says one thing to
its reader and another to the compiler, and at global scope it is an error or ambiguous."""

# ------------------------------------------------------------------------------------ functions

_MATH = """
    acos acosh asin asinh atan atan2 atanh ceil copysign cos cosh cospi divide erf erfc exp exp10
    exp2 expm1 fabs abs fdim floor fma fmax fmax3 fmedian3 fmin fmin3 fmod fract frexp ilogb ldexp
    log log10 log1p log2 logb max max3 median3 min min3 modf nextafter pow powr remainder rint round
    rsqrt sin sincos sincospi sinh sinpi sqrt tan tanh tanpi trunc clamp mix saturate sign
    smoothstep step
"""
_REDUCTIONS = ("and", "max", "min", "or", "product", "sum", "xor", "add", "mul")
_SHUFFLES = (
    *("broadcast", "broadcast_first", "shuffle", "shuffle_xor", "shuffle_up", "shuffle_down"),
    *("shuffle_rotate_up", "shuffle_rotate_down", "shuffle_and_fill_up", "shuffle_and_fill_down"),
    *("all", "any", "ballot", "is_first", "is_helper_thread", "active_threads_mask"),
    *("prefix_inclusive_sum", "prefix_exclusive_sum", "prefix_inclusive_product"),
    *("prefix_exclusive_product", "elect"),
    *_REDUCTIONS,
)
FUNCTIONS = (
    word_set(_MATH)
    | word_set(
        """
        cross distance distance_squared dot faceforward length length_squared normalize reflect
        refract
        absdiff addsat clz ctz extract_bits hadd insert_bits mad24 madhi madsat mul24 mulhi popcount
        reverse_bits rhadd rotate subsat
        all any isequal isfinite isgreater isgreaterequal isinf isless islessequal islessgreater
        isnan isnormal isnotequal isordered isunordered select signbit
        determinant transpose inverse
        simdgroup_load simdgroup_store simdgroup_multiply simdgroup_multiply_accumulate
        simdgroup_async_copy simdgroup_barrier threadgroup_barrier
        make_filled_simdgroup_matrix make_uniform make_bool
        is_function_constant_defined discard_fragment dfdx dfdy fwidth get_num_samples
        get_sample_position calculate_clamped_lod calculate_unclamped_lod
        atomic_thread_fence os_log_default get_null_render_pipeline_state swap declval
        """
    )
    | frozenset(f"{p}_{f}" for p in ("simd", "quad") for f in _SHUFFLES)
    | frozenset(
        f"atomic_{f}"
        for f in (
            *("load_explicit", "store_explicit", "exchange_explicit", "init", "flag"),
            *("compare_exchange_weak_explicit", "max_explicit", "min_explicit"),
            *(f"fetch_{op}_explicit" for op in ("add", "and", "max", "min", "or", "sub", "xor")),
        )
    )
    | frozenset(
        f"pack_{e}_to_{f}"
        for e in ("float", "half")
        for f in (
            *("snorm4x8", "unorm4x8", "srgb_unorm4x8", "snorm2x16", "unorm2x16", "unorm10a2"),
            *("unorm565", "unorm9995"),
        )
    )
    | frozenset(
        f"unpack_{f}_to_{t}"
        for f in (
            *("snorm4x8", "unorm4x8", "unorm4x8_srgb", "snorm2x16", "unorm2x16", "unorm10a2"),
            *("unorm565",),
        )
        for t in ("float", "half")
    )
)
"""Functions of namespace metal. A local variable, a parameter or a member may hide one, which much
published Metal does (candle has parameters named cos and sin); our own functions may not."""


def is_reserved(name: str) -> bool:
    """Whether C++ keeps this name for the implementation, wherever it stands."""
    return "__" in name or (len(name) > 1 and name[0] == "_" and name[1].isupper())
