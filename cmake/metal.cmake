# The Metal side of libumfa: the shaders, embedded always, and the Objective-C++ host where there is
# Metal or a double of it.

if(NOT UMFA_METAL MATCHES "^(AUTO|ON|OFF|DOUBLE)$")
  message(FATAL_ERROR "UMFA_METAL is '${UMFA_METAL}'; expected AUTO, ON, OFF or DOUBLE")
endif()
set(umfa_metal ${UMFA_METAL})
if(umfa_metal STREQUAL "AUTO")
  if(APPLE)
    set(umfa_metal ON)
  else()
    set(umfa_metal OFF)
  endif()
endif()
if(umfa_metal STREQUAL "ON" AND NOT APPLE)
  message(FATAL_ERROR "UMFA_METAL=ON needs macOS; elsewhere DOUBLE runs the same sources on a double of Metal")
endif()
if(umfa_metal STREQUAL "DOUBLE" AND APPLE)
  message(FATAL_ERROR "UMFA_METAL=DOUBLE is for Linux; macOS has Metal itself")
endif()

# ---- shaders: their text always, compiled ahead where Apple's compiler is --------------------------
# AUTO: a metallib if Apple's compiler is there and takes the kernels, else their text alone, with a
# message. ON: a build without one is an error. OFF: the compiler is not asked.
set(UMFA_METALLIB AUTO CACHE STRING "Kernels compiled ahead: AUTO, ON or OFF")
set_property(CACHE UMFA_METALLIB PROPERTY STRINGS AUTO ON OFF)
if(NOT UMFA_METALLIB MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "UMFA_METALLIB is '${UMFA_METALLIB}'; expected AUTO, ON or OFF")
endif()
if(UMFA_METALLIB STREQUAL "ON" AND NOT umfa_metal STREQUAL "ON")
  message(FATAL_ERROR "UMFA_METALLIB=ON needs the Metal backend; UMFA_METAL is '${UMFA_METAL}'")
endif()

