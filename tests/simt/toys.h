// Small kernels that hold the emulator to its word: right ones, and one for each mistake that it must report.
#pragma once

#include <string>

std::string run_toy(int number, int* memory);
