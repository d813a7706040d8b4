#!/usr/bin/env bash
# Keep a run alive: start it again after a failure, from its last good checkpoint.
#
#   launch/supervise.sh [--max-restarts N] [--pause S] -- horovodrun -np 4 python -m hvdtrain train lm --run-dir DIR
#
# --help lists the options. SIGTERM, SIGINT and SIGUSR1 make the run save and stop for good.
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec python -m hvdtrain supervise "$@"
