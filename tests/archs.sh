#!/bin/sh
# Prints CMAKE_CUDA_ARCHITECTURES for a build that is to run here: CUDAARCHS where that is set, or machine code for the
# GPUs of this machine. Where it sees none, code for 8.0 that any newer GPU can translate.
[ -z "${CUDAARCHS:-}" ] || { echo "$CUDAARCHS"; exit; }
archs=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d '. ' | sort -un |
  awk '$1 >= 80 { printf "%s%s-real", separator, $1; separator = ";" }')
echo "${archs:-80}"
