#!/usr/bin/env bash
# Sinusoid regression, trained with K = 10, evaluated with K = 10 and 20: section 5.1, figures 2 and
# 3. Shares its run with sinusoid_5shot.sh.
. "$(dirname "${BASH_SOURCE[0]}")/../lib/experiment.sh"
cell sinusoid 10 20
