# The engine's build settings, for Docker and for a build on the host: cmake -C docker/engine.cmake -S <llama.cpp>.
set(CMAKE_BUILD_TYPE Release CACHE STRING "")

# The programs find their libraries beside themselves, wherever they are moved to.
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON CACHE BOOL "")
set(CMAKE_INSTALL_RPATH "$ORIGIN" CACHE STRING "")

# Code for every x86-64 with AVX2, not for the machine that happened to compile it.
set(GGML_NATIVE OFF CACHE BOOL "")
# A model is served by one GPU; NCCL would be one more large library.
set(GGML_CUDA_NCCL OFF CACHE BOOL "")
# TLS belongs to a proxy, and models are fetched before the server starts.
set(LLAMA_OPENSSL OFF CACHE BOOL "")
# Both, or the build downloads a web page.
set(LLAMA_BUILD_UI OFF CACHE BOOL "")
set(LLAMA_USE_PREBUILT_UI OFF CACHE BOOL "")

# Nobody runs these.
set(LLAMA_BUILD_TESTS OFF CACHE BOOL "")
set(LLAMA_BUILD_EXAMPLES OFF CACHE BOOL "")
set(LLAMA_BUILD_APP OFF CACHE BOOL "")
