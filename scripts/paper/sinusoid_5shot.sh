#!/usr/bin/env bash
# Sinusoid regression, trained with K = 10, evaluated with K = 5: section 5.1, figures 2 and 3.
# Shares its run with sinusoid_10shot.sh.
. "$(dirname "${BASH_SOURCE[0]}")/../lib/experiment.sh"
cell sinusoid 5
