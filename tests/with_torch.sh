#!/usr/bin/env bash
# Builds pyperc and runs its tests with another torch, in a copy of the sources and an environment of their own:
#
#   tests/with_torch.sh 2.11.0 [pytest's arguments]
#
# FOLDER (default: build/torch-VERSION) holds both and is kept for the next run. torch comes from where pip is configured
# to look; without a GPU the CUDA build of PyPI, several GB large, runs on the CPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
version=${1:?expected a version of torch, such as 2.11.0}
shift
folder=${FOLDER:-build/torch-$version}
mkdir -p "$folder/source"
folder=$(realpath "$folder")
# What git tracks or would track, and nothing that it no longer does; the copy's own build stays.
find "$folder/source" -mindepth 1 -maxdepth 1 ! -name build -exec rm -r {} +
git ls-files --cached --others --exclude-standard -z | while IFS= read -r -d '' file; do
  [[ ! -e $file ]] || cp --parents --preserve=timestamps --target-directory="$folder/source" "$file"
done
make --directory="$folder/source" test TORCH="torch==$version" VENV="$folder/venv" PYTEST_ARGS="$*"
