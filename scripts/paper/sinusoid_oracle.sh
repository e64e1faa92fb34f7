#!/usr/bin/env bash
# Sinusoid regression, a network that is told amplitude and phase: the lower bound of section 5.1.
. "$(dirname "${BASH_SOURCE[0]}")/../lib/experiment.sh"
cell sinusoid_oracle