file(GLOB shader_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/shaders/*.metal)
file(GLOB_RECURSE shader_headers CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/shaders/*.h)
set(embedded ${CMAKE_CURRENT_BINARY_DIR}/embedded_shaders.cpp)
set(metal_tool ${PROJECT_SOURCE_DIR}/cmake/metal_tool.py)
set(air_files "")
set(make_metallib "")
set(metallib_arguments "")
if(umfa_metal STREQUAL "ON" AND NOT UMFA_METALLIB STREQUAL "OFF")
  execute_process(COMMAND xcrun --sdk macosx --find metal
    OUTPUT_VARIABLE found_metal RESULT_VARIABLE metal_missing OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(NOT metal_missing)
    # Since Xcode 26 the tool may be a placeholder for a component that is not installed.
    execute_process(COMMAND xcrun --sdk macosx metal --version RESULT_VARIABLE metal_missing OUTPUT_QUIET ERROR_QUIET)
  endif()
  if(metal_missing AND UMFA_METALLIB STREQUAL "ON")
    message(FATAL_ERROR "UMFA_METALLIB=ON needs Apple's Metal compiler, and 'xcrun --sdk macosx metal --version' "
      "fails; install Xcode and, since Xcode 26, its Metal toolchain: xcodebuild -downloadComponent MetalToolchain")
  elseif(metal_missing)
    message(STATUS "No Metal compiler: kernels will be compiled from their text, at run time")
  else()
    message(STATUS "Metal compiler: ${found_metal}")
    set(metallib ${CMAKE_CURRENT_BINARY_DIR}/umfa.metallib)
    set(run_metal_tool ${Python_EXECUTABLE} ${metal_tool})
    set(metallib_arguments --metallib-or-text ${metallib})
    if(UMFA_METALLIB STREQUAL "ON")
      list(APPEND run_metal_tool --required)
      set(metallib_arguments --metallib ${metallib})
    endif()
    foreach(source IN LISTS shader_sources)
      get_filename_component(name ${source} NAME_WE)
      set(air ${CMAKE_CURRENT_BINARY_DIR}/${name}.air)
      # Mathematics as src/metal/library.mm asks for when it compiles the text: -fno-fast-math is both
      # the safe mode and precise functions. Toolchains before Xcode 16 know no option but this one.
      add_custom_command(OUTPUT ${air}
        COMMAND ${run_metal_tool} --output ${air} --
                xcrun --sdk macosx metal -std=metal3.1 -mmacosx-version-min=14.0 -O2 -fno-fast-math
                -Wall -Wextra -I ${PROJECT_SOURCE_DIR}/shaders -c ${source} -o ${air}
        DEPENDS ${source} ${shader_headers} ${metal_tool} VERBATIM)
      list(APPEND air_files ${air})
    endforeach()
    # One command with what embeds it, so that a metallib of an earlier build cannot stay in.
    set(make_metallib COMMAND ${run_metal_tool} --output ${metallib} --objects ${air_files} --
                              xcrun --sdk macosx metallib ${air_files} -o ${metallib})
  endif()
endif()
add_custom_command(OUTPUT ${embedded}
  ${make_metallib}
  COMMAND ${Python_EXECUTABLE} ${PROJECT_SOURCE_DIR}/shaders/embed.py ${embedded} ${metallib_arguments}
  DEPENDS ${PROJECT_SOURCE_DIR}/shaders/embed.py ${shader_sources} ${shader_headers} ${air_files}
    ${metal_tool} VERBATIM)
target_sources(libumfa PRIVATE ${embedded})

# ---- the host --------------------------------------------------------------------------------------
file(GLOB host_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/metal/*.mm)

if(umfa_metal STREQUAL "OFF")
  target_sources(libumfa PRIVATE ${PROJECT_SOURCE_DIR}/src/metal/unavailable.cpp)
endif()

if(umfa_metal STREQUAL "ON")
  enable_language(OBJCXX)
  # Of the target, which exists already: variables would come too late for it.
  set_target_properties(libumfa PROPERTIES OBJCXX_STANDARD 20 OBJCXX_STANDARD_REQUIRED ON
    OBJCXX_EXTENSIONS OFF OBJCXX_VISIBILITY_PRESET hidden)
  target_sources(libumfa PRIVATE ${host_sources})
  set_source_files_properties(${host_sources} PROPERTIES LANGUAGE OBJCXX
    COMPILE_OPTIONS "-fobjc-arc;-Wunguarded-availability-new")
  # CoreGraphics: without it in the process MTLCreateSystemDefaultDevice returns nil.
  target_link_libraries(libumfa PRIVATE "-framework Metal" "-framework Foundation"
    "-framework CoreGraphics" "-framework IOKit")
endif()

# The same sources, compiled by the clang of PyPI's ziglang for Apple's Objective-C ABI on ELF, which
# the double's runtime reads.
if(umfa_metal STREQUAL "DOUBLE")
  execute_process(COMMAND ${Python_EXECUTABLE} -c
    "import importlib.util as u; print(next(iter(u.find_spec('ziglang').submodule_search_locations)))"
    OUTPUT_VARIABLE zig RESULT_VARIABLE zig_missing OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(zig_missing)
    message(FATAL_ERROR "UMFA_METAL=DOUBLE needs clang: pip install ziglang")
  endif()
  set(double ${PROJECT_SOURCE_DIR}/tools/metal/double)
  file(GLOB double_sources CONFIGURE_DEPENDS ${double}/*.mm ${double}/*/*.mm ${double}/*/*.cpp ${double}/*.cpp)
  file(GLOB_RECURSE double_headers CONFIGURE_DEPENDS ${double}/*.h ${PROJECT_SOURCE_DIR}/src/*.h)
  set(flags -std=c++20 -g -O2 -fPIC -fvisibility=hidden -Wall -Wextra
    -I${PROJECT_SOURCE_DIR}/src -I${PROJECT_SOURCE_DIR}/shaders -I${PROJECT_SOURCE_DIR}/include -I${double})
  if(UMFA_SANITIZE)
    # The runtime that is linked in is that of the C++ compiler, which lacks this clang's newest hooks.
    list(APPEND flags -fsanitize=${UMFA_SANITIZE} -fno-sanitize=function -fno-sanitize-recover=all
      -fno-omit-frame-pointer -mllvm -tsan-instrument-memintrinsics=0)
  endif()
  set(objc_flags -x objective-c++ -fobjc-runtime=macosx-13.0 -fblocks -fno-constant-cfstrings
    -fconstant-string-class=NSConstantString -I${double}/include -I${double}/linux)
  foreach(source IN LISTS host_sources double_sources)
    file(RELATIVE_PATH name ${PROJECT_SOURCE_DIR} ${source})
    string(REPLACE "/" "_" name ${name})
    set(object ${CMAKE_CURRENT_BINARY_DIR}/double_${name}.o)
    set(language_flags "")
    if(source MATCHES "\\.mm$")
      set(language_flags ${objc_flags})
      if(source IN_LIST host_sources)
        list(APPEND language_flags -fobjc-arc)
      endif()
    endif()
    add_custom_command(OUTPUT ${object}
      COMMAND ${zig}/zig clang --driver-mode=g++ -resource-dir ${zig}/lib ${flags} ${language_flags}
              -c ${source} -o ${object}
      DEPENDS ${source} ${double_headers} VERBATIM)
    set_source_files_properties(${object} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
    target_sources(libumfa PRIVATE ${object})
  endforeach()

  # cmake --build ... --target double_stress, for the sanitizers.
  add_executable(double_stress EXCLUDE_FROM_ALL ${PROJECT_SOURCE_DIR}/tests/metal/host/stress.cpp)
  target_include_directories(double_stress PRIVATE ${double})
  target_link_libraries(double_stress PRIVATE libumfa Threads::Threads)
endif()
