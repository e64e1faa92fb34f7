#!/usr/bin/env bash
# Sinusoid regression with the step size of the command that the authors published, α = 0.001, where
# the paper's text has 0.01.
. "$(dirname "${BASH_SOURCE[0]}")/../lib/experiment.sh"
cell sinusoid_published_command 5 10
