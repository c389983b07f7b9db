#include "tests/probes.cuh"
