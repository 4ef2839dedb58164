#!/usr/bin/env bash
# An environment of its own for the peers, so that their requirements never meet vLLM's: setup.sh [DIRECTORY].
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="${1:-$here/.venv}"

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check install)
# The PyTorch that fastsmc is measured with. A GPU machine takes pip's default build; elsewhere, CPU only.
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    "${pip[@]}" torch==2.13.0
else
    "${pip[@]}" torch==2.13.0+cpu 2>/dev/null ||
        "${pip[@]}" torch==2.13.0+cpu --timeout 20 --retries 2 --extra-index-url https://download.pytorch.org/whl/cpu
fi
# Intel's OpenMP is what `make` runs fastsmc with on a CPU: the peers get the same.
"${pip[@]}" genlm-control==0.4.1 llamppl==0.2.3 accelerate transformers==5.19.0 intel-openmp==2024.2.1
"${pip[@]}" "its_hub[lm]==1.2.0"
# Of what pyvene requires, notebooks and data sets have no part in what is measured.
"${pip[@]}" matplotlib
"${pip[@]}" --no-deps pyvene==0.1.8
echo "peers: ready in $venv"
