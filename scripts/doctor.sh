#!/bin/sh
# Say what this machine lacks for building fusedrnn, and the command that installs it.
#
# Usage: doctor.sh [--venv | --given] [PYTHON]
#   PYTHON   the interpreter to look at (python3)
#   --venv   an environment will be made with it: it needs venv
#   --given  its environment is used as it is: it needs torch and the build tools in there
# The compiler is ${CXX:-g++}. Exit status 1 if anything is missing; silent if nothing is.

mode=build
case "$1" in
--venv) mode=venv; shift ;;
--given) mode=given; shift ;;
esac
python=${1:-python3}
cxx=${CXX:-g++}

problems=""
debian=""  # packages for apt-get
pypi=""    # packages for pip

lacks() { # lacks WHAT [DEBIAN-PACKAGE...]
    problems="$problems
  - $1"
    shift
    for package in "$@"; do
        case " $debian " in *" $package "*) ;; *) debian="$debian $package" ;; esac
    done
}

ask() { # ask PYTHON-CODE: its output, nothing where it fails
    "$python" -c "$1" 2>/dev/null
}

# --- python ---
if ! command -v "$python" >/dev/null 2>&1; then
    lacks "no '$python' on PATH" python3 python3-venv python3-dev
else
    version=$(ask 'import sys; print("%d.%d" % sys.version_info[:2])')
    # Debian's unversioned packages belong to /usr/bin/python3; other versions name theirs.
    base=python3
    if [ "$(/usr/bin/python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" != "$version" ]; then
        base=python$version
    fi
    if [ "$(ask 'import sys; print(sys.version_info >= (3, 10))')" != True ]; then
        lacks "'$python' is Python ${version:-that does not run}; 3.10 or newer is needed: make PYTHON=python3.11"
    else
        if [ $mode = venv ] && ! ask 'import venv, ensurepip'; then
            lacks "$python has no venv (modules venv and ensurepip)" "$base-venv"
        fi
        headers=$(ask 'import sysconfig; print(sysconfig.get_paths()["include"])')
        if [ ! -f "$headers/Python.h" ]; then
            lacks "$python has no C headers (Python.h)" "$base-dev"
        fi
        if [ $mode = given ]; then
            for package in torch numpy pybind11 ninja setuptools pip; do
                if [ "$(ask "import importlib.metadata as m; print(bool(m.version('$package')))")" != True ]; then
                    lacks "$python has no package $package"
                    pypi="$pypi $package"
                fi
            done
            torch=$(ask 'import importlib.metadata as m; print(m.version("torch"))')
            if [ -n "$torch" ] && [ "$(ask "print(tuple(map(int, '$torch'.split('.')[:2])) >= (2, 11))")" != True ]; then
                lacks "$python has torch $torch; 2.11 or newer is needed"
                pypi="$pypi 'torch>=2.11'"
            fi
            setuptools=$(ask 'import importlib.metadata as m; print(m.version("setuptools"))')
            if [ -n "$setuptools" ] && [ "$(ask "print(int('$setuptools'.split('.')[0]) >= 77)")" != True ]; then
                lacks "$python has setuptools $setuptools; 77 or newer is needed"
                pypi="$pypi 'setuptools>=77'"
            fi
        fi
    fi
fi

# --- compiler and make ---
command -v make >/dev/null 2>&1 || lacks "no 'make' on PATH" make
if ! command -v "$cxx" >/dev/null 2>&1; then
    lacks "no '$cxx' on PATH" g++
else
    work=$(mktemp -d) || exit 1
    trap 'rm -rf "$work"' EXIT
    printf '#include <concepts>\n#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n' >"$work/try.cpp"
    if ! "$cxx" -std=c++20 -fopenmp "$work/try.cpp" -o "$work/try" >/dev/null 2>&1; then
        lacks "'$cxx' does not compile C++20 with OpenMP; g++ 11 or newer does" g++
    fi
fi

[ -z "$problems" ] && exit 0
{
    echo "fusedrnn: this machine lacks what the build needs:$problems"
    if [ -n "$debian" ]; then
        echo "On Debian or Ubuntu this installs it:"
        echo "  sudo apt-get install$debian"
    fi
    if [ -n "$pypi" ]; then
        echo "In that interpreter's environment:"
        echo "  $python -m pip install$pypi"
    fi
} >&2
exit 1
