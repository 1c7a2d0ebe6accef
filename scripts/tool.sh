#!/bin/sh
# Run a tool that pip installed beside the interpreter, or else the one on PATH.
# Usage: tool.sh PYTHON TOOL ARGUMENTS...
python=$1 tool=$2
shift 2
beside=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')/$tool
[ -x "$beside" ] || beside=$tool
exec "$beside" "$@"
