# A folder that CMake can spell, a C++20 compiler, Python with its headers, and nanobind; what is
# missing is named in one line.
# Included right after project(... LANGUAGES NONE). CMake does not wrap lines that start with a space.

set(folders "${CMAKE_SOURCE_DIR} ${CMAKE_BINARY_DIR}")
if(folders MATCHES "[;<>\"]")
  message(FATAL_ERROR " umfa cannot be built here: CMake cannot spell the folder ${CMAKE_SOURCE_DIR}.\n Build it in one whose name has no ; < > or \".")
endif()

include(CheckLanguage)

check_language(CXX)
if(NOT CMAKE_CXX_COMPILER)
  # Or the next attempt, with a compiler, would read from the cache that there is none.
  unset(CMAKE_CXX_COMPILER CACHE)
  set(tried "")
  if(DEFINED ENV{CXX})
    set(tried " (CXX is '$ENV{CXX}')")
  endif()
  message(FATAL_ERROR " umfa needs a C++20 compiler, and none works here${tried}.\n macOS: xcode-select --install. Debian, Ubuntu: apt install g++. Fedora: dnf install gcc-c++.")
endif()
enable_language(CXX)

# The oldest of each whose C++20 is enough, as the README says. Xcode 15 has the SDK of macOS 14.
set(oldest_GNU 11)
set(oldest_Clang 16)
set(oldest_AppleClang 15)
set(oldest "${oldest_${CMAKE_CXX_COMPILER_ID}}")
if(oldest AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS oldest)
  message(FATAL_ERROR " umfa needs a newer C++ compiler: ${CMAKE_CXX_COMPILER} is ${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}; expected g++ >= ${oldest_GNU}, clang >= ${oldest_Clang} or Xcode >= ${oldest_AppleClang}.\n The environment variable CXX chooses another.")
endif()

find_package(Threads REQUIRED)

find_package(Python 3.10 QUIET COMPONENTS Interpreter)
if(NOT Python_Interpreter_FOUND)
  message(FATAL_ERROR " umfa needs Python >= 3.10 to build, and CMake finds none. -DPython_EXECUTABLE=... names one.")
endif()
# pip's builds say where the headers are, and CMake does not check that they exist.
if(NOT DEFINED Python_INCLUDE_DIR OR EXISTS "${Python_INCLUDE_DIR}/Python.h")
  find_package(Python 3.10 QUIET COMPONENTS Interpreter Development.Module)
endif()
if(NOT Python_Development.Module_FOUND)
  set(version ${Python_VERSION_MAJOR}.${Python_VERSION_MINOR})
  message(FATAL_ERROR " umfa needs Python's headers, and Python.h of ${Python_EXECUTABLE} is missing.\n Debian, Ubuntu: apt install python${version}-dev. Fedora: dnf install python${version}-devel.")
endif()

find_package(nanobind CONFIG REQUIRED)
