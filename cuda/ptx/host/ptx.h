// The instructions on the CPU: the functions and types of device/, with the same signatures but for a last argument that
// says where a call stands. They check what they are asked to do and hand it to the emulator.
#pragma once
#include "ptx/host/types.h"
#include "ptx/host/memory.h"
#include "ptx/host/warp.h"
#include "ptx/host/math.h"
#include "ptx/host/cp_async.h"
#include "ptx/host/mma.h"
#include "ptx/host/mbarrier.h"
#include "ptx/host/cluster.h"
#include "ptx/host/tma.h"
#include "ptx/host/wgmma.h"
#include "emulator/bug.h"
