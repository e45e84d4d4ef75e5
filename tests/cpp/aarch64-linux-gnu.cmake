# Cross compiles with Debian's g++-aarch64-linux-gnu; the tests run under qemu-aarch64, which takes
# the CPU from QEMU_CPU. Usage: cmake -DCMAKE_TOOLCHAIN_FILE=tests/cpp/aarch64-linux-gnu.cmake ...
# README.md ("Wheels for the CPUs that you ship to") makes wheels with it.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)

set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_OBJDUMP aarch64-linux-gnu-objdump CACHE FILEPATH "")
set(CMAKE_NM aarch64-linux-gnu-nm CACHE FILEPATH "")

set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE BOTH)  # pybind11, which is headers alone

# The extension's name; pybind11 would take it from the Python that runs the build.
set(PYTHON_MODULE_EXTENSION "$ENV{SETUPTOOLS_EXT_SUFFIX}" CACHE INTERNAL "")
set(PYTHON_MODULE_DEBUG_POSTFIX "" CACHE INTERNAL "")

set(LOWBIT_TEST_LAUNCHER qemu-aarch64 -L /usr/aarch64-linux-gnu CACHE STRING "")
