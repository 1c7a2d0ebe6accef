#!/bin/sh
# Print what a compiled extension depends on: the interpreter, its version and its torch.
# Usage: python_id.sh PYTHON
exec "$1" -c '
import importlib.metadata, sys
print(sys.executable, sys.version)
try:
    print("torch", importlib.metadata.version("torch"))
except importlib.metadata.PackageNotFoundError:
    print("torch is missing")
'
