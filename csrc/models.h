// The functions of the module that serve the models: state space models, learned
// butterflies and gated linear units.
#pragma once
#include "call.h"

namespace seqconv::module {

using Call = PyObject*(PyObject*, PyObject* const*, Py_ssize_t);
Call ssm, ssm_step, modes, butterfly, real_part, glu;

}  // namespace seqconv::module
